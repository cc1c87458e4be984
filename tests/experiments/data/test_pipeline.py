"""Batches: order, resumption, augmentation, buckets, parts for processes."""

import itertools
import json

import numpy as np
import pytest

from experiments.data import Augment, Examples, eval_batches, train_batches


def texts(num=23, seq_len=12, seed=0):
    """Texts whose first token names them."""
    lengths = np.random.default_rng(seed).integers(1, seq_len + 1, num).astype(np.int32)
    inputs = np.where(np.arange(seq_len) < lengths[:, None], 1, 0).astype(np.int32)
    inputs[:, 0] = np.arange(num) + 2
    labels = (np.arange(num) % 3).astype(np.int32)
    return Examples(inputs=inputs, lengths=lengths, labels=labels)


def images(num=10, size=6):
    """Images with a frame of zeros and a corner that tells left from right."""
    inputs = np.zeros((num, size, size, 1), np.uint8)
    inputs[:, 2:4, 2:4] = np.arange(1, num + 1)[:, None, None, None]
    inputs[:, 2, 2] = 255
    return Examples(inputs=inputs, lengths=None, labels=np.arange(num).astype(np.int32))


def first(batches, num):
    return list(itertools.islice(batches, num))


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def names(batches):
    return np.concatenate([batch.inputs[:, 0] for batch in batches]) - 2


def test_epochs_pass_through_all_examples_in_new_orders():
    data = texts(num=20)
    batches = first(train_batches(data, batch_size=5, seed=0), 12)
    epochs = names(batches).reshape(3, 20)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(20), (3, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    for batch in batches:
        index = batch.inputs[:, 0] - 2
        expected = data.take(index)
        np.testing.assert_array_equal(batch.inputs, expected.inputs)
        np.testing.assert_array_equal(batch.lengths, expected.lengths)
        np.testing.assert_array_equal(batch.labels, expected.labels)
        np.testing.assert_array_equal(batch.weights, np.ones(5))
        dtypes = [x.dtype.name for x in batch]
        assert dtypes == ["int32", "int32", "int32", "float32"]


def test_equal_seeds_give_equal_batches_and_others_do_not():
    data = texts()
    orders = [
        names(first(train_batches(data, batch_size=4, seed=seed), 40))
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(orders[0], orders[1])
    # Nor is one seed's second epoch the next one's first.
    epochs = [tuple(e) for o in orders[1:] for e in o[: 6 * 23].reshape(6, 23)]
    assert len(set(epochs)) == 12


def test_batches_may_exceed_the_examples():
    batch = next(train_batches(texts(num=3), batch_size=7, seed=0))
    assert len(batch.labels) == 7
    assert set(names([batch])) == {0, 1, 2}


OPTIONS = {
    "texts": lambda: (texts(), {}),
    "buckets": lambda: (texts(), {"bucket_lengths": (4, 8, 12)}),
    "augmented": lambda: (images(num=50), {"augment": Augment(has_flip=True)}),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("step", [0, 1, 9])
def test_a_saved_state_gives_the_identical_rest(kind, step):
    data, options = OPTIONS[kind]()
    make = lambda: train_batches(data, batch_size=4, seed=5, **options)
    whole = first(make(), 30)
    interrupted = make()
    before = first(interrupted, step)
    state = json.loads(json.dumps(interrupted.get_state()))
    fresh = make()
    fresh.set_state(state)
    assert_same(before + first(fresh, 30 - step), whole)
    # Saving changes nothing, and neither does going back.
    assert_same(first(interrupted, 30 - step), whole[step:])
    interrupted.set_state(state)
    assert_same(first(interrupted, 5), whole[step : step + 5])


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_divide_each_batch_and_nothing_else_changes(kind, process_count):
    data, options = OPTIONS[kind]()
    whole = first(train_batches(data, batch_size=8, seed=1, **options), 12)
    parts = [
        first(
            train_batches(
                data,
                batch_size=8,
                seed=1,
                process_index=index,
                process_count=process_count,
                **options,
            ),
            12,
        )
        for index in range(process_count)
    ]
    for batch, *of_batch in zip(whole, *parts, strict=True):
        assert {part.inputs.shape for part in of_batch} == {
            (8 // process_count, *batch.inputs.shape[1:])
        }
        together = np.concatenate([part.inputs for part in of_batch])
        rows = lambda x: sorted(row.tobytes() for row in np.ascontiguousarray(x))
        assert rows(together) == rows(batch.inputs)
        labels = np.concatenate([part.labels for part in of_batch])
        assert sorted(labels) == sorted(batch.labels)


def test_buckets_are_few_shapes_that_cut_no_token():
    data = texts(num=60)
    lengths = (3, 7, 12)
    batches = first(
        train_batches(data, batch_size=6, seed=0, bucket_lengths=lengths), 90
    )
    assert {batch.inputs.shape for batch in batches} == {(6, n) for n in lengths}
    shorter = dict(zip(lengths, (0, 3, 7), strict=True))
    for batch in batches:
        length = batch.inputs.shape[1]
        assert (batch.lengths <= length).all()
        assert (batch.lengths > shorter[length]).all()
        np.testing.assert_array_equal(
            batch.inputs, data.take(batch.inputs[:, 0] - 2).inputs[:, :length]
        )
    # Nine epochs' worth: every text comes about that often.
    counts = np.bincount(names(batches), minlength=60)
    assert counts.min() >= 7
    assert counts.max() <= 11


def test_empty_buckets_are_left_out():
    data = texts(num=8)
    data = data.take(np.flatnonzero(data.lengths > 4))
    shapes = {
        batch.inputs.shape[1]
        for batch in first(
            train_batches(data, batch_size=2, seed=0, bucket_lengths=(4, 12)), 9
        )
    }
    assert shapes == {12}


def test_augmentation_shifts_and_mirrors_anew_in_each_epoch():
    # More than a few: grain's shuffle of 6 takes 2 ms an example, of 200 under 0.1.
    data = images(num=200)
    plain = first(train_batches(data, batch_size=6, seed=0), 150)
    changed = first(
        train_batches(data, batch_size=6, seed=0, augment=Augment(has_flip=True)), 150
    )
    seen = set()
    for before, after in zip(plain, changed, strict=True):
        np.testing.assert_array_equal(before.labels, after.labels)
        assert after.inputs.dtype == np.uint8
        for x, y in zip(before.inputs[..., 0], after.inputs[..., 0], strict=True):
            # The frame is as wide as the shift, so no pixel is lost.
            np.testing.assert_array_equal(np.sort(x, axis=None), np.sort(y, axis=None))
            top, left = np.argwhere(y == 255)[0]
            rows, columns = np.nonzero(y)
            assert (rows.max() - rows.min(), columns.max() - columns.min()) == (1, 1)
            assert top == rows.min()
            seen.add((rows.min() - 2, columns.min() - 2, left == columns.max()))
    shifts = set(itertools.product(range(-2, 3), range(-2, 3), (True, False)))
    assert seen == shifts


def test_without_a_flip_nothing_is_mirrored_and_pixels_leave_at_the_edge():
    rng = np.random.default_rng(0)
    image = np.arange(1, 17, dtype=np.uint8).reshape(4, 4, 1)
    padded = np.pad(image, ((3, 3), (3, 3), (0, 0)))
    windows = {
        padded[i : i + 4, j : j + 4].tobytes() for i in range(7) for j in range(7)
    }
    results = {Augment(max_shift=3)(image, rng).tobytes() for _ in range(500)}
    assert results == windows
    same = Augment(max_shift=0)(image, rng)
    np.testing.assert_array_equal(same, image)


def test_evaluation_is_one_ordered_pass_of_one_shape():
    for data, size in ((texts(num=10), 4), (images(num=10), 5), (texts(num=3), 8)):
        batches = eval_batches(data, batch_size=size)
        for passed in (list(batches), list(batches)):
            assert {len(batch.labels) for batch in passed} == {size}
            weights = np.concatenate([batch.weights for batch in passed])
            assert weights.dtype == np.float32
            np.testing.assert_array_equal(weights, np.arange(len(weights)) < len(data))
            for name in ("inputs", "labels", "lengths"):
                expected = getattr(data, name)
                if expected is None:
                    assert all(getattr(batch, name) is None for batch in passed)
                    continue
                values = np.concatenate([getattr(batch, name) for batch in passed])
                np.testing.assert_array_equal(values[: len(data)], expected)
                # What fills a batch is real, so that no loss is NaN.
                filling = values[len(data) :]
                assert (filling == expected[0]).all()
    assert not list(eval_batches(texts(num=0), batch_size=2))


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (texts(), {"batch_size": 0}, "batch_size must be a positive multiple"),
        (texts(), {"process_count": 3}, "got 4 and 3"),
        (texts(), {"process_index": 2, "process_count": 2}, "process_index must be in"),
        (texts(num=0), {}, "no examples"),
        (texts(), {"augment": Augment()}, "the examples are texts"),
        (images(), {"bucket_lengths": (4,)}, "the examples are images"),
        (texts(), {"bucket_lengths": ()}, "positive and rising"),
        (texts(), {"bucket_lengths": (4, 4, 12)}, "positive and rising"),
        (texts(), {"bucket_lengths": (0, 12)}, "positive and rising"),
        (texts(), {"bucket_lengths": (4, 8)}, "must hold the longest text"),
        (texts(), {"bucket_lengths": (4, 13)}, "not exceed the tokens"),
    ],
)
def test_bad_options_of_batches_are_refused(data, options, message):
    with pytest.raises(ValueError, match=message):
        train_batches(data, **{"batch_size": 4, "seed": 0} | options)


def test_bad_augmentation_and_evaluation_are_refused():
    with pytest.raises(ValueError, match="max_shift must not be negative"):
        Augment(max_shift=-1)
    image = np.zeros((2, 9, 1), np.uint8)
    with pytest.raises(ValueError, match="nothing would be left"):
        Augment(max_shift=2)(image, np.random.default_rng(0))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        eval_batches(texts(), batch_size=0)
