"""A recorded row and a skip, for the tests of the benchmarks."""

from benchmarks.harness import record


def row(**fields):
    """A row; the test names the fields that matter to it."""
    defaults = dict(
        implementation="softmax",
        mode="forward",
        shape_btnh=(1, 64, 4, 16),
        dtype="float32",
        num_iters=10,
        median_ms=2.0,
        iqr_ms=0.5,
        repeats=5,
        compile_ms=100.0,
        ratio_to_softmax=1.0,
        peak_mib=1.5,
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
    return record.Row(**defaults | fields)


SKIP = record.Skip(
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
