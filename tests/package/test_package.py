"""What the package needs to be imported, and what its front page promises."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def run(code):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


def test_import_needs_only_jax_and_jaxtyping():
    blocked = ["flax", "optax", "chex", "matplotlib", "tqdm", "tyro", "tokenizers"]
    blocked += ["grain", "sklearn", "tensorflow_datasets"]
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked}))"
    done = run(f"{code}; import sinkhorn_jax, sinkhorn_jax.collapse")
    assert done.returncode == 0, done.stderr


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
        # Nothing of a `make` that runs the tests.
        env={k: v for k, v in os.environ.items() if not k.startswith("MAKE")},
    )
    commands = ["pytest --platform gpu", "benchmarks --sweeps gpu"]
    commands += ["benchmarks.gpu_block_search", "benchmarks.matrices --platform gpu"]
    lines = done.stdout.replace("\\\n", " ").splitlines()
    assert len(lines) == len(commands)
    for line, command in zip(lines, commands, strict=True):
        assert f"/elsewhere/python -m {command} " in line


def test_public_names_are_documented():
    import sinkhorn_jax

    for name in dir(sinkhorn_jax):
        if not name.startswith("_") and callable(value := getattr(sinkhorn_jax, name)):
            assert value.__doc__, name
