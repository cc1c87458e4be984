"""The matrix functions: signatures, checks, and the table of implementations."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from .._core.gradient import Exact, Gradient
from .._core.iteration import Finish
from .._core.options import Options
from .._core.precision import accum_dtype
from .._runtime.dispatch import Implementation, select
from ._problem import Potentials, Problem

MatrixImplementation = Literal["mosaic_gpu", "mosaic_tpu", "scaling", "reference"]

# In order of preference. "reference" runs everywhere and stays last. The kernels were
# compiled but not measured, so no platform takes them unasked. The tests and the
# benchmarks read this table, so a new implementation is its module and a line here.
IMPLEMENTATIONS: Final[Mapping[str, Implementation]] = MappingProxyType(
    {
        "mosaic_gpu": Implementation(
            "sinkhorn_jax.matrix._small.mosaic_gpu", platforms=()
        ),
        "mosaic_tpu": Implementation(
            "sinkhorn_jax.matrix._small.mosaic_tpu", platforms=()
        ),
        "scaling": Implementation("sinkhorn_jax.matrix._scaling"),
        "reference": Implementation("sinkhorn_jax.matrix._reference"),
    }
)

# Larger relative differences between the totals of the marginals are an error, smaller
# ones rounding.
TOTALS_RTOL: Final = 1e-3


def sinkhorn(
    logits: Float[Array, "*batch T S"],
    num_iters: int = 10,
    *,
    row_marginal: Float[Array, "..."] | None = None,
    col_marginal: Float[Array, "..."] | None = None,
    where: Bool[Array, "..."] | None = None,
    finish: Finish = "rows",
    gradient: Gradient = Exact(),  # noqa: B008 - frozen.
    implementation: MatrixImplementation | None = None,
) -> Float[Array, "*batch T S"]:
    r"""Doubly stochastic matrices: for the last two axes what softmax is for one.

    Starts from the softmax over the last axis, then normalises columns and rows
    `num_iters` times: $P_{ij} = \exp(Z_{ij} + f_i + g_j)$ for the logits $Z$. Row sums
    are exact, column sums approach theirs. At 0 it is `jax.nn.softmax`.

    A row or column without an allowed entry is padding: it takes part in neither
    marginal, and its plan entries and gradients are zero, so that the rest equals the
    result for the matrix without it.

    Args:
        logits: Any leading axes, T rows and S columns, floating. -inf means the same as
            False in `where`. A large negative number does not: in a whole column it
            cancels, and the column gets its full mass.
        num_iters: Column-then-row normalisations, a Python integer. Time is linear in
            it.
        row_marginal: Row sums, positive, broadcast to (..., T). Default: 1, or with
            only `col_marginal` given uniform with the same total. Ignored for padding.
        col_marginal: Column sums, positive, broadcast to (..., S), with the same total
            as the rows'. Default: uniform, which is T / S without padding or row
            marginal. Positivity and totals are checked where the values are concrete
            and are preconditions under `jit`.
        where: True for allowed entries; boolean, broadcasts to the logits.
        finish: "rows", or "columns" to drop the last row step: then the columns are
            exact and the rows approximate.
        gradient: `Exact`, `Truncated` or `Implicit`; see their docstrings.
        implementation: "scaling" (the default) is fast and has a closed-form gradient,
            reverse mode only; "reference" is a log-space scan for forward mode,
            Hessians and any other transform. "mosaic_tpu" and "mosaic_gpu"
            are Pallas kernels for TPUs and NVIDIA GPUs from Hopper on: for many
            matrices of at most 16 rows and columns in float32 or bfloat16, with `Exact`
            and no tolerance, in reverse mode only; not measured on either yet.

    Returns:
        The plan, in the shape and dtype of the logits. Computed in float32 at least.

    Raises:
        TypeError: Logits or marginals are not floating, `where` is not boolean, or
            `num_iters` is not an integer.
        ValueError: Shapes disagree or are empty, `num_iters` is negative, `finish` or
            `implementation` is unknown, or marginals are not positive or differ in
            total by more than 1e-3 of it.
        NotImplementedError: The named implementation cannot run this problem.

    Reference:
        Sinkhorn & Knopp, Pacific J. Math. 21, 1967. Cuturi, Sinkhorn Distances, 2013.
        https://arxiv.org/abs/1306.0895
    """
    options = Options(num_iters, finish, gradient)
    logits = jnp.asarray(logits)
    problem, batch = _problem(logits, options)
    chosen = select(IMPLEMENTATIONS, implementation, problem)
    plan = chosen.plan(problem, *_operands(logits, row_marginal, col_marginal, where))
    return plan.reshape(*batch, problem.t, problem.s).astype(logits.dtype)


def sinkhorn_potentials(
    logits: Float[Array, "*batch T S"],
    num_iters: int = 10,
    *,
    row_marginal: Float[Array, "..."] | None = None,
    col_marginal: Float[Array, "..."] | None = None,
    where: Bool[Array, "..."] | None = None,
    finish: Finish = "rows",
    gradient: Gradient = Exact(),  # noqa: B008 - frozen.
    tolerance: float | None = None,
    implementation: MatrixImplementation | None = None,
) -> Potentials:
    r"""The potentials of `sinkhorn`, its marginal error and its iterations.

    The plan is $\exp(Z_{ij} + f_i + g_j)$. With logits $-C/\varepsilon$ the
    dual variables of entropic optimal transport are $\varepsilon f$ and
    $\varepsilon g$.

    Args:
        logits: As in `sinkhorn`, and so are the arguments not listed here.
        num_iters: Full iterations, with a tolerance the most of them.
        row_marginal: As in `sinkhorn`.
        col_marginal: As in `sinkhorn`.
        where: As in `sinkhorn`.
        finish: As in `sinkhorn`.
        gradient: As in `sinkhorn`. `Exact` is exact with a tolerance too: it goes back
            over the iterations that ran.
        tolerance: Stop each matrix by itself once its marginal error is no more than
            this: tested on the softmax (not with finish="columns", which needs one
            column step) and after each full iteration. None runs all iterations.
        implementation: As in `sinkhorn`.

    Returns:
        `Potentials`: f (..., T), g (..., S), marginal_error (...) and num_iters (...).
        Float32 at least, float64 for float64 logits.

    Raises:
        TypeError: As for `sinkhorn`.
        ValueError: As for `sinkhorn`, or `tolerance` is negative or not finite.
        NotImplementedError: As for `sinkhorn`.

    Reference:
        Peyré & Cuturi, Computational Optimal Transport, 2019, section 4.4.
        https://arxiv.org/abs/1803.00567
    """
    options = Options(num_iters, finish, gradient, tolerance)
    logits = jnp.asarray(logits)
    problem, batch = _problem(logits, options)
    chosen = select(IMPLEMENTATIONS, implementation, problem)
    operands = _operands(logits, row_marginal, col_marginal, where)
    potentials = chosen.potentials(problem, *operands)
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), potentials)


def _problem(logits, options):
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(
            f"logits must be floating, got {logits.dtype}: they are exponentiated. "
            "Cast them first."
        )
    if logits.ndim < 2:
        raise ValueError(
            f"logits must have at least two axes (..., T, S), got shape {logits.shape}."
        )
    *batch, t, s = logits.shape
    if t == 0 or s == 0:
        raise ValueError(
            f"logits must have at least one row and one column, got shape "
            f"{logits.shape}: an empty plan has no marginals."
        )
    problem = Problem(
        batch=math.prod(batch), t=t, s=s, dtype=logits.dtype, options=options
    )
    return problem, batch


def _operands(logits, row_marginal, col_marginal, where):
    """Logits with -inf where excluded and both marginals, 0 for padding; one batch."""
    *batch, t, s = logits.shape
    dtype = accum_dtype(logits.dtype)
    logits = logits.astype(dtype)
    if where is not None:
        where = _broadcast("where", jnp.asarray(where), logits.shape)
        logits = jnp.where(where, logits, -jnp.inf)
    rows, cols = (logits != -jnp.inf).any(axis=-1), (logits != -jnp.inf).any(axis=-2)
    a = _marginal("row_marginal", row_marginal, rows, dtype)
    b = _marginal("col_marginal", col_marginal, cols, dtype)
    if a is not None and b is not None:
        _check_totals(a, b)
    if a is None:
        a = rows.astype(dtype) if b is None else _uniform(rows, b.sum(axis=-1))
    if b is None:
        b = _uniform(cols, a.sum(axis=-1))
    num = math.prod(batch)
    return logits.reshape(num, t, s), a.reshape(num, t), b.reshape(num, s)


def _marginal(name, marginal, valid, dtype):
    if marginal is None:
        return None
    marginal = jnp.asarray(marginal)
    if not jnp.issubdtype(marginal.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be floating, got {marginal.dtype}. Cast it first."
        )
    marginal = _broadcast(name, marginal, valid.shape).astype(dtype)
    marginal = jnp.where(valid, marginal, 0)
    if _is_concrete(marginal):
        ok = ~valid | ((marginal > 0) & jnp.isfinite(marginal))
        if not ok.all():
            raise ValueError(
                f"{name} must be positive, normal and finite, got a minimum of "
                f"{jnp.where(valid, marginal, jnp.inf).min()}: a row or column without "
                "mass has no potential. Exclude it through `where` instead."
            )
    return marginal


def _uniform(valid, total):
    count = valid.sum(axis=-1).astype(total.dtype)
    share = total / jnp.where(count == 0, 1, count)
    return jnp.where(valid, share[..., None], 0)


def _check_totals(a, b):
    if not (_is_concrete(a) and _is_concrete(b)):
        return
    a, b = a.sum(axis=-1), b.sum(axis=-1)
    if (jnp.abs(a - b) > TOTALS_RTOL * jnp.maximum(a, b)).any():
        worst = jnp.unravel_index(jnp.abs(a - b).argmax(), a.shape)
        raise ValueError(
            f"row_marginal and col_marginal must have the same total, got {a[worst]} "
            f"and {b[worst]}: no plan has both. Rescale one of them."
        )


def _broadcast(name, x, shape):
    if name == "where" and x.dtype != jnp.bool_:
        raise TypeError(
            f"where must be boolean, got {x.dtype}: True marks allowed entries. Use "
            "`where != 0`, or add a float mask to the logits."
        )
    try:
        fits = jnp.broadcast_shapes(x.shape, shape) == tuple(shape)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} must broadcast to {tuple(shape)}, the shape that the logits give "
            f"it, got {x.shape}."
        )
    return jnp.broadcast_to(x, shape)


def _is_concrete(x):
    return not isinstance(x, Tracer)
