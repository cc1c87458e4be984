"""Texts as identifiers of words, with the vocabulary of the training split."""

import re
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import tokenizers
from jaxtyping import Int

from .examples import Data, Examples

PAD, UNKNOWN = "[PAD]", "[UNK]"  # They get the identifiers 0 and 1.

Tokenizer = Literal["word", "bpe"]
_MODELS = {
    "word": (tokenizers.models.WordLevel, tokenizers.trainers.WordLevelTrainer),
    "bpe": (tokenizers.models.BPE, tokenizers.trainers.BpeTrainer),
}


def clean(text: str) -> str:
    """The text without line-break tags, with one space between words."""
    return " ".join(re.sub(r"<br\s*/?>", " ", text).split())


def encode_splits(
    splits: Sequence[tuple[Sequence[str], Int[np.ndarray, " N"]]],
    *,
    name: str,
    num_classes: int,
    seq_len: int,
    vocab_size: int,
    tokenizer: Tokenizer = "word",
) -> Data:
    """Labelled texts as identifiers. Words that only later splits hold are unknown.

    Args:
        splits: Texts and labels for training, validation and test.
        name: The name of the data.
        num_classes: The number of classes.
        seq_len: Tokens kept of each text, from its start.
        vocab_size: As `size` in `train_vocabulary`, for the training texts.
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
    """A tokenizer of lowercase text, trained on `texts`.

    Args:
        texts: The texts of the training split alone, so that nothing leaks.
        size: The largest number of identifiers, with padding and unknown.
        tokenizer: "word" takes the most frequent words and punctuation marks. "bpe"
            starts from single characters and merges frequent neighbours within words.

    Raises:
        ValueError: `size` is too small, or there is no such tokenizer.
    """
    if size < 3:
        raise ValueError(
            f"vocab_size must be at least 3, got {size}: two are for padding and "
            "unknown words."
        )
    if tokenizer not in _MODELS:
        raise ValueError(f"tokenizer must be 'word' or 'bpe', got {tokenizer!r}.")
    model, trainer = _MODELS[tokenizer]
    result = tokenizers.Tokenizer(model(unk_token=UNKNOWN))
    result.normalizer = tokenizers.normalizers.Lowercase()
    result.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = [PAD, UNKNOWN]
    trainer = trainer(vocab_size=size, special_tokens=special, show_progress=False)
    result.train_from_iterator(texts, trainer)
    # Byte pairs keep every single character: with a limit on their number `tokenizers`
    # chooses at random among equally frequent ones.
    if result.get_vocab_size() > size:
        raise ValueError(
            "vocab_size must hold padding, unknown and every character of the texts, "
            f"{result.get_vocab_size()} in all, got {size}. Take 'word' or more."
        )
    return result


def encode(
    tokenizer: tokenizers.Tokenizer, texts: Sequence[str], seq_len: int
) -> tuple[Int[np.ndarray, "N T"], Int[np.ndarray, " N"]]:
    """Identifiers of the texts, cut or padded to `seq_len`, and the lengths."""
    tokens = np.zeros((len(texts), seq_len), np.int32)  # 0 is PAD.
    lengths = np.zeros(len(texts), np.int32)
    for i, encoding in enumerate(tokenizer.encode_batch_fast(texts)):
        ids = encoding.ids[:seq_len] or [tokenizer.token_to_id(UNKNOWN)]
        tokens[i, : len(ids)] = ids
        lengths[i] = len(ids)
    return tokens, lengths
