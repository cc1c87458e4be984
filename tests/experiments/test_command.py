"""The command line: which question runs with which options, and what it refuses."""

import dataclasses

import jax
import pytest

from experiments import __main__ as command
from experiments.evidence import files
from experiments.questions import (
    bounds,
    convergence,
    demo,
    doubly_exponential,
    paths,
    step_cost,
    study,
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
    command.main(["swap"])
    command.main(["swap", "--depth", "3", "--seeds", "4", "5"])
    default, changed = configs
    assert default == swap.Config()
    assert (changed.depth, changed.seeds) == (3, (4, 5))


def test_sizes_of_the_study_are_options(configs):
    command.main(["study", "--text.num-steps", "24", "--rates", "0.001", "0.002"])
    command.main(["study", "--preset", "vit", "--images.seeds", "7"])
    command.main(["demo", "--sizes.seeds", "3", "--num-iters", "5"])
    command.main(["step_cost", "--num-rounds", "3"])
    text, vit, small, timed = configs
    sizes = dataclasses.replace(study.plan.TEXT, num_steps=24)
    assert text == study.Config(text=sizes, rates=(0.001, 0.002))
    images = dataclasses.replace(study.VIT, seeds=(7,))
    assert vit == dataclasses.replace(study.PRESETS["vit"], images=images)
    assert small == demo.Config(
        sizes=dataclasses.replace(demo.SIZES, seeds=(3,)), num_iters=5
    )
    assert timed == step_cost.Config(num_rounds=3)


def test_quick_has_small_numbers_and_a_folder_of_its_own(configs):
    command.main(["paths", "--quick", "--depth", "3"])
    (quick,) = configs
    assert quick.depth == 3
    assert quick.num_paths == paths.QUICK.num_paths < paths.Config().num_paths
    assert quick.output != paths.Config().output


@pytest.mark.parametrize(
    ("question", "option", "value"),
    [
        (doubly_exponential, "depth", 12),
        (bounds, "depth", 3),
        (paths, "depth", 4),
        (convergence, "enough", 20),
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
        command.main(["study", "--help"])
    shown = capsys.readouterr().out
    assert "--text.num-steps" in shown
    assert "https://arxiv.org/abs/2604.07925" in shown


def test_an_unknown_name_is_refused_with_those_that_are_near(capsys):
    with pytest.raises(SystemExit):
        command.main(["temperatur"])
    assert "temperature" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["temperature", "--num-step", "3"])
    assert "--num-steps" in capsys.readouterr().err


def test_what_was_refused_is_shown_without_a_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(
        paths, "run", lambda config: paths.Config(depth=config.depth - 99)
    )
    with pytest.raises(SystemExit, match="error: depth must be at least 1, got -87"):
        command.main(["paths"])
    missing = tmp_path / "missing" / "a.json"
    monkeypatch.setattr(paths, "run", lambda config: files.write_json(missing, {}))
    with pytest.raises(SystemExit, match=r"error: .*No such file.*missing"):
        command.main(["paths"])


def test_a_defect_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(paths, "run", lambda config: {}["depth"])
    with pytest.raises(KeyError):
        command.main(["paths"])


def test_runs_write_where_git_looks_away():
    for name, entry in COMMANDS.items():
        module = entry.load()
        for config in (module.Config(), module.QUICK):
            folder = getattr(config, "folder", config.output)
            if name != "plot":
                assert folder.is_relative_to(files.RUNS)
