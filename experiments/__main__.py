"""`python -m experiments <question> [--quick] [--options]`."""

import dataclasses
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import tyro

from . import errors
from .registry import COMMANDS

PROGRAM = "python -m experiments"


def main(args: Sequence[str] | None = None) -> None:
    """Answers the question that the first argument names."""
    args = list(sys.argv[1:] if args is None else args)
    name, options = _command_of(args[:1]), args[1:]
    if "--quick" in options:
        # With small numbers compilation is most of the work: 53 s became 39 s.
        jax.config.update("jax_disable_most_optimizations", True)
    command = COMMANDS[name].load()
    with errors.in_one_line():
        default = _default(command, options)
        config = tyro.cli(
            type(default),
            default=default,
            args=[option for option in options if option != "--quick"],
            prog=f"{PROGRAM} {name}",
            description=f"{command.__doc__}\nWith --quick the defaults are small.",
        )
        command.run(config)


def _command_of(first: Sequence[str]) -> str:
    """The command that the first argument names; shows the list where it names none."""
    types = [dataclasses.make_dataclass(name, ()) for name in COMMANDS]
    chosen = tyro.cli(
        tyro.extras.subcommand_type_from_defaults(
            {kind.__name__: kind() for kind in types},
            descriptions={name: command.about for name, command in COMMANDS.items()},
        ),
        args=first,
        prog=PROGRAM,
        description="Experiments on rank collapse, one command a question.",
    )
    return type(chosen).__name__


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Choice:
    """The options that decide the defaults of all others."""

    quick: bool = False
    preset: str | None = None
    task: str | None = None


def _default(command: ModuleType, options: Sequence[str]) -> Any:
    """The configuration without options. `choose` finds that of a preset or task."""
    choice, _ = tyro.cli(
        _Choice, args=options, return_unknown_args=True, add_help=False
    )
    if choice.quick:
        return command.QUICK
    if hasattr(command, "choose"):
        return command.choose(choice.preset, choice.task)
    return command.Config()


if __name__ == "__main__":
    main()
