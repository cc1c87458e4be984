"""Data sets, split and ready for the encoder."""

from .text import Dataset as Dataset
from .text import Reviews as Reviews
from .text import imdb as imdb
