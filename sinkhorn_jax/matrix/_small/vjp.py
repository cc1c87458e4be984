"""The kernels for small matrices as functions with a derivative, and their limits."""

import functools
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._core.gradient import Exact
from ..._runtime.partition import by_part
from ..._runtime.shard_map import varying_like
from ..._runtime.vmap import fold_vmap
from .._problem import Matrices, Potentials, Problem

# Rows and columns of a matrix. Larger ones have vectors long enough to work on.
MAX_SIZE: Final = 16


class Kernels(NamedTuple):
    """The forward and the backward kernel call of a platform, for a batch."""

    # (problem, has_plan, logits, a, b) -> (plan,), or f, g and marginal error.
    forward: Callable[..., tuple[Array, ...]]
    # (problem, logits, a, b, dplan or df, dg) -> dlogits, da, db.
    backward: Callable[..., tuple[Array, Array, Array]]


def solvers(kernels: Kernels) -> tuple[Callable[..., Array], Callable[..., Potentials]]:
    """The functions `plan` and `potentials` of an implementation."""

    @functools.partial(jax.jit, static_argnums=0)
    def plan(problem: Problem, matrices: Matrices) -> Float[Array, "*batch T S"]:
        matrices = varying_like(matrices, matrices)
        out: Any = _solve(kernels, problem, True, *matrices[:3])
        return out[0]

    @functools.partial(jax.jit, static_argnums=0)
    def potentials(problem: Problem, matrices: Matrices) -> Potentials:
        matrices = varying_like(matrices, matrices)
        out: Any = _solve(kernels, problem, False, *matrices[:3])
        f, g, error = out
        num_iters = jnp.full(error.shape, problem.options.num_iters, jnp.int32)
        return Potentials(f, g, error, num_iters)

    return plan, potentials


def why_not(problem: Problem, platform: str) -> str | None:
    """The first limit of the kernels that the problem exceeds, or None."""
    if problem.dtype not in (jnp.float32, jnp.bfloat16):
        return f"a {platform} kernel takes float32 and bfloat16, got {problem.dtype}"
    if max(problem.t, problem.s) > MAX_SIZE:
        return (
            f"it takes at most {MAX_SIZE} rows and columns, got {problem.t} x "
            f"{problem.s}"
        )
    if problem.options.tolerance is not None:
        return f"it takes no tolerance, got {problem.options.tolerance}"
    if problem.has_tau:
        return "it takes no column_tau but the number 1"
    if not isinstance(problem.options.gradient, Exact):
        return f"it takes gradient=Exact(), got {problem.options.gradient}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _solve(kernels, problem, has_plan, logits, a, b):
    return _solve_fwd(kernels, problem, has_plan, logits, a, b)[0]


def _solve_fwd(kernels, problem, has_plan, logits, a, b):
    forward = functools.partial(kernels.forward, problem, has_plan)
    return _by_part(problem, forward, logits, a, b), (logits, a, b)


def _solve_bwd(kernels, problem, has_plan, residuals, cotangents):
    if not has_plan:
        cotangents = cotangents[:2]  # The marginal error is not differentiated.
    backward = functools.partial(kernels.backward, problem)
    return _by_part(problem, backward, *residuals, *cotangents)


_solve.defvjp(_solve_fwd, _solve_bwd)


def _by_part(problem, kernel, *arrays):
    def of_part(logits, *arrays):
        part = problem.part_of(Matrices(logits, *arrays[:2]))
        return part.unflatten(fold_vmap(kernel, *part.flatten((logits, *arrays))))

    return by_part(of_part, problem.axes, problem.axes, *arrays)
