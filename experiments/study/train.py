"""Trains the networks of a cell, and measures them."""

import functools
import math
import zipfile
from typing import Any, Final

import numpy as np

from ..data import Data, Examples, imdb, load
from ..evidence import files
from ..networks import ensemble, measures
from ..networks.encoder import num_parameters
from ..networks.pure_attention import normalise
from . import products
from .cell import Cell, Sizes
from .observe import as_lists, observe, significant
from .plan import NUM_ITERS

# Examples and paths of each length over which products of attention matrices are taken.
NUM_TEXTS: Final = 4
NUM_PATHS: Final = 16


@functools.cache
def load_data(sizes: Sizes) -> Data:
    """The data of a task, read from `runs/data` if they were prepared before.

    Raises:
        ValueError: The sizes do not fit the data.
        FileNotFoundError: The images are missing; says how to install them.
        ModuleNotFoundError: A package with the data is missing; says how to install it.
    """
    is_text = sizes.task == "imdb"
    words = (sizes.seq_len, sizes.vocab_size) if is_text else ()
    parts = (*words, sizes.num_train, sizes.num_validation, sizes.data_seed)
    name = "-".join(map(str, (sizes.task, *parts)))
    make = functools.partial(_texts if is_text else _images, sizes)
    return _kept(files.RUNS / "data" / f"{name}.npz", make)


def _texts(sizes):
    return imdb(
        seq_len=sizes.seq_len,
        vocab_size=sizes.vocab_size,
        num_train=sizes.num_train,
        num_validation=sizes.num_validation,
        seed=sizes.data_seed,
    )


def _images(sizes):
    data = load(sizes.task, seed=sizes.data_seed, num_train=sizes.num_train)
    num = sizes.num_validation
    if num > (most := len(data.validation)):
        raise ValueError(f"num_validation must be at most {most}, got {num}.")
    return data


def _kept(path, make):
    """What `make` returns, without the test split, from the file if it is there."""
    try:
        with np.load(path) as arrays:
            splits = {
                name: Examples(
                    inputs=arrays[f"{name}_inputs"],
                    lengths=arrays.get(f"{name}_lengths"),
                    labels=arrays[f"{name}_labels"],
                )
                for name in ("train", "validation")
            }
            about = {k: arrays[k].item() for k in ("name", "num_classes", "vocab_size")}
    except (FileNotFoundError, EOFError, zipfile.BadZipFile):
        data = make()
    else:
        about["vocab_size"] = about["vocab_size"] or None
        empty = splits["train"].take(slice(0))
        return Data(**splits, test=empty, **about)
    arrays = {"name": data.name, "num_classes": data.num_classes}
    arrays["vocab_size"] = data.vocab_size or 0
    for name in ("train", "validation"):
        examples = getattr(data, name)
        for field in ("inputs", "lengths", "labels"):
            if (values := getattr(examples, field)) is not None:
                arrays[f"{name}_{field}"] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as new:
        np.savez(new, **arrays)
    return data


def train_and_measure(cell: Cell) -> dict[str, Any]:
    """The measures of `observe.DEFINITIONS` for the networks of a cell."""
    sizes, data = cell.sizes, load_data(cell.sizes)
    model = cell.encoder(data.vocab_size)
    validation = data.validation.take(slice(sizes.num_validation))
    measured = validation.take(slice(sizes.num_measured))
    options = {"has_skip": cell.has_skip}
    observed, updates = [], []

    def note(number, params):
        updates.append(number)
        observed.append(observe(model, params, measured, **options))

    params, losses = ensemble.train(
        model,
        ensemble.init(model, sizes.seeds, data.train),
        data.train,
        sizes,
        learning_rate=cell.learning_rate,
        observe=note,
        observe_every=sizes.num_steps // sizes.num_observations,
        **options,
    )
    losses = losses.reshape(len(losses), sizes.num_observations, -1).mean(axis=2)
    accuracy = functools.partial(ensemble.accuracy, params=params, examples=validation)
    result = {
        "num_parameters": num_parameters(params) // len(sizes.seeds),
        "max_entropy": _max_entropy(cell, measured),
        "updates": updates,
        **as_lists(observed),
        "train_loss": significant(losses),
        "validation_accuracy": accuracy(model, **options).tolist(),
        "uniform_accuracy": accuracy(model.clone(logit_scale=0.0), **options).tolist(),
    }
    # Without skip connections the deeper matrices are uniform but for rounding. Paths
    # compare softmax with Sinkhorn, not what is between them.
    if cell.layer_norm == "pre" and cell.has_skip and cell.column_tau == 1:
        result["paths"] = _paths(cell, model, params, measured)
    return result


def _max_entropy(cell, examples):
    """The entropy of uniform attention in nats, mean over the examples."""
    if (lengths := examples.lengths) is None:
        image = examples.inputs.shape[1:3]
        # A stem of strided convolutions rounds up.
        lengths = [math.prod(-(-side // cell.sizes.patch_size) for side in image)]
    extra = cell.pooling == "class_token"
    return float(np.log(np.asarray(lengths) + extra).mean())


def _paths(cell, model, params, examples):
    """Products of the attention matrices of every seed, from both normalisers.

    None if no measured text is without padding.
    """
    if examples.lengths is not None:
        is_full = examples.lengths == cell.sizes.seq_len
        if not is_full.any():
            return None
        examples = examples.take(np.flatnonzero(is_full))
    few = examples.take(slice(NUM_TEXTS))
    logits = measures.attention_logits(
        model, params, few.inputs, has_skip=cell.has_skip
    )
    found = {}
    for name, num_iters in (("softmax", 0), ("Sinkhorn", cell.num_iters or NUM_ITERS)):
        normaliser = functools.partial(normalise, num_iters=num_iters)
        by_seed = [
            products.along_paths(
                each.swapaxes(0, 1), normaliser, np.random.default_rng(seed), NUM_PATHS
            )
            for seed, each in zip(cell.sizes.seeds, logits, strict=True)
        ]
        for kind, values in files.by_key(by_seed).items():
            found[f"{kind}, {name}"] = significant(np.array(values))
    return found
