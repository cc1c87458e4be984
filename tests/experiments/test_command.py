"""The command line: which question runs with which options, and what it refuses."""

import jax
import pytest

from experiments import __main__ as command
from experiments.evidence import files
from experiments.questions import (
    bounds,
    convergence,
    doubly_exponential,
    iterations,
    length,
    paths,
    rank_decay,
    swap,
    temperature,
)
from experiments.registry import COMMANDS


@pytest.fixture(autouse=True)
def _keep_optimisations():
    """What --quick switches off is on again for other tests."""
    before = jax.config.read("jax_disable_most_optimizations")
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def configs(monkeypatch):
    """The configurations with which questions are run, in place of running them."""
    seen = []
    for name in COMMANDS:
        monkeypatch.setattr(COMMANDS[name].load(), "run", seen.append)
    return seen


def test_options_change_the_defaults(configs):
    command.main(["rank_decay"])
    command.main(["rank_decay", "--depth", "3", "--seeds", "4", "5"])
    default, changed = configs
    assert default == rank_decay.Config()
    assert (changed.depth, changed.seeds) == (3, (4, 5))


def test_quick_has_small_numbers_and_a_folder_of_its_own(configs):
    command.main(["rank_decay", "--quick", "--depth", "3"])
    (quick,) = configs
    assert quick.depth == 3
    assert quick.num_steps == rank_decay.QUICK.num_steps
    assert quick.output != rank_decay.Config().output


@pytest.mark.parametrize(
    ("question", "option", "value"),
    [
        (doubly_exponential, "depth", 12),
        (bounds, "depth", 3),
        (paths, "depth", 4),
        (convergence, "enough", 20),
        *((question, "num_steps", 7) for question in (iterations, length)),
        *((question, "num_steps", 7) for question in (swap, temperature)),
    ],
)
def test_every_question_takes_options(question, option, value, configs):
    name = question.__name__.rpartition(".")[-1]
    command.main([name, f"--{option.replace('_', '-')}", str(value)])
    assert configs == [question.Config(**{option: value})]


def test_help_names_every_question_in_a_line(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, entry in COMMANDS.items():
        assert f"• {name} {entry.load().__doc__.splitlines()[0]}" in shown
    assert "--num-steps" not in shown


def test_the_help_of_a_question_has_its_options_and_its_docstring(capsys):
    with pytest.raises(SystemExit):
        command.main(["rank_decay", "--help"])
    shown = capsys.readouterr().out
    assert "--num-steps" in shown
    assert "https://arxiv.org/abs/2103.03404" in shown


def test_an_unknown_name_is_refused_with_those_that_are_near(capsys):
    with pytest.raises(SystemExit):
        command.main(["rank_decai"])
    assert "rank_decay" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["rank_decay", "--num-step", "3"])
    assert "--num-steps" in capsys.readouterr().err


def test_what_was_refused_is_shown_without_a_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(
        rank_decay, "run", lambda config: rank_decay.Config(depth=config.depth - 99)
    )
    with pytest.raises(SystemExit, match="error: depth must be at least 1, got -93"):
        command.main(["rank_decay"])
    missing = tmp_path / "missing" / "a.json"
    monkeypatch.setattr(rank_decay, "run", lambda config: files.write_json(missing, {}))
    with pytest.raises(SystemExit, match=r"error: .*No such file.*missing"):
        command.main(["rank_decay"])


def test_a_defect_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(rank_decay, "run", lambda config: {}["depth"])
    with pytest.raises(KeyError):
        command.main(["rank_decay"])


def test_runs_write_where_git_looks_away():
    for name, entry in COMMANDS.items():
        module = entry.load()
        for config in (module.Config(), module.QUICK):
            folder = getattr(config, "folder", config.output)
            if name != "plot":
                assert folder.is_relative_to(files.RUNS)
