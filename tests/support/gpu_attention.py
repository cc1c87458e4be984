"""What the tests of the GPU attention kernels share."""

import dataclasses

import jax
import jax.numpy as jnp

from sinkhorn_jax.attention._mosaic_gpu import attend, heuristics, refresh_groups

# Largest error, relative to the largest entry. The kernels round the plan and its
# gradient to the dtype of the inputs, 8 or 11 bits, before they are multiplied. float32
# is for the interpreter only.
RTOL = {"float32": 5e-6, "bfloat16": 1e-2, "float16": 2e-3}


def use_blocks(patch, **changed):
    """Runs attention with the default blocks, except for these fields."""

    def blocks(problem):
        return dataclasses.replace(heuristics.default_blocks(problem), **changed)

    patch.setattr(attend, "default_blocks", blocks)


def refresh_kernels_every(patch, num_iters):
    """Limits the iterations that share a kernel matrix, forward and backward."""
    for module in (refresh_groups, heuristics):
        patch.setattr(module, "max_refresh_interval", lambda problem: num_iters)


def lengths(query, key):
    """Options of `sinkhorn_attention` with these sequence lengths."""
    return {
        "query_seq_lengths": jnp.asarray(query),
        "key_value_seq_lengths": jnp.asarray(key),
    }


def lowered(fn, *shapes, dtype):
    """The program for CUDA of a function of arrays of these shapes, as text."""
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    jax.clear_caches()
    program = jax.jit(fn).trace(*arrays).lower(lowering_platforms=("cuda",))
    return program.as_text()
