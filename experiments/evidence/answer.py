"""What an experiment concludes: intervals, findings with a verdict, and its files."""

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from . import claims as findings
from . import files as record

RESULTS = pathlib.Path("experiments") / "results"

# Okabe and Ito's palette, told apart in all forms of colour blindness.
COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)


def interval(values) -> tuple[float, float | None]:
    """The mean and the half-width of its 95 % interval by Student's t.

    The width is None for a single value, which has no spread.
    """
    mean, width = findings.interval(values)
    return mean, None if math.isinf(width) else width


def finding(
    claim: str,
    quantity: str,
    values,
    *,
    low: float = -math.inf,
    high: float = math.inf,
) -> dict[str, Any]:
    """Whether a claim holds: that the mean of a quantity lies from `low` to `high`.

    Args:
        claim: What is claimed, in a sentence.
        quantity: What was measured.
        values: One a seed.
        low: The least that agrees with the claim.
        high: The greatest.

    Returns:
        claim; verdict, "supported" if the whole 95 % interval agrees, "not supported"
        if none of it does, else "undecided"; text with the interval; and its numbers.
    """
    mean, width = interval(values)
    half = math.inf if width is None else width
    is_in = low <= mean - half and mean + half <= high
    is_out = mean + half < low or mean - half > high
    verdict = "supported" if is_in else "not supported" if is_out else "undecided"
    spread = "one seed" if width is None else f"95 % over {len(values)} seeds"
    number = f"{mean:.4g}" if width is None else f"{mean:.4g} ± {width:.2g}"
    return {
        "claim": claim,
        "verdict": verdict,
        "text": f"{quantity}: {number} ({spread}).",
        "mean": mean,
        "half_width": width,
    }


def name_of(num_iters: int) -> str:
    """Name of a normaliser."""
    return f"Sinkhorn, {num_iters}" if num_iters else "softmax"


def require_at_least(config: Any, least: dict[str, int]) -> None:
    """Refuses options, or entries of tuples of options, that are too small.

    Raises:
        ValueError: One is, or a tuple is empty or repeats an entry.
    """
    for name, bound in least.items():
        value = getattr(config, name)
        values = value if isinstance(value, tuple) else (value,)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} must be distinct, at least one, got {value}.")
        if min(values) < bound:
            raise ValueError(f"{name} must be at least {bound}, got {value}.")


def require_even_heads(config: Any) -> None:
    """Refuses a width that heads cannot share evenly.

    Raises:
        ValueError: It is no multiple of their number.
    """
    if config.width % config.num_heads:
        raise ValueError(
            f"width must be a multiple of num_heads, got {config.width} and "
            f"{config.num_heads}: heads share it evenly."
        )


def require_learning_rate(config: Any) -> None:
    """Refuses a learning rate with which nothing can be learnt.

    Raises:
        ValueError: It is not positive and finite.
    """
    if not 0 < config.learning_rate < math.inf:
        raise ValueError(
            f"learning_rate must be positive and finite, got {config.learning_rate}."
        )


def write(
    question: str,
    config: Any,
    result: dict[str, Any],
    draw: Callable[[dict[str, Any]], plt.Figure],
    start: float,
) -> dict[str, Any]:
    """Writes the JSON and the figure of a result, and prints what was found.

    Args:
        question: Names the files, inside `config.output`.
        config: The experiment's configuration.
        result: What was measured; with a list of `findings`.
        draw: Makes the figure of what the JSON holds.
        start: `time.monotonic()` at the start.

    Returns:
        What the JSON holds.
    """
    result = {
        "question": question,
        "config": {**dataclasses.asdict(config), "output": str(config.output)},
        "environment": record.environment(),
        **result,
        "wall_time_s": round(time.monotonic() - start, 1),
    }
    config.output.mkdir(parents=True, exist_ok=True)
    json_path = config.output / f"{question}.json"
    record.write_json(json_path, result)
    figure_path = config.output / f"{question}.png"
    style = {"font.size": 10, "axes.titlesize": 11, "savefig.dpi": 150}
    with plt.rc_context(style):
        figure = draw(result)
        for axis in figure.axes:
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25, linewidth=0.6)
        figure.savefig(figure_path)
        plt.close(figure)
    for found in result["findings"]:
        print(f"{found['verdict']}: {found['claim']}\n    {found['text']}")
    print(f"\nTook {result['wall_time_s']:.0f} s. Wrote {json_path} and {figure_path}.")
    return result


def band(axis, x, values, **style) -> None:
    """A line through the mean over seeds, [S, X], and a band of its 95 % interval."""
    mean, width = np.array(
        [[m, w or 0.0] for m, w in map(interval, np.asarray(values).T)]
    ).T
    axis.plot(x, mean, linewidth=1.4, markersize=4, **style)
    color = style.get("color")
    axis.fill_between(x, mean - width, mean + width, color=color, alpha=0.2, lw=0)
