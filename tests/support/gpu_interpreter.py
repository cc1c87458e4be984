"""Pallas' interpreter of GPU kernels, and what these kernels need beyond it.

It runs all warpgroups and thread blocks of a kernel as threads, with barriers, copies
and shared memory, and detects races. It knows neither operands in registers nor the
layouts of registers, and neither barriers across a cluster nor reads of another thread
block's shared memory. These are added here on its own terms, so that it sees races
between thread blocks too.

It interprets a warpgroup as one thread, and products as done at once. So it does not
see what the threads of a warpgroup, or the tensor cores, must wait for.
"""

import contextlib
import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu import core
from jax._src.pallas.mosaic_gpu.interpret import (
    gpu_callbacks,
    interpret_pallas_call,
    jaxpr_interpret,
    shared_memory,
)
from jax._src.pallas.mosaic_gpu.interpret import params as interpreter
from jax.experimental import io_callback
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sinkhorn_jax.attention._mosaic_gpu import cluster, tiles

_BLOCK = 2  # Where the key of an array in shared memory says whose it is.


@contextlib.contextmanager
def interpreted(*, detect_races=False):
    """Runs kernels in the interpreter.

    Yields:
        Whether no thread block has ended while another one could still read its shared
        memory, as a function.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plgpu, "layout_cast", lambda x, layout: x)
        _interpret_registers(patch)
        has_left = _interpret_clusters(patch)
        jax.clear_caches()
        params = interpreter.InterpretGPUParams(detect_races=detect_races)
        with interpreter.force_gpu_interpret_mode(params):
            yield has_left
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    jax.clear_caches()


@contextlib.contextmanager
def gpu_or_interpreter(capfd):
    """Yields `call(fn, *args)`, which runs `fn` on a GPU, or in the interpreter.

    `call` fails if the interpreter sees a race, or a thread block that ends too early.
    """
    if jax.default_backend() == "gpu":
        if jax.devices()[0].compute_capability != "9.0":
            pytest.skip("the kernels are for Hopper's tensor cores")
        yield lambda fn, *args: jax.tree.map(np.asarray, jax.jit(fn)(*args))
        return
    with interpreted(detect_races=True) as has_left:

        def call(fn, *args):
            result = jax.tree.map(np.asarray, jax.jit(fn)(*args))
            # The interpreter's own record of races is that of the last kernel only.
            assert "RACE" not in capfd.readouterr().out
            assert has_left()
            return result

        yield call


def _interpret_registers(patch):
    """Gives each warpgroup memory for the operands that it keeps in registers."""
    current = {}

    def start_product(acc_ref, x, y_ref):
        if isinstance(x, jax.Array):
            x_ref = current["registers"].at[:, pl.ds(0, x.shape[1])]
            x_ref[...] = x
            x = x_ref
        plgpu.wgmma(acc_ref, x, y_ref)

    kernel = functools.partial(_kernel_with_registers, plgpu.kernel, current)
    patch.setattr(plgpu, "kernel", kernel)
    patch.setattr(tiles, "start_product", start_product)


def _kernel_with_registers(
    kernel, current, body, *, scratch_types, num_threads=None, **params
):
    if num_threads:
        params["num_threads"] = num_threads

    def body_with_registers(*refs):
        *refs, registers_ref = refs
        rank = jax.lax.axis_index("warpgroup") if num_threads else 0
        current["registers"] = registers_ref.at[rank]
        body(*refs)

    def call(*arrays):
        registers = tiles.operand(num_threads or 1, 64, 128, dtype=arrays[0].dtype)
        scratch = [*scratch_types, registers]
        return kernel(body_with_registers, scratch_types=scratch, **params)(*arrays)

    return call


def _interpret_clusters(patch):
    """Adds barriers across a cluster, and reads of another block's shared memory.

    Returns:
        Whether all threads have passed such a barrier since their last such read.
    """
    interpret = jaxpr_interpret.JaxprInterpreter
    is_known = "thread_id" in {x.name for x in dataclasses.fields(interpret)}
    run_scoped, get = interpret._interpret_run_scoped_p, interpret._interpret_get_p

    readers, memories = set(), {}

    def reader(program, thread):
        memory = gpu_callbacks._get_shared_memory()
        memories[id(memory)] = memory  # Keeps the id: each kernel has its own memory.
        return id(memory), tuple(map(int, program)), int(thread)

    def note(token, program, thread):
        readers.add(reader(program, thread))
        return token

    def wait(token, program, device, thread):
        readers.discard(reader(program, thread))
        return _wait_for_all_threads(token, device, thread)

    def barrier_of_cluster():
        if not is_known:
            pytest.skip(
                "clusters are interpreted with JAX 0.10, whose insides are used"
            )
        # A scope without memory stands for the barrier. Nothing else here has one.
        pl.run_scoped(plgpu.commit_smem)

    def run_scoped_or_wait(self, eqn, token, get_invals):
        if eqn.params["jaxpr"].invars:
            return run_scoped(self, eqn, token, get_invals)
        device = self.device_info.device_id
        program, thread = self.grid_point_coords, self.thread_id
        return io_callback(wait, token, token, program, device, thread), []

    def get_of_block(self, eqn, token, get_invals):
        key, *leaves = get_invals()
        transforms = jax.tree.unflatten(eqn.params["tree"], leaves)
        others = [x for x in transforms if isinstance(x, core.ClusterRefTransform)]
        if not others:
            return get(self, eqn, token, get_invals)
        ((block,),) = (x.idxs for x in others)
        device = self.device_info.device_id
        token = io_callback(note, token, token, self.grid_point_coords, self.thread_id)
        return gpu_callbacks.call_get(
            token=token,
            result_shape_and_dtype=eqn.outvars[0].aval,
            device_id=jax.numpy.int32(device),
            grid_point_coords=self.grid_point_coords,
            thread_id=self.thread_id,
            allocation_key_as_array=key.at[_BLOCK].set(block),
            transforms=tuple(x for x in transforms if x not in others),
            source_info=eqn.source_info,
        )

    patch.setattr(cluster, "barrier_of_cluster", barrier_of_cluster)
    patch.setattr(interpret, "_interpret_run_scoped_p", run_scoped_or_wait)
    patch.setattr(interpret, "_interpret_get_p", get_of_block)
    return lambda: not readers


def _wait_for_all_threads(token, device, thread):
    memory = gpu_callbacks._get_shared_memory()
    device, thread = int(device), int(thread)
    count = memory.num_concurrent_threads
    with memory.lock:
        if not hasattr(memory, "barrier_of_cluster"):
            memory.barrier_of_cluster = shared_memory.Barrier(
                memory,
                num_participating_threads=count,
                ref_count=1,
                num_arrivals=count,
            )
        clock = None
        if memory.detect_races:
            me = memory.get_global_thread_id(device, thread)
            shared_memory.vc.inc_vector_clock(memory.clocks[me], me)
            clock = shared_memory.vc.copy_vector_clock(memory.clocks[me])
    memory.barrier_of_cluster.arrive(clock)
    memory.barrier_of_cluster.wait(device, thread)
    return token
