"""The files of a result: JSON, figure, environment."""

import contextlib
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


def test_further_figures_and_sentences(tmp_path, capsys):
    titles = []

    def draw(title):
        def drawn(result):
            titles.append((title, result["x"], len(result["findings"])))
            return plt.figure()

        return drawn

    result = files.write_result(
        "name",
        Config(tmp_path),
        {"x": 2},
        finding,
        draw("first"),
        start=0.0,
        question="asked",
        others={"more": draw("second")},
        say=lambda result: [f"x is {result['x']}.", "That is all."],
    )
    assert result["question"] == "asked"
    assert titles == [("first", 2, 1), ("second", 2, 1)]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"name.json", "name.png", "name_more.png"}
    assert plt.get_fignums() == []
    printed = capsys.readouterr().out
    assert printed.index("a > b") < printed.index("x is 2.\nThat is all.\n")


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with contextlib.suppress(KeyboardInterrupt), files.replacing(path) as new:
        new.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    with files.replacing(path) as new:
        new.write(b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


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
