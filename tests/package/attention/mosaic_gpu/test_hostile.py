"""Logits that break careless Sinkhorn code, in float32, through one-hot queries.

The interpreter does not round float32, as tensor cores would.
"""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import reference
from support.gpu_attention import use_blocks
from support.hostile import hostile_logits
from support.kernel_steps import exact, problem, step

from sinkhorn_jax._core.options import Options
from sinkhorn_jax.attention._mosaic_gpu.heuristics import default_blocks
from sinkhorn_jax.attention._mosaic_gpu.refresh_groups import (
    max_refresh_interval,
    refresh_groups,
)
from sinkhorn_jax.attention._mosaic_gpu.resident.forward import forward
from sinkhorn_jax.attention._mosaic_gpu.resident.reverse import reverse_sweep
from sinkhorn_jax.attention._mosaic_gpu.types import PaddedOperands, PotentialHistory

# The hostile matrices that have broken most code.
HARDEST = (
    "standard deviation 100",
    "a column at +300",
    "column offsets of 400",
    "0 on a cross, -120 elsewhere",
    "one entry at +300",
)


def hostile(n, names=HARDEST):
    cases = hostile_logits(n)
    return {name: cases[name] for name in names}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "num_iters"),
    [
        (HARDEST, 14),
        pytest.param(tuple(hostile_logits(18)), 24, marks=pytest.mark.slow),
    ],
    ids=["hardest", "all"],
)
def test_streamed_heads(in_float32, monkeypatch, names, num_iters):
    use_blocks(monkeypatch, regime="streamed")
    n, named = 18, hostile(18, names)
    logits = jnp.stack([jnp.asarray(x) for x in named.values()])
    query = jnp.broadcast_to(jnp.eye(n, dtype="float32"), logits.shape)[:, :, None]
    key = jnp.swapaxes(logits, 1, 2)[:, :, None]
    value = jax.random.normal(jax.random.key(3), (*logits.shape[:2], 1, 4), "float32")
    arrays = query, key, value, jnp.sin(9 * value)
    groups = refresh_groups(problem(t=n, s=n, options=Options(num_iters)))
    assert len(groups) == 2
    got = in_float32(step("mosaic_gpu", num_iters=num_iters, scale=1.0), *arrays)
    expected = step("reference", num_iters=num_iters, scale=1.0)(*exact(arrays))
    chex.assert_tree_all_finite(got)
    errors = {}
    for x, y in ((got[0], expected[0]), *zip(got[2][1:], expected[2][1:], strict=True)):
        # Where the plan is a permutation the gradient is 0, but for the rounding of
        # terms of order 1.
        size = np.maximum(abs(np.asarray(y)).max(axis=(1, 2, 3)), 1e-2)
        error = abs(np.asarray(x) - np.asarray(y)).max(axis=(1, 2, 3)) / size
        for name, e in zip(named, error.tolist(), strict=True):
            errors[name] = max(e, errors.get(name, 0))
    # Potentials of 400 are rounded to 3e-5, and so is what the logarithm of a plan is.
    assert max(errors.values()) < 5e-4, errors


def pad(x, n, axes):
    """Each head of `x`, with `axes` axes of size n, padded to whole tiles."""
    more = -(-n // 64) * 64 - n
    return np.pad(x, ((0, 0), *[(0, more)] * axes)).astype("float32")


@pytest.mark.parametrize(
    ("n", "num_iters", "cluster"),
    [(18, 21, 1), pytest.param(70, 15, 2, marks=pytest.mark.slow)],
)
def test_a_resident_head(in_float32, n, num_iters, cluster):
    """A kernel matrix that was computed only once would lose the cross."""
    named, length = hostile(n), -(-n // 64) * 64
    of_heads = problem(
        t=n,
        s=n,
        head_dim=length,
        value_dim=length,
        num_heads=len(named),
        num_key_heads=len(named),
        dtype=jnp.dtype("float32"),
        options=Options(num_iters),
        return_marginal_error=True,
    )
    interval = max_refresh_interval(of_heads)
    assert num_iters // interval == 2
    blocks = dataclasses.replace(
        default_blocks(of_heads), refresh_every=interval, cluster=cluster
    )
    logits = np.stack(list(named.values()))
    eye = pad(np.broadcast_to(np.eye(n), logits.shape), n, 2)
    valid = np.broadcast_to(np.arange(length) < n, eye.shape[:2])
    key = pad(np.swapaxes(logits, 1, 2), n, 2)
    plan, (fs, gs), sums = in_float32(
        functools.partial(forward, of_heads, blocks),
        PaddedOperands(eye, key, eye, valid, valid),
        np.ones((len(named), 1), "float32"),
    )
    for i, (name, z) in enumerate(named.items()):
        f, g = reference.potentials(z.astype("float64"), num_iters)[:2]
        expected = np.exp(z + f[:, None] + g)
        # Potentials of 400 are rounded to 3e-5, and the logits themselves less.
        got = plan[i, :n, :n]
        np.testing.assert_allclose(got, expected, atol=3e-5, err_msg=name)
        np.testing.assert_allclose(got.sum(axis=1), 1, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(
            sums[i, :n], expected.sum(axis=0), atol=3e-5, err_msg=name
        )
        again = np.exp(z.astype("float64") + fs[-1, i, :n, None] + gs[-1, i, :n])
        np.testing.assert_allclose(again, expected, atol=1e-4, err_msg=name)
    assert (fs[:, :, n:] == -np.inf).all()
    assert (gs[:, :, n:] == -np.inf).all()


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("n", "num_iters", "cluster"),
    [(18, 40, 1), pytest.param(70, 26, 2, marks=pytest.mark.slow)],
)
def test_a_resident_reverse_sweep(in_float32, n, num_iters, cluster):
    """Cotangents of three groups of iterations, against a plan for every half step."""
    named, length = hostile(n), -(-n // 64) * 64
    heads = len(named)
    of_heads = problem(
        t=n,
        s=n,
        head_dim=length,
        num_heads=heads,
        num_key_heads=heads,
        dtype=jnp.dtype("float32"),
        options=Options(num_iters),
    )
    assert len(refresh_groups(of_heads)) == 3
    blocks = dataclasses.replace(default_blocks(of_heads), cluster=cluster)
    logits = np.stack(list(named.values()))
    fs, gs = np.full((2, num_iters + 1, heads, length), -np.inf, "float32")
    for k, i in itertools.product(range(num_iters + 1), range(heads)):
        z = logits[i].astype("float64")
        fs[k, i, :n], gs[k, i, :n] = reference.potentials(z, k)[:2]
    rng = np.random.default_rng(0)
    value, dout = np.zeros((2, heads, length, 64), "float32")
    value[:, :n], dout[:, :n] = rng.normal(size=(2, heads, n, 64))
    expected_f, expected_g = _cotangents(
        logits, fs[:, :, :n], gs[:, :, :n], dout, value
    )

    eye = pad(np.broadcast_to(np.eye(n), logits.shape), n, 2)
    valid = np.broadcast_to(np.arange(length) < n, eye.shape[:2])
    key = pad(np.swapaxes(logits, 1, 2), n, 2)
    # The seed of a plan that was rounded: the sweep adds the rest itself.
    df = pad(expected_f[-1] + rng.normal(size=expected_f[-1].shape) / 64, n, 1)
    got = in_float32(
        functools.partial(reverse_sweep, of_heads, blocks),
        PaddedOperands(eye, key, value, valid, valid),
        PotentialHistory(fs, gs),
        dout,
        df,
    )
    for name, x, expected in (("f", got.f, expected_f), ("g", got.g, expected_g)):
        assert (x[:, :, n:] == 0).all()
        # Where the plan is a permutation g has no cotangent, but for the rounding of
        # terms of order 1.
        size = np.maximum(abs(expected).max(axis=(0, 2)), 1)
        error = abs(x[:, :, :n] - expected).max(axis=(0, 2)) / size
        errors = dict(zip(named, error.tolist(), strict=True))
        # Logits and potentials of 400 are rounded to 3e-5 when they are added.
        assert max(errors.values()) < 5e-5, (name, errors)


def _cotangents(logits, fs, gs, dout, value):
    """Cotangents of f_0 to f_L and g_1 to g_L in float64, for marginals of 1."""
    n = logits.shape[1]

    def plan(k_f, k_g):
        f, g = fs[k_f].astype("float64"), gs[k_g].astype("float64")
        return np.exp(logits + f[:, :, None] + g[:, None, :])

    dplan = np.einsum("nid,njd->nij", dout, value)[:, :n, :n].astype("float64")
    df = (plan(-1, -1) * dplan).sum(axis=2)
    dg = (plan(-1, -1) * (dplan - df[:, :, None])).sum(axis=1)
    dfs, dgs = [df], []
    for k in reversed(range(len(fs) - 1)):
        df = -np.einsum("nij,nj->ni", plan(k, k + 1), dg)
        dfs, dgs = [df, *dfs], [dg, *dgs]
        dg = -np.einsum("nij,ni->nj", plan(k, k), df)
    return np.stack(dfs), np.stack(dgs)
