"""The picture of a summary shows the summary's numbers at the layers they are of."""

import jax.numpy as jnp
import numpy as np
import pytest

from sinkhorn_jax import collapse

plt = pytest.importorskip("matplotlib.pyplot")
plot = pytest.importorskip("sinkhorn_jax.collapse.plot").plot

RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.normal(size=(4, 2, 6, 5)))
PLANS = jnp.asarray(RNG.dirichlet(np.ones(6), size=(3, 2, 6)))


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def test_plans_are_drawn_at_the_tokens_they_make(ax):
    summary = collapse.summarize(TOKENS, PLANS)
    assert plot(summary, ax) is ax
    tokens, entropy, path = ax.get_lines()
    np.testing.assert_array_equal(tokens.get_xdata(), range(4))
    np.testing.assert_array_equal(tokens.get_ydata(), summary.relative_residual)
    np.testing.assert_array_equal(entropy.get_xdata(), [1, 2, 3])
    np.testing.assert_array_equal(entropy.get_ydata(), summary.attention_entropy)
    np.testing.assert_array_equal(path.get_ydata(), summary.path_residual)
    assert not ax.patches


def test_as_many_plans_as_tokens_have_the_same_layers(ax):
    plot(collapse.summarize(TOKENS[:3], PLANS), ax)
    for line in ax.get_lines():
        np.testing.assert_array_equal(line.get_xdata(), range(3))


def test_rounding_is_shaded_and_axes_are_made():
    summary = collapse.summarize(TOKENS.at[1:].set(1.0).at[1:, :, 0, 0].add(1e-15))
    ax = plot(summary)
    (shade,) = ax.patches
    assert shade.get_y() + shade.get_height() == pytest.approx(float(summary.floor))
    (line,) = ax.get_lines()
    np.testing.assert_array_equal(line.get_ydata(), summary.relative_residual)
    plt.close(ax.figure)
