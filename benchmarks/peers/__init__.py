"""Other libraries' attention, timed next to ours on the same tensors.

A peer is a line of `PEERS` and a function in the module of its library, which is
imported when it is needed: every library is optional. The modules have the same parts:
the functions that compute, `why_not` and `build`.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import Final, NamedTuple

from ..harness.cases import Case
from ..harness.program import Mode, Program
from .context import lenient


class Peer(NamedTuple):
    """One line of the table."""

    package: str  # As pip knows it.
    imported: str  # As Python does.
    module: str  # Of ours.
    function: str  # In that.
    is_sinkhorn: bool = True

    def why_not(self, case: Case, mode: Mode) -> str | None:
        """A reason, or None if it can run here. Memory is looked at in `build`."""
        # Looked up, not imported and caught: a library that is there and broken raises.
        if importlib.util.find_spec(self.imported) is None:
            return f"{self.package} is not installed, pip install '.[peers]' does that"
        return self._load().why_not(self.function, case, mode)

    def build(self, case: Case, mode: Mode) -> Program:
        """The program.

        Raises:
            NotImplementedError: It needs more memory than it may have.
        """
        return self._load().build(self.function, case, mode)

    def _load(self) -> ModuleType:
        with lenient():
            return importlib.import_module(f".{self.module}", __name__)


PEERS: Final[Mapping[str, Peer]] = MappingProxyType(
    {
        "cudnn_softmax": Peer("jax", "jax", "_cudnn", "softmax", is_sinkhorn=False),
        "torch_softmax": Peer("torch", "torch", "_torch", "softmax", is_sinkhorn=False),
        "torch_sinkhorn": Peer("torch", "torch", "_torch", "sinkhorn"),
        "ott_unrolled": Peer("ott-jax", "ott", "_ott", "unrolled"),
        "ott_implicit": Peer("ott-jax", "ott", "_ott", "implicit"),
        "pot": Peer("POT", "ot", "_pot", "sinkhorn_log"),
    }
)
