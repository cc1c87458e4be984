"""The properties of every matrix problem, and their check on random ones."""

import dataclasses

import hypothesis
import jax
import numpy as np

from . import reference
from .random_problems import compiled, problems

# The largest errors that pass, see `check`.
ATOL = {"float64": 1e-9, "float32": 5e-6}
GRADIENT_ATOL = {"float64": 1e-8, "float32": 1e-4}


def check(program, problem):
    """Raises AssertionError if a property fails; returns the largest errors.

    Those of plans and marginal errors are absolute: entries of a plan are at most as
    large as its largest marginal. Those of gradients are relative to the largest entry
    of the gradient, or to 1.
    """
    errors = {}

    def note(name, found, expected, atol):
        error = float(np.abs(found - np.asarray(expected)).max())
        assert error <= atol, f"The {name} is off by {error:.2g}."
        errors[name] = max(error, errors.get(name, 0.0))

    logits, where, a, b = problem.arrays(program)
    weights = np.random.default_rng(problem.seed + 1).normal(size=logits.shape)
    run = compiled(program)
    (_, (plan, found)), gradients = jax.device_get(run(logits, a, b, where, weights))

    # Everything is a number, and nothing of padding is left.
    for each in (plan, *found, *gradients):
        assert np.isfinite(each).all()
    rows, cols = where.any(2), where.any(1)
    assert not plan[~where].any()
    for potential, gradient, used in zip(
        found[:2], gradients[1:], (rows, cols), strict=True
    ):
        assert not potential[~used].any()
        assert not gradient[~used].any()
    assert not gradients[0][~where].any()

    # One side is exact.
    atol = ATOL[program.dtype]
    axis, target = (2, a) if program.finish == "rows" else (1, b)
    if program.num_iters and (program.finish == "rows" or found.num_iters.all()):
        note("exact sum", plan.sum(axis), target, atol)

    # Plans and potentials are those of the plain loop.
    for number, num_iters in enumerate(found.num_iters):
        excluded = np.where(where[number], logits[number].astype(np.float64), -np.inf)
        marginals = a[number].astype(np.float64), b[number].astype(np.float64)
        arguments = (excluded, int(num_iters), *marginals, program.finish)
        expected = reference.sinkhorn(*arguments)
        note("plan", plan[number], expected, atol)
        error = reference.potentials(*arguments)[2]
        note("marginal error", found.marginal_error[number], error, atol)

    # Gradients are those of the log-space scan in float64.
    oracle = dataclasses.replace(program, implementation="reference", dtype="float64")
    if oracle != program:
        given = (x.astype(np.float64) for x in (logits, a, b))
        (_, (_, other)), expected = compiled(oracle)(*given, where, weights)
        for each, right in zip(gradients, expected, strict=True):
            for number in range(2):
                # Rounding may decide when a tolerance stops.
                if found.num_iters[number] == other.num_iters[number]:
                    size = max(1.0, np.abs(right[number]).max())
                    pair = each[number] / size, right[number] / size
                    note("gradient", *pair, GRADIENT_ATOL[program.dtype])

    # Matrices do not see each other, nor what is excluded.
    poison = np.where(where, logits, np.array([np.nan, np.inf])[:, None, None])
    for changed in (
        run(*(x[::-1] for x in (logits, a, b, where, weights))),
        run(
            poison.astype(program.dtype)[::-1],
            *(x[::-1] for x in (a, b, where, weights)),
        ),
    ):
        (_, (again, _)), again_gradients = changed
        np.testing.assert_array_equal(again[::-1], plan)
        for each, before in zip(again_gradients, gradients, strict=True):
            np.testing.assert_array_equal(each[::-1], before)
    return errors


def check_many(program, num_examples, seed=0):
    """Checks random problems of a program; returns the largest errors of all."""
    worst = {}

    @hypothesis.settings(max_examples=num_examples, deadline=None, database=None)
    @hypothesis.seed(seed)
    @hypothesis.given(problems(program))
    def check_each(problem):
        for name, error in check(program, problem).items():
            worst[name] = max(error, worst.get(name, 0.0))

    check_each()
    return worst
