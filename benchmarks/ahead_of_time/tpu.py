"""Compiles the TPU attention kernels on a machine without a TPU.

    make compile-table   # Installs libtpu below .venv, then compiles everything.
    python -m benchmarks.ahead_of_time.tpu --libtpu DIR --only v5e

Needs libtpu, which contains the compiler (484 MB), in a folder of its own: JAX looks
for a TPU at every start where it can import libtpu.

It compiles `mosaic_tpu` for each generation, length and dtype and keeps the VMEM of
each kernel and the temporary memory of each executable. Nothing runs. An interrupted
run continues where it stopped, and rows of other commits are dropped.
"""

import dataclasses
import functools
import importlib.metadata
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jax
from jax.experimental import topologies

from sinkhorn_jax import sinkhorn_attention
from sinkhorn_jax.attention._mosaic_tpu.blocks import default_blocks

from .. import programs
from ..harness import options
from ..harness.cases import Case
from ..harness.program import MODES, Mode, in_mode
from ..harness.record import RESULTS
from .rows import Kernel, Target, compile_missing, write_page

PROGRAM: Final = "mosaic_tpu"
# The smallest topology of each generation that the compiler knows by name.
TOPOLOGIES: Final[Mapping[str, str]] = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
}
# Without these the compiler asks the network which machine this is, and locks its TPU.
ENVIRONMENT: Final[Mapping[str, str]] = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
TITLE: Final = "Compiled for TPUs"
METHOD: Final = (
    "Compiled ahead of time by `make compile-table`, without a TPU: **nothing ran and "
    "no time was measured**. *KiB* is the VMEM that the compiler allocated for a "
    "kernel. A regime, forward / backward, is resident where the kernel matrix of a "
    "head stays in VMEM; its number is the rows that a kernel computes together."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Programs to compile."""

    libtpu: Path = Path(".venv/libtpu")  # The folder given to pip install --target.
    only: str = (
        ""  # Compile only what contains this text, such as "v5e mosaic_tpu 8x512".
    )
    output: Path = RESULTS / "compiled"


def main(args: Sequence[str] | None = None) -> None:
    """Compiles what has no row yet, and writes rows and page."""
    config = options.parse(Config, args, description=__doc__)
    compiler = f"libtpu {find_compiler(config.libtpu)}"
    wanted = [target for target in targets() if config.only in str(target)]
    compile_missing(wanted, compile_target, compiler, config.output)
    write_page(config.output, TITLE, METHOD)


def targets() -> list[Target]:
    """All programs."""
    return [
        Target(generation, PROGRAM, Case(8, tokens, dtype=dtype), mode)
        for generation in TOPOLOGIES
        for dtype in ("bfloat16", "float32")
        for tokens in (128, 256, 512, 1024, 2048, 4096, 8192)
        for mode in MODES
    ]


def find_compiler(folder: Path) -> str:
    """Makes JAX find libtpu in the folder, and returns its version.

    Raises:
        FileNotFoundError: libtpu is not there.
    """
    library = folder.resolve() / "libtpu" / "libtpu.so"
    if not library.exists():
        raise FileNotFoundError(
            f"{folder} lacks libtpu, the compiler for TPUs. `make compile-table` "
            "installs it."
        )
    sys.path.append(str(folder.resolve()))
    os.environ["TPU_LIBRARY_PATH"] = str(library)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    found = importlib.metadata.distributions(name="libtpu", path=[str(folder)])
    return next(iter(found)).version


def compile_target(target: Target) -> dict[str, Any]:
    """The compiled fields of an `Executable`.

    Raises:
        jax.errors.JaxRuntimeError: The compiler refuses, for example for lack of VMEM.
    """
    case, mode = target.case, target.mode
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGIES[target.device]
    )
    mesh = jax.sharding.Mesh(topology.devices[:1], ("x",))
    attend = functools.partial(
        sinkhorn_attention, num_iters=case.num_iters, implementation=PROGRAM
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        array = jax.ShapeDtypeStruct(case.shape_btnh, case.dtype, sharding=sharding)
        executable = jax.jit(in_mode(attend, mode)).lower(*[array] * 4).compile()
        return {
            "regime": regime_of(case, mode),
            "kernels": read_kernels(executable.as_text()),
            "temp_bytes": executable.memory_analysis().temp_size_in_bytes,
        }


def regime_of(case: Case, mode: Mode) -> str:
    """How the kernels divide a head of the case, on the device traced for."""
    problem = programs.problem(case)
    directions = ("forward", "backward") if mode == "forward_backward" else ("forward",)
    found = (default_blocks(problem, direction) for direction in directions)
    return " / ".join(
        f"{'resident' if blocks.is_resident else 'streamed'} {blocks.rows}"
        for blocks in found
    )


def read_kernels(text: str) -> tuple[Kernel, ...]:
    """Each kernel in an executable's text, and the VMEM that was allocated for it."""
    size = re.compile(r'"used_scoped_memory_configs":\[\{[^}]*"size":"(\d+)"')
    found = []
    for line in text.splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            name, num_bytes = re.search(r"%([\w-]+)", line)[1], size.search(line)[1]
            found.append(Kernel(name=name, memory_bytes=int(num_bytes)))
    return tuple(found)


if __name__ == "__main__":
    main()
