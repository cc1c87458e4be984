"""The benchmark of the measures of collapse: what is timed, and a smoke run."""

import json

import jax
import numpy as np

from benchmarks import collapse_measures


def test_the_least_is_part_of_what_the_measures_need():
    sizes = {"num_layers": 2, "batch_size": 1, "num_tokens": 6, "num_features": 4}
    x, plans, residual = collapse_measures.inputs(**sizes)
    values, res_values, fro, res_fro, *_, entropy = jax.jit(collapse_measures.least)(
        x, plans, residual
    )
    out = collapse_measures.collapse.measures_over_depth(x, plans)
    ratio = out.relative_residual
    np.testing.assert_allclose(res_fro / fro, ratio["fro"], rtol=1e-5)
    spectral = res_values[..., 0] / values[..., 0]
    np.testing.assert_allclose(spectral, ratio["spectral"], rtol=1e-5)
    np.testing.assert_allclose(entropy, out.attention_entropy, rtol=1e-5)


def test_a_smoke_run(tmp_path, capsys):
    output = tmp_path / "new" / "machine.json"
    collapse_measures.run(collapse_measures.Config(quick=True, output=output))
    row = json.loads(output.read_text())
    for clock in ("wall", "processor"):
        times = row[f"{clock}_ms"]
        ratios = np.divide(times["measures"], times["least"])
        assert row[f"{clock}_ratio"] == np.median(ratios) > 0
        assert len(ratios) == collapse_measures.ROUNDS
    assert f"{row['processor_ratio']:.2f} in processor time" in capsys.readouterr().out
