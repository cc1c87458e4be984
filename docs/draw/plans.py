"""Plans as pictures: their entries, and the sums of their rows and columns."""

from collections.abc import Callable, Mapping
from typing import Final

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.figure import SubFigure

from sinkhorn_jax import sinkhorn

from . import style

Plan = Float[np.ndarray, "T S"]


def logits(num_tokens: int = 10) -> jax.Array:
    """Logits in which all queries agree on which keys are attractive."""
    key_of_entries, key_of_columns = jax.random.split(jax.random.key(2))
    entries = jax.random.normal(key_of_entries, (num_tokens, num_tokens), "float32")
    columns = jax.random.normal(key_of_columns, (1, num_tokens), "float32")
    return 1.5 * entries + 1.2 * columns


def rounded(plan: jax.Array) -> Plan:
    """The plan without the digits that another run may change."""
    return np.asarray(plan).round(5)


def between(tau: float) -> str:
    """The colour on the way from softmax to Sinkhorn."""
    start, end = (np.array(to_rgb(x)) for x in (style.SOFTMAX, style.SINKHORN))
    return to_hex((1 - tau) * start + tau * end)


def panel(
    cell: SubFigure,
    title: str,
    plan: Plan,
    color: str,
    *,
    allowed: Bool[np.ndarray, "T S"] | None = None,
    highest: float = 2.0,
    widest: float = 2.0,
    top: float = 1.0,
) -> None:
    """Draws a plan with its column sums above and its row sums to the right."""
    t, s = plan.shape
    axes = cell.subplots(
        2, 2, height_ratios=(1, 2.4), width_ratios=(2.4, 1), sharex="col", sharey="row"
    )
    (above, corner), (entries, beside) = axes
    corner.remove()
    shades = LinearSegmentedColormap.from_list(title, ["white", color])
    edges = {"edgecolor": "#EEEEEE", "linewidth": 0.4}
    entries.pcolormesh(plan, cmap=shades, vmin=0, vmax=top, **edges)
    if allowed is not None:
        for i, j in np.argwhere(~allowed):
            entries.add_patch(plt.Rectangle((j, i), 1, 1, color=style.EXCLUDED))
    entries.set(xlim=(0, s), ylim=(t, 0), xticks=[], yticks=[])
    entries.spines[["right", "top"]].set_visible(True)
    above.bar(np.arange(s) + 0.5, plan.sum(axis=0), color=color)
    beside.barh(np.arange(t) + 0.5, plan.sum(axis=1), color=color)
    ticks = [0, 1, 2] if highest < 4 else [0, 2, 4]
    above.set(ylim=(0, highest), yticks=ticks)
    beside.set(xlim=(0, widest), xticks=[0, 1])
    line = {"color": "black", "linewidth": 0.8, "linestyle": (0, (3, 2))}
    above.axhline(1, **line)
    beside.axvline(1, **line)
    for axis in (above, beside):
        axis.tick_params(labelsize=10, length=2)
    above.set_title(title)
    above.set_ylabel("column\nsum", fontsize=10)
    beside.set_xlabel("row sum", fontsize=10)


def panels(
    drawn: Mapping[str, tuple[Plan, str]],
    columns: int,
    height: float,
    allowed: Mapping[str, Bool[np.ndarray, "T S"]] | None = None,
    **options: float,
) -> plt.Figure:
    """A figure of plans, each in its colour."""
    highest = max(float(plan.sum(axis=-2).max()) for plan, _ in drawn.values())
    widest = max(float(plan.sum(axis=-1).max()) for plan, _ in drawn.values())
    options |= {"highest": max(2.2, 1.08 * highest), "widest": max(2.0, 1.05 * widest)}
    rows = -(-len(drawn) // columns)
    figure = plt.figure(figsize=(style.WIDTH, height * rows))
    cells = figure.subfigures(rows, columns, squeeze=False).ravel()
    for cell, (title, (plan, color)) in zip(cells, drawn.items(), strict=False):
        where = (allowed or {}).get(title)
        panel(cell, title, rounded(plan), color, allowed=where, **options)
    return figure


def both() -> plt.Figure:
    """The softmax plan and the Sinkhorn plan of the same logits."""
    z = logits()
    drawn = {
        "softmax": (jax.nn.softmax(z), style.SOFTMAX),
        "Sinkhorn": (sinkhorn(z, 20), style.SINKHORN),
    }
    figure = plt.figure(figsize=(style.WIDTH, 4.4))
    axes = figure.subplots(2, 2, height_ratios=(1, 2), sharex=True, sharey="row")
    top = max(float(plan.max()) for plan, _ in drawn.values())
    for (bars, entries), (title, (plan, color)) in zip(
        axes.T, drawn.items(), strict=True
    ):
        plan = rounded(plan)
        bars.bar(np.arange(len(plan)) + 0.5, plan.sum(axis=0), color=color)
        bars.axhline(1, color="black", linewidth=0.8, linestyle=(0, (3, 2)))
        bars.set_title(title)
        shades = LinearSegmentedColormap.from_list(title, ["white", color])
        entries.pcolormesh(plan, cmap=shades, vmin=0, vmax=top, edgecolor="#EEEEEE")
        entries.set(xlabel="key", xticks=[], yticks=[], ylim=(len(plan), 0))
        entries.spines[["right", "top"]].set_visible(True)
    axes[0, 0].set(ylabel="column sum", yticks=[0, 1, 2, 3, 4])
    axes[1, 0].set_ylabel("query")
    return figure


def dial() -> plt.Figure:
    """Plans between softmax and doubly stochastic."""
    z = logits()
    taus = {"τ = 0": 0.0, "τ = 0.25": 0.25, "τ = 0.5": 0.5, "τ = 1": 1.0}
    drawn = {
        title: (sinkhorn(z, 200, column_tau=tau), between(tau))
        for title, tau in taus.items()
    }
    return panels(drawn, 2, 2.5)


def half_steps() -> plt.Figure:
    """A plan after each of the first half steps."""
    z = logits(6)
    drawn = {
        "row step 0: softmax": (sinkhorn(z, 0), style.SOFTMAX),
        "column step 1": (sinkhorn(z, 1, finish="columns"), style.SINKHORN),
        "row step 1": (sinkhorn(z, 1), style.SINKHORN),
        "row step 10": (sinkhorn(z, 10), style.SINKHORN),
    }
    return panels(drawn, 2, 2.5)


def masks() -> plt.Figure:
    """Plans and their sums for each way to exclude or to weigh tokens."""
    num_tokens = 8
    z = logits(num_tokens)
    order = np.arange(num_tokens)
    valid = order < 6
    segment = np.array([1, 1, 1, 1, 2, 2, 2, 2])
    allowed = {
        "padding": valid[:, None] & valid[None],
        "packed": segment[:, None] == segment[None],
        "window": abs(order[:, None] - order[None]) <= 2,
    }
    marginal = jnp.ones(num_tokens).at[0].set(2.0) * num_tokens / (num_tokens + 1)
    options = {
        "no mask": {},
        "key marginal": {"col_marginal": marginal},
        "column_tau = 0.5": {"column_tau": 0.5},
    }
    drawn = {
        **{title: sinkhorn(z, 400, where=mask) for title, mask in allowed.items()},
        **{title: sinkhorn(z, 400, **given) for title, given in options.items()},
    }
    titles = ["no mask", *allowed, "key marginal", "column_tau = 0.5"]
    colored = {title: (drawn[title], style.SINKHORN) for title in titles}
    return panels(colored, 2, 2.5, allowed, top=0.8)


def causal() -> plt.Figure:
    """Plans of a causal mask after more and more iterations, up to the identity."""
    num_tokens = 8
    z = logits(num_tokens)
    mask = np.tri(num_tokens, dtype=bool)
    drawn, allowed = {}, {}
    for num_iters in (0, 1, 10, 1000):
        title = f"k = {num_iters}"
        color = style.SINKHORN if num_iters else style.SOFTMAX
        drawn[title] = (sinkhorn(z, num_iters, where=mask), color)
        allowed[title] = mask
    return panels(drawn, 2, 2.5, allowed)


PICTURES: Final[Mapping[str, Callable[[], plt.Figure]]] = {
    "plans": both,
    "dial": dial,
    "half_steps": half_steps,
    "masks": masks,
    "causal": causal,
}
