"""How did training go? Draws the metrics of finished or running runs.

python -m experiments plot runs/train/imdb_iters10_seed0
"""

import dataclasses
import pathlib
from typing import Annotated

import matplotlib.pyplot as plt
import tyro

from ..figures import style
from .metrics import read_metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The runs to draw, and the path of the figure."""

    runs: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional] = ()
    output: pathlib.Path | None = None  # None is training.png in the first run.


QUICK = Config()


@style.styled
def run(config: Config) -> pathlib.Path:
    """Draws loss and validation accuracy by update, and returns the figure's path.

    Raises:
        ValueError: No run is given.
        FileNotFoundError: A folder holds no metrics.
    """
    if not config.runs:
        raise ValueError("Name the folder of at least one run.")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True)
    for number, folder in enumerate(config.runs):
        records = read_metrics(folder / "metrics.jsonl")
        if not records:
            raise FileNotFoundError(
                f"There is no metrics.jsonl with records in {folder}. Give a folder "
                "that `python -m experiments train` has written."
            )
        of_split = lambda name, field, records=records: zip(
            *((r["step"], r[field]) for r in records if r["split"] == name),
            strict=True,
        )
        color = style.series(number)["color"]
        left.plot(*of_split("train", "loss"), color=color, alpha=0.5, linewidth=1)
        look = {"color": color, "marker": "o", "label": folder.name}
        for axis, field in ((left, "loss"), (right, "accuracy")):
            if points := list(of_split("validation", field)):
                axis.plot(*points, **look)
    left.set(ylabel="cross-entropy (line training, points validation)", xlabel="update")
    right.set(ylabel="validation accuracy", xlabel="update")
    if right.get_legend_handles_labels()[0]:
        right.legend()
    path = config.output or config.runs[0] / "training.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    print(f"Wrote {path}.")
    return path
