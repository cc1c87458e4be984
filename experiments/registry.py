"""The questions and the other commands by name."""

import ast
import dataclasses
import importlib
import pathlib
from types import MappingProxyType, ModuleType
from typing import Final


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of `python -m experiments`."""

    module: str  # Inside `experiments`; has `Config`, `QUICK` and `run`.

    def load(self) -> ModuleType:
        """Imports the module, which takes a while, and so is done on demand."""
        return importlib.import_module(f".{self.module}", __package__)

    @property
    def about(self) -> str:
        """The first line of the module's docstring, read without importing it."""
        path = pathlib.Path(__file__).parent / self.module.replace(".", "/")
        tree = ast.parse(path.with_suffix(".py").read_text())
        return ast.get_docstring(tree).splitlines()[0]


# In the order of the report.
_NAMES = "study doubly_exponential bounds paths convergence swap temperature step_cost"
QUESTIONS: Final = MappingProxyType(
    {name: Command(f"questions.{name}") for name in _NAMES.split()}
)
_OTHERS = {
    "demo": "questions.demo",
    "train": "training.train",
    "plot": "training.plot",
    "report": "report.report",
}
COMMANDS: Final = MappingProxyType(
    {**QUESTIONS, **{name: Command(module) for name, module in _OTHERS.items()}}
)
