"""Checks of arguments that the entry points share: arrays, numbers and sizes."""

import contextlib
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

# Of an array that an accelerator holds, to look for a wrong argument: a mask of
# 4096 x 4096 tokens.
MAX_FETCHED_BYTES: Final = 2**24

_has_traced_checks = jax.make_user_context(default_value=False)


def traced_checks(*, is_on: bool = True) -> contextlib.AbstractContextManager[None]:
    """A context in which values that are not known to `jit` are checked as well.

    Those are causal masks and biases, sequence lengths and `column_tau` out of range,
    and marginals that are negative, not finite or of different totals. The checks are
    compiled into the program, and `jax.experimental.checkify.checkify`, as the
    outermost transform, returns what they found:

        with traced_checks():
            error, out = checkify.checkify(jax.jit(f))(x)
        error.throw()

    Without `checkify` a program with checks is an error of JAX. By default there are
    none, because they make each call slower and the program impossible to serialise.

    Args:
        is_on: Whether they are on; False switches them off within another context.
    """
    return _has_traced_checks(is_on)


def has_traced_checks() -> bool:
    """Whether `traced_checks` are on."""
    return _has_traced_checks.value


def as_array(name: str, x: Any) -> Array:
    """The argument as an array of JAX.

    Raises:
        TypeError: It is None, or nothing that JAX makes an array of.
    """
    if isinstance(x, jax.Array):
        return x
    if x is None:
        raise TypeError(f"{name} must be an array, got None: it has no default.")
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be an array, got {type(x).__name__}, which JAX does not "
            f"convert: {error}"
        ) from None


def known_values(x: Any) -> np.ndarray | None:
    """The values of an array; None where they are not known here.

    That is under a transform of JAX, where other processes hold some of them, and where
    they are many on an accelerator, from which they would have to be fetched.
    """
    if isinstance(x, np.ndarray):
        return x
    if isinstance(x, (list, tuple)):
        are_arrays = any(isinstance(y, jax.Array) for y in jax.tree.leaves(x))
        return None if are_arrays else np.asarray(x)
    if not isinstance(x, jax.Array) or isinstance(x, Tracer):
        return None
    if not x.is_fully_addressable:
        return None
    on_cpu = all(device.platform == "cpu" for device in x.devices())
    return np.asarray(x) if on_cpu or x.nbytes <= MAX_FETCHED_BYTES else None


def refuse_no_number(name: str, value: Any) -> None:
    """Raises TypeError for text and truth values, which `float` would convert."""
    if isinstance(value, (str, bytes, bool, np.bool_)):
        raise TypeError(
            f"{name} must be a number, got {value!r} of type {type(value).__name__}. "
            "Convert it first."
        )


def are_known(*sizes: Any) -> bool:
    """Whether all sizes are numbers; `jax.export` may have symbols in their place.

    A comparison of symbols raises an error, so decisions about speed are made without
    those sizes.
    """
    return all(isinstance(size, int) for size in sizes)
