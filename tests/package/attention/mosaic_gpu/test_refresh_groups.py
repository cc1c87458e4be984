"""Which iterations share a kernel matrix, and that float32 loses nothing by it."""

import jax.numpy as jnp
import numpy as np
import pytest
from support import reference
from support.hostile import hostile_logits
from support.kernel_steps import problem

from sinkhorn_jax._core.options import Options
from sinkhorn_jax.attention._mosaic_gpu.blocks import MAX_ITERS
from sinkhorn_jax.attention._mosaic_gpu.refresh_groups import (
    max_refresh_interval,
    refresh_groups,
    terms_per_matrix,
)


@pytest.mark.parametrize(("t", "s"), [(18, 18), (18, 6), (6, 18)])
def test_a_kernel_matrix_is_refreshed_in_time(t, s):
    """What potentials move until then keeps what float32 loses below 1e-8 of a sum."""
    interval = max_refresh_interval(problem(t=t, s=s))
    lost = float(jnp.finfo("float32").tiny)
    assert lost * float(t * s) ** (interval + 1) <= 1e-8
    assert lost * float(t * s) ** (interval + 2) > 1e-8
    for name, z in hostile_logits(18).items():
        z = z[:t, :s].astype("float64")
        f = -reference.logsumexp(z, 1)
        g = np.log(t / s) - reference.logsumexp(z + f[:, None], 0)
        first = f, g
        for k in range(1, 2 * interval + 1):
            f = -reference.logsumexp(z + g, 1)
            g = np.log(t / s) - reference.logsumexp(z + f[:, None], 0)
            assert (f - first[0]).max() <= k * np.log(s) + 1e-9, name
            assert (f - first[0]).min() >= -k * np.log(t) - 1e-9, name
            assert (g - first[1]).max() <= k * np.log(t) + 1e-9, name
            assert (g - first[1]).min() >= -k * np.log(s) - 1e-9, name


@pytest.mark.parametrize("num_iters", [0, 1, 2, 10, 24, MAX_ITERS])
@pytest.mark.parametrize("n", [18, 256, 4096])
def test_every_step_is_near_the_kernel_matrix_it_shares(n, num_iters):
    of_head = problem(t=n, s=n, options=Options(num_iters))
    groups, interval = refresh_groups(of_head), max_refresh_interval(of_head)
    covered = [k for _, first, last in groups for k in range(first, last + 1)]
    assert sorted(covered) == list(range(num_iters + 1) if num_iters else [])
    for base, first, last in groups:
        assert base - interval <= first <= base <= last <= base + interval
    # The plan of the result comes first, and fewer groups would not reach all steps.
    assert not num_iters or groups[0].base == num_iters
    others = max(0, num_iters - interval)
    assert len(groups) == (num_iters > 0) + -(-others // (2 * interval + 1))
    # Row steps 0 to L and column steps 1 to L.
    assert sum(terms_per_matrix(of_head)) == 2 * num_iters + 1
    assert len(terms_per_matrix(of_head)) == len(groups) + 1
