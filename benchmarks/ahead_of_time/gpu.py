"""Compiles the GPU kernels for Hopper on a machine without a GPU.

    make compile-table-gpu   # Installs the compiler below .venv, compiles everything.
    python -m benchmarks.ahead_of_time.gpu --cuda DIR --only "mosaic_gpu 8x256"

Needs JAX's plugin for CUDA and ptxas in a folder of their own: JAX looks for a GPU at
every start where it can import the plugin.

It compiles `mosaic_gpu` for several lengths, dtypes, head dimensions and numbers of
iterations, and the kernels for small matrices. To compare temporary memory, it also
compiles softmax and the implementations in plain JAX. It records registers, spills,
shared memory and remarks of each kernel, and the temporary memory of each executable.
Nothing runs. An interrupted run continues where it stopped, and rows of other commits
are dropped.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import jax

from sinkhorn_jax import sinkhorn_attention
from sinkhorn_jax.attention import IMPLEMENTATIONS
from sinkhorn_jax.attention._mosaic_gpu.heuristics import default_blocks

from .. import matrices, programs
from ..harness import options
from ..harness.cases import Case
from ..harness.program import MODES, in_mode
from ..harness.record import RESULTS
from .cuda_toolchain import CudaCompiler
from .rows import SMALL_MATRICES, Target, compile_missing, write_page

PROGRAM: Final = "mosaic_gpu"
# Compiled for their temporary memory.
OTHERS: Final = (
    *(name for name in IMPLEMENTATIONS if not name.startswith("mosaic")),
    programs.SOFTMAX,
)
HEADS: Final = 8
NUM_MATRICES: Final = 65536
TITLE: Final = "Compiled for NVIDIA GPUs"
METHOD: Final = (
    "Compiled ahead of time for an H100 (sm_90a) by `make compile-table-gpu`, without "
    f"a GPU: **nothing ran and no time was measured**. Attention has {HEADS} heads. "
    "A line is a kernel of a forward and backward pass, in the order of launches: "
    "shared memory (*KiB*) and threads of a thread block; registers, spills and stack "
    "of a thread; and ptxas's remarks by code. C7510 says that it serialised "
    "wgmma, which would cost speed; C7519 that it added a warpgroup.arrive, because "
    "registers are operands of a wgmma."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Programs to compile."""

    cuda: Path = Path(".venv/cuda")  # The folder given to pip install --target.
    only: str = ""  # Compile only what contains this text, such as "mosaic_gpu 8x256".
    output: Path = RESULTS / "compiled_gpu"


def main(args: Sequence[str] | None = None) -> None:
    """Compiles what has no row yet, and writes rows and page."""
    config = options.parse(Config, args, description=__doc__)
    compiler = CudaCompiler(config.cuda)
    wanted = [target for target in targets() if config.only in str(target)]
    compile_missing(
        wanted,
        functools.partial(compile_target, compiler),
        f"ptxas {compiler.ptxas_version}",
        config.output,
    )
    write_page(config.output, TITLE, METHOD)


def targets() -> list[Target]:
    """All programs: most in one shape, dtype and number of iterations."""
    case = functools.partial(Case, HEADS, dtype="bfloat16")
    lengths = (64, 128, 192, 256, 512, 1024, 2048, 4096, 8192)
    in_both = [(PROGRAM, case(tokens)) for tokens in lengths]
    in_both += [(name, case(x)) for x in (256, 1024, 4096) for name in OTHERS]
    in_both += [
        (SMALL_MATRICES, Case(NUM_MATRICES, size, 0, num_iters=20))
        for size in (4, 8, 16)
    ]
    in_backward = [
        case(tokens, **changed)
        for changed in ({"head_dim": 128}, {"dtype": "float16"})
        for tokens in (256, 512, 1024)
    ]
    in_backward += [case(256, num_iters=num) for num in (0, 1)]
    return [
        # Kernels are kept of forward and backward, which must be compiled first.
        *(Target("hopper", *what, mode) for what in in_both for mode in MODES[::-1]),
        *(Target("hopper", PROGRAM, x, "forward_backward") for x in in_backward),
    ]


def compile_target(compiler: CudaCompiler, target: Target) -> dict[str, Any]:
    """The compiled fields of an `Executable`.

    Raises:
        jax.errors.JaxRuntimeError: The compiler refuses.
    """
    program, case, mode = target.program, target.case, target.mode
    shapes = [case.shape_btnh] * 4
    if program == SMALL_MATRICES:
        shapes = [(case.heads, case.tokens, case.tokens)]
        fn = functools.partial(
            matrices.step, num_iters=case.num_iters, name=PROGRAM, mode=mode
        )
    elif program == programs.SOFTMAX:
        fn = in_mode(jax.nn.dot_product_attention, mode)
    else:
        attend = functools.partial(
            sinkhorn_attention, num_iters=case.num_iters, implementation=program
        )
        fn = in_mode(attend, mode)
    executable, kernels = compiler.compile(
        fn, *(jax.ShapeDtypeStruct(shape, case.dtype) for shape in shapes)
    )
    return {
        "regime": regime_of(case) if program == PROGRAM else "",
        "kernels": kernels if mode == "forward_backward" else (),
        "temp_bytes": executable.memory_analysis().temp_size_in_bytes,
    }


def regime_of(case: Case) -> str:
    """How the attention kernels divide a head of the case."""
    blocks = default_blocks(programs.problem(case))
    regime = f"resident, {blocks.kernel_dtype}"
    if blocks.regime == "streamed":
        how = "once" if blocks.keeps_query_block else "twice"
        regime = f"streamed, computed {how}"
    return regime + (f", cluster of {blocks.cluster}" if blocks.cluster > 1 else "")


if __name__ == "__main__":
    main()
