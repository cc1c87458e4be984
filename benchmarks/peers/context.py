"""JAX as other libraries expect it."""

import contextlib
import warnings
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def lenient() -> Iterator[None]:
    """Standard promotion, products at highest precision, and no warnings.

    Libraries import what others have deprecated and mix dtypes; the benchmarks' own
    code may be run under stricter settings. Precision is that of Sinkhorn here.
    """
    with (
        warnings.catch_warnings(),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.default_matmul_precision("highest"),
    ):
        warnings.simplefilter("ignore")
        yield
