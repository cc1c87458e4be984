"""A network's rank and attention, layer by layer, and what the numbers do not say."""

import functools
import textwrap
from collections.abc import Sequence
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._runtime.arguments import as_array
from ._measures import relative_residual
from ._over_depth import as_layers, check_depth, measures_over_depth

# Attention with this share of the entropy of uniform attention is taken for uniform.
UNIFORM: Final = 0.99
# A share above 1 by more than this is no rounding.
ROUNDING: Final = 1e-3
# A column defect below this is taken for none.
EXACT: Final = 1e-3


class Summary(NamedTuple):
    """Measures by layer, over a batch and all heads. A pytree.

    Attributes:
        relative_residual: In the Frobenius norm; median.
        stable_rank: Median.
        effective_rank: Median.
        attention_entropy: Over that of uniform attention; mean. None without plans.
        column_defect: Mean. None without plans.
        path_residual: Median. None without plans, and unless T = S.
        fewest_tokens: The smallest number of tokens that count in one element.
        floor: A relative residual below this is rounding.
    """

    relative_residual: Float[Array, " L"]
    stable_rank: Float[Array, " L"]
    effective_rank: Float[Array, " L"]
    attention_entropy: Float[Array, " K"] | None
    column_defect: Float[Array, " K"] | None
    path_residual: Float[Array, " K"] | None
    fewest_tokens: Int[Array, ""]
    floor: Float[Array, ""]

    def warnings(self) -> list[str]:
        """Sentences on numbers that mean nothing here; not under `jit` or `vmap`."""
        return list(self._warnings())

    def _warnings(self):
        if self.fewest_tokens < 2:
            yield (
                "An element of the batch has fewer than two tokens that count: its "
                "residual is 0 and its rank 1, whatever the network does."
            )
        residual = np.asarray(self.relative_residual)
        if (is_nan := np.isnan(residual)).any():
            yield f"There is a NaN or an infinity in tokens {_which(is_nan)}."
        floor = float(self.floor)
        if self.fewest_tokens > 1 and (lost := residual < floor).any():
            yield (
                f"The relative residual is rounding in tokens {_which(lost)}: there it "
                f"is at most {floor:.0e}, and no more is known of it."
            )
        if self.attention_entropy is None or self.column_defect is None:
            return
        entropy = np.asarray(self.attention_entropy)
        is_above = entropy > 1 + ROUNDING
        if is_above.any():
            yield (
                "The entropy of attention is above that of uniform attention to the "
                f"tokens that count in plans {_which(is_above)}: the other tokens get "
                "weight there."
            )
        if (is_uniform := (entropy > UNIFORM) & ~is_above).any():
            yield (
                f"The entropy of attention is within {100 * (1 - UNIFORM):.0f} % of "
                f"that of uniform attention in plans {_which(is_uniform)}: there every "
                "token reads nearly the mean of all, whatever the normaliser."
            )
        if self.path_residual is not None and self.column_defect[-1] < EXACT:
            yield (
                "If the network averages the tokens directly behind the last "
                "attention, that average does not depend on its weights, because the "
                "columns of the last plan have equal sums. Read a class token or the "
                "maximum, or the mean behind an MLP."
            )

    def table(self) -> str:
        """A line for each layer, and the warnings below; not under `jit` or `vmap`.

        Tokens and plans are numbered each from 0: with the embedding as the first
        layer of tokens, plan k makes tokens k + 1.
        """
        of_tokens = {
            "relative residual": self.relative_residual,
            "stable rank": self.stable_rank,
            "effective rank": self.effective_rank,
        }
        of_plans = {
            "entropy, 1 is uniform": self.attention_entropy,
            "column defect": self.column_defect,
            "path residual": self.path_residual,
        }
        blocks = [_block("tokens", of_tokens)]
        if self.attention_entropy is not None:
            blocks.append(_block("plans", of_plans))
        blocks += (textwrap.fill(each, 80) for each in self._warnings())
        return "\n\n".join(blocks)


def _block(title, columns):
    given = {k: np.asarray(x) for k, x in columns.items() if x is not None}
    lines = ["  ".join([title.ljust(6), *given])]
    for layer, values in enumerate(zip(*given.values(), strict=True)):
        cells = (f"{x:.3g}".rjust(len(k)) for k, x in zip(given, values, strict=True))
        lines.append("  ".join([f"{layer:6}", *cells]))
    return "\n".join(lines)


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
    hidden_states = as_layers("hidden_states", hidden_states)
    check_depth("hidden_states", hidden_states, "Use x[None] for a single layer.")
    if 0 in hidden_states.shape:
        raise ValueError(
            "hidden_states must have a layer, an element and a token at least, got "
            f"shape {hidden_states.shape}: of nothing there is no median."
        )
    *batch, t, _ = hidden_states.shape[1:]
    where = None if where is None else as_array("where", where)
    if plans is not None:
        plans = _over_batch(as_layers("plans", plans), batch, t)
    measures = measures_over_depth(hidden_states, plans, where, dtype=dtype)
    by_layer = lambda x: jnp.median(x.reshape(x.shape[0], -1), axis=1)
    kind = measures.stable_rank.dtype
    eps = max(float(jnp.finfo(x).eps) for x in (kind, hidden_states.dtype))
    rows = jnp.ones((*batch, t), bool)
    rows = rows if where is None else jnp.broadcast_to(where, rows.shape)
    of_tokens = (
        by_layer(measures.relative_residual["fro"]),
        by_layer(measures.stable_rank),
        by_layer(measures.effective_rank),
    )
    about = rows.sum(axis=-1, dtype=jnp.int32).min(), jnp.asarray(4 * eps, kind)
    if plans is None:
        return Summary(*of_tokens, None, None, None, *about)
    s = plans.shape[-1]
    cols = rows if t == s else jnp.ones((*batch, s), bool)
    share = functools.partial(_entropy_share, cols=cols)
    entropy = jax.vmap(share)(measures.attention_entropy)

    def by_head(plan):
        plan = plan.astype(kind).reshape(*batch, -1, t, s)
        return jnp.where(rows[..., None, :, None], plan, 0)

    def defect(plan):
        return _column_defect(by_head(plan), rows, cols).mean()

    defects = lax.map(defect, plans)
    if t != s:
        return Summary(*of_tokens, entropy, defects, None, *about)

    def longer(product, plan):
        mean = jnp.where(cols[..., None, :], by_head(plan).mean(axis=-3), 0)
        product = mean @ product
        return product, jnp.median(relative_residual(product, "fro", rows))

    start = jnp.broadcast_to(jnp.eye(t, dtype=kind), (*batch, t, t))
    _, path = lax.scan(longer, start, plans)
    return Summary(*of_tokens, entropy, defects, path, *about)


def _over_batch(plans, batch, t):
    """The plans (K, *batch, heads..., T, S), broadcast where a batch axis is 1."""
    own = plans.shape[1 : 1 + len(batch)]
    fits = len(own) == len(batch) and all(
        n in (1, size) for n, size in zip(own, batch, strict=True)
    )
    if plans.ndim < 3 + len(batch) or plans.shape[-2] != t or not fits:
        raise ValueError(
            f"plans must be (depth, *batch, heads, T, S) with the batch {tuple(batch)} "
            f"and T = {t} of the hidden states, with or without axes of heads, got "
            f"shape {plans.shape}."
        )
    rest = plans.shape[1 + len(batch) :]
    return jnp.broadcast_to(plans, (plans.shape[0], *batch, *rest))


def _which(layers):
    return ", ".join(map(str, np.flatnonzero(layers)))


def _entropy_share(entropy, *, cols):
    """The entropy [*B, heads] over its maximum, mean; 1 for a single column."""
    count = cols.sum(axis=-1).astype(entropy.dtype)
    count = count.reshape(*count.shape, *[1] * (entropy.ndim - count.ndim))
    most = jnp.log(jnp.where(count > 1, count, 2))
    return jnp.where(count > 1, entropy / most, 1).mean()


def _column_defect(plan, rows, cols):
    """The defect [*B, heads] of plans with zeros in the rows that do not count."""
    sums, rows, cols = plan.sum(axis=-2), rows[..., None, :], cols[..., None, :]
    num_rows, num_cols = (
        jnp.maximum(x.sum(axis=-1), 1).astype(plan.dtype) for x in (rows, cols)
    )
    mean = jnp.where(cols, sums, 0).sum(axis=-1) / num_cols
    defect = jnp.abs(sums - mean[..., None])
    return jnp.where(cols, defect, 0).sum(axis=-1) / num_rows
