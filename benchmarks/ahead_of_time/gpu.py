"""Compiles the GPU kernels ahead of time for Hopper, on a machine without a GPU.

    make compile-table-gpu     # Installs the compiler below .venv, then all of it.
    python -m benchmarks.ahead_of_time.gpu --cuda DIR --few-tokens --xla-tokens

Needs JAX's plugin for CUDA, ptxas and nvdisasm (578 MB) in a folder of their own; the
error where there are none says how to get them. It is kept apart because JAX looks for
a GPU at every start where it can import the plugin.

It compiles `mosaic_gpu` in the first dtype and head dimension for `tokens`, forward and
with the backward pass. Other dtypes, other head dimensions and few iterations are
compiled with it alone, for `few_tokens` and for the first of those. For `xla_tokens` it
compiles the other implementations and the softmax attention of XLA as well, for their
memory, and for `sizes` the kernels for many small matrices. It keeps what the compilers
say: registers, spills, shared memory, instructions and remarks of each kernel, and the
temporary memory of each executable. It counts the work of traced kernels too, for a
roofline time, which is an ESTIMATE: nothing runs.

Rows go to benchmarks/results/compiled_gpu/ as they come; a run that was cut off goes on
where it was, and rows of other commits go.
"""

import dataclasses
import datetime
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import jax
import tqdm

from sinkhorn_jax import sinkhorn, sinkhorn_attention
from sinkhorn_jax.attention import IMPLEMENTATIONS
from sinkhorn_jax.attention._mosaic_gpu import blocks as _blocks

from .. import programs as _programs
from ..harness import command as _command
from ..harness import machine as _machine
from ..harness import program as _program
from ..harness.cases import Case
from . import cuda_toolchain as _cuda
from . import gpu_rows as _compiled_gpu
from . import work as _work
from .gpu_rows import OURS, SMALL

# Those for other hardware, and ours, are not what XLA makes.
XLA: Final = (
    *(name for name in IMPLEMENTATIONS if not name.startswith("mosaic")),
    _programs.SOFTMAX,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to compile."""

    cuda: Path = Path(".venv/cuda")  # What pip install --target was given.
    tokens: tuple[int, ...] = (64, 128, 192, 256, 512, 1024, 2048, 4096, 8192)
    few_tokens: tuple[int, ...] = (256, 512, 1024)
    xla_tokens: tuple[int, ...] = (256, 1024, 4096)
    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    head_dims: tuple[int, ...] = (64, 32, 128)
    heads: int = 8
    num_iters: int = 10
    few_iters: tuple[int, ...] = (0, 1)
    sizes: tuple[int, ...] = (4, 8, 16)  # Of small matrices.
    num_matrices: int = 65536
    matrix_iters: int = 20
    output: Path = _compiled_gpu.FOLDER


@dataclasses.dataclass(frozen=True)
class Matrices:
    """Many small matrices, as a case of `Config`."""

    heads: int
    tokens: int
    head_dim: int
    dtype: str
    num_iters: int


def run(config: Config) -> list[_compiled_gpu.Row]:
    """Compiles what there is no row of yet, and writes rows and page."""
    compiler = _cuda.Compiler(config.cuda)
    now = datetime.datetime.now(datetime.UTC)
    facts = {
        "jax_version": jax.__version__,
        "ptxas_version": compiler.versions["nvidia-cuda-nvcc-cu12"],
        "nvdisasm_version": compiler.versions["nvidia-cuda-nvdisasm"],
        "commit": _machine.commit(),
        "date": now.isoformat(timespec="seconds"),
    }
    rows = {
        row.key: row
        for row in _compiled_gpu.read(config.output)
        if row.commit == facts["commit"]
    }
    for program, case, mode in tqdm.tqdm(programs(config)):
        if _key(program, case, mode) not in rows:
            row = compile_row(compiler, program, case, mode, facts)
            rows[row.key] = row
            _compiled_gpu.write(list(rows.values()), config.output)
    _compiled_gpu.write_page(config.output)
    return list(rows.values())


def programs(config: Config) -> list[tuple[str, Case | Matrices, _program.Mode]]:
    """What is compiled."""
    case = functools.partial(Case, config.heads)
    dtype, head_dim = config.dtypes[0], config.head_dims[0]
    in_both = [
        (OURS, case(tokens, head_dim, dtype, config.num_iters))
        for tokens in config.tokens
    ]
    in_both += [
        (name, case(tokens, head_dim, dtype, config.num_iters))
        for tokens in config.xla_tokens
        for name in XLA
    ]
    in_both += [
        (SMALL, Matrices(config.num_matrices, size, 0, "float32", config.matrix_iters))
        for size in config.sizes
    ]
    others = [
        case(tokens, *other, config.num_iters)
        for other in (
            *((other_dim, dtype) for other_dim in config.head_dims[1:]),
            *((head_dim, other_dtype) for other_dtype in config.dtypes[1:]),
        )
        for tokens in config.few_tokens
    ]
    others += [
        case(tokens, head_dim, dtype, num_iters)
        for tokens in config.few_tokens[:1]
        for num_iters in config.few_iters
    ]
    return [
        *((*what, mode) for what in in_both for mode in _program.MODES),
        *((OURS, x, _program.MODES[-1]) for x in others),
    ]


def compile_row(
    compiler: _cuda.Compiler,
    program: str,
    case: Case | Matrices,
    mode: _program.Mode,
    facts: dict[str, Any],
) -> _compiled_gpu.Row:
    """Compiles one program.

    Raises:
        jax.errors.JaxRuntimeError: The compiler refuses.
    """
    if program == SMALL:
        fn = _of_matrices(case, mode)
        shapes = [(case.heads, case.tokens, case.tokens)]
    else:
        fn = _program.in_mode(_attention(program, case), mode)
        shapes = [case.shape_btnh] * 4
    arrays = [jax.ShapeDtypeStruct(shape, case.dtype) for shape in shapes]
    executable, kernels = compiler.compile(fn, *arrays)
    memory = executable.memory_analysis()
    return _compiled_gpu.Row(
        program=program,
        mode=mode,
        **dataclasses.asdict(case),
        kernels=kernels,
        work=work_of(case, mode) if program == OURS else (),
        blocks=blocks_of(case) if program == OURS else None,
        temp_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        **facts,
    )


def blocks_of(case: Case) -> _compiled_gpu.Blocks:
    """How the kernels cut a head of the case, and what they think that takes."""
    problem = _programs.problem(case)
    blocks = _blocks.default_blocks(problem)
    regime = "strips, held" if blocks.is_held else "strips, made twice"
    forward = backward = _blocks.sweep_bytes(problem, blocks)
    if blocks.period:
        regime = f"resident, {blocks.head_dtype}"
        crew = _blocks.resident_crew(problem, blocks)
        forward = _blocks.resident_bytes(problem, blocks, crew)
        crew = _blocks.reverse_crew(problem, blocks)
        backward = _blocks.reverse_bytes(problem, blocks, crew)
    if blocks.cluster > 1:
        regime += f", cluster of {blocks.cluster}"
    return _compiled_gpu.Blocks(
        regime=regime,
        num_row_tiles=blocks.num_row_tiles,
        num_col_tiles=blocks.num_col_tiles,
        period=blocks.period,
        forward_bytes=forward,
        backward_bytes=backward,
    )


def work_of(case: Case, mode: _program.Mode) -> tuple[_compiled_gpu.Work, ...]:
    """Of each pass that `mode` has, for all heads, which do the same."""
    one = dataclasses.replace(case, heads=1)
    arrays = [jax.ShapeDtypeStruct(one.shape_btnh, case.dtype)] * 4

    def count(mode):
        fn = _program.in_mode(_attention(OURS, case), mode)
        return [x for x in _work.count_gpu(fn, *arrays) if x.times]

    forward = count("forward")
    passes = {"forward": forward}
    if mode == "forward_backward":
        passes["backward"] = count(mode)[len(forward) :]
    return tuple(
        _compiled_gpu.Work(
            direction=direction,
            launches=sum(x.times for x in works),
            **{
                field: case.heads * sum(x.times * getattr(x, field) for x in works)
                for field in ("flops", "exps", "vector", "shared")
            },
        )
        for direction, works in passes.items()
    )


def _attention(program, case):
    if program == _programs.SOFTMAX:
        return jax.nn.dot_product_attention
    return functools.partial(
        sinkhorn_attention, num_iters=case.num_iters, implementation=program
    )


def _of_matrices(case, mode):
    plan = functools.partial(sinkhorn, num_iters=case.num_iters, implementation=OURS)
    if mode == "forward":
        return plan

    def forward_backward(logits):
        out, pull_back = jax.vjp(plan, logits)
        return out, pull_back(out)

    return forward_backward


def _key(program, case, mode):
    shape = case.heads, case.tokens, case.head_dim
    return program, mode, shape, case.dtype, case.num_iters


def main(args: Sequence[str] | None = None) -> None:
    """The command."""
    config = _command.parse(Config, __doc__, args)
    rows = run(config)
    print(f"{len(rows)} executables; tables of them in {config.output}.")


if __name__ == "__main__":
    main()
