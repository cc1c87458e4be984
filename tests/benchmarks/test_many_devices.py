"""The count of messages and memory of divided tokens."""

import json
import subprocess
import sys

from benchmarks import many_devices
from benchmarks.harness import machine


def test_a_smoke_run(tmp_path):
    """In a process of its own, in which JAX has not started."""
    options = ["--quick", "--output", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks", "many_devices", *options]
    subprocess.run(command, cwd=machine.ROOT, check=True, capture_output=True)
    mixed, ulysses = json.loads((tmp_path / "rows.json").read_text())
    assert mixed["messages"]["all-reduce"] == 2 * mixed["num_iters"] + 1
    # The column maxima, the column sums with the number of rows, and their cotangents.
    tokens, (with_count, without) = mixed["tokens"], (2, mixed["num_iters"] * 2 - 1)
    numbers = with_count * (tokens + 1) + without * tokens
    assert mixed["message_bytes"]["all-reduce"] == 4 * numbers
    assert ulysses["messages"] == {"all-to-all": 8}


def test_the_page_shows_the_committed_rows():
    rows = json.loads((many_devices.RESULTS / "rows.json").read_text())
    text = many_devices.PAGE.read_text(encoding="utf-8")
    assert many_devices.page(text, rows) == text


def test_times_grow_as_they_should():
    call = many_devices.Call("mixed", 8, 4096, 2, 10)
    device = many_devices.DEVICES[0]
    once, twice = (
        many_devices.seconds(device, call._replace(tokens=tokens), 64)
        for tokens in (4096, 8192)
    )
    assert twice["products"] == 4 * once["products"]
    assert twice["exponentials"] == 4 * once["exponentials"]
    assert twice["messages"] == 2 * once["messages"]
