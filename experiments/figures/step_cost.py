"""The figure of step_cost: time of an update over softmax's, every round."""

from typing import Any

import matplotlib.pyplot as plt

from . import style


@style.styled
def draw(result: dict[str, Any]) -> plt.Figure:
    """Returns the figure of the result."""
    cells = result["cells"]
    size = (0.6 + 3.4 * len(cells), 3.2)
    figure, axes = plt.subplots(1, len(cells), figsize=size, sharey=True, squeeze=False)
    for axis, cell in zip(axes[0], cells, strict=True):
        names = list(cell["ratio"])
        style.seeds_and_interval(
            axis,
            range(len(names)),
            [cell["ratio"][name] for name in names],
            shift=0.15,
            linestyle="",
            **style.series(1),
        )
        axis.axhline(1.0, **style.GUIDE)
        axis.set_xticks(range(len(names)), ["softmax", *names[1:]])
        axis.set(xlabel="Sinkhorn iterations", title=cell["task"])
    axes[0, 0].set_ylabel("time of an update,\nsoftmax's is 1")
    return figure
