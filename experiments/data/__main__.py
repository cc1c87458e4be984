"""`python -m experiments.data <task>` prepares a data set for `load`."""

import pathlib
import time
from typing import Annotated

import tyro

from .. import errors
from .tasks import prepare


def main(
    task: Annotated[str, tyro.conf.Positional],
    data_dir: pathlib.Path | None = None,
    download: bool = False,
) -> None:
    """Writes a data set as array records, unless it is there, and prints its splits.

    Args:
        task: One of imdb, fashion_mnist, mnist and digits.
        data_dir: The folder of TFDS; by default TFDS_DATA_DIR or
            ~/tensorflow_datasets.
        download: Whether to download missing files, for the tasks made from files.
    """
    start = time.monotonic()
    with errors.in_one_line():
        builder = prepare(task, data_dir=data_dir, download=download)
    for split, info in builder.info.splits.items():
        print(f"{split}: {info.num_examples:,} examples, {info.num_bytes / 1e6:.1f} MB")
    print(f"Took {time.monotonic() - start:.0f} s. In {builder.data_path}.")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m experiments.data")
