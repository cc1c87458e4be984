"""The style of all pictures: white, with labels where things are and no legends."""

import pathlib
from collections.abc import Callable
from typing import Final

import matplotlib.pyplot as plt

from experiments.figures.style import COLORS, GREY, NORMALISERS

FOLDER: Final = pathlib.Path(__file__).parents[1] / "pictures"
WIDTH: Final = 6.2  # Inches. A page of a phone shows them at 60 % of this.
SOFTMAX: Final = NORMALISERS["softmax"]["color"]
SINKHORN: Final = NORMALISERS["Sinkhorn"]["color"]
BLUE, ORANGE, GREEN, PINK = COLORS[:4]
EXCLUDED: Final = "#DDDDDD"
SOFT: Final = GREY

SETTINGS: Final = {
    "axes.labelsize": 12,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 12,
    "figure.constrained_layout.use": True,
    "font.size": 12,
    # The names inside a file are the same in every run.
    "svg.hashsalt": "sinkhorn_jax",
}


def save(draw: Callable[[], plt.Figure], name: str) -> None:
    """Draws a picture and writes it."""
    FOLDER.mkdir(exist_ok=True)
    with plt.rc_context(SETTINGS):
        figure = draw()
        figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)
