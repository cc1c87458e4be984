"""The rank of a product of attention matrices."""

import math

import numpy as np
from jaxtyping import Float


def log10_residual(plans: Float[np.ndarray, "K T T"]) -> float:
    """Decimal logarithm of |C P| / |P| of K plans, the first applied first.

    Rows sum to 1, so C P_2 P_1 = (C P_2) (C P_1): nothing cancels at any length.
    """
    n = plans.shape[-1]
    mean = np.full(n, 1 / n)
    for plan in plans[::-1]:
        mean = mean @ plan
    residual, log_scale = np.eye(n), 0.0
    for plan in plans:
        residual = (plan - plan.mean(axis=0)) @ residual
        norm = np.linalg.norm(residual)
        if norm == 0:  # One of the matrices is exactly uniform.
            return -math.inf
        residual, log_scale = residual / norm, log_scale + math.log(norm)
    whole = np.logaddexp(2 * log_scale, math.log(n * float(mean @ mean))) / 2
    return float((log_scale - whole) / math.log(10))
