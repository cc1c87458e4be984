"""How well does one encoder learn a task?

    python -m experiments train --task imdb
    python -m experiments train --task imdb --resume
    python -m experiments train --preset sinkformer_imdb --dtype bfloat16

Trains on every local device, keeps checkpoints, stops early if asked to, and evaluates
the best parameters on the test split once. `--num-iters 0` is softmax attention with
everything else equal. Writes `metrics.jsonl`, `config.json`, `result.json` and
checkpoints into the output folder. `--resume` continues a run that was killed, and
writes the same metrics as a run that was not.

To train on several machines, start the command on each with `--coordinator HOST:PORT
--num-processes N --process-id K` and an output folder that all of them see.

The presets have the sizes of their sources and hyperparameters of their own:
`sinkformer_imdb` after Sander et al. 2022, https://arxiv.org/abs/2110.11773, `vit`
after Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, both for a GPU. The
presets named as a task are for a CPU.
"""

import contextlib
import json
import sys
from typing import Any, Final

import filelock
import jax

from ..evidence import files
from .devices import Devices
from .fit import Training
from .presets import QUICK as QUICK
from .presets import Config, load_data
from .presets import choose as choose

# What may differ between a run and its continuation.
_FREE: Final = frozenset(
    ("output", "resume", "data_dir", "coordinator", "num_processes", "process_id")
)


def run(config: Config) -> dict[str, Any]:
    """Trains, evaluates and writes the result, or reads the result of an ended run.

    Returns:
        What `result.json` holds.

    Raises:
        ValueError: The options fit neither each other, nor the data, nor the run that
            the folder holds, or the data have changed since that began.
        FileExistsError: The output folder holds a run, and `resume` is False, or
            another process trains there.
        FileNotFoundError: The output folder holds no run, and `resume` is True, or
            the data are not there; says how to install them.
        SystemExit: SIGTERM or SIGINT asked the process to end, and it wrote a
            checkpoint; with several processes the signals end them at once.
        FloatingPointError: The loss became infinite or NaN.
        OSError: The output folder cannot be written.
    """
    if config.coordinator is not None:
        jax.distributed.initialize(
            config.coordinator, config.num_processes, config.process_id
        )
    is_first = jax.process_index() == 0
    _check_folder(config)
    path = config.folder / "result.json"
    if path.exists():
        print(f"The run had ended. Its result is {path}.", file=sys.stderr)
        return json.loads(path.read_text())
    devices = Devices()
    devices.check(batch_size=config.batch_size, eval_batch_size=config.eval_batch_size)
    # Where several processes share a disk, the first prepares the data.
    if not is_first:
        devices.wait_for_all("prepared")
    data = load_data(config)
    if is_first:
        devices.wait_for_all("prepared")
    training = Training(config, data, devices)
    # All processes have looked into the folder before the first one writes there.
    devices.wait_for_all("checked")
    if not is_first:
        return training.fit()
    with _alone_in(config.folder):
        files.write_json(config.folder / "config.json", _options(config))
        result = training.fit()
        files.write_json(path, result)
    print(summary(result), f"Wrote {path}.")
    return result


@contextlib.contextmanager
def _alone_in(folder):
    """Makes and locks the folder until the context ends, or the process."""
    lock = filelock.FileLock(folder / ".lock", blocking=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise FileExistsError(
            f"Another process trains in {folder}. Wait for it, or give another "
            "--output."
        ) from None
    except OSError as error:
        raise OSError(
            f"The run cannot be written into {folder} ({error.strerror}). Make that a "
            "folder with room that you may write, or give another --output."
        ) from error
    try:
        yield
    finally:
        lock.release()


def summary(result: dict[str, Any]) -> str:
    """The result in one sentence."""
    config = result["config"]
    iters = config["num_iters"]
    name = f"Sinkhorn, {iters} iterations" if iters else "softmax"
    return (
        f"{config['task']}, {name}: test accuracy "
        f"{result['test_accuracy']:.4f}, validation {result['validation_accuracy']:.4f}"
        f" at step {result['best_step']} of {result['num_steps']}, "
        f"{result['wall_time_s']:.0f} s."
    )


def _check_folder(config):
    path = config.folder / "config.json"
    if not path.exists():
        if config.resume:
            raise FileNotFoundError(
                f"{config.folder} holds no run to resume. Start one without --resume, "
                "or name the --output of the run."
            )
        return
    if not config.resume:
        raise FileExistsError(
            f"{config.folder} holds a run. Continue it with --resume, or give another "
            "--output."
        )
    own, old = _options(config), json.loads(path.read_text())
    names = sorted(k for k in own | old if own.get(k) != old.get(k))
    if names:
        changes = ", ".join(f"{k} {old.get(k)} -> {own.get(k)}" for k in names)
        raise ValueError(
            f"The run in {config.folder} has other options ({changes}). Give those, or "
            "another --output."
        )


def _options(config):
    return {k: v for k, v in files.as_json(config).items() if k not in _FREE}
