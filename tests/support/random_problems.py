"""Random matrix problems of all kinds, as hypothesis strategies."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies

from sinkhorn_jax import Exact, Implicit, Truncated, sinkhorn, sinkhorn_potentials


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
    def options(self):
        names = ("num_iters", "finish", "gradient", "tolerance", "implementation")
        return {name: getattr(self, name) for name in names}


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
        yield Program(
            implementation,
            dtype,
            shape,
            num_iters=300 if is_implicit else 10,
            finish=finish,
            gradient=gradient,
            tolerance=(1e-12 if dtype == "float64" else 1e-6)
            if is_implicit and tolerance
            else tolerance,
        )
