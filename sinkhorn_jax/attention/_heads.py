"""Attention operands, one head at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._core.domain import Domain
from .._core.precision import accum_dtype, dot
from .._runtime.scheduling import map_and_add, map_matrices, matrices_in_flight
from ._problem import (
    Operands,
    Problem,
    add_bias_and_mask,
    dropout_keep,
    uniform_marginals,
)


class Heads:
    """What each of the B * N heads sees, by its index b * N + n.

    Heads share keys, values, a broadcast bias and a broadcast mask; nothing is repeated
    for them.
    """

    def __init__(
        self, problem: Problem, operands: Operands, in_flight: int | None = None
    ):
        self.problem = problem
        self.dtype = accum_dtype(problem.dtype)
        self.indices = jnp.arange(problem.batch * problem.num_heads)
        self._operands = operands
        self._query = self.split(operands.query)
        self._key, self._value = self.split(operands.key), self.split(operands.value)
        self._groups = problem.num_heads // problem.num_key_heads
        self._in_flight = in_flight or matrices_in_flight(
            len(self.indices), problem.t, problem.s, self.dtype.itemsize
        )

    @property
    def product_dtype(self) -> jnp.dtype:
        """Of what `streaming` multiplies; sums of the products are in `dtype`.

        A CPU has no fast product of bfloat16, and float16 has too short a range for the
        plan and its gradient.
        """
        if self.problem.dtype == jnp.bfloat16 and jax.default_backend() != "cpu":
            return self.problem.dtype
        return self.dtype

    def low(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The array in `product_dtype`."""
        return x.astype(self.product_dtype)

    def split(self, x: Float[Array, "B T N ..."]) -> Float[Array, "BN T ..."]:
        """Head axes in front."""
        x = jnp.swapaxes(x, 1, 2)
        return x.reshape(-1, *x.shape[2:])

    def split_transposed(self, x: Float[Array, "B T N D"]) -> Float[Array, "BN D T"]:
        """Head axes in front, tokens last: the layout of a left factor of a plan."""
        x = jnp.transpose(x, (0, 2, 3, 1))
        return x.reshape(-1, *x.shape[2:])

    def join(self, x: Float[Array, "BN T D"]) -> Float[Array, "B T N D"]:
        """The inverse of `split`."""
        return jnp.swapaxes(x.reshape(self.problem.batch, -1, *x.shape[1:]), 1, 2)

    def join_transposed_groups(
        self, x: Float[Array, "BN D S"]
    ) -> Float[Array, "B S K D"]:
        """Tokens and heads back, summed over the heads that share a key head."""
        p = self.problem
        x = x.reshape(p.batch, p.num_key_heads, self._groups, *x.shape[1:]).sum(axis=2)
        return jnp.transpose(x, (0, 3, 1, 2))

    def query(
        self, head: Int[Array, ""], dtype: jnp.dtype | None = None
    ) -> Float[Array, "T H"]:
        """Queries times the scale; in a narrower dtype as they are, for exactness."""
        if dtype not in (None, self.dtype):
            return self._query[head].astype(dtype)
        return self._query[head].astype(self.dtype) * self.problem.scale

    def key(self, head: Int[Array, ""]) -> Float[Array, "S H"]:
        """Keys."""
        return self._key[head // self._groups].astype(self.dtype)

    def value(self, head: Int[Array, ""]) -> Float[Array, "S D"]:
        """Values."""
        return self._value[head // self._groups].astype(self.dtype)

    def logits(
        self,
        head: Int[Array, ""],
        query: Float[Array, "I H"],
        key_t: Float[Array, "H S"],
        start: Int[Array, ""] | int = 0,
    ) -> Float[Array, "I S"]:
        """Logits with bias, -inf where a query may not attend to a key.

        Args:
            head: Its index.
            query: What `query` returns, or some rows of it that follow each other.
            key_t: The keys, transposed.
            start: Position of the first of these queries.
        """
        batch, n = head // self.problem.num_heads, head % self.problem.num_heads
        query_valid, key_valid = self._operands.query_valid, self._operands.key_valid

        def of_rows(x):
            if x.shape[0] == 1:
                return x
            return jax.lax.dynamic_slice_in_dim(x, start, query.shape[0])

        def of_head(x):
            if x is None:
                return None
            x = x[batch if x.shape[0] > 1 else 0, n if x.shape[1] > 1 else 0]
            return of_rows(x)

        logits = dot(query, key_t)
        if query.dtype != self.dtype:
            logits = logits * self.problem.scale
        return add_bias_and_mask(
            logits,
            of_head(self._operands.bias),
            of_head(self._operands.mask),
            None if query_valid is None else of_rows(query_valid[batch]),
            None if key_valid is None else key_valid[batch],
        )

    def marginals(
        self, domain: Domain
    ) -> tuple[Float[Array, " T"], Float[Array, " S"]]:
        """Row and column sums of the plan."""
        return uniform_marginals(domain.rows, domain.cols, self.dtype)

    def keep(
        self, head: Int[Array, ""], rows: Int[Array, " I"] | None = None
    ) -> Float[Array, "I S"] | None:
        """What the plan, or these rows of it, is multiplied by for dropout, if any."""
        rng = self._operands.dropout_rng
        return None if rng is None else dropout_keep(self.problem, rng, head, rows)

    def cotangents(
        self,
        dq: Float[Array, "BN T H"],
        dk_t: Float[Array, "BN H S"],
        dv_t: Float[Array, "BN D S"],
        dbias: Float[Array, "..."] | None,
    ) -> Operands:
        """Of the operands, from those of the heads' queries with scale."""
        dtype = self.problem.dtype
        return Operands(
            query=self.join(dq * self.problem.scale).astype(dtype),
            key=self.join_transposed_groups(dk_t).astype(dtype),
            value=self.join_transposed_groups(dv_t).astype(dtype),
            bias=dbias,
            mask=None,
            query_valid=None,
            key_valid=None,
            dropout_rng=None,
        )

    def map(self, fn: Callable[[Any], Any], xs: Any) -> Any:
        """`fn` of every head, as many at once as suit the device."""
        return map_matrices(fn, xs, self._in_flight)

    @property
    def bias_shape(self) -> tuple[int, ...] | None:
        """(T or 1, S or 1); None without bias."""
        bias = self._operands.bias
        return None if bias is None else bias.shape[2:]

    def sum_to_bias(self, dlogits: Float[Array, "T S"]) -> Float[Array, "..."] | None:
        """A head's part of the cotangent of the bias; None without bias."""
        if self.bias_shape is None:
            return None
        axes = tuple(i for i in (0, 1) if self.bias_shape[i] == 1)
        return dlogits.sum(axis=axes, keepdims=True)

    def map_and_sum_bias(
        self, fn: Callable[[Any], tuple[Any, Float[Array, "..."] | None]], xs: Any
    ) -> tuple[Any, Float[Array, "..."] | None]:
        """`map` of the first result, and the sum of the heads' `sum_to_bias`."""
        bias = self._operands.bias
        if bias is None:
            return self.map(fn, xs)
        batch, n = jnp.divmod(self.indices, self.problem.num_heads)
        slots = jnp.zeros_like(self.indices)
        if bias.shape[0] > 1:
            slots = slots + batch * bias.shape[1]
        if bias.shape[1] > 1:
            slots = slots + n
        # Summed on the way: all heads' terms together would be B * N times T * S.
        total = jnp.zeros((bias.shape[0] * bias.shape[1], *bias.shape[2:]), self.dtype)
        out, total = map_and_add(fn, xs, total, slots, self._in_flight)
        return out, total.reshape(bias.shape).astype(bias.dtype)
