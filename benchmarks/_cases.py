"""The problems that are timed, and their inputs."""

import dataclasses
from collections.abc import Mapping
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

    @property
    def shape_btnh(self) -> tuple[int, int, int, int]:
        """Shape of the query, key and value."""
        return (1, self.tokens, self.heads, self.head_dim)


# Heads x tokens. "4x64" is for a smoke run and is not in a full one.
CASES: Final[Mapping[str, Case]] = MappingProxyType(
    {
        "96x197": Case(96, 197),  # 8 images, ViT-B/16 at 224 pixels.
        "32x512": Case(32, 512),
        "16x1024": Case(16, 1024),
        "2x4096": Case(2, 4096),
        "4x64": Case(4, 64, head_dim=16),
    }
)
SMOKE: Final = "4x64"


class Inputs(NamedTuple):
    """Standard normal arrays (1, T, N, H); logits then have standard deviation 1."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    cotangent: jax.Array


def inputs(case: Case, dtype: str) -> Inputs:
    """The same numbers in every run."""
    rng = np.random.default_rng(SEED)
    shape = case.shape_btnh
    return Inputs(
        *(
            jnp.asarray(rng.standard_normal(shape, np.float32), dtype)
            for _ in Inputs._fields
        )
    )
