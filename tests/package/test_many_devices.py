"""Runs tests/many_devices: JAX simulates devices only from its start."""

import os
import pathlib
import subprocess
import sys

import pytest
from support.xla_flags import EIGHT_DEVICES

TESTS = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted((TESTS / "many_devices").glob("test_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_on_eight_devices(file, request):
    flags = f"{os.environ['XLA_FLAGS']} {EIGHT_DEVICES}"
    environment = os.environ | {"XLA_FLAGS": flags}
    chosen = ["-m", request.config.option.markexpr]
    command = [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        [*command, *chosen, str(file)],
        env=environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-1000:]
