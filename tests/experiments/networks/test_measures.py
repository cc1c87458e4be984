"""Measures of rank and entropy, layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
from support.encoders import ATOL, text_encoder, text_params, texts

from experiments.networks import measures
from sinkhorn_jax import collapse


def test_measures_leave_padding_out():
    model = text_encoder(num_iters=0, layer_norm="none", has_mlp=False)
    params = jax.tree.map(lambda x: x[None], text_params(model))
    lengths = [4, 4]
    words = np.array([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 0, 0]])
    measured = [
        measures.measure(
            model,
            params,
            texts(t, lengths),
            has_skip=True,
        )
        for t in (words, words[::-1], np.stack([words[1]] * 2))
    ]
    for other in measured[1:]:
        for name, values in measured[0].items():
            np.testing.assert_allclose(values, other[name], atol=ATOL)
    x = jnp.asarray(params["Embed_0"]["embedding"][0])[words[0, :4]]
    x = x + params["position"][0, :4]
    residual = measured[0]["relative_residual"][0][0]
    np.testing.assert_allclose(residual, collapse.relative_residual(x), rtol=1e-4)


def test_the_column_defect_is_the_one_by_hand():
    plan = np.random.default_rng(0).dirichlet(np.ones(6), (2, 2, 6)).astype(np.float32)
    plan[1, :, 3:] = plan[1, :, :, 3:] = 0.0  # Padding.
    where = np.arange(6) < np.array([6, 3])[:, None, None]  # [B, 1, T]
    defect = jax.jit(measures.column_defect)(plan, where)
    by_hand = [
        [np.abs(p[:n, :n].sum(axis=0) - 1).sum() / n for p in heads]
        for heads, n in zip(plan, (6, 3), strict=True)
    ]
    np.testing.assert_allclose(defect, by_hand, atol=ATOL)
