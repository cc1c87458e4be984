"""The tables of what implementations refuse in the documentation."""

import pytest
import refusal_table


def test_the_page_is_what_the_implementations_say():
    assert refusal_table.page() == refusal_table.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", refusal_table.TABLES)
def test_the_plain_call_is_refused_by_none(name):
    implementations, plain, _ = refusal_table.TABLES[name]
    for each in implementations.values():
        assert each.load().why_not(plain) is None
