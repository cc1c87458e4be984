"""PyTorch: its softmax attention, and Sinkhorn attention with autograd, both eager."""

import functools
import math

import jax
import numpy as np
import torch

from ..harness import limits, machine, process_memory
from ..harness.cases import Case
from ..harness.program import Mode, Program


def sinkhorn(query, key, value, num_iters):
    """Sinkhorn attention in log space, as in Sinkformers (arXiv 2110.11773, section 3).

    Half precision is widened to float32.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key, value_wide = (x.to(dtype) for x in (query, key, value))
    logits = query @ key.mT / math.sqrt(query.shape[-1])  # [1, N, T, S]
    log_col_marginal = math.log(logits.shape[-2] / logits.shape[-1])
    f = -torch.logsumexp(logits, dim=-1, keepdim=True)
    g = torch.zeros_like(logits[..., :1, :])
    for _ in range(num_iters):
        g = log_col_marginal - torch.logsumexp(logits + f, dim=-2, keepdim=True)
        f = -torch.logsumexp(logits + g, dim=-1, keepdim=True)
    return (torch.exp(logits + f + g) @ value_wide).to(value.dtype)


def why_not(case: Case) -> str | None:
    """The reason why PyTorch cannot compute where JAX does, or None."""
    del case
    platform = jax.default_backend()
    if platform == "cpu" or (platform == "gpu" and torch.cuda.is_available()):
        return None
    return f"PyTorch finds no {platform} here, and other devices would not compare"


def build(function: str, case: Case, mode: Mode) -> Program:
    """The eager program on JAX's device, with as many threads as there are CPUs."""
    is_cuda = jax.default_backend() == "gpu"
    limits.check_memory(_num_bytes(function, case, mode))
    torch.set_num_threads(machine.num_cpus())
    attend = functools.partial(sinkhorn, num_iters=case.num_iters)
    if function == "softmax":
        attend = torch.nn.functional.scaled_dot_product_attention

    def prepare(inputs):  # Tensors (1, N, T, H), PyTorch's order.
        wide = np.float64 if case.dtype == "float64" else np.float32  # No bfloat16.
        return tuple(
            torch.tensor(np.asarray(x).astype(wide))
            .to("cuda" if is_cuda else "cpu", getattr(torch, case.dtype))
            .transpose(1, 2)
            .contiguous()
            .requires_grad_(mode == "forward_backward" and name != "cotangent")
            for name, x in zip(inputs._fields, inputs, strict=True)
        )

    def call(query, key, value, cotangent):
        if mode == "forward":
            with torch.inference_mode():
                result = (attend(query, key, value),)
        else:
            out = attend(query, key, value)
            grads = torch.autograd.grad(out, (query, key, value), cotangent)
            result = (out.detach(), grads)
        if is_cuda:
            torch.cuda.synchronize()
        return result

    return Program(
        call=call,
        prepare=prepare,
        to_numpy=lambda result: jax.tree.map(_to_numpy, result),
        version=f"torch {torch.__version__}",
        memory_source="resident",
        measure_peak=None if is_cuda else process_memory.peak_growth,
    )


def _num_bytes(function, case, mode):
    # Fused softmax attention stores no T x S array. Sinkhorn forward needs up to six;
    # autograd keeps the argument of each of the 2 L + 1 log-sum-exps, and about eleven
    # more were measured for its temporaries.
    arrays = 0
    if function == "sinkhorn":
        arrays = 6 if mode == "forward" else 2 * case.num_iters + 12
    vectors = 8 * case.tokens * case.head_dim  # Inputs and results.
    size = 8 if case.dtype == "float64" else 4
    return size * case.heads * (arrays * case.tokens**2 + vectors)


def _to_numpy(x):
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.transpose(1, 2).to("cpu", wide).numpy()
