"""`sinkhorn_attention`: its signature and what it means."""

import functools
from typing import Literal, overload

from jaxtyping import Array, Bool, Float, Integer

from .._core.gradient import Exact, Gradient
from .._core.options import Finish, Options
from .._runtime.arguments import as_array
from ._call import AttentionImplementation, compute
from ._problem import (
    Dropout,
    GivenMarginals,
    GivenPattern,
)
from ._sequence import Parts, SequenceStrategy, over_sequence
from ._validate import (
    checked_tolerance,
)


# For type checkers: the result is a pair only where `return_marginal_error` is True,
# and either where its value is not known to them.
# fmt: off
@overload
def sinkhorn_attention(
    query: Array, key: Array, value: Array, bias: Array | None = None,
    mask: Array | None = None, *, num_iters: int = 10,
    scale: float | Array | None = None,
    is_causal: bool = False, query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None, query_segment_ids: Array | None = None,
    key_segment_ids: Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_marginal: Array | None = None,
    key_marginal: Array | None = None, column_tau: float | Array = 1.0,
    dropout_rate: float = 0.0, dropout_rng: Array | None = None,
    sequence_axis: str | None = None, sequence_strategy: SequenceStrategy = "auto",
    finish: Finish = "rows",
    gradient: Gradient = ..., tolerance: float | None = None,
    implementation: AttentionImplementation | None = None,
    return_marginal_error: Literal[False] = False,
) -> Array: ...
@overload
def sinkhorn_attention(
    query: Array, key: Array, value: Array, bias: Array | None = None,
    mask: Array | None = None, *, num_iters: int = 10,
    scale: float | Array | None = None,
    is_causal: bool = False, query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None, query_segment_ids: Array | None = None,
    key_segment_ids: Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_marginal: Array | None = None,
    key_marginal: Array | None = None, column_tau: float | Array = 1.0,
    dropout_rate: float = 0.0, dropout_rng: Array | None = None,
    sequence_axis: str | None = None, sequence_strategy: SequenceStrategy = "auto",
    finish: Finish = "rows",
    gradient: Gradient = ..., tolerance: float | None = None,
    implementation: AttentionImplementation | None = None,
    return_marginal_error: Literal[True],
) -> tuple[Array, Array]: ...
@overload
def sinkhorn_attention(
    query: Array, key: Array, value: Array, bias: Array | None = None,
    mask: Array | None = None, *, num_iters: int = 10,
    scale: float | Array | None = None,
    is_causal: bool = False, query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None, query_segment_ids: Array | None = None,
    key_segment_ids: Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_marginal: Array | None = None,
    key_marginal: Array | None = None, column_tau: float | Array = 1.0,
    dropout_rate: float = 0.0, dropout_rng: Array | None = None,
    sequence_axis: str | None = None, sequence_strategy: SequenceStrategy = "auto",
    finish: Finish = "rows",
    gradient: Gradient = ..., tolerance: float | None = None,
    implementation: AttentionImplementation | None = None, return_marginal_error: bool,
) -> Array | tuple[Array, Array]: ...
# fmt: on
def sinkhorn_attention(
    query: Float[Array, "*B T N H"],  # *B is (B,) or ().
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    *,
    num_iters: int = 10,
    scale: float | Float[Array, ""] | None = None,
    is_causal: bool = False,
    query_seq_lengths: Integer[Array, "..."] | None = None,  # (B,) or ().
    key_value_seq_lengths: Integer[Array, "..."] | None = None,
    query_segment_ids: Integer[Array, "..."] | None = None,  # (B, T) or (T,).
    key_segment_ids: Integer[Array, "..."] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_marginal: Float[Array, "..."] | None = None,
    key_marginal: Float[Array, "..."] | None = None,
    column_tau: float | Float[Array, "..."] = 1.0,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    sequence_axis: str | None = None,
    sequence_strategy: SequenceStrategy = "auto",
    finish: Finish = "rows",
    gradient: Gradient = Exact(),  # noqa: B008 - frozen.
    tolerance: float | None = None,
    implementation: AttentionImplementation | None = None,
    return_marginal_error: bool = False,
) -> Float[Array, "*B T N D"] | tuple[Float[Array, "*B T N D"], Float[Array, "*B N"]]:
    r"""Attention whose weights are doubly stochastic.

    Replaces the softmax by Sinkhorn's algorithm: with logits
    $Z = \mathrm{scale}\, QK^\top + \mathrm{bias}$, returns $PV$ where
    $P_{ij} = \exp(Z_{ij} + f_i + g_j)$, rows sum to 1 and columns to $T/S$.

    The iteration starts from the softmax and then normalises columns and rows
    `num_iters` times. Rows are exact; columns approach $T/S$. With `num_iters=0` this
    is `jax.nn.dot_product_attention`, except that a row without an allowed key gives
    zeros here and an average of the values there.

    A row or column of the logits without an allowed entry is padding: it takes part in
    neither marginal, its output and gradients are zero, and the rest equals the result
    for the cropped inputs (columns then sum to valid rows / valid columns), whatever
    lies in padding, NaN and infinity included. Give *both* sequence lengths, or a mask
    that excludes padded queries as well as padded keys: a mask of the keys alone leaves
    padded queries in, which pour mass into the columns.

    Args:
        query: Queries. B batch (or no batch axis), T query length, N heads, H head
            dimension.
        key: Keys. S key length; K heads, a divisor of N.
        value: Values. D may differ from H.
        bias: Added to the logits; up to 4 axes, broadcasts to (B, N, T, S). -inf
            excludes an entry like the mask, and so does every number of at most half of
            `jnp.finfo(bias.dtype).min`. Another large negative number, such as -1e9,
            does not: in a whole column it cancels, and the column gets its full mass.
            Where the values are known, such a bias warns.
        mask: True where a query may attend to a key; boolean, shaped like `bias`. Where
            the allowed entries admit no doubly stochastic plan the iteration cannot
            converge, and the marginal error shows it. A causal mask is an error where
            its values are known. **Under `jit` they are not**, neither of an argument
            nor of a mask made there: it then passes in silence, the plan goes towards
            the identity, and until it is there later tokens leak into earlier ones
            through the column sums. Make the mask with NumPy, or outside, to have it
            checked, or use `traced_checks`, which finds this, lengths out of range, and
            a causal bias.
        num_iters: Column-then-row normalisations, a Python integer. Time is linear in
            it.
        scale: Multiplies $QK^\top$; the inverse temperature. Default $1/\sqrt{H}$. Each
            value of a Python number is compiled by itself. A scalar array is an operand
            like the query, with a gradient, for a temperature that is learnt or swept;
            kernels multiply it into the query, which rounds in 16 bits. For a
            temperature of each head multiply the query.
        is_causal: Must be False; accepted for the sake of the error that explains why.
        query_seq_lengths: Valid queries of each batch element, or one number for all;
            from 0 to T, which is checked where the values are known. If only this one
            is given, all keys count as valid: nothing is guessed.
        key_value_seq_lengths: Valid keys of each batch element; likewise.
        query_segment_ids: The segment of each query, integers that broadcast to (B, T);
            0 and below is padding. A query attends to the keys of its own segment, and
            each segment is a problem of its own, as in a call of its own: columns sum
            to its valid rows / its valid columns.
        key_segment_ids: The segment of each key, (B, S). Both are given or neither.
        local_window_size: Query i attends to the keys from i - left to i + right; a
            number is both. At least 1 to either side: a one-sided window, like a causal
            mask, leaves the identity alone. A narrow window converges slowly, and the
            marginal error tells. "streaming" computes only the part of the logits that
            the window allows.
        query_marginal: Row sums of the plan, floating, broadcasts to (B, N, T), or
            (N, T) without a batch axis. Default: 1, or if only `key_marginal` is given,
            uniform with its total. The output is $PV$ as it is: divide it by
            `query_marginal` for averages of the values. 0 makes a query padding, and
            marginals of padding are ignored. Checks are those of `sinkhorn`.
        key_marginal: Column sums, broadcasts to (B, N, S), with the total of the row
            sums; likewise. Default: uniform.
        column_tau: How strictly columns have their sums: 1 is doubly stochastic
            attention, 0 softmax attention for any `num_iters`, and a number between
            them sets $g = \tau\,(\log b - \mathrm{logsumexp}_i(Z + f))$ in each column
            step. It converges to transport with a penalty
            $\tau / (1 - \tau)\,\mathrm{KL}$ on the columns, so the marginal error does
            not go to 0, and the totals of the marginals need not agree. A number in
            [0, 1], or a floating array that broadcasts to (B, N), with a gradient.
        dropout_rate: Probability with which an entry of the plan is dropped, in [0, 1);
            the entries that remain are divided by 1 - rate. A Python number.
        dropout_rng: Key for the dropout. The dropout mask is a function of this key and
            of the entry's position, and is the same in every implementation. The parts
            of a `jax.shard_map` count on in the batch, so they have different masks;
            with `check_vma=False` they cannot be told apart, and need keys of their
            own.
        sequence_axis: The axis of a `jax.shard_map` around the call over which tokens
            are divided: T and S are then numbers of this device's tokens, in `bias`,
            `mask`, marginals and segment ids as well, where S stays the whole in `bias`
            and `mask`. Lengths, window and positions are those of the whole sequence,
            and are the same on all devices. The result is that of one device.
        sequence_strategy: How the devices of `sequence_axis` work together. "ulysses":
            they exchange tokens for heads, each attends for its part of the heads, and
            so they must divide N and K. "mixed": each attends for its queries to all
            keys, and the column sums are added up over devices in each iteration; that
            is "streaming", without a window. "auto" is "ulysses" where devices divide
            the heads, else "mixed".
        finish: "rows", or "columns" to drop the last row step: then the columns are
            exact and the rows approximate.
        gradient: `Exact`, `Truncated` or `Implicit`; see their docstrings.
        tolerance: The marginal error at which a head stops, each by itself; `num_iters`
            is then the limit. As in `sinkhorn_potentials`.
        implementation: One of the names below, which agree up to rounding. None takes
            "scaling", or "streaming" where five (T, S) arrays of the potentials' dtype
            exceed 1 GiB and it can run, on every device.
        return_marginal_error: Also return how far the other marginal is from exact.

    Implementations:
        - "scaling": Allocates a few (T, S) arrays for each head in flight. The fastest
          for num_iters of 1 or more, measured on CPUs only. Takes every argument.
          Reverse mode only, any number of times: `jax.jacrev(jax.grad(f))` is the exact
          Hessian.
        - "streaming": Holds nothing of size (T, S), forward or backward, unless `bias`
          or `mask` has that size itself (then the gradient of the bias has it too).
          Takes `Exact` and `Truncated`, and no tolerance. Reverse mode only, likewise.
        - "reference": Plain JAX on all logits at once. Takes every argument and every
          transform; forward mode (`jax.jvp`, `jax.jacfwd`, `jax.linearize`) needs it.
        - "mosaic_gpu": Pallas kernels for NVIDIA's Hopper GPUs, compiled for them but
          not run on one; only taken by name. Holds T S / 64 numbers for each head.
          Takes bfloat16 and float16, H and D up to 128, up to 64 iterations, `Exact`,
          finish="rows" and sequence lengths, but no bias, mask, segments, window,
          dropout, marginals, `column_tau` below 1 or tolerance. Reverse mode only.
        - "mosaic_tpu": Pallas kernels for TPUs, compiled for them but not measured on
          one; only taken by name. Takes float32 and bfloat16, any H, D and number of
          iterations, and otherwise what "mosaic_gpu" takes. Reverse mode only. To lower
          or export it without a TPU, name one as in docs/choosing.md.

    Returns:
        The attended values in the query's dtype; potentials and sums are kept in
        float32 at least. With `return_marginal_error` a pair: these values, and the
        marginal error (B, N) or (N,), Σ_j |Σ_i P_ij - b_j| / Σ_i a_i (of the rows for
        finish="columns") before dropout, between 0 and 2, not differentiated.

    Raises:
        TypeError: Wrong dtypes, `num_iters`, `scale` or `dropout_rate` is not a number,
            `dropout_rng` is no key, or an implementation other than "reference" is
            differentiated in forward mode.
        ValueError: Shapes disagree or are empty, `is_causal` or a causal mask or bias,
            a negative `num_iters`, lengths out of range, an unknown `finish` or
            `implementation`, a dropout rate without a key, `column_tau` outside [0, 1],
            marginals that are negative, not finite, or of different totals, segment
            ids of one side alone, a one-sided window, or tokens or features that an
            Explicit mesh axis divides.
        NotImplementedError: The named implementation cannot run this problem, its
            kernels are for another platform (under `jit` that is an error of Pallas),
            or the TPU that "mosaic_tpu" is traced for has too little VMEM for its
            forward kernel; the backward pass raises it for the backward kernel.

    `return_residual` of `jax.nn.dot_product_attention` is not offered.

    Batch and heads may be divided over devices: each device computes its own. Tokens
    and features may not. docs/many-devices.md has examples and limits.

    Reference:
        Sander et al., Sinkformers, 2022. https://arxiv.org/abs/2110.11773
    """
    names = "query", "key", "value"
    query, key, value = map(as_array, names, (query, key, value))
    parts = Parts(
        query,
        key,
        value,
        bias,
        mask,
        GivenMarginals(query_marginal, key_marginal, column_tau),
        GivenPattern(query_segment_ids, key_segment_ids, local_window_size),
        Dropout(dropout_rate, dropout_rng),
    )
    lengths = query_seq_lengths, key_value_seq_lengths
    attend = functools.partial(
        compute,
        lengths=lengths,
        options=Options(num_iters, finish, gradient, checked_tolerance(tolerance)),
        scale=scale,
        is_causal=is_causal,
        return_marginal_error=return_marginal_error,
    )
    if sequence_axis is None:
        out, error = attend(parts, implementation=implementation)
    else:
        out, error = over_sequence(
            sequence_axis, sequence_strategy, attend, parts, implementation
        )
    return out if error is None else (out, error)
