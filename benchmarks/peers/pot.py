"""POT: its Sinkhorn in log space with its JAX backend, eager, head by head.

`sinkhorn_log` and not `sinkhorn_stabilized`, which asks for the device of a traced
array and so has no gradient under JAX. Both decide in Python whether to stop, so
neither can be compiled. It does column, row, column, row ... from given potentials, so
it starts from those of the softmax, computed here: then its L iterations are ours, and
end on the rows. It looks at the marginal error every tenth iteration and never stops.
"""

import jax
import jax.numpy as jnp
import ot
from jaxtyping import Array, Float

from ..harness import limits as _limits
from ..harness import process_memory as _process
from ..harness.cases import Case
from ..harness.program import Mode, Program, in_mode
from .context import lenient


def sinkhorn_log(
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


def why_not(function: str, case: Case, mode: Mode) -> str | None:
    """A reason, or None."""
    del function, mode
    if case.num_iters == 0:
        return "without iterations there is nothing for its solver to do"
    return None


def build(function: str, case: Case, mode: Mode) -> Program:
    """The eager program. Heads are apart before the clock runs."""
    _limits.check_memory(_estimate(case, mode))
    attend = {"sinkhorn_log": sinkhorn_log}[function]
    of_head = in_mode(lambda *args: attend(*args, case.num_iters), mode)

    def call(*heads):
        with lenient():
            return jax.block_until_ready([of_head(*head) for head in heads])

    def to_numpy(results):
        return jax.tree.map(lambda *heads: jnp.stack(heads, axis=1)[None], *results)

    return Program(
        call=call,
        prepare=lambda inputs: tuple(
            tuple(x[0, :, head] for x in inputs) for head in range(case.heads)
        ),
        to_numpy=to_numpy,
        version=f"POT {ot.__version__}",
        memory_source="resident",
        measure_peak=_process.peak_growth if _on_cpu() else None,
    )


def _estimate(case, mode):
    # One head at a time, in T x S arrays. The gradient of eager operations keeps about
    # two for each of the 2 L + 1 log-sum-exps. Measured: 9 forward, 21 to 40 for L 10.
    arrays = 9 if mode == "forward" else 2 * (2 * case.num_iters + 1)
    size = 8 if case.dtype == "float64" else 4
    vectors = 8 * case.heads * case.tokens * case.head_dim  # Inputs and results.
    return size * (arrays * case.tokens**2 + vectors)


def _on_cpu():
    return jax.default_backend() == "cpu"
