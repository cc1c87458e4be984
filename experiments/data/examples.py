"""The examples of a task as arrays, in splits."""

import dataclasses
import hashlib

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

    def digest(self) -> str:
        """A short text that is another for other examples, or another order of them."""
        found = hashlib.blake2b(digest_size=16)
        for array in (self.inputs, self.lengths, self.labels):
            if array is not None:
                found.update(f"{array.dtype} {array.shape}".encode())
                found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Disjoint splits of one data set; texts over one vocabulary."""

    name: str
    train: Examples
    validation: Examples
    test: Examples
    num_classes: int
    vocab_size: int | None  # With padding and unknown. None for images.
