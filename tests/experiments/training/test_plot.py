"""The figure of runs."""

import matplotlib.image
import pytest

from experiments.training import plot


def test_plot(uninterrupted, tmp_path):
    path = tmp_path / "run.png"
    plot.run(plot.Config(runs=(uninterrupted[0],), output=path))
    assert matplotlib.image.imread(path).std() > 0.01
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl"):
        plot.run(plot.Config(runs=(tmp_path,), output=path))
