"""Doubly stochastic attention and a differentiable Sinkhorn in JAX."""

__version__ = "0.1.0"

from . import collapse as collapse
from ._core.gradient import Exact as Exact
from ._core.gradient import Implicit as Implicit
from ._core.gradient import Truncated as Truncated
from ._runtime.arguments import traced_checks as traced_checks
from .attention import sinkhorn_attention as sinkhorn_attention
from .matrix import Potentials as Potentials
from .matrix import sinkhorn as sinkhorn
from .matrix import sinkhorn_potentials as sinkhorn_potentials
