"""Whether the examples for many devices run on many."""

import pathlib
import re

import jax

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "many-devices.md"


def test_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    names = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(block, names)
            assert len(names["out"].sharding.device_set) == 8
