"""Runs of `train` that take seconds, in this process and in processes of their own."""

import dataclasses
import os
import pathlib
import subprocess
import sys

from experiments.training.presets import PRESETS

ROOT = pathlib.Path(__file__).parents[2]

# Compilation is most of the work.
TINY = dataclasses.replace(
    PRESETS["digits"],
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


def tiny(folder, data_dir, **options):
    return dataclasses.replace(TINY, output=folder, data_dir=data_dir, **options)


def metrics(folder):
    return (folder / "metrics.jsonl").read_bytes()


def in_process(config, code=""):
    """The run of `config` in a process of its own, after `code`."""
    options = dataclasses.asdict(config)
    options |= {name: str(options[name]) for name in ("output", "data_dir")}
    script = (
        "import pathlib\n"
        "import jax\n"
        # This process has it, and it changes the numbers.
        "jax.config.update('jax_enable_x64', True)\n"
        "from experiments.training import presets, train\n"
        f"options = {options!r}\n"
        "for name in ('output', 'data_dir'):\n"
        "    options[name] = pathlib.Path(options[name])\n"
        f"{code}\n"
        "train.run(presets.Config(**options))\n"
    )
    return run_python(script)


def run_python(script):
    """A process that runs a script in the repository, with one stream of output."""
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
