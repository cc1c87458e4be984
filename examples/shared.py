"""Options, a training loop and the look of figures, which the recipes share."""

import argparse
import contextlib
import functools
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

matplotlib.use("Agg")

import matplotlib.pyplot as plt

# Okabe and Ito's palette, which can be told apart in all forms of colour blindness.
COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"


def options(name, argv=None):
    """The command line: `quick` for a run of seconds, `output` for the picture."""
    parser = argparse.ArgumentParser(prog=f"python -m examples.{name}")
    parser.add_argument("--quick", action="store_true", help="a run of seconds")
    output = pathlib.Path("runs", "examples", f"{name}.png")
    parser.add_argument("--output", type=pathlib.Path, default=output, help="picture")
    return parser.parse_args(argv)


def init(key, sizes):
    """Normal parameters by name; the variance is 1 over the axis before the last."""
    keys = jax.random.split(key, len(sizes))
    draw = lambda key, size: jax.random.normal(key, size) / np.sqrt(size[-2])
    return {k: draw(key, s) for (k, s), key in zip(sizes.items(), keys, strict=True)}


def fit(loss, params, key, num_steps, learning_rate=3e-3):
    """Parameters after `num_steps` updates of Adam, and the loss before each update.

    `loss(params, key)` draws its own batch. The rate decays to 0 along a cosine.
    """
    moments, losses = optax.scale_by_adam().init(params), []
    keys = jax.random.split(key, num_steps)
    rates = learning_rate * (1 + np.cos(np.linspace(0, np.pi, num_steps))) / 2
    for key, rate in zip(keys, jnp.asarray(rates, jnp.float32), strict=True):
        params, moments, value = _update(loss, params, moments, key, rate)
        losses.append(value)
    return params, np.array(losses)


@functools.partial(jax.jit, static_argnums=0)
def _update(loss, params, moments, key, rate):
    value, grads = jax.value_and_grad(loss)(params, key)
    with jax.numpy_dtype_promotion("standard"):  # Optax needs it.
        step, moments = optax.scale_by_adam().update(grads, moments)
    params = jax.tree.map(lambda x, s: x - rate * s, params, step)
    return params, moments, value


def cross_entropy(logits, labels):
    """The mean cross-entropy of logits (N, classes)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def classify(apply, inputs, labels, batch_size=64):
    """The `loss(params, key)` of a classifier `apply(params, inputs)`, for `fit`."""

    def loss(params, key):
        chosen = jax.random.randint(key, (batch_size,), 0, len(labels))
        batch = jax.tree.map(lambda x: x[chosen], inputs)
        return cross_entropy(apply(params, batch), labels[chosen])

    return loss


@functools.partial(jax.jit, static_argnums=0)
def accuracy(apply, params, inputs, labels):
    """The share of inputs that `apply(params, inputs)` puts into the right class."""
    return (apply(params, inputs).argmax(-1) == labels).mean()


@contextlib.contextmanager
def figure(output, ncols=1, size=(6, 2.6)):
    """Axes to draw on; the picture is written to `output` afterwards."""
    look = {"axes.spines.right": False, "axes.spines.top": False}
    look |= {"figure.constrained_layout.use": True, "legend.frameon": False}
    look |= {"axes.prop_cycle": plt.cycler(color=COLORS)}
    look |= {"font.size": 8, "axes.titlesize": 9, "lines.linewidth": 1.3}
    with plt.rc_context(look):
        drawn, axes = plt.subplots(1, ncols, figsize=size)
        yield axes
        output.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(output, dpi=100)
        plt.close(drawn)
        print(f"Wrote {output}")


def draw_lines(output, lines, xlabel, ylabel, **options):
    """Draws values by name, numbered from 1."""
    with figure(output, size=(4.5, 2.6)) as axis:
        for name, values in lines.items():
            axis.plot(np.arange(1, len(values) + 1), values, label=name, **options)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.legend()


def draw_losses(output, losses):
    """Draws curves of the training loss by name, smoothed over 10 updates."""
    smooth = lambda values: np.convolve(values, np.full(10, 0.1), "valid")
    lines = {name: np.log10(smooth(values)) for name, values in losses.items()}
    draw_lines(output, lines, "updates", "log10 of the training loss")


class Tuner:
    """Trains classifiers, and keeps by name their losses and their test accuracies."""

    def __init__(self, train, test):
        self.train, self.test, self.losses, self.accuracies = train, test, {}, {}

    def __call__(self, name, apply, start, num_steps, learning_rate=3e-3):
        """Trained parameters, a list with one for each of the parameters in `start`.

        Prints the mean test accuracy before and after, and the range after.
        """
        loss = classify(apply, *self.train)
        keys = (jax.random.key(seed) for seed in range(len(start)))
        each = zip(start, keys, strict=True)
        runs = [fit(loss, *x, num_steps, learning_rate) for x in each]
        tuned, losses = zip(*runs, strict=True)
        score = lambda params: np.array(
            [accuracy(apply, p, *self.test) for p in params]
        )
        before, after = self.accuracies[name] = score(start), score(tuned)
        self.losses[name] = np.mean(losses, axis=0)
        text = f"{name}: accuracy {before.mean():.3f} before, {after.mean():.3f} after"
        spread = f" ({after.min():.3f} to {after.max():.3f})" if len(start) > 1 else ""
        print(text + spread)
        return list(tuned)


@functools.partial(jax.jit, static_argnums=0)
def observe(model, params, images):
    """Tokens of the linen model `ViT` (B, T, C) and plans (B, heads, T, S) by layer."""
    _, found = model.apply(params, images, sow_weights=True, mutable="intermediates")
    found = found["intermediates"]
    layers = range(len(found["tokens"]) - 1)
    plans = [found[f"attention_{i}"]["attention_weights"][0] for i in layers]
    return list(found["tokens"]), plans
