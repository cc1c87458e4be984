"""The output folder: which runs may use it."""

import dataclasses
import shutil

import filelock
import pytest
from support.training_runs import in_process, tiny

from experiments.training import train


@pytest.mark.few(1)
def test_a_finished_run_is_read_and_another_folder_is_asked_for(
    uninterrupted, data_dir
):
    folder, result = uninterrupted
    assert train.run(tiny(folder, data_dir, resume=True)) == result
    with pytest.raises(FileExistsError, match="Continue it with --resume"):
        train.run(tiny(folder, data_dir))
    with pytest.raises(ValueError, match="width 8 -> 16"):
        train.run(tiny(folder, data_dir, resume=True, width=16))


def test_a_run_that_could_not_start_leaves_its_folder_free(tmp_path, data_dir):
    config = tiny(tmp_path / "run", data_dir, num_measured=0, num_steps=2)
    with pytest.raises(ValueError, match="num_train"):
        train.run(dataclasses.replace(config, num_train=10**6))
    train.run(config)


def test_an_unwritable_folder_is_refused(tmp_path, data_dir):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"written into .*file.run \(Not a directory\)"):
        train.run(tiny(tmp_path / "file" / "run", data_dir))


def test_nothing_is_resumed_where_nothing_is(tmp_path, data_dir):
    with pytest.raises(FileNotFoundError, match="holds no run to resume"):
        train.run(tiny(tmp_path / "run", data_dir, resume=True))
    assert not (tmp_path / "run").exists()


def test_two_runs_do_not_share_a_folder(uninterrupted, tmp_path, data_dir):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted[0], folder)
    (folder / "result.json").unlink()
    with filelock.FileLock(folder / ".lock"):
        script = in_process(tiny(folder, data_dir, resume=True))
        output, _ = script.communicate(timeout=240)
    assert script.returncode == 1
    assert f"Another process trains in {folder}" in output
