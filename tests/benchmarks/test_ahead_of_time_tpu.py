"""The table of what was compiled for TPUs, and the command that makes it."""

import dataclasses

import jax
import pytest

from benchmarks import programs as _programs
from benchmarks.ahead_of_time import tpu as compile_tpu
from benchmarks.ahead_of_time import tpu_rows as _compiled
from benchmarks.ahead_of_time import tpu_specs as _chips
from benchmarks.harness import program as _program
from benchmarks.harness.cases import Case
from sinkhorn_jax.attention._mosaic_tpu import blocks as _mosaic_tpu_blocks

TOKENS = compile_tpu.Config.tokens
DTYPES = compile_tpu.Config.dtypes
ROWS = _compiled.read()
KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}


def traced_for(generation):
    """What tracing for a TPU that is not there is done under."""
    device = jax.sharding.AbstractDevice(KINDS[generation], 1, "tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def test_all_generations_lengths_and_dtypes_were_compiled():
    assert {row.key for row in ROWS} >= {
        (program, generation, "forward_backward", tokens, dtype)
        for program in _compiled.NAMES
        for generation in _chips.CHIPS
        for tokens in TOKENS
        for dtype in DTYPES
    }


def test_rows_are_of_one_clean_commit():
    (commit,) = {row.commit for row in ROWS}
    assert "dirty" not in commit
    assert commit != "unknown"


@pytest.mark.parametrize("generation", _chips.CHIPS)
def test_both_regimes_were_compiled(generation):
    found = {
        (row.dtype, direction, blocks.is_resident)
        for row in ROWS
        if row.generation == generation
        for direction, blocks in zip(("forward", "backward"), row.blocks, strict=False)
    }
    assert len(found) == len(DTYPES) * 2 * 2


def test_kernels_took_no_more_vmem_than_estimated():
    for row in ROWS:
        capacity = _chips.CHIPS[row.generation].info.vmem_capacity_bytes
        assert all(x.vmem_bytes <= capacity for x in row.kernels), row.key
        if row.program == _compiled.OURS:
            assert all(x.vmem_bytes > 0 for x in row.kernels)
            assert len(row.kernels) == len(row.blocks) == len(row.work)
            for kernel, blocks in zip(row.kernels, row.blocks, strict=True):
                # Small kernels get some 100 kB that do not depend on their size.
                assert kernel.vmem_bytes <= 1.1 * blocks.vmem_bytes + 2**19, row.key


def test_flops_were_counted_as_estimated():
    for row in ROWS:
        if row.program == _compiled.OURS:
            for work in row.work:
                assert work.flops == work.estimated_flops, row.key
                assert work.num_bytes == work.estimated_bytes, row.key
                assert work.estimated_exps <= work.exps < 1.2 * work.estimated_exps


@pytest.mark.parametrize("generation", _chips.CHIPS)
def test_blocks_are_still_those_of_the_table(generation):
    for row in ROWS:
        if (row.program, row.generation) == (_compiled.OURS, generation):
            case = Case(row.heads, row.tokens, row.head_dim, row.dtype, row.num_iters)
            with traced_for(generation):
                assert compile_tpu._blocks(case, row.mode) == row.blocks, row.key


@pytest.mark.parametrize("program", _compiled.NAMES)
def test_work_is_still_that_of_the_table(program):
    key = program, "v5e", "forward_backward", 256, "bfloat16"
    (row,) = [row for row in ROWS if row.key == key]
    case = Case(row.heads, row.tokens, row.head_dim, row.dtype, row.num_iters)
    fn = _program.in_mode(compile_tpu._attention(program, case), row.mode)
    with traced_for("v5e"), jax.numpy_dtype_promotion("standard"):
        with jax.numpy_rank_promotion("allow"), jax.enable_x64(False):
            assert compile_tpu._count(fn, case) == row.work


def test_page_says_what_the_rows_give():
    page = _compiled.FOLDER / _compiled.PAGE
    assert page.read_text(encoding="utf-8") == _compiled.page(ROWS)


def test_rows_are_read_as_written(tmp_path):
    _compiled.write(ROWS[:3], tmp_path)
    assert _compiled.read(tmp_path) == ROWS[:3]


def test_the_estimate_is_the_slowest_part():
    work = _compiled.Work(
        name="some_kernel",
        flops=2,
        passes=2,
        exps=1,
        vector=1,
        num_bytes=8.2e11,
        estimated_flops=None,
        estimated_exps=None,
        estimated_bytes=None,
    )
    row = dataclasses.replace(ROWS[0], generation="v5e", work=(work,))
    assert row.seconds == pytest.approx(1.0)
    assert row.limit == "HBM"
    faster = dataclasses.replace(row, work=(dataclasses.replace(work, passes=197e13),))
    assert faster.seconds == pytest.approx(10.0)
    assert faster.limit == "matrix unit"


@pytest.mark.parametrize("generation", _chips.CHIPS)
def test_vmem_is_that_of_the_generation_traced_for(generation):
    expected = _chips.CHIPS[generation].info.vmem_capacity_bytes
    with traced_for(generation):
        assert _mosaic_tpu_blocks.vmem_capacity() == expected
    assert _mosaic_tpu_blocks.vmem_capacity() == _mosaic_tpu_blocks.SMALLEST_VMEM


def test_a_trace_for_more_vmem_keeps_longer_matrices():
    problem = _programs.problem(Case(1, 4096, dtype="bfloat16"))

    def is_resident():
        blocks = _mosaic_tpu_blocks.default_blocks(problem, "backward")
        return blocks.is_resident

    assert not is_resident()
    with traced_for("v5e"):
        assert is_resident()


def test_a_missing_compiler_is_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="pip install --target"):
        compile_tpu.find_compiler(tmp_path)
