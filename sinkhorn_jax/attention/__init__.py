"""Attention whose weights are doubly stochastic."""

from ._api import IMPLEMENTATIONS as IMPLEMENTATIONS
from ._api import sinkhorn_attention as sinkhorn_attention
