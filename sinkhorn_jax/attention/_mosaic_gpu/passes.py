"""The forward and the backward pass of padded heads, in the regime of their blocks."""

import jax
import jax.numpy as jnp

from .correction import correction_terms
from .resident.forward import forward as resident_forward
from .resident.logits_cotangent import operand_cotangents as resident_operand_cotangents
from .resident.reverse import reverse_sweep as resident_reverse_sweep
from .shared_memory import resident_logits_cotangent_stages
from .streamed.forward import forward as streamed_forward
from .streamed.logits_cotangent import operand_cotangents as streamed_operand_cotangents
from .streamed.reverse import reverse_sweep as streamed_reverse_sweep
from .types import PaddedOperands, PotentialHistory


def forward(problem, blocks, *padded):
    """Output in float32, marginal error if it is asked for, and the potentials."""
    operands = PaddedOperands(*padded)
    col_marginal = operands.col_marginal
    if blocks.regime == "resident":
        result = resident_forward(problem, blocks, operands, col_marginal)
    else:
        result = streamed_forward(problem, blocks, operands)
    out, history, col_sums = result
    error = None
    if col_sums is not None:
        rows, cols = operands.rows, operands.cols
        lack = jnp.where(cols, jnp.abs(col_sums - col_marginal), 0)
        error = lack.sum(axis=1) / jnp.maximum(rows.sum(axis=1, dtype=jnp.float32), 1)
    return out, error, _swap(history)


def backward(problem, blocks, query, key, value, rows, cols, f, g, out, dout):
    """Cotangents dQ, dK, dV in float32, those of keys and values for each query head.

    The output O is P V with P rounded for the tensor cores, so the seed
    df = rowsum(dO * O) of docs/architecture.md (6) contains that rounding, and the rows
    of the logits cotangent would not sum to 0. The reverse sweeps therefore add the row
    sums of P * (dO V^T - df), with P not rounded, to df.
    """
    operands = PaddedOperands(query, key, value, rows, cols)
    history = _swap(PotentialHistory(f, g))
    df = (dout.astype(jnp.float32) * out).sum(axis=2)
    is_resident = blocks.regime == "resident"
    reverse_sweep = resident_reverse_sweep if is_resident else streamed_reverse_sweep
    cotangents = reverse_sweep(problem, blocks, operands, history, dout, df)
    terms = correction_terms(problem, operands, history, cotangents)
    if resident_logits_cotangent_stages(problem, blocks):
        dq, dk, dv = resident_operand_cotangents(problem, blocks, terms, operands, dout)
    else:
        dq, dk, dv = streamed_operand_cotangents(problem, terms, operands, dout)
    scale = jnp.float32(problem.scale)
    return dq * scale, dk * scale, dv


def _swap(history):
    """Swaps iterations and heads: `fold_vmap` joins the axis of `vmap` to the first."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), history)
