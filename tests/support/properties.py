"""Properties held against random problems, by the thousand."""

import hypothesis


def check_many(program, num_examples, seed=0):
    """Checks random problems of a program; returns the largest errors of all."""
    worst = {}

    @hypothesis.settings(max_examples=num_examples, deadline=None, database=None)
    @hypothesis.seed(seed)
    @hypothesis.given(program.draw())
    def check_each(problem):
        for name, error in program.check(problem).items():
            worst[name] = max(error, worst.get(name, 0.0))

    check_each()
    return worst
