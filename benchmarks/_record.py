"""A measurement, and the files that measurements are kept in."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Final

RESULTS: Final = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measurement; one line of a results file.

    New fields get a default: the files are append-only, and old lines must still parse.
    """

    implementation: str  # A key of IMPLEMENTATIONS, or "softmax".
    mode: str  # "forward" or "forward_backward".
    shape_btnh: tuple[int, int, int, int]
    kv_len: int
    dtype: str
    num_iters: int  # Sinkhorn iterations, not repeats; softmax has none to do.
    matmul_precision: str  # "highest" for Sinkhorn; JAX's setting for softmax.
    median_ms: float
    iqr_ms: float  # Interquartile range over `repeats`.
    repeats: int
    compile_ms: float  # Tracing, lowering and compiling.
    tokens_per_second: float  # B * T through all N heads.
    ratio_to_softmax: float  # Median over softmax's; same shape, mode and run.
    peak_mib: float | None  # Temporary memory; None where the backend is silent.
    peak_in_ts_arrays: float | None  # The same, in arrays T * S of float32 or wider.
    one_head_mib: float | None  # Temporary memory of the program for a single head.
    # The part of that which does not grow with H, in arrays T * S of float32 or wider.
    # Whole arrays; the fraction is vectors, such as the potentials of every iteration.
    ts_arrays_per_head: float | None
    # Against float64. "forward": of the output. "forward_backward": the worst of dq,
    # dk and dv, each over its own largest magnitude.
    max_abs_error: float
    device: str  # CPU model or the accelerator's kind.
    platform: str  # "cpu", "gpu" or "tpu".
    num_cpus: int  # That this process may use.
    jax_version: str
    jaxlib_version: str
    python_version: str
    commit: str  # Short hash; "-dirty" if the tree was; "unknown" without git.
    date: str  # When the run began, UTC; the same in all its rows.

    @classmethod
    def parse(cls, line: str) -> "Row":
        """The inverse of `json`."""
        fields = json.loads(line)
        return cls(**fields | {"shape_btnh": tuple(fields["shape_btnh"])})

    def json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self))


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds lines; never changes one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(row.json() + "\n" for row in rows)


def read(directory: Path = RESULTS) -> list[Row]:
    """All rows of `<device>/*.jsonl` below the directory, oldest run first."""
    rows = [
        Row.parse(line)
        for path in sorted(directory.glob("*/*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return sorted(rows, key=lambda row: row.date)
