"""JAX's softmax attention in cuDNN: one fused kernel, on NVIDIA GPUs alone."""

import functools

import jax
from jax.extend.backend import get_backend

from ..harness.cases import Case
from ..harness.program import Mode, Program, compiled
from .context import lenient


def why_not(case: Case) -> str | None:
    """The reason why cuDNN cannot run the case here, or None."""
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
    """The compiled program, at cuDNN's own precision."""
    del function
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    with lenient():
        return compiled(attend, case, mode, version="cuDNN")
