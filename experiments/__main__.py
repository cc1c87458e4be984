"""`python -m experiments <question> [--quick] [--options]`."""

import sys
from collections.abc import Sequence
from types import ModuleType

import jax
import tyro

from . import rank_decay

# A question is a module with `Config`, `QUICK` and `run`, and a line here.
QUESTIONS: dict[str, ModuleType] = {
    "rank_decay": rank_decay,
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
            name: question.QUICK if is_quick else question.Config()
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
    sys.modules[type(config).__module__].run(config)


if __name__ == "__main__":
    main()
