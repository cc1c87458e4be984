"""`python -m benchmarks [command] [--options]`; without a command, `attention`."""

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Final

import tyro

from . import (
    arguments,
    attention,
    collapse_measures,
    gpu_block_search,
    many_devices,
    matrices,
)
from .harness import options
from .report import readme

# A command is a module with `Config` and `run`, and a line here.
COMMANDS: Final[dict[str, ModuleType]] = {
    "attention": attention,
    "arguments": arguments,
    "matrices": matrices,
    "collapse_measures": collapse_measures,
    "gpu_block_search": gpu_block_search,
    "many_devices": many_devices,
    "readme": readme,
}


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command that the first argument names."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
        args.insert(0, "attention")
    about = lambda name: COMMANDS[name].__doc__ or ""
    command = tyro.extras.subcommand_type_from_defaults(
        {name: module.Config() for name, module in COMMANDS.items()},
        # In the list of commands, the first line of each is enough.
        descriptions={
            name: about(name) if name in args else about(name).partition("\n")[0]
            for name in COMMANDS
        },
    )
    config = options.parse(command, args, prog="python -m benchmarks")
    sys.modules[type(config).__module__].run(config)


if __name__ == "__main__":
    main()
