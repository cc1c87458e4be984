"""The properties of every attention problem, on random ones of all kinds.

Hypothesis draws the problems, and reduces one that fails to a simple one. `make fuzz`
draws many more, for every program of `random_attention`.
"""

import pytest
from support.properties import check_many
from support.random_attention import Program

from sinkhorn_jax import Truncated

# Every option once with another, and few to compile.
PROGRAMS = [
    Program("streaming", "float32", (6, 6), padding="mask"),
    Program("scaling", "float32", (33, 17), (4, 2), padding="lengths"),
    Program("scaling", "float64", (5, 7), (2, 1), 5, "columns", Truncated(2), "mask"),
    Program("streaming", "float64", (1, 8), finish="columns"),
    Program("reference", "float32", (5, 7), padding="lengths"),
    Program("scaling", "float32", (33, 17), (4, 2), padding="segments"),
    Program("streaming", "float32", (6, 6), padding="window"),
    Program("streaming", "float64", (5, 7), (2, 1), 5, "columns", padding="segments"),
    Program(
        "scaling", "float64", (33, 17), (4, 2), gradient=Truncated(2), padding="window"
    ),
]


@pytest.mark.few(1)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_what_holds_for_every_problem(program):
    check_many(program, 50)
