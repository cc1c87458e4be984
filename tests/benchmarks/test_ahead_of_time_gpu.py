"""The table of what was compiled for NVIDIA GPUs, and the command that makes it."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks.ahead_of_time import cuda_toolchain as _cuda
from benchmarks.ahead_of_time import gpu as compile_gpu
from benchmarks.ahead_of_time import gpu_rows as _compiled_gpu
from benchmarks.ahead_of_time import h100_specs as _hopper
from benchmarks.harness.cases import Case

ROWS = _compiled_gpu.read()
ATTENTION = [row for row in ROWS if row.program == _compiled_gpu.OURS]
# What reductions and barriers take beside what was estimated.
SLACK = 2**12

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
SASS = """\
\t.headerflags\t@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS"
.text.some_kernel:
   -:-:0:Y:01        /*0000*/                   LDC R1, c[0x0][0x28] 
   -:-:1:Y:07        /*0010*/              @!P0 S2R R0, SR_TID.X 
   -:-:-:Y:03        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR32]
   -:-:-:Y:01        /*0030*/             @!UPT UIADD3 UR14, UR4, UR14, URZ 
.L_x_41:
   -:-:1:Y:01        /*1280*/                   MUFU.EX2 R25, R34 
   -:-:1:Y:01        /*1290*/                   MUFU.LG2 R25, R34 
   -:-:1:Y:01        /*12a0*/               @P1 LDL.64 R20, [R1+0x8] 
   -:-:1:Y:01        /*12b0*/                   LDL.LU R20, [R1+0x8] 
   -:-:1:Y:01        /*12c0*/                   STL [R1], R20 
   -:-:-:-:00        /*c350*/                   NOP
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
HLO = """\
HloModule jit_fn, is_scheduled=true

%body.1 (arg: (f32[2])) -> (f32[2]) {
  %k.3 = (f32[2,64]{1,0}, f32[2]{0}) custom-call(%a, /*index=1*/%b), \
custom_call_target="mosaic_gpu_v2", api_version=API_VERSION_TYPED_FFI, \
metadata={op_name="jit(fn)/jvp(jit(attend))/while/body/sweep/mpmd_map" stack_frame_id=2\
}, backend_config={kernel_hash = "\\9Ag\\22x", module = "ML\\00kernel_hash"}
}

%cond.1 (arg: (f32[2])) -> pred[] {
  ROOT %c = pred[] custom-call(%arg), custom_call_target="other"
}

ENTRY %main.1 (q: f32[2]) -> f32[2] {
  %k.1 = f32[2,64]{1,0} custom-call(%a), custom_call_target="mosaic_gpu_v2", \
metadata={op_name="jit(fn)/jvp(jit(attend))/first/mpmd_map"}, \
backend_config={kernel_hash = "A", module = "ML"}
  %w = (f32[2]) while(%k.1), condition=%cond.1, body=%body.1
  ROOT %k.2 = f32[2,64]{1,0} custom-call(%w), custom_call_target="mosaic_gpu_v2", \
metadata={op_name="jit(fn)/transpose(jvp(jit(attend)))/last/mpmd_map"}, \
backend_config={kernel_hash = "B", module = "ML"}
}
"""


def test_reads_what_ptxas_prints():
    assert _cuda.read_ptxas(PTXAS) == {
        "remarks": ("C7519", "C7510"),
        "registers": 194,
        "barriers": 2,
        "static_bytes": 1,
        "stack_bytes": 248,
        "spill_store_bytes": 412,
        "spill_load_bytes": 356,
    }
    # A kernel without barriers or declared shared memory has no word about them.
    few = _cuda.read_ptxas(PTXAS.replace(", used 2 barriers, 1 bytes smem", ""))
    assert few["barriers"] == few["static_bytes"] == 0
    with pytest.raises(ValueError, match="ptxas printed"):
        _cuda.read_ptxas("ptxas fatal   : Unresolved extern function 'f'")


def test_counts_what_nvdisasm_prints():
    assert _cuda.read_sass(SASS) == {
        "instructions": 9,
        "wgmma": 1,
        "exp2": 1,
        "local_loads": 2,
        "local_stores": 1,
    }
    with pytest.raises(ValueError, match="nvdisasm printed"):
        _cuda.read_sass("nvdisasm fatal   : cannot open file")


def test_reads_how_a_kernel_is_launched(tmp_path):
    path = tmp_path / "some_kernel_0.mlir-passes.log"
    path.write_text(PASSES, encoding="utf-8")
    assert _cuda.read_launch(path) == _cuda.Launch(
        num_blocks=64, threads=128, dynamic_bytes=94232, num_arrays=2
    )
    path.write_text("module @some_kernel {\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no launch"):
        _cuda.read_launch(path)


def test_launches_are_in_the_order_of_the_schedule():
    first, inner, last = _cuda._calls(HLO)
    assert (first.code, inner.code, last.code) == ("A", r"\9Ag\22x", "B")
    assert (first.num_arrays, inner.num_arrays, last.num_arrays) == (2, 4, 2)
    assert "sweep" in inner.names
    directions = [x.direction for x in (first, inner, last)]
    assert directions == ["forward", "forward", "backward"]


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "expected"),
    [
        (32, 128, 0, (16, "registers")),
        (255, 128, 0, (2, "registers")),
        (168, 128, 2**14, (3, "registers")),
        # Of 80 registers, 6 warps a part: CUDA's occupancy calculator says the same.
        (80, 128, 29721, (6, "registers")),
        (96, 128, 54297, (4, "shared memory")),
        (64, 128, _hopper.MAX_SHARED, (1, "shared memory")),
        (16, 1024, 0, (2, "threads")),
        (16, 32, 0, (32, "blocks")),
        (32, 128, _hopper.MAX_SHARED + 1, (0, "shared memory")),
    ],
)
def test_blocks_at_once(registers, threads, shared, expected):
    assert _hopper.blocks_at_once(registers, threads, shared) == expected


def test_all_programs_were_compiled():
    programs = compile_gpu.programs(compile_gpu.Config())
    assert {row.key for row in ROWS} == {compile_gpu._key(*x) for x in programs}


def test_rows_are_of_one_clean_commit():
    (commit,) = {row.commit for row in ROWS}
    assert "dirty" not in commit
    assert commit != "unknown"


def test_attention_keeps_everything_in_registers():
    """But for the gradient's last pass: that fills a thread's registers to the last.

    With 128 dimensions, or four kernel matrices, it wants more of them.
    """
    for row in ATTENTION:
        for kernel in row.kernels:
            assert kernel.registers <= 255, row.key
            is_wide = row.head_dim > 64 or row.tokens > 4096
            is_last_pass = kernel.name.endswith("pull_back")
            most = (512 if is_wide else 16) if is_last_pass else 0
            assert kernel.stack_bytes <= most, row.key
            assert kernel.spill_store_bytes <= most, row.key
            assert kernel.spill_load_bytes <= most, row.key
            is_local = kernel.local_loads + kernel.local_stores > 0
            assert is_local == (kernel.spill_store_bytes > 0), row.key


def test_no_matrix_product_was_serialised():
    remarks = {code for row in ATTENTION for x in row.kernels for code in x.remarks}
    assert "C7510" not in remarks
    assert all(x.wgmma > 0 and x.exp2 > 0 for row in ATTENTION for x in row.kernels)


def test_every_kernel_fits_a_multiprocessor():
    for row in ROWS:
        for kernel in row.kernels:
            assert kernel.shared_bytes <= _hopper.MAX_SHARED, row.key
            assert kernel.at_once[0] >= 1, row.key


def test_kernels_took_no_more_shared_memory_than_estimated():
    known = {
        "sinkhorn_attention_resident": "forward_bytes",
        "sinkhorn_attention_resident_reverse": "backward_bytes",
        "sinkhorn_attention_sweep": "forward_bytes",
    }
    found = set()
    for row in ATTENTION:
        for kernel in row.kernels:
            if kernel.name in known:
                found.add(kernel.name)
                estimate = getattr(row.blocks, known[kernel.name])
                assert kernel.shared_bytes <= estimate + SLACK, (row.key, kernel.name)
    assert found == set(known)


def test_all_regimes_were_compiled():
    regimes = {row.blocks.regime for row in ATTENTION}
    expected = {"strips, held", "strips, made twice"}
    expected |= {f"strips, held, cluster of {size}" for size in (4, 8)}
    expected |= {f"resident, {dtype}" for dtype in ("float32", "bfloat16")}
    expected |= {f"resident, bfloat16, cluster of {size}" for size in (2, 4, 8)}
    expected |= {f"resident, float32, cluster of {size}" for size in (2, 8)}
    assert regimes == expected


def test_blocks_are_still_those_of_the_table():
    for row in ATTENTION:
        case = Case(row.heads, row.tokens, row.head_dim, row.dtype, row.num_iters)
        assert compile_gpu.blocks_of(case) == row.blocks, row.key


@pytest.mark.parametrize("tokens", [128, 512, 1024])
def test_work_is_still_that_of_the_table(tokens):
    (row,) = [
        row
        for row in ATTENTION
        if row.mode == "forward_backward"
        and (row.tokens, row.dtype, row.head_dim) == (tokens, "bfloat16", 64)
    ]
    case = Case(row.heads, row.tokens, row.head_dim, row.dtype, row.num_iters)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert compile_gpu.work_of(case, row.mode) == row.work


def test_the_estimate_is_the_slowest_part():
    work = _compiled_gpu.Work(
        direction="forward",
        launches=1,
        flops=989e12,
        exps=4.1875e12,
        vector=67e12,
        shared=100.5e12,
    )
    assert work.parts == pytest.approx(
        {
            "tensor cores": 1,
            "exponentials": 1,
            "vector operations": 2,
            "shared memory": 3,
        }
    )


def test_temporary_memory_is_linear_in_the_tokens():
    longest = max(compile_gpu.Config.xla_tokens)
    at = {
        (row.program, row.tokens): row.temp_bytes
        for row in ROWS
        if row.mode == "forward_backward"
        and (row.dtype, row.head_dim, row.num_iters) == ("bfloat16", 64, 10)
    }
    per_token = at[_compiled_gpu.OURS, 1024] / 1024
    assert at[_compiled_gpu.OURS, longest] / longest < 1.5 * per_token
    for program in compile_gpu.XLA:
        assert at[_compiled_gpu.OURS, longest] < at[program, longest]


def test_page_says_what_the_rows_give():
    page = _compiled_gpu.FOLDER / _compiled_gpu.PAGE
    assert page.read_text(encoding="utf-8") == _compiled_gpu.page(ROWS)


def test_rows_are_read_as_written(tmp_path):
    _compiled_gpu.write(ROWS[:3], tmp_path)
    assert _compiled_gpu.read(tmp_path) == sorted(ROWS[:3], key=lambda row: row.key)
    assert _compiled_gpu.read(tmp_path / "nothing") == []


def test_kernels_that_differ_in_their_grid_alone_share_a_line():
    row = next(row for row in ATTENTION if row.mode == "forward_backward")
    (kernel, *_) = row.kernels
    larger = dataclasses.replace(kernel, num_blocks=2 * kernel.num_blocks)
    other = dataclasses.replace(kernel, registers=kernel.registers + 1)
    rows = [
        dataclasses.replace(row, tokens=tokens, kernels=kernels)
        for tokens, kernels in ((64, (kernel,)), (128, (larger, other)))
    ]
    first, second = _compiled_gpu._kernel_lines(rows)
    assert first[0] == "64, 128"
    assert second[0] == "128"


def test_a_missing_compiler_is_asked_for(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"pip install .*make compile-table-gpu"
    ):
        _cuda.Compiler(tmp_path)


def test_a_compiler_of_another_version_is_refused(tmp_path):
    for path in _cuda.PACKAGES.values():
        file = tmp_path / path.replace("*", "cu13")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    for name in _cuda.PACKAGES:
        info = tmp_path / f"{name.replace('-', '_')}-0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {name}\nVersion: 0.1\n")
    with pytest.raises(FileNotFoundError, match=f"{_cuda.PLUGIN} is 0.1"):
        _cuda.Compiler(tmp_path)


def compile_to(folder, *options):
    """In a process of its own: the plugin for CUDA stays in one that has found it."""
    if not (ROOT / compile_gpu.Config.cuda).exists():
        pytest.skip("no compiler for GPUs is installed; `make compile-table-gpu` does")
    nothing = ("--tokens", "--few-tokens", "--xla-tokens", "--sizes", "--few-iters")
    subprocess.run(
        [sys.executable, "-m", "benchmarks.ahead_of_time.gpu", "--output", folder]
        + [option for option in nothing if option not in options]
        + list(options),
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return _compiled_gpu.read(folder)


def test_a_kernel_compiles(tmp_path):
    few = ("--sizes", "4", "--num-matrices", "128", "--matrix-iters", "1")
    forward, both = compile_to(tmp_path, *few)
    assert (forward.mode, both.mode) == ("forward", "forward_backward")
    assert [x.direction for x in forward.kernels] == ["forward"]
    assert [x.direction for x in both.kernels] == ["forward", "backward"]
    for kernel in both.kernels:
        assert kernel.num_blocks * kernel.threads == 128
        assert kernel.exp2 > 0
        assert kernel.local_loads == 0
    assert (tmp_path / _compiled_gpu.PAGE).exists()


@pytest.mark.slow
def test_attention_compiles_and_goes_on_where_it_was(tmp_path):
    few = ("--tokens", "64", "--num-iters", "1", "--head-dims", "64", "--dtypes")
    forward, both = compile_to(tmp_path, *few, "bfloat16")
    assert both.kernels[: len(forward.kernels)] == forward.kernels
    assert {x.direction for x in both.kernels} == {"forward", "backward"}
    rows = compile_to(tmp_path, *few, "bfloat16", "float16")
    assert rows[:2] == [forward, both]
