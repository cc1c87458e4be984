"""Attention logits of encoders, before and after their training on IMDb reviews."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ..data import imdb
from . import ensemble
from .encoder import Encoder


class Logits(NamedTuple):
    """Of M attention matrices of each of S seeds: layers, measured reviews, heads."""

    source: str  # What networks these are.
    learning_rate: float | None  # None before training.
    train_loss: list[float] | None  # Of each seed, mean of the last tenth of updates.
    logits: Float[np.ndarray, "S M T T"]


def networks(config: Any, on_step: Callable[[], object]) -> Iterator[Logits]:
    """The logits at each of `config.trained_tokens`, of networks before and after.

    Encoders with skip connections, MLPs and LayerNorm before both, under Sinkhorn
    attention. They are trained on reviews of the largest number of tokens, and measured
    on the first tokens of validation reviews that are at least as long, so that there
    is no padding.

    Args:
        config: As `convergence.Config`.
        on_step: Called after each update.

    Raises:
        ValueError: Too few reviews are as long.
    """
    longest = max(config.trained_tokens)
    dataset = imdb(
        seq_len=longest,
        vocab_size=config.vocab_size,
        num_train=config.num_train,
        num_validation=256,
        seed=config.data_seed,
    )
    is_full = np.flatnonzero(dataset.validation.lengths == longest)
    if len(is_full) < config.num_measured:
        raise ValueError(
            f"num_measured must be at most {len(is_full)}, the validation reviews of "
            f"{longest} tokens and more, got {config.num_measured}."
        )
    words = dataset.validation.take(is_full[: config.num_measured]).inputs
    model = Encoder(
        vocab_size=dataset.vocab_size,
        seq_len=longest,
        depth=config.depth,
        width=config.width,
        num_heads=config.num_heads,
        num_iters=config.trained_iters,
        layer_norm="pre",
    )
    initial = ensemble.init(model, config.seeds, longest)
    for rate in (None, *config.learning_rates):
        params, source, train_loss = initial, "before training", None
        if rate is not None:
            source = f"trained at rate {rate:g}"
            params, losses = ensemble.train(
                model,
                initial,
                dataset.train,
                has_skip=True,
                seeds=config.seeds,
                num_steps=config.num_steps,
                batch_size=config.batch_size,
                learning_rate=rate,
                on_step=on_step,
            )
            last = losses[:, -max(1, config.num_steps // 10) :]
            train_loss = last.mean(axis=1).tolist()
        for num_tokens in config.trained_tokens:
            logits = attention_logits(model, params, words, num_tokens)
            yield Logits(source, rate, train_loss, logits)


def attention_logits(
    model: Encoder, params: ensemble.Params, words: Any, num_tokens: int
) -> Float[np.ndarray, "S M T T"]:
    """What the attention of every layer, review and head gets, in float64.

    The hidden states are the network's own, in float32.
    """
    words = words[:, :num_tokens]
    lengths = jnp.full(len(words), num_tokens, jnp.int32)
    hidden_states = jax.device_get(
        jax.jit(
            jax.vmap(
                lambda p: model.apply({"params": p}, words, lengths)[1].hidden_states
            )
        )(params)
    )  # [S, L + 1, B, T, D]
    layers = jax.device_get(params["layers"])
    x = np.float64(hidden_states[:, :-1])
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6)  # As in Flax.
    norm = {k: np.float64(v) for k, v in layers["LayerNorm_0"].items()}  # [S, L, D]
    x = x * norm["scale"][:, :, None, None] + norm["bias"][:, :, None, None]
    query, key = (
        np.einsum(
            "slbtd,sldnh->slbnth", x, np.float64(layers["attention"][name]["kernel"])
        )
        for name in ("query", "key")
    )
    logits = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
    return logits.reshape(len(logits), -1, num_tokens, num_tokens)
