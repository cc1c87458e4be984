"""Runs that were killed, or lost checkpoints, and go on bit-identically."""

import dataclasses
import os
import shutil
import signal
import time

import numpy as np
import pytest
from support.training_runs import in_process, metrics, tiny

from experiments.training import train


@pytest.mark.slow
@pytest.mark.parametrize("record_number", [4, pytest.param(9, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_bit_identically(
    record_number, uninterrupted, tmp_path, data_dir
):
    folder = tmp_path / "killed"
    config = tiny(folder, data_dir)
    # A real kill -9 of the process by itself, in the middle of writing a record.
    code = (
        "import os, signal\n"
        "from experiments.training import metrics\n"
        "write, count = metrics.MetricsLog.write, [0]\n"
        "def killing(self, **record):\n"
        "    count[0] += 1\n"
        f"    if count[0] == {record_number}:\n"
        "        self._file.write('{\"step\": '); self._file.flush()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    write(self, **record)\n"
        "metrics.MetricsLog.write = killing\n"
    )
    process = in_process(config, code)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == -signal.SIGKILL, output
    assert not (folder / "result.json").exists()
    train.run(dataclasses.replace(config, resume=True))
    assert metrics(folder) == metrics(uninterrupted[0])


@pytest.fixture(scope="module")
def long(tmp_path_factory, data_dir):
    """The options of a run of 400 updates that has ended."""
    folder = tmp_path_factory.mktemp("runs") / "long"
    config = tiny(folder, data_dir, num_steps=400, num_measured=0)
    train.run(config)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.3, 1.6, 2.0])
def test_a_run_killed_at_any_moment_resumes_bit_identically(delay, tmp_path, long):
    config = dataclasses.replace(long, output=tmp_path / "killed")
    process = in_process(config)
    while not (tmp_path / "killed" / "metrics.jsonl").exists():
        time.sleep(0.01)
    time.sleep(delay)
    process.kill()
    process.communicate()
    train.run(dataclasses.replace(config, resume=True))
    assert metrics(config.output) == metrics(long.output)


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_run_asked_to_end_keeps_its_last_update(
    number, status, uninterrupted, tmp_path, data_dir
):
    folder = tmp_path / "asked"
    config = tiny(folder, data_dir)
    # In the middle of the fifth update: the checkpoint before was of the fourth, and
    # the losses of two updates make one record.
    code = (
        "import os\n"
        "from experiments.training import fit\n"
        "update, count = fit.Training.update, [0]\n"
        "def asking(self, state, batch):\n"
        "    count[0] += 1\n"
        "    if count[0] == 5:\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "    return update(self, state, batch)\n"
        "fit.Training.update = asking\n"
    )
    process = in_process(config, code)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == status, output
    assert "Interrupted after step 5, which is kept. Continue with --resume" in output
    assert (folder / "checkpoints" / "5").is_dir()
    train.run(dataclasses.replace(config, resume=True))
    assert metrics(folder) == metrics(uninterrupted[0])


def test_other_data_are_refused(uninterrupted, tmp_path, data_dir, monkeypatch):
    folder = unfinished(tmp_path / "run", uninterrupted)

    def other(config):
        data = load_data(config)
        swapped = np.arange(len(data.train))
        swapped[:2] = 1, 0
        return dataclasses.replace(data, train=data.train.take(swapped))

    load_data = train.load_data
    monkeypatch.setattr(train, "load_data", other)
    with pytest.raises(ValueError, match="training data of digits have changed"):
        train.run(tiny(folder, data_dir, resume=True))


def unfinished(folder, uninterrupted):
    """A copy of the whole run as if it had been killed before its result."""
    shutil.copytree(uninterrupted[0], folder)
    (folder / "result.json").unlink()
    return folder


def test_a_run_killed_after_its_test_resumes_bit_identically(
    uninterrupted, tmp_path, data_dir
):
    folder = unfinished(tmp_path / "run", uninterrupted)
    result = train.run(tiny(folder, data_dir, resume=True))
    assert metrics(folder) == metrics(uninterrupted[0])
    assert result["test_accuracy"] == uninterrupted[1]["test_accuracy"]


def damage(folder, step):
    """Cuts every file of the arrays of a checkpoint in half."""
    files = [p for p in (folder / "checkpoints" / str(step)).rglob("*") if p.is_file()]
    assert files
    for path in files:
        os.truncate(path, path.stat().st_size // 2)


def test_a_truncated_checkpoint_falls_back_to_the_one_before(
    uninterrupted, tmp_path, data_dir
):
    folder = unfinished(tmp_path / "run", uninterrupted)
    damage(folder, 12)
    config = tiny(folder, data_dir, resume=True)
    with pytest.warns(UserWarning, match="step 12 .* cannot be read.*one before"):
        train.run(config)
    assert metrics(folder) == metrics(uninterrupted[0])
    (folder / "result.json").unlink()
    damage(folder, 8)
    damage(folder, 12)
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(OSError, match="None of the checkpoints of steps"),
    ):
        train.run(config)


@pytest.mark.slow
def test_a_full_disk_loses_no_finished_checkpoint(uninterrupted, tmp_path, data_dir):
    folder = tmp_path / "full"
    config = tiny(folder, data_dir)
    # No file may grow beyond a kilobyte from the second checkpoint on.
    code = (
        "import resource\n"
        "from experiments.training import checkpoints\n"
        "save = checkpoints.Checkpoints.save\n"
        "def filling(self, step, state, host):\n"
        "    if step > 4:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))\n"
        "    save(self, step, state, host)\n"
        "checkpoints.Checkpoints.save = filling\n"
    )
    output, _ = in_process(config, code).communicate(timeout=240)
    assert "The checkpoint of step 8 could not be written" in output
    assert "[4] are kept" in output
    train.run(dataclasses.replace(config, resume=True))
    assert metrics(folder) == metrics(uninterrupted[0])
