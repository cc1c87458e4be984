"""What was compiled for TPUs, the file that keeps it, and its page."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from ..harness.record import RESULTS
from ..report import table as _table
from . import tpu_specs as _chips

FOLDER: Final = RESULTS / "compiled"
PAGE: Final = "README.md"
OURS: Final = "mosaic_tpu"
SOFTMAX: Final = "flash_attention"
MIB: Final = 2**20

METHOD: Final = (
    "Compiled ahead of time, without a TPU, by `make compile-table`; **nothing ran and "
    "no time was measured**. For the kernels forward / backward: *regime* (whether the "
    "kernel matrix stays in VMEM) and rows of a strip; *VMEM* that the compiler gave; "
    "*flops* and *exps* for an entry of the logits, flops in units of 2 H, from the "
    "kernels' `cost_estimate`. *temporary* and *moved* are what the executable of both "
    "declares as temporary memory and as bytes accessed.\n\n"
    "*estimate* is a **roofline, not a measurement**: for each kernel the largest of "
    "its matrix products, exponentials, vector operations and HBM traffic over the "
    "peaks below, all four counted in the traced kernel, as if they overlapped without "
    "loss; work outside of the kernels is left out. *x flash* is that over the same "
    "for JAX's own softmax attention, "
    "`jax.experimental.pallas.ops.tpu.flash_attention` in blocks of 512, compiled and "
    "counted alike. In float32 Sinkhorn multiplies at highest precision, six passes, "
    "and that kernel at the default, taken as one. *forward* is of executables without "
    "a backward pass where both were compiled, and else of the first kernel of those "
    "with one, where JAX's also writes what its second will read."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel of an executable."""

    name: str
    vmem_bytes: int  # What the compiler took.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one kernel does: counted in its trace, and by its `cost_estimate`."""

    name: str
    flops: int
    passes: int
    exps: int
    vector: int
    num_bytes: int
    estimated_flops: int | None  # None without a `cost_estimate`, like the next two.
    estimated_exps: int | None
    estimated_bytes: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """How one of our kernels cut a head."""

    is_resident: bool
    rows: int
    vmem_bytes: int  # What we estimated.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One executable for one generation."""

    program: str
    generation: str
    mode: str
    tokens: int
    heads: int
    head_dim: int
    dtype: str
    num_iters: int
    kernels: tuple[Kernel, ...]
    work: tuple[Work, ...]
    blocks: tuple[Blocks, ...]  # Forward and backward; of our kernels alone.
    bytes_accessed: int  # By the executable's own account.
    temp_bytes: int
    jax_version: str
    libtpu_version: str
    commit: str
    date: str

    @property
    def key(self) -> tuple:
        """What was compiled."""
        return self.program, self.generation, self.mode, self.tokens, self.dtype

    @property
    def seconds(self) -> float:
        """The roofline estimate."""
        chip = _chips.CHIPS[self.generation]
        return sum(max(_parts(work, chip).values()) for work in self.work)

    @property
    def limit(self) -> str:
        """What the estimate is made of for the largest part."""
        chip = _chips.CHIPS[self.generation]
        longest = max(self.work, key=lambda work: max(_parts(work, chip).values()))
        parts = _parts(longest, chip)
        return max(parts, key=lambda name: parts[name])


def read(folder: Path = FOLDER) -> list[Row]:
    """All rows, of one file for each generation."""
    return [
        _parse(fields)
        for name in _chips.CHIPS
        if (path := folder / f"{name}.json").exists()
        for fields in json.loads(path.read_text(encoding="utf-8"))
    ]


def write(rows: Sequence[Row], folder: Path = FOLDER) -> None:
    """The files of the generations that have rows, a line for each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(row.generation for row in rows):
        lines = ",\n".join(
            json.dumps(dataclasses.asdict(row))
            for row in sorted(rows, key=lambda row: row.key)
            if row.generation == name
        )
        (folder / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def write_page(folder: Path = FOLDER) -> None:
    """The page of all files there."""
    (folder / PAGE).write_text(page(read(folder)), encoding="utf-8")


def page(rows: Sequence[Row]) -> str:
    """Markdown."""
    one = rows[-1]
    versions = dict.fromkeys(
        f"jax {x.jax_version}, libtpu {x.libtpu_version}, commit `{x.commit}`, "
        f"{x.date[:10]}"
        for x in rows
    )
    shape = f"{one.heads} heads of dimension {one.head_dim}, {one.num_iters} iterations"
    parts = ["# Compiled for TPUs", f"{'; '.join(versions)}. {shape}.", METHOD]
    by_key = {row.key: row for row in rows}
    for generation in _chips.CHIPS:
        for dtype in dict.fromkeys(row.dtype for row in rows):
            lines = [
                _line(by_key, generation, tokens, dtype)
                for tokens in sorted({row.tokens for row in rows})
                if (OURS, generation, "forward_backward", tokens, dtype) in by_key
            ]
            if lines:
                parts += [f"## {generation}, {dtype}", _table.markdown(HEADER, lines)]
    return "\n\n".join([*parts, "## Peaks", _peaks()]) + "\n"


HEADER: Final = (
    *("tokens", "regime, rows", "VMEM, MiB", "flops", "exps", "temporary, MiB"),
    *("moved, MiB", "estimate forward, µs", "x flash", "forward + backward, µs"),
    *("x flash", "limited by"),
)


def _line(by_key, generation, tokens, dtype):
    forward, both = (
        {name: by_key.get((name, generation, mode, tokens, dtype)) for name in NAMES}
        for mode in ("forward", "forward_backward")
    )
    if not all(forward.values()):
        forward = {
            name: row and dataclasses.replace(row, work=row.work[:1])
            for name, row in both.items()
        }
    ours = both[OURS]
    entries = ours.heads * tokens**2
    return (
        str(tokens),
        " / ".join(
            f"{'resident' if x.is_resident else 'strip'} {x.rows}" for x in ours.blocks
        ),
        " / ".join(_table.number(x.vmem_bytes / MIB) for x in ours.kernels),
        _per_entry(ours, "estimated_flops", 2 * ours.head_dim * entries),
        _per_entry(ours, "estimated_exps", entries),
        _table.number(ours.temp_bytes / MIB),
        _table.number(ours.bytes_accessed / MIB),
        *_estimates(forward),
        *_estimates(both),
        ours.limit,
    )


NAMES: Final = (OURS, SOFTMAX)


def _per_entry(row, field, unit):
    return " / ".join(f"{getattr(x, field) / unit:.2f}" for x in row.work)


def _estimates(rows):
    ours, softmax = (rows[name] for name in NAMES)
    if ours is None:
        return _table.MISSING, _table.MISSING
    ratio = _table.MISSING
    if softmax is not None:
        ratio = _table.number(ours.seconds / softmax.seconds)
    return _table.number(1e6 * ours.seconds), ratio


def _parts(work, chip):
    return {
        "matrix unit": work.passes / chip.info.bf16_ops_per_second,
        "exponentials": work.exps / (_chips.EXPS_PER_CLOCK * chip.clock),
        "vector unit": work.vector / (_chips.VECTOR_OPS_PER_CLOCK * chip.clock),
        "HBM": work.num_bytes / chip.info.mem_bw_bytes_per_second,
    }


def _peaks():
    lines = [
        (
            name,
            f"{chip.info.vmem_capacity_bytes / MIB:.0f}",
            f"{chip.info.bf16_ops_per_second / 1e12:.4g}",
            f"{chip.info.mem_bw_bytes_per_second / 1e9:.4g}",
            f"{chip.clock / 1e9:.4g}",
            f"{_chips.VECTOR_OPS_PER_CLOCK * chip.clock / 1e12:.3g}",
            f"{_chips.EXPS_PER_CLOCK * chip.clock / 1e12:.3g}",
            chip.clock_source,
        )
        for name, chip in _chips.CHIPS.items()
    ]
    header = (
        *("one TensorCore of", "VMEM, MiB", "bfloat16, Tflop/s", "HBM, GB/s"),
        *("clock, GHz", "vector, T/s", "exps, T/s", "source of the clock"),
    )
    return _table.markdown(header, lines) + (
        "\n\nVMEM, bfloat16 and HBM: JAX's [TPU hardware reference]"
        "(https://docs.jax.dev/en/latest/pallas/tpu/hardware.html). Vector operations: "
        "four registers of 8 x 128 a clock ([How to Scale Your Model]"
        "(https://jax-ml.github.io/scaling-book/tpus/)). Exponentials: one register a "
        "clock, an assumption."
    )


def _parse(fields: dict[str, Any]) -> Row:
    kinds = {"kernels": Kernel, "work": Work, "blocks": Blocks}
    parts = {
        name: tuple(kind(**x) for x in fields[name]) for name, kind in kinds.items()
    }
    return Row(**fields | parts)
