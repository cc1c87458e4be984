"""scikit-learn's digits, in the forms that the recipes learn from."""

import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits


def digits(num_test=500):
    """Images (N, 8, 8) between 0 and 1 and labels (N,), for training and for test."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = jnp.asarray(data.images[order] / 16, jnp.float32)
    labels = jnp.asarray(data.target[order], jnp.int32)
    parts = slice(num_test, None), slice(num_test)
    return tuple((images[part], labels[part]) for part in parts)


def patches(images):
    """The 16 patches (B, 16, 4) of images (B, 8, 8)."""
    return images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)


def points(images, labels, digit):
    """The first image of the digit, as points (N, 2) and their mass (N,), of sum 1."""
    image = images[np.argmax(labels == digit)]
    rows, cols = np.nonzero(image)
    place = jnp.asarray(np.stack([cols, 7 - rows], 1) / 7, jnp.float32)
    return place, image[rows, cols] / image.sum()


def padded_sets(images, labels, number):
    """Random sets of 3 to 6 images with lengths, and the largest digit of each."""
    rng = np.random.default_rng(0)
    chosen = rng.integers(len(labels), size=(number, 6))
    lengths = rng.integers(3, 7, number)[:, None]
    largest = np.where(np.arange(6) < lengths, np.asarray(labels)[chosen], -1).max(1)
    inputs = images.reshape(-1, 64)[chosen], jnp.asarray(lengths[:, 0], jnp.int32)
    return inputs, jnp.asarray(largest, jnp.int32)


def sets_to_sort(images, labels, number, size):
    """Random sets (number, size, 64) of different digits, and the order of each."""
    rng, labels = np.random.default_rng(0), np.asarray(labels)
    of_digit = [np.flatnonzero(labels == digit) for digit in range(10)]
    digits = rng.permuted(np.tile(np.arange(10), (number, 1)), axis=1)[:, :size]
    chosen = np.array([[rng.choice(of_digit[d]) for d in row] for row in digits])
    return images.reshape(-1, 64)[chosen], jnp.asarray(digits.argsort(1))


def noisy_pairs(images, number):
    """Squared distances (number, 30, 30) in random pairs of sets, and true matches."""
    rng = np.random.default_rng(0)
    chosen = rng.permuted(np.tile(np.arange(len(images)), (number, 1)), axis=1)
    first, second = chosen[:, :30], rng.permuted(chosen[:, 10:40], axis=1)
    noise = 0.3 * rng.normal(size=(2, number, 30, 64))  # Pixels are between 0 and 1.
    x, y = np.asarray(images).reshape(-1, 64)[np.stack([first, second])] + noise
    distance = ((x[:, :, None] - y[:, None]) ** 2).sum(-1)
    truth = first[:, :, None] == second[:, None]
    return jnp.asarray(distance, jnp.float32), truth
