"""Compiling without a device: what is read from compilers, rows, and one real run."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks import programs
from benchmarks.ahead_of_time import cuda_toolchain, gpu, rows, tpu
from benchmarks.harness.cases import Case
from sinkhorn_jax.attention._mosaic_tpu import blocks as tpu_blocks

ROOT = Path(__file__).parents[2]

PTXAS = """\
ptxas info    : (C7519) warpgroup.arrive is injected in around line 1314 by compiler \
to allow use of registers in GMMA in function 'some_kernel'
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are \
serialized due to insufficient register resources for the wgmma pipeline
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'some_kernel' for 'sm_90a'
ptxas info    : Function properties for some_kernel
    248 bytes stack frame, 412 bytes spill stores, 356 bytes spill loads
ptxas info    : Used 194 registers, used 2 barriers, 1 bytes smem
ptxas info    : Compile time = 168.233 ms
"""
PASSES = """\
// -----// IR Dump Before ResolveTrivialLocationsPass //----- //
module @some_kernel {
    %1 = llvm.getelementptr %arg1[0] : (!llvm.ptr) -> !llvm.ptr, !llvm.ptr loc(#loc2)
    %21 = llvm.getelementptr %arg1[1] : (!llvm.ptr) -> !llvm.ptr, !llvm.ptr loc(#loc2)
    %445 = gpu.launch async [%0] blocks(%arg2, %arg3, %arg4) in (%arg8 = %c32, %arg9 = \
%c2, %arg10 = %c1_0) threads(%arg5, %arg6, %arg7) in (%arg11 = %c128, %arg12 = %c1_1, \
%arg13 = %c1_2) dynamic_shared_memory_size %c94232_i32 {
    %1 = llvm.getelementptr %arg1[7] : (!llvm.ptr) -> !llvm.ptr, !llvm.ptr loc(#loc2)
"""
TARGET = rows.Target(
    "hopper", "mosaic_gpu", Case(8, 64, 16, "bfloat16", 3), "forward_backward"
)
ROW = rows.Executable(
    target=TARGET,
    regime="resident",
    kernels=(
        rows.Kernel(
            name="sinkhorn_attention_some",
            memory_bytes=2048,
            threads=128,
            registers=90,
            stack_bytes=8,
            spill_store_bytes=4,
            spill_load_bytes=12,
            remarks=("C7519", "C7519"),
        ),
    ),
    temp_bytes=3 * 2**20,
    jax_version="0.0",
    compiler="ptxas 1.0",
    commit="abc1234",
    date="2026-01-01T00:00:00+00:00",
)


def test_reads_what_ptxas_prints():
    assert cuda_toolchain.read_ptxas(PTXAS) == {
        "remarks": ("C7519", "C7510"),
        "registers": 194,
        "memory_bytes": 1,
        "stack_bytes": 248,
        "spill_store_bytes": 412,
        "spill_load_bytes": 356,
    }
    # ptxas does not mention declared shared memory if there is none.
    few = cuda_toolchain.read_ptxas(
        PTXAS.replace(", used 2 barriers, 1 bytes smem", "")
    )
    assert few["memory_bytes"] == 0
    with pytest.raises(ValueError, match="ptxas printed"):
        cuda_toolchain.read_ptxas("ptxas fatal   : Unresolved extern function 'f'")


def test_reads_how_a_kernel_is_launched(tmp_path):
    path = tmp_path / "some_kernel_0.mlir-passes.log"
    path.write_text(PASSES, encoding="utf-8")
    assert cuda_toolchain.read_grid(path) == (128, 94232)
    path.write_text("module @some_kernel {\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no launch"):
        cuda_toolchain.read_grid(path)


def test_reads_the_vmem_of_tpu_kernels():
    text = """\
  %sinkhorn_attention_backward.1 = f32[8] custom-call(%a), custom_call_target=\
"tpu_custom_call", backend_config={"used_scoped_memory_configs":[{"memory_space":"1",\
"offset":"0","size":"1065984"}]}
  %other = f32[8] custom-call(%a), custom_call_target="other"
"""
    (kernel,) = tpu.read_kernels(text)
    assert kernel == rows.Kernel(
        name="sinkhorn_attention_backward", memory_bytes=1065984
    )


def other_than(row, **fields):
    """The row, of another target."""
    return dataclasses.replace(row, target=dataclasses.replace(TARGET, **fields))


def test_rows_are_read_as_written(tmp_path):
    found = [ROW, other_than(ROW, mode="forward"), other_than(ROW, device="v4")]
    rows.write(found, tmp_path)
    assert rows.read(tmp_path) == found
    assert rows.read(tmp_path / "nothing") == []


def test_what_has_a_row_of_this_commit_is_not_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setattr(rows.machine, "commit", lambda: ROW.commit)
    compiled = []

    def compile_one(target):
        compiled.append(target)
        return {"regime": "resident", "kernels": (), "temp_bytes": 0}

    old = dataclasses.replace(other_than(ROW, mode="forward"), commit="other")
    rows.write([ROW, old], tmp_path)
    wanted = [ROW.target, old.target]
    found = rows.compile_missing(wanted, compile_one, "ptxas 1.0", tmp_path)
    assert compiled == [old.target]
    assert [row.target for row in found] == wanted
    assert rows.read(tmp_path) == found


def test_the_page_shows_memory_and_kernels():
    without = dataclasses.replace(ROW, kernels=(), temp_bytes=2**20)
    forward = other_than(without, mode="forward")
    softmax = other_than(without, program="softmax")
    small = other_than(ROW, program=rows.SMALL_MATRICES)
    page = rows.page([ROW, forward, softmax, small], "Title", "Method.")
    assert page.startswith(
        "# Title\n\njax 0.0, ptxas 1.0, commit `abc1234`, 2026-01-01."
    )
    assert "| hopper | 8 | 64 | 16 | bfloat16 | 3 | 1 | 3 | - | 1 |" in page
    assert "## hopper, bfloat16: 8 heads of dimension 16, 3 iterations" in page
    assert "## hopper, bfloat16: 8 small matrices, 3 iterations" in page
    line = "| 64 | resident | some | 2 | 128 | 90 | 4 | 12 | 8 | C7519 |"
    assert line in page


@pytest.mark.parametrize(("kind", "mib"), [("TPU v4", 16), ("TPU v5 lite", 128)])
def test_blocks_follow_the_generation_traced_for(kind, mib):
    device = jax.sharding.AbstractDevice(kind, 1, "tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    problem = programs.problem(Case(1, 4096, dtype="bfloat16"))
    with jax.sharding.use_abstract_mesh(mesh):
        assert tpu_blocks.vmem_capacity() == mib * 2**20
        blocks = tpu_blocks.default_blocks(problem, "backward")
        assert blocks.is_resident == (mib == 128)
    assert tpu_blocks.vmem_capacity() == tpu_blocks.SMALLEST_VMEM


def test_a_missing_compiler_is_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="`make compile-table` installs it"):
        tpu.find_compiler(tmp_path)
    with pytest.raises(FileNotFoundError, match="make compile-table-gpu"):
        cuda_toolchain.CudaCompiler(tmp_path)


def test_a_compiler_of_another_version_is_refused(tmp_path):
    for path in cuda_toolchain.PACKAGES.values():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    for name in cuda_toolchain.PACKAGES:
        info = tmp_path / f"{name.replace('-', '_')}-0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {name}\nVersion: 0.1\n")
    plugin = cuda_toolchain.PLUGIN
    with pytest.raises(FileNotFoundError, match=f"lacks .*{plugin}=={jax.__version__}"):
        cuda_toolchain.CudaCompiler(tmp_path)


def compile_only(name, folder):
    """Rows from a process of its own: JAX keeps a plugin for CUDA that it has found."""
    if not (ROOT / gpu.Config.cuda).exists():
        pytest.skip("no compiler for GPUs is installed; `make compile-table-gpu` does")
    command = [sys.executable, "-m", "benchmarks.ahead_of_time.gpu"]
    command += ["--output", str(folder), "--only", name]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return rows.read(folder)


def test_a_kernel_compiles(tmp_path):
    both, forward = compile_only("sinkhorn 65536x4 ", tmp_path)
    assert (forward.target.mode, both.target.mode) == ("forward", "forward_backward")
    assert len(both.kernels) == 2
    assert all(x.registers > 0 == x.spill_load_bytes for x in both.kernels)
    assert (tmp_path / "README.md").exists()


@pytest.mark.slow
def test_attention_compiles(tmp_path):
    both, _ = compile_only("mosaic_gpu 8x64 ", tmp_path)
    assert len(both.kernels) == 3
    assert all(x.memory_bytes > 0 for x in both.kernels)
