"""MNIST and data sets of the same format from their IDX files, as TFDS data sets."""

import gzip
import math
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from .labelled import Labelled

# The files of images and of labels, by split.
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}

CLOTHES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"


class IdxBuilder(Labelled, skip_registration=True):
    """Images of 28 x 28 pixels in ten classes, from four files, compressed or not.

    The files are read from the folder of TFDS for manual downloads, which is
    `downloads/manual/<task>` in the data directory, or from the folders of an installed
    package, or they are downloaded from `homepage`.
    """

    key = "image"
    # TFDS needs TensorFlow to encode arrays as PNG.
    feature = tfds.features.Tensor(shape=(28, 28, 1), dtype=np.uint8, encoding="zlib")

    task: ClassVar[str]  # The key of TASKS.
    installed: ClassVar[tuple[pathlib.Path, ...]] = ()  # Where packages put the files.
    install_command: ClassVar[str | None] = None

    def _split_generators(self, dl_manager) -> dict[str, Iterator[Any]]:
        names = [name for pair in FILES.values() for name in pair]
        manual = pathlib.Path(dl_manager.download_dir) / "manual" / self.task
        for folder in (manual, *self.installed):
            paths = {name: _find(folder, name) for name in names}
            if None not in paths.values():
                break
        else:
            if not self._download:
                raise FileNotFoundError(self._how_to_install(manual))
            urls = {name: f"{self.homepage}{name}.gz" for name in names}
            paths = dl_manager.download(urls)
        return {
            split: self._generate_examples(*_read(paths[images], paths[labels]))
            for split, (images, labels) in FILES.items()
        }

    def _how_to_install(self, manual):
        folders = " and ".join(str(folder) for folder in (manual, *self.installed))
        install = f"run `{self.install_command}`, " if self.install_command else ""
        return (
            f"No IDX files of {self.task} in {folders}. To install them, {install}"
            f"put the four files ({FILES['train'][0]}.gz and so on) into "
            f"{manual}, or, with a network, run "
            f"`python -m experiments.data {self.task} --download`."
        )


class MnistIdx(IdxBuilder):
    """Handwritten digits, LeCun et al. 1998."""

    task = about = "mnist"
    homepage = "https://storage.googleapis.com/cvdf-datasets/mnist/"
    classes = tuple("0123456789")


class FashionMnistIdx(IdxBuilder):
    """Pictures of clothes, Xiao et al. 2017, https://arxiv.org/abs/1708.07747."""

    task = about = "fashion_mnist"
    installed = (pathlib.Path("/usr/share/datasets/fashion-mnist"),)
    install_command = "apt-get install dataset-fashion-mnist"
    homepage = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
    classes = tuple(CLOTHES.split(","))


def _read(images, labels):
    pixels, classes = read_idx(images), read_idx(labels)
    if len(pixels) != len(classes):
        raise ValueError(
            f"Images and labels must be equally many, got {len(pixels)} in "
            f"{images} and {len(classes)} in {labels}. Install both again."
        )
    return pixels[..., None], classes


def _find(folder, name):
    """The file of this name, or of its compressed or dotted variant; None if absent."""
    variants = (name, name.replace("-idx", ".idx"))
    paths = (folder / f"{variant}{end}" for variant in variants for end in ("", ".gz"))
    return next(filter(pathlib.Path.is_file, paths), None)


def read_idx(path) -> UInt8[np.ndarray, "..."]:
    """The array of bytes in an IDX file, which may be compressed.

    Raises:
        ValueError: The file is no IDX file of bytes, or is damaged or incomplete.
    """
    content = pathlib.Path(path).read_bytes()
    if content.startswith(b"\x1f\x8b"):  # The name of a download does not tell.
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(
                f"{path} is damaged or incomplete: {error}. Install it again."
            ) from error
    # Two zeros, 8 for unsigned bytes, and the number of dimensions.
    if len(content) < 4 or not content.startswith(b"\0\0\x08"):
        raise ValueError(
            f"{path} must be an IDX file of unsigned bytes, got one that begins with "
            f"{content[:4].hex(' ') or 'nothing'}. Install it again."
        )
    num_dims = content[3]
    start = 4 + 4 * num_dims
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"{path} must hold {math.prod(shape)} values, got {len(content) - start}: "
            "it is damaged or incomplete. Install it again."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
