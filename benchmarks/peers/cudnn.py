"""JAX's softmax attention in cuDNN: one fused kernel, on NVIDIA GPUs alone."""

import functools
import importlib.metadata

import jax
from jax.extend.backend import get_backend

from ..harness.cases import Case
from ..harness.program import Mode, Program, compiled
from .context import lenient


def softmax(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`jax.nn.dot_product_attention` that may not take anything else."""
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


def why_not(function: str, case: Case, mode: Mode) -> str | None:
    """A reason, or None."""
    del function, mode
    backend = get_backend()
    if "cuda" not in backend.platform_version.lower():
        return (
            f"cuDNN is for NVIDIA GPUs, and JAX computes on a "
            f"{backend.platform.upper()} here"
        )
    if case.dtype not in ("bfloat16", "float16"):
        return f"cuDNN's attention takes bfloat16 and float16, got {case.dtype}"
    return None


def build(function: str, case: Case, mode: Mode) -> Program:
    """The compiled program."""
    with lenient():
        return compiled(
            {"softmax": softmax}[function],
            case,
            mode,
            single_head=False,
            matmul_precision="default",  # cuDNN is not asked for another.
            version=f"cuDNN {_version()}",
        )


@functools.cache
def _version() -> str:
    """Of the package that JAX's plugins bring, if there is one."""
    found = [
        dist.version
        for dist in importlib.metadata.distributions()
        if (dist.metadata["Name"] or "").startswith("nvidia-cudnn-cu")
    ]
    return max(found, default="of the system")
