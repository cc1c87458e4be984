"""`python -m sinkhorn_jax`, and the version."""

import importlib.metadata
import json
import pathlib
import re

import jax
import pytest

import sinkhorn_jax
from sinkhorn_jax import __main__ as command
from sinkhorn_jax.attention import IMPLEMENTATIONS

ROOT = pathlib.Path(__file__).parents[2]


def test_one_version():
    citation = (ROOT / "CITATION.cff").read_text()
    (version,) = re.findall(r"^version: (.*)$", citation, re.M)
    assert version == sinkhorn_jax.__version__
    assert version == importlib.metadata.version("sinkhorn_jax")


def test_the_report_says_what_runs_here(capsys):
    command.main(["--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["sinkhorn_jax"] == sinkhorn_jax.__version__
    assert found["jax"] == jax.__version__
    assert len(found["devices"]) == len(jax.devices())
    reasons = found["implementations"]
    assert list(reasons) == list(IMPLEMENTATIONS)
    assert found["taken"] == "scaling"
    assert reasons["scaling"] is reasons["streaming"] is reasons["reference"] is None
    for platform in {"gpu", "tpu"} - {jax.default_backend()}:
        reason = reasons[f"mosaic_{platform}"]
        assert reason.startswith(f"its kernels are for a {platform.upper()}, and JAX")


def test_the_report_depends_on_the_size_and_reads_well(capsys):
    command.main(["--tokens", "65536", "--dtype", "bfloat16"])
    shown = capsys.readouterr().out
    assert "8 heads of 65536 tokens x 64, bfloat16: takes streaming" in shown
    assert re.search(r"^reference +can run$", shown, re.M)
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int32"], "choose from"),
        (["--tokens", "0"], "must be at least 1, got 0"),
        (["--heads", "x"], "--heads: must be an integer of at least 1, got 'x'"),
        (["--num-iters", "-1"], "negative"),
    ],
)
def test_bad_sizes_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        command.main(options)
    assert message in capsys.readouterr().err


def test_the_report_is_of_float64_whether_or_not_x64_is_on(capsys):
    options = ["--tokens", "16", "--dtype", "float64"]
    for is_on in (False, True):
        with jax.enable_x64(is_on):
            command.main(options)
        assert "x 64, float64: takes" in capsys.readouterr().out
