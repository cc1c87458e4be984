"""What compilers said of the kernels: completeness, limits, and the pages."""

import re

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

from benchmarks import programs
from benchmarks.ahead_of_time import gpu, rows, tpu
from benchmarks.harness.cases import Case
from sinkhorn_jax.attention._mosaic_gpu import heuristics, shared_memory
from sinkhorn_jax.attention._mosaic_tpu import blocks as tpu_blocks

ON_TPU = rows.read(tpu.Config.output)
ON_GPU = rows.read(gpu.Config.output)
ATTENTION = [row for row in ON_GPU if row.target.program == gpu.PROGRAM]
KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
VERSIONS = {"v4": "TPU_V4", "v5e": "TPU_V5E", "v5p": "TPU_V5P", "v6e": "TPU_V6E"}
MAX_SHARED = 227 * 2**10  # Bytes of a thread block on Hopper.
# Reductions and barriers take it beside what was estimated.
SLACK = 2**12


def traced_for(generation):
    """The context in which tracing is for a TPU that is not there."""
    device = jax.sharding.AbstractDevice(KINDS[generation], 1, "tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def vmem(generation):
    version = pltpu.ChipVersion[VERSIONS[generation]]
    return pltpu.get_tpu_info_for_chip(version, 1).vmem_capacity_bytes


@pytest.mark.parametrize(
    ("found", "module"), [(ON_TPU, tpu), (ON_GPU, gpu)], ids=["tpu", "gpu"]
)
def test_everything_was_compiled_at_one_clean_commit(found, module):
    assert [row.target for row in found] == module.targets()
    (commit,) = {row.commit for row in found}
    assert re.fullmatch("[0-9a-f]{7,}", commit)
    page = (module.Config.output / "README.md").read_text(encoding="utf-8")
    assert page == rows.page(found, module.TITLE, module.METHOD)


@pytest.mark.parametrize("generation", tpu.TOPOLOGIES)
def test_tpu_kernels_took_no_more_vmem_than_estimated(generation):
    regimes = set()
    for row in ON_TPU:
        if row.target.device != generation:
            continue
        problem = programs.problem(row.target.case)
        with traced_for(generation):
            assert tpu.regime_of(row.target.case, row.target.mode) == row.regime
            for kernel in row.kernels:
                assert 0 < kernel.memory_bytes <= vmem(generation)
                direction = kernel.name.rpartition("_")[2]
                blocks = tpu_blocks.default_blocks(problem, direction)
                estimate = tpu_blocks.vmem_bytes(problem, blocks, direction)
                # Small kernels get some 100 kB that do not depend on their size.
                assert kernel.memory_bytes <= 1.1 * estimate + 2**19, row.target
                regimes.add((row.target.case.dtype, direction, blocks.is_resident))
    assert len(regimes) == 2 * 2 * 2  # Both regimes were compiled in every way.


def test_gpu_blocks_are_still_those_that_were_compiled():
    for row in ATTENTION:
        assert gpu.regime_of(row.target.case) == row.regime, row.target
    streamed = {f"streamed, computed {how}" for how in ("once", "twice")}
    streamed |= {f"streamed, computed once, cluster of {size}" for size in (4, 8)}
    resident = {f"resident, {dtype}" for dtype in ("float32", "bfloat16")}
    resident |= {f"resident, bfloat16, cluster of {size}" for size in (2, 4, 8)}
    resident |= {f"resident, float32, cluster of {size}" for size in (2, 8)}
    assert {row.regime for row in ATTENTION} == streamed | resident


def estimated_bytes(row):
    """Shared memory that the kernels with an estimate were thought to take."""
    problem = programs.problem(row.target.case)
    blocks = heuristics.default_blocks(problem)
    if blocks.regime == "streamed":
        scratch = {"sweep": shared_memory.sweep_scratch(problem, blocks)}
    else:
        forward = heuristics.resident_forward_warpgroups(problem, blocks)
        reverse = heuristics.resident_reverse_warpgroups(problem, blocks)
        scratch = {
            "resident": shared_memory.resident_forward_scratch(
                problem, blocks, forward
            ),
            "resident_reverse": shared_memory.resident_reverse_scratch(
                problem, blocks, reverse
            ),
        }
    return {
        f"sinkhorn_attention_{name}": shared_memory.num_bytes(arrays)
        for name, arrays in scratch.items()
    }


def test_gpu_kernels_took_no_more_shared_memory_than_estimated():
    found = set()
    for row in ATTENTION:
        estimates = estimated_bytes(row)
        for kernel in row.kernels:
            assert kernel.memory_bytes <= MAX_SHARED
            if kernel.name in estimates:
                found.add(kernel.name)
                most = estimates[kernel.name] + SLACK
                assert kernel.memory_bytes <= most, (row.target, kernel.name)
    assert len(found) == 3


def test_gpu_attention_keeps_everything_in_registers():
    """Only the kernels of the logits cotangent, which fill a thread's registers, spill.

    With 128 dimensions, or four kernel matrices, they spill more.
    """
    for row in ATTENTION:
        case = row.target.case
        for kernel in row.kernels:
            assert kernel.registers <= 255, row.target
            is_wide = case.head_dim > 64 or case.tokens > 4096
            is_last = kernel.name.endswith("pull_back")
            most = (512 if is_wide else 16) if is_last else 0
            assert kernel.stack_bytes <= most, row.target
            assert kernel.spill_store_bytes <= most, row.target
            assert kernel.spill_load_bytes <= most, row.target
            assert "C7510" not in kernel.remarks  # A serialised matrix product.


def test_temporary_memory_on_gpus_is_linear_in_the_tokens():
    at = {
        (row.target.program, row.target.case.tokens): row.temp_bytes
        for row in ON_GPU
        if row.target.mode == "forward_backward"
        and row.target.case == Case(8, row.target.case.tokens, 64, "bfloat16", 10)
    }
    per_token = at[gpu.PROGRAM, 1024] / 1024
    assert at[gpu.PROGRAM, 4096] / 4096 < 1.5 * per_token
    for program in gpu.OTHERS:
        assert at[gpu.PROGRAM, 4096] < at[program, 4096]
