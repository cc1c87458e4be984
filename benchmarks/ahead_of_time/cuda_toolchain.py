"""A compiler for NVIDIA GPUs that needs none, and what it says of Pallas kernels."""

import importlib.metadata
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
from jax.experimental import topologies

from . import h100_specs as _hopper
from .gpu_rows import Kernel

PLUGIN: Final = "jax-cuda12-plugin"
# What a folder has to have, and the package that brings it.
PACKAGES: Final[Mapping[str, str]] = {
    PLUGIN: "jax_cuda12_plugin/_mosaic_gpu_ext.so",
    "jax-cuda12-pjrt": "jax_plugins/xla_cuda12/xla_cuda_plugin.so",
    "nvidia-cuda-nvcc-cu12": "nvidia/cuda_nvcc/bin/ptxas",
    "nvidia-cuda-nvdisasm": "nvidia/*/bin/nvdisasm",
}
# Local memory is what registers did not have room for.
INSTRUCTIONS: Final[Mapping[str, str]] = {
    "wgmma": "HGMMA",
    "exp2": "MUFU.EX2",
    "local_loads": "LDL",
    "local_stores": "STL",
}


class Compiled(NamedTuple):
    """An executable for a GPU that is not there."""

    executable: jax.stages.Compiled
    kernels: tuple[Kernel, ...]  # Each once, in the order of their launches.


class Compiler:
    """XLA's and Mosaic's for CUDA, ptxas and nvdisasm, from a folder of packages."""

    def __init__(self, folder: Path):
        """Makes JAX find them.

        Raises:
            FileNotFoundError: They are not there, or for another version of JAX.
        """
        self.versions = _versions(folder)
        self._folder = folder.resolve()
        self._dumps = tempfile.TemporaryDirectory(prefix="kernels-")
        self._root = tempfile.TemporaryDirectory(prefix="cuda-")
        self._kernels: dict[str, Kernel] = {}
        self._find()
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            target_config=_hopper.TARGET,
            topology="1x1x1",
        )
        self._device = topology.devices[0]

    def compile(self, fn: Callable[..., Any], *arrays: jax.ShapeDtypeStruct):
        """A function of arrays, and the kernels in it.

        Raises:
            jax.errors.JaxRuntimeError: It does not compile.
            RuntimeError: What was compiled is not what was written about it.
        """
        sharding = jax.sharding.SingleDeviceSharding(self._device)
        arrays = tuple(
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arrays
        )
        executable = jax.jit(fn).lower(*arrays).compile()
        calls = list(dict.fromkeys(_calls(executable.as_text())))
        self._read([call for call in calls if call.code not in self._kernels])
        kernels = (self._kernels[call.code] for call in calls)
        return Compiled(executable, tuple(kernels))

    def _find(self):
        """Sets what has to be set after the import of Mosaic, which sets it too."""
        sys.path.append(str(self._folder))
        jax.config.update("jax_platforms", "cpu")  # It computes nothing on a GPU.
        # The toolkit is in several packages; Mosaic looks for it in one folder.
        tools = Path(self._root.name, "bin")
        tools.mkdir()
        for name in ("nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvdisasm"):
            tool = next(self._folder.glob(PACKAGES[name]))
            (tools / tool.name).symlink_to(tool)
        os.environ["PATH"] = f"{tools}{os.pathsep}{os.environ['PATH']}"
        os.environ["MOSAIC_GPU_CUDA_ROOT"] = self._root.name
        os.environ["MOSAIC_GPU_RUNTIME_LIB_PATH"] = str(
            self._folder / "jax_cuda12_plugin" / "libmosaic_gpu_runtime.so"
        )
        os.environ["MOSAIC_GPU_DUMP_TO"] = self._dumps.name

    def _read(self, calls):
        """Keeps what was written about kernels that were not compiled before.

        Mosaic compiles a kernel once in a process, in the order of launches, and counts
        them in the names of its files.
        """
        folder = Path(self._dumps.name)
        stems = sorted(
            (path.with_suffix("") for path in folder.glob("*.ptxas")),
            key=lambda path: int(path.name.rpartition("_")[2]),
        )
        if len(stems) != len(calls):
            raise RuntimeError(
                f"Of {len(calls)} new kernels Mosaic GPU wrote about {len(stems)}. It "
                "may have other names for its files in this version of JAX."
            )
        for call, stem in zip(calls, stems, strict=True):
            launch = read_launch(stem.with_suffix(".mlir-passes.log"))
            name = stem.name.rpartition("_")[0]
            if launch.num_arrays != call.num_arrays or name not in (*call.names, ANON):
                raise RuntimeError(
                    f"Mosaic GPU wrote about {name} of {launch.num_arrays} arrays, "
                    f"and {call} was launched: they are no longer in one order."
                )
            self._kernels[call.code] = Kernel(
                name=name,
                direction=call.direction,
                num_blocks=launch.num_blocks,
                threads=launch.threads,
                dynamic_bytes=launch.dynamic_bytes,
                **read_ptxas(stem.with_suffix(".ptxas").read_text(encoding="utf-8")),
                **read_sass(stem.with_suffix(".sass_ctrl").read_text(encoding="utf-8")),
            )
        for path in folder.iterdir():
            path.unlink()


ANON: Final = "anonymous"


def _versions(folder):
    for name, path in PACKAGES.items():
        if not list(folder.glob(path)):
            raise FileNotFoundError(_message(folder, f"{name} is not there"))
    found = {
        x.metadata["Name"].lower().replace("_", "-"): x.version
        for x in importlib.metadata.distributions(path=[str(folder)])
    }
    if found[PLUGIN] != jax.__version__:
        raise FileNotFoundError(_message(folder, f"{PLUGIN} is {found[PLUGIN]}"))
    return {name: found[name] for name in PACKAGES}


def _message(folder, reason):
    version = jax.__version__
    packages = " ".join(
        f"{name}=={version}" if name.startswith("jax") else name for name in PACKAGES
    )
    return (
        f"There is no compiler of jax {version} for NVIDIA GPUs in {folder}: {reason}. "
        f"Run `pip install --no-deps --target {folder} {packages}`, or `make "
        "compile-table-gpu`."
    )


class Call(NamedTuple):
    """A launch of a kernel, in an executable."""

    code: str  # A hash.
    names: tuple[str, ...]  # What it is called inside of.
    direction: str
    num_arrays: int  # Operands and results.


_COMPUTATION: Final = re.compile(r"^(?:ENTRY )?%([\w.-]+) \(.*\{$", re.M)
_CALL: Final = re.compile(
    r"= (?P<results>.*?) custom-call\((?P<operands>[^)]*)\), "
    r'custom_call_target="mosaic_gpu_v2".*?op_name="(?P<path>[^"]*)".*?'
    r'kernel_hash = "(?P<code>[^"]*)"'
)
_INNER: Final = re.compile(
    r"(?:to_apply|calls|body|condition|branch_computations|true_computation"
    r"|false_computation)=(?:\{([^}]*)\}|(%[\w.-]+))"
)


def _calls(text) -> Iterator[Call]:
    """Launches of Mosaic's kernels in an executable's text, in its schedule."""
    starts = list(_COMPUTATION.finditer(text))
    ends = [match.start() for match in starts[1:]] + [len(text)]
    bodies = {
        match[1]: text[match.end() : end]
        for match, end in zip(starts, ends, strict=True)
    }
    (entry,) = (match[1] for match in starts if match[0].startswith("ENTRY"))
    return _calls_in(entry, bodies)


def _calls_in(name, bodies):
    for line in bodies[name].splitlines():
        if match := _CALL.search(line):
            path = match["path"]
            yield Call(
                code=match["code"],
                names=tuple(path.split("/")),
                direction="backward" if "transpose(" in path else "forward",
                num_arrays=match["operands"].count("%")
                + len(re.findall(r"\w+\[", match["results"])),
            )
            continue
        for match in _INNER.finditer(line):
            for inner in re.findall(r"%([\w.-]+)", match[1] or match[2]):
                yield from _calls_in(inner, bodies)


class Launch(NamedTuple):
    """How a kernel is launched."""

    num_blocks: int  # In its grid.
    threads: int  # In a block.
    dynamic_bytes: int  # Of shared memory.
    num_arrays: int


def read_launch(path: Path) -> Launch:
    """From what Mosaic wrote of its passes, of which the first lines are enough.

    Raises:
        ValueError: There is no launch in it.
    """
    arrays = set()
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if pointer := re.search(r"llvm\.getelementptr %arg1\[(\d+)\]", line):
                arrays.add(pointer[1])
            if "gpu.launch " in line:
                grid, block = (
                    [int(x) for x in re.findall(r"= %c(\d+)", match[1])]
                    for what in ("blocks", "threads")
                    if (match := re.search(rf"{what}\([^)]*\) in \(([^)]*)\)", line))
                )
                shared = re.search(r"dynamic_shared_memory_size %c(\d+)", line)
                return Launch(
                    num_blocks=grid[0] * grid[1] * grid[2],
                    threads=block[0] * block[1] * block[2],
                    dynamic_bytes=int(shared[1]) if shared else 0,
                    num_arrays=len(arrays),
                )
    raise ValueError(f"There is no launch of a kernel in {path}.")


def read_ptxas(text: str) -> dict[str, Any]:
    """Fields of a `Kernel` that `ptxas -v` prints."""
    numbers = {
        "registers": r"Used (\d+) registers",
        "barriers": r"used (\d+) barriers",
        "static_bytes": r"(\d+) bytes smem",
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


def read_sass(text: str) -> dict[str, int]:
    """Fields of a `Kernel` that count instructions in what nvdisasm prints."""
    # An address in a comment, perhaps a predicate, and the instruction.
    pattern = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)"
    names = [name for name in re.findall(pattern, text) if name != "NOP"]
    if not names:
        raise ValueError(f"nvdisasm printed no instructions: {text[:200]!r}.")
    counts = {
        field: sum(name == start or name.startswith(start + ".") for name in names)
        for field, start in INSTRUCTIONS.items()
    }
    return {"instructions": len(names), **counts}
