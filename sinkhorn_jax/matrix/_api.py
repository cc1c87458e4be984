"""The matrix functions: signatures, and the table of implementations."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._core.gradient import Exact, Gradient
from .._core.marginals import near_one
from .._core.options import Finish, Options
from .._runtime.arguments import as_array, refuse_no_number
from .._runtime.dispatch import Implementation, in_terms_of_the_call, select
from .._runtime.partition import by_typed_part
from ._problem import Potentials
from ._validate import WHOLE, validated

MatrixImplementation = Literal["mosaic_gpu", "mosaic_tpu", "scaling", "reference"]

# In order of preference. "reference" runs everywhere and stays last. The kernels were
# compiled but not measured, so no platform takes them unasked. The tests and the
# benchmarks read this table. A new implementation is its module, a line here, its name
# in the Literal and its entry in the docstring.
IMPLEMENTATIONS: Final[Mapping[str, Implementation]] = MappingProxyType(
    {
        "mosaic_gpu": Implementation(
            "sinkhorn_jax.matrix._small.mosaic_gpu", platforms=(), device="gpu"
        ),
        "mosaic_tpu": Implementation(
            "sinkhorn_jax.matrix._small.mosaic_tpu", platforms=(), device="tpu"
        ),
        "scaling": Implementation("sinkhorn_jax.matrix._scaling"),
        "reference": Implementation("sinkhorn_jax.matrix._reference"),
    }
)


def sinkhorn(
    logits: Float[Array, "*batch T S"],
    num_iters: int = 10,
    *,
    row_marginal: Float[Array, "..."] | None = None,
    col_marginal: Float[Array, "..."] | None = None,
    where: Bool[Array, "..."] | None = None,
    column_tau: float | Float[Array, "..."] = 1.0,
    finish: Finish = "rows",
    gradient: Gradient = Exact(),  # noqa: B008 - frozen.
    tolerance: float | None = None,
    implementation: MatrixImplementation | None = None,
) -> Float[Array, "*batch T S"]:
    r"""Doubly stochastic matrices: for two axes what softmax is for one.

    Starts from the softmax over the last axis, then normalises columns and rows
    `num_iters` times. For logits $Z$ the plan is $P_{ij} = \exp(Z_{ij} + f_i + g_j)$.
    Its row sums are exact, and its column sums approach theirs. With 0 iterations it is
    `jax.nn.softmax`.

    A row or column without an allowed entry, or with a marginal of 0, is padding. It
    takes part in neither marginal, its plan entries and gradients are 0, and all else
    is as for the matrix without it.

    Leading axes may be divided over devices: each device computes its own matrices.

    Args:
        logits: T rows and S columns after any number of leading axes; floating. -inf
            means the same as False in `where`. A large negative number does not: in a
            whole column it cancels, and the column gets its full mass.
        num_iters: Full iterations, a column step and then a row step each; a Python
            integer. Time is linear in it.
        row_marginal: Row sums, broadcast to (..., T); 0 makes a row padding. Default:
            1, or if only `col_marginal` is given, uniform with the same total. Ignored
            for padding.
        col_marginal: Column sums, broadcast to (..., S), with the total of the row
            sums. Default: uniform, which is T / S without padding or row marginal.
            Marginals are checked where their values are concrete, under `jit` and
            `vmap` too; elsewhere signs and totals are preconditions, which
            `traced_checks` examines. Where only the logits are traced, their entries
            count as allowed: give what they exclude by -inf a marginal of 0, or name it
            in `where`.
        where: True for allowed entries; boolean, broadcasts to the logits.
        column_tau: τ in [0, 1], from the softmax itself (0, for any `num_iters`) to
            doubly stochastic (1): a column step sets
            $g = \tau\,(\log b - \mathrm{logsumexp}_i(Z + f))$. Below 1 the iteration
            converges to entropic transport with a penalty
            $\tau / (1 - \tau)\,\mathrm{KL}$ on the columns: they keep a marginal
            error, and the two totals need not agree. A number, or a floating array that
            broadcasts to (...), with a gradient.
        finish: "rows", or "columns" to leave out the last row step: then the columns
            are exact and the rows approximate.
        gradient: `Exact`, `Truncated` or `Implicit`; see their docstrings. The second
            derivatives of `Truncated` differ between implementations:
            docs/choosing.md says how.
        tolerance: The marginal error at which a matrix stops, as in
            `sinkhorn_potentials`, which also tells how far it came. None runs all
            iterations.
        implementation: None takes "scaling". By name:

            - "scaling": scalings of one kernel matrix, and a closed-form gradient.
              Reverse mode, any number of times: Hessians by `jax.jacrev(jax.grad(f))`
              are exact.
            - "reference": a log-space scan that JAX differentiates; for forward mode
              (`jax.jvp`, `jax.jacfwd`) and any other transform.
            - "mosaic_tpu", "mosaic_gpu": Pallas kernels for TPUs, and for NVIDIA GPUs
              from Hopper on, that compute many matrices of at most 16 rows and columns
              at once. They take float32 and bfloat16, `Exact`, no tolerance and no
              `column_tau` below 1; reverse mode only. Neither has been measured yet. On
              another platform they raise NotImplementedError, and under `jit` an error
              of Pallas.

    Returns:
        The plan, in the shape and dtype of the logits. Computed in float32 at least.
        No plan has marginals of different totals. Where their values are not known, as
        those of arguments of `jit`, they pass in silence: the rows sum to theirs, the
        columns do not approach theirs, and the marginal error of `sinkhorn_potentials`
        does not fall below the relative difference. `traced_checks` finds them.

    Raises:
        TypeError: Logits or marginals are not floating, `where` is not boolean,
            `num_iters` is not an integer, or an implementation other than "reference"
            is differentiated in forward mode.
        ValueError: Shapes disagree or are empty, `num_iters` is negative, `finish` or
            `implementation` is unknown, `column_tau` is outside [0, 1], or marginals
            are negative or not finite, or differ in total by more than 1e-3 of it (in
            bfloat16, by more than its eps) where `column_tau` is 1.
        NotImplementedError: The named implementation cannot run this problem.

    Reference:
        Sinkhorn & Knopp, Pacific J. Math. 21, 1967. Cuturi, Sinkhorn Distances, 2013.
        https://arxiv.org/abs/1306.0895
    """
    _check_arrays(logits, row_marginal, col_marginal, where)
    options = _options(num_iters, finish, gradient, tolerance)
    problem, matrices = validated(
        logits, row_marginal, col_marginal, where, column_tau, options
    )
    chosen = select(IMPLEMENTATIONS, implementation, problem)

    def of_part(matrices):
        matrices, unit = _to_unit(problem, matrices)
        plan = _solve(chosen.plan, problem, implementation, matrices)
        return plan if unit is None else plan * unit[..., None]

    plan = by_typed_part(of_part, problem.axes, problem.axes, matrices, why_whole=WHOLE)
    return plan.astype(problem.dtype)


def sinkhorn_potentials(
    logits: Float[Array, "*batch T S"],
    num_iters: int = 10,
    *,
    row_marginal: Float[Array, "..."] | None = None,
    col_marginal: Float[Array, "..."] | None = None,
    where: Bool[Array, "..."] | None = None,
    column_tau: float | Float[Array, "..."] = 1.0,
    finish: Finish = "rows",
    gradient: Gradient = Exact(),  # noqa: B008 - frozen.
    tolerance: float | None = None,
    implementation: MatrixImplementation | None = None,
) -> Potentials:
    r"""The potentials of `sinkhorn`, with the marginal error and the iterations run.

    The plan is $\exp(Z_{ij} + f_i + g_j)$. For logits $-C/\varepsilon$, the dual
    variables of entropic optimal transport are $\varepsilon f$ and $\varepsilon g$.

    Args:
        logits: As in `sinkhorn`.
        num_iters: Full iterations; with a tolerance, at most as many.
        row_marginal: As in `sinkhorn`.
        col_marginal: As in `sinkhorn`.
        where: As in `sinkhorn`.
        column_tau: As in `sinkhorn`.
        finish: As in `sinkhorn`.
        gradient: As in `sinkhorn`. With a tolerance, `Exact` differentiates the
            iterations that ran.
        tolerance: The marginal error at which a matrix stops, each by itself. It is
            tested after each full iteration, and on the softmax except with
            finish="columns", which needs a column step. None runs all iterations.
        implementation: As in `sinkhorn`.

    Returns:
        `Potentials` with f (..., T), g (..., S), marginal_error (...) and num_iters
        (...), in float32, or in float64 for float64 logits.

    Raises:
        TypeError: As for `sinkhorn`.
        ValueError: As for `sinkhorn`, or `tolerance` is negative or not finite.
        NotImplementedError: As for `sinkhorn`.

    Reference:
        Peyré & Cuturi, Computational Optimal Transport, 2019, section 4.4.
        https://arxiv.org/abs/1803.00567
    """
    _check_arrays(logits, row_marginal, col_marginal, where)
    options = _options(num_iters, finish, gradient, tolerance)
    problem, matrices = validated(
        logits, row_marginal, col_marginal, where, column_tau, options
    )
    chosen = select(IMPLEMENTATIONS, implementation, problem)

    def of_part(matrices):
        matrices, unit = _to_unit(problem, matrices)
        found = _solve(chosen.potentials, problem, implementation, matrices)
        if unit is None:
            return found
        return found._replace(f=jnp.where(matrices.a == 0, 0, found.f + jnp.log(unit)))

    return by_typed_part(of_part, problem.axes, problem.axes, matrices, why_whole=WHOLE)


def _solve(solve, problem, implementation, matrices):
    with in_terms_of_the_call(IMPLEMENTATIONS, implementation):
        return solve(problem.part_of(matrices), matrices)


def _to_unit(problem, matrices):
    """The matrices with marginals near 1, and the unit (..., 1) of those given."""
    if not problem.has_marginals:
        return matrices, None
    a, b, unit = near_one(matrices.a, matrices.b)
    return matrices._replace(a=a, b=b), unit


def _check_arrays(logits, row_marginal, col_marginal, where):
    # The arguments stay as they are: under `jit` the values of a result are not known.
    as_array("logits", logits)
    optional = {"row_marginal": row_marginal, "col_marginal": col_marginal}
    for name, x in (optional | {"where": where}).items():
        if x is not None:
            as_array(name, x)


def _options(num_iters, finish, gradient, tolerance):
    refuse_no_number("tolerance", tolerance)
    return Options(num_iters, finish, gradient, tolerance)
