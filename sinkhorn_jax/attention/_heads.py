"""Attention operands, one head at a time."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._core.marginals import Marginals
from .._core.precision import accum_dtype, dot
from .._core.solve import to_unit
from .._runtime.collectives import gathered_by_ring, on_first, total
from .._runtime.partition import by_part
from .._runtime.scheduling import map_and_add, map_matrices, matrices_in_flight
from . import _problem
from ._pattern import Segments, may_attend
from ._problem import Attended, Operands, Problem


class HeadCotangents(NamedTuple):
    """The cotangents of one head, without that of the bias, which heads share."""

    query: Float[Array, "T H"]  # With scale.
    key_t: Float[Array, "H S"]
    value_t: Float[Array, "D S"]
    marginals: tuple[Array | None, ...]  # Of those that are operands.


class Passes(NamedTuple):
    """How an implementation computes one head, forward and backward."""

    # A function of `Heads` and a head's index that returns ((output [T, D], marginal
    # error or None), history).
    forward: Callable[..., Any]
    # A function of `Heads`, a head's index, its history, its queries with scale [H, T],
    # the cotangents of its output [D, T] and of its last row potential [T], and the
    # number by which these two were divided. It returns (`HeadCotangents`, that of the
    # bias or None), multiplied by that number.
    backward: Callable[..., Any]
    in_flight: int | None = None  # Heads at the same time; None suits the device.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend_by_head(
    problem: Problem, passes: Callable[[Problem], Passes], operands: Operands
) -> Attended:
    """Output and, on request, marginal error, from functions of one head.

    Args:
        problem: The call.
        passes: The functions for a problem, which is the call or a device's part of it.
        operands: The arrays of the call.
    """
    return _attend_fwd(problem, passes, operands)[0]


def _attend_fwd(problem, passes, operands):
    def of_part(operands):
        part = _problem.part_of(problem, operands)
        forward, _, in_flight = passes(part)
        heads = Heads(part, operands, in_flight)
        attended, history = heads.attend(functools.partial(forward, heads))
        return attended, join_batch(part, history)

    results = _problem.RESULT_AXES, "bn"
    attended, history = by_part(of_part, (_problem.AXES,), results, operands)
    out, error = attended
    return (out.astype(problem.dtype), error), (operands, out, history)


def _attend_bwd(problem, passes, residuals, cotangents):
    def of_part(operands, out, history, dout):
        part = _problem.part_of(problem, operands)
        if part.token_axis is not None:
            # The keys are gathered again, instead of staying in memory until now. They
            # seem to depend on the result, because on CPUs XLA drops a barrier.
            is_never = jnp.ravel(out)[0] < -jnp.inf
            key = jnp.where(is_never, 0, operands.key)
            operands = operands._replace(key=key)
        _, backward, in_flight = passes(part)
        heads = Heads(part, operands, in_flight)
        head = functools.partial(backward, heads)
        return heads.cotangents(head, split_batch(history), out, dout)

    dout, _ = cotangents  # The marginal error is not differentiated.
    names = _problem.AXES, "b.n.", "bn", "b.n."
    return (by_part(of_part, names, _problem.AXES, *residuals, dout),)


attend_by_head.defvjp(_attend_fwd, _attend_bwd)


class Heads:
    """The operands of each of the B * N heads, by its index b * N + n.

    Heads share keys, values, a broadcast bias and a broadcast mask; nothing is repeated
    for them.
    """

    def __init__(self, problem: Problem, operands: Operands, in_flight: int | None):
        self.problem = problem
        self.dtype = accum_dtype(problem.dtype)
        self.indices = jnp.arange(problem.batch * problem.num_heads)
        self.scale = _problem.scale_of(problem, operands)
        self._operands, self._masks = operands, operands.masks()
        self._query, self._key, self._value = map(split, operands[:3])
        self._all_keys_t = None
        if problem.token_axis is not None:
            key_t = split_transposed(operands.key)
            self._all_keys_t = gathered_by_ring(problem.token_axis, key_t)
        self._in_flight = in_flight or matrices_in_flight(
            self.indices.shape[0], problem.t, problem.s, self.dtype.itemsize
        )

    @property
    def product_dtype(self) -> jnp.dtype:
        """The dtype of the factors in `streaming`'s products; sums are in `dtype`.

        A CPU has no fast product of bfloat16, and the range of float16 is too short for
        the plan and its gradient.
        """
        if self.problem.dtype == jnp.bfloat16 and jax.default_backend() != "cpu":
            return self.problem.dtype
        return self.dtype

    def low(self, x: Array) -> Array:
        """The array in `product_dtype`."""
        return x.astype(self.product_dtype)

    def query(self, head, dtype: jnp.dtype | None = None) -> Float[Array, "T H"]:
        """Queries times the scale; without it for a `dtype` other than `self.dtype`.

        Scaling would round queries of a narrower dtype: `logits` scales the products.
        """
        if dtype not in (None, self.dtype):
            return self._query[head].astype(dtype)
        return self._query[head].astype(self.dtype) * self.scale

    def key(self, head) -> Float[Array, "S H"]:
        return self._key[head // self.problem.groups].astype(self.dtype)

    def key_t(self, head) -> Float[Array, "H S"]:
        """Keys transposed, in `product_dtype`, and those of other devices too."""
        if self._all_keys_t is None:
            return self.low(self.key(head)).T
        return self.low(self._all_keys_t[head // self.problem.groups])

    def value(self, head) -> Float[Array, "S D"]:
        return self._value[head // self.problem.groups].astype(self.dtype)

    def logits(
        self, head, query, key_t, start: Any = 0, first_key: Any = 0
    ) -> Float[Array, "I J"]:
        """Logits with bias, -inf where a query may not attend to a key.

        The queries [I, H] are the result of `query`, or consecutive rows of it from
        position `start`; the keys [H, J] are transposed, and all or consecutive ones
        from position `first_key`.
        """
        batch, n = head // self.problem.num_heads, head % self.problem.num_heads

        def part(x):
            x = x[batch if x.shape[0] != 1 else 0, n if x.shape[1] != 1 else 0]
            if x.shape[0] == 1:
                return x
            return jax.lax.dynamic_slice_in_dim(x, start, query.shape[0])

        def cols_of(x):
            if x.shape[1] == 1 or key_t.shape[1] == self.problem.s:
                return x
            return jax.lax.dynamic_slice_in_dim(x, first_key, key_t.shape[1], axis=1)

        logits = dot(query, key_t)
        if query.dtype != self.dtype:
            logits = logits * self.scale
        bias, masks = jax.tree.map(
            lambda x: cols_of(part(x)), (self._operands.bias, self._masks)
        )
        window, segments = self.problem.window, self._operands.segments
        if window is not None or segments is not None:
            rows = start + jnp.arange(query.shape[0], dtype=jnp.int32)
            cols = first_key + jnp.arange(key_t.shape[1], dtype=jnp.int32)
            if segments is not None:
                segments = Segments(
                    segments.query[batch][rows], segments.key[batch][cols]
                )
            masks.append(may_attend(window, segments, rows, cols))
        return _problem.add_bias_and_masks(logits, bias, masks)

    def row_marginal(self, head) -> Float[Array, " T"] | None:
        """The row sums that the caller gave a head; None for uniform ones."""
        marginal = self._operands.row_marginal
        if marginal is None:
            return None
        return marginal[head // self.problem.num_heads, head % self.problem.num_heads]

    def over_devices(
        self, sums: Float[Array, " S"], rows: Bool[Array, " T"]
    ) -> tuple[Float[Array, " S"], Float[Array, ""] | None]:
        """Column sums over the rows of all devices, and the number of valid rows.

        The latter is None where this device has all rows.
        """
        axis = self.problem.token_axis
        if axis is None:
            return sums, None
        # One message for both.
        both = jnp.append(sums, rows.sum().astype(sums.dtype))
        both = total(axis, both)
        return both[:-1], both[-1]

    def marginals(
        self, head, rows: Bool[Array, " T"], cols: Bool[Array, " S"], num_rows=None
    ) -> Marginals:
        """The marginals of a head, of which the valid rows and columns are known.

        `num_rows` is that of `over_devices`.
        """
        o, n = self._operands, self.problem.num_heads
        tau = None if o.tau is None else o.tau[head // n, head % n]
        if o.row_marginal is None or o.col_marginal is None:  # Both or none.
            uniform = _problem.uniform_marginals(rows, cols, self.dtype, num_rows)
            return Marginals(*uniform, tau)
        a, b = (x[head // n, head % n] for x in (o.row_marginal, o.col_marginal))
        return Marginals(a, b, tau)

    def given_marginals(self, cotangents: Marginals) -> tuple[Array | None, ...]:
        """Cotangents of a, b and tau, with None for those that are no operands."""
        o, axis = self._operands, self.problem.token_axis
        given = o.row_marginal, o.col_marginal, o.tau
        da, db, dtau = cotangents
        dtau = None if dtau is None else on_first(axis, dtau)
        cotangents = Marginals(da, on_first(axis, db), dtau)
        return tuple(
            None if x is None else y for x, y in zip(given, cotangents, strict=True)
        )

    def keep(self, head, rows=None) -> Float[Array, "I S"] | None:
        """Dropout factors of the plan, or of these rows of it; None without dropout."""
        axis = self.problem.token_axis
        if rows is not None and axis is not None:
            rows = rows + jax.lax.axis_index(axis) * self.problem.t
        rng, ids = self._operands.dropout_rng, self._operands.head_ids
        if rng is None or ids is None:  # Both or none.
            return None
        return _problem.dropout_keep(self.problem, rng, ids.ravel()[head], rows)

    @property
    def bias_shape(self) -> tuple[int, ...] | None:
        """(T or 1, S or 1), the shape of one head's bias; None without bias."""
        bias = self._operands.bias
        return None if bias is None else bias.shape[2:]

    def sum_to_bias(self, dlogits: Float[Array, "T S"]) -> Float[Array, "..."] | None:
        """The cotangent of one head's bias; None without bias."""
        if self.bias_shape is None:
            return None
        axes = tuple(i for i in (0, 1) if self.bias_shape[i] == 1)
        return dlogits.sum(axis=axes, keepdims=True)

    def attend(self, head: Callable[..., Any]) -> tuple[Attended, Any]:
        """The results and the histories of all heads, from a function of the index."""
        (out, error), history = map_matrices(head, self.indices, self._in_flight)
        if error is not None:
            error = error.reshape(self.problem.batch, self.problem.num_heads)
        return (join(self.problem, out), error), history

    def cotangents(self, head: Callable[..., Any], history, out, dout) -> Operands:
        """The cotangents of the operands, from the results of `attend` and from dO."""
        dout = dout.astype(self.dtype)
        # docs/architecture.md (6); with dropout too, because O has the same factors.
        df = (dout * out).sum(axis=-1)
        query = self._operands.query.astype(self.dtype) * self.scale

        def scaled_to_unit(inputs):
            index, history, query_t, cotangent = inputs
            # The result is linear in the cotangent, which may be too large or too small
            # for its products with the factors of the correction.
            (do_t, df), size = to_unit(cotangent, self.problem.token_axis)
            return head(index, history, query_t, do_t, df, size)

        cotangents = split_transposed(dout), split(df)
        inputs = self.indices, history, split_transposed(query), cotangents
        cotangents, dbias = self._map_and_sum_bias(scaled_to_unit, inputs)
        dq, dk_t, dv_t, marginals = cotangents
        dtype, scale = self.problem.dtype, self._operands.scale
        if scale is not None:
            dscale = (split(self._operands.query).astype(self.dtype) * dq).sum()
            scale = dscale.astype(scale.dtype)
        return Operands(
            query=join(self.problem, dq * self.scale).astype(dtype),
            key=join_to_keys(self.problem, dk_t).astype(dtype),
            value=join_to_keys(self.problem, dv_t).astype(dtype),
            bias=dbias,
            scale=scale,
            **self._by_head(marginals),
        )

    def _by_head(self, marginals):
        """The cotangents of the marginals as fields of the operands."""
        shape = self.problem.batch, self.problem.num_heads
        names = "row_marginal", "col_marginal", "tau"
        return {
            name: x if x is None else x.reshape(*shape, *x.shape[1:])
            for name, x in zip(names, marginals, strict=True)
        }

    def _map_and_sum_bias(self, fn, xs):
        """First results of all heads, and the sum of the second over a bias's heads."""
        bias = self._operands.bias
        if bias is None:
            return map_matrices(fn, xs, self._in_flight)
        batch, n = jnp.divmod(self.indices, self.problem.num_heads)
        slots = jnp.zeros_like(self.indices)
        if bias.shape[0] != 1:  # Not >, which a symbolic size does not decide.
            slots = slots + batch * bias.shape[1]
        if bias.shape[1] != 1:
            slots = slots + n
        # Added up head by head: all terms together would be B * N times T * S.
        total = jnp.zeros((bias.shape[0] * bias.shape[1], *bias.shape[2:]), self.dtype)
        out, total = map_and_add(fn, xs, total, slots, self._in_flight)
        return out, total.reshape(bias.shape).astype(bias.dtype)


def join_batch(problem: Problem, x: Any) -> Any:
    """Arrays of all heads, (B N, ...), with the axes of batch and heads apart."""
    sizes = problem.batch, problem.num_heads
    return jax.tree.map(lambda x: x.reshape(*sizes, *x.shape[1:]), x)


def split_batch(x: Any) -> Any:
    """The inverse of `join_batch`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), x)


def split(x: Float[Array, "B T N ..."]) -> Float[Array, "BN T ..."]:
    """The heads flattened with the batch."""
    x = jnp.swapaxes(x, 1, 2)
    return x.reshape(-1, *x.shape[2:])


def split_transposed(x: Float[Array, "B T N D"]) -> Float[Array, "BN D T"]:
    """Like `split`, with tokens last: the layout of a left factor of a plan."""
    x = jnp.transpose(x, (0, 2, 3, 1))
    return x.reshape(-1, *x.shape[2:])


def join(problem: Problem, x: Float[Array, "BN T D"]) -> Float[Array, "B T N D"]:
    """The inverse of `split`."""
    return jnp.swapaxes(x.reshape(problem.batch, -1, *x.shape[1:]), 1, 2)


def join_to_keys(p: Problem, x: Float[Array, "BN D S"]) -> Float[Array, "B S K D"]:
    """The inverse of `split_transposed`, summed over heads that share a key head."""
    x = x.reshape(p.batch, p.num_key_heads, p.groups, *x.shape[1:]).sum(axis=2)
    return jnp.transpose(x, (0, 3, 1, 2))
