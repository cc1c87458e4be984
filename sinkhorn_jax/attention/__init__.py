"""Attention whose weights are doubly stochastic."""

from ._api import sinkhorn_attention as sinkhorn_attention
from ._call import IMPLEMENTATIONS as IMPLEMENTATIONS
