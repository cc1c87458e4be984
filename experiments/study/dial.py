"""Between softmax and Sinkhorn: networks whose columns are held less strictly.

docs/protocol.md has the contrasts. The ends are cells of the primary contrasts, at the
rate at which the two normalisers differ most.
"""

import dataclasses
from collections.abc import Iterator
from typing import Final

from .cell import Sizes
from .more import FEW
from .plan import ACCURACY, ENTROPY, NUM_ITERS, RATES, RESIDUAL, Arm, Contrast, cells

TAUS: Final = (0.25, 0.5, 0.75)
RATE: Final = RATES[-1:]


def contrasts(images: Sizes) -> Iterator[Contrast]:
    """Yields the comparisons of each column_tau with both ends."""
    few = dataclasses.replace(images, seeds=FEW)
    softmax, sinkhorn = (cells(num_iters, images, RATE) for num_iters in (0, NUM_ITERS))
    for tau in TAUS:
        between = cells(NUM_ITERS, few, RATE, column_tau=tau)
        networks = f"networks with column_tau {tau:g}"
        for name, does, quantity, margin in (
            ("rank", "keep more rank than", RESIDUAL, 0.1),
            ("entropy", "lose less entropy in training than", ENTROPY, 0.01),
            ("accuracy", "classify better than", ACCURACY, 0.005),
        ):
            arms = (
                Arm(f"column_tau {tau:g}", 1, between, quantity),
                Arm("softmax", -1, softmax, quantity),
            )
            claim = f"{networks} {does} softmax networks (images, largest rate)"
            yield Contrast(f"{name}_{tau:g}", claim, arms, margin=margin)
        yield Contrast(
            f"as_sinkhorn_{tau:g}",
            f"{networks} classify like Sinkhorn networks (images, largest rate)",
            (
                Arm(f"column_tau {tau:g}", 1, between, ACCURACY),
                Arm("Sinkhorn", -1, sinkhorn, ACCURACY),
            ),
            kind="equal",
            margin=0.005,
        )
