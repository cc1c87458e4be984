"""A compiler for NVIDIA GPUs on a machine without one, and what it says of kernels."""

import importlib.metadata
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import jax
from jax.experimental import topologies

from .rows import Kernel

# The device, for XLA.
H100: Final = Path(__file__).with_name("h100.textproto")
PLUGIN: Final = "jax-cuda12-plugin"
PTXAS: Final = "nvidia-cuda-nvcc-cu12"
# Files that the folder must contain, by the package that installs them.
PACKAGES: Final[Mapping[str, str]] = {
    PLUGIN: "jax_cuda12_plugin/_mosaic_gpu_ext.so",
    "jax-cuda12-pjrt": "jax_plugins/xla_cuda12/xla_cuda_plugin.so",
    PTXAS: "nvidia/cuda_nvcc/bin/ptxas",
}


class CudaCompiler:
    """XLA, Mosaic GPU and ptxas from a folder of packages."""

    def __init__(self, folder: Path):
        """Makes JAX find the packages.

        Raises:
            FileNotFoundError: They are missing, or for another version of JAX.
        """
        self.ptxas_version = _versions(folder)[PTXAS]
        self._dumps = tempfile.TemporaryDirectory(prefix="kernels-")
        self._root = tempfile.TemporaryDirectory(prefix="cuda-")
        self._configure(folder.resolve())
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            target_config=H100.read_text(),
            topology="1x1x1",
        )
        self._sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])

    def compile(
        self, fn: Callable[..., Any], *shapes: jax.ShapeDtypeStruct
    ) -> tuple[jax.stages.Compiled, tuple[Kernel, ...]]:
        """The executable of a function, and its kernels in the order of their launches.

        Mosaic compiles a kernel once in a process: kernels that an earlier function had
        are left out.

        Raises:
            jax.errors.JaxRuntimeError: The function does not compile.
        """
        arrays = (
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._sharding)
            for x in shapes
        )
        executable = jax.jit(fn).lower(*arrays).compile()
        folder = Path(self._dumps.name)
        # Mosaic numbers its files in the order of launches.
        logs = sorted(
            folder.glob("*.ptxas"), key=lambda path: int(path.stem.rpartition("_")[2])
        )
        kernels = tuple(read_kernel(path) for path in logs)
        for path in folder.iterdir():
            path.unlink()
        return executable, kernels

    def _configure(self, folder):
        """Sets variables, after the import of Mosaic, which sets them too."""
        sys.path.append(str(folder))
        jax.config.update("jax_platforms", "cpu")  # Nothing is computed on a GPU.
        # Mosaic looks for its tools in the bin/ of one folder. Without nvdisasm it
        # warns and continues.
        tools = Path(self._root.name, "bin")
        tools.mkdir()
        (tools / "ptxas").symlink_to(folder / PACKAGES[PTXAS])
        os.environ["PATH"] = f"{tools}{os.pathsep}{os.environ['PATH']}"
        os.environ["MOSAIC_GPU_CUDA_ROOT"] = self._root.name
        runtime = folder / "jax_cuda12_plugin" / "libmosaic_gpu_runtime.so"
        os.environ["MOSAIC_GPU_RUNTIME_LIB_PATH"] = str(runtime)
        os.environ["MOSAIC_GPU_DUMP_TO"] = self._dumps.name


def _versions(folder):
    """Versions of the packages in the folder, which must be complete."""
    found = {
        x.metadata["Name"].lower().replace("_", "-"): x.version
        for x in importlib.metadata.distributions(path=[str(folder)])
    }
    missing = [name for name, path in PACKAGES.items() if not (folder / path).exists()]
    if missing or found[PLUGIN] != jax.__version__:
        raise FileNotFoundError(
            f"{folder} lacks {missing or [f'{PLUGIN}=={jax.__version__}']} of the "
            "compiler for NVIDIA GPUs. `make compile-table-gpu` installs it."
        )
    return found


def read_kernel(path: Path) -> Kernel:
    """A kernel from ptxas's output for it, and from Mosaic's log beside that."""
    fields = read_ptxas(path.read_text(encoding="utf-8"))
    threads, dynamic_bytes = read_grid(path.with_suffix(".mlir-passes.log"))
    fields["memory_bytes"] += dynamic_bytes
    return Kernel(name=path.stem.rpartition("_")[0], threads=threads, **fields)


def read_grid(path: Path) -> tuple[int, int]:
    """Threads of a block and bytes of dynamic shared memory, from Mosaic's log.

    Raises:
        ValueError: The log contains no launch.
    """
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if "gpu.launch " in line:
                sizes = re.search(r"threads\([^)]*\) in \(([^)]*)\)", line)[1]
                x, y, z = (int(size) for size in re.findall(r"= %c(\d+)", sizes))
                shared = re.search(r"dynamic_shared_memory_size %c(\d+)", line)
                return x * y * z, int(shared[1]) if shared else 0
    raise ValueError(f"There is no launch of a kernel in {path}.")


def read_ptxas(text: str) -> dict[str, Any]:
    """Fields of a `Kernel` that `ptxas -v` prints; shared memory is the static part.

    Raises:
        ValueError: The text lacks registers or stack.
    """
    numbers = {
        "registers": r"Used (\d+) registers",
        "memory_bytes": r"(\d+) bytes smem",
        "stack_bytes": r"(\d+) bytes stack frame",
        "spill_store_bytes": r"(\d+) bytes spill stores",
        "spill_load_bytes": r"(\d+) bytes spill loads",
    }
    found = {name: re.search(pattern, text) for name, pattern in numbers.items()}
    if found["registers"] is None or found["stack_bytes"] is None:
        raise ValueError(f"ptxas printed something else than with -v: {text[:200]!r}.")
    return {
        "remarks": tuple(re.findall(r"\((C\d+)\)", text)),
        **{name: int(match[1]) if match else 0 for name, match in found.items()},
    }
