"""How the places of the parts of an array become axes of a mesh."""

import numpy as np
import pytest

from sinkhorn_jax._runtime.prime_mesh import primes, spec_of


@pytest.mark.parametrize(
    ("places", "spec"),
    [
        (np.arange(6).reshape(1, 2, 3), ((0, 1),)),  # Over both axes.
        (np.arange(6).reshape(1, 2, 3) // 3, ((0,),)),
        (np.arange(6).reshape(1, 2, 3) % 3, ((1,),)),
        # The second axis of the mesh is the slower one.
        (np.arange(6).reshape(1, 3, 2).swapaxes(1, 2), ((1, 0),)),
        (np.indices((2, 3)), ((0,), (1,))),
        (np.indices((2, 3))[::-1], ((1,), (0,))),
        (np.zeros((2, 2, 3), int), ((), ())),
        (np.arange(6).reshape(1, 2, 3) // 2, None),  # No axis of the mesh.
        (np.arange(6)[::-1].reshape(1, 2, 3), None),
    ],
)
def test_spec_of(places, spec):
    assert spec_of(places) == spec


def test_primes():
    assert [primes(n) for n in (1, 2, 8, 12)] == [[], [2], [2, 2, 2], [2, 2, 3]]
