"""Tasks: prepared by TFDS without TensorFlow, read back, split."""

import gzip
import re
import sys
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

from experiments.data import TASKS, __main__, load, prepare, prepared, reviews
from experiments.data.builders import idx, movie_reviews


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tensorflow_datasets")


@pytest.fixture
def few_reviews(monkeypatch, tmp_path):
    """Sixty of the real reviews, the last ones negative or positive by turns."""
    texts, labels = reviews.load_reviews()
    index = np.concatenate([np.flatnonzero(labels == k)[:30] for k in (0, 1)])
    few = [texts[i] for i in index], labels[index]
    monkeypatch.setattr(movie_reviews, "load_reviews", lambda: few)
    return few


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim])
    content = header + b"".join(n.to_bytes(4, "big") for n in array.shape)
    content += array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_images(folder, suffix="", num=(40, 20), dot="-"):
    """Random IDX files of both splits; what they hold, by split."""
    rng = np.random.default_rng(0)
    tables = {}
    for size, (split, names) in zip(num, idx.FILES.items(), strict=True):
        images = rng.integers(0, 256, (size, 28, 28), np.uint8)
        labels = (np.arange(size) % 10).astype(np.uint8)
        for name, array in zip(names, (images, labels), strict=True):
            write_idx(folder / f"{name.replace('-idx', dot + 'idx')}{suffix}", array)
        tables[split] = images, labels
    return tables


def as_set(images, labels):
    return {(x.tobytes(), int(y)) for x, y in zip(images, labels, strict=True)}


def test_digits_are_split_without_leaks(data_dir):
    data = load("digits", data_dir=data_dir)
    splits = (data.train, data.validation, data.test)
    assert [len(split) for split in splits] == [1259, 179, 359]
    assert (data.name, data.num_classes, data.vocab_size) == ("digits", 10, None)
    assert data.train.inputs.shape == (1259, 8, 8, 1)
    assert data.train.inputs.dtype == np.uint8
    assert data.train.labels.dtype == np.int32
    assert data.train.lengths is None
    digits = load_digits()
    expected = np.round(digits.images * 255 / 16).astype(np.uint8)
    read = [
        (image.tobytes(), int(label))
        for split in splits
        for image, label in zip(split.inputs, split.labels, strict=True)
    ]
    real = zip((x.tobytes() for x in expected), digits.target.tolist(), strict=True)
    assert sorted(read) == sorted(real)
    for split in splits:
        share = np.bincount(split.labels) / np.bincount(digits.target)
        np.testing.assert_allclose(share, len(split) / 1797, atol=0.02)
    assert "tensorflow" not in sys.modules


def test_splits_depend_on_the_seed_and_fewer_examples_are_among_more(data_dir):
    data, again, other, few = (
        load("digits", data_dir=data_dir, **options)
        for options in ({}, {}, {"seed": 1}, {"num_train": 100})
    )
    for name in ("train", "validation", "test"):
        inputs = getattr(data, name).inputs
        np.testing.assert_array_equal(inputs, getattr(again, name).inputs)
        assert (inputs != getattr(other, name).inputs).any()
    np.testing.assert_array_equal(few.train.inputs, data.train.inputs[:100])
    np.testing.assert_array_equal(few.test.inputs, data.test.inputs)
    for num_train in (0, 1260):
        with pytest.raises(ValueError, match=r"num_train must be in \[1, 1259\]"):
            load("digits", data_dir=data_dir, num_train=num_train)


@pytest.mark.parametrize(
    ("task", "suffix", "dot"),
    [("fashion_mnist", ".gz", "-"), ("mnist", "", "-"), ("mnist", ".gz", ".")],
)
def test_idx_files_are_found_where_tfds_wants_manual_downloads(
    task, suffix, dot, tmp_path
):
    tables = write_images(tmp_path / "downloads" / "manual" / task, suffix, dot=dot)
    data = load(task, data_dir=tmp_path)
    assert [len(x) for x in (data.train, data.validation, data.test)] == [40, 0, 20]
    assert data.train.inputs.shape[1:] == (28, 28, 1)
    for split, examples in (("train", data.train), ("test", data.test)):
        assert as_set(examples.inputs, examples.labels) == as_set(*tables[split])


def test_idx_files_of_packages_come_next_and_validation_is_of_training(
    tmp_path, monkeypatch
):
    folder = tmp_path / "package"
    monkeypatch.setattr(TASKS["fashion_mnist"], "installed", (folder,))
    tables = write_images(folder, ".gz", num=(200, 20))
    data = load("fashion_mnist", data_dir=tmp_path)
    assert [len(x) for x in (data.train, data.validation, data.test)] == [180, 20, 20]
    assert as_set(data.test.inputs, data.test.labels) == as_set(*tables["test"])
    parts = [as_set(x.inputs, x.labels) for x in (data.train, data.validation)]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == as_set(*tables["train"])
    np.testing.assert_array_equal(np.bincount(data.validation.labels), np.full(10, 2))
    # Prepared once, the files are no longer needed.
    monkeypatch.setattr(TASKS["fashion_mnist"], "installed", ())
    again = load("fashion_mnist", data_dir=tmp_path)
    np.testing.assert_array_equal(again.train.inputs, data.train.inputs)


def test_missing_files_name_the_commands_that_install_them(tmp_path, monkeypatch):
    monkeypatch.setattr(TASKS["fashion_mnist"], "installed", (tmp_path / "no",))
    manual = tmp_path / "downloads" / "manual" / "fashion_mnist"
    with pytest.raises(FileNotFoundError) as caught:
        load("fashion_mnist", data_dir=tmp_path)
    assert str(manual) in str(caught.value)
    assert "apt-get install dataset-fashion-mnist" in str(caught.value)
    assert "python -m experiments.data fashion_mnist --download" in str(caught.value)
    # A failure leaves nothing behind that would pass for the data.
    write_images(manual)
    assert len(load("fashion_mnist", data_dir=tmp_path).test) == 20
    with pytest.raises(FileNotFoundError, match=r"experiments\.data mnist --download"):
        load("mnist", data_dir=tmp_path)


def test_downloads_are_asked_for_by_name(tmp_path, monkeypatch):
    tables = write_images(tmp_path / "server", ".gz")
    asked = {}

    def download(self, urls):
        asked.update(urls)
        return {name: tmp_path / "server" / f"{name}.gz" for name in urls}

    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    prepare("mnist", data_dir=tmp_path, download=True)
    assert asked["t10k-labels-idx1-ubyte"].endswith("/mnist/t10k-labels-idx1-ubyte.gz")
    data = load("mnist", data_dir=tmp_path)
    assert as_set(data.test.inputs, data.test.labels) == as_set(*tables["test"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with nothing"),
        (b"<html>", "begins with 3c 68 74 6d"),
        (b"\0\0\x08\x01\0\0\0\x03ab", "must hold 3 values, got 2"),
        (b"\0\0\x08\x01\0\0", "damaged or incomplete"),
    ],
)
def test_damaged_idx_files_are_refused(content, message, tmp_path):
    path = tmp_path / "file"
    for version in (content, gzip.compress(content)):
        path.write_bytes(version)
        with pytest.raises(ValueError, match=message):
            idx.read_idx(path)


def test_truncated_downloads_are_refused(tmp_path):
    path = tmp_path / "file.gz"
    write_idx(path, np.zeros(99, np.uint8))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        idx.read_idx(path)


def test_images_without_labels_are_refused(tmp_path):
    folder = tmp_path / "downloads" / "manual" / "mnist"
    write_images(folder)
    write_idx(folder / idx.FILES["train"][1], np.zeros(39, np.uint8))
    with pytest.raises(ValueError, match="must be equally many, got 40"):
        load("mnist", data_dir=tmp_path)


def decoded(data, split):
    """The texts of a split, up to what the vocabulary knows."""
    return {row.tobytes() for row in getattr(data, split).inputs}


@pytest.mark.parametrize("tokenizer", ["word", "bpe"])
def test_imdb_is_prepared_split_and_encoded(tokenizer, few_reviews, tmp_path):
    options = dict(data_dir=tmp_path, seq_len=20, vocab_size=300, tokenizer=tokenizer)
    data = load("imdb", **options)
    splits = (data.train, data.validation, data.test)
    assert [len(split) for split in splits] == [42, 6, 12]
    assert [int(split.labels.sum()) for split in splits] == [21, 3, 6]
    assert data.num_classes == 2
    assert 200 < data.vocab_size <= 300
    for split in splits:
        assert split.inputs.shape == (len(split), 20)
        assert split.inputs.dtype == split.lengths.dtype == np.int32
        assert split.inputs.max() < data.vocab_size
    sets = [decoded(data, name) for name in ("train", "validation", "test")]
    assert len(set.union(*sets)) == 60
    again = load("imdb", **options)
    np.testing.assert_array_equal(data.test.inputs, again.test.inputs)


def test_the_vocabulary_is_of_the_training_split(monkeypatch, tmp_path):
    few = [f"word{i}" for i in range(40)], np.repeat([0, 1], 20)
    monkeypatch.setattr(movie_reviews, "load_reviews", lambda: few)
    data = load("imdb", data_dir=tmp_path, seq_len=2, num_train=10)
    assert data.vocab_size == 12
    assert sorted(data.train.inputs[:, 0]) == list(range(2, 12))
    for split in (data.validation, data.test):
        np.testing.assert_array_equal(split.inputs[:, 0], 1)


def test_records_keep_the_reviews_as_they_are(few_reviews, tmp_path):
    builder = prepare("imdb", data_dir=tmp_path)
    table = prepared.read(builder.info, builder.as_data_source()).by_split["train"]
    read = sorted(zip(table.inputs, table.labels.tolist(), strict=True))
    assert read == sorted(zip(few_reviews[0], few_reviews[1].tolist(), strict=True))


def test_missing_packages_name_the_command_that_installs_them(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        load("digits", data_dir=tmp_path)


def test_what_tfds_has_prepared_is_read_by_name(data_dir, tmp_path):
    expected = load("digits", data_dir=data_dir)
    data = load("tfds:digits", data_dir=data_dir)
    assert data.name == "tfds:digits"
    np.testing.assert_array_equal(data.train.inputs, expected.train.inputs)
    for name in ("digits", "imdb_reviews", "no_such_data"):
        with pytest.raises(FileNotFoundError, match=rf"tfds build {name} "):
            load(f"tfds:{name}", data_dir=tmp_path)


class Labelled(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set whose features and rows the tests choose."""

    VERSION = tfds.core.Version("1.0.0")
    features: ClassVar[dict] = {}
    keys: ClassVar[tuple | None] = ("x", "y")
    rows: ClassVar[dict] = {}

    def _info(self):
        features = tfds.features.FeaturesDict(self.features)
        return tfds.core.DatasetInfo(
            builder=self, features=features, supervised_keys=self.keys
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.rows}

    def _generate_examples(self, split):
        yield from enumerate(self.rows[split])


def write_labelled(tmp_path, **changes):
    builder = type("Labelled", (Labelled,), changes, skip_registration=True)
    builder = builder(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    return builder


TEXT = {"x": tfds.features.Text(), "y": tfds.features.ClassLabel(num_classes=2)}


def test_given_splits_are_kept_and_those_without_labels_left_out(tmp_path):
    row = lambda i, label: {"x": f"<br />Word{i}  ", "y": label}
    rows = {
        "train": [row(i, i % 2) for i in range(20)],
        "validation": [row(i, 1) for i in range(20, 23)],
        "test": [row(i, -1) for i in range(30, 35)],
    }
    builder = write_labelled(tmp_path, features=TEXT, rows=rows)
    tables = prepared.read(builder.info, builder.as_data_source()).by_split
    assert sorted(tables) == ["train", "validation"]
    assert sorted(tables["validation"].inputs) == ["Word20", "Word21", "Word22"]
    # TFDS does not know this builder: it reads what lies in the folder.
    data = load("tfds:labelled", data_dir=tmp_path)
    assert [len(x) for x in (data.train, data.validation, data.test)] == [16, 3, 4]


def test_mocked_data_are_read_like_real_ones(tmp_path):
    rows = {"train": [{"x": "a", "y": 0}], "test": [{"x": "b", "y": 1}]}
    write_labelled(tmp_path, features=TEXT, rows=rows)
    with tfds.testing.mock_data(num_examples=30, data_dir=tmp_path):
        mocked = tfds.data_source("labelled", split="train")[0]
        data = load("tfds:labelled", data_dir=tmp_path, seq_len=6, vocab_size=50)
    assert isinstance(mocked["x"], str)  # Real ones are bytes.
    assert len(data.test) == len(data.train) + len(data.validation) == 30
    assert data.train.inputs.max() > 2
    assert set(data.test.labels) == {0, 1}


IMAGE = tfds.features.Tensor(shape=(None, 2, 1), dtype=np.uint8, encoding="bytes")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": None}, "must have an input and a class label"),
        ({"features": TEXT | {"y": tfds.features.Scalar(np.int64)}}, "a class label"),
        (
            {
                "features": TEXT | {"x": IMAGE},
                "rows": {
                    "train": [
                        {"x": np.zeros((n, 2, 1), np.uint8), "y": 0} for n in (1, 2)
                    ]
                },
            },
            "images of one size",
        ),
        (
            {
                "features": TEXT | {"x": tfds.features.Scalar(np.float32)},
                "rows": {"train": [{"x": 1.0, "y": 0}]},
            },
            "images of one size",
        ),
        ({"rows": {"test": [{"x": "a", "y": 0}]}}, "must have a labelled split train"),
    ],
)
def test_data_sets_of_other_kinds_are_refused(changes, message, tmp_path):
    rows = {"train": [{"x": "a", "y": 0}, {"x": "b", "y": 1}]}
    write_labelled(tmp_path, **{"features": TEXT, "rows": rows} | changes)
    with pytest.raises(ValueError, match=message):
        load("tfds:labelled", data_dir=tmp_path)


def test_unknown_tasks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no task 'cifar'; give one of"):
        load("cifar", data_dir=tmp_path)


def test_command_line(tmp_path, capsys):
    write_images(tmp_path / "downloads" / "manual" / "mnist")
    __main__.main("mnist", data_dir=tmp_path)
    printed = capsys.readouterr().out
    assert re.search(r"train: 40 examples, 0\.\d MB", printed)
    assert str(tmp_path) in printed
