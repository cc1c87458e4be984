"""Programs for accelerators that this machine does not have."""

import jax


def on_tpu(kind="TPU v4", axis="x"):
    """A context in which programs are for one TPU, alone on a mesh of one axis."""
    return _use_mesh(axis, jax.sharding.AbstractDevice(kind, 1, "tpu"))


def lowered_for(platform, fn, *arrays, axis="x", kind="TPU v4"):
    """The text of `fn` lowered for "cuda" or "tpu"; `kind` is that of the TPU.

    Within `fn` a `jax.shard_map` without a mesh of its own has one device on `axis`.
    """
    # From JAX 0.12 on a TPU kernel is not lowered without a mesh that names the TPU.
    with on_tpu(kind, axis) if platform == "tpu" else _use_mesh(axis, None):
        program = jax.jit(fn).trace(*arrays)
        return program.lower(lowering_platforms=(platform,)).as_text()


def _use_mesh(axis, device):
    mesh = jax.sharding.AbstractMesh(
        (1,), (axis,), (jax.sharding.AxisType.Auto,), abstract_device=device
    )
    return jax.sharding.use_abstract_mesh(mesh)
