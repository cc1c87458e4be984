"""POT: its Sinkhorn in log space with its JAX backend, eager, head by head.

`sinkhorn_log` decides in Python whether to stop and cannot be compiled;
`sinkhorn_stabilized` has no gradient under JAX. It starts from the potentials of the
softmax, computed here, so that its iterations are ours and end on the rows.
"""

import jax
import jax.numpy as jnp
import ot
from jaxtyping import Array, Float

from ..harness import limits, process_memory
from ..harness.cases import Case
from ..harness.program import Mode, Program, in_mode
from .context import lenient


def attend(
    query: Float[Array, "T H"],
    key: Float[Array, "S H"],
    value: Float[Array, "S D"],
    num_iters: int,
) -> Float[Array, "T D"]:
    """Sinkhorn attention of a head. Half precision is widened to float32."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    q, k, v = (x.astype(dtype) for x in (query, key, value))
    logits = q @ k.T * query.shape[-1] ** -0.5  # [T, S]
    t, s = logits.shape
    plan = ot.bregman.sinkhorn_log(
        jnp.ones(t, dtype),
        jnp.full(s, t / s, dtype),
        -logits,
        reg=1.0,
        numItermax=num_iters,
        stopThr=-1.0,
        warn=False,
        warmstart=(-jax.nn.logsumexp(logits, axis=1), jnp.zeros(s, dtype)),
    )
    return (plan @ v).astype(query.dtype)


def why_not(case: Case) -> str | None:
    """The reason why POT cannot run the case, or None."""
    if case.num_iters == 0:
        return "without iterations there is nothing for its solver to do"
    return None


def build(function: str, case: Case, mode: Mode) -> Program:
    """The eager program. The heads are separated before the clock runs."""
    del function
    # T x S arrays of one head: 9 forward; the gradient keeps about two for each of the
    # 2 L + 1 half steps (21 to 40 were measured for L = 10).
    arrays = 9 if mode == "forward" else 2 * (2 * case.num_iters + 1)
    vectors = 8 * case.heads * case.tokens * case.head_dim  # Inputs and results.
    size = 8 if case.dtype == "float64" else 4
    limits.check_memory(size * (arrays * case.tokens**2 + vectors))
    one_head = in_mode(lambda *args: attend(*args, case.num_iters), mode)

    def call(*heads):
        with lenient():
            return jax.block_until_ready([one_head(*head) for head in heads])

    on_cpu = jax.default_backend() == "cpu"
    return Program(
        call=call,
        prepare=lambda inputs: tuple(
            tuple(x[0, :, head] for x in inputs) for head in range(case.heads)
        ),
        to_numpy=lambda results: jax.tree.map(
            lambda *heads: jnp.stack(heads, axis=1)[None], *results
        ),
        version=f"POT {ot.__version__}",
        memory_source="resident",
        measure_peak=process_memory.peak_growth if on_cpu else None,
    )
