"""Gumbel-Sinkhorn sorting of images of digits, learned from sorted examples.

You learn how a network is trained through a permutation: noisy logits become a plan,
which sorts softly; in the test the best permutation is taken (Mena et al. 2018,
https://arxiv.org/abs/1802.08665). The network sees each image by itself; only the
columns of the plan let images compete for a position. A row softmax, which has none, is
trained alike. The data are scikit-learn's digits, 6 different ones in a set.

    $ python -m examples.sorting
    softmax: 0.617 of images, 0.374 of sets
    Sinkhorn: 0.836 of images, 0.696 of sets
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from sinkhorn_jax import sinkhorn

from . import data, shared

SIZE, TEMPERATURE = 6, 0.5
SIZES = {"up": (64, 64), "down": (64, SIZE)}


def logits(params, images):
    """Logits (B, images, positions) of images (B, images, 64)."""
    return jax.nn.gelu(images @ params["up"]) @ params["down"]


def loss(num_iters, images, order, params, key):
    """The squared error of softly sorted images, in 64 random sets."""
    chosen, noise = jax.random.split(key)
    chosen = jax.random.randint(chosen, (64,), 0, len(images))
    images, order = images[chosen], order[chosen]
    noisy = logits(params, images) + jax.random.gumbel(noise, (64, SIZE, SIZE))
    plan = sinkhorn(noisy / TEMPERATURE, num_iters)
    target = jnp.take_along_axis(images, order[..., None], 1)
    return ((plan.mT @ images - target) ** 2).sum(-1).mean()


def main(argv=None):
    """Trains with and without column steps; returns shares of right positions."""
    args = shared.options("sorting", argv)
    num_steps = 100 if args.quick else 2000
    train, test = data.digits()
    train = data.sets_to_sort(*train, 5000, SIZE)
    images, order = data.sets_to_sort(*test, 500, SIZE)
    results, keys = {}, jax.random.split(jax.random.key(0))
    for name, num_iters in {"softmax": 0, "Sinkhorn": 20}.items():
        each = functools.partial(loss, num_iters, *train)
        params, _ = shared.fit(each, shared.init(keys[0], SIZES), keys[1], num_steps)
        scores = np.asarray(logits(params, images))
        found = np.array([linear_sum_assignment(-each.T)[1] for each in scores])
        right = found == np.asarray(order)
        results[name] = right.mean(), right.all(1).mean()
        print("{}: {:.3f} of images, {:.3f} of sets".format(name, *results[name]))
    ordered = np.take_along_axis(np.asarray(images), found[..., None], 1)
    with shared.figure(args.output, 2, (6, 1.9)) as axes:
        for axis, shown in zip(axes, (images, ordered), strict=True):
            grid = np.pad(shown[:3].reshape(3, SIZE, 8, 8), [(0, 0)] * 2 + [(1, 1)] * 2)
            axis.imshow(grid.swapaxes(1, 2).reshape(30, -1), cmap="Greys")
            axis.axis("off")
        axes[0].set_title("given")
        axes[1].set_title("sorted with Sinkhorn")
    return results


if __name__ == "__main__":
    main()
