"""How well does one encoder learn a task?

    python -m experiments train --task imdb
    python -m experiments train --task imdb --resume
    python -m experiments train --preset sinkformer_imdb --dtype bfloat16

Trains on every local device, keeps checkpoints, stops early if asked to, and evaluates
the best parameters on the test split once. `--num-iters 0` is softmax attention with
everything else equal. Writes `metrics.jsonl`, `config.json`, `result.json` and
checkpoints into the output folder; `--resume` continues a run that was killed, and its
metrics are those of a run that was not.

On several machines start it on each with `--coordinator HOST:PORT --num-processes N
--process-id K` and an output folder that all of them see.

The presets are their sources' sizes, with this module's own hyperparameters:
`sinkformer_imdb` after Sander et al. 2022, https://arxiv.org/abs/2110.11773, `vit`
after Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, both for a GPU; those
named as a task are for a CPU.
"""

import dataclasses
import json
import math
import pathlib
import sys
import time
from types import MappingProxyType
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from .. import training as trainer
from ..data import Augment, Data, eval_batches, load, train_batches
from ..data.text import Tokenizer
from ..evidence import files as record
from ..networks.encoder import Encoder, LayerNorm, Pooling, Position, num_parameters
from ..networks.measures import DEFINITIONS, measure
from .step import Skips

RESULTS = pathlib.Path("experiments") / "results"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that can change the result, and where it goes."""

    preset: str = "digits"  # A name of PRESETS, of which the other defaults are.
    task: str = "digits"  # imdb, fashion_mnist, mnist, digits or tfds:<name>.
    num_iters: int = 10  # Sinkhorn iterations; 0 is softmax attention.
    # The network.
    depth: int = 2  # Layers.
    width: int = 64  # Features of a token.
    num_heads: int = 4  # Attention heads, a divisor of the width.
    mlp_width: int | None = None  # None is four times the width.
    has_mlp: bool = True
    has_skip: bool = True  # Skip connections of the attention.
    has_mlp_skip: bool = True  # Skip connections of the MLPs.
    layer_norm: LayerNorm = "pre"
    pooling: Pooling = "max"
    position: Position = "learned"
    dropout_rate: float = 0.0
    patch_size: int = 2  # Of images.
    has_conv_stem: bool = False  # Convolutions of that total stride, not patches.
    seq_len: int = 256  # Tokens of a text, from its start.
    vocab_size: int = 8000  # Identifiers of a text's words.
    tokenizer: Tokenizer = "word"
    bucket_lengths: tuple[int, ...] | None = None  # Batches of texts of like length.
    max_shift: int = 0  # Pixels by which training images are shifted.
    has_flip: bool = False  # Whether training images are mirrored at random.
    has_scan: bool = True  # One compiled layer for all.
    has_remat: bool = False  # Recompute layers in the backward pass.
    dtype: Literal["float32", "bfloat16"] = "float32"  # Of the computation.
    # The training.
    num_epochs: float = 30.0
    num_steps: int | None = None  # Updates, in place of epochs.
    batch_size: int = 32  # Over all devices.
    learning_rate: float = 3e-3  # At its peak.
    warmup_fraction: float = 0.1  # Of the updates.
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    patience: int | None = None  # Evaluations without improvement before it stops.
    num_train: int | None = None  # Training examples; None takes all.
    seed: int = 0  # Initialisation, order, dropout and augmentation.
    data_seed: int = 0  # Splits.
    # What is recorded, and how often.
    eval_every: int | None = None  # Updates; None is an epoch.
    checkpoint_every: int | None = None  # Updates; None is an epoch.
    log_every: int = 20  # Updates.
    eval_batch_size: int = 128
    num_measured: int = 64  # Validation examples for rank and entropy; 0 for none.
    output: pathlib.Path | None = None  # None is a folder named after the run.
    data_dir: pathlib.Path | None = None  # Of TFDS; None is its default.
    resume: bool = False  # Continue what the output folder holds.
    # Several processes.
    coordinator: str | None = None  # HOST:PORT of process 0.
    num_processes: int = 1
    process_id: int = 0

    def __post_init__(self):
        least = dict.fromkeys(
            ("depth", "width", "num_heads", "batch_size", "patch_size", "log_every"), 1
        )
        others = ("num_steps", "patience", "eval_every", "checkpoint_every")
        least |= {name: 1 for name in others if getattr(self, name) is not None}
        for name, bound in {**least, "num_iters": 0, "num_measured": 0}.items():
            if (value := getattr(self, name)) < bound:
                raise ValueError(f"{name} must be at least {bound}, got {value}.")
        for name in ("learning_rate", "num_epochs", "max_grad_norm"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}.")
        for name in ("dropout_rate", "warmup_fraction"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value}.")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be >= 0, got {self.weight_decay}.")

    @property
    def folder(self) -> pathlib.Path:
        """Where everything goes."""
        if self.output is not None:
            return self.output
        task = self.task.replace(":", "_").replace("/", "_")
        name = f"{self.preset}_{task}" if self.preset != self.task else task
        return RESULTS / "train" / f"{name}_iters{self.num_iters}_seed{self.seed}"

    @property
    def skips(self) -> Skips:
        """For the model."""
        return Skips(self.has_skip, self.has_mlp_skip)


_DIGITS = Config(mlp_width=128)
_IMAGES = Config(
    preset="fashion_mnist",
    task="fashion_mnist",
    # With patches of 7 x 7 and twice the width it stays at 0.885 of the test split.
    patch_size=8,
    has_conv_stem=True,
    mlp_width=128,
    has_flip=True,
    num_epochs=10,
    batch_size=64,
    learning_rate=2e-3,
    eval_batch_size=256,
    log_every=50,
)
_TEXTS = Config(
    preset="imdb",
    task="imdb",
    mlp_width=128,
    num_heads=1,  # Attention is most of the time, and each head costs as much.
    seq_len=400,
    vocab_size=20_000,
    bucket_lengths=(100, 200, 300, 400),
    dropout_rate=0.5,
    num_epochs=3,
    learning_rate=1e-3,
)

PRESETS: Final = MappingProxyType(
    {
        "digits": _DIGITS,
        "mnist": dataclasses.replace(_IMAGES, preset="mnist", task="mnist"),
        "fashion_mnist": _IMAGES,
        "imdb": _TEXTS,
        "sinkformer_imdb": dataclasses.replace(
            _TEXTS,
            preset="sinkformer_imdb",
            depth=6,
            width=256,
            num_heads=8,
            mlp_width=1024,
            seq_len=512,
            bucket_lengths=(128, 256, 384, 512),
            dropout_rate=0.1,
            num_epochs=15,
        ),
        "vit": dataclasses.replace(
            _IMAGES,
            preset="vit",
            depth=6,
            width=128,
            num_heads=8,
            mlp_width=512,
            patch_size=4,
            has_conv_stem=False,
            pooling="class_token",
            max_shift=2,
            dropout_rate=0.1,
            num_epochs=40,
            batch_size=128,
            learning_rate=1e-3,
        ),
    }
)

QUICK = dataclasses.replace(_DIGITS, num_steps=20, depth=1, num_train=200)


def choose(preset: str | None, task: str | None) -> Config:
    """The preset of this name, or the one for the task, or the first.

    Raises:
        ValueError: There is no such preset, or the task has none of its own.
    """
    name = preset or task or "digits"
    if name not in PRESETS:
        raise ValueError(
            f"There is no preset {name!r}; give --preset, one of {list(PRESETS)}."
        )
    config = PRESETS[name]
    return dataclasses.replace(config, task=task) if task else config


def run(config: Config) -> dict[str, Any]:
    """Trains, evaluates, writes the result; or reads it if the run had ended.

    Returns:
        What `result.json` holds.

    Raises:
        ValueError: The options do not fit together, the data or the run to resume.
        FileExistsError: The output folder holds a run, and `resume` is False.
        FileNotFoundError: The data are not there; says how to install them.
        OSError: The output folder cannot be written.
    """
    if config.coordinator is not None:
        jax.distributed.initialize(
            config.coordinator, config.num_processes, config.process_id
        )
    is_first = jax.process_index() == 0
    _check_folder(config)
    result_path = config.folder / "result.json"
    if result_path.exists():
        print(f"The run had ended. Its result is {result_path}.", file=sys.stderr)
        return json.loads(result_path.read_text())
    devices = trainer.Devices()
    devices.check(batch_size=config.batch_size, eval_batch_size=config.eval_batch_size)
    data = _load_data_in_turn(config, devices, is_first)
    training = Training(config, data, devices)
    # All have looked into the folder before the first one writes there.
    devices.wait_for_all("checked")
    if is_first:
        config.folder.mkdir(parents=True, exist_ok=True)
        record.write_json(config.folder / "config.json", _options(config))
    result = training.fit()
    if is_first:
        record.write_json(result_path, result)
        print(summary(result), f"Wrote {result_path}.")
    return result


def load_data(config: Config) -> Data:
    """The splits of the task."""
    return load(
        config.task,
        data_dir=config.data_dir,
        seed=config.data_seed,
        seq_len=config.seq_len,
        vocab_size=config.vocab_size,
        tokenizer=config.tokenizer,
        num_train=config.num_train,
    )


def _load_data_in_turn(config, devices, is_first):
    """The data; where several processes share a disk, the first prepares them."""
    if not is_first:
        devices.wait_for_all("prepared")
    data = load_data(config)
    if is_first:
        devices.wait_for_all("prepared")
    return data


def _options(config):
    """What must not differ between a run and its continuation, as JSON holds it."""
    free = ("output", "resume", "data_dir", "coordinator", "num_processes")
    free = (*free, "process_id")
    own = {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
    return json.loads(json.dumps(own))


def _check_folder(config):
    """Refuses an output folder that holds another run."""
    path = config.folder / "config.json"
    if not path.exists():
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


def make_model(config: Config, data: Data, devices: trainer.Devices) -> Encoder:
    """The encoder for the data."""
    is_text = data.vocab_size is not None
    return Encoder(
        depth=config.depth,
        width=config.width,
        num_heads=config.num_heads,
        num_iters=config.num_iters,
        vocab_size=data.vocab_size,
        seq_len=config.seq_len if is_text else None,
        patch_size=None if is_text else config.patch_size,
        has_conv_stem=not is_text and config.has_conv_stem,
        num_classes=data.num_classes,
        has_mlp=config.has_mlp,
        mlp_width=config.mlp_width,
        layer_norm=config.layer_norm,
        pooling=config.pooling,
        position=config.position,
        dropout_rate=config.dropout_rate,
        dtype=jnp.dtype(config.dtype),
        has_scan=config.has_scan,
        has_remat=config.has_remat,
        mesh=devices.model_mesh,
    )


class Training:
    """One run: what it needs, and the loop."""

    def __init__(self, config: Config, data: Data, devices: trainer.Devices):
        self.config = config
        self.data = data
        self.devices = devices
        self.model = make_model(config, data, devices)
        per_epoch = max(1, len(data.train) // config.batch_size)
        self.num_steps = config.num_steps or math.ceil(config.num_epochs * per_epoch)
        self.eval_every = config.eval_every or per_epoch
        self.checkpoint_every = config.checkpoint_every or per_epoch
        self.optimization = trainer.Optimization(
            num_steps=self.num_steps,
            learning_rate=config.learning_rate,
            warmup_fraction=config.warmup_fraction,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
        )

    def batches(self):
        """The training batches of this process, from the first on."""
        config = self.config
        has_augment = config.max_shift > 0 or config.has_flip
        return train_batches(
            self.data.train,
            batch_size=config.batch_size,
            seed=config.seed,
            augment=Augment(max_shift=config.max_shift, has_flip=config.has_flip)
            if has_augment
            else None,
            bucket_lengths=config.bucket_lengths,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def init(self) -> trainer.State:
        """The state before the first update."""
        data = next(iter(eval_batches(self.data.train, batch_size=1)))
        return trainer.init_state(
            self.model, self.optimization, data, self.config.seed, self.devices
        )

    def fit(self) -> dict[str, Any]:
        """Trains from the last checkpoint on, or from the start; the result."""
        start = time.monotonic()
        config, is_first = self.config, jax.process_index() == 0
        state, batches = self.init(), self.batches()
        at_init = self._measure(state.params)
        count = num_parameters(state.params)
        best = {"accuracy": -1.0, "loss": math.inf, "step": 0}
        checkpoints = trainer.Checkpoints(config.folder / "checkpoints")
        if (restored := checkpoints.restore(state)) is not None:
            state, host = restored
            batches.set_state(host["batches"])
            best = host["best"]
        step = int(state.step)
        log = trainer.MetricsLog(
            config.folder / "metrics.jsonl", resumed_step=step, is_writer=is_first
        )
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        schedule = self.optimization.schedule
        losses, has_stopped = [], self._has_stopped(best, step)
        bar = tqdm(
            total=self.num_steps,
            initial=step,
            unit="step",
            disable=not is_first,
            smoothing=0.05,
            mininterval=1.0 if sys.stderr.isatty() else 30.0,
        )
        while step < self.num_steps and not has_stopped:
            batch = self.devices.place_part(next(batches))
            state, loss = trainer.train_step(
                self.model, self.optimization, config.skips, key, state, batch
            )
            step += 1
            losses.append(loss)
            bar.update()
            is_last = step == self.num_steps
            is_eval = step % self.eval_every == 0 or is_last
            is_kept = step % self.checkpoint_every == 0 or is_last
            if step % config.log_every == 0 or is_eval or is_kept:
                # The device works through its queue here, so progress is the device's.
                loss = float(np.mean(jax.device_get(losses), dtype=np.float64))
                _require_finite(loss, step)
                rate = float(schedule(step - 1))
                log.write(step=step, split="train", loss=loss, learning_rate=rate)
                losses = []
            if is_eval:
                state, best = self._evaluate(step, state, best, log)
                bar.set_postfix(validation=f"{best['accuracy']:.4f}")
                has_stopped = self._has_stopped(best, step)
            if is_kept or has_stopped:
                # A place in the order of batches: the same on every process.
                host = {"batches": batches.get_state(), "best": best}
                checkpoints.save(step, state, host)
        bar.close()
        checkpoints.close()
        accuracy, loss = self._test(state)
        log.write(step=step, split="test", loss=loss, accuracy=accuracy)
        log.close()
        return {
            "question": "train",
            "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
            "environment": record.environment(),
            "definitions": DEFINITIONS,
            "num_parameters": count,
            "num_steps": step,
            "best_step": best["step"],
            "validation_accuracy": best["accuracy"],
            "validation_loss": best["loss"],
            "test_accuracy": accuracy,
            "test_loss": loss,
            "init": at_init,
            "trained": self._measure(state.best_params),
            "wall_time_s": round(time.monotonic() - start, 1),
        }

    def _evaluate(self, step, state, best, log):
        accuracy, loss = self._score(state.params, self.data.validation)
        _require_finite(loss, step)
        log.write(step=step, split="validation", loss=loss, accuracy=accuracy)
        # Of equal accuracies the one of the lower loss.
        if (accuracy, -loss) > (best["accuracy"], -best["loss"]):
            best = {"accuracy": accuracy, "loss": loss, "step": step}
            state = trainer.keep_best(state)
        return state, best

    def _has_stopped(self, best, step):
        if self.config.patience is None:
            return False
        return step - best["step"] >= self.config.patience * self.eval_every

    def _test(self, state):
        return self._score(state.best_params, self.data.test)

    def _score(self, params, examples):
        batches = eval_batches(examples, batch_size=self.config.eval_batch_size)
        return trainer.accuracy_and_loss(
            self.model, self.config.skips, params, batches, self.devices
        )

    def _measure(self, params):
        """Rank and entropy on validation examples; the seed's axis is taken off."""
        config = self.config
        if not config.num_measured or config.has_skip != config.has_mlp_skip:
            return None
        examples = self.data.validation.take(slice(config.num_measured))
        # On one device, as the host's arrays: it is little work.
        params = jax.tree.map(lambda x: np.asarray(x)[None], jax.device_get(params))
        model = self.model.clone(mesh=None, dtype=jnp.float32)
        measured = measure(model, params, examples, has_skip=config.has_skip)
        return {name: values[0] for name, values in measured.items()}


def _require_finite(loss, step):
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"The loss is {loss} at step {step}. Lower --learning-rate, or take "
            "--dtype float32."
        )


def summary(result: dict[str, Any]) -> str:
    """One sentence."""
    config = result["config"]
    iters = config["num_iters"]
    name = f"Sinkhorn, {iters} iterations" if iters else "softmax"
    return (
        f"{config['task']}, {name}: test accuracy "
        f"{result['test_accuracy']:.4f}, validation {result['validation_accuracy']:.4f}"
        f" at step {result['best_step']} of {result['num_steps']}, "
        f"{result['wall_time_s']:.0f} s."
    )
