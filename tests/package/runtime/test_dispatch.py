"""Errors of the tables of implementations, and of the checks that all calls share."""

import jax
import jax.numpy as jnp
import pytest
from support.matrices import random

from sinkhorn_jax import sinkhorn, sinkhorn_potentials
from sinkhorn_jax._runtime.dispatch import Implementation, select

FUNCTIONS = pytest.mark.parametrize("function", [sinkhorn, sinkhorn_potentials])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="it is about a CPU")
@FUNCTIONS
@pytest.mark.parametrize("name", ["mosaic_gpu", "mosaic_tpu"])
def test_kernels_for_matrices_on_a_cpu_say_what_they_are_for(function, name):
    says = f"{name}.*for a {name[-3:].upper()}, and JAX computes on a CPU"
    with pytest.raises(NotImplementedError, match=says):
        function(random(0, (2, 4, 4)).astype("float32"), implementation=name)


@FUNCTIONS
def test_forward_mode_names_the_implementation_that_has_it(function):
    logits = random(0, (2, 4, 4))
    with pytest.raises(TypeError, match=r"forward-mode.*implementation='reference'"):
        jax.jvp(function, (logits,), (logits,))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "kernels_of_this_test.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    table = {"kernels": Implementation("kernels_of_this_test")}
    with pytest.raises(ModuleNotFoundError, match="need the package 'no_such_package'"):
        select(table, "kernels", None)


@pytest.mark.usefixtures("unchecked")
class TestMatrixArguments:
    @FUNCTIONS
    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ({"logits": None}, "logits must be an array, got None"),
            ({"logits": "abc"}, "logits must be an array, got str"),
            ({"logits": [[1.0], [1.0, 2.0]]}, "logits must be an array, got list"),
            ({"row_marginal": "abc"}, "row_marginal must be an array, got str"),
            ({"where": object()}, "where must be an array, got object"),
            ({"tolerance": "0.1"}, "tolerance must be a number, got '0.1'"),
            ({"tolerance": True}, "tolerance must be a number, got True"),
        ],
    )
    def test_what_is_no_array_or_number_is_named(self, function, arguments, says):
        with pytest.raises(TypeError, match=says):
            function(**({"logits": jnp.zeros((2, 2))} | arguments))


@pytest.mark.parametrize("implementation", ["scaling", "reference"])
def test_the_plan_to_a_tolerance_is_that_of_the_potentials(implementation):
    logits = random(0, (3, 5, 7))
    options = {"tolerance": 0.05, "implementation": implementation}
    f, g, error, num_iters = sinkhorn_potentials(logits, 20, **options)
    assert (num_iters < 20).all()
    assert (error <= 0.05).all()
    plan = jnp.exp(logits + f[:, :, None] + g[:, None, :])
    assert abs(sinkhorn(logits, 20, **options) - plan).max() < 1e-12
