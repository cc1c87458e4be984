"""Sinkhorn on matrices of logits: plans and potentials."""

from ._api import IMPLEMENTATIONS as IMPLEMENTATIONS
from ._api import sinkhorn as sinkhorn
from ._api import sinkhorn_potentials as sinkhorn_potentials
from ._problem import Potentials as Potentials
