"""Fixtures of the tests of attention."""

import jax
import pytest

from sinkhorn_jax.attention._streaming import query_blocks


@pytest.fixture(scope="module")
def short_query_blocks():
    """`streaming` in query blocks of 3 rows, which divide few of the lengths here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(query_blocks, "MAX_BLOCK_ROWS", 3)
        jax.clear_caches()
        yield
    jax.clear_caches()
