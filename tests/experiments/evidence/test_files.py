"""The files of a result: JSON, figure, environment."""

import dataclasses
import json
import pathlib

import matplotlib.pyplot as plt
import pytest

from experiments.evidence import files


@dataclasses.dataclass(frozen=True)
class Config:
    output: pathlib.Path
    seeds: tuple[int, ...] = (0, 1)


def finding(result):
    # Seen as the JSON holds it.
    assert result["config"]["seeds"] == [0, 1]
    yield {"claim": "a > b", "verdict": "supported", "text": f"{result['x']} > 1"}


def test_a_result_is_json_figure_and_printed_findings(tmp_path, capsys):
    config = Config(tmp_path / "new" / "folder")
    draw = lambda result: plt.figure()
    result = files.write_result("name", config, {"x": 2}, finding, draw, start=0.0)
    assert json.loads((config.output / "name.json").read_text()) == result
    assert (config.output / "name.png").stat().st_size > 0
    assert plt.get_fignums() == []
    assert (result["question"], result["x"]) == ("name", 2)
    assert result["config"]["output"] == str(config.output)
    assert result["findings"][0]["text"] == "2 > 1"
    versions = {"jax", "flax", "sinkhorn_jax", "python", "device", "commit"}
    assert versions <= set(result["environment"])
    printed = capsys.readouterr().out
    assert "supported: a > b\n    2 > 1" in printed
    assert str(config.output) in printed


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": [1, 2]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, float("nan"))
    assert json.loads(path.read_text()) == {"a": [1, 2]}


def test_environment_without_a_repository(monkeypatch):
    def run(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(files.subprocess, "run", run)
    assert files.environment()["commit"] is None
