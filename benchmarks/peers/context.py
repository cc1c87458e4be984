"""The JAX settings under which peers run."""

import contextlib
import warnings
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def lenient() -> Iterator[None]:
    """Standard promotion, products at highest precision as in ours, and no warnings."""
    with (
        warnings.catch_warnings(),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.default_matmul_precision("highest"),
    ):
        warnings.simplefilter("ignore")
        yield
