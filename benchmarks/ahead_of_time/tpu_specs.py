"""TPU generations that can be compiled for, and the peaks that estimates divide by.

Of one TensorCore. VMEM, the matrix unit's bfloat16 rate and HBM bandwidth are JAX's:
`pltpu.get_tpu_info_for_chip`, printed in its TPU hardware reference,
https://docs.jax.dev/en/latest/pallas/tpu/hardware.html.
"""

import dataclasses
from collections.abc import Mapping
from typing import Final

from jax.experimental.pallas import tpu as pltpu

# Registers of 8 x 128 elements: four operations a clock on the vector unit, says "How
# to Scale Your Model", https://jax-ml.github.io/scaling-book/tpus/.
VECTOR_OPS_PER_CLOCK: Final = 4 * 8 * 128
# One register a clock through the unit for exponentials: an assumption, not published.
EXPS_PER_CLOCK: Final = 8 * 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One generation."""

    version: str  # A name of `pltpu.ChipVersion`.
    topology: str  # The least that the compiler knows by name.
    clock: float  # Hz.
    clock_source: str

    @property
    def info(self) -> pltpu.TpuInfo:
        """JAX's facts about one TensorCore."""
        return pltpu.get_tpu_info_for_chip(pltpu.ChipVersion[self.version], 1)


_FROM_PEAK: Final = "bfloat16 peak over 4 matrix units of 128 x 128 and 2 flops"
CHIPS: Final[Mapping[str, Chip]] = {
    "v4": Chip(
        version="TPU_V4",
        topology="v4:2x2x1",
        clock=1.05e9,
        clock_source="Jouppi et al. 2023, https://arxiv.org/abs/2304.01433",
    ),
    "v5e": Chip(
        version="TPU_V5E",
        topology="v5e:2x2",
        clock=1.5e9,
        clock_source=_FROM_PEAK,
    ),
    "v5p": Chip(
        version="TPU_V5P",
        topology="v5p:2x2x1",
        clock=1.75e9,
        clock_source=_FROM_PEAK,
    ),
    "v6e": Chip(
        version="TPU_V6E",
        topology="v6e:2x2",
        clock=1.75e9,
        clock_source="taken as that of v5p: an assumption, not published",
    ),
}
