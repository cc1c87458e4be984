"""Prints docs/transforms.md: which transforms of JAX work on which implementation.

    python tests/transform_table.py > docs/transforms.md

Each entry is tried: the result agrees with that of the plain call, or is an error.
"""

import functools
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.sharding import AxisType, PartitionSpec

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from support.attention_cases import inputs

from sinkhorn_jax import sinkhorn, sinkhorn_attention

ABOUT = (
    "# Transforms\n",
    "Whether a transform of JAX works on an implementation that runs on every "
    'platform. Each entry was tried, and is tried again by `make test-all`: "yes" '
    "means that the result is that of the plain call to 1e-10 in float64; else the "
    "sentence is the error's. `python tests/transform_table.py` prints this page.\n",
    "The kernels `mosaic_tpu` and `mosaic_gpu` are left out: on a CPU they run in the "
    "interpreter of the tests alone. They have reverse mode once, and take `jit`, "
    "`vmap`, `scan`, `remat` and `shard_map`.\n",
)


def matrices(name):
    """Four matrices, and the loss of a batch of them."""
    logits = jax.random.normal(jax.random.key(0), (4, 5, 7), "float64")
    return logits, lambda z: jnp.sin(sinkhorn(z, 3, implementation=name)).sum()


def attention(name):
    """Four queries, and the loss of a batch of them."""
    query, key, value = inputs(b=4, t=3, s=4, n=2, k=2)

    def loss(x):
        size = x.shape[0]
        options = {"num_iters": 2, "implementation": name}
        out = sinkhorn_attention(
            x,
            jnp.broadcast_to(key[:1], (size, *key.shape[1:])),
            jnp.broadcast_to(value[:1], (size, *value.shape[1:])),
            **options,
        )
        return jnp.sin(out).sum()

    return query, loss


COLUMNS = {
    "`sinkhorn`, scaling": functools.partial(matrices, "scaling"),
    "`sinkhorn`, reference": functools.partial(matrices, "reference"),
    "attention, scaling": functools.partial(attention, "scaling"),
    "attention, streaming": functools.partial(attention, "streaming"),
    "attention, reference": functools.partial(attention, "reference"),
}


def close(found, expected):
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-10)


def by_jit(x, loss):
    close(jax.jit(loss)(x), loss(x))


def by_grad(x, loss):
    """Along a random direction, against a difference."""
    direction = jax.random.normal(jax.random.key(9), x.shape, x.dtype)
    step = 1e-5
    slope = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    np.testing.assert_allclose(jnp.vdot(jax.grad(loss)(x), direction), slope, atol=1e-7)


def by_jvp(x, loss):
    _, slope = jax.jvp(loss, (x,), (jnp.ones_like(x),))
    close(slope, jax.grad(loss)(x).sum())


def by_hessian(x, loss, hessian=jax.hessian):
    """Times a direction, against a difference of gradients."""
    x = x[:1]
    direction = jax.random.normal(jax.random.key(9), x.shape, x.dtype)
    step = 1e-5
    gradient = jax.grad(loss)
    change = gradient(x + step * direction) - gradient(x - step * direction)
    found = hessian(loss)(x)
    product = jnp.tensordot(found, direction, axes=x.ndim)
    np.testing.assert_allclose(product, change / (2 * step), atol=1e-7)


def by_vmap(x, loss):
    one = lambda z: jax.value_and_grad(loss)(z[None])
    values, gradients = jax.vmap(one)(x)
    close((values.sum(), gradients[:, 0]), jax.value_and_grad(loss)(x))


def by_shard_map(x, loss):
    mesh = jax.make_mesh((1,), ("b",), axis_types=(AxisType.Auto,))
    parts = PartitionSpec("b")
    sharded = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=parts, out_specs=parts)
    close(jax.jit(sharded)(x), jax.grad(loss)(x))


def by_scan(x, loss):
    gradient = jax.grad(loss)
    step = lambda x, _: (x + gradient(x), None)
    once = x + gradient(x)
    close(jax.lax.scan(step, x, None, length=2)[0], once + gradient(once))


def by_remat(x, loss):
    close(jax.grad(jax.checkpoint(loss))(x), jax.grad(loss)(x))


def by_cond(x, loss):
    either = lambda z: jax.lax.cond(z[0].sum() > -1e9, loss, lambda z: z.sum(), z)
    close(jax.jit(jax.grad(either))(x), jax.grad(loss)(x))


def by_export(x, loss):
    gradient = jax.jit(jax.grad(loss))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    close(export.export(gradient)(shape).call(x), gradient(x))


def by_symbolic_export(x, loss):
    (size,) = export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)
    close(export.export(jax.jit(jax.grad(loss)))(shape).call(x), jax.grad(loss)(x))


def by_compilation(x, loss):
    gradient = jax.jit(jax.grad(loss))
    close(gradient.lower(x).compile()(x), jax.grad(loss)(x))


def by_donation(x, loss):
    expected = jax.grad(loss)(x)
    close(jax.jit(jax.grad(loss), donate_argnums=0)(x + 0.0), expected)


def by_strict_promotion(x, loss):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        close(jax.jit(jax.grad(loss))(x), jax.grad(loss)(x))


def by_debug_nans(x, loss):
    with jax.debug_nans(True):
        close(jax.jit(jax.grad(loss))(x), jax.grad(loss)(x))


def by_leak_checking(x, loss):
    with jax.checking_leaks():
        close(jax.jit(jax.grad(loss))(x), jax.grad(loss)(x))


ROWS = {
    "`jit`": by_jit,
    "`grad`": by_grad,
    "`jvp`, `jacfwd`, `linearize`": by_jvp,
    "`hessian`, forward over reverse": by_hessian,
    "`jacrev(grad(f))`": functools.partial(
        by_hessian, hessian=lambda f: jax.jacrev(jax.grad(f))
    ),
    "`vmap` of value and gradient": by_vmap,
    "`shard_map` over the batch": by_shard_map,
    "`lax.scan`": by_scan,
    "`checkpoint` (`remat`)": by_remat,
    "`lax.cond`": by_cond,
    "`export`": by_export,
    "`export` with a symbolic batch": by_symbolic_export,
    "`lower` and `compile`": by_compilation,
    "donated arguments": by_donation,
    "strict promotion of dtypes and ranks": by_strict_promotion,
    "`debug_nans`": by_debug_nans,
    "`checking_leaks`": by_leak_checking,
}


def outcome(transform, problem):
    """ "yes", or the first sentence of the error."""
    try:
        transform(*problem())
    except AssertionError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        sentence = re.split(r"(?<=[.!?]) ", text)[0]
        return f"{type(error).__name__}: {sentence}".replace("|", "\\|")
    return "yes"


def table():
    """The page."""
    lines = [*ABOUT, f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, transform in ROWS.items():
        found = [outcome(transform, problem) for problem in COLUMNS.values()]
        lines.append(f"| {name} | {' | '.join(found)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    print(table(), end="")
