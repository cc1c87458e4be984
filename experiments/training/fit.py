"""The training of one encoder: its model, its batches and the loop over updates."""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ..data import Augment, Batch, Data, eval_batches, train_batches
from ..evidence import files
from ..networks import step
from ..networks.encoder import Encoder, num_parameters
from ..networks.measures import DEFINITIONS, measure
from .checkpoints import Checkpoints
from .devices import Devices
from .interrupts import Interrupts
from .metrics import BY_LAYER, MetricsLog
from .presets import Config

# One update, on all devices over which its mesh divides the batch.
train_step = jax.jit(step.update, static_argnums=(0, 1, 2), donate_argnums=5)
_score = jax.jit(step.score, static_argnums=(0, 1))
_copy = jax.jit(lambda params: jax.tree.map(jnp.copy, params))


def make_model(config: Config, data: Data) -> Encoder:
    """The encoder for the data."""
    names = ("depth", "width", "num_heads", "num_iters", "has_mlp", "mlp_width")
    names += ("layer_norm", "pooling", "position", "dropout_rate", "has_remat")
    if data.vocab_size is None:
        names += ("patch_size", "has_conv_stem")
    else:
        names += ("seq_len",)
    return Encoder(
        **{name: getattr(config, name) for name in names},
        vocab_size=data.vocab_size,
        num_classes=data.num_classes,
        dtype=jnp.dtype(config.dtype),
    )


@dataclasses.dataclass
class _Progress:
    """The state of a training between two updates."""

    state: step.State
    best_params: step.Params
    best: dict[str, Any]  # The validation of the best parameters.
    losses: list[Any]  # Of the updates since the last record.
    batches: Any  # Its place in the order of batches is the same on every process.

    def arrays(self):
        """The arrays on the devices that a checkpoint holds."""
        return {"state": self.state, "best_params": self.best_params}

    def host(self):
        """The rest of a checkpoint, which is in the memory of the host."""
        losses = [float(loss) for loss in self.losses]
        batches = self.batches.get_state()
        return {"batches": batches, "best": self.best, "losses": losses}

    def restore(self, arrays, host):
        """Takes the content of a checkpoint."""
        self.state, self.best_params = arrays["state"], arrays["best_params"]
        self.best, self.losses = host["best"], host["losses"]
        self.batches.set_state(host["batches"])

    def choose(self, found):
        """Keeps the parameters if their validation is the best one."""
        # The lower loss decides between equal accuracies.
        rank, least = ((x["accuracy"], -x["loss"]) for x in (found, self.best))
        if rank > least:
            self.best, self.best_params = found, _copy(self.state.params)


class Training:
    """The training of one run."""

    def __init__(self, config: Config, data: Data, devices: Devices):
        self.config = config
        self.data = data
        self.devices = devices
        self.model = make_model(config, data)
        per_epoch = max(1, len(data.train) // config.batch_size)
        self.num_steps = config.num_steps or math.ceil(config.num_epochs * per_epoch)
        self.eval_every = config.eval_every or per_epoch
        self.checkpoint_every = config.checkpoint_every or per_epoch
        names = ("learning_rate", "warmup_fraction", "weight_decay", "max_grad_norm")
        options = {name: getattr(config, name) for name in names}
        self.optimization = step.Optimization(num_steps=self.num_steps, **options)
        # The first arguments of `train_step`.
        self.arguments = (
            self.model,
            self.optimization,
            devices.mesh,
            config.skips,
            jax.random.fold_in(jax.random.key(config.seed), 1),
        )

    def batches(self) -> Iterator[Batch]:
        """An iterator over this process's part of the training batches."""
        config = self.config
        augment = None
        if config.max_shift > 0 or config.has_flip:
            augment = Augment(max_shift=config.max_shift, has_flip=config.has_flip)
        return train_batches(
            self.data.train,
            batch_size=config.batch_size,
            seed=config.seed,
            augment=augment,
            bucket_lengths=config.bucket_lengths,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def init(self) -> step.State:
        """The state before the first update, on all devices."""

        def init(key, inputs, lengths):
            params = step.init_params(self.model, key, inputs, lengths)
            return step.init_state(self.optimization, params)

        first = self.data.train.take(slice(1))
        return jax.jit(init, out_shardings=self.devices.replicated)(
            jax.random.key(self.config.seed), first.inputs, first.lengths
        )

    def update(self, state: step.State, batch: Batch) -> tuple[step.State, jax.Array]:
        """The state after one update by a batch of `batches`, and the loss before."""
        return train_step(*self.arguments, state, self.devices.place_part(batch))

    def fit(self) -> dict[str, Any]:
        """Trains from the last checkpoint or from the start, and returns the result.

        Raises:
            SystemExit: The process was asked to end. It wrote a checkpoint before.
            ValueError: The run began with other data.
            FloatingPointError: The loss became infinite or NaN.
            OSError: A checkpoint could not be written, or none be read.
        """
        start = time.monotonic()
        config, is_first = self.config, jax.process_index() == 0
        state, batches = self.init(), self.batches()
        at_init = self._measure(state.params)
        best = {"accuracy": -1.0, "loss": math.inf, "step": 0}
        progress = _Progress(state, _copy(state.params), best, [], batches)
        digest = self.data.train.digest()
        checkpoints = Checkpoints(config.folder / "checkpoints")
        restored = checkpoints.restore(progress.arrays())
        if restored is not None:
            if restored[1]["data"] != digest:
                raise ValueError(
                    f"The training data of {config.task} have changed since the run in "
                    f"{config.folder} began. Bring the old ones back, or start again "
                    "with another --output."
                )
            progress.restore(*restored)
        log = MetricsLog(
            config.folder / "metrics.jsonl",
            resumed_step=int(progress.state.step),
            is_writer=is_first,
        )
        keep = lambda: checkpoints.save(
            int(progress.state.step),
            progress.arrays(),
            progress.host() | {"data": digest},
        )
        interrupts = Interrupts(is_alone=jax.process_count() == 1)
        with contextlib.closing(log):
            with interrupts, contextlib.closing(checkpoints):
                self._fit(progress, log, keep, interrupts)
            number = int(progress.state.step)
            accuracy, loss = self._score(progress.best_params, self.data.test)
            log.write(step=number, split="test", loss=loss, accuracy=accuracy)
        best = progress.best
        return {
            "question": "train",
            "config": files.as_json(config),
            "environment": files.environment(),
            "definitions": DEFINITIONS,
            "num_parameters": num_parameters(progress.best_params),
            "num_steps": number,
            "best_step": best["step"],
            "validation_accuracy": best["accuracy"],
            "validation_loss": best["loss"],
            "test_accuracy": accuracy,
            "test_loss": loss,
            "init": at_init,
            "trained": self._measure(progress.best_params),
            "wall_time_s": round(time.monotonic() - start, 1),
        }

    def _fit(self, progress, log, keep, interrupts):
        """Makes the updates that are left, and calls `keep` for each checkpoint."""
        number = int(progress.state.step)
        # None if the run was killed after it had stopped.
        steps = range(number + 1, self.num_steps + 1)
        steps = [] if self._has_stopped(progress.best, number) else steps
        bar = tqdm(
            steps,
            unit="step",
            disable=jax.process_index() > 0,
            mininterval=1.0 if sys.stderr.isatty() else 30.0,
        )
        for number in bar:
            progress.state, loss = self.update(progress.state, next(progress.batches))
            progress.losses.append(loss)
            is_last = number == self.num_steps
            is_eval = number % self.eval_every == 0 or is_last
            is_kept = number % self.checkpoint_every == 0 or is_last
            if number % self.config.log_every == 0 or is_eval or is_kept:
                self._log(progress, number, log)
            if is_eval:
                found = self._evaluate(number, progress.state.params, log)
                progress.choose(found)
                bar.set_postfix(validation=f"{progress.best['accuracy']:.4f}")
            has_stopped = is_eval and self._has_stopped(progress.best, number)
            status = interrupts.status
            if is_kept or has_stopped or status is not None:
                keep()
            if status is not None:
                print(
                    f"Interrupted after step {number}, which is kept. Continue with "
                    "--resume.",
                    file=sys.stderr,
                )
                raise SystemExit(status)
            if has_stopped:
                break
        bar.close()

    def _log(self, progress, number, log):
        # The device works through its queue here, so progress is the device's.
        losses = jax.device_get(progress.losses)
        loss = float(np.mean(losses, dtype=np.float64))
        _require_finite(loss, number)
        rate = float(self.optimization.schedule(number - 1))
        log.write(step=number, split="train", loss=loss, learning_rate=rate)
        progress.losses = []

    def _evaluate(self, number, params, log):
        accuracy, loss = self._score(params, self.data.validation)
        _require_finite(loss, number)
        measured = self._measure(params) or {}
        by_layer = {name: measured[name] for name in BY_LAYER if name in measured}
        log.write(
            step=number, split="validation", loss=loss, accuracy=accuracy, **by_layer
        )
        return {"accuracy": accuracy, "loss": loss, "step": number}

    def _has_stopped(self, best, number):
        if self.config.patience is None:
            return False
        return number - best["step"] >= self.config.patience * self.eval_every

    def _score(self, params, examples):
        place, fixed = self.devices.place_whole, (self.model, self.devices.mesh)
        batches = eval_batches(examples, batch_size=self.config.eval_batch_size)
        scores = [_score(*fixed, self.config.skips, params, place(b)) for b in batches]
        accuracy, loss = step.mean_score(scores)
        return float(accuracy), float(loss)

    def _measure(self, params):
        """Rank and entropy on validation examples, by layer."""
        config = self.config
        if not config.num_measured or config.has_skip != config.has_mlp_skip:
            return None
        examples = self.data.validation.take(slice(config.num_measured))
        # The few examples are measured on one device, from arrays of the host. The
        # measures have an axis of seeds.
        params = jax.tree.map(lambda x: np.asarray(x)[None], jax.device_get(params))
        model = self.model.clone(dtype=jnp.float32)
        measured = measure(model, params, examples, has_skip=config.has_skip)
        return {name: values[0] for name, values in measured.items()}


def _require_finite(loss, number):
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"The loss is {loss} at step {number}. Lower --learning-rate, or take "
            "--dtype float32."
        )
