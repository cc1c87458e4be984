"""TFDS builders that write and read array records, without TensorFlow."""

from .digits import Digits as Digits
from .idx import FashionMnistIdx as FashionMnistIdx
from .idx import MnistIdx as MnistIdx
from .movie_reviews import MovieReviews as MovieReviews
