"""The launch of a kernel."""

import dataclasses
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..._runtime.shard_map import varying_like


def call_kernel(
    body: Callable[[SimpleNamespace, SimpleNamespace, SimpleNamespace], None],
    name: str,
    num_programs: int,
    inputs: Mapping[str, Any],
    results: Mapping[str, Any],
    scratch: Mapping[str, Any],
    *,
    num_warpgroups: int = 1,
    cluster: int = 1,
) -> SimpleNamespace:
    """Results of a kernel, as attributes.

    The order of the names is that of the kernel's parameters. What a kernel does not
    need in a particular call is None.

    Args:
        body: `body(inputs, results, scratch)` gets references, as attributes.
        name: Name of the kernel in profiles.
        num_programs: Clusters of thread blocks in the grid, whose axis is "program".
        inputs: Arrays that the kernel reads, or sequences of them, by name.
        results: Shapes and dtypes of the results, by name.
        scratch: Shared memory and barriers of each thread block, likewise.
        num_warpgroups: Warpgroups of a thread block. More than one have an axis
            "warpgroup".
        cluster: Thread blocks of a cluster. More than one have an axis "block".
    """
    if num_programs == 0:  # No kernel has an empty grid.
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), dict(results))
        return SimpleNamespace(**empty)
    # Approximate exponentials are off by a few units in the last place of float32, and
    # potentials by one more where they become logarithms to base 2. By estimate
    # that changes the plan by 2e-4 of itself for logits of 300. Rounding it changes it
    # by up to 5e-4 in float16 and 4e-3 in bfloat16.
    params, threads = plgpu.CompilerParams(approx_math=True), {}
    if num_warpgroups > 1:
        threads = {"num_threads": num_warpgroups, "thread_name": "warpgroup"}
        # Mosaic GPU has one scratch for reductions across warps, which warpgroups would
        # share without a barrier. With no bytes for it such a reduction is an error.
        params = dataclasses.replace(params, reduction_scratch_bytes=0)
    if cluster > 1:
        threads |= {"cluster": (cluster,), "cluster_names": ("block",)}
        # With warpgroup semantics, the default from JAX 0.11 on, a slice of another
        # thread block's shared memory does not lower.
        lane = plgpu.LoweringSemantics.Lane
        params = dataclasses.replace(params, lowering_semantics=lane)
    # Not the mappings themselves, whose keys `jax.tree` would sort.
    groups = [tuple(x.values()) for x in (inputs, results, scratch)]
    arrays, out_type, scratch_types = map(jax.tree.leaves, groups)
    structure = jax.tree.structure(groups)

    def flat_body(*refs):
        values = jax.tree.unflatten(structure, refs)
        body(*map(_named, (inputs, results, scratch), values))

    out = plgpu.kernel(
        flat_body,
        out_type=out_type,
        scratch_types=scratch_types,
        # One axis, because only one of a GPU's three is long enough for all row blocks
        # of all heads.
        grid=(num_programs,),
        grid_names=("program",),
        compiler_params=params,
        kernel_name=name,
        **threads,
    )(*arrays)
    # Pallas drops the axes of a `jax.shard_map` over which the arrays vary.
    out = varying_like(out, arrays)
    return _named(results, jax.tree.unflatten(jax.tree.structure(groups[1]), out))


def _named(names, values):
    return SimpleNamespace(**dict(zip(names, values, strict=True)))


def vector(*shape: int) -> jax.ShapeDtypeStruct:
    """The type of potentials, weights and sums."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)
