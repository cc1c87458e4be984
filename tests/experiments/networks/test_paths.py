"""The residual of a product of attention matrices."""

import numpy as np

from experiments.networks.paths import log10_residual


def test_residual_of_products():
    plans = np.random.default_rng(0).dirichlet(np.ones(6), size=(3, 6))
    product = plans[2] @ plans[1] @ plans[0]
    expected = np.linalg.norm(product - product.mean(axis=0)) / np.linalg.norm(product)
    np.testing.assert_allclose(10 ** log10_residual(plans), expected)


def test_residual_of_long_products():
    # |C| / |I| of the identity, however often; and far below float64 otherwise.
    identities = np.broadcast_to(np.eye(4), (7, 4, 4))
    np.testing.assert_allclose(10 ** log10_residual(identities), 0.75**0.5)
    flat = 0.99 / 4 + 0.01 * identities
    many = log10_residual(np.concatenate([flat] * 20))
    np.testing.assert_allclose(many, -280 + np.log10(3**0.5))
