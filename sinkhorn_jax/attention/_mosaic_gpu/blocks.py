"""How the GPU kernels divide a head into tiles, and which kernels run it."""

import dataclasses
from typing import Final, Literal, NamedTuple, get_args

import jax.numpy as jnp

from .._problem import Problem

# Queries and keys in a tile. A warpgroup's matrix product has 64 rows, and either side
# of a tile becomes the rows of one.
TILE: Final = 64
# Beyond it the accumulators of a tile do not fit into registers.
MAX_HEAD_DIM: Final = 128
# The kernels of the logits cotangent keep vectors of all iterations in shared memory.
MAX_ITERS: Final = 64
# The largest cluster of thread blocks that every GPU since Hopper accepts.
MAX_CLUSTER: Final = 8

Regime = Literal["resident", "streamed"]
KernelDtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """The division of a head. It changes speed, and never results beyond rounding.

    Attributes:
        num_row_tiles: Tiles that cover all queries.
        num_col_tiles: Tiles that cover all keys.
        regime: Which kernels run the head (`attend.py`).
        keeps_query_block: Streamed only: whether E of the query block stays in shared
            memory between its row sums and its column sums. Otherwise E is computed
            twice, by a single thread block.
        refresh_every: Resident only: iterations of the forward pass after which E is
            computed again from the potentials.
        kernel_dtype: Resident only: the dtype of E. bfloat16 leaves more room. It has
            the range of float32, and rounds E as much as the plan is rounded before it
            multiplies the values.
        cluster: Thread blocks that share a resident head, or a query block that is
            kept.
        max_warpgroups: Resident only: most warpgroups in a thread block. With 4, a
            thread has 128 registers.
    """

    num_row_tiles: int
    num_col_tiles: int
    regime: Regime
    keeps_query_block: bool = True
    refresh_every: int = 1
    kernel_dtype: KernelDtype = "float32"
    cluster: int = 1
    max_warpgroups: int = 4

    def __post_init__(self):
        for name in (
            "num_row_tiles",
            "num_col_tiles",
            "refresh_every",
            "cluster",
            "max_warpgroups",
        ):
            if (count := getattr(self, name)) < 1:
                raise ValueError(f"Blocks.{name} must be at least 1, got {count}.")
        if self.cluster > MAX_CLUSTER:
            raise ValueError(
                f"Blocks.cluster must be at most {MAX_CLUSTER}, got {self.cluster}: "
                "not every GPU has room for larger ones."
            )
        for name, known in (
            ("regime", get_args(Regime)),
            ("kernel_dtype", get_args(KernelDtype)),
        ):
            if (value := getattr(self, name)) not in known:
                raise ValueError(
                    f"Blocks.{name} must be one of {known}, got {value!r}."
                )

    @property
    def rows(self) -> int:
        """Number of queries, with padding to whole tiles."""
        return TILE * self.num_row_tiles

    @property
    def cols(self) -> int:
        """Number of keys, with padding to whole tiles."""
        return TILE * self.num_col_tiles


class WarpgroupConfig(NamedTuple):
    """The warpgroups of a thread block that computes a resident head.

    Each warpgroup has `num_stages` stages: 2, or 1 where there is no room for 2.
    """

    num_warpgroups: int
    num_stages: int


def kernel_dtypes(problem: Problem) -> tuple[KernelDtype, ...]:
    """Dtypes that E may have: float16 inputs would lose accuracy in bfloat16."""
    known: tuple[KernelDtype, ...] = get_args(KernelDtype)
    return known if problem.dtype == jnp.bfloat16 else known[:1]


def per_thread_block(count: int, cluster: int) -> int:
    """Row blocks (or tiles) of each thread block of a cluster: ceil(count / cluster).

    The last thread blocks may have fewer, or none.
    """
    return -(-count // cluster)


def padded_dim(head_dim: int) -> int:
    """A head dimension, padded to the rows of a swizzled tile."""
    return -(-head_dim // 64) * 64
