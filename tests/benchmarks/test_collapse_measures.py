"""The time of all measures of collapse: a smoke run, the committed result."""

import json

import jax
import numpy as np
import pytest

from benchmarks import collapse_measures as measures

TINY = {"num_layers": 2, "batch_size": 1, "num_tokens": 6, "num_features": 4}


def test_the_least_is_part_of_what_the_measures_need():
    x, plans, residual = measures.inputs(measures.Config(**TINY))
    values, res_values, fro, res_fro, *_, entropy = jax.jit(measures.least)(
        x, plans, residual
    )
    out = measures.collapse.measures_over_depth(x, plans)
    ratio = out.relative_residual
    np.testing.assert_allclose(res_fro / fro, ratio["fro"], rtol=1e-5)
    spectral = res_values[..., 0] / values[..., 0]
    np.testing.assert_allclose(spectral, ratio["spectral"], rtol=1e-5)
    np.testing.assert_allclose(entropy, out.attention_entropy, rtol=1e-5)


def test_a_smoke_run(tmp_path, capsys):
    output = tmp_path / "new" / "machine.json"
    measures.main(["--quick", "--repeats", "2", "--output", str(output)])
    row = json.loads(output.read_text())
    for clock in ("wall", "processor"):
        times = row[f"{clock}_ms"]
        ratios = np.divide(times["measures"], times["least"])
        assert row[f"{clock}_ratio"] == np.median(ratios) > 0
        assert len(ratios) == 2
    assert f"{row['processor_ratio']:.2f} in processor time" in capsys.readouterr().out


def test_there_is_no_median_of_no_rounds():
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        measures.Config(repeats=0)


def test_committed_results_hold_the_measures_to_twice_the_least():
    paths = list(measures.RESULTS.glob("*.json"))
    assert paths
    for path in paths:
        row = json.loads(path.read_text())
        shape = ("num_layers", "batch_size", "num_tokens", "num_features")
        assert [row[name] for name in shape] == [64, 8, 256, 256]
        assert not row["commit"].endswith("-dirty")
        assert row["processor_ratio"] <= 2
        assert row["temp_mib"]["measures"] < 0.1 * row["input_mib"]
