"""Mixture-of-experts routing with a capacity, by marginals or by an auxiliary loss.

You learn to route with `sinkhorn`: in a plan of tokens by experts each column has the
sum of the capacity, so experts get nearly equal loads (S-BASE, Clark et al. 2022,
https://arxiv.org/abs/2202.01169). Top-1 routing has none or the auxiliary loss of Fedus
et al. 2021, https://arxiv.org/abs/2101.03961. Tokens are scikit-learn's digits. "Load"
is the fullest expert's over the mean, in batches of 125 test digits; "dropped" tokens
are above 1.25 times the mean. "Top-1 later" trains with the plan and tests without.

    $ python -m examples.routing
    top-1          accuracy 0.956, load 8.00, dropped 0.844
    Sinkhorn       accuracy 0.962, load 1.30, dropped 0.012
    auxiliary 0.01 accuracy 0.958, load 8.00, dropped 0.844
    auxiliary 0.1  accuracy 0.968, load 3.15, dropped 0.451
    auxiliary 1.0  accuracy 0.956, load 1.47, dropped 0.031
    top-1 later    accuracy 0.958, load 1.50, dropped 0.055
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sinkhorn_jax import sinkhorn

from . import data, shared

EXPERTS, BATCH = 8, 125
SIZES = {"route": (64, EXPERTS), "up": (EXPERTS, 64, 16), "down": (EXPERTS, 16, 10)}


def apply(balanced, params, tokens):
    """Logits (B, 10), the choice (B, experts) and its probabilities, of tokens."""
    scores = tokens @ params["route"]
    capacity = jnp.full(EXPERTS, len(tokens) / EXPERTS)
    plan = sinkhorn(scores, 20, col_marginal=capacity) if balanced else scores
    choice = jax.nn.one_hot(plan.argmax(1), EXPERTS)
    probs = jax.nn.softmax(scores)
    hidden = jax.nn.gelu(jnp.einsum("bi,eih->beh", tokens, params["up"]))
    gated = hidden * (choice * probs)[..., None]
    return jnp.einsum("beh,eho->bo", gated, params["down"]), choice, probs


def loss(balanced, weight, tokens, labels, params, key):
    """The cross-entropy of a random batch, and the auxiliary loss times `weight`."""
    chosen = jax.random.randint(key, (BATCH,), 0, len(labels))
    logits, choice, probs = apply(balanced, params, tokens[chosen])
    auxiliary = EXPERTS * choice.mean(0) @ probs.mean(0)
    return shared.cross_entropy(logits, labels[chosen]) + weight * auxiliary


def main(argv=None):
    """Trains each router; returns accuracy, load and dropped tokens."""
    args = shared.options("routing", argv)
    num_steps = 50 if args.quick else 1000
    (train, labels), (test, answers) = data.digits()
    train, test = train.reshape(-1, 64), test.reshape(-1, BATCH, 64)
    # The plan in training, the weight of the auxiliary loss, the plan in the test.
    kinds = {"top-1": (False, 0.0, False), "Sinkhorn": (True, 0.0, True)}
    kinds |= {f"auxiliary {x}": (False, x, False) for x in (0.01, 0.1, 1.0)}
    kinds["top-1 later"] = True, 0.0, False
    results, loads, keys = {}, {}, jax.random.split(jax.random.key(0))
    for name, (balanced, weight, later) in kinds.items():
        each = functools.partial(loss, balanced, weight, train, labels)
        params, _ = shared.fit(each, shared.init(keys[0], SIZES), keys[1], num_steps)
        found = [apply(later, params, tokens)[:2] for tokens in test]
        logits, choice = map(np.stack, zip(*found, strict=True))
        right = (logits.argmax(-1).ravel() == answers).mean()
        load = choice.mean(1) * EXPERTS  # (batches, experts), 1 where balanced.
        results[name] = right, load.max(1).mean(), np.maximum(load - 1.25, 0).mean()
        loads[name] = np.sort(load, 1).mean(0)[::-1]
        text = "{:14} accuracy {:.3f}, load {:.2f}, dropped {:.3f}"
        print(text.format(name, *results[name]))
    shared.draw_lines(args.output, loads, "expert, by load", "load", marker="o")
    return results


if __name__ == "__main__":
    main()
