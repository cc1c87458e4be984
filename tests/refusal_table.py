"""Writes the tables of docs/limits.md: what each implementation refuses.

    python tests/refusal_table.py

Each entry is what the implementation's `why_not` says about a call with one argument
more than the plain one.
"""

import dataclasses
import pathlib
import re
from typing import Final

import jax.numpy as jnp

from sinkhorn_jax import Exact, Implicit, Truncated, attention, matrix
from sinkhorn_jax._core.options import Options
from sinkhorn_jax.attention._pattern import Window
from sinkhorn_jax.attention._problem import Problem as AttentionProblem
from sinkhorn_jax.matrix._problem import Problem as MatrixProblem

PAGE: Final = pathlib.Path(__file__).parents[1] / "docs" / "limits.md"
BLOCK: Final = re.compile(
    r"(<!-- refusals of (\w+):begin -->\n)(.*?)(<!-- refusals of \2:end -->)", re.DOTALL
)


def options(**changes):
    """The options of a plain call, changed."""
    return {"options": Options(**{"num_iters": 10, "gradient": Exact()} | changes)}


ATTENTION: Final = AttentionProblem(
    batch=1,
    t=256,
    s=256,
    num_heads=4,
    num_key_heads=4,
    head_dim=64,
    value_dim=64,
    dtype=jnp.dtype("bfloat16"),
    scale=0.125,
    **options(),
)
MATRICES: Final = MatrixProblem(
    batch=(64,), t=16, s=16, dtype=jnp.dtype("float32"), **options()
)
DTYPES: Final = {
    name: {"dtype": jnp.dtype(name)}
    for name in ("float32", "bfloat16", "float16", "float64")
}
OF_OPTIONS: Final = {
    "`column_tau` below 1": {"has_tau": True},
    "`tolerance`": options(tolerance=1e-3),
    '`finish="columns"`': options(finish="columns"),
    "`Truncated`": options(gradient=Truncated(3)),
    "`Implicit`": options(gradient=Implicit()),
}
OF_ATTENTION: Final = {
    "lengths, grouped heads": {"num_key_heads": 1},
    **DTYPES,
    "H or D above 128": {"head_dim": 256},
    "more than 64 iterations": options(num_iters=65),
    "`bias`": {"has_bias": True},
    "`mask`": {"has_mask": True},
    "segment ids": {"has_segments": True},
    "`local_window_size`": {"window": Window(16, 16)},
    "dropout": {"dropout_rate": 0.1},
    "marginals": {"has_marginals": True},
    **OF_OPTIONS,
}
OF_MATRICES: Final = {
    "marginals, `where`": {},
    **DTYPES,
    "more than 16 rows or columns": {"t": 64},
    "more than 64 iterations": options(num_iters=65),
    **OF_OPTIONS,
}
TABLES: Final = {
    "attention": (attention.IMPLEMENTATIONS, ATTENTION, OF_ATTENTION),
    "matrices": (matrix.IMPLEMENTATIONS, MATRICES, OF_MATRICES),
}


def table(name):
    """The lines of a table, and of the list of reasons below it."""
    implementations, plain, changes = TABLES[name]
    # The implementation that takes everything first.
    names = list(implementations)[::-1]
    head = " | ".join(f"`{each}`" for each in names)
    lines = [f"| | {head} |", "|---" * (len(names) + 1) + "|"]
    reasons = {}
    for label, change in changes.items():
        problem = dataclasses.replace(plain, **change)
        said = {each: implementations[each].load().why_not(problem) for each in names}
        cells = ("yes" if reason is None else "**no**" for reason in said.values())
        lines.append(f"| {label} | {' | '.join(cells)} |")
        for each, reason in said.items():
            if reason is not None:
                reasons.setdefault((label, reason), []).append(f"`{each}`")
    lines += [
        "",
        "What the errors say:",
        "",
        "| call | implementations | reason |",
        "|---|---|---|",
    ]
    for (label, reason), refusing in reasons.items():
        lines.append(f"| {label} | {', '.join(refusing)} | {reason} |")
    return "\n".join(lines) + "\n"


def page():
    """The page with fresh tables."""
    text = PAGE.read_text(encoding="utf-8")
    return BLOCK.sub(lambda found: found[1] + table(found[2]) + found[4], text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
