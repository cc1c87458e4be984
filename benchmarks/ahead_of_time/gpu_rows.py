"""What was compiled for NVIDIA GPUs, the file that keeps it, and its page."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from ..harness.record import RESULTS
from ..report import table as _table
from . import h100_specs as _hopper

FOLDER: Final = RESULTS / "compiled_gpu"
FILE: Final = "hopper.json"
PAGE: Final = "README.md"
OURS: Final = "mosaic_gpu"
SMALL: Final = "sinkhorn"
MIB: Final = 2**20
KIB: Final = 2**10

METHOD: Final = (
    "Compiled ahead of time for an H100 (sm_90a), without a GPU, by `make "
    "compile-table-gpu`; **nothing ran and no time was measured**. XLA and Mosaic GPU "
    "made the executables, ptxas the machine code and nvdisasm its text."
)
KERNELS_METHOD: Final = (
    "Each kernel of a forward and backward pass, once: of a block of *threads*, "
    "registers of a thread, shared memory, and named barriers; bytes of *spills* out "
    "of and into registers, and of the *stack*; *at once*, how many blocks a "
    "multiprocessor has room for and what limits them, from its 65,536 registers, 228 "
    "KiB of shared memory (1 KiB of it kept back for a block) and 2,048 threads. "
    "Instructions are counted where they stand in the code, not as often as they run: "
    "*all* without padding, *wgmma* of the tensor cores (HGMMA), *exp2* (MUFU.EX2), "
    "*local* loads and stores (LDL, STL); a few more or fewer stand there when it is "
    "compiled again. *remarks* are ptxas's, by code: C7510 says "
    "that it serialised wgmma, which would cost speed; C7519 that it put in a "
    "warpgroup.arrive of its own, because registers go into a wgmma."
)
MEMORY_METHOD: Final = (
    "What an executable declares as temporary memory, in MiB, forward / forward and "
    "backward: inputs and results are not in it, potentials that the backward pass "
    "reads are. The last column is that of `mosaic_gpu`, forward and backward, in "
    "bytes for each of N (T + S) (H + L) numbers of N heads: where it stays about the "
    "same, temporary memory is linear in T + S. `scaling`, `streaming`, `reference` "
    "and `softmax` (`jax.nn.dot_product_attention`, as XLA compiles it) are of the "
    "same target, shape and dtype."
)

# An entry, of flash attention: in its forward kernel, and in those for dq and for dk
# and dv, which make the plan again.
SOFTMAX_EXPS: Final = {"forward": 1, "backward": 2}
WORK_METHOD: Final = (
    "Counted in the traced kernels, over their loops and launches, for an entry of the "
    "logits: matrix *products*, in units of 2 H flops, where H below 64 is padded; "
    "*exps*, beside those of flash attention, one forward and two backward; *vector "
    "operations*, a product that is only added to something being one with the sum; "
    "*shared*, bytes that threads, copies and tensor cores read and write in shared "
    "memory, and 128 for each load with which a warp reads a vector, which takes it as "
    "long. *estimate* is a **roofline, not a measurement; nothing "
    "ran**: the largest of the four over an H100 SXM's peaks, as if they overlapped "
    "without loss and all multiprocessors had work; what threads exchange in their "
    "sums, how the compiler spreads a tile over memory banks, memory, launches and "
    "what is outside of the kernels are left out. *x "
    "softmax's exps* is that over the time of softmax's exponentials alone, on the "
    "units that make ours. Peaks: "
    f"{_hopper.FLOPS / 1e12:.0f} Tflop/s of dense products and "
    f"{_hopper.VECTOR_OPS / 1e12:.3g} T/s of vector operations ([data sheet]"
    "(https://www.nvidia.com/en-us/data-center/h100/), half of its float32 flops), "
    f"{_hopper.EXPS / 1e12:.3g} T/s of exponentials and "
    f"{_hopper.SHARED_BYTES / 1e12:.3g} TB/s of shared memory (16, and 128 bytes, for "
    "128 of those: [CUDA C++ Programming Guide]"
    "(https://docs.nvidia.com/cuda/cuda-c-programming-guide/), arithmetic instructions "
    "and compute capability 9.0)."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel, as it was compiled."""

    name: str
    direction: str  # In which pass it was first launched.
    num_blocks: int  # Of threads, in its grid.
    threads: int  # In a block.
    registers: int  # Of a thread.
    dynamic_bytes: int  # Of shared memory, as launched.
    static_bytes: int  # Of shared memory, as declared.
    barriers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    remarks: tuple[str, ...]  # Of ptxas, by code.
    instructions: int
    wgmma: int
    exp2: int
    local_loads: int
    local_stores: int

    @property
    def shared_bytes(self) -> int:
        """Of shared memory, for a block."""
        return self.dynamic_bytes + self.static_bytes

    @property
    def at_once(self) -> tuple[int, str]:
        """Blocks that a multiprocessor has room for, and what limits them."""
        return _hopper.blocks_at_once(self.registers, self.threads, self.shared_bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What the kernels of a pass do, in all launches: counted in their traces."""

    direction: str
    launches: int
    flops: int  # Of matrix products.
    exps: int
    vector: int
    shared: int  # Bytes that shared memory could have moved meanwhile.

    @property
    def parts(self) -> dict[str, float]:
        """Seconds that each would take alone."""
        return {
            "tensor cores": self.flops / _hopper.FLOPS,
            "exponentials": self.exps / _hopper.EXPS,
            "vector operations": self.vector / _hopper.VECTOR_OPS,
            "shared memory": self.shared / _hopper.SHARED_BYTES,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """How our attention kernels cut a head."""

    regime: str
    num_row_tiles: int
    num_col_tiles: int
    period: int
    forward_bytes: int  # Of shared memory, as we estimated it.
    backward_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One executable."""

    program: str
    mode: str
    heads: int  # Or matrices, where the program is `SMALL`.
    tokens: int  # Or rows and columns of a matrix.
    head_dim: int  # 0 of matrices.
    dtype: str
    num_iters: int
    kernels: tuple[Kernel, ...]  # Of Pallas.
    work: tuple[Work, ...]  # Of our attention kernels, where it was counted.
    blocks: Blocks | None  # Of our attention kernels alone.
    temp_bytes: int
    argument_bytes: int
    output_bytes: int
    jax_version: str
    ptxas_version: str
    nvdisasm_version: str
    commit: str
    date: str

    @property
    def key(self) -> tuple:
        """What was compiled."""
        shape = self.heads, self.tokens, self.head_dim
        return self.program, self.mode, shape, self.dtype, self.num_iters


def read(folder: Path = FOLDER) -> list[Row]:
    """All rows."""
    path = folder / FILE
    if not path.exists():
        return []
    return [_parse(fields) for fields in json.loads(path.read_text(encoding="utf-8"))]


def write(rows: Sequence[Row], folder: Path = FOLDER) -> None:
    """The file, a line for each row."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(
        json.dumps(dataclasses.asdict(row))
        for row in sorted(rows, key=lambda row: row.key)
    )
    (folder / FILE).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def write_page(folder: Path = FOLDER) -> None:
    """The page of the file there."""
    (folder / PAGE).write_text(page(read(folder)), encoding="utf-8")


def page(rows: Sequence[Row]) -> str:
    """Markdown."""
    versions = dict.fromkeys(
        f"jax {x.jax_version}, ptxas {x.ptxas_version}, nvdisasm {x.nvdisasm_version}, "
        f"commit `{x.commit}`, {x.date[:10]}"
        for x in rows
    )
    parts = ["# Compiled for NVIDIA GPUs", f"{'; '.join(versions)}.", METHOD]
    ours = [row for row in rows if row.program == OURS]
    if ours:
        parts += ["## Temporary memory", MEMORY_METHOD, _memory(rows)]
    if any(row.work for row in ours):
        parts += ["## Work", WORK_METHOD, _work(ours)]
    parts += ["## Kernels of attention", KERNELS_METHOD]
    for key in dict.fromkeys((x.dtype, x.head_dim, x.num_iters) for x in ours):
        some = [row for row in ours if (row.dtype, row.head_dim, row.num_iters) == key]
        dtype, head_dim, num_iters = key
        parts += [
            f"### {dtype}, head dimension {head_dim}, {num_iters} iterations",
            _table.markdown(REGIME_HEADER, _regimes(some)),
            _table.markdown(("tokens", *KERNEL_HEADER), _kernel_lines(some)),
        ]
    small = [row for row in rows if row.program == SMALL]
    if small:
        one = small[0]
        parts += [
            f"## Kernels of {one.heads:,} small matrices",
            f"`sinkhorn` in {one.dtype}, {one.num_iters} iterations; a thread has a "
            "matrix, so that what it keeps of one is in registers and what they have "
            "no room for in local memory, which is spills.",
            _table.markdown(
                ("rows", *KERNEL_HEADER[1:]),
                [(rows, *line) for rows, _, *line in _kernel_lines(small)],
            ),
        ]
    return "\n\n".join(parts) + "\n"


MEMORY_HEADER: Final = (
    *("dtype", "heads", "tokens", "H"),
    *(OURS, "streaming", "scaling", "reference", "softmax", "bytes a number"),
)


def _memory(rows):
    by_key = {row.key: row for row in rows}
    lines = []
    ours = [x for x in rows if x.program == OURS and x.mode == "forward_backward"]
    most = max(row.num_iters for row in ours)
    for row in ours:
        if row.num_iters != most:
            continue
        cells = []
        for program in MEMORY_HEADER[4:-1]:
            some = (
                by_key.get((program, mode, *row.key[2:]))
                for mode in ("forward", "forward_backward")
            )
            sizes = [_table.number(x.temp_bytes / MIB) for x in some if x]
            cells.append(" / ".join(sizes) or _table.MISSING)
        numbers = row.heads * 2 * row.tokens * (row.head_dim + row.num_iters)
        each = _table.number(row.temp_bytes / numbers)
        shape = map(str, (row.heads, row.tokens, row.head_dim))
        lines.append((row.dtype, *shape, *cells, each))
    return _table.markdown(MEMORY_HEADER, lines)


WORK_HEADER: Final = (
    *("dtype", "H", "iterations", "tokens", "pass", "launches", "products", "exps"),
    "softmax's exps",
    *("vector operations", "shared, bytes", "estimate, µs", "x softmax's exps"),
    "limited by",
)


def _work(rows):
    lines = []
    for row in rows:
        if row.mode != "forward_backward":
            continue
        entries = row.heads * row.tokens**2
        for work in row.work:
            limit = max(work.parts, key=lambda name: work.parts[name])
            seconds, softmax = work.parts[limit], SOFTMAX_EXPS[work.direction]
            lines.append(
                (
                    *(row.dtype, str(row.head_dim), str(row.num_iters)),
                    *(str(row.tokens), work.direction, str(work.launches)),
                    f"{work.flops / (2 * row.head_dim * entries):.2f}",
                    *(f"{work.exps / entries:.2f}", str(softmax)),
                    f"{work.vector / entries:.1f}",
                    f"{work.shared / entries:.1f}",
                    _table.number(1e6 * seconds),
                    _table.number(seconds / (softmax * entries / _hopper.EXPS)),
                    limit,
                )
            )
    return _table.markdown(WORK_HEADER, lines)


REGIME_HEADER: Final = ("tokens", "kernel matrix", "tiles", "shared memory, estimated")


def _regimes(rows):
    return [
        (
            str(row.tokens),
            row.blocks.regime,
            f"{row.blocks.num_row_tiles} x {row.blocks.num_col_tiles}",
            f"{_kib(row.blocks.forward_bytes)} / {_kib(row.blocks.backward_bytes)} KiB",
        )
        for row in rows
        if row.mode == "forward_backward"
    ]


KERNEL_HEADER: Final = (
    *("kernel", "pass", "threads", "registers", "spills", "stack", "shared, KiB"),
    *("barriers", "at once", "all", "wgmma", "exp2", "local", "remarks"),
)


def _kernel_lines(rows):
    """Those that are alike but for the size of their grid on one line."""
    tokens: dict[tuple, list[int]] = {}
    for row in rows:
        if row.mode == "forward_backward":
            for kernel in row.kernels:
                line = _kernel_line(kernel)
                tokens.setdefault(line, [])
                if row.tokens not in tokens[line]:
                    tokens[line].append(row.tokens)
    lines = sorted(tokens.items(), key=lambda item: (item[1][0], len(item[1])))
    return [(", ".join(map(str, some)), *line) for line, some in lines]


def _kernel_line(kernel):
    num, limit = kernel.at_once
    remarks = (
        f"{len(list(same))} x {code}"
        for code, same in itertools.groupby(sorted(kernel.remarks))
    )
    return (
        kernel.name.removeprefix("sinkhorn_attention_"),
        kernel.direction,
        str(kernel.threads),
        str(kernel.registers),
        f"{kernel.spill_store_bytes} / {kernel.spill_load_bytes}",
        str(kernel.stack_bytes),
        _kib(kernel.shared_bytes),
        str(kernel.barriers),
        f"{num} ({limit})",
        str(kernel.instructions),
        str(kernel.wgmma),
        str(kernel.exp2),
        f"{kernel.local_loads} / {kernel.local_stores}",
        ", ".join(remarks) or _table.MISSING,
    )


def _kib(num_bytes):
    return _table.number(num_bytes / KIB)


def _parse(fields: dict[str, Any]) -> Row:
    kernels = tuple(
        Kernel(**x | {"remarks": tuple(x["remarks"])}) for x in fields["kernels"]
    )
    blocks = fields["blocks"] and Blocks(**fields["blocks"])
    work = tuple(Work(**x) for x in fields["work"])
    return Row(**fields | {"kernels": kernels, "work": work, "blocks": blocks})
