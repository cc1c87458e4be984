"""One call of the installed package, where nothing is installed but what it asks for.

`make test-wheel` runs it outside the repository.
"""

import pathlib
import runpy
import sys

import jax
import jax.numpy as jnp

import sinkhorn_jax

assert pathlib.Path(sinkhorn_jax.__file__).is_relative_to(sys.prefix), "Not the wheel."
own = [name for name in sys.modules if name.startswith("sinkhorn_jax.")]
loaded = [name for name in own if "mosaic" in name or "streaming" in name]
assert not loaded, f"The import loads kernels: {loaded}."
plan = sinkhorn_jax.sinkhorn(jnp.eye(4), 50)
assert jnp.allclose(plan.sum(axis=0), 1.0, atol=1e-5), plan
query = jnp.ones((1, 5, 2, 3))
gradient = jax.grad(lambda x: sinkhorn_jax.sinkhorn_attention(x, x, x).sum())(query)
assert jnp.isfinite(gradient).all(), gradient
runpy.run_module("sinkhorn_jax", run_name="__main__")
