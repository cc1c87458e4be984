"""The figure of length: each measure against the number of tokens."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from ..networks.digits import ACCURACY, ENTROPY, RESIDUAL
from . import style


@style.styled
def draw(result: dict[str, Any]) -> plt.Figure:
    """Returns the figure of the result."""
    figure, (residual, entropy, accuracy) = plt.subplots(1, 3, figsize=(10.5, 4.3))
    tokens = list(dict.fromkeys(c["num_tokens"] for c in result["cells"]))
    _curves(residual, result, tokens, RESIDUAL)
    _curves(entropy, result, tokens, ENTROPY)
    entropy.plot(tokens, np.log(tokens), label="greatest, log tokens", **style.GUIDE)
    _curves(accuracy, result, tokens, ACCURACY, phases=("trained",))
    style.legend(figure, "digits; mean of seeds and 95 % interval")
    return figure


def _curves(axis, result, tokens, quantity, phases=("init", "trained")):
    axis.set_ylabel(quantity.label)
    style.number_ticks(axis, tokens, "tokens")
    for phase in phases:
        for is_sinkhorn in (True, False):
            cells = [c for c in result["cells"] if (c["num_iters"] > 0) == is_sinkhorn]
            name = "Sinkhorn" if is_sinkhorn else "softmax"
            look = style.NORMALISERS[name]
            look = look | {"linestyle": "-" if phase == "trained" else "--"}
            if is_sinkhorn:
                name += f", {result['config']['num_iters']} iterations"
            when = "after training" if phase == "trained" else "before"
            values = np.stack([quantity.of(c[phase]) for c in cells], axis=1)
            label = f"{name}, {when}"
            style.mean_and_interval(axis, tokens, values, label=label, **look)
