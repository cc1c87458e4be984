"""TFDS builders that prepare and read without TensorFlow, as array records."""

from .digits import Digits as Digits
from .idx import FashionMnistIdx as FashionMnistIdx
from .idx import IdxBuilder as IdxBuilder
from .idx import MnistIdx as MnistIdx
from .movie_reviews import MovieReviews as MovieReviews
