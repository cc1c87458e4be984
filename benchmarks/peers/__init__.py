"""Other libraries' attention, timed next to ours on the same arrays.

Every library is optional. A peer is a line of `PEERS` and a function in the module of
its library, which is imported when it is needed; each module has `why_not` and `build`.
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

    package: str  # Name for pip.
    imported: str  # Name for `import`.
    module: str  # The module here, and the function in it.
    function: str
    is_sinkhorn: bool = True

    def why_not(self, case: Case, mode: Mode) -> str | None:
        """The reason why the peer cannot run the case here, or None."""
        # Looking for the package, rather than catching ImportError, lets one raise
        # that is installed and broken.
        if importlib.util.find_spec(self.imported) is None:
            return f"{self.package} is not installed, pip install '.[peers]' does that"
        return self.load().why_not(case)

    def build(self, case: Case, mode: Mode) -> Program:
        """The program; raises NotImplementedError if it needs too much memory."""
        return self.load().build(self.function, case, mode)

    def load(self) -> ModuleType:
        """The module."""
        with lenient():
            return importlib.import_module(f".{self.module}", __name__)


PEERS: Final[Mapping[str, Peer]] = MappingProxyType(
    {
        "cudnn_softmax": Peer("jax", "jax", "cudnn", "softmax", is_sinkhorn=False),
        "torch_softmax": Peer("torch", "torch", "torch", "softmax", is_sinkhorn=False),
        "torch_sinkhorn": Peer("torch", "torch", "torch", "sinkhorn"),
        "ott_unrolled": Peer("ott-jax", "ott", "ott", "unrolled"),
        "ott_implicit": Peer("ott-jax", "ott", "ott", "implicit"),
        "pot": Peer("POT", "ot", "pot", "sinkhorn_log"),
    }
)
