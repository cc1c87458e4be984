"""Products of what is in registers, for Pallas' interpreter of GPU kernels."""

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sinkhorn_jax.attention._mosaic_gpu import tiles as strips


def interpret_registers(patch):
    """Until the patch is undone, each warpgroup has memory for them beside its own."""
    kernel, current = plgpu.kernel, {}

    def kernel_with_memory(body, *, scratch_types, num_threads=None, **params):
        if num_threads:
            params["num_threads"] = num_threads

        def call(*arrays):
            memory = strips.operand(num_threads or 1, 64, 128, dtype=arrays[0].dtype)

            def body_with_memory(*refs):
                *refs, memory_ref = refs
                me = jax.lax.axis_index("warpgroup") if num_threads else 0
                current["registers"] = memory_ref.at[me]
                body(*refs)

            scratch = [*scratch_types, memory]
            return kernel(body_with_memory, scratch_types=scratch, **params)(*arrays)

        return call

    def start_product(acc_ref, x, y_ref):
        if isinstance(x, jax.Array):
            x_ref = current["registers"].at[:, pl.ds(0, x.shape[1])]
            x_ref[...] = x
            x = x_ref
        plgpu.wgmma(acc_ref, x, y_ref)

    patch.setattr(plgpu, "kernel", kernel_with_memory)
    patch.setattr(strips, "start_product", start_product)
