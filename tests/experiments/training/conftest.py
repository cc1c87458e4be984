"""What the tests of training share: prepared data and one whole run."""

import pytest
from support.training_runs import TINY, tiny

from experiments.data import load
from experiments.training import train


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Where the digits are prepared, once for all tests."""
    path = tmp_path_factory.mktemp("tensorflow_datasets")
    load(TINY.task, data_dir=path)
    return path


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, data_dir):
    """Folder and result of a run from start to end."""
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    return folder, train.run(tiny(folder, data_dir))
