"""Programs as JAX traces them."""

from jax.extend.core import jaxprs_in_params


def equations(jaxpr):
    """Yields all equations of a jaxpr, also of jaxprs within it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)
