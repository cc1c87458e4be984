"""Texts as identifiers, over a vocabulary of the training split."""

import re
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import tokenizers
from jaxtyping import Int

from .examples import Data, Examples

PAD, UNKNOWN = "[PAD]", "[UNK]"  # Identifiers 0 and 1.

Tokenizer = Literal["word", "bpe"]


def clean(text: str) -> str:
    """The text without line-break tags, its words one space apart."""
    return " ".join(re.sub(r"<br\s*/?>", " ", text).split())


def encode_splits(
    name: str,
    splits: Sequence[tuple[Sequence[str], Int[np.ndarray, " N"]]],
    *,
    num_classes: int,
    seq_len: int,
    vocab_size: int,
    tokenizer: Tokenizer = "word",
) -> Data:
    """Labelled texts as identifiers; what only later splits hold is unknown.

    Args:
        name: Of the data.
        splits: Texts and labels for training, validation and test. Only the first
            decides the vocabulary.
        num_classes: Of the labels.
        seq_len: Tokens kept of each text, from its start.
        vocab_size: At most this many identifiers, with those for padding and unknown.
        tokenizer: As in `train_vocabulary`.

    Raises:
        ValueError: An option is too small or unknown.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1, got {seq_len}.")
    vocabulary = train_vocabulary(splits[0][0], vocab_size, tokenizer)

    def encoded(texts, labels):
        tokens, lengths = encode(vocabulary, texts, seq_len)
        return Examples(inputs=tokens, lengths=lengths, labels=labels)

    train, validation, test = (encoded(*split) for split in splits)
    return Data(
        name=name,
        train=train,
        validation=validation,
        test=test,
        num_classes=num_classes,
        vocab_size=vocabulary.get_vocab_size(),
    )


def train_vocabulary(
    texts: Iterable[str], size: int, tokenizer: Tokenizer = "word"
) -> tokenizers.Tokenizer:
    """A tokenizer of lowercase text, learnt from `texts`.

    Args:
        texts: Of the training split alone, so that nothing leaks.
        size: At most this many identifiers, with those for padding and unknown.
        tokenizer: "word" takes the most frequent words and punctuation marks, "bpe"
            merges frequent pairs of neighbours within them, from single characters.

    Raises:
        ValueError: `size` is too small, or there is no such tokenizer.
    """
    if size < 3:
        raise ValueError(
            f"vocab_size must be at least 3, got {size}: two are for padding and "
            "unknown words."
        )
    options = {
        "vocab_size": size,
        "special_tokens": [PAD, UNKNOWN],
        "show_progress": False,
    }
    if tokenizer == "word":
        model = tokenizers.models.WordLevel(unk_token=UNKNOWN)
        trainer = tokenizers.trainers.WordLevelTrainer(**options)
    elif tokenizer == "bpe":
        model = tokenizers.models.BPE(unk_token=UNKNOWN)
        trainer = tokenizers.trainers.BpeTrainer(**options)
    else:
        raise ValueError(f"tokenizer must be 'word' or 'bpe', got {tokenizer!r}.")
    result = tokenizers.Tokenizer(model)
    result.normalizer = tokenizers.normalizers.Lowercase()
    result.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    result.train_from_iterator(texts, trainer)
    # Pairs begin with single characters, of which none is left out: with a limit on
    # them `tokenizers` chooses among equally frequent ones at random.
    if result.get_vocab_size() > size:
        raise ValueError(
            "vocab_size must hold padding, unknown and every character of the texts, "
            f"{result.get_vocab_size()} in all, got {size}. Take 'word' or more."
        )
    return result


def encode(
    tokenizer: tokenizers.Tokenizer, texts: Sequence[str], seq_len: int
) -> tuple[Int[np.ndarray, "N T"], Int[np.ndarray, " N"]]:
    """Texts as identifiers, cut or padded to `seq_len`, and their lengths."""
    tokens = np.zeros((len(texts), seq_len), np.int32)  # 0 is PAD.
    lengths = np.zeros(len(texts), np.int32)
    for i, encoding in enumerate(tokenizer.encode_batch_fast(texts)):
        ids = encoding.ids[:seq_len] or [tokenizer.token_to_id(UNKNOWN)]
        tokens[i, : len(ids)] = ids
        lengths[i] = len(ids)
    return tokens, lengths
