"""PyTorch: its softmax attention, and Sinkhorn attention with autograd.

Tensors are (1, N, T, H), PyTorch's own order, and are made from the same arrays before
the clock runs.
"""

import math

import jax
import numpy as np
import torch

from ..harness import limits as _limits
from ..harness import machine as _machine
from ..harness import process_memory as _process
from ..harness.cases import Case
from ..harness.program import Mode, Program


def softmax(query, key, value, num_iters):
    """`torch.nn.functional.scaled_dot_product_attention`."""
    del num_iters
    return torch.nn.functional.scaled_dot_product_attention(query, key, value)


def sinkhorn(query, key, value, num_iters):
    """Sinkhorn attention in log space as in Sinkformers (arXiv 2110.11773, section 3).

    Half steps alternate from the softmax on: potentials from log-sum-exps of the
    logits, the plan at the end. Half precision is widened to float32 on the way.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key, value_wide = (x.to(dtype) for x in (query, key, value))
    logits = query @ key.mT / math.sqrt(query.shape[-1])  # [1, N, T, S]
    log_column_mass = math.log(logits.shape[-2] / logits.shape[-1])
    f = -torch.logsumexp(logits, dim=-1, keepdim=True)
    g = torch.zeros_like(logits[..., :1, :])
    for _ in range(num_iters):
        g = log_column_mass - torch.logsumexp(logits + f, dim=-2, keepdim=True)
        f = -torch.logsumexp(logits + g, dim=-1, keepdim=True)
    return (torch.exp(logits + f + g) @ value_wide).to(value.dtype)


def why_not(function: str, case: Case, mode: Mode) -> str | None:
    """A reason, or None: PyTorch must compute where JAX does."""
    del function, case, mode
    platform = jax.default_backend()
    if platform == "cpu" or (platform == "gpu" and torch.cuda.is_available()):
        return None
    return f"PyTorch finds no {platform} here, and other devices would not compare"


def build(function: str, case: Case, mode: Mode) -> Program:
    """The eager program on JAX's device, with as many threads as there are CPUs."""
    is_cuda = jax.default_backend() == "gpu"
    if is_cuda:
        torch.cuda.empty_cache()  # What earlier cases left is free then.
    free = torch.cuda.mem_get_info()[0] if is_cuda else None
    _limits.check_memory(_estimate(function, case, mode), free)
    torch.set_num_threads(_machine.num_cpus())
    attend = {"softmax": softmax, "sinkhorn": sinkhorn}[function]

    def prepare(inputs):
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
                result = (attend(query, key, value, case.num_iters),)
        else:
            out = attend(query, key, value, case.num_iters)
            grads = torch.autograd.grad(out, (query, key, value), cotangent)
            result = (out.detach(), grads)
        if is_cuda:
            torch.cuda.synchronize()
        return result

    return Program(
        call=call,
        prepare=prepare,
        to_numpy=lambda result: jax.tree.map(_to_numpy, result),
        matmul_precision=torch.get_float32_matmul_precision(),
        version=f"torch {torch.__version__}",
        memory_source="allocator" if is_cuda else "resident",
        measure_peak=_cuda_peak if is_cuda else _process.peak_growth,
    )


def _estimate(function, case, mode):
    # Softmax attention is fused on every device: no T x S array. Sinkhorn forward holds
    # up to six; autograd keeps the argument of every log-sum-exp, 2 L + 1 of them, and
    # its temporaries and gaps between arrays were measured to be about eleven.
    arrays = {
        ("softmax", "forward"): 0,
        ("softmax", "forward_backward"): 0,
        ("sinkhorn", "forward"): 6,
        ("sinkhorn", "forward_backward"): 2 * case.num_iters + 12,
    }[function, mode]
    size = 8 if case.dtype == "float64" else 4
    vectors = 8 * case.tokens * case.head_dim  # Inputs and results.
    return size * case.heads * (arrays * case.tokens**2 + vectors)


def _cuda_peak(call):
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    growth = torch.cuda.max_memory_allocated() - before
    del out
    return growth


def _to_numpy(x):
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.transpose(1, 2).to("cpu", wide).numpy()
