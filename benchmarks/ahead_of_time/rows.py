"""Rows of what was compiled, the files that keep them, and their page."""

import dataclasses
import datetime
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import jax
import tqdm

from ..harness import machine
from ..harness.cases import Case
from ..harness.program import Mode
from ..report import table

FILE: Final = "executables.json"
SMALL_MATRICES: Final = "sinkhorn"  # The program of the kernels for small matrices.


@dataclasses.dataclass(frozen=True)
class Target:
    """One program to compile."""

    device: str  # Such as "v5e" or "hopper".
    program: str  # A key of IMPLEMENTATIONS, "softmax" or `SMALL_MATRICES`.
    case: Case  # For small matrices: their number, rows, and a head dimension of 0.
    mode: Mode

    def __str__(self):
        return f"{self.device} {self.program} {self.case} {self.mode}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One Pallas kernel of an executable, as it was compiled."""

    name: str
    memory_bytes: int  # VMEM of a TPU kernel, shared memory of a GPU's thread block.
    # Reported for GPUs alone. Registers, stack and spills are of one thread.
    threads: int | None = None  # In a thread block.
    registers: int | None = None
    stack_bytes: int | None = None
    spill_store_bytes: int | None = None
    spill_load_bytes: int | None = None
    remarks: tuple[str, ...] = ()  # Codes of ptxas's remarks.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Executable:
    """A compiled target."""

    target: Target
    regime: str  # How our attention kernels divide a head; else empty.
    kernels: tuple[Kernel, ...]  # In the order of their launches.
    temp_bytes: int  # Without inputs and results.
    jax_version: str
    compiler: str  # Name and version.
    commit: str
    date: str


def compile_missing(
    targets: Iterable[Target],
    compile_one: Callable[[Target], dict[str, Any]],
    compiler: str,
    folder: Path,
) -> list[Executable]:
    """Compiles the targets of which the folder has no row of this commit.

    `compile_one` gives the fields `regime`, `kernels` and `temp_bytes`. Rows are
    written as they come, and those of other commits are dropped.
    """
    facts = {
        "jax_version": jax.__version__,
        "compiler": compiler,
        "commit": machine.commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    rows = {x.target: x for x in read(folder) if x.commit == facts["commit"]}
    for target in tqdm.tqdm([x for x in targets if x not in rows]):
        rows[target] = Executable(target=target, **compile_one(target), **facts)
        write(rows.values(), folder)
    return list(rows.values())


def read(folder: Path) -> list[Executable]:
    """The rows of the folder."""
    path = folder / FILE
    if not path.exists():
        return []
    return [_parse(fields) for fields in json.loads(path.read_text(encoding="utf-8"))]


def write(rows: Iterable[Executable], folder: Path) -> None:
    """Writes the file of rows, a line for each."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(dataclasses.asdict(row)) for row in rows)
    (folder / FILE).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def write_page(folder: Path, title: str, method: str) -> None:
    """Writes README.md from the rows of the folder."""
    text = page(read(folder), title, method)
    (folder / "README.md").write_text(text, encoding="utf-8")


def page(rows: Sequence[Executable], title: str, method: str) -> str:
    """The page in Markdown: temporary memory, then the kernels of each device."""
    versions = dict.fromkeys(
        f"jax {row.jax_version}, {row.compiler}, commit `{row.commit}`, {row.date[:10]}"
        for row in rows
    )
    parts = [f"# {title}", f"{'; '.join(versions)}.", method]
    if attention := [row for row in rows if row.target.program != SMALL_MATRICES]:
        parts += ["## Temporary memory", MEMORY_METHOD, _memory(attention)]
    groups: dict[str, list[Executable]] = {}
    for row in rows:
        if row.kernels and row.target.mode == "forward_backward":
            target, case = row.target, row.target.case
            what = f"{case.heads} heads of dimension {case.head_dim}"
            if target.program == SMALL_MATRICES:
                what = f"{case.heads:,} small matrices"
            title = (
                f"{target.device}, {case.dtype}: {what}, {case.num_iters} iterations"
            )
            groups.setdefault(title, []).append(row)
    for title, some in groups.items():
        parts += [f"## {title}", _kernels(some)]
    return "\n\n".join(parts) + "\n"


GPU_COLUMNS: Final = (
    *("threads", "registers", "spill_store_bytes", "spill_load_bytes"),
    *("stack_bytes", "remarks"),
)
MEMORY_METHOD: Final = (
    "MiB that the executables declare as temporary, by program and mode. Inputs and "
    "results are not included, potentials for the backward pass are."
)


def _memory(rows):
    programs = list(dict.fromkeys(row.target.program for row in rows))
    programs.sort(key=lambda name: not name.startswith("mosaic"))
    lines: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        line = {"device": row.target.device, **dataclasses.asdict(row.target.case)}
        cells = lines.setdefault(tuple(line.values()), line)
        mode = row.target.mode.replace("_", " + ")
        cells[f"{row.target.program} {mode}"] = row.temp_bytes / 2**20
    modes = ("forward", "forward + backward")
    columns = [f"{name} {mode}" for name in programs for mode in modes]
    names = ("device", *(field.name for field in dataclasses.fields(Case)))
    return table.plain(list(lines.values()), (*names, *columns))


def _kernels(rows):
    lines = [
        {
            "tokens": row.target.case.tokens,
            "regime": row.regime or table.MISSING,
            **dataclasses.asdict(kernel),
            "name": kernel.name.removeprefix("sinkhorn_attention_"),
            "KiB": kernel.memory_bytes / 2**10,
            "remarks": ", ".join(dict.fromkeys(kernel.remarks)) or table.MISSING,
        }
        for row in rows
        for kernel in row.kernels
    ]
    is_gpu = lines[0]["registers"] is not None
    columns = ("tokens", "regime", "name", "KiB", *(GPU_COLUMNS if is_gpu else ()))
    return table.plain(lines, columns)


def _parse(fields: dict[str, Any]) -> Executable:
    kernels = tuple(
        Kernel(**x | {"remarks": tuple(x["remarks"])}) for x in fields["kernels"]
    )
    target = fields["target"]
    target = Target(**target | {"case": Case(**target["case"])})
    return Executable(**fields | {"kernels": kernels, "target": target})
