"""`sinkhorn_attention`: values, gradients, padding, dropout, transforms, bad input."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from support import reference
from support.hostile import hostile_logits

from sinkhorn_jax import Exact, Implicit, Truncated, sinkhorn_attention
from sinkhorn_jax.attention import IMPLEMENTATIONS
from sinkhorn_jax.attention._streaming import strips as _strips

# Outputs are averages of values of order 1. The 16-bit types round the inputs' products
# nowhere and the output once: 8 and 11 bits of mantissa.
ATOL = {"float64": 1e-12, "float32": 3e-6, "bfloat16": 2e-2, "float16": 2e-3}
FLOAT64_GRADIENT_ATOL = 1e-11

B, T, S, N, K, H, D = 2, 5, 7, 4, 2, 3, 6

implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
PLAIN = [name for name in IMPLEMENTATIONS if "mosaic" not in name]  # Take float64.


@pytest.fixture(scope="module", autouse=True)
def short_strips():
    """So that `streaming` has many, which divide few of the lengths here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_strips, "MAX_STRIP_ROWS", 3)
        jax.clear_caches()
        yield
    jax.clear_caches()


def problem(
    dtype="float64", b=B, t=T, s=S, n=N, k=K, h=H, d=D, scale=1.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    shapes = (b, t, n, h), (b, s, k, h), (b, s, k, d)
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys, shapes, strict=True)
    )
    return query * jnp.asarray(scale, dtype), key, value


def random(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape, "float64")


def sparse_mask():
    """Every row and column keeps an entry, whatever the lengths below leave."""
    allowed = np.random.default_rng(0).uniform(size=(1, N, T, S)) < 0.7
    allowed[..., 0] = allowed[..., 0, :] = True
    return jnp.asarray(allowed)


# Each an options dict for the library, and what the oracle calls it.
CASES = {
    "plain": {},
    "columns": {"finish": "columns"},
    "bias over batch": {"bias": random(5, (1, N, T, S))},
    "bias over queries": {"bias": random(5, (B, 1, 1, S))},
    "bias": {"bias": random(5, (B, N, T, S)), "finish": "columns"},
    "mask": {"mask": sparse_mask()},
    "lengths": {"query_seq_lengths": [3, 5], "key_value_seq_lengths": [7, 4]},
    "an empty element": {"query_seq_lengths": [0, 5], "key_value_seq_lengths": [3, 4]},
    "key lengths": {"key_value_seq_lengths": [7, 4], "bias": random(5, (T, S))},
    "everything": {
        "finish": "columns",
        "mask": sparse_mask()[0, 0],
        "bias": random(5, (N, T, 1)),
        "query_seq_lengths": [3, 5],
        "key_value_seq_lengths": [7, 4],
        "scale": 0.7,
    },
}


def options_of(case):
    options = dict(CASES[case])
    for name in ("query_seq_lengths", "key_value_seq_lengths"):
        if name in options:
            options[name] = jnp.asarray(options[name])
    return options


def oracle_options(options):
    names = "query_seq_lengths", "key_value_seq_lengths"
    return {k: v for k, v in options.items() if k not in names} | {
        "lengths": tuple(options.get(name) for name in names)
    }


@implementations
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_oracle(implementation, case):
    operands, options = problem(), options_of(case)
    out, error = sinkhorn_attention(
        *operands,
        num_iters=3,
        implementation=implementation,
        return_marginal_error=True,
        **options,
    )
    oracle = oracle_options(options)
    expected = reference.sinkhorn_attention(*operands, num_iters=3, **oracle)
    np.testing.assert_allclose(out, expected, atol=ATOL["float64"])
    finish = oracle.pop("finish", "rows")
    logits = reference.attention_logits(*operands[:2], **oracle)
    expected = reference.potentials(logits, 3, finish=finish)[2]
    np.testing.assert_allclose(error, expected, atol=ATOL["float64"])


GROUPED = {"t": 64, "s": 40, "n": 6, "k": 3}
SHAPES = (
    {"t": 64, "s": 64, "h": 32},
    GROUPED,
    {"t": 1, "s": 9},
    {"t": 37, "s": 1, "n": 1, "k": 1},
)


# Each dtype and each shape; all pairs of them take long.
@implementations
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        pytest.param(
            *(dtype, shape),
            marks=[pytest.mark.slow] * (dtype != "float32" and shape is not GROUPED),
        )
        for dtype in ATOL
        for shape in SHAPES
    ],
    ids=str,
)
def test_dtypes_and_shapes(implementation, dtype, shape):
    query, key, value = problem(dtype, **shape)
    out = sinkhorn_attention(query, key, value, implementation=implementation)
    assert out.dtype == query.dtype
    chex.assert_shape(out, (*query.shape[:-1], value.shape[-1]))
    expected = reference.sinkhorn_attention(query, key, value)
    np.testing.assert_allclose(out.astype("float64"), expected, atol=ATOL[dtype])


@implementations
@pytest.mark.parametrize("case", CASES)
def test_gradients_agree_with_autodiff_of_the_reference(implementation, case):
    if implementation == "reference":
        pytest.skip("It is what the others are held against.")
    operands, options = problem(), options_of(case)
    bias = options.pop("bias", None)
    chex.assert_trees_all_close(
        gradients(implementation, operands, bias, options),
        gradients_of_the_reference(case),
        atol=FLOAT64_GRADIENT_ATOL,
    )


@functools.cache
def gradients_of_the_reference(case):
    options = options_of(case)
    return gradients("reference", problem(), options.pop("bias", None), options)


def gradients(implementation, operands, bias, options):
    options = {"num_iters": 3, "implementation": implementation} | options

    def loss(operands, bias):
        out = sinkhorn_attention(*operands, bias, **options)
        return (out.astype("float64") * random(9, out.shape)).sum()

    argnums = 0 if bias is None else (0, 1)
    return jax.jit(jax.value_and_grad(loss, argnums))(operands, bias)


@pytest.mark.parametrize("implementation", ["streaming", "scaling"])
@pytest.mark.parametrize(
    "options",
    [
        {"gradient": Truncated(0)},
        {"gradient": Truncated(2), "finish": "columns", "num_iters": 4},
        {"gradient": Implicit(1e-12), "num_iters": 300},
        {"num_iters": 0},
        {"num_iters": 2, "dropout_rate": 0.4, "dropout_rng": jax.random.key(3)},
    ],
    ids=str,
)
def test_other_gradients_agree_with_the_reference(implementation, options):
    if implementation == "streaming" and isinstance(options.get("gradient"), Implicit):
        pytest.skip("It does not take this gradient, as another test sees.")
    operands, bias = problem(), random(5, (N, T, S))
    options |= {
        "query_seq_lengths": jnp.array([3, 5]),
        "key_value_seq_lengths": jnp.array([7, 4]),
    }
    chex.assert_trees_all_close(
        gradients(implementation, operands, bias, options),
        gradients("reference", operands, bias, options),
        atol=1e-9,
    )


@implementations
def test_gradients_agree_with_finite_differences(implementation):
    bias, w = random(5, (1, N, T, S)), random(9, (B, T, N, D))

    def loss(query, key, value, bias):
        out = sinkhorn_attention(
            query, key, value, bias, num_iters=2, implementation=implementation
        )
        return (out * w).sum()

    modes = ["rev", "fwd"] if implementation == "reference" else ["rev"]
    check_grads(jax.jit(loss), (*problem(), bias), 1, modes)


@pytest.mark.parametrize("implementation", ["streaming", "scaling"])
def test_gradients_in_float32_on_large_logits(implementation):
    operands = problem("float32", t=64, s=48, n=2, k=1, h=16, d=16, scale=50.0)
    exact = gradients(
        "reference", jax.tree.map(lambda x: x.astype("float64"), operands), None, {}
    )
    got = gradients(implementation, operands, None, {})
    for got_one, expected in zip(got[1], exact[1], strict=True):
        error = abs(got_one.astype("float64") - expected).max() / abs(expected).max()
        assert error < 2e-5


@pytest.mark.parametrize("implementation", ["streaming", "scaling"])
@pytest.mark.parametrize("num_iters", [0, 1, 3])
@pytest.mark.parametrize("offset", [pytest.param(0.0, marks=pytest.mark.slow), 1e4])
def test_gradients_in_float32_do_not_see_row_offsets(implementation, num_iters, offset):
    # With these queries the keys are the logits. What is added to a row of logits is of
    # no effect, but a potential that cancels it can be rounded.
    t, s = 17, 11
    logits = 50 * random(0, (s, t)) + offset * random(1, (1, t))
    operands = jnp.eye(t)[None, :, None], logits[None, :, None], random(2, (1, s, 1, 4))
    operands = jax.tree.map(lambda x: x.astype("float32"), operands)
    options = {"num_iters": num_iters, "scale": 1.0}
    exact = gradients(
        "reference",
        jax.tree.map(lambda x: x.astype("float64"), operands),
        None,
        options,
    )
    # The cotangent of the queries is a product with the logits, so of their precision.
    _, (_, *grads) = gradients(implementation, operands, None, options)
    for got, expected in zip(grads, exact[1][1:], strict=True):
        error = abs(got.astype("float64") - expected).max() / abs(expected).max()
        assert error < 2e-5


@implementations
def test_no_iterations_is_softmax_attention(implementation):
    query, key, value = problem("float32", d=H)
    mask = sparse_mask()
    out = sinkhorn_attention(
        query, key, value, mask=mask, num_iters=0, implementation=implementation
    )
    with jax.numpy_dtype_promotion("standard"):
        expected = jax.nn.dot_product_attention(query, key, value, mask=mask)
    chex.assert_trees_all_close(out, expected, atol=ATOL["float32"])


@implementations
def test_padding_equals_cropping(implementation):
    query, key, value = problem(b=1)
    query, key = query.at[:, 3:].set(1e3), key.at[:, 4:].set(-1e3)
    weights = random(9, (1, 3, N, D))
    lengths = {
        "query_seq_lengths": jnp.array([3]),
        "key_value_seq_lengths": jnp.array([4]),
    }
    outer = (jnp.arange(T) < 3)[:, None] & (jnp.arange(S) < 4)[None]

    def loss(operands, crop, **options):
        query, key, value = operands
        if crop:
            query, key, value = query[:, :3], key[:, :4], value[:, :4]
        out, error = sinkhorn_attention(
            query,
            key,
            value,
            num_iters=3,
            implementation=implementation,
            return_marginal_error=True,
            **options,
        )
        return (out[:, :3] * weights).sum(), (abs(out[:, 3:]).sum(), error)

    grad = jax.value_and_grad(loss, has_aux=True)
    expected = grad((query, key, value), True)
    for options in (lengths, {"mask": outer}):
        chex.assert_trees_all_close(
            grad((query, key, value), False, **options), expected, atol=1e-12
        )


@implementations
def test_without_batch_axis(implementation):
    query, key, value = (x[0] for x in problem())
    solve = functools.partial(
        sinkhorn_attention, implementation=implementation, return_marginal_error=True
    )
    lengths = {"key_value_seq_lengths": jnp.array([4])}
    out, error = solve(query, key, value, **lengths)
    chex.assert_shape((out, error), ((T, N, D), (N,)))
    batched = solve(query[None], key[None], value[None], **lengths)
    chex.assert_trees_all_equal((out[None], error[None]), batched)


@implementations
def test_lengths_of_a_narrow_type_and_an_empty_batch(implementation):
    solve = functools.partial(
        sinkhorn_attention, implementation=implementation, num_iters=1
    )
    query, key, value = problem(t=300, h=2)
    lengths = jnp.array([200, 3], "uint8")
    out = solve(query, key, value, query_seq_lengths=lengths)
    assert (abs(out).sum((2, 3)) > 0).sum(1).tolist() == [200, 3]
    out, error = solve(query[:0], key[:0], value[:0], return_marginal_error=True)
    chex.assert_shape((out, error), ((0, 300, N, D), (0, N)))


def test_dropout_is_the_same_in_every_implementation_and_unbiased():
    operands = problem()
    options = {"dropout_rate": 0.25, "dropout_rng": jax.random.key(3), "num_iters": 3}
    outs = [
        sinkhorn_attention(*operands, implementation=implementation, **options)
        for implementation in PLAIN
    ]
    for out in outs[1:]:
        chex.assert_trees_all_close(out, outs[0], atol=1e-12)
    # Each entry of the plan has its own draw, made from the key and the position.
    rng = options["dropout_rng"]
    for b, n, i in [(0, 0, 0), (1, 2, 3), (1, 3, 4)]:
        row = jax.random.fold_in(jax.random.fold_in(rng, b * N + n), i)
        keep = np.asarray(jax.random.bernoulli(row, 0.75, (S,))) / 0.75
        query, key, value = (np.asarray(x) for x in operands)
        plan = reference.sinkhorn(reference.attention_logits(query, key), 3)[b, n, i]
        expected = (plan * keep) @ value[b, :, n // (N // K)]
        np.testing.assert_allclose(outs[0][b, i, n], expected, atol=1e-12)


def test_marginal_error_is_before_dropout_and_not_differentiated():
    operands = problem()

    def error(operands, **options):
        return sinkhorn_attention(
            *operands, num_iters=1, return_marginal_error=True, **options
        )[1].sum()

    dropped = error(operands, dropout_rate=0.5, dropout_rng=jax.random.key(0))
    assert dropped == error(operands)
    for implementation in PLAIN:
        grads = jax.grad(error)(operands, implementation=implementation)
        assert not any(x.any() for x in grads)


# The kernels for TPUs meet them in a test of their own, interpreted too.
@pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name == "mosaic_tpu"))
        for name in IMPLEMENTATIONS
    ],
)
def test_hostile_logits_in_float32(implementation):
    """Through one-hot queries, whose logits are the keys."""
    named = hostile_logits(16)
    logits = jnp.stack([jnp.asarray(x) for x in named.values()])
    query = jnp.broadcast_to(jnp.eye(16, dtype="float32"), logits.shape)[:, :, None]
    key = jnp.swapaxes(logits, 1, 2)[:, :, None]
    value = jnp.swapaxes(query, 1, 2)[:, 0, :, None]

    def solve(query, key, value):
        return sinkhorn_attention(
            query, key, value, scale=1.0, num_iters=50, implementation=implementation
        )

    out, pull_back = jax.vjp(solve, query, key, value)
    expected = reference.sinkhorn(logits, 50)
    error = abs(np.asarray(out[:, :, 0]) - expected).max(axis=(1, 2))
    limit = 1e-4 if implementation == "reference" else 3e-5
    assert max(error) < limit, dict(zip(named, error, strict=True))
    chex.assert_tree_all_finite(pull_back(jnp.sin(9 * out)))


@implementations
def test_transforms_agree(implementation):
    operands = problem(b=3)

    def loss(query, key, value):
        out = sinkhorn_attention(
            query, key, value, num_iters=2, implementation=implementation
        )
        return jnp.sin(out).sum()

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    expected = gradient(*operands)
    chex.assert_trees_all_close(
        jax.jit(jax.vmap(gradient))(*operands), expected, atol=1e-12
    )
    remat = jax.grad(jax.checkpoint(loss), argnums=(0, 1, 2))
    chex.assert_trees_all_close(remat(*operands), expected, atol=1e-12)


@implementations
def test_shard_map_over_the_batch(implementation):
    """With its checks of what varies; the bias is the same for all shards."""
    mesh = jax.make_mesh((1,), ("b",), axis_types=(jax.sharding.AxisType.Auto,))
    batch, whole = jax.sharding.PartitionSpec("b"), jax.sharding.PartitionSpec()
    bias = random(5, (N, T, 1))

    def attend(query, key, value, bias):
        return sinkhorn_attention(
            query, key, value, bias, num_iters=2, implementation=implementation
        )

    def gradients(attend):
        loss = lambda *operands: jnp.sin(attend(*operands)).sum()
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*problem(), bias)

    sharded = jax.shard_map(
        attend, mesh=mesh, in_specs=(batch, batch, batch, whole), out_specs=batch
    )
    chex.assert_trees_all_close(gradients(sharded), gradients(attend), atol=1e-12)


@implementations
def test_scan_over_layers(implementation):
    query, key, _ = problem(s=T, k=N, d=H)

    def layer(x, key):
        out = sinkhorn_attention(x, key, x, num_iters=2, implementation=implementation)
        return x + out, None

    keys = jnp.stack([key, -key])

    def scanned(x):
        return jax.lax.scan(layer, x, keys)[0].sum()

    def looped(x):
        return layer(layer(x, keys[0])[0], keys[1])[0].sum()

    chex.assert_trees_all_close(
        jax.grad(scanned)(query), jax.grad(looped)(query), atol=1e-12
    )


class TestVariants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_jit_changes_nothing(self):
        operands = problem("float32")
        expected = reference.sinkhorn_attention(*operands, num_iters=2)
        solve = self.variant(functools.partial(sinkhorn_attention, num_iters=2))
        np.testing.assert_allclose(solve(*operands), expected, atol=ATOL["float32"])


@implementations
def test_equal_shapes_do_not_compile_again(implementation):
    attend = IMPLEMENTATIONS[implementation].load().attend
    before = attend._cache_size()
    for seed in range(3):
        query, key, value = problem(t=11)  # A length that no other test uses.
        query = query + random(seed, query.shape)
        sinkhorn_attention(query, key, value, implementation=implementation)
    assert attend._cache_size() == before + 1


@pytest.mark.parametrize("heads", [1, 4])
def test_memory_is_one_head_in_flight(heads):
    t = 1024
    shape = jax.ShapeDtypeStruct((1, t, heads, 16), "float32")

    def step(query, key, value):
        out, pull_back = jax.vjp(sinkhorn_attention, query, key, value)
        return pull_back(out)

    compiled = jax.jit(step).lower(shape, shape, shape).compile()
    beside = (
        4 * 12 * t * heads * (16 + 11)
    )  # Inputs, outputs and scalings of each head.
    temp = compiled.memory_analysis().temp_size_in_bytes
    assert temp < 5 * 4 * t * t + beside


def test_a_broadcast_bias_gets_its_gradient_without_one_for_each_head():
    t, heads = 512, 16
    shape = jax.ShapeDtypeStruct((2, t, heads, 16), "float32")
    bias = jax.ShapeDtypeStruct((1, 1, t, t), "float32")

    def step(query, bias):
        loss = lambda query, bias: sinkhorn_attention(query, query, query, bias).sum()
        return jax.grad(loss, argnums=(0, 1))(query, bias)

    compiled = jax.jit(step).lower(shape, bias).compile()
    temp = compiled.memory_analysis().temp_size_in_bytes
    assert temp < 4 * t * t * heads


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
            ({"dropout_rate": 0.1}, ValueError, "needs dropout_rng"),
            ({"dropout_rate": 1.0}, ValueError, r"\[0, 1\), got 1.0"),
            ({"scale": jnp.ones(N)}, TypeError, "multiply the query"),
            ({"scale": "big"}, TypeError, "multiply the query"),
            ({"scale": float("nan")}, ValueError, "finite"),
        ],
    )
    def test_options(self, options, error, says):
        with pytest.raises(error, match=says):
            sinkhorn_attention(*problem(), **options)

    def test_dtypes(self):
        query, key, value = problem()
        with pytest.raises(TypeError, match="floating, got int"):
            sinkhorn_attention(query.astype(int), key, value)
        with pytest.raises(TypeError, match="one dtype"):
            sinkhorn_attention(query, key.astype("float32"), value)
