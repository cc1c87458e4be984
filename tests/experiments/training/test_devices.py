"""Training on several devices, and by several processes."""

import dataclasses
import json
import socket

import numpy as np
import pytest
from support.training_runs import in_process, metrics, run_python, tiny

from experiments.training import train
from experiments.training.devices import Devices
from experiments.training.metrics import read_metrics

# Prints whether the compiled step has each kind of communication, and the loss.
PROGRAM = """
import dataclasses
import jax
import numpy as np
from experiments.data import Data, Examples
from experiments.training import fit
from experiments.training.presets import PRESETS
from experiments.training.devices import Devices
jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
config = dataclasses.replace(
    PRESETS["digits"], depth=2, width=8, num_heads=2, mlp_width=8, batch_size=8,
    num_steps=4, num_iters=2,
)
rng = np.random.default_rng(0)
examples = Examples(
    inputs=rng.integers(0, 255, (16, 8, 8, 1)).astype(np.uint8), lengths=None,
    labels=np.arange(16).astype(np.int32) % 10,
)
data = Data(name="x", train=examples, validation=examples, test=examples,
            num_classes=10, vocab_size=None)
devices = Devices()
assert jax.device_count() == NUM_DEVICES
training = fit.Training(config, data, devices)
args = training.arguments
batch = devices.place_part(next(training.batches()))
text = fit.train_step.lower(*args, training.init(), batch).compile().as_text()
print("all-reduce" in text, "all-gather" in text, "all-to-all" in text)
_, loss = fit.train_step(*args, training.init(), batch)
print(f"{float(loss):.5f}")
"""


def communication_and_loss(num_devices):
    process = run_python(PROGRAM.replace("NUM_DEVICES", str(num_devices)))
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    *communication, loss = output.split()
    return communication, float(loss)


def test_the_step_is_divided_over_devices_and_gathers_nothing():
    four, loss = communication_and_loss(4)
    assert four == ["True", "False", "False"]
    one, expected = communication_and_loss(1)
    assert one == ["False"] * 3
    np.testing.assert_allclose(loss, expected, atol=1e-4)


@pytest.mark.slow
def test_two_processes_train_together(tmp_path, data_dir):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tiny(
        tmp_path / "two",
        data_dir,
        coordinator=f"127.0.0.1:{port}",
        num_processes=2,
        num_measured=0,
    )
    processes = [
        in_process(dataclasses.replace(config, process_id=i)) for i in range(2)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    # One process can go on with what two have begun, and another run is refused.
    (tmp_path / "two" / "result.json").rename(tmp_path / "result.json")
    before = metrics(tmp_path / "two").splitlines()
    alone = dataclasses.replace(config, coordinator=None, num_processes=1, resume=True)
    train.run(alone)
    after = metrics(tmp_path / "two").splitlines()
    # But for the roundings of the test split, which was divided.
    assert (after[:-1], len(after)) == (before[:-1], len(before))
    (tmp_path / "result.json").rename(tmp_path / "two" / "result.json")
    with pytest.raises(FileExistsError, match="holds a run"):
        train.run(dataclasses.replace(config, coordinator=None, num_processes=2))
    records = read_metrics(tmp_path / "two" / "metrics.jsonl")
    assert [r["step"] for r in records if r["split"] == "validation"] == [6, 12]
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["environment"]["device"].startswith("2 x cpu")


def test_batches_that_cannot_be_divided_are_refused():
    devices = Devices()
    with pytest.raises(ValueError, match="batch_size must be a positive multiple"):
        devices.check(batch_size=0)
