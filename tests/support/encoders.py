"""Small encoders of texts and images, for the tests of networks."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import Examples
from experiments.networks import ensemble
from experiments.networks.encoder import Encoder

# Some hundred float32 roundings through a few layers.
ATOL = 2e-5

_TEXTS = dict(vocab_size=11, seq_len=6, depth=2, width=8, num_heads=2, num_iters=3)
_IMAGES = dict(patch_size=2, depth=2, width=8, num_heads=2, num_iters=2, num_classes=3)


def text_encoder(**options):
    return Encoder(**_TEXTS | options)


def image_encoder(**options):
    return Encoder(**_IMAGES | options)


def texts(tokens, lengths=None):
    tokens = np.asarray(tokens, np.int32)
    if lengths is None:
        lengths = np.full(len(tokens), tokens.shape[1])
    lengths = np.asarray(lengths, np.int32)
    return Examples(inputs=tokens, lengths=lengths, labels=lengths)


def text_params(model):
    """Parameters whose embeddings are so large that attention is far from uniform."""
    params = ensemble.init(model, (0,), texts(np.ones((1, model.seq_len))))
    params = jax.tree.map(lambda x: x[0], params)
    scale = lambda x: x * jnp.asarray(50, x.dtype)
    embedding = {"embedding": scale(params["Embed_0"]["embedding"])}
    return params | {"Embed_0": embedding, "position": scale(params["position"])}


def images(num=2, height=4, width=6, channels=1):
    shape = (num, height, width, channels)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)
