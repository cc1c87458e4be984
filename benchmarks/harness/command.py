"""Options of a command, from a dataclass of what it can be told."""

import argparse
import dataclasses
import importlib
import importlib.util
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

Config = TypeVar("Config")


def parse(
    config: type[Config], description: str | None, args: Sequence[str] | None = None
) -> Config:
    """The configuration that the arguments give; None are those of the command line.

    With tyro, whose help explains each option. Where it is not installed and nothing
    can be, as on borrowed machines with a GPU, the same options without explanations.
    """
    if importlib.util.find_spec("tyro") is None:
        return _parse_plainly(config, description, args)
    tyro = importlib.import_module("tyro")
    return tyro.cli(config, description=description, args=args)


def _parse_plainly(config, description, args):
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    types_ = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            default=argparse.SUPPRESS,  # The dataclass has it.
            **_how(types_[field.name]),
        )
    return config(**vars(parser.parse_args(args)))


def _how(type_) -> dict[str, Any]:
    if type_ is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(type_) is tuple:
        return {"type": typing.get_args(type_)[0], "nargs": "*", "action": _Tuple}
    if typing.get_origin(type_) is types.UnionType:  # Or None.
        (type_,) = (x for x in typing.get_args(type_) if x is not types.NoneType)
    return {"type": type_}


class _Tuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values or ()))
