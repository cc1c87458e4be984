"""Functions of one tile."""

import jax.numpy as jnp
import numpy as np
import pytest
from support import reference

from sinkhorn_jax.attention._mosaic_gpu import tiles


@pytest.fixture
def tile():
    """Products of a tile's queries and keys, and potentials with padding."""
    rng = np.random.default_rng(0)
    f = np.append(rng.normal(size=5), -np.inf)
    g = np.append(rng.normal(size=7), [-np.inf, -np.inf])
    products = rng.normal(size=(6, 9)) * 30
    return tuple(jnp.asarray(x.astype("float32")) for x in (products, f, g))


def test_kernel_of_a_tile(tile):
    products, f, g = tile
    kernel = tiles.kernel_of(products, f, g, 0.5)
    products, f, g = (np.asarray(x, "float64") for x in tile)
    expected = np.exp(0.5 * products + f[:, None] + g)
    np.testing.assert_allclose(kernel, expected, rtol=1e-5)
    assert (kernel[5] == 0).all()
    assert (kernel[:, 7:] == 0).all()


def test_log_sum_does_not_depend_on_where_tiles_end(tile):
    products, _, g = tile
    least = jnp.full(6, jnp.finfo("float32").min), jnp.zeros(6, "float32")

    def log_sum(*cuts):
        carry = least
        for cols in np.split(np.arange(9), cuts):
            carry = tiles.log_sum(carry, products[:, cols], g[cols], 2.0)
        return tiles.total_log(*carry)

    x = 2.0 * np.asarray(products, "float64") + np.asarray(g, "float64")
    expected = reference.logsumexp(x, 1)
    for cuts in ((3,), (7,)):
        np.testing.assert_allclose(log_sum(*cuts), expected, rtol=1e-6)
    nothing = tiles.log_sum(least, products, jnp.full(9, -jnp.inf, "float32"), 2.0)
    assert (tiles.total_log(*nothing) == -np.inf).all()


def test_sums_of_a_tile_and_an_outer_product(tile):
    kernel = jnp.exp(tile[0] / 30)
    left, right = jnp.arange(6, dtype="float32"), jnp.arange(9, dtype="float32")
    np.testing.assert_allclose(tiles.row_sums(kernel, right), kernel @ right, 1e-6)
    np.testing.assert_allclose(tiles.col_sums(kernel, left), left @ kernel, 1e-6)
    expected = np.asarray(kernel, "float64") - np.outer(left, right)
    np.testing.assert_allclose(tiles.less_outer(kernel, left, right), expected, 1e-6)
