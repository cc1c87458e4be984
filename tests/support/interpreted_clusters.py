"""Clusters of blocks of threads for Pallas' interpreter of GPU kernels.

It runs the blocks of a cluster at once, each with shared memory of its own, but knows
neither how all of them meet nor how one reads what another has. Both are added here on
its own terms: it sees races between blocks too. A block must not end before all others
have read what it has, which whoever interprets has to ask about.
"""

import dataclasses

import jax
import pytest
from jax._src.pallas.mosaic_gpu import core
from jax._src.pallas.mosaic_gpu.interpret import (
    gpu_callbacks,
    jaxpr_interpret,
    shared_memory,
)
from jax.experimental import io_callback
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sinkhorn_jax.attention._mosaic_gpu import smem_matrix as held

_BLOCK = 2  # Where the key of an array in shared memory says whose it is.


def interpret_clusters(patch):
    """Until the patch is undone.

    Returns:
        Whether all threads have met once more since they read from another block.
    """
    interpreter = jaxpr_interpret.JaxprInterpreter
    is_known = "thread_id" in {x.name for x in dataclasses.fields(interpreter)}
    run_scoped, get = interpreter._interpret_run_scoped_p, interpreter._interpret_get_p

    readers, memories = set(), {}

    def reader(program, thread):
        memory = gpu_callbacks._get_shared_memory()
        memories[id(memory)] = memory  # Each kernel has another one.
        return id(memory), tuple(map(int, program)), int(thread)

    def note(token, program, thread):
        readers.add(reader(program, thread))
        return token

    def meet(token, program, device, thread):
        readers.discard(reader(program, thread))
        return _meet(token, device, thread)

    def meet_in_cluster():
        if not is_known:
            pytest.skip(
                "clusters are interpreted with JAX 0.10, whose insides are used"
            )
        # Nothing else here has a scope without memory.
        pl.run_scoped(plgpu.commit_smem)

    def run_scoped_or_meet(self, eqn, token, get_invals):
        if eqn.params["jaxpr"].invars:
            return run_scoped(self, eqn, token, get_invals)
        device = self.device_info.device_id
        program, thread = self.grid_point_coords, self.thread_id
        return io_callback(meet, token, token, program, device, thread), []

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

    patch.setattr(held, "meet_in_cluster", meet_in_cluster)
    patch.setattr(interpreter, "_interpret_run_scoped_p", run_scoped_or_meet)
    patch.setattr(interpreter, "_interpret_get_p", get_of_block)
    return lambda: not readers


def _meet(token, device, thread):
    memory = gpu_callbacks._get_shared_memory()
    device, thread = int(device), int(thread)
    count = memory.num_concurrent_threads
    with memory.lock:
        if not hasattr(memory, "meeting"):
            memory.meeting = shared_memory.Barrier(
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
    memory.meeting.arrive(clock)
    memory.meeting.wait(device, thread)
    return token
