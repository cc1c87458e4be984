"""One head as strips of rows: what a pass over the plan sees at once."""

from collections.abc import Callable
from typing import Final, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..._core.precision import dot
from ..._runtime.shard_map import varying_like
from .._heads import Heads
from .._problem import Problem

# A strip of logits is written and read a few times before the next one: on a CPU it
# should stay in cache, on an accelerator it should be work enough for the whole device.
CPU_STRIP_BYTES: Final = 2**22
ACCELERATOR_STRIP_BYTES: Final = 2**28  # Of all heads in flight together.
MIN_STRIP_ROWS: Final = 16  # Fewer make a matrix product that waits for its keys.
MAX_STRIP_ROWS: Final = 1024

Carry = TypeVar("Carry")


class Layout(NamedTuple):
    """How the work is cut. It changes speed and memory, results only by rounding."""

    rows: int  # Of a strip.
    heads_in_flight: int  # A divisor of the number of heads.


def layout(problem: Problem) -> Layout:
    """Strips that suit the device."""
    heads = problem.batch * problem.num_heads
    row_bytes = problem.s * max(4, problem.dtype.itemsize)
    on_cpu = jax.default_backend() == "cpu"
    limit = (CPU_STRIP_BYTES if on_cpu else ACCELERATOR_STRIP_BYTES) // row_bytes
    in_flight = 1
    if not on_cpu:
        # Heads first, because strips follow each other and heads need not.
        most = max(1, limit // min(problem.t, 128))
        in_flight = max(n for n in range(1, min(heads, most) + 1) if heads % n == 0)
        limit //= in_flight
    rows = min(problem.t, MAX_STRIP_ROWS, max(MIN_STRIP_ROWS, limit))
    # Evenly cut: the last strip then shares less than a row each with the one before.
    return Layout(-(-problem.t // -(-problem.t // rows)), in_flight)


class Strip:
    """Some rows of one head that follow each other.

    The last strip of a head is moved up to end with the head. The rows that it shares
    with the one before are computed twice, alike; `fresh` keeps their second time out
    of sums over rows.
    """

    def __init__(self, strips: "Strips", index: Int[Array, ""]):
        rows, t = strips.rows, strips.heads.problem.t
        self._strips = strips
        self._start = jnp.minimum(index * rows, t - rows)
        self.positions = self._start + jnp.arange(rows, dtype=jnp.int32)
        self.fresh = self.positions >= index * rows

    def take(self, x: Float[Array, "T ..."]) -> Float[Array, "I ..."]:
        """These rows of it."""
        return jax.lax.dynamic_slice_in_dim(x, self._start, self._strips.rows)

    def take_fresh(self, x: Float[Array, "D T"]) -> Float[Array, "D I"]:
        """These columns of a left factor of the plan, zero where not fresh."""
        x = jax.lax.dynamic_slice_in_dim(x, self._start, self._strips.rows, axis=1)
        return jnp.where(self.fresh[None, :], x, 0)

    def put(
        self, x: Float[Array, "T ..."], rows: Float[Array, "I ..."]
    ) -> Float[Array, "T ..."]:
        """`x` with these rows replaced."""
        return jax.lax.dynamic_update_slice_in_dim(x, rows, self._start, axis=0)

    def logits(self) -> Float[Array, "I S"]:
        """With bias, -inf where excluded; the same bits in every pass."""
        strips = self._strips
        return strips.heads.logits(
            strips.head, self.take(strips.query), strips.key_t, self._start
        )

    def kernel(
        self, f: Float[Array, " T"], g: Float[Array, " S"]
    ) -> Float[Array, "I S"]:
        """exp(logits + f + g)."""
        return jnp.exp((self.logits() + self.take(f)[:, None]) + g[None, :])

    def keep(self) -> Float[Array, "I S"] | None:
        """What the plan is multiplied by for dropout; None without."""
        return self._strips.heads.keep(self._strips.head, self.positions)

    def apply(
        self,
        r: Float[Array, " I"],
        kernel: Float[Array, "I S"],
        value: Float[Array, "S D"],
    ) -> Float[Array, "I D"]:
        """Output of the plan r kernel, with dropout; any c is in the values."""
        keep, low = self.keep(), self._strips.heads.low
        return r[:, None] * dot(
            low(kernel if keep is None else kernel * keep), low(value)
        )

    def sum_rows(
        self, weights: Float[Array, " I"], matrix: Float[Array, "I S"]
    ) -> Float[Array, " S"]:
        """The fresh rows of a matrix, weighted and added."""
        return dot(jnp.where(self.fresh, weights, 0), matrix)

    def add_to_bias(
        self, dbias: Float[Array, "..."] | None, dlogits: Float[Array, "I S"]
    ) -> Float[Array, "..."] | None:
        """`dbias`, of the shape of a head's bias, with what these rows add to it."""
        if dbias is None:
            return None
        if dbias.shape[1] == 1:
            dlogits = dlogits.sum(axis=1, keepdims=True)
        if dbias.shape[0] > 1:
            return self.put(dbias, dlogits)
        ones = jnp.ones(len(dlogits), dlogits.dtype)
        return dbias + self.sum_rows(ones, dlogits)[None]


class Strips:
    """All rows of one head, strip by strip."""

    def __init__(self, heads: Heads, head: Int[Array, ""], rows: int):
        self.heads, self.head, self.rows = heads, head, rows
        self.query = heads.query(head, heads.product_dtype)
        self.key_t = heads.key(head).astype(heads.product_dtype).T

    def fold(self, body: Callable[[Strip, Carry], Carry], init: Carry) -> Carry:
        """`body(strip, carry)` over all strips in order."""
        count = -(-self.heads.problem.t // self.rows)

        def step(index, carry):
            return body(Strip(self, index), carry)

        return jax.lax.fori_loop(0, count, step, varying_like(init, self.query))
