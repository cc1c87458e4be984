"""Batches of examples, made by grain.

Batch k of training is a function of the options and of k. The shuffle finds the k-th
example of an epoch without those before it, and the random numbers of augmentation
belong to the place of the example. Therefore the state of an iterator is one number, a
run that resumes sees the batches of one that was not interrupted, and what one process
reads does not depend on the number of processes.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Float, Int, UInt8

from .examples import Examples

# No threads: the arrays are in memory, and threads would wait for Python's lock. The
# device works on while a batch is made.
_READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


class Batch(NamedTuple):
    """B examples to process together: T tokens, or H x W pixels of C values."""

    inputs: Int[np.ndarray, "B T"] | UInt8[np.ndarray, "B H W C"]
    lengths: Int[np.ndarray, " B"] | None  # None for images.
    labels: Int[np.ndarray, " B"]
    weights: Float[np.ndarray, " B"]  # 0 where an example only fills the batch, else 1.


def train_batches(
    examples: Examples,
    *,
    batch_size: int,
    seed: int,
    augment: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None,
    bucket_lengths: Sequence[int] | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Batches without end. Each epoch has all examples, in a new order.

    Args:
        examples: The training split.
        batch_size: Examples of an update over all processes.
        seed: Decides order and augmentation.
        augment: Changes an image, differently for every example and epoch.
        bucket_lengths: Fixed lengths in rising order. Each text belongs to the shortest
            length that holds it, and the texts of a batch belong to one length: short
            texts cost little. The lengths take turns, by the number of their texts.
            None leaves all texts at full length.
        process_index: The part of each batch to return.
        process_count: The number of parts of each batch.

    Returns:
        An iterator over parts of `batch_size // process_count` examples. `get_state`
        returns a dict that JSON can hold, and `set_state` continues from it on an
        iterator made with equal arguments.

    Raises:
        ValueError: The options fit neither each other nor the examples.
    """
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            "batch_size must be a positive multiple of process_count, got "
            f"{batch_size} and {process_count}: it is divided over the processes."
        )
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index must be in [0, process_count), got {process_index} and "
            f"process_count={process_count}."
        )
    if not len(examples):
        raise ValueError("There are no examples to train on.")
    if augment is not None and examples.lengths is not None:
        raise ValueError("augment changes images, but the examples are texts.")
    buckets = _buckets(examples, bucket_lengths)
    streams = []
    for number, (length, members) in enumerate(buckets):
        # One seed for each bucket, or buckets of equal size would have equal orders.
        own_seed = np.random.SeedSequence((seed, number)).generate_state(1)[0]
        stream = grain.MapDataset.source(members).seed(int(own_seed)).shuffle().repeat()
        if augment is not None:
            # Before the batch is divided, so that the random numbers belong to the
            # place in the whole batch.
            stream = stream.random_map(_changing(examples.inputs, augment))
        stream = stream[process_index::process_count]
        stream = stream.batch(
            batch_size // process_count,
            drop_remainder=True,
            batch_fn=_gathering(examples, length),
        )
        streams.append(stream)
    if len(streams) > 1:
        weights = [len(members) for _, members in buckets]
        streams = [grain.MapDataset.mix(streams, weights)]
    return iter(streams[0].to_iter_dataset(_READ))


def eval_batches(examples: Examples, *, batch_size: int) -> Iterable[Batch]:
    """All examples once, in order. Examples of weight 0 fill the last batch.

    The result can be iterated over several times.

    Raises:
        ValueError: `batch_size` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    gather = _gathering(examples)

    def batch(number):
        index = np.arange(number * batch_size, (number + 1) * batch_size)
        is_filling = index >= len(examples)
        # The first example fills the batch: a real one, so that no value becomes NaN.
        result = gather(np.where(is_filling, 0, index))
        return result._replace(weights=1 - is_filling.astype(np.float32))

    num_batches = -(-len(examples) // batch_size)
    return grain.MapDataset.range(num_batches).map(batch).to_iter_dataset(_READ)


def _buckets(examples, bucket_lengths):
    """Pairs of a length, None for images, and the indices of its examples."""
    if bucket_lengths is None:
        return [(None, np.arange(len(examples)))]
    if examples.lengths is None:
        raise ValueError("bucket_lengths are for texts, but the examples are images.")
    edges = np.array(bucket_lengths)
    longest, seq_len = examples.lengths.max(), examples.inputs.shape[1]
    if not edges.size or (np.diff(edges, prepend=0) < 1).any():
        raise ValueError(
            f"bucket_lengths must be positive and rising, got {list(bucket_lengths)}."
        )
    if not longest <= edges[-1] <= seq_len:
        raise ValueError(
            "The last of bucket_lengths must hold the longest text and not exceed the "
            f"tokens there are, got {list(bucket_lengths)} for texts of up to "
            f"{longest} tokens in arrays of {seq_len}."
        )
    bucket_of = np.searchsorted(edges, examples.lengths)
    members = [np.flatnonzero(bucket_of == k) for k in range(len(edges))]
    pairs = zip(bucket_lengths, members, strict=True)
    return [(length, index) for length, index in pairs if len(index)]


def _changing(images, augment):
    """A function from the index of an image to the index and the changed image."""
    return lambda index, rng: (index, augment(images[index], rng))


def _gathering(examples, length=None):
    """A function from indices, or `_changing`'s pairs, to a batch cut to `length`."""

    def gather(items):
        images = None
        if isinstance(items[0], tuple):
            items, images = zip(*items, strict=True)
        part = examples.take(np.asarray(items))
        inputs = part.inputs if images is None else np.stack(images)
        if length is not None:
            inputs = inputs[:, :length]
        weights = np.ones(len(items), np.float32)
        return Batch(inputs, part.lengths, part.labels, weights)

    return gather
