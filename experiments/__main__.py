"""`python -m experiments <question> [--quick] [--options]`."""

import argparse
import pathlib
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

import jax
import tyro

from .questions import (
    ablations,
    bounds,
    compare,
    convergence,
    doubly_exponential,
    entropy,
    iterations,
    length,
    paths,
    rank_decay,
    swap,
    temperature,
)
from .report import report
from .training import plot, train

ROOT = pathlib.Path(__file__).resolve().parents[1]

# A question is a module with `Config`, `QUICK` and `run`, and a line here. One with
# presets also has `choose`, which finds the defaults by --preset and --task.
QUESTIONS: dict[str, ModuleType] = {
    "train": train,
    "compare": compare,
    "plot": plot,
    "rank_decay": rank_decay,
    "ablations": ablations,
    "doubly_exponential": doubly_exponential,
    "bounds": bounds,
    "convergence": convergence,
    "paths": paths,
    "entropy": entropy,
    "iterations": iterations,
    "swap": swap,
    "temperature": temperature,
    "length": length,
    "report": report,
}


def main(args: Sequence[str] | None = None) -> None:
    """Answers the question that the first argument names."""
    args = list(sys.argv[1:] if args is None else args)
    is_quick = "--quick" in args
    if is_quick:
        # With small numbers compilation is most of the work: 53 s became 39 s.
        jax.config.update("jax_disable_most_optimizations", True)
    command = tyro.extras.subcommand_type_from_defaults(
        {
            name: question.QUICK if is_quick else _defaults(question, args)
            for name, question in QUESTIONS.items()
        },
        descriptions={
            name: f"{question.__doc__}\nWith --quick the defaults are small numbers."
            for name, question in QUESTIONS.items()
        },
    )
    config = tyro.cli(
        command,
        args=[arg for arg in args if arg != "--quick"],
        prog="python -m experiments",
    )
    try:
        sys.modules[type(config).__module__].run(config)
    except Exception as error:
        if not _is_explained(error):
            raise
        sys.exit(f"error: {error}")


def _is_explained(error):
    # What these packages raise themselves, and the system of its files, says what to
    # do. Anything else is a defect, to which its traceback leads.
    *_, last = traceback.extract_tb(error.__traceback__)
    packages = ("experiments", "sinkhorn_jax")
    is_ours = any(
        pathlib.Path(last.filename).is_relative_to(ROOT / p) for p in packages
    )
    return isinstance(error, OSError) or (is_ours and "raise " in (last.line or ""))


def _defaults(question, args):
    if not hasattr(question, "choose"):
        return question.Config()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--task")
    chosen, _ = parser.parse_known_args(args)
    try:
        return question.choose(chosen.preset, chosen.task)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
