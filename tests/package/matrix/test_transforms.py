"""The matrix functions under JAX's transforms."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from support.matrices import S, T, random

from sinkhorn_jax import Exact, Implicit, sinkhorn, sinkhorn_potentials
from sinkhorn_jax.matrix import IMPLEMENTATIONS

implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@pytest.mark.few(2)
@implementations
@pytest.mark.parametrize(
    "tolerance", [0.05, pytest.param(None, marks=pytest.mark.slow)]
)
def test_transforms_agree(implementation, tolerance):
    logits = random(0, (3, T, S))

    def loss(z):
        potentials = sinkhorn_potentials(
            z, 3, tolerance=tolerance, implementation=implementation
        )
        return jnp.sin(potentials.f).sum() + (potentials.g**2).sum()

    gradient = jax.grad(loss)
    expected = jnp.stack([gradient(z) for z in logits])
    for transformed in (
        jax.vmap(gradient),
        jax.jit(jax.vmap(gradient)),
        jax.vmap(jax.grad(jax.checkpoint(loss))),
        gradient,  # The whole batch without vmap.
    ):
        chex.assert_trees_all_close(transformed(logits), expected, atol=1e-12)

    def layers(z):
        return jax.lax.scan(lambda z, _: (z + gradient(z), None), z, None, length=2)[0]

    looped = logits + gradient(logits)
    chex.assert_trees_all_close(layers(logits), looped + gradient(looped), atol=1e-12)


def test_log_space_stays_a_branch_under_vmap():
    logits = random(0, (3, T, S))
    jaxpr = str(jax.make_jaxpr(jax.vmap(sinkhorn))(logits))
    assert "cond[" in jaxpr
    jaxpr = str(jax.make_jaxpr(jax.vmap(jax.grad(lambda z: sinkhorn(z).sum())))(logits))
    assert jaxpr.count("cond[") >= 2


def test_the_reference_has_forward_mode_and_hessians():
    logits = random(0, (3, 4))

    def loss(z, gradient=Exact()):  # noqa: B008
        plan = sinkhorn(z, 2, gradient=gradient, implementation="reference")
        return (plan**3).sum()

    chex.assert_trees_all_close(
        jax.jacfwd(loss)(logits), jax.jacrev(loss)(logits), atol=1e-14
    )
    hessian = jax.hessian(loss)(logits).reshape(12, 12)
    chex.assert_trees_all_close(hessian, hessian.T, atol=1e-14)
    implicit = functools.partial(loss, gradient=Implicit(tolerance=1e-12))
    chex.assert_trees_all_close(
        jax.jacfwd(implicit)(logits), jax.jacrev(implicit)(logits), atol=1e-12
    )
    converged = functools.partial(sinkhorn, num_iters=100, implementation="reference")
    second = [
        jax.hessian(lambda z, m=m: (converged(z, gradient=m) ** 3).sum())(logits)
        for m in (Implicit(tolerance=1e-12), Exact())
    ]
    chex.assert_trees_all_close(*second, atol=1e-10)


def test_scaling_says_that_it_has_no_forward_mode():
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jacfwd(sinkhorn)(random(0, (T, S)))


def test_scaling_differentiates_twice_in_reverse():
    logits = random(0, (3, 4))

    def second(implementation):
        loss = lambda z: (sinkhorn(z, 2, implementation=implementation) ** 3).sum()
        return jax.grad(lambda z: (jax.grad(loss)(z) ** 2).sum())(logits)

    chex.assert_trees_all_close(second("scaling"), second("reference"), atol=1e-12)


@implementations
def test_equal_shapes_do_not_compile_again(implementation):
    table = IMPLEMENTATIONS[implementation].load()
    logits = random(0, (2, 3, 11))  # A shape that no other test uses.
    before = table.plan._cache_size()
    for seed in range(3):
        sinkhorn(random(seed, logits.shape), 3, implementation=implementation)
    assert table.plan._cache_size() == before + 1

    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(1)
    def solve(logits):
        return sinkhorn(logits, 3, implementation=implementation)

    for seed in range(3):
        solve(random(seed, logits.shape))
