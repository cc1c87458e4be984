"""The follow-up: do networks without skip connections that learn keep rank?

The primary cells suggested an answer, which new networks test. docs/protocol.md has the
claim and the test.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import scipy.stats

from ..evidence.claims import Finding, Verdict
from ..evidence.contrasts import ERROR_RATE
from .cell import Sizes
from .plan import NO_SKIP_RATES, Contrast, against_softmax

# Not those of the primary cells.
SEEDS: Final = tuple(range(10, 30))
RATE: Final = NO_SKIP_RATES[-1]
# The least relative residual of tokens that keep rank, where they enter the last layer.
KEPT: Final = 1e-3
# With fewer networks that learn, of either normaliser, nothing can be said.
FEWEST: Final = 3
CLAIM: Final = (
    "of the networks without skip connections that learn at the largest rate, more "
    "keep rank with Sinkhorn than with softmax (text, pre-LayerNorm, new seeds)"
)


def contrast(text: Sizes, rates: tuple[float, ...]) -> Contrast:
    """The cells that are compared."""
    arms = against_softmax(sizes=text, rates=rates, has_skip=False)
    return Contrast("escape", CLAIM, arms)


def finding(curves: Sequence[dict[str, Any]]) -> Finding:
    """The verdict, by Fisher's exact test, of one cell for each normaliser."""
    by_name = {"Sinkhorn" if each["num_iters"] else "softmax": each for each in curves}
    both = {}  # By normaliser: networks that learn and keep rank, by seed.
    kept, learned = {}, {}
    for name in ("Sinkhorn", "softmax"):
        residual = np.array(by_name[name]["residual"]["trained"], np.float64)[:, -2]
        has_learned = np.array(by_name[name]["has_learned"])
        both[name] = has_learned & (residual >= KEPT)
        kept[name], learned[name] = int(both[name].sum()), int(has_learned.sum())
    table = [[kept[name], learned[name] - kept[name]] for name in both]
    p_value = float(scipy.stats.fisher_exact(table).pvalue)
    text = (
        f"Of {len(both['softmax'])} networks each, {learned['Sinkhorn']} learn with "
        f"Sinkhorn and {learned['softmax']} with softmax; of these {kept['Sinkhorn']} "
        f"and {kept['softmax']} keep a relative residual of at least {KEPT:g} where "
        f"the tokens enter the last layer, p = {p_value:.2g} by Fisher's exact test. "
        f"{_in_pairs(both)}"
    )
    verdict = _verdict(kept, learned, p_value)
    return Finding(claim=CLAIM, verdict=verdict, text=text)


def _verdict(kept, learned, p_value) -> Verdict:
    if min(learned.values()) < FEWEST:
        return "untested"
    if p_value >= ERROR_RATE:
        return "undecided"
    sinkhorn, softmax = (kept[name] / learned[name] for name in ("Sinkhorn", "softmax"))
    return "supported" if sinkhorn > softmax else "not supported"


def _in_pairs(both):
    """A comparison that does not select networks by whether they learn."""
    of_sinkhorn, of_softmax = both["Sinkhorn"], both["softmax"]
    first = int((of_sinkhorn & ~of_softmax).sum())
    second = int((of_softmax & ~of_sinkhorn).sum())
    p_value = 1.0
    if first + second:
        p_value = float(scipy.stats.binomtest(first, first + second).pvalue)
    return (
        f"In {first} seeds only the Sinkhorn network learns and keeps rank, in "
        f"{second} only the softmax network, p = {p_value:.2g} by McNemar's exact test."
    )
