"""One head in query blocks, which a pass goes through in order.

A block sees all keys, or with a local window the consecutive ones that its queries may
attend to. The size of what it computes, J, is the same for all blocks.
"""

import copy
from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..._core.domain import minus_both
from ..._core.precision import dot
from ..._runtime.arguments import are_known
from ..._runtime.collectives import ring
from ..._runtime.shard_map import varying_like
from ..._runtime.vmap import max_in_batch
from .._heads import Heads
from .._problem import Problem

# The logits of a query block are written and read a few times before those of the next:
# on a CPU they should fit the cache, on an accelerator they should occupy the device.
CPU_BLOCK_BYTES: Final = 2**22
ACCELERATOR_BLOCK_BYTES: Final = 2**28  # All heads in flight together.
MIN_BLOCK_ROWS: Final = 16  # A matrix product of fewer rows waits for its keys.
# Where devices divide the tokens, sequences are long and memory counts more.
MIN_BLOCK_ROWS_OF_DEVICE: Final = 8
MAX_BLOCK_ROWS: Final = 1024
# Potentials up to here are added to the logits in any order: the rounding error of a
# sum is then a few eps. Elsewhere the order costs a quarter of a pass.
PLAIN_SUM: Final = 32.0

Carry = TypeVar("Carry")
Travelling = TypeVar("Travelling")


class Layout(NamedTuple):
    """How the work is divided: changes speed and memory, results only by rounding."""

    rows: int  # Queries in a block.
    heads_in_flight: int  # A divisor of the number of heads.


def choose_layout(problem: Problem) -> Layout:
    """The layout that suits the device.

    Where `jax.export` has a symbol in place of the number of heads, it is one head in
    flight, and one query block where a length is a symbol.
    """
    heads = problem.batch * problem.num_heads
    if not are_known(problem.t, problem.s):
        return Layout(problem.t, 1)
    most_rows = min(problem.t, MAX_BLOCK_ROWS)
    if problem.window is not None:
        # Half of the logits that a block of as many rows as its window computes are
        # within the window of their row.
        reach = problem.window.left + problem.window.right + 1
        most_rows = min(most_rows, max(MIN_BLOCK_ROWS, reach))
    row_bytes = visible_keys(problem, most_rows) * max(4, problem.dtype.itemsize)
    on_cpu = jax.default_backend() == "cpu"
    limit = (CPU_BLOCK_BYTES if on_cpu else ACCELERATOR_BLOCK_BYTES) // row_bytes
    in_flight, is_divided = 1, problem.token_axis is not None
    if is_divided:
        # The heads share the messages between devices.
        in_flight = heads
        limit //= in_flight
    elif not on_cpu and are_known(heads):
        # Heads first, because they are independent and query blocks are not.
        most = max(1, limit // min(problem.t, 128))
        in_flight = max(n for n in range(1, min(heads, most) + 1) if heads % n == 0)
        limit //= in_flight
    least = MIN_BLOCK_ROWS_OF_DEVICE if is_divided else MIN_BLOCK_ROWS
    rows = min(most_rows, max(least, limit))
    # Even blocks: the last one then repeats fewer rows than there are blocks.
    return Layout(-(-problem.t // -(-problem.t // rows)), in_flight)


def visible_keys(problem: Problem, rows: int) -> int:
    """The number J of consecutive keys that a block of `rows` queries sees."""
    if problem.window is None or not are_known(problem.s, rows):
        return problem.s
    return min(problem.s, rows + problem.window.left + problem.window.right)


class QueryBlock:
    """Consecutive queries of one head, with the keys that they may attend to.

    The last block of a head is moved up to end with the head. The rows that it shares
    with its predecessor are computed twice, with equal results; `fresh` keeps the
    second copy out of sums over rows.
    """

    def __init__(self, blocks: "QueryBlocks", index: Int[Array, ""]):
        rows, t = blocks.rows, blocks.heads.problem.t
        self._blocks = blocks
        self._start = jnp.minimum(index * rows, t - rows)
        self.positions = self._start + jnp.arange(rows, dtype=jnp.int32)
        self.fresh = self.positions >= index * rows
        problem, self._first_key = blocks.heads.problem, blocks.first_key
        self._sees_all = blocks.num_keys == problem.s
        if problem.window is not None and not self._sees_all:
            first, most = self._start - problem.window.left, problem.s - blocks.num_keys
            self._first_key = jnp.clip(first, 0, most)

    def take(self, x: Float[Array, "T ..."]) -> Float[Array, "I ..."]:
        """The block's rows of an array."""
        return jax.lax.dynamic_slice_in_dim(x, self._start, self._blocks.rows)

    def take_fresh(self, x: Float[Array, "D T"]) -> Float[Array, "D I"]:
        """The block's columns of a left factor of the plan, zero where not fresh."""
        x = jax.lax.dynamic_slice_in_dim(x, self._start, self._blocks.rows, axis=1)
        return jnp.where(self.fresh[None, :], x, 0)

    def put(self, x: Float[Array, "T ..."], rows: Float[Array, "I ..."]) -> Array:
        """`x` with the block's rows replaced."""
        return jax.lax.dynamic_update_slice_in_dim(x, rows, self._start, axis=0)

    def put_sum(self, x: Float[Array, "T ..."], rows: Float[Array, "I ..."]) -> Array:
        """`x` with the block's rows replaced, which are sums over the keys.

        Where the block sees one of the parts of the keys that devices have, the sums
        over that part are added.
        """
        if self._blocks.heads.problem.token_axis is None:
            return self.put(x, rows)
        fresh = self.fresh.reshape(-1, *(1 for _ in rows.shape[1:]))
        return self.put(x, self.take(x) + jnp.where(fresh, rows, 0))

    def see(self, x: Float[Array, "... S"], axis: int = -1) -> Float[Array, "... J"]:
        """What an array of the keys has for those that the block sees.

        An array of only these keys is returned as it is.
        """
        if self._sees_all or x.shape[axis] == self._blocks.num_keys:
            return x
        return jax.lax.dynamic_slice_in_dim(
            x, self._first_key, self._blocks.num_keys, axis
        )

    def add(
        self,
        total: Float[Array, "... S"],
        part: Float[Array, "... J"],
        axis: int = -1,
        combine: Callable[[Array, Array], Array] = jnp.add,
    ) -> Float[Array, "... S"]:
        """`total` with what the block has for the keys that it sees added."""
        if self._sees_all or total.shape[axis] == self._blocks.num_keys:
            return combine(total, part)
        part = combine(self.see(total, axis), part)
        return jax.lax.dynamic_update_slice_in_dim(total, part, self._first_key, axis)

    @property
    def row_marginal(self) -> Float[Array, " I"] | None:
        """The row sums that the caller gave; None for uniform ones."""
        marginal = self._blocks.row_marginal
        return None if marginal is None else self.take(marginal)

    @property
    def key(self) -> Float[Array, "J H"]:
        """The keys that the block sees."""
        blocks = self._blocks
        if blocks.heads.problem.token_axis is None:
            return self.see(blocks.heads.low(blocks.heads.key(blocks.head)), axis=0)
        return self.see(blocks.key_t).T

    def logits(self) -> Float[Array, "I J"]:
        """Logits with bias, -inf where excluded; the same bits in every pass."""
        blocks = self._blocks
        query, key_t = self.take(blocks.query), self.see(blocks.key_t)
        first_key = self._first_key
        return blocks.heads.logits(blocks.head, query, key_t, self._start, first_key)

    def kernel(self, f: Float[Array, " T"], g: Float[Array, " S"]) -> Array:
        """The kernel matrix exp(logits + f + g), [I, J]."""
        logits, row, col = self.logits(), self.take(f)[:, None], self.see(g)[None, :]
        is_large = (jnp.abs(f).max() > PLAIN_SUM) | (jnp.abs(g).max() > PLAIN_SUM)
        return jax.lax.cond(
            max_in_batch(is_large),
            lambda: jnp.exp(minus_both(logits, -row, -col)),
            lambda: jnp.exp((logits + row) + col),
        )

    def keep(self) -> Float[Array, "I J"] | None:
        """Dropout factors of the plan; None without dropout."""
        keep = self._blocks.heads.keep(self._blocks.head, self.positions)
        return keep if keep is None else self.see(keep)

    def apply(self, r: Float[Array, " I"], kernel, value) -> Float[Array, "I D"]:
        """Output of the plan diag(r) kernel, with dropout. The values include any c."""
        return r[:, None] * self.apply_unscaled(kernel, value)

    def apply_unscaled(self, kernel, value) -> Float[Array, "I D"]:
        """Like `apply`, without the row scaling."""
        keep, low = self.keep(), self._blocks.heads.low
        kept = kernel if keep is None else kernel * keep
        return dot(low(kept), low(self.see(value, axis=0)))

    def sum_rows(self, weights: Float[Array, " I"], matrix) -> Float[Array, " J"]:
        """The weighted sum of the fresh rows of a matrix [I, J]."""
        return dot(jnp.where(self.fresh, weights, 0), matrix)

    def add_rows(
        self, total: Float[Array, " S"], weights: Float[Array, " I"], matrix
    ) -> Float[Array, " S"]:
        """`total` with the weighted sum of the fresh rows of a matrix [I, J] added."""
        return self.add(total, self.sum_rows(weights, matrix))

    def add_to_bias(self, dbias: Array | None, dlogits: Float[Array, "I J"]):
        """`dbias`, the cotangent of a head's bias, with the block's part added."""
        if dbias is None:
            return None
        if dbias.shape[1] == 1:
            dlogits = dlogits.sum(axis=1, keepdims=True)
            if dbias.shape[0] != 1:
                return self.put_sum(dbias, dlogits)
        elif dbias.shape[0] != 1:
            if dlogits.shape[1] == dbias.shape[1]:
                return self.put(dbias, dlogits)
            # Nothing else than this block has its rows.
            rows = self.add(self.take(dbias), dlogits, combine=lambda _, new: new)
            return self.put(dbias, rows)
        ones = jnp.ones(len(dlogits), dlogits.dtype)
        if dbias.shape[1] == 1:
            return dbias + self.sum_rows(ones, dlogits)[None]
        return self.add(dbias, self.sum_rows(ones, dlogits)[None])


def over_row_marginal(
    cotangent: Float[Array, " I"], a: Float[Array, " I"] | None
) -> Float[Array, " I"]:
    """The weight of a row step from the cotangent of its potential; 0 for padding."""
    if a is None:  # 1, and padding has no cotangent.
        return cotangent
    return jnp.where(a == 0, 0, cotangent / jnp.where(a == 0, 1, a))


class QueryBlocks:
    """All query blocks of one head, with all keys or with those of one device."""

    def __init__(self, heads: Heads, head: Int[Array, ""], rows: int):
        self.heads, self.head, self.rows = heads, head, rows
        # Of the keys that a block sees; where a window moves them, each has its own.
        self.first_key: Any = 0
        self.num_keys = visible_keys(heads.problem, rows)
        self.row_marginal = heads.row_marginal(head)
        self.query = heads.query(head, heads.product_dtype)
        self.key_t = heads.key_t(head)

    def see(self, x: Float[Array, "... S"]) -> Float[Array, "... J"]:
        """What an array of the keys has for those of one device, if these are its."""
        if self.heads.problem.token_axis is None:
            return x
        return jax.lax.dynamic_slice_in_dim(x, self.first_key, self.num_keys, -1)

    def fold(self, body: Callable[[QueryBlock, Carry], Carry], init: Carry) -> Carry:
        """The carry after `body(block, carry)` of every block in order."""
        count = -(-self.heads.problem.t // self.rows)

        def step(index, carry):
            return body(QueryBlock(self, index), carry)

        return jax.lax.fori_loop(0, count, step, varying_like(init, self.query))

    def around(
        self,
        body: Callable[["QueryBlocks", Travelling, Carry], tuple[Travelling, Carry]],
        travelling: Travelling,
        init: Carry,
    ) -> tuple[Travelling, Carry]:
        """Arrays of the keys, and the carry, after `body(blocks, travelling, carry)`.

        Where devices have parts of the tokens, `travelling` has this device's keys. It
        goes round the ring of devices, `blocks` are those of the keys that it has, and
        at the end each part is back. Otherwise `body` is called once.
        """
        axis = self.heads.problem.token_axis
        if axis is None:
            return body(self, travelling, init)
        size, index = jax.lax.axis_size(axis), jax.lax.axis_index(axis)

        def step(i, state):
            blocks = copy.copy(self)
            blocks.num_keys = self.heads.problem.s // size
            blocks.first_key = (index + i) % size * blocks.num_keys
            travelling, carry = body(blocks, *state)
            return jax.lax.ppermute(travelling, axis, ring(axis)), carry

        init = varying_like((travelling, init), self.query)
        return jax.lax.fori_loop(0, size, step, init)
