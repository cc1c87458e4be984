"""The figure of swap: one group of points a training, one point an evaluation."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from ..evidence.claims import normaliser_name
from ..networks.digits import ACCURACY, ENTROPY, RESIDUAL
from . import style


@style.styled
def draw(result: dict[str, Any]) -> plt.Figure:
    """Returns the figure of the result."""
    num_iters = result["config"]["num_iters"]
    cells = {(c["trained_with"], c["evaluated_with"]): c for c in result["cells"]}
    groups = np.arange(len(num_iters))
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 4.3))
    for axis, quantity in zip(axes, (RESIDUAL, ENTROPY, ACCURACY), strict=True):
        for i, evaluated in enumerate(num_iters):
            x = groups + 0.6 * ((i + 0.5) / len(num_iters) - 0.5)
            values = [quantity.of(cells[trained, evaluated]) for trained in num_iters]
            look = style.series(i) | {"label": normaliser_name(evaluated)}
            look |= {"linestyle": "none"}
            style.seeds_and_interval(axis, x, values, shift=0.06, **look)
        axis.set_xticks(groups, [normaliser_name(n) for n in num_iters])
        axis.set(xlabel="trained with", ylabel=quantity.label)
    title = "evaluated with (dots: seeds; bars: mean and 95 % interval)"
    style.legend(figure, title, ncols=len(num_iters))
    return figure
