"""How did training go? Draws the metrics of finished or running runs.

python -m experiments plot runs/train/imdb_iters10_seed0
"""

import dataclasses
import pathlib
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
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
    """Draws loss, accuracy, rank and entropy by update; returns the figure's path.

    Rank and entropy are those of validation examples, where the runs have them.

    Raises:
        ValueError: No run is given.
        FileNotFoundError: A folder holds no metrics.
    """
    if not config.runs:
        raise ValueError("Name the folder of at least one run.")
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), sharex=True)
    (loss, accuracy), (residual, entropy) = axes
    for number, folder in enumerate(config.runs):
        records = read_metrics(folder / "metrics.jsonl")
        if not records:
            raise FileNotFoundError(
                f"There is no metrics.jsonl with records in {folder}. Give a folder "
                "that `python -m experiments train` has written."
            )
        color = style.series(number)["color"]
        loss.plot(
            *_points(records, "train", "loss"), color=color, alpha=0.5, linewidth=1
        )
        look = {"color": color, "marker": "o", "label": folder.name}
        for axis, field, at in (
            (loss, "loss", np.asarray),
            (accuracy, "accuracy", np.asarray),
            (residual, "relative_residual", lambda x: x[:, -1]),
            (entropy, "attention_entropy", lambda x: x.mean(1)),
        ):
            steps, values = _points(records, "validation", field)
            if len(steps):
                axis.plot(steps, at(values), **look)
    loss.set(ylabel="cross-entropy (line training)")
    accuracy.set(ylabel="validation accuracy")
    residual.set(ylabel="relative residual, last layer", xlabel="update", yscale="log")
    entropy.set(ylabel="attention entropy, nats, mean", xlabel="update")
    if loss.get_legend_handles_labels()[0]:
        loss.legend()
    path = config.output or config.runs[0] / "training.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    print(f"Wrote {path}.")
    return path


def _points(records, split, field):
    """The updates and values of the records of a split that have the field."""
    found = [r for r in records if r["split"] == split and field in r]
    return [r["step"] for r in found], np.array([r[field] for r in found])
