"""The style of all pictures: white, with labels where things are and no legends."""

import pathlib
from typing import Final

import jax
import matplotlib.pyplot as plt

from experiments.figures.style import COLORS, GREY, NORMALISERS

FOLDER: Final = pathlib.Path(__file__).parents[1] / "pictures"
WIDTH: Final = 6.2  # Inches. A page of a phone shows them at 60 % of this.
SOFTMAX: Final = NORMALISERS["softmax"]["color"]
SINKHORN: Final = NORMALISERS["Sinkhorn"]["color"]
BLUE, ORANGE, GREEN, PINK = COLORS[:4]
EXCLUDED: Final = "#DDDDDD"
SOFT: Final = GREY

plt.rcParams.update(
    {
        "axes.labelsize": 12,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 12,
        "figure.constrained_layout.use": True,
        "font.size": 12,
        "hatch.linewidth": 0.6,
        "mathtext.fontset": "dejavusans",
        # Pictures that did not change are the same file.
        "svg.hashsalt": "sinkhorn_jax",
    }
)
jax.config.update("jax_enable_x64", True)


def save(figure: plt.Figure, name: str) -> None:
    """Writes a picture."""
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
