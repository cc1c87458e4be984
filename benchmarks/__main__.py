"""Times Sinkhorn attention against softmax attention and other libraries.

    python -m benchmarks           # All sweeps; appends to benchmarks/results/<device>/
    python -m benchmarks --quick   # One tiny case; prints its rows and keeps none.
    python -m benchmarks --readme  # Tables and plots, here and there, from kept rows.
    python -m benchmarks --sweeps gpu  # On a GPU: 128 heads, bfloat16 and float16.

The sweep `gpu` is not part of a run unless named, and an error without a GPU. It takes
long at once; `--cases 128x1024 --dtypes bfloat16` is a part, and
`--no-single-head-memory` saves two of three compilations. Small matrices and the search
for the GPU kernels' blocks are commands of their own, `python -m benchmarks.matrices`
and `python -m benchmarks.gpu_block_search`.

How it measures. Each program is compiled ahead of time for its shape and called once
untimed. Then all programs of a case take turns; a time runs from the call until the
result is ready, on inputs that are on the device already, and a turn begins with an
untimed call if calls take less than 0.25 s. Each has at least `repeats` turns, 3 if a
call takes over 2 s, and more until it has used its share of `budget_s`; one whose first
call takes over 20 s is not called again, and that call is its time. What would take
over 300 s, four times as long as with half the tokens, is skipped. Median and
interquartile range are reported, and the ratio to `jax.nn.dot_product_attention`,
called plainly, is one of medians over the same rounds. Forward and backward together
are the output and the gradients with respect to query, key and value, for a random
cotangent.

Peers. `cudnn_softmax` is JAX's softmax attention in cuDNN, on NVIDIA GPUs alone, and
`torch_softmax` PyTorch's fused one; `torch_sinkhorn` is the iteration written in plain
PyTorch with autograd; `ott_unrolled` and `ott_implicit` are OTT-JAX's solver, `pot` is
POT's in log space. They get the same numbers in the same turns and as many threads as
JAX, and do the same half steps: OTT and POT start from the potentials of the softmax.
On Linux the C library is told to keep freed memory for the next call, from which eager
programs and large temporaries gain; beyond that nothing is tuned: PyTorch and POT are
eager, POT goes head by head. Half precision is widened to float32 for OTT, POT and the
PyTorch iteration, as Sinkhorn does here. What is not installed or cannot run is skipped
with a reason, also what needs more than half of the device's memory; reasons are kept
beside the rows.

Memory of a JAX program is what the compiled executable declares as temporary: inputs
and outputs are not in it. `ts_arrays_per_head` says how many T x S arrays (float32 or
wider) live for one head in flight: the program is compiled for a single head, at two
head dimensions, and what is proportional to H, such as copies of the queries, is taken
off. What is left is whole arrays and, as a fraction, vectors. `peak_mib` leaves nothing
out. For PyTorch and POT on a CPU it is measured: by how much the peak resident set of
the process grows over a call, results included and what allocators keep back; for
PyTorch on CUDA the peak of its allocator. So small differences between JAX and these
two mean nothing.

Errors are against float64 in NumPy, for as many whole heads as are cheap: at least one,
and all of them where heads x tokens² is at most 2²². `ott_implicit` gives the gradient
at the fixed point and not that of the iterations made; its error shows the difference
and is not rounding.

What it does not show. Standard normal inputs give logits of standard deviation 1, and
the linear domain suffices; a head that has to leave it costs about what `reference`
does. There is no mask, bias, dropout or grouped head, one device, and nothing around
the attention. A time has the start of the call from Python in it, which on a GPU may be
most of the shortest ones. Times on a machine with other work are noisy, and those of
PyTorch, whose threads wait for each other in every operation, several times too long:
compare ratios of one run, and not where the interquartile range is of the size of the
difference. Sinkhorn multiplies matrices at highest precision; softmax does what JAX
does by default, which on a GPU or TPU may be less (`matmul_precision`).
"""

import dataclasses
import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from . import attention as _run
from . import programs as _programs
from .harness import cases as _cases
from .harness import command as _command
from .harness import machine as _machine
from .harness import record as _record
from .report import readme as _readme
from .report import table as _table

# Else XLA takes three quarters of a GPU's memory and PyTorch has to do with the rest.
# Read when JAX first looks at its devices, which is later.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

BUSY: Final = 0.25  # Of each CPU, before there is something to say.
QUICK: Final = "The cases of --quick are its own; leave out sweeps, cases and dtypes."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to run, and where its rows go."""

    quick: bool = False  # A smoke run: one tiny case, and no rows unless `output`.
    readme: bool = False  # Only rewrite README, device pages and plots from the rows.
    sweeps: tuple[str, ...] = tuple(_cases.ANYWHERE)
    cases: tuple[str, ...] = ()  # Heads x tokens; none is all of the sweeps.
    dtypes: tuple[str, ...] = ()  # Likewise.
    # With peers, and softmax always.
    implementations: tuple[str, ...] = dataclasses.field(
        default_factory=_programs.names
    )
    repeats: int = 5  # Timed calls of each program, at least, if they are fast.
    budget_s: float = 4.0  # More calls until so many seconds a case and mode.
    # Whether our programs are also compiled for a head alone, twice, for its memory.
    single_head_memory: bool = True
    output: Path | None = None  # Rows are appended here; None is the device's folder.

    def __post_init__(self):
        if self.quick:
            object.__setattr__(self, "budget_s", 0.0)
            if self.cases or self.dtypes or self.sweeps != tuple(_cases.ANYWHERE):
                raise ValueError(QUICK)
        _check_names("implementations", self.implementations, _programs.names())
        _check_names("sweeps", self.sweeps, _cases.SWEEPS)
        cases = _cases.select(self.sweeps)
        _check_names("cases", self.cases, dict.fromkeys(x.name for x in cases))
        _check_names("dtypes", self.dtypes, dict.fromkeys(x.dtype for x in cases))
        if self.repeats < 1:
            raise ValueError(
                f"repeats must be at least 1, got {self.repeats}: there is no median "
                "of no calls. 5 or more give an interquartile range worth reading."
            )


def run(config: Config) -> list[_record.Row]:
    """Measures, prints a table, and appends the rows.

    Raises:
        RuntimeError: A sweep is for another platform than that on which JAX computes.
    """
    for sweep in config.sweeps:
        if sweep in _cases.BY_PLATFORM:
            _machine.require(sweep, f"The sweep {sweep!r}")
    now = datetime.datetime.now(datetime.UTC)
    facts = {**_machine.facts(), "date": now.isoformat(timespec="seconds")}
    output = config.output
    if output is None and not config.quick:
        folder = _machine.folder(facts, _record.RESULTS)
        output = folder / f"{now:%Y-%m-%d}.jsonl"
    if (facts["load"] or 0) > BUSY * facts["num_cpus"]:
        print(
            f"The machine was busy in the last minute (load {facts['load']:.1f} on "
            f"{facts['num_cpus']} CPUs). Times will be noisy, PyTorch's too long."
        )
    cases = _cases.select(config.sweeps, config.cases, config.dtypes)
    rows = _run.run(
        _cases.SMOKE if config.quick else cases,
        config.implementations,
        config.repeats,
        config.budget_s,
        facts,
        output,
        config.single_head_memory,
    )
    print(_table.aligned(rows))
    print(f"Rows appended to {output}." if output else "No rows kept.")
    return rows


def main(args: Sequence[str] | None = None) -> None:
    """The command."""
    config = _command.parse(Config, __doc__, args)
    if config.readme:
        _readme.update()
    else:
        run(config)


def _check_names(what, names, known):
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"Unknown {what} {unknown}; expected some of {list(known)}. "
            f"{_programs.SOFTMAX!r} is always measured and not to be named."
        )


if __name__ == "__main__":
    main()
