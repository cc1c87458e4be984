"""Random attention problems of all kinds, and the properties of every one of them."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import numpy as np
from hypothesis import strategies

from sinkhorn_jax import Exact, Truncated, sinkhorn_attention

from . import reference

# The largest errors that pass, with one rounding of the largest logit for each unit:
# see `check`.
ATOL = {"float64": 1e-9, "float32": 5e-6}
GRADIENT_ATOL = {"float64": 1e-8, "float32": 1e-4}
NAMES = ("query", "key", "value", "bias")
WINDOW = (1, 2)


@dataclasses.dataclass(frozen=True)
class Program:
    """The options and the shapes that a program is compiled for."""

    implementation: str
    dtype: str
    tokens: tuple[int, int]  # T and S.
    heads: tuple[int, int] = (2, 2)  # N and K.
    num_iters: int = 5
    finish: str = "rows"
    gradient: Any = Exact()  # noqa: RUF009 - frozen.
    # none, lengths, mask, segments, or window: the last two with a column_tau, and the
    # window with marginals.
    padding: str = "none"

    @property
    def name(self):
        sizes = "x".join(map(str, (*self.tokens, *self.heads)))
        words = (f"attention {self.implementation}", self.dtype, sizes, self.finish)
        return ", ".join((*words, type(self.gradient).__name__, self.padding))

    @property
    def oracle(self):
        """The program whose gradients are right."""
        return dataclasses.replace(self, implementation="reference", dtype="float64")

    @property
    def options(self):
        names = ("num_iters", "finish", "gradient", "implementation")
        window = {"local_window_size": WINDOW} if self.padding == "window" else {}
        return {name: getattr(self, name) for name in names} | window

    def draw(self):
        """The problems of this program."""
        return problems()

    def check(self, problem):
        """Raises AssertionError if a property fails; returns the largest errors."""
        return check(self, problem)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The arrays of a program, made from numbers that shrink towards simple ones."""

    seed: int
    scale: float  # The deviation of the logits.
    key_offset: float  # What is added to all keys, as whole rows of the logits.
    col_offset: float  # The deviation of what a bias adds to whole columns.
    density: float  # The part of the entries that a mask allows.

    def arrays(self, program):
        """Query, key, value and bias; other arguments; mask [2, 1, T, S]; the sums.

        The mask is all that the other arguments exclude. The sums are those that the
        oracle takes.
        """
        rng = np.random.default_rng(self.seed)
        (t, s), (n, k) = program.tokens, program.heads
        query = self.scale * rng.normal(size=(2, t, n, 4))
        key = rng.normal(size=(2, s, k, 4)) + self.key_offset
        value = rng.normal(size=(2, s, k, 3))
        bias = self.col_offset * rng.normal(size=(2, 1, 1, s))
        bias = bias + rng.normal(size=(2, n, t, s))
        lengths = rng.integers(1, t + 1, 2), rng.integers(1, s + 1, 2)
        mask = rng.uniform(size=(2, 1, t, s)) < self.density
        mask[:, :, 0] = mask[:, :, :, 0] = True
        rows, cols = (
            np.arange(size) < n[:, None]
            for size, n in zip((t, s), lengths, strict=True)
        )
        valid = rows[:, None, :, None] & cols[:, None, None, :]
        names = ("query_seq_lengths", "key_value_seq_lengths")
        arguments, sums = dict(zip(names, lengths, strict=True)), {}
        match program.padding:
            case "none":
                arguments, mask = {}, np.ones((2, 1, t, s), bool)
            case "lengths":
                mask = valid
            case "mask":
                mask = mask & valid
                arguments = {"mask": mask}
            case "segments":
                arguments, mask, sums = _segments(rng, t, s)
            case "window":
                arguments, mask, sums = _window(rng, t, s)
        if sums:
            tau = rng.choice([0.0, 0.3, 0.9, 1.0], size=(2, n))
            sums["tau"] = tau.astype(program.dtype)
            arguments["column_tau"] = sums["tau"]
        arrays = (x.astype(program.dtype) for x in (query, key, value, bias))
        return tuple(arrays), arguments, mask, sums


def _segments(rng, t, s):
    ids = [np.sort(rng.integers(0, 4, size=(2, size))) for size in (t, s)]
    mask = (ids[0][:, :, None] == ids[1][:, None, :]) & (ids[0] > 0)[:, :, None]
    valid = [mask.any(axis) for axis in (2, 1)]
    rows, cols = (
        np.array([[v[b][x[b] == i].sum() for i in ids[1][b]] for b in range(2)])
        for x, v in zip(ids, valid, strict=True)
    )
    sums = {"a": valid[0] * 1.0, "b": valid[1] * rows / np.maximum(cols, 1)}
    names = ("query_segment_ids", "key_segment_ids")
    sums = {name: x[:, None] for name, x in sums.items()}
    return dict(zip(names, ids, strict=True)), mask[:, None], sums


def _window(rng, t, s):
    distance = np.arange(s) - np.arange(t)[:, None]
    band = (distance >= -WINDOW[0]) & (distance <= WINDOW[1])
    mask = np.broadcast_to(band, (2, 1, t, s))
    a, b = (np.exp(rng.normal(size=(2, 1, size))) for size in (t, s))
    a, b = a * mask.any(3), b * mask.any(2)
    b = b * (a.sum(-1) / b.sum(-1))[..., None]
    return {"query_marginal": a, "key_marginal": b}, mask, {"a": a, "b": b}


def problems():
    sizes = lambda *values: strategies.sampled_from(values)
    return strategies.builds(
        Problem,
        seed=strategies.integers(0, 2**32 - 1),
        scale=sizes(1.0, 0.0, 5.0, 20.0),
        key_offset=sizes(0.0, 1.0, 30.0),
        col_offset=sizes(0.0, 30.0, 300.0),
        density=sizes(1.0, 0.9, 0.5, 0.1),
    )


@functools.cache
def compiled(program):
    """Output and marginal error, and the gradients of a sum over the output."""

    def loss(arrays, arguments, weights):
        *qkv, bias = arrays
        out, error = sinkhorn_attention(
            *qkv, bias=bias, return_marginal_error=True, **arguments, **program.options
        )
        return (out * weights.astype(out.dtype)).sum(), (out, error)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def check(program, problem):
    """Raises AssertionError if a property fails; returns the largest errors.

    That of the output is relative to the largest value, or to 1, and those of gradients
    are relative to the largest entry of a gradient, or to 1. Logits of size z are
    rounded by z times the eps of the dtype, so that much is added to what passes.
    """
    errors = {}
    arrays, arguments, mask, sums = problem.arrays(program)
    (t, _), (n, _) = program.tokens, program.heads
    weights = np.random.default_rng(problem.seed + 1).normal(size=(2, t, n, 3))
    run = compiled(program)
    (_, (out, error)), gradients = jax.device_get(run(arrays, arguments, weights))
    query, key, value, bias = (x.astype(np.float64) for x in arrays)
    logits = reference.attention_logits(query, key, bias=bias, mask=mask)
    largest = np.abs(logits[np.isfinite(logits)]).max(initial=0) + np.abs(bias).max()
    rounding = np.finfo(program.dtype).eps * largest

    def note(name, found, expected, atol):
        size = max(1.0, np.abs(expected).max())
        difference = float(np.abs(found - expected).max()) / size
        assert difference <= atol + rounding, f"The {name} is off by {difference:.2g}."
        errors[name] = max(difference, errors.get(name, 0.0))

    # Everything is a number, and nothing of padding is left.
    for each in (out, error, *gradients):
        assert np.isfinite(each).all()
    rows, cols = mask[:, 0].any(2), mask[:, 0].any(1)
    padding = dict(zip(NAMES, (~rows, ~cols, ~cols), strict=False))
    assert not out[~rows].any()
    for gradient, unused in zip(gradients, padding.values(), strict=False):
        assert not gradient[unused].any()
    assert not gradients[3][np.broadcast_to(~mask, bias.shape)].any()

    # The output is that of the plain loop, the marginal error that of its columns.
    plain = {"num_iters": program.num_iters, "finish": program.finish, "sums": sums}
    expected = reference.sinkhorn_attention(
        query, key, value, bias=bias, mask=mask, **plain
    )
    note("output", out, expected, ATOL[program.dtype])
    options = {"finish": program.finish, **sums}
    of_plan = reference.potentials(logits, program.num_iters, **options)[2]
    note("marginal error", error, of_plan, ATOL[program.dtype])

    # Gradients are those of the log-space scan in float64.
    oracle = program.oracle
    if oracle != program:
        given = query, key, value, bias
        wide = jax.tree.map(
            lambda x: x.astype(np.float64) if x.dtype == program.dtype else x, arguments
        )
        _, expected = compiled(oracle)(given, wide, weights)
        for name, each, right in zip(NAMES, gradients, expected, strict=True):
            for number in range(2):
                pair = each[number], np.asarray(right[number])
                note(f"gradient of the {name}", *pair, GRADIENT_ATOL[program.dtype])

    # Elements of the batch do not see each other, nor what is excluded.
    poisoned = [
        np.where(padding[name][..., None, None], junk, x).astype(program.dtype)
        for name, x, junk in zip(NAMES, arrays, (np.nan, np.inf, 3e38), strict=False)
    ]
    poisoned.append(np.where(mask, arrays[3], np.nan).astype(program.dtype))
    for changed in (arrays, tuple(poisoned)):
        turned = (x[::-1] for x in changed)
        turned_arguments = {name: x[::-1] for name, x in arguments.items()}
        (_, (again, _)), again_gradients = run(
            tuple(turned), turned_arguments, weights[::-1]
        )
        # The place in a vector of the CPU may change how a number is rounded.
        note("output in another place", again[::-1], out, ATOL[program.dtype])
        for each, before in zip(again_gradients, gradients, strict=True):
            note("gradient there", each[::-1], before, GRADIENT_ATOL[program.dtype])
    return errors


IMPLEMENTATIONS = ("scaling", "streaming", "reference")
SIZES = (((5, 7), (2, 1)), ((6, 6), (2, 2)), ((1, 8), (2, 2)), ((33, 17), (4, 2)))
GRADIENTS = (Exact(), Truncated(2))
FINISHES = ("rows", "columns")
PADDINGS = ("none", "lengths", "mask", "segments", "window")
DTYPES = ("float64", "float32")


def every_program():
    for implementation, dtype, (tokens, heads), *rest in itertools.product(
        IMPLEMENTATIONS, DTYPES, SIZES, FINISHES, GRADIENTS, PADDINGS
    ):
        finish, gradient, padding = rest
        yield Program(
            implementation,
            dtype,
            tokens,
            heads,
            finish=finish,
            gradient=gradient,
            padding=padding,
        )
