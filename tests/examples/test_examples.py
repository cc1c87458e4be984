"""The recipes run, show what they say, and are short enough to read."""

import ast
import importlib
import pathlib
import re

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted(
    path
    for path in (ROOT / "examples").glob("*.py")
    if path.stem not in ("__init__", "data", "shared")
)
by_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


@pytest.fixture
def run(tmp_path):
    def run(name, *needed):
        for package in ("matplotlib", "optax", "sklearn", *needed):
            pytest.importorskip(package)
        module = importlib.import_module(f"examples.{name}")
        picture = tmp_path / "picture.png"
        with jax.enable_x64(False):
            result = module.main(["--quick", "--output", str(picture)])
        assert picture.read_bytes().startswith(b"\x89PNG")
        return result

    return run


def test_vit_linen(run):
    accuracies = run("vit_linen")
    before, after = accuracies["switched"]
    assert accuracies["softmax"][1][0] > 0.3  # 0.1 is chance.
    assert before[0] < accuracies["softmax"][1][0]
    assert before[0] != after[0]


def test_transformer_nnx(run):
    assert run("transformer_nnx")["softmax"][1][0] > 0.5  # 0.3 is the largest class.


def test_plain_jax(run):
    differences, _ = run("plain_jax")
    assert differences["softmax"] < 1e-5
    assert differences["Sinkhorn"] > 1e-2


def test_equinox_attention(run):
    assert run("equinox_attention", "equinox")["difference"] < 1e-5


# OTT-JAX imports a package that warns of its own end.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transport(run):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        pytest.importorskip("ott")
    results = run("transport")
    for name in ("plan", "divergence", "gradient"):
        assert results[name] < 1e-2, name
    assert 0 < results["end"] < results["start"] / 2


def test_sorting(run):
    results = run("sorting")
    for images, sets in results.values():
        assert images > 0.25  # A sixth is chance.
        assert sets <= images


def test_routing(run):
    results = run("routing")
    load = {name: values[1] for name, values in results.items()}
    assert 1 <= load["Sinkhorn"] < load["top-1"] <= 8
    assert results["Sinkhorn"][2] < results["top-1"][2]


def test_partial_matching(run):
    for precision, recall, f1 in run("partial_matching").values():
        assert 0.5 < precision <= 1
        assert 0 < recall <= 1
        assert f1 == pytest.approx(2 / (1 / precision + 1 / recall), rel=1e-3)


@pytest.mark.slow
def test_hyper_connections(run):
    _, gain = run("hyper_connections")
    assert gain["residual"] == 1
    assert gain["mHC"] == pytest.approx(1, abs=1e-3)
    assert gain["free"] > 1.1


@pytest.mark.slow
def test_dial(run):
    _, taus = run("dial")
    assert taus.shape == (2, 1, 4)  # Layers, seeds, heads.
    assert (np.abs(taus - 0.5) > 1e-4).all()
    assert ((taus > 0) & (taus < 1)).all()


@pytest.mark.slow
def test_rank_of_your_model(run):
    results = run("rank_of_your_model")
    assert results["softmax"].relative_residual.shape == (3,)
    assert (results["Sinkhorn"].column_defect < 1e-2).all()
    assert (results["softmax"].column_defect > 1e-2).all()
    assert any("equal sums" in each for each in results["Sinkhorn"].warnings())


@by_script
def test_scripts_are_short_and_say_what_they_do(script):
    text = script.read_text()
    assert len(text.splitlines()) <= 80
    docstring = ast.get_docstring(ast.parse(text))
    assert f"python -m examples.{script.stem}" in docstring
    assert "https://" in docstring
    # What it printed stands behind the command.
    assert re.search(r"\d\.\d", docstring.partition("python -m")[2])


@by_script
def test_the_table_names_every_recipe(script):
    page = (ROOT / "examples" / "README.md").read_text()
    assert f"python -m examples.{script.stem}" in page
    assert f"figures/{script.stem}.png" in page


def test_pictures_are_small():
    pictures = sorted((ROOT / "examples" / "figures").glob("*"))
    assert [path.stem for path in pictures] == [path.stem for path in SCRIPTS]
    assert all(path.stat().st_size <= 40_000 for path in pictures)
