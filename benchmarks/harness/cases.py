"""The problems that are timed, the sweeps that they form, and their inputs."""

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SEED: Final = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """Self-attention over `tokens` tokens. Heads of a batch and heads are one axis."""

    heads: int
    tokens: int
    head_dim: int = 64
    dtype: str = "float32"
    num_iters: int = 10

    @property
    def name(self) -> str:
        """Heads x tokens."""
        return f"{self.heads}x{self.tokens}"

    @property
    def shape_btnh(self) -> tuple[int, int, int, int]:
        """Shape of the query, key and value."""
        return (1, self.tokens, self.heads, self.head_dim)

    def __str__(self):
        return f"{self.name} {self.dtype} {self.num_iters} iterations"


# What varies, and over what. A case of two sweeps is measured once.
ANYWHERE: Final[Mapping[str, tuple[Case, ...]]] = MappingProxyType(
    {
        "tokens": tuple(Case(2, 2**i) for i in range(7, 15)),
        # About the same work, split into ever fewer and larger heads. The first is a
        # batch of 8 images for ViT-B/16 at 224 pixels.
        "heads": (Case(96, 197), Case(32, 512), Case(16, 1024), Case(2, 4096)),
        "iterations": tuple(
            Case(4, 1024, num_iters=num) for num in (0, 1, 2, 5, 10, 20, 50)
        ),
        "dtypes": tuple(
            Case(4, 1024, dtype=dtype)
            for dtype in ("float32", "bfloat16", "float16", "float64")
        ),
    }
)
# By platform, of sizes that make sense on it alone: run when named, refused elsewhere.
BY_PLATFORM: Final[Mapping[str, tuple[Case, ...]]] = MappingProxyType(
    {
        # A batch times heads that fill a large GPU, in the dtypes of its tensor cores.
        "gpu": tuple(
            Case(128, 2**i, dtype=dtype)
            for dtype in ("bfloat16", "float16")
            for i in range(7, 13)
        ),
    }
)
SWEEPS: Final = MappingProxyType({**ANYWHERE, **BY_PLATFORM})
# For a smoke run, and in no sweep.
SMOKE: Final = (Case(4, 64, head_dim=16),)


def select(
    sweeps: Iterable[str],
    names: Iterable[str] = (),
    dtypes: Iterable[str] = (),
) -> list[Case]:
    """The cases of the sweeps, each once; of names and dtypes those given, if any."""
    cases = dict.fromkeys(case for sweep in sweeps for case in SWEEPS[sweep])
    return [
        case
        for case in cases
        if (not names or case.name in names) and (not dtypes or case.dtype in dtypes)
    ]


class Inputs(NamedTuple):
    """Standard normal arrays (1, T, N, H); logits then have standard deviation 1."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    cotangent: jax.Array


def inputs(case: Case) -> Inputs:
    """The same numbers in every run. float64 needs `jax.enable_x64`."""
    rng = np.random.default_rng(SEED)
    shape = case.shape_btnh
    return Inputs(
        *(
            jnp.asarray(rng.standard_normal(shape, np.float32), case.dtype)
            for _ in Inputs._fields
        )
    )
