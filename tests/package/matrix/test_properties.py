"""The properties of every matrix problem, on random ones of all kinds.

Hypothesis draws the problems, and reduces one that fails to a simple one. `make fuzz`
draws many more, for every program of `random_matrices`.
"""

import pytest
from support.properties import check_many
from support.random_matrices import Program

from sinkhorn_jax import Implicit, Truncated

# Every option once with another, and few to compile.
PROGRAMS = [
    Program("scaling", "float32", (24, 24)),
    Program("scaling", "float64", (5, 7), finish="columns", tolerance=1e-3),
    Program("scaling", "float32", (1, 8), tolerance=1e-3),
    Program("scaling", "float64", (16, 3), gradient=Truncated(2)),
    Program("scaling", "float64", (6, 6), 300, gradient=Implicit(tolerance=1e-12)),
    Program("reference", "float32", (5, 7)),
]


@pytest.mark.few(2)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_what_holds_for_every_problem(program):
    check_many(program, 300 // len(PROGRAMS))
