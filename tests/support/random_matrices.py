"""Random matrix problems of all kinds, and the properties of every one of them."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies

from sinkhorn_jax import Exact, Implicit, Truncated, sinkhorn, sinkhorn_potentials

from . import reference

# The largest errors that pass, see `check`.
ATOL = {"float64": 1e-9, "float32": 5e-6}
GRADIENT_ATOL = {"float64": 1e-8, "float32": 1e-4}


@dataclasses.dataclass(frozen=True)
class Program:
    """The options and the shape that a program is compiled for."""

    implementation: str
    dtype: str
    shape: tuple[int, int]
    num_iters: int = 10
    finish: str = "rows"
    gradient: Any = Exact()  # noqa: RUF009 - frozen.
    tolerance: float | None = None

    @property
    def name(self):
        shape, gradient = "x".join(map(str, self.shape)), type(self.gradient).__name__
        words = (self.implementation, self.dtype, shape, self.finish, gradient)
        return ", ".join((*words, f"tolerance {self.tolerance}"))

    @property
    def oracle(self):
        """The program whose gradients are right."""
        return dataclasses.replace(self, implementation="reference", dtype="float64")

    @property
    def options(self):
        names = ("num_iters", "finish", "gradient", "tolerance", "implementation")
        return {name: getattr(self, name) for name in names}

    def draw(self):
        """The problems of this program."""
        return problems(self)

    def check(self, problem):
        """Raises AssertionError if a property fails; returns the largest errors."""
        return check(self, problem)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The arrays of a program, made from numbers that shrink towards simple ones."""

    seed: int
    scale: float  # The deviation of the logits.
    row_offset: float  # The deviation of what is added to whole rows.
    col_offset: float
    density: float  # The part of the entries that is allowed.
    num_padded: int  # Rows and columns that are excluded.
    given: tuple[bool, bool]  # Marginals of rows and columns.
    num_zeros: int  # Entries of each given marginal that are 0.

    def arrays(self, program):
        """Logits [2, T, S], where, and two marginals of equal totals."""
        rng = np.random.default_rng(self.seed)
        t, s = program.shape
        logits = self.scale * rng.normal(size=(2, t, s))
        logits += self.row_offset * rng.normal(size=(2, t, 1))
        logits += self.col_offset * rng.normal(size=(2, 1, s))
        where = rng.uniform(size=(2, t, s)) < self.density
        where[:, 0] = where[:, :, 0] = True
        for size, axis in ((t, 1), (s, 2)):
            padded = rng.permutation(size)[: min(self.num_padded, size - 1)]
            np.moveaxis(where, axis, 0)[padded] = False
        a, b = (rng.uniform(0.2, 1.2, (2, size)) for size in (t, s))
        for marginal, is_given in zip((a, b), self.given, strict=True):
            if is_given:
                zeros = min(self.num_zeros, marginal.shape[1] - 1)
                marginal[:, rng.permutation(marginal.shape[1])[:zeros]] = 0.0
            else:
                marginal[:] = 1.0
        # What has no mass is padding, and the totals of the rest are equal.
        where &= (a > 0)[:, :, None] & (b > 0)[:, None, :]
        a, b = where.any(2) * a, where.any(1) * b
        ratio = a.sum(1, keepdims=True) / np.maximum(b.sum(1, keepdims=True), 1e-9)
        cast = lambda x: x.astype(program.dtype)
        return cast(logits), where, cast(a), cast(b * ratio)


def problems(program):
    """Any problem; mild ones for `Implicit`, which needs a converged plan."""
    is_implicit = isinstance(program.gradient, Implicit)
    sizes = lambda *values: strategies.sampled_from(values)
    return strategies.builds(
        Problem,
        seed=strategies.integers(0, 2**32 - 1),
        scale=sizes(1.0, 0.0) if is_implicit else sizes(1.0, 0.0, 5.0, 20.0, 100.0),
        row_offset=sizes(0.0, 300.0, 1e6),
        col_offset=sizes(0.0, 1.0) if is_implicit else sizes(0.0, 30.0, 300.0, 1e4),
        density=sizes(1.0) if is_implicit else sizes(1.0, 0.9, 0.5, 0.1),
        num_padded=strategies.integers(0, 3),
        given=strategies.tuples(strategies.booleans(), strategies.booleans()),
        num_zeros=strategies.integers(0, 2),
    )


@functools.cache
def compiled(program):
    """Plan, potentials, and the gradients of a sum over both."""
    options = program.options

    def loss(logits, a, b, where, weights):
        given = {"row_marginal": a, "col_marginal": b, "where": where}
        plan = sinkhorn(logits, **options, **given)
        found = sinkhorn_potentials(logits, **options, **given)
        finite = lambda x, is_used: jnp.where(is_used, x, 0.0)
        rows, cols = where.any(2), where.any(1)
        w = weights.astype(plan.dtype)
        # The sum of both potentials has no free constant.
        both = finite(found.f, rows)[:, :, None] + finite(found.g, cols)[:, None, :]
        return (plan * w).sum() + (finite(both, where) * w).sum(), (plan, found)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


def check(program, problem):
    """Raises AssertionError if a property fails; returns the largest errors.

    Those of plans are relative to the largest marginal, which no entry exceeds, or to
    1; those of gradients to the largest entry of the gradient, or to 1. Those of
    marginal errors are absolute.
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
    atol, largest = ATOL[program.dtype], max(1.0, a.max(), b.max())
    axis, target = (2, a) if program.finish == "rows" else (1, b)
    if program.num_iters and (program.finish == "rows" or found.num_iters.all()):
        note("exact sum", plan.sum(axis) / largest, target / largest, atol)

    # Plans and potentials are those of the plain loop.
    for number, num_iters in enumerate(found.num_iters):
        excluded = np.where(where[number], logits[number].astype(np.float64), -np.inf)
        marginals = a[number].astype(np.float64), b[number].astype(np.float64)
        arguments = (excluded, int(num_iters), *marginals, program.finish)
        expected = reference.sinkhorn(*arguments)
        note("plan", plan[number] / largest, expected / largest, atol)
        error = reference.potentials(*arguments)[2]
        note("marginal error", found.marginal_error[number], error, atol)

    # Gradients are those of the log-space scan in float64.
    oracle = program.oracle
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
        # The place in a vector of the CPU may change how a number is rounded.
        note("plan in another place", again[::-1] / largest, plan / largest, atol)
        for each, before in zip(again_gradients, gradients, strict=True):
            size, limit = max(1.0, np.abs(before).max()), GRADIENT_ATOL[program.dtype]
            note("gradient there", each[::-1] / size, before / size, limit)
    return errors


IMPLEMENTATIONS = ("scaling", "reference")
SHAPES = ((5, 7), (6, 6), (1, 8), (8, 1), (16, 3), (24, 24))
GRADIENTS = (Exact(), Truncated(2), Implicit(tolerance=1e-12))
FINISHES = ("rows", "columns")
TOLERANCES = (None, 1e-3)
DTYPES = ("float64", "float32")


def every_program():
    axes = (IMPLEMENTATIONS, DTYPES, SHAPES, FINISHES, GRADIENTS, TOLERANCES)
    for implementation, dtype, shape, finish, gradient, tolerance in itertools.product(
        *axes
    ):
        is_implicit = isinstance(gradient, Implicit)
        if is_implicit and tolerance is not None:
            tolerance = {"float64": 1e-12, "float32": 1e-6}[dtype]
        yield Program(
            implementation,
            dtype,
            shape,
            num_iters=300 if is_implicit else 10,
            finish=finish,
            gradient=gradient,
            tolerance=tolerance,
        )
