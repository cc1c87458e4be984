"""The command line: its commands, their options, and what a typing error gives."""

import pytest

from benchmarks import __main__ as command
from benchmarks import attention, gpu_block_search, matrices
from benchmarks.ahead_of_time import gpu, tpu
from benchmarks.report import readme


@pytest.fixture
def ran(monkeypatch):
    """The configurations that commands were run with."""
    configs = []
    for module in command.COMMANDS.values():
        monkeypatch.setattr(module, "run", configs.append)
    return configs


def test_without_a_command_attention_is_measured(ran):
    command.main([])
    options = "--sweeps heads tokens --cases 2x4096 32x512 --implementations scaling"
    command.main(f"{options} pot --repeats 7".split())
    command.main(["attention", "--quick"])
    assert ran == [
        attention.Config(),
        attention.Config(
            sweeps=("heads", "tokens"),
            cases=("2x4096", "32x512"),
            implementations=("scaling", "pot"),
            repeats=7,
        ),
        attention.Config(quick=True),
    ]


def test_commands_are_named(ran):
    command.main(["matrices", "--sizes", "4", "16", "--platform", "gpu"])
    command.main(["gpu_block_search", "--cases", "128x512"])
    command.main(["readme"])
    assert ran == [
        matrices.Config(sizes=(4, 16), platform="gpu"),
        gpu_block_search.Config(cases=("128x512",)),
        readme.Config(),
    ]


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in command.COMMANDS)
    assert len(printed.splitlines()) < 24


@pytest.mark.parametrize(
    ("main", "args", "message"),
    [
        (command.main, ["--quik"], "no option --quik; the nearest is --quick"),
        (command.main, ["matrices", "--sise"], "--sise; the nearest is --sizes"),
        (tpu.main, ["--libtp", "x"], "--libtp; the nearest is --libtpu"),
        (gpu.main, ["--onyl", "x"], "--onyl; the nearest is --only"),
    ],
)
def test_an_unknown_option_is_one_line_that_names_the_nearest(main, args, message):
    with pytest.raises(SystemExit) as error:
        main(args)
    assert message in error.value.code
    assert "\n" not in error.value.code
