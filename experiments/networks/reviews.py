"""The options of small encoders that are trained on IMDb reviews."""

import dataclasses

import numpy as np
from jaxtyping import Int

from ..data import Data, imdb
from . import options
from .encoder import Encoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup(options.Training):
    """The options of all networks that are trained on reviews."""

    vocab_size: int = 4000  # Words, with padding and unknown.
    num_train: int = 10_000  # Training reviews.

    def reviews(self, seq_len: int, num_validation: int) -> Data:
        """The reviews, split, and of each the first `seq_len` tokens."""
        return imdb(
            seq_len=seq_len,
            vocab_size=self.vocab_size,
            num_train=self.num_train,
            num_validation=num_validation,
            seed=self.data_seed,
        )

    def long_reviews(
        self, seq_len: int, num_measured: int
    ) -> tuple[Data, Int[np.ndarray, "B T"]]:
        """The reviews, and the words of some for validation that need no padding.

        Raises:
            ValueError: Too few reviews are that long.
        """
        data = self.reviews(seq_len, num_validation=256)
        words = data.validation.inputs[data.validation.lengths == seq_len]
        if len(words) < num_measured:
            raise ValueError(
                f"num_measured must be at most {len(words)}, the validation reviews of "
                f"{seq_len} tokens and more, got {num_measured}."
            )
        return data, words[:num_measured]

    def encoder(self, data: Data, num_iters: int, **others) -> Encoder:
        """The encoder of the reviews, with LayerNorm before attention and MLP."""
        sizes = {name: getattr(self, name) for name in ("depth", "width", "num_heads")}
        return Encoder(
            **{"layer_norm": "pre"} | sizes | others,
            num_iters=num_iters,
            vocab_size=data.vocab_size,
            seq_len=data.train.inputs.shape[1],
        )
