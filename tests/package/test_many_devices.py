"""Runs tests/many_devices: JAX simulates devices only from its start."""

import os
import pathlib
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted((TESTS / "many_devices").glob("test_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_on_eight_devices(file, request):
    devices = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {devices}"}
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
