"""Rows and skips of the attention benchmark, and the files that keep them."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from . import machine
from .cases import Case

RESULTS: Final = Path(__file__).parents[1] / "results"
SKIPS: Final = "-skipped.jsonl"  # Ending of the files with skips.


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    """Fields that rows and skips share."""

    implementation: str  # A key of IMPLEMENTATIONS or PEERS, or "softmax".
    mode: str  # "forward" or "forward_backward".
    shape_btnh: tuple[int, int, int, int]
    dtype: str
    num_iters: int  # Sinkhorn iterations, not repeats; softmax ignores them.
    device: str  # CPU model or the accelerator's kind.
    platform: str  # "cpu", "gpu" or "tpu".
    num_cpus: int  # CPUs that this process may use.
    date: str  # Start of the run in UTC; the same in all its lines.

    @property
    def case(self) -> Case:
        """The case that was measured."""
        _, tokens, heads, head_dim = self.shape_btnh
        return Case(heads, tokens, head_dim, self.dtype, self.num_iters)

    @property
    def machine(self) -> tuple[str, str, int]:
        """Device, platform and CPUs: the arguments of `machine.directory_name`."""
        return self.device, self.platform, self.num_cpus


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row(_Line):
    """One measurement; one line of a results file.

    A new field needs a default, because old lines must still parse.
    """

    median_ms: float
    iqr_ms: float  # Interquartile range over `repeats`.
    repeats: int
    compile_ms: float  # Tracing, lowering and compiling; 0 for an eager program.
    # Median over softmax's in the same rounds; None if softmax could not run.
    ratio_to_softmax: float | None
    peak_mib: float | None  # Memory of a call; None where the backend is silent.
    # Arrays T x S, of float32 or wider, that one head in flight allocates. Whole
    # arrays; the fraction is vectors, such as the potentials of every iteration.
    ts_arrays_per_head: float | None
    # Against float64. "forward": of the output. "forward_backward": the worst of dq,
    # dk and dv, each over its own largest magnitude.
    max_abs_error: float
    jax_version: str
    jaxlib_version: str
    python_version: str
    commit: str  # Short hash; "-dirty" if the tree was; "unknown" without git.
    version: str = ""  # Package and version of a peer.
    is_default: bool = False  # `implementation=None` selects it for this case.
    # Source of `peak_mib`. "compiled": temporary memory that the executable declares.
    # "resident": growth of the process's peak resident set over one call, with results.
    memory_source: str = "compiled"
    load: float | None = None  # Load of the machine in the minute before the run.


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Skip(_Line):
    """A program that was asked for and not measured."""

    reason: str


def append(path: Path, lines: Sequence[Row | Skip | dict[str, Any]]) -> None:
    """Appends lines of JSON to a file, whose folder is created if needed."""
    if not lines:
        return
    lines = [x if isinstance(x, dict) else dataclasses.asdict(x) for x in lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def path(facts: Mapping[str, Any], kind: str = "") -> Path:
    """File of today's rows for the machine with these `facts`."""
    return machine.folder(facts, RESULTS) / kind / f"{facts['date'][:10]}.jsonl"


def skips_path(path: Path) -> Path:
    """Path for the skips of the run whose rows go to `path`."""
    return path.with_name(path.stem + SKIPS)


def read(directory: Path = RESULTS) -> list[Row]:
    """All rows of `<device>/*.jsonl` below the directory, oldest run first."""
    paths = (p for p in directory.glob("*/*.jsonl") if not p.name.endswith(SKIPS))
    return _read(Row, paths)


def read_skips(directory: Path = RESULTS) -> list[Skip]:
    """All skips of `<device>/*-skipped.jsonl`, oldest run first."""
    return _read(Skip, directory.glob(f"*/*{SKIPS}"))


def newest(lines: Sequence, rows: Sequence[Row]) -> list:
    """The rows or skips of each machine's newest run of each case.

    The dates of all `rows` say which run is the newest. All lines of a case are then
    from one run, and their ratios are within it.
    """
    dates: dict[tuple, str] = {}
    for row in rows:
        key = (row.machine, row.case)
        dates[key] = max(row.date, dates.get(key, ""))
    return [x for x in lines if x.date == dates.get((x.machine, x.case))]


def _read(kind, paths):
    lines = [
        _parse(kind, line)
        for path in sorted(paths)
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return sorted(lines, key=lambda line: line.date)


def _parse(kind, line):
    # Lines of earlier versions have fields that are no longer recorded.
    known = {field.name for field in dataclasses.fields(kind)}
    fields = {name: x for name, x in json.loads(line).items() if name in known}
    return kind(**fields | {"shape_btnh": tuple(fields["shape_btnh"])})
