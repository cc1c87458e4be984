"""A trained softmax transformer in Flax nnx becomes a Sinkhorn transformer, in place.

You learn two things: in nnx the switch is one call that changes attributes, and sets of
different sizes are padded by their lengths. The network reads 3 to 6 images of digits
and names the largest. The operator is that of Sander et al., Sinkformers, 2022,
https://arxiv.org/abs/2110.11773. The data are scikit-learn's 8 x 8 digits.

    $ python -m examples.transformer_nnx
    softmax: accuracy 0.158 before, 0.918 after
    not switched: accuracy 0.918 before, 0.926 after
    switched: accuracy 0.638 before, 0.904 after
"""

import jax.numpy as jnp
from flax import nnx

from sinkhorn_jax.nnx import MultiHeadSinkhornAttention

from . import data, shared


class Largest(nnx.Module):
    """Logits of the largest digit in a set of images, of one transformer block."""

    def __init__(self, rngs):
        linear = lambda *sizes: nnx.Linear(*sizes, rngs=rngs)
        self.embed = nnx.Sequential(linear(64, 64), nnx.gelu, linear(64, 32))
        # Without iterations this is softmax attention.
        self.attend = MultiHeadSinkhornAttention(4, 32, num_iters=0, rngs=rngs)
        self.mlp = nnx.Sequential(linear(32, 64), nnx.gelu, linear(64, 32))
        self.head = linear(32, 10)

    def __call__(self, inputs):
        """Logits (B, 10) of images (B, 6, 64) and lengths (B,)."""
        x, lengths = self.embed(inputs[0]), inputs[1]
        x = x + self.attend(x, query_seq_lengths=lengths)
        x = x + self.mlp(x)
        valid = jnp.arange(6)[None] < lengths[:, None]
        return self.head(x.max(1, where=valid[..., None], initial=-1e9))


def main(argv=None):
    """Trains with softmax, switches, fine-tunes; returns the test accuracies."""
    args = shared.options("transformer_nnx", argv)
    num_steps = 100 if args.quick else 600
    train, test = (data.padded_sets(*x, 20 * len(x[1])) for x in data.digits())
    model, tuner = Largest(nnx.Rngs(0)), shared.Tuner(train, test)

    def tune(name, num_steps, rate):
        graph, params = nnx.split(model)
        apply = lambda params, inputs: nnx.merge(graph, params)(inputs)
        return tuner(name, apply, [params], num_steps, rate)[0]

    nnx.update(model, tune("softmax", num_steps, 3e-3))
    tune("not switched", num_steps // 5, 1e-3)
    model.set_attributes(num_iters=10)  # The switch, for all layers.
    tune("switched", num_steps // 5, 1e-3)
    shared.draw_losses(args.output, tuner.losses)
    return tuner.accuracies


if __name__ == "__main__":
    main()
