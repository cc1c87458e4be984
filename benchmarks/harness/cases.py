"""The cases that are measured, the sweeps that they form, and their inputs."""

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """Self-attention over `tokens` tokens; `heads` counts batch times heads."""

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
        """Shape of query, key and value."""
        return (1, self.tokens, self.heads, self.head_dim)

    @property
    def fields(self) -> dict[str, Any]:
        """The case's fields of a row."""
        return {
            "shape_btnh": self.shape_btnh,
            "dtype": self.dtype,
            "num_iters": self.num_iters,
        }

    def __str__(self):
        return f"{self.name} {self.dtype} {self.num_iters} iterations"


# The sweep that runs when it is named, and only on a GPU.
GPU: Final = "gpu"
# A case that is in two sweeps is measured once.
SWEEPS: Final[Mapping[str, tuple[Case, ...]]] = MappingProxyType(
    {
        "tokens": tuple(Case(2, 2**i) for i in range(7, 15)),
        # About the same work in fewer and larger heads. The first case is a batch of 8
        # images for ViT-B/16 at 224 pixels.
        "heads": (Case(96, 197), Case(32, 512), Case(16, 1024), Case(2, 4096)),
        "iterations": tuple(
            Case(4, 1024, num_iters=num) for num in (0, 1, 2, 5, 10, 20, 50)
        ),
        "dtypes": tuple(
            Case(4, 1024, dtype=dtype)
            for dtype in ("float32", "bfloat16", "float16", "float64")
        ),
        # Heads enough to fill a large GPU, in the dtypes of its tensor cores.
        GPU: tuple(
            Case(128, 2**i, dtype=dtype)
            for dtype in ("bfloat16", "float16")
            for i in range(7, 13)
        ),
    }
)
SMOKE: Final = (Case(4, 64, head_dim=16),)  # The case of a smoke run.


def select(
    sweeps: Iterable[str], names: Iterable[str] = (), dtypes: Iterable[str] = ()
) -> list[Case]:
    """The cases of the sweeps, each once, with these names and dtypes (empty: all).

    Raises:
        ValueError: A name or dtype is in none of the sweeps.
    """
    cases = dict.fromkeys(case for sweep in sweeps for case in SWEEPS[sweep])
    check_names("cases", names, (case.name for case in cases))
    check_names("dtypes", dtypes, (case.dtype for case in cases))
    return [
        case
        for case in cases
        if (not names or case.name in names) and (not dtypes or case.dtype in dtypes)
    ]


def check_names(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raises ValueError if a name is not among the known ones."""
    known = list(dict.fromkeys(known))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"Unknown {what} {unknown}; expected some of {known}.")


class Inputs(NamedTuple):
    """Standard normal arrays (1, T, N, H); their logits have standard deviation 1."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    cotangent: jax.Array


def inputs(case: Case) -> Inputs:
    """Inputs of the case, the same in every run. float64 needs `jax.enable_x64`."""
    rng = np.random.default_rng(0)
    return Inputs(
        *(
            jnp.asarray(rng.standard_normal(case.shape_btnh, np.float32), case.dtype)
            for _ in Inputs._fields
        )
    )
