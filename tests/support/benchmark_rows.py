"""A recorded row and a skipped one, for the tests of the benchmarks."""

from benchmarks.harness import record as _record


def row(**fields):
    """A row as one run would give; a difference is named by the test."""
    defaults = dict(
        implementation="softmax",
        mode="forward",
        shape_btnh=(1, 64, 4, 16),
        kv_len=64,
        dtype="float32",
        num_iters=10,
        matmul_precision="default",
        median_ms=2.0,
        iqr_ms=0.5,
        repeats=5,
        compile_ms=100.0,
        tokens_per_second=32e3,
        ratio_to_softmax=1.0,
        peak_mib=1.5,
        peak_in_ts_arrays=96.0,
        one_head_mib=0.03,
        ts_arrays_per_head=2.0,
        max_abs_error=1e-7,
        device="Some CPU",
        platform="cpu",
        num_cpus=2,
        jax_version="0.0",
        jaxlib_version="0.0",
        python_version="3.11",
        commit="abc1234",
        date="2026-01-01T00:00:00+00:00",
    )
    return _record.Row(**defaults | fields)


SKIP = _record.Skip(
    implementation="pot",
    mode="forward",
    shape_btnh=(1, 64, 4, 16),
    dtype="float32",
    num_iters=10,
    device="Some CPU",
    platform="cpu",
    num_cpus=2,
    date="2026-01-01T00:00:00+00:00",
    reason="POT is not installed",
)
