"""What importing the package needs, and what its README promises."""

import os
import pathlib
import re
import subprocess
import sys
from typing import get_args

import pytest

import sinkhorn_jax
from sinkhorn_jax import attention, matrix
from sinkhorn_jax.attention._call import AttentionImplementation
from sinkhorn_jax.matrix._api import MatrixImplementation

ROOT = pathlib.Path(__file__).parents[2]


def run(code):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


CALL_EVERY_FUNCTION = """
import jax.numpy as jnp
import sinkhorn_jax
from sinkhorn_jax import collapse

tokens = jnp.ones((2, 4, 2, 8))
plan = sinkhorn_jax.sinkhorn(tokens[..., 0, :])
sinkhorn_jax.sinkhorn_potentials(tokens[..., 0, :], tolerance=1e-3)
sinkhorn_jax.sinkhorn_attention(tokens, tokens, tokens)
collapse.attention_entropy(plan)
collapse.effective_rank(plan)
collapse.relative_residual(plan)
"""

# What `pip install sinkhorn_jax` installs: JAX, jaxtyping, and what they require.
INSTALLED = {"jax", "jaxlib", "jaxtyping", "wadler_lindig"}
INSTALLED |= {"numpy", "scipy", "ml_dtypes", "opt_einsum"}
REFUSE_OTHERS = f"""
import sys
from importlib.machinery import PathFinder

class OnlyInstalled(PathFinder):
    allowed = sys.stdlib_module_names | {INSTALLED | {"sinkhorn_jax"}}

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        top = name.partition(".")[0]
        # The name of one module of Python depends on the platform.
        if top in cls.allowed or top.startswith("_sysconfigdata"):
            return super().find_spec(name, path, target)

sys.meta_path = [OnlyInstalled if x is PathFinder else x for x in sys.meta_path]
"""


def test_only_jax_and_jaxtyping_need_to_be_installed():
    done = run(f"{REFUSE_OTHERS}\nimport absl")
    assert "No module named 'absl'" in done.stderr
    done = run(f"{REFUSE_OTHERS}\n{CALL_EVERY_FUNCTION}")
    assert done.returncode == 0, done.stderr


def test_kernels_are_imported_only_when_they_are_named():
    names = "{name for name in sys.modules if 'pallas' in name}"
    done = run(f"{CALL_EVERY_FUNCTION}\nimport sys\nprint({names})")
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_layers_import_no_kernels(framework):
    """Flax itself imports parts of Pallas."""
    names = "{name for name in sys.modules if 'pallas' in name}"
    done = run(
        f"import sys\nfrom flax import {framework}\nbefore = {names}\n"
        f"import sinkhorn_jax.{framework}\nprint({names} - before)"
    )
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize(
    ("table", "names", "function"),
    [
        (matrix.IMPLEMENTATIONS, MatrixImplementation, sinkhorn_jax.sinkhorn),
        (
            attention.IMPLEMENTATIONS,
            AttentionImplementation,
            sinkhorn_jax.sinkhorn_attention,
        ),
    ],
)
def test_tables_types_and_docstrings_name_the_same_implementations(
    table, names, function
):
    assert tuple(table) == get_args(names)
    assert list(table)[-1] == "reference"
    described = function.__doc__.partition("implementation:")[2]
    for name in table:
        assert f'"{name}"' in described


def test_readme_examples_run():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) < 150
    code = "\n".join(re.findall(r"```python\n(.*?)```", readme, re.DOTALL))
    done = run(code)
    assert done.returncode == 0, done.stderr
    rows, cols = map(float, done.stdout.split())
    assert abs(rows - 1) < 1e-5
    assert abs(cols - 1) < 1e-5


def test_the_tests_can_ask_for_a_platform():
    arguments = ["-p", "no:cacheprovider", "--platform", "abacus", "-n0", __file__]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--platform abacus: JAX finds no ABACUS here" in done.stderr


def test_what_a_gpu_is_needed_for_runs_in_an_environment_that_is_there():
    done = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "gpu", "BIN=/elsewhere"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        # Without the variables of a `make` that runs the tests.
        env={k: v for k, v in os.environ.items() if not k.startswith("MAKE")},
    )
    commands = ["pytest --platform gpu", "benchmarks --sweeps gpu"]
    commands += ["benchmarks gpu_block_search", "benchmarks matrices --platform gpu"]
    lines = done.stdout.replace("\\\n", " ").splitlines()
    assert len(lines) == len(commands)
    for line, command in zip(lines, commands, strict=True):
        assert f"/elsewhere/python -m {command} " in line


def test_overloads_have_the_arguments_of_the_function():
    done = run(
        """
import inspect
import typing
from sinkhorn_jax import sinkhorn_attention
names = lambda f: [(p.name, p.kind) for p in inspect.signature(f).parameters.values()]
overloads = typing.get_overloads(sinkhorn_attention)
print([names(f) == names(sinkhorn_attention) for f in overloads])
"""
    )
    assert done.stdout == "[True, True, True]\n", done.stderr


def test_public_names_are_documented():
    for name in dir(sinkhorn_jax):
        if not name.startswith("_") and callable(value := getattr(sinkhorn_jax, name)):
            assert value.__doc__, name
