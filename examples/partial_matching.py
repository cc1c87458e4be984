"""Partial matching: two sets share some points, and the rest go to a dustbin.

You learn to match with a dustbin row and column, as SuperGlue does (Sarlin et al. 2020,
https://arxiv.org/abs/1911.11763): by their marginals each of 30 points has a match or
none. Points are scikit-learn's digits with noise; 20 are in both sets. Two numbers, the
sharpness and the dustbin's score, are learned from known matches. The baseline is
mutual nearest neighbours. Both methods get the threshold that is best in training.

    $ python -m examples.partial_matching
    dustbins: precision 0.691, recall 0.731, F1 0.710
    nearest: precision 0.741, recall 0.622, F1 0.676
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sinkhorn_jax import sinkhorn_potentials

from . import data, shared


def log_plan(params, distance):
    """The logarithm of the plan (B, 31, 31), with the dustbins last."""
    logits, bins = -jnp.exp(params["sharpness"]) * distance, ((0, 0), (0, 1), (0, 1))
    logits = jnp.pad(logits, bins, constant_values=params["dustbin"])
    mass = jnp.ones(31).at[-1].set(30)
    found = sinkhorn_potentials(logits, 50, row_marginal=mass, col_marginal=mass)
    return logits + found.f[..., None] + found.g[..., None, :]


def loss(distance, truth, params, key):
    """Minus the mean logarithm of the plan at the truth, in 16 pairs of sets."""
    chosen = jax.random.randint(key, (16,), 0, len(distance))
    plan, truth = log_plan(params, distance[chosen]), jnp.asarray(truth)[chosen]
    lone = plan[:, :30, 30].sum(where=~truth.any(2))
    lone += plan[:, 30, :30].sum(where=~truth.any(1))
    return -(plan[:, :30, :30].sum(where=truth) + lone) / (16 * 40)


def quality(scores, least, truth):
    """Precision, recall and F1 of the pairs that choose each other above a score."""
    rows, cols = scores.max(-1, keepdims=True), scores.max(-2, keepdims=True)
    found = (scores == rows) & (scores == cols) & (scores > least)
    right, found, true = (found & truth).sum(), found.sum(), truth.sum()
    return right / found, right / true, 2 * right / (found + true)


def main(argv=None):
    """Learns two parameters; returns precision, recall and F1 of each method."""
    args = shared.options("partial_matching", argv)
    num_steps = 50 if args.quick else 500
    train, test = (data.noisy_pairs(images, 200) for images, _ in data.digits())
    learn, key = functools.partial(loss, *train), jax.random.key(0)
    params = {"sharpness": jnp.float32(-1.0), "dustbin": jnp.float32(-5.0)}
    params, _ = shared.fit(learn, params, key, num_steps, 0.1)
    results, dustbins = {}, lambda x: log_plan(params, x)[:, :30, :30]
    for name, score in ("dustbins", dustbins), ("nearest", jnp.negative):
        known, new = np.asarray(score(train[0])), np.asarray(score(test[0]))
        f1 = lambda least, known=known: quality(known, least, train[1])[2]
        least = max(np.quantile(known, np.linspace(0.9, 0.999, 100)), key=f1)
        results[name] = quality(new, least, test[1])
        text = "{}: precision {:.3f}, recall {:.3f}, F1 {:.3f}"
        print(text.format(name, *results[name]))
    with shared.figure(args.output, size=(3.2, 3)) as axis:
        axis.imshow(jnp.exp(log_plan(params, test[0][:1])[0]), cmap="Greys", vmax=1)
        axis.plot(*np.nonzero(test[1][0].T), "s", fillstyle="none")
        axis.set(xlabel="second set, dustbin last", ylabel="first set, dustbin last")
    return results


if __name__ == "__main__":
    main()
