"""Doubly stochastic attention and a differentiable Sinkhorn in JAX."""

from . import collapse as collapse
from ._gradient import Exact as Exact
from ._gradient import Implicit as Implicit
from ._gradient import Truncated as Truncated
from ._sinkhorn import Potentials as Potentials
from ._sinkhorn import sinkhorn as sinkhorn
from ._sinkhorn import sinkhorn_potentials as sinkhorn_potentials
from .attention import sinkhorn_attention as sinkhorn_attention
