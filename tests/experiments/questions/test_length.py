"""The experiment on the number of tokens: patches, findings, files."""

import json

import matplotlib.image
import pytest
from support import digit_double

from experiments.questions import length


@pytest.fixture
def result(monkeypatch, tmp_path):
    # What Sinkhorn gains; with the most tokens it loses.
    gain = {4: 0.1, 2: 0.2, 1: -0.1}

    def measure(model, trained):
        is_ours = model.num_iters > 0 and trained is not None
        return 0.5 + gain[model.patch_size] * is_ours, 1.0 + is_ours, 0.9

    digit_double.install(monkeypatch, measure)
    config = length.Config(num_iters=3, output=tmp_path / "new")
    return config, length.run(config)


def test_from_options_to_files(result):
    config, result = result
    text = (config.output / "length.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(result))
    cells = [(c["num_tokens"], c["num_iters"]) for c in result["cells"]]
    assert cells == [(4, 0), (4, 3), (16, 0), (16, 3), (64, 0), (64, 3)]
    image = matplotlib.image.imread(config.output / "length.png")
    assert min(image.shape[:2]) > 500


def test_findings(result):
    found = {f["claim"]: f for f in result[1]["findings"]}
    better = "Sinkhorn preserves rank better than softmax ({} tokens)"
    verdicts = [found[better.format(t)]["verdict"] for t in (4, 16, 64)]
    assert verdicts == ["supported", "supported", "not supported"]
    more = found["the more tokens, the more rank Sinkhorn preserves beyond softmax"]
    assert more["verdict"] == "not supported"
    assert "a difference by seed of -0.200 ± 0.000" in more["text"]
    classify = "Sinkhorn classifies better than softmax (16 tokens)"
    assert found[classify]["verdict"] == "undecided"


@pytest.mark.parametrize("patch_sizes", [(2,), (1, 2), (8, 4), (4, 4, 2)])
def test_bad_options_are_refused(patch_sizes):
    with pytest.raises(ValueError, match="patch_sizes must be two or more of 4, 2"):
        length.Config(patch_sizes=patch_sizes)
