"""OTT-JAX: its Sinkhorn solver on the logits of each head, compiled.

OTT alternates column and row steps from given potentials. It starts from those of the
softmax, computed here, so that its iterations are ours and end on the rows.
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

# "unrolled" is autodiff of a scan over all iterations. "implicit" is the gradient at
# the fixed point, which the iterations have not quite reached; its error shows that.
GRADIENTS = {
    "unrolled": lambda: None,
    "implicit": implicit_differentiation.ImplicitDiff,
}


def attend(
    query: Float[Array, "1 T N H"],
    key: Float[Array, "1 S N H"],
    value: Float[Array, "1 S N D"],
    solver: sinkhorn.Sinkhorn,
) -> Float[Array, "1 T N D"]:
    """Sinkhorn attention by OTT's solver. Half precision is widened to float32."""
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
    # On a CPU heads run one by one, which is no slower for large heads and takes less
    # memory; elsewhere they run all at once.
    on_cpu = jax.default_backend() == "cpu"
    out = jax.lax.map(head, heads) if on_cpu else jax.vmap(head)(heads)
    return jnp.moveaxis(out, 0, 1)[None]


def why_not(case: Case) -> str | None:
    """The reason why OTT cannot run the case, or None."""
    if case.num_iters == 0:
        return "without iterations there is nothing for its solver to do"
    return None


def build(function: str, case: Case, mode: Mode) -> Program:
    """The compiled program."""
    # A single block of inner iterations: with several, the backward pass of OTT 0.6
    # starts at the first one, an error of 1e-3 in the gradient.
    solver = sinkhorn.Sinkhorn(
        threshold=-1.0,
        inner_iterations=case.num_iters,
        min_iterations=case.num_iters,
        max_iterations=case.num_iters,
        implicit_diff=GRADIENTS[function](),
    )
    fn = lambda *args: attend(*args, solver)
    with lenient():
        return compiled(fn, case, mode, version=f"ott-jax {ott.__version__}")
