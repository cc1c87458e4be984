"""The training of one encoder: its model, its batches and the loop over updates."""

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
from .metrics import MetricsLog
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
        """Trains from the last checkpoint or from the start, and returns the result."""
        start = time.monotonic()
        config, is_first = self.config, jax.process_index() == 0
        state, batches = self.init(), self.batches()
        at_init = self._measure(state.params)
        best = {"accuracy": -1.0, "loss": math.inf, "step": 0}
        best_params = _copy(state.params)
        checkpoints = Checkpoints(config.folder / "checkpoints")
        restored = checkpoints.restore({"state": state, "best_params": best_params})
        if restored is not None:
            arrays, host = restored
            state, best_params = arrays["state"], arrays["best_params"]
            batches.set_state(host["batches"])
            best = host["best"]
        number = int(state.step)
        log = MetricsLog(
            config.folder / "metrics.jsonl", resumed_step=number, is_writer=is_first
        )
        # None if the run was killed after it had stopped.
        steps = range(number + 1, self.num_steps + 1)
        steps = [] if self._has_stopped(best, number) else steps
        interval = 1.0 if sys.stderr.isatty() else 30.0
        bar = tqdm(steps, unit="step", disable=not is_first, mininterval=interval)
        losses = []
        for number in bar:
            state, loss = self.update(state, next(batches))
            losses.append(loss)
            is_last = number == self.num_steps
            is_eval = number % self.eval_every == 0 or is_last
            is_kept = number % self.checkpoint_every == 0 or is_last
            if number % config.log_every == 0 or is_eval or is_kept:
                # The device works through its queue here, so progress is the device's.
                loss = float(np.mean(jax.device_get(losses), dtype=np.float64))
                _require_finite(loss, number)
                rate = float(self.optimization.schedule(number - 1))
                log.write(step=number, split="train", loss=loss, learning_rate=rate)
                losses = []
            if is_eval:
                found = self._evaluate(number, state.params, log)
                # The lower loss decides between equal accuracies.
                rank, least = ((x["accuracy"], -x["loss"]) for x in (found, best))
                if rank > least:
                    best, best_params = found, _copy(state.params)
                bar.set_postfix(validation=f"{best['accuracy']:.4f}")
            has_stopped = is_eval and self._has_stopped(best, number)
            if is_kept or has_stopped:
                # The place in the order of batches is the same on every process.
                host = {"batches": batches.get_state(), "best": best}
                arrays = {"state": state, "best_params": best_params}
                checkpoints.save(number, arrays, host)
            if has_stopped:
                break
        bar.close()
        checkpoints.close()
        accuracy, loss = self._score(best_params, self.data.test)
        log.write(step=number, split="test", loss=loss, accuracy=accuracy)
        log.close()
        return {
            "question": "train",
            "config": files.as_json(config),
            "environment": files.environment(),
            "definitions": DEFINITIONS,
            "num_parameters": num_parameters(best_params),
            "num_steps": number,
            "best_step": best["step"],
            "validation_accuracy": best["accuracy"],
            "validation_loss": best["loss"],
            "test_accuracy": accuracy,
            "test_loss": loss,
            "init": at_init,
            "trained": self._measure(best_params),
            "wall_time_s": round(time.monotonic() - start, 1),
        }

    def _evaluate(self, number, params, log):
        accuracy, loss = self._score(params, self.data.validation)
        _require_finite(loss, number)
        log.write(step=number, split="validation", loss=loss, accuracy=accuracy)
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
