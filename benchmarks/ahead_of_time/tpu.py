"""Compiles the TPU kernels ahead of time, on a machine without a TPU.

    make compile-table   # Installs libtpu below .venv, then all of it.
    python -m benchmarks.ahead_of_time.tpu --libtpu DIR --generations v5e

Needs libtpu, which holds the compiler (484 MB): `pip install --target DIR libtpu`. It
is kept apart because JAX looks for a TPU at every start where it can import it.

For each generation, length and dtype it compiles `mosaic_tpu` and, as the softmax to
compare with, JAX's own flash attention, forward and with the backward pass. It keeps
what the compiler says (VMEM of each kernel, temporary memory, bytes accessed), what the
kernels' cost estimates say and what their traces hold. The page beside the rows adds a
roofline time, which is an ESTIMATE: nothing runs. Rows go to
benchmarks/results/compiled/ as they come, in a file for each generation, so several
runs can share the generations; a run that was cut off goes on where it was, and rows
of other commits go.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import tqdm
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu import flash_attention as flash

from sinkhorn_jax import sinkhorn_attention
from sinkhorn_jax.attention._mosaic_tpu import blocks as _mosaic_tpu_blocks

from .. import programs as _programs
from ..harness import command as _command
from ..harness import machine as _machine
from ..harness import program as _program
from ..harness.cases import Case
from . import tpu_rows as _compiled
from . import tpu_specs as _chips
from . import work as _work

# Without the others the compiler asks the network what machine this is. It locks the
# machine's TPU, of which there is none to lock.
ENVIRONMENT: Final = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
FLASH_BLOCK: Final = 512
KERNELS: Final = ("sinkhorn_attention_forward", "sinkhorn_attention_backward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to compile."""

    libtpu: Path = Path(".venv/libtpu")  # What pip install --target was given.
    generations: tuple[str, ...] = tuple(_chips.CHIPS)
    tokens: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    heads: int = 8
    head_dim: int = 64
    num_iters: int = 10
    output: Path = _compiled.FOLDER


def run(config: Config) -> list[_compiled.Row]:
    """Compiles what there is no row of yet, and writes rows and page."""
    now = datetime.datetime.now(datetime.UTC)
    facts = {
        "libtpu_version": find_compiler(config.libtpu),
        "jax_version": jax.__version__,
        "commit": _machine.commit(),
        "date": now.isoformat(timespec="seconds"),
    }
    rows = {
        row.key: row
        for row in _compiled.read(config.output)
        if row.generation in config.generations and row.commit == facts["commit"]
    }
    todo = [
        (generation, program, mode, Case(*shape, dtype, config.num_iters))
        for mode in reversed(_program.MODES)
        for tokens in config.tokens
        for shape in [(config.heads, tokens, config.head_dim)]
        for dtype in config.dtypes
        for generation in config.generations
        for program in _compiled.NAMES
    ]
    for generation, program, mode, case in tqdm.tqdm(todo):
        if (program, generation, mode, case.tokens, case.dtype) not in rows:
            row = compile_row(generation, program, mode, case, facts)
            rows[row.key] = row
            _compiled.write(list(rows.values()), config.output)
    _compiled.write_page(config.output)
    return list(rows.values())


def find_compiler(folder: Path) -> str:
    """Makes JAX find libtpu there, and returns its version.

    Raises:
        FileNotFoundError: It is not there.
    """
    library = folder.resolve() / "libtpu" / "libtpu.so"
    if not library.exists():
        raise FileNotFoundError(
            f"There is no libtpu in {folder}, which holds the compiler for TPUs. Run "
            f"`pip install --target {folder} libtpu`, or `make compile-table`."
        )
    sys.path.append(str(folder.resolve()))
    os.environ["TPU_LIBRARY_PATH"] = str(library)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    found = importlib.metadata.distributions(name="libtpu", path=[str(folder)])
    return next(iter(found)).version


def compile_row(
    generation: str,
    program: str,
    mode: _program.Mode,
    case: Case,
    facts: dict[str, Any],
) -> _compiled.Row:
    """Compiles one program for one generation.

    Raises:
        jax.errors.JaxRuntimeError: The compiler refuses, such as for lack of VMEM.
    """
    chip = _chips.CHIPS[generation]
    topology = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology)
    mesh = jax.sharding.Mesh(topology.devices[:1], ("x",))
    fn = _program.in_mode(_attention(program, case), mode)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        arrays = _arrays(case, sharding=sharding)
        executable = jax.jit(fn).lower(*arrays).compile()
        blocks = _blocks(case, mode) if program == _compiled.OURS else ()
        work = _count(fn, case)
    return _compiled.Row(
        program=program,
        generation=generation,
        mode=mode,
        tokens=case.tokens,
        heads=case.heads,
        head_dim=case.head_dim,
        dtype=case.dtype,
        num_iters=case.num_iters,
        kernels=_kernels(executable.as_text()),
        work=work,
        blocks=blocks,
        bytes_accessed=int(executable.cost_analysis()["bytes accessed"]),
        temp_bytes=executable.memory_analysis().temp_size_in_bytes,
        **facts,
    )


def _attention(program, case):
    if program == _compiled.OURS:
        return functools.partial(
            sinkhorn_attention, num_iters=case.num_iters, implementation=program
        )
    block = min(FLASH_BLOCK, case.tokens)
    fields = [field.name for field in dataclasses.fields(flash.BlockSizes)]
    sizes = flash.BlockSizes(**{x: 1 if x == "block_b" else block for x in fields})

    def attend(query, key, value):
        arrays = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
        scale = case.head_dim**-0.5
        out = flash.flash_attention(*arrays, sm_scale=scale, block_sizes=sizes)
        return jnp.swapaxes(out, 1, 2)

    return attend


def _arrays(case, **fields):
    return [jax.ShapeDtypeStruct(case.shape_btnh, case.dtype, **fields)] * 4


def _blocks(case, mode):
    problem = _programs.problem(case)
    directions = ("forward", "backward") if mode == "forward_backward" else ("forward",)
    found = []
    for direction in directions:
        blocks = _mosaic_tpu_blocks.default_blocks(problem, direction)
        found.append(
            _compiled.Blocks(
                is_resident=blocks.is_resident,
                rows=blocks.rows,
                vmem_bytes=_mosaic_tpu_blocks.vmem_bytes(problem, blocks, direction),
            )
        )
    return tuple(found)


def _count(fn, case):
    """Of all heads, which do the same: counted for one."""
    one = dataclasses.replace(case, heads=1)
    # Valid rows and columns; and the base of the backward kernel did not move.
    smem = [case.tokens, case.tokens, 1]
    counted = _work.count(fn, *_arrays(one), smem=dict.fromkeys(KERNELS, smem))
    return tuple(
        _compiled.Work(
            name=work.name or _compiled.SOFTMAX,
            **{
                field: case.heads * getattr(work, field)
                for field in ("flops", "passes", "exps", "vector", "num_bytes")
            },
            **{
                f"estimated_{name}": work.estimate
                and case.heads * getattr(work.estimate, field)
                for name, field in {
                    "flops": "flops",
                    "exps": "transcendentals",
                    "bytes": "bytes_accessed",
                }.items()
            },
        )
        for work in counted
    )


def _kernels(text):
    """From the executable as text: each kernel, and the VMEM that it was given."""
    size = re.compile(r'"used_scoped_memory_configs":\[\{[^}]*"size":"(\d+)"')
    kernels = [
        _compiled.Kernel(
            name=re.search(r"%([\w.-]+)", line)[1],
            vmem_bytes=int(size.search(line)[1]),
        )
        for line in text.splitlines()
        if 'custom_call_target="tpu_custom_call"' in line
    ]
    return tuple(kernels)


def main(args: Sequence[str] | None = None) -> None:
    """The command."""
    config = _command.parse(Config, __doc__, args)
    rows = run(config)
    print(f"{len(rows)} executables; tables of them in {config.output}.")


if __name__ == "__main__":
    main()
