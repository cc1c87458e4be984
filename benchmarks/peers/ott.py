"""OTT-JAX: its Sinkhorn solver on the logits of each head, compiled.

OTT does column, row, column, row ... from given potentials, so it starts from those of
the softmax, computed here: then its L iterations are ours, and end on the rows.
Convergence is not looked at; OTT computes the marginal error once, after the last one.

The cost matrix is given as an array. OTT also has point clouds that recompute it, with
less memory and more time; they are not measured.
"""

import jax
import jax.numpy as jnp
import ott
from jaxtyping import Array, Float
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import implicit_differentiation, sinkhorn

from ..harness.cases import Case
from ..harness.program import Mode, Program, compiled
from .context import lenient


def unrolled(num_iters: int) -> sinkhorn.Sinkhorn:
    """The gradient through all iterations, by autodiff of a scan."""
    # One block of `num_iters` inner iterations. With several, the backward pass of OTT
    # 0.6 starts at the first block where min_iterations equals max_iterations: an
    # error of 1e-3 in the gradient.
    return sinkhorn.Sinkhorn(
        threshold=-1.0,
        inner_iterations=num_iters,
        min_iterations=num_iters,
        max_iterations=num_iters,
        implicit_diff=None,
    )


def implicit(num_iters: int) -> sinkhorn.Sinkhorn:
    """The gradient at the fixed point, which the iterations have not quite reached.

    Its error is therefore theirs and not rounding.
    """
    return sinkhorn.Sinkhorn(
        threshold=-1.0,
        inner_iterations=num_iters,
        min_iterations=num_iters,
        max_iterations=num_iters,
        implicit_diff=implicit_differentiation.ImplicitDiff(),
    )


def attend(
    query: Float[Array, "1 T N H"],
    key: Float[Array, "1 S N H"],
    value: Float[Array, "1 S N D"],
    solver: sinkhorn.Sinkhorn,
) -> Float[Array, "1 T N D"]:
    """Sinkhorn attention around OTT's solver. Half precision is widened to float32."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)

    def head(qkv):
        q, k, v = (x.astype(dtype) for x in qkv)
        logits = q @ k.T * query.shape[-1] ** -0.5  # [T, S]
        t, s = logits.shape
        problem = linear_problem.LinearProblem(
            geometry.Geometry(cost_matrix=-logits, epsilon=1.0),
            jnp.ones(t, dtype),
            jnp.full(s, t / s, dtype),
        )
        f = -jax.nn.logsumexp(logits, axis=1)
        out = solver(problem, init=(f, jnp.zeros(s, dtype)))
        return (out.matrix @ v).astype(query.dtype)

    heads = tuple(jnp.moveaxis(x[0], 1, 0) for x in (query, key, value))
    # Heads one by one on a CPU, where that is no slower when they are large and takes
    # less memory; elsewhere all at once, as is usual.
    on_cpu = jax.default_backend() == "cpu"
    out = jax.lax.map(head, heads) if on_cpu else jax.vmap(head)(heads)
    return jnp.moveaxis(out, 0, 1)[None]


def why_not(function: str, case: Case, mode: Mode) -> str | None:
    """A reason, or None."""
    del function, mode
    if case.num_iters == 0:
        return "without iterations there is nothing for its solver to do"
    return None


def build(function: str, case: Case, mode: Mode) -> Program:
    """The compiled program."""
    solver = {"unrolled": unrolled, "implicit": implicit}[function](case.num_iters)
    with lenient():
        return compiled(
            lambda *args: attend(*args, solver),
            case,
            mode,
            single_head=False,
            version=f"ott-jax {ott.__version__}",
        )
