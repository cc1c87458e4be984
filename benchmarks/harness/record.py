"""A measurement, what was not measured and why, and the files that keep both."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from .cases import Case

RESULTS: Final = Path(__file__).parents[1] / "results"
SKIPS: Final = "-skipped.jsonl"  # How the files of `Skip` end.


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    """What both kinds of line say."""

    implementation: str  # A key of IMPLEMENTATIONS or PEERS, or "softmax".
    mode: str  # "forward" or "forward_backward".
    shape_btnh: tuple[int, int, int, int]
    dtype: str
    num_iters: int  # Sinkhorn iterations, not repeats; softmax has none to do.
    device: str  # CPU model or the accelerator's kind.
    platform: str  # "cpu", "gpu" or "tpu".
    num_cpus: int  # That this process may use.
    date: str  # When the run began, UTC; the same in all its rows.

    @classmethod
    def parse(cls, line: str) -> "_Line":
        """The inverse of `json`."""
        fields = json.loads(line)
        return cls(**fields | {"shape_btnh": tuple(fields["shape_btnh"])})

    def json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self))

    @property
    def case(self) -> Case:
        """What was measured."""
        _, tokens, heads, head_dim = self.shape_btnh
        return Case(heads, tokens, head_dim, self.dtype, self.num_iters)

    @property
    def machine(self) -> tuple[str, str, int]:
        """Device, platform and CPUs: the arguments of `_machine.directory_name`."""
        return self.device, self.platform, self.num_cpus


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row(_Line):
    """One measurement; one line of a results file.

    New fields get a default: the files are append-only, and old lines must still parse.
    """

    kv_len: int
    matmul_precision: str  # "highest" for Sinkhorn; JAX's setting for softmax.
    median_ms: float
    iqr_ms: float  # Interquartile range over `repeats`.
    repeats: int
    compile_ms: float  # Tracing, lowering and compiling; 0 for an eager program.
    tokens_per_second: float  # B * T through all N heads.
    # Median over softmax's in the same rounds; None if softmax could not run.
    ratio_to_softmax: float | None
    peak_mib: float | None  # Memory of a call; None where the backend is silent.
    peak_in_ts_arrays: float | None  # The same, in arrays T * S of float32 or wider.
    one_head_mib: float | None  # Temporary memory of the program for a single head.
    # The part of that which does not grow with H, in arrays T * S of float32 or wider.
    # Whole arrays; the fraction is vectors, such as the potentials of every iteration.
    ts_arrays_per_head: float | None
    # Against float64. "forward": of the output. "forward_backward": the worst of dq,
    # dk and dv, each over its own largest magnitude.
    max_abs_error: float
    jax_version: str
    jaxlib_version: str
    python_version: str
    commit: str  # Short hash; "-dirty" if the tree was; "unknown" without git.
    version: str = ""  # Of a peer's package, with its name.
    is_default: bool = False  # `implementation=None` takes it for this problem.
    # Where `peak_mib` is from. "compiled": what the executable declares as temporary.
    # "resident": growth of the process's peak resident set over one call. "allocator":
    # growth of the peak of PyTorch's CUDA allocator. The latter two include results.
    memory_source: str = "compiled"
    load: float | None = None  # Of the machine in the minute before the run.


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Skip(_Line):
    """A program that was asked for and not measured."""

    reason: str


def append(path: Path, lines: Iterable[Row | Skip]) -> None:
    """Adds lines; never changes one."""
    lines = list(lines)
    if not lines:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(line.json() + "\n" for line in lines)


def skips_path(path: Path) -> Path:
    """Where the skips of a run go whose rows go to the path."""
    return path.with_name(path.stem + SKIPS)


def read(directory: Path = RESULTS) -> list[Row]:
    """All rows of `<device>/*.jsonl` below the directory, oldest run first."""
    paths = (p for p in directory.glob("*/*.jsonl") if not p.name.endswith(SKIPS))
    return _read(Row, paths)


def read_file(path: Path) -> list[Row]:
    """The rows of one file; none if it is not there yet."""
    return _read(Row, [path]) if path.exists() else []


def read_skips(directory: Path = RESULTS) -> list[Skip]:
    """All skips, likewise."""
    return _read(Skip, directory.glob(f"*/*{SKIPS}"))


def newest(lines: Sequence, rows: Sequence[Row]) -> list:
    """Of each machine and case, what its newest run says.

    A case's lines are then of one run, and their ratios are within it.

    Args:
        lines: Rows or skips.
        rows: All rows; their dates count.
    """
    dates: dict[tuple, str] = {}
    for row in rows:
        key = (row.machine, row.case)
        dates[key] = max(row.date, dates.get(key, ""))
    return [x for x in lines if x.date == dates.get((x.machine, x.case))]


def _read(kind, paths):
    lines = [
        kind.parse(line)
        for path in sorted(paths)
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return sorted(lines, key=lambda line: line.date)
