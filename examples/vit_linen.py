"""A trained softmax vision transformer in Flax linen becomes a Sinkhorn transformer.

You learn what the switch costs: the parameters load as they are, but the accuracy falls
until the network is fine-tuned. The operator is that of Sander et al., Sinkformers,
2022, https://arxiv.org/abs/2110.11773. The data are scikit-learn's 8 x 8 digits.

    $ python -m examples.vit_linen
    softmax: accuracy 0.111 before, 0.949 after (0.938 to 0.966)
    not switched: accuracy 0.949 before, 0.945 after (0.930 to 0.958)
    switched: accuracy 0.251 before, 0.893 after (0.872 to 0.934)
"""

import functools

import jax
import numpy as np
from flax import linen as nn

from sinkhorn_jax.linen import attention_fn

from . import data, shared


class ViT(nn.Module):
    """Logits of 10 digits: 16 patches, pre-LayerNorm blocks, a mean over tokens."""

    attention: type[nn.Module] = nn.MultiHeadDotProductAttention
    depth: int = 2

    @nn.compact
    def __call__(self, images, **options):
        """Logits (B, 10) of images (B, 8, 8)."""
        x = nn.Dense(32)(data.patches(images))
        x = x + self.param("place", nn.initializers.normal(0.1), (1, 16, 32))
        for layer in range(self.depth):
            self.sow("intermediates", "tokens", x)
            attend = self.attention(num_heads=4, name=f"attention_{layer}")
            x = x + attend(nn.LayerNorm()(x), **options)
            x = x + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))
        self.sow("intermediates", "tokens", x)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


def main(argv=None):
    """Trains with softmax, switches, fine-tunes; returns test accuracies."""
    args = shared.options("vit_linen", argv)
    num_seeds, num_steps = (1, 40) if args.quick else (3, 400)
    tuner = shared.Tuner(*data.digits())
    images = tuner.test[0]
    softmax = ViT()
    options = {"attention_fn": attention_fn(10)}
    sinkhorn = ViT(functools.partial(nn.MultiHeadDotProductAttention, **options))
    keys = jax.random.split(jax.random.key(0), num_seeds)
    start = [jax.jit(softmax.init)(key, images[:1]) for key in keys]
    params = tuner("softmax", softmax.apply, start, num_steps)
    tuner("not switched", softmax.apply, params, num_steps // 4)
    tuner("switched", sinkhorn.apply, params, num_steps // 4)

    with shared.figure(args.output, 2) as (left, right):
        for name, ends in tuner.accuracies.items():
            left.plot(["before", "after"], np.mean(ends, 1), "o-", label=name)
        for model, name in (softmax, "softmax"), (sinkhorn, "Sinkhorn"):
            plan = shared.observe(model, params[0], images[:1])[1][0]
            right.plot(np.sort(plan.sum(-2).ravel()), label=name)
        left.set(ylabel="test accuracy", xlabel="training or fine-tuning")
        right.set(ylabel="column sum", xlabel="tokens of 4 heads, sorted")
        left.legend()
        right.legend(title="first layer, before tuning")
    return tuner.accuracies


if __name__ == "__main__":
    main()
