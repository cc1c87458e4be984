"""The examples of a task as arrays, in splits."""

import dataclasses

import numpy as np
from jaxtyping import Int, UInt8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """Examples of one split, texts or images.

    N examples, T tokens, H height, W width, C channels.
    """

    inputs: Int[np.ndarray, "N T"] | UInt8[np.ndarray, "N H W C"]
    lengths: Int[np.ndarray, " N"] | None  # At least 1, then padding. None for images.
    labels: Int[np.ndarray, " N"]  # From 0.

    def __len__(self):
        return len(self.labels)

    def take(self, index) -> "Examples":
        """The examples at `index`, an array of any shape or a slice."""
        return Examples(
            inputs=self.inputs[index],
            lengths=None if self.lengths is None else self.lengths[index],
            labels=self.labels[index],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Disjoint splits of one data set; texts over one vocabulary."""

    name: str
    train: Examples
    validation: Examples
    test: Examples
    num_classes: int
    vocab_size: int | None  # With padding and unknown. None for images.
