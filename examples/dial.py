"""A dial from softmax to doubly stochastic attention, learned by each head.

You learn to let a network choose: with `column_tau="learned"` each head has a parameter
between 0, which is softmax, and 1, which is doubly stochastic. Between them the column
sums are held to 1 by a penalty, as in unbalanced transport (Chizat et al. 2018,
https://arxiv.org/abs/1607.05816). A vision transformer is trained on scikit-learn's
digits with the dial fixed at 0 and at 1, and learned from 0.5.

    $ python -m examples.dial
    column_tau 0.0: accuracy 0.114 before, 0.922 after (0.912 to 0.932)
    column_tau 1.0: accuracy 0.094 before, 0.877 after (0.852 to 0.902)
    column_tau learned: accuracy 0.100 before, 0.918 after (0.912 to 0.924)
    learned in layer 0: 0.44 to 0.48, mean 0.46
    learned in layer 1: 0.46 to 0.53, mean 0.49
"""

import functools

import jax
import numpy as np

from sinkhorn_jax.linen import MultiHeadSinkhornAttention

from . import data, shared
from .vit_linen import ViT


def main(argv=None):
    """Trains with each dial; returns test accuracies, and the learned dials by seed."""
    args = shared.options("dial", argv)
    num_seeds, num_steps = (1, 20) if args.quick else (2, 200)
    tuner, keys = (
        shared.Tuner(*data.digits()),
        jax.random.split(jax.random.key(0), num_seeds),
    )
    for tau in 0.0, 1.0, "learned":
        model = ViT(functools.partial(MultiHeadSinkhornAttention, column_tau=tau))
        start = [jax.jit(model.init)(key, tuner.test[0][:1]) for key in keys]
        params = tuner(f"column_tau {tau}", model.apply, start, num_steps, 1e-2)
    layers = [x["params"][f"attention_{i}"] for i in range(2) for x in params]
    logits = np.array([layer["column_tau_logit"] for layer in layers])
    taus = 1 / (1 + np.exp(-logits.reshape(2, num_seeds, 4)))
    for layer, each in enumerate(taus):
        low, mean, high = each.min(), each.mean(), each.max()
        print(f"learned in layer {layer}: {low:.2f} to {high:.2f}, mean {mean:.2f}")

    with shared.figure(args.output, 2) as (left, right):
        for name, (_, after) in tuner.accuracies.items():
            left.plot(
                [name.removeprefix("column_tau ")] * num_seeds, after, "o", color="0.4"
            )
        left.set(xlabel="column_tau", ylabel="test accuracy")
        for layer, each in enumerate(taus):
            right.plot(np.sort(each.ravel()), "o", label=f"layer {layer}")
        right.axhline(0.5, color="0.7", zorder=0)
        right.set(ylabel="learned column_tau", ylim=(0, 1), xlabel="heads, sorted")
        right.legend()
    return tuner.accuracies, taus


if __name__ == "__main__":
    main()
