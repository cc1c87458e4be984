"""The table of transforms in the documentation."""

import pathlib

import pytest
import transform_table


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_the_page_is_what_is_found():
    page = pathlib.Path(__file__).parents[2] / "docs" / "transforms.md"
    assert transform_table.table() == page.read_text()


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["`jit`", "`jvp`, `jacfwd`, `linearize`"])
def test_an_entry_is_found_by_trying(name):
    page = pathlib.Path(__file__).parents[2] / "docs" / "transforms.md"
    (line,) = (x for x in page.read_text().splitlines() if x.startswith(f"| {name}"))
    problem = transform_table.COLUMNS["`sinkhorn`, scaling"]
    found = transform_table.outcome(transform_table.ROWS[name], problem)
    assert line.split(" | ")[1] == found
