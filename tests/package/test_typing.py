"""What a type checker says about a program that uses the package."""

import json
import pathlib
import subprocess
import sys

import pytest

RIGHT = """
import jax
import jax.numpy as jnp
from sinkhorn_jax import Potentials, Truncated, sinkhorn_attention, sinkhorn_potentials

x = jnp.ones((1, 4, 2, 8))
out: jax.Array = sinkhorn_attention(x, x, x, num_iters=3, gradient=Truncated(1))
pair: tuple[jax.Array, jax.Array] = sinkhorn_attention(
    x, x, x, return_marginal_error=True
)
found: Potentials = sinkhorn_potentials(x, tolerance=1e-3)
"""
WRONG = "sinkhorn_attention(x, x, x, num_iter=3)\n"


@pytest.mark.parametrize(("wrong", "num_errors"), [("", 0), (WRONG, 1)])
def test_a_program_of_a_user(tmp_path, wrong, num_errors):
    program = tmp_path / "program.py"
    program.write_text(RIGHT + wrong)
    checker = pathlib.Path(sys.executable).with_name("basedpyright")
    if not checker.exists():
        pytest.skip("basedpyright is not installed")
    options = ["--outputjson", "--pythonpath", sys.executable, str(program)]
    run = subprocess.run([checker, *options], capture_output=True, text=True)
    found = json.loads(run.stdout)["generalDiagnostics"]
    errors = [each["message"] for each in found if each["severity"] == "error"]
    assert len(errors) == num_errors, errors
