"""Options of the benchmarks' commands, with tyro and where it is not installed."""

import importlib.util
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import collapse_measures as measures
from benchmarks import gpu_block_search as search_blocks
from benchmarks import matrices
from benchmarks.ahead_of_time import gpu as compile_gpu
from benchmarks.ahead_of_time import tpu as compile_tpu
from benchmarks.harness import command as _command

COMMANDS = [
    (benchmarks, []),
    (benchmarks, ["--quick", "--repeats", "7", "--no-single-head-memory"]),
    (
        benchmarks,
        ["--sweeps", "gpu", "--dtypes", "float16", "--cases", "128x128", "128x256"],
    ),
    (matrices, ["--sizes", "4", "16", "--bandwidth-gb-s", "1e3", "--platform", "gpu"]),
    (measures, ["--num-layers", "3", "--output", "a/b.json"]),
    (search_blocks, ["--cases", "128x512", "--budget-s", "0.5"]),
    (compile_tpu, ["--libtpu", "some/folder"]),
    (compile_gpu, ["--cuda", "some/folder", "--tokens", "64", "--few-tokens"]),
]


@pytest.mark.parametrize(("module", "args"), COMMANDS)
def test_without_tyro_the_options_are_the_same(monkeypatch, module, args):
    with_tyro = _command.parse(module.Config, module.__doc__, args)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert _command.parse(module.Config, module.__doc__, args) == with_tyro


def test_without_tyro_options_are_checked(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    parse = lambda *args: _command.parse(matrices.Config, matrices.__doc__, args)
    assert parse("--output", "a.jsonl").output == Path("a.jsonl")
    assert parse("--sizes", "8").sizes == (8,)
    for args in (["--sizes", "four"], ["--size", "4"], ["--no-quick", "1"]):
        with pytest.raises(SystemExit):
            parse(*args)
    with pytest.raises(SystemExit):
        parse("--help")
    printed = capsys.readouterr().out
    assert "65,536 matrices" in printed
    assert "--bandwidth-gb-s" in printed
