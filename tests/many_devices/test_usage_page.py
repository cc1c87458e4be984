"""Whether the examples for many devices run on many."""

import pathlib
import re

import jax
import jax.numpy as jnp

import sinkhorn_jax

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "usage.md"


def test_examples_run():
    (section,) = re.findall(
        r"\n## More than one device\n(.*?)\n## ", PAGE.read_text(), re.DOTALL
    )
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 3
    names = {"jax": jax, "jnp": jnp} | vars(sinkhorn_jax)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(block, names)
            assert len(names["out"].sharding.device_set) == 8
