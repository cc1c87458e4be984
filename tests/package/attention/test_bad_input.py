"""`sinkhorn_attention` says what is wrong with its arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.attention_cases import PLAIN, B, D, H, K, N, S, T, inputs

from sinkhorn_jax import Exact, sinkhorn_attention
from sinkhorn_jax.attention import IMPLEMENTATIONS

KEYS = jax.random.split(jax.random.key(0), 3)
KEY = {"dropout_rate": 0.5, "dropout_rng": KEYS[0]}


@pytest.mark.usefixtures("unchecked")
class TestBadInput:
    @pytest.mark.parametrize(
        ("changed", "error", "says"),
        [
            ({"query": (B, T, N, H + 1)}, ValueError, "head dimensions H.*differ"),
            ({"key": (B + 1, S, K, H)}, ValueError, "batch sizes B differ"),
            ({"value": (B, S + 1, K, D)}, ValueError, "key lengths S.*differ"),
            ({"value": (B, S, K + 1, D)}, ValueError, "key heads K.*differ"),
            ({"query": (B, T, 3, H)}, ValueError, "3 query heads cannot share 2"),
            ({"query": (T, N, H)}, ValueError, "must all be"),
            ({"query": (B, 0, N, H)}, ValueError, "query must not be empty"),
            ({"key": (B, 0, K, H)}, ValueError, "key must not be empty"),
        ],
    )
    def test_shapes(self, changed, error, says):
        shapes = {"query": (B, T, N, H), "key": (B, S, K, H), "value": (B, S, K, D)}
        arrays = {name: jnp.ones(shape) for name, shape in (shapes | changed).items()}
        with pytest.raises(error, match=says):
            sinkhorn_attention(**arrays)

    @pytest.mark.parametrize(
        ("options", "error", "says"),
        [
            ({"is_causal": True}, ValueError, "identity.*dot_product_attention"),
            ({"num_iters": -1}, ValueError, "negative, got -1"),
            ({"num_iters": 1.5}, TypeError, "integer.*1.5"),
            ({"finish": "columns", "num_iters": 0}, ValueError, "at least 1"),
            ({"gradient": Exact}, TypeError, "instance of Exact"),
            ({"implementation": "fast"}, ValueError, "scaling.*reference"),
            ({"bias": jnp.ones((T, S), bool)}, TypeError, "bias must be floating"),
            ({"bias": jnp.ones((S, T))}, ValueError, r"bias must broadcast.*\(7, 5\)"),
            ({"bias": jnp.ones((1, B, N, T, S))}, ValueError, "bias must broadcast"),
            ({"mask": jnp.ones((T, S))}, TypeError, "mask must be boolean"),
            ({"mask": jnp.ones((B, K, T, S), bool)}, ValueError, "mask must broadcast"),
            ({"query_seq_lengths": jnp.ones(B)}, TypeError, "integer"),
            ({"key_value_seq_lengths": jnp.ones(3, int)}, ValueError, r"shape \(2,\)"),
            ({"query_seq_lengths": jnp.array([T + 1, 2])}, ValueError, "the 5.*got 6"),
            ({"key_value_seq_lengths": jnp.array(-1)}, ValueError, "the 7.*got -1"),
            ({"mask": "all"}, TypeError, "mask must be an array, got str"),
            ({"dropout_rate": 0.1}, ValueError, "needs dropout_rng"),
            ({"dropout_rate": 1.0}, ValueError, r"\[0, 1\), got 1.0"),
            ({"dropout_rate": "0.1"}, TypeError, "dropout_rate must be a number.*str"),
            ({"dropout_rate": True}, TypeError, "dropout_rate must be a number.*bool"),
            (KEY | {"dropout_rng": 0}, TypeError, r"got 0.*Use jax.random.key\(seed\)"),
            (KEY | {"dropout_rng": jnp.ones(2)}, TypeError, "random.key.*float64"),
            (KEY | {"dropout_rng": KEYS}, ValueError, r"one key.*\(3,\).*jax.vmap"),
            ({"scale": jnp.ones(N)}, TypeError, r"scale.*\(4,\).*multiply the query"),
            ({"scale": np.ones(N)}, TypeError, "scale.*multiply the query"),
            ({"scale": jnp.ones((), int)}, TypeError, "scale.*floating.*int64"),
            ({"scale": "1.5"}, TypeError, "scale must be a number, got '1.5'"),
            ({"scale": True}, TypeError, "scale must be a number, got True"),
            ({"scale": float("nan")}, ValueError, "finite"),
            ({"scale": jnp.asarray(jnp.inf)}, ValueError, "finite"),
            ({"finish": "cols"}, ValueError, "finish must be one of.*'cols'"),
        ],
    )
    def test_options(self, options, error, says):
        with pytest.raises(error, match=says):
            sinkhorn_attention(*inputs(), **options)

    def test_dtypes(self):
        query, key, value = inputs()
        with pytest.raises(TypeError, match="floating, got int"):
            sinkhorn_attention(query.astype(int), key, value)
        with pytest.raises(TypeError, match="one dtype"):
            sinkhorn_attention(query, key.astype("float32"), value)

    @pytest.mark.parametrize("name", ["query", "key", "value"])
    def test_missing_arrays(self, name):
        arrays = dict(zip(("query", "key", "value"), inputs(), strict=True))
        with pytest.raises(TypeError, match=f"{name} must be an array, got None"):
            sinkhorn_attention(**(arrays | {name: None}))


@pytest.mark.usefixtures("unchecked")  # NumPy arrays are not annotated.
class TestCausal:
    """Wherever the values of a mask or bias are known."""

    mask = np.tri(T, dtype=bool)
    says = "identity as the only doubly stochastic plan.*dot_product_attention"

    @pytest.mark.parametrize(
        "options",
        [
            {"mask": mask},
            {"mask": np.broadcast_to(mask, (B, 1, T, T)) & (np.arange(T) < 3)},
            {"mask": mask.T},
            {"mask": np.tril(mask, -1)},
            {"bias": np.where(mask, 0, -np.inf)},
            {"bias": np.where(mask, 0, -1e9)[None]},
        ],
        ids=[
            *("mask", "with padding", "reversed", "without the diagonal"),
            *("bias", "large negative bias"),
        ],
    )
    def test_is_explained(self, options):
        query, key, value = inputs(s=T)
        (name, x), *_ = options.items()
        for known in (x, jnp.asarray(x)):
            with pytest.raises(ValueError, match=self.says):
                sinkhorn_attention(query, key, value, **{name: known})
            # A constant of a compiled function is known there too.
            attend = lambda query, x=known: sinkhorn_attention(
                query, key, value, **{name: x}
            )
            with pytest.raises(ValueError, match=f"A.*causal {name}.*{self.says}"):
                jax.jit(attend)(query)

    def test_other_patterns_are_not(self):
        query, key, value = inputs(s=T)
        blocks = np.kron(np.eye(2, dtype=bool), np.ones((3, 3), bool))[:T, :T]
        causal_in_one_element = np.stack(
            [self.mask, ~self.mask | np.eye(T, dtype=bool)]
        )
        for mask in (blocks, np.eye(T, dtype=bool), causal_in_one_element[:, None]):
            sinkhorn_attention(query, key, value, mask=mask, num_iters=1)
        sinkhorn_attention(*inputs(), mask=np.tri(T, S, dtype=bool), num_iters=1)

    def test_a_list_is_examined(self, unchecked):
        with pytest.raises(ValueError, match=self.says):
            sinkhorn_attention(*inputs(s=T), mask=self.mask.tolist())

    def test_one_triangle_without_the_diagonal_may_have_a_plan(self):
        half = T // 2
        reads_the_first_half = np.zeros((T, T), bool)
        reads_the_first_half[-half:, :half] = True
        reads_the_first_half[-half, 0] = False
        previous = np.eye(T, k=-1, dtype=bool)
        for mask in (reads_the_first_half, previous, previous.T):
            _, error = sinkhorn_attention(
                *inputs(s=T), mask=mask, num_iters=50, return_marginal_error=True
            )
            assert error.max() < 0.1

    @pytest.mark.parametrize(("rows", "cols"), [(1, 4), (4, 1), (1, 1)])
    def test_padding_that_leaves_one_triangle_is_not(self, rows, cols):
        query, key, value = inputs(s=T)
        valid = np.arange(T) < rows, np.arange(T) < cols
        out = sinkhorn_attention(query, key, value, mask=np.outer(*valid))
        expected = sinkhorn_attention(query[:, :rows], key[:, :cols], value[:, :cols])
        np.testing.assert_allclose(out[:, :rows], expected, atol=1e-12)


@pytest.mark.parametrize("implementation", [*PLAIN, None])
def test_forward_mode_names_the_implementation_that_has_it(implementation):
    query, key, value = inputs()

    def attend(query):
        return sinkhorn_attention(
            query, key, value, num_iters=1, implementation=implementation
        )

    def tangent():
        return jax.jvp(attend, (query,), (jnp.ones_like(query),))[1]

    if implementation == "reference":
        step = 1e-6
        slope = (attend(query + step) - attend(query - step)) / (2 * step)
        np.testing.assert_allclose(tangent(), slope, atol=1e-8)
        return
    says = "no forward-mode.*Use implementation='reference'"
    with pytest.raises(TypeError, match=says):
        tangent()
    with pytest.raises(TypeError, match=says):
        jax.jacfwd(attend)(query)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="it is about a CPU")
@pytest.mark.parametrize("name", [x for x in IMPLEMENTATIONS if x not in PLAIN])
def test_kernels_on_a_cpu_say_what_they_are_for(name):
    operands = inputs("bfloat16")
    platform = name[-3:].upper()
    says = rf"{name}.*for a {platform}, and JAX computes on a CPU.*choosing\.md"
    with pytest.raises(NotImplementedError, match=says):
        sinkhorn_attention(*operands, implementation=name)


def test_one_length_for_all_and_lengths_under_vmap():
    operands = inputs()
    attend = lambda length, *operands: sinkhorn_attention(
        *operands, query_seq_lengths=length, key_value_seq_lengths=length
    )
    out = jax.vmap(attend)(jnp.array([3, 5]), *operands)
    expected = attend(jnp.array([3, 5]), *operands)
    np.testing.assert_allclose(out, expected, atol=1e-12)
    same = attend(jnp.array(3), *operands)
    np.testing.assert_allclose(same[0], expected[0], atol=1e-12)
