"""Training: steps, checkpoints, resumption, several devices and processes."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from experiments import __main__ as command
from experiments import training as trainer
from experiments.evidence import files as record
from experiments.networks import encoder as models
from experiments.networks.encoder import Encoder
from experiments.training import plot, train

ROOT = pathlib.Path(__file__).parents[3]

# A run of seconds: compilation is most of it.
TINY = dataclasses.replace(
    train.PRESETS["digits"],
    num_iters=2,
    depth=1,
    width=8,
    num_heads=2,
    mlp_width=8,
    num_train=64,
    num_steps=12,
    batch_size=8,
    eval_every=6,
    checkpoint_every=4,
    log_every=2,
    num_measured=4,
    dropout_rate=0.1,
    max_shift=1,
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Where the digits are prepared, once for all tests of this file."""
    path = tmp_path_factory.mktemp("tensorflow_datasets")
    train.load_data(dataclasses.replace(TINY, data_dir=path))
    return path


def tiny(folder, data_dir, **options):
    return dataclasses.replace(TINY, output=folder, data_dir=data_dir, **options)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data_dir):
    """Folder and result of a run from start to end."""
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    return folder, train.run(tiny(folder, data_dir))


def metrics(folder):
    return (folder / "metrics.jsonl").read_bytes()


def in_process(config, code="", **environment):
    """The run of `config` in a process of its own, after `code`."""
    options = {k: v for k, v in vars_of(config).items()}
    script = (
        "import dataclasses, pathlib, json, sys\n"
        "import jax\n"
        # As in this process, or the numbers would be others.
        "jax.config.update('jax_enable_x64', True)\n"
        "from experiments import train\n"
        f"options = {options!r}\n"
        "for name in ('output', 'data_dir'):\n"
        "    options[name] = pathlib.Path(options[name])\n"
        "config = train.Config(**options)\n"
        f"{code}\n"
        "train.run(config)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def vars_of(config):
    options = dataclasses.asdict(config)
    return options | {k: str(options[k]) for k in ("output", "data_dir")}


# A run.


def test_a_run_from_its_options_to_its_files(uninterrupted):
    folder, result = uninterrupted
    assert json.loads((folder / "result.json").read_text()) == result
    assert json.loads((folder / "config.json").read_text())["num_steps"] == 12
    records = trainer.read_metrics(folder / "metrics.jsonl")
    assert [r["step"] for r in records if r["split"] == "train"] == [2, 4, 6, 8, 10, 12]
    assert [r["step"] for r in records if r["split"] == "validation"] == [6, 12]
    (test,) = (r for r in records if r["split"] == "test")
    assert test["accuracy"] == result["test_accuracy"]
    best = max(r["accuracy"] for r in records if r["split"] == "validation")
    assert result["validation_accuracy"] == best
    rates = [r["learning_rate"] for r in records if r["split"] == "train"]
    assert max(rates) <= TINY.learning_rate
    assert rates[-1] < rates[1]
    for phase in ("init", "trained"):
        assert np.shape(result[phase]["relative_residual"]) == (2,)
        assert np.shape(result[phase]["attention_entropy"]) == (1,)
    assert result["num_parameters"] > 0
    assert result["environment"]["jax"] == jax.__version__


def test_the_same_seed_gives_the_same_curve_and_another_another(
    uninterrupted, tmp_path, data_dir
):
    train.run(tiny(tmp_path / "again", data_dir))
    assert metrics(tmp_path / "again") == metrics(uninterrupted[0])
    train.run(tiny(tmp_path / "other", data_dir, seed=1, num_measured=0))
    assert metrics(tmp_path / "other") != metrics(uninterrupted[0])


def test_a_finished_run_is_read_and_another_folder_is_asked_for(
    uninterrupted, data_dir
):
    folder, result = uninterrupted
    assert train.run(tiny(folder, data_dir, resume=True)) == result
    with pytest.raises(FileExistsError, match="Continue it with --resume"):
        train.run(tiny(folder, data_dir))
    with pytest.raises(ValueError, match="width 8 -> 16"):
        train.run(tiny(folder, data_dir, resume=True, width=16))


def test_early_stopping(tmp_path, data_dir):
    # At this rate nothing improves after the first evaluation.
    options = dict(learning_rate=1e-12, eval_every=2, patience=2, num_measured=0)
    result = train.run(tiny(tmp_path / "run", data_dir, **options))
    assert result["num_steps"] < 12
    assert result["num_steps"] == result["best_step"] + 4


@pytest.mark.parametrize(
    "options",
    [
        {"has_scan": False, "has_remat": True, "pooling": "class_token"},
        {"dtype": "bfloat16", "position": "sinusoidal", "layer_norm": "post"},
        {"has_mlp": False, "has_skip": False, "has_mlp_skip": False},
        {"has_conv_stem": True, "dtype": "bfloat16"},
    ],
)
def test_switches_run(options, tmp_path, data_dir):
    options = dict(num_steps=2, checkpoint_every=2, **options)
    with jax.numpy_dtype_promotion("standard"):
        result = train.run(tiny(tmp_path / "run", data_dir, **options))
    assert np.isfinite(result["test_loss"])


def test_it_learns(tmp_path, data_dir):
    options = dict(
        width=32, mlp_width=32, num_train=None, num_steps=200, eval_every=100,
        checkpoint_every=100, dropout_rate=0.0, max_shift=0, batch_size=32,
    )  # fmt: skip
    result = train.run(tiny(tmp_path / "run", data_dir, **options))
    assert result["test_accuracy"] > 0.75


# Killed and resumed.


@pytest.mark.parametrize("record_number", [4, 9])
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


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.2, 0.5, 1.0, 2.0])
def test_a_run_killed_at_any_moment_resumes_bit_identically(delay, tmp_path, data_dir):
    whole = tiny(tmp_path / "whole", data_dir, num_steps=400, num_measured=0)
    train.run(whole)
    config = dataclasses.replace(whole, output=tmp_path / "killed")
    process = in_process(config)
    while not (tmp_path / "killed" / "metrics.jsonl").exists():
        time.sleep(0.01)
    time.sleep(delay)
    process.kill()
    process.communicate()
    train.run(dataclasses.replace(config, resume=True))
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


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


def test_a_run_that_could_not_start_leaves_its_folder_free(tmp_path, data_dir):
    config = tiny(tmp_path / "run", data_dir, num_measured=0, num_steps=2)
    with pytest.raises(ValueError, match="num_train"):
        train.run(dataclasses.replace(config, num_train=10**6))
    train.run(config)


def test_an_unwritable_folder_is_refused(tmp_path, data_dir):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        train.run(tiny(tmp_path / "file" / "run", data_dir))


# Several devices and processes.

PROGRAM = """
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from experiments import train, trainer
from experiments.data import Data, Examples
import dataclasses
config = dataclasses.replace(
    train.PRESETS["digits"], depth=2, width=8, num_heads=2, mlp_width=8, batch_size=8,
    num_steps=4, num_iters=2,
)
rng = np.random.default_rng(0)
examples = Examples(
    inputs=rng.integers(0, 255, (16, 8, 8, 1)).astype(np.uint8), lengths=None,
    labels=np.arange(16).astype(np.int32) % 10,
)
data = Data(name="x", train=examples, validation=examples, test=examples,
            num_classes=10, vocab_size=None)
devices = trainer.Devices()
assert devices.mesh.size == 4
training = train.Training(config, data, devices)
state = training.init()
batch = devices.place_part(next(training.batches()))
args = (training.model, training.optimization, config.skips, jax.random.key(0))
text = trainer.train_step.lower(*args, state, batch).compile().as_text()
print("all-reduce" in text, "all-gather" in text, "all-to-all" in text)
_, loss = trainer.train_step(*args, state, batch)
print(f"{float(loss):.5f}")
"""


def test_the_step_is_divided_over_devices_and_gathers_nothing():
    outputs = []
    for program in (PROGRAM, PROGRAM.replace("devices\", 4", "devices\", 1").replace(
        "size == 4", "size == 1"
    )):  # fmt: skip
        run = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert run.returncode == 0, run.stderr
        outputs.append(run.stdout.split())
    four, one = outputs
    assert four[:3] == ["True", "False", "False"]
    assert one[:3] == ["False"] * 3
    np.testing.assert_allclose(float(four[3]), float(one[3]), atol=1e-4)


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
    records = trainer.read_metrics(tmp_path / "two" / "metrics.jsonl")
    assert [r["step"] for r in records if r["split"] == "validation"] == [6, 12]
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["environment"]["device"].startswith("2 x cpu")


def test_batches_that_cannot_be_divided_are_refused():
    devices = trainer.Devices()
    with pytest.raises(ValueError, match="batch_size must be a positive multiple"):
        devices.check(batch_size=0)


# The encoder on images, and its switches.


def image_model(**options):
    sizes = dict(depth=2, width=8, num_heads=2, num_iters=2, num_classes=3)
    return Encoder(**sizes | {"patch_size": 2} | options)


def images(num=2, height=4, width=6, channels=1):
    shape = (num, height, width, channels)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_patches_are_squares():
    x = images(channels=2)
    actual = np.asarray(models.patches(jnp.asarray(x), 2))
    assert actual.shape == (2, 6, 8)
    np.testing.assert_array_equal(actual[1, 4].reshape(2, 2, 2), x[1, 2:4, 2:4])
    with pytest.raises(ValueError, match="must divide the image's sides"):
        models.patches(jnp.asarray(x), 4)


def test_a_convolutional_stem_makes_as_many_tokens_and_overlaps():
    x = images(height=8, width=12)
    model = image_model(patch_size=4, has_conv_stem=True)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    embed = lambda x: model.apply({"params": params}, x)[1].hidden_states[0]
    assert embed(x).shape == (2, 6, 8)
    # A pixel beside the border of the second token's square changes the first, too.
    other = x.copy()
    other[0, 0, 4] ^= 128
    moved = np.abs(embed(other) - embed(x)).max(axis=-1)
    assert (moved[0, :2] > 0).all()
    np.testing.assert_array_equal(moved[0, 2:], 0)
    np.testing.assert_array_equal(moved[1], 0)
    # Sides are rounded up.
    params = jax.jit(model.init)(jax.random.key(0), images(height=9))["params"]
    assert params["position"].shape == (3 * 2, 8)


@pytest.mark.parametrize("pooling", ["mean", "max", "class_token"])
def test_scanned_layers_are_the_layers_one_by_one(pooling):
    x = images()
    scanned = image_model(pooling=pooling)
    params = jax.jit(scanned.init)(jax.random.key(0), x)["params"]
    layers = params["layers"]
    rest = {k: v for k, v in params.items() if k != "layers"}
    split = {f"layer_{i}": jax.tree.map(lambda y, i=i: y[i], layers) for i in range(2)}
    apply = lambda model, params: jax.jit(
        lambda p: model.apply({"params": p}, x, with_plans=True)
    )(params)
    expected = apply(scanned, params)
    for options in ({"has_scan": False}, {"has_scan": False, "has_remat": True}):
        actual = apply(image_model(pooling=pooling, **options), rest | split)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), actual, expected
        )
    tokens = 7 if pooling == "class_token" else 6
    assert expected[1].plans.shape == (2, 2, 2, tokens, tokens)
    assert expected[1].where.all()


def test_skips_of_attention_and_mlp_are_separate():
    x = images()
    model = image_model(layer_norm="none", num_iters=0)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    zero = jax.tree_util.tree_map_with_path(
        lambda path, p: p * 0 if "Dense" in str(path) else p, params
    )
    hidden = {}
    for skips in [(True, True), (True, False), (False, True)]:
        hidden[skips] = model.apply(
            {"params": zero}, x, has_skip=skips[0], has_mlp_skip=skips[1]
        )[1].hidden_states
    np.testing.assert_array_equal(hidden[True, False][1:], 0)  # The MLP is silent.
    assert (hidden[False, True][1] != 0).any()
    difference = hidden[True, True][1] - hidden[False, True][1]
    np.testing.assert_allclose(difference, hidden[True, True][0], atol=1e-6)


def test_mean_pooling_does_not_see_where_a_doubly_stochastic_plan_sends_values():
    values = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 4)), jnp.float32)
    plan = jnp.asarray(np.eye(6)[np.array([3, 0, 5, 1, 2, 4])], jnp.float32)
    where = jnp.ones((1, 6), bool)
    for pooling in ("mean", "max"):  # Of a permutation both stay as they are.
        moved = models._pool(plan[None] @ values, where, pooling)
        np.testing.assert_allclose(moved, models._pool(values, where, pooling), 1e-5)
    mixed = jnp.full((1, 6, 6), 1 / 6, jnp.float32) @ values
    same = [
        np.allclose(
            models._pool(mixed, where, p), models._pool(values, where, p), atol=1e-5
        )
        for p in ("mean", "max")
    ]
    assert same == [True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "first"}, "pooling must be one of"),
        ({"position": "rotary"}, "position must be one of"),
        ({"vocab_size": 3}, "Give vocab_size for texts or patch_size"),
        ({"vocab_size": 3, "patch_size": None}, "Texts need seq_len"),
        ({"has_conv_stem": True, "patch_size": 6}, "must be a power of two"),
    ],
)
def test_bad_encoders_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        image_model(**options)


# The command line.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth must be at least 1"),
        ({"num_iters": -1}, "num_iters must be at least 0"),
        ({"dropout_rate": 1.0}, r"dropout_rate must be in \[0, 1\)"),
        ({"learning_rate": float("inf")}, "learning_rate must be positive"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train.Config(**options)


def test_presets_are_defaults_of_the_command_line(monkeypatch):
    configs = []
    monkeypatch.setattr(train, "run", configs.append)
    command.main(["train", "--task", "imdb", "--num-iters", "0"])
    command.main(["train", "--preset", "vit", "--task", "mnist"])
    command.main(["train", "--preset", "sinkformer_imdb", "--resume"])
    imdb, vit, sinkformer = configs
    assert imdb == dataclasses.replace(train.PRESETS["imdb"], num_iters=0)
    assert vit == dataclasses.replace(train.PRESETS["vit"], task="mnist")
    assert (sinkformer.depth, sinkformer.width, sinkformer.num_heads) == (6, 256, 8)
    assert sinkformer.mlp_width == 1024
    assert sinkformer.resume
    with pytest.raises(SystemExit, match="no preset 'cifar'"):
        command.main(["train", "--task", "cifar"])


def test_plot(uninterrupted, tmp_path):
    path = tmp_path / "run.png"
    plot.run(plot.Config(runs=(uninterrupted[0],), output=path))
    assert matplotlib.image.imread(path).std() > 0.01
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl"):
        plot.run(plot.Config(runs=(tmp_path,), output=path))


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    record.write_json(path, {"a": [1, 2]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.write_json(path, float("nan"))
    assert json.loads(path.read_text()) == {"a": [1, 2]}
