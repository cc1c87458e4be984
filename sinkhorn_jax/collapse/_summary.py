"""A network's rank and attention, layer by layer, and what the numbers do not say."""

import functools
import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ._measures import relative_residual
from ._over_depth import as_layers, measures_over_depth

# Attention with this share of the entropy of uniform attention is taken for uniform.
UNIFORM: Final = 0.99
# A column defect below this is taken for none.
EXACT: Final = 1e-3


class Summary(NamedTuple):
    """Measures by layer, over a batch and all heads. A pytree."""

    relative_residual: Float[Array, " L"]  # In the Frobenius norm; median.
    stable_rank: Float[Array, " L"]  # Median.
    effective_rank: Float[Array, " L"]  # Median.
    attention_entropy: Float[Array, " K"] | None  # Over that of uniform; mean.
    column_defect: Float[Array, " K"] | None  # Mean.
    path_residual: Float[Array, " K"] | None  # Median; None unless T = S.
    fewest_tokens: Int[Array, ""]  # That count, in any element of the batch.

    def warnings(self) -> list[str]:
        """What the numbers do not say, one sentence each; not under `jit`."""
        found = []
        if self.fewest_tokens < 2:
            found.append(
                "An element of the batch has fewer than two tokens that count: its "
                "residual is 0 and its rank 1, whatever the network does."
            )
        residual = np.asarray(self.relative_residual)
        floor = 4 * float(jnp.finfo(residual.dtype).eps)
        if (lost := residual < floor).any():
            found.append(
                f"The relative residual is rounding in layer {_which(lost)}: at least "
                f"{-math.log10(floor):.1f} decades are lost there, and more is not "
                "known."
            )
        if self.attention_entropy is not None:
            is_uniform = np.asarray(self.attention_entropy) > UNIFORM
            if is_uniform.any():
                found.append(
                    f"Attention is uniform to within {1 - UNIFORM:.0%} in layer "
                    f"{_which(is_uniform)}: there softmax and Sinkhorn are nearly the "
                    "same."
                )
        if self.path_residual is not None and self.column_defect is not None:
            if self.column_defect[-1] < EXACT:
                found.append(
                    "The columns of the last plan have equal sums, so a mean over "
                    "tokens behind it does not see how it moved them. Read a class "
                    "token or the maximum instead."
                )
        return found

    def table(self) -> str:
        """A line for each layer, and the warnings below; not under `jit`.

        Tokens and plans are numbered each from 0: with the embedding as the first
        layer of tokens, plan k makes tokens k + 1.
        """
        columns = {
            "tokens: residual": self.relative_residual,
            "stable rank": self.stable_rank,
            "effective rank": self.effective_rank,
            "plans: entropy": self.attention_entropy,
            "column defect": self.column_defect,
            "path residual": self.path_residual,
        }
        given = {k: np.asarray(x) for k, x in columns.items() if x is not None}
        depth = max(len(x) for x in given.values())
        lines = ["  ".join(["layer", *given])]
        for layer in range(depth):
            cells = [f"{layer:5}"]
            for name, values in given.items():
                text = f"{values[layer]:.3g}" if layer < len(values) else ""
                cells.append(text.rjust(len(name)))
            lines.append("  ".join(cells))
        return "\n".join([*lines, *self.warnings()])


@functools.partial(jax.jit, static_argnames=("dtype",))
def summarize(
    hidden_states: Float[Array, "L *B T D"] | Sequence[Float[Array, "*B T D"]],
    plans: Float[Array, "K *P T S"] | Sequence[Float[Array, "*P T S"]] | None = None,
    where: Bool[Array, "*#B T"] | None = None,
    *,
    dtype: jax.typing.DTypeLike | None = None,
) -> Summary:
    r"""Rank, entropy and column sums of a network by layer, in one call.

    `print(summarize(...).table())` shows the numbers, and says which of them mean
    nothing. `measures_over_depth` has them for each element of the batch.

    Args:
        hidden_states: As in `measures_over_depth`.
        plans: As in `measures_over_depth`.
        where: As in `measures_over_depth`. In square plans (T = S) a column counts
            where its row does, in others all columns do.
        dtype: As in `measures_over_depth`.

    Returns:
        The summary, with layers on the first axis. `attention_entropy` is from 0 to 1
        if padding gets no weight. `column_defect` is $\sum_j |c_j - \bar c| / T$ for
        column sums $c_j$ with the mean $\bar c$, from 0 to 2. `path_residual` at layer
        k is the relative residual of the product $P_k \cdots P_0$ of the plans so far,
        each the mean over heads: what attention alone, without skip connections, leaves
        of the rank.

    Raises:
        TypeError, ValueError: As in `measures_over_depth`.
    """
    measures = measures_over_depth(hidden_states, plans, where, dtype=dtype)
    by_layer = lambda x: jnp.median(x.reshape(x.shape[0], -1), axis=1)
    hidden_states = as_layers("hidden_states", hidden_states)
    counts = jnp.int32(hidden_states.shape[-2])
    if where is not None:
        counts = where.sum(axis=-1, dtype=jnp.int32)
    of_tokens = (
        by_layer(measures.relative_residual["fro"]),
        by_layer(measures.stable_rank),
        by_layer(measures.effective_rank),
    )
    if plans is None:
        return Summary(*of_tokens, None, None, None, counts.min())
    plans = as_layers("plans", plans)
    batch = hidden_states.shape[1:-2]
    t, s = plans.shape[-2:]
    rows = jnp.ones((*batch, t), bool)
    rows = rows if where is None else jnp.broadcast_to(where, rows.shape)
    cols = rows if t == s else jnp.ones((*batch, s), bool)
    share = functools.partial(_entropy_share, cols=cols)
    entropy = jax.vmap(share)(measures.attention_entropy)
    kind = measures.stable_rank.dtype

    def over_heads(plan):
        """The mean plan [*B, T, S] of the heads, 0 where a row does not count."""
        plan = plan.astype(kind).reshape(*batch, -1, t, s).mean(axis=-3)
        return jnp.where(rows[..., None], plan, 0)

    def defect(plan):
        heads = plan.astype(kind).reshape(*batch, -1, t, s)
        return _column_defect(heads, rows[..., None, :], cols[..., None, :]).mean()

    defects = lax.map(defect, plans)
    if t != s:
        return Summary(*of_tokens, entropy, defects, None, counts.min())

    def longer(product, plan):
        product = over_heads(plan) @ product
        return product, jnp.median(relative_residual(product, "fro", rows))

    start = jnp.broadcast_to(jnp.eye(t, dtype=kind), (*batch, t, t))
    _, path = lax.scan(longer, start, plans)
    return Summary(*of_tokens, entropy, defects, path, counts.min())


def _which(layers):
    return ", ".join(map(str, np.flatnonzero(layers)))


def _entropy_share(entropy, *, cols):
    """The entropy [*B, heads] over its maximum, mean; 1 for a single column."""
    count = cols.sum(axis=-1).astype(entropy.dtype)
    count = count.reshape(*count.shape, *[1] * (entropy.ndim - count.ndim))
    most = jnp.log(jnp.where(count > 1, count, 2))
    return jnp.where(count > 1, entropy / most, 1).mean()


def _column_defect(plan, rows, cols):
    sums = jnp.where(rows[..., None], plan, 0).sum(axis=-2)
    num_rows, num_cols = (
        jnp.maximum(x.sum(axis=-1), 1).astype(plan.dtype) for x in (rows, cols)
    )
    mean = jnp.where(cols, sums, 0).sum(axis=-1) / num_cols
    defect = jnp.abs(sums - mean[..., None])
    return jnp.where(cols, defect, 0).sum(axis=-1) / num_rows
