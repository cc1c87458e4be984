"""Windows and packed sequences of `sinkhorn_attention`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import reference
from support.attention_cases import PLAIN, B, K, N, S, T, inputs, positive, random

from sinkhorn_jax import Implicit, Truncated, sinkhorn_attention
from sinkhorn_jax.attention import IMPLEMENTATIONS

pytestmark = pytest.mark.usefixtures("short_query_blocks")

plain = pytest.mark.parametrize("implementation", PLAIN)
LONG = {"t": 11, "s": 13}
WINDOWS = [1, (1, 2), (3, 1), (2, 100)]
# Segments in an order of their own; 0 and -1 are padding, and 9 has keys alone.
QUERY_IDS = [[1, 1, 1, 2, 2, 2, 2, 5, 5, 0, -1], [3, 3, 3, 3, 3, 3, 1, 1, 1, 1, 1]]
KEY_IDS = [
    [1, 1, 1, 1, 2, 2, 2, 5, 5, 5, 9, 0, 0],
    [3, 3, 3, 3, 3, 3, 3, 3, 1, 1, 1, 1, 0],
]
SEGMENTS = {
    "query_segment_ids": jnp.array(QUERY_IDS),
    "key_segment_ids": jnp.array(KEY_IDS),
}


def band(window, t, s):
    left, right = (window, window) if isinstance(window, int) else window
    distance = np.arange(s)[None] - np.arange(t)[:, None]
    return (distance >= -left) & (distance <= right)


def gradients(options, operands, bias=None):
    """Output, marginal error, and gradients by the operands and the bias."""

    def loss(operands, bias):
        out, error = sinkhorn_attention(
            *operands,
            bias,
            num_iters=3,
            return_marginal_error=True,
            **options,
        )
        return (out * random(9, out.shape)).sum(), (out, error)

    argnums = 0 if bias is None else (0, 1)
    return jax.jit(jax.value_and_grad(loss, argnums, has_aux=True))(operands, bias)


@pytest.mark.few(2)
@plain
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_a_window_is_a_band_mask(implementation, window):
    operands, bias = inputs(**LONG), random(5, (N, 1, LONG["s"]))
    options = {"implementation": implementation, "finish": "columns"}
    got = gradients(options | {"local_window_size": window}, operands, bias)
    mask = jnp.asarray(band(window, **LONG))
    expected = gradients(options | {"mask": mask}, operands, bias)
    chex.assert_trees_all_close(got, expected, atol=1e-11)


@pytest.mark.few(1)
@plain
@pytest.mark.parametrize(
    "options",
    [
        {
            "query_seq_lengths": jnp.array([3, 11]),
            "key_value_seq_lengths": jnp.array([13, 7]),
        },
        {
            "mask": jnp.asarray(
                np.random.default_rng(0).uniform(size=(1, N, 11, 13)) < 0.7
            )
        },
        {"bias": random(5, (B, N, 11, 13))},
        {"query_marginal": positive(6, (B, N, 11)), "column_tau": 0.7},
        {"dropout_rate": 0.4, "dropout_rng": jax.random.key(3)},
        {"gradient": Truncated(1)},
    ],
    ids=lambda options: str(list(options)),
)
def test_a_window_with_other_arguments(implementation, options):
    options, operands = dict(options), inputs(**LONG)
    bias = options.pop("bias", None)
    mask = options.get("mask", jnp.ones((11, 13), bool))
    options["implementation"] = implementation
    got = gradients(options | {"local_window_size": (2, 3)}, operands, bias)
    mask = mask & jnp.asarray(band((2, 3), **LONG))[(None,) * (mask.ndim - 2)]
    expected = gradients(options | {"mask": mask}, operands, bias)
    chex.assert_trees_all_close(got, expected, atol=1e-11)


def segments_apart(operands, options):
    """The output and the gradients of one call for each segment."""

    def one(b, t, s, operands):
        query, key, value = operands
        crop = query[b : b + 1, t], key[b : b + 1, s], value[b : b + 1, s]
        return sinkhorn_attention(*crop, implementation="reference", **options)

    def loss(operands):
        out = jnp.zeros((B, 11, N, operands[2].shape[-1]))
        for b in range(B):
            for i in set(QUERY_IDS[b]) & set(KEY_IDS[b]) - {0}:
                t, s = (
                    np.flatnonzero(np.equal(QUERY_IDS[b], i)),
                    np.flatnonzero(np.equal(KEY_IDS[b], i)),
                )
                out = out.at[b, t].set(one(b, t, s, operands)[0])
        return (out * random(9, out.shape)).sum(), out

    return jax.value_and_grad(loss, has_aux=True)(operands)


@pytest.mark.few(1)
@plain
@pytest.mark.parametrize(
    "options",
    [
        {"num_iters": 0},
        {"num_iters": 3},
        {"num_iters": 3, "finish": "columns"},
        {"num_iters": 3, "column_tau": 0.4},
        {"num_iters": 400, "gradient": Implicit(tolerance=1e-13)},
    ],
    ids=str,
)
def test_packed_segments_equal_one_call_each(implementation, options):
    if implementation == "streaming" and "gradient" in options:
        pytest.skip("It does not take Implicit, as another test sees.")
    operands = inputs(**LONG)

    def loss(operands):
        out = sinkhorn_attention(
            *operands, implementation=implementation, **SEGMENTS, **options
        )
        return (out * random(9, out.shape)).sum(), out

    got = jax.jit(jax.value_and_grad(loss, has_aux=True))(operands)
    expected = segments_apart(operands, options)
    chex.assert_trees_all_close(got, expected, atol=1e-9)


@pytest.mark.few(1)
@plain
def test_segments_in_any_order(implementation):
    query, key, value = inputs(**LONG)
    order = np.random.default_rng(0).permutation(13)
    rows = np.random.default_rng(1).permutation(11)
    shuffled = query[:, rows], key[:, order], value[:, order]
    ids = {
        "query_segment_ids": SEGMENTS["query_segment_ids"][:, rows],
        "key_segment_ids": SEGMENTS["key_segment_ids"][:, order],
    }
    options = {"implementation": implementation}
    expected = sinkhorn_attention(query, key, value, **SEGMENTS, **options)
    got = sinkhorn_attention(*shuffled, **ids, **options)
    np.testing.assert_allclose(got, expected[:, rows], atol=1e-12)


@pytest.mark.few(1)
@plain
def test_segments_within_a_window_and_a_mask(implementation):
    operands = inputs(**LONG)
    same = np.equal(np.array(QUERY_IDS)[:, :, None], np.array(KEY_IDS)[:, None])
    same &= (np.array(QUERY_IDS) > 0)[:, :, None]
    window = (2, 3)
    allowed = (same & band(window, **LONG))[:, None]
    # The columns of each segment sum to its valid rows over its valid columns.
    rows, cols = allowed.any(3), allowed.any(2)
    ids = [np.array(x)[:, None] for x in (QUERY_IDS, KEY_IDS)]
    num_rows, num_cols = (
        ((ids[1][..., :, None] == other[..., None, :]) & valid[..., None, :]).sum(-1)
        for other, valid in zip(ids, (rows, cols), strict=True)
    )
    marginals = {
        "query_marginal": jnp.asarray(rows * 1.0),
        "key_marginal": jnp.asarray(cols * num_rows / np.maximum(num_cols, 1)),
    }
    options = {"implementation": implementation}
    got = gradients(options | SEGMENTS | {"local_window_size": window}, operands)
    mask = {"mask": jnp.asarray(allowed)}
    expected = gradients(options | mask | marginals, operands)
    chex.assert_trees_all_close(got, expected, atol=1e-11)
    # A mask of that size beside the segments changes nothing that they say.
    mask = jnp.asarray(np.broadcast_to(band(window, **LONG), (1, 1, 11, 13)))
    masked = gradients(options | SEGMENTS | {"mask": mask}, operands)
    chex.assert_trees_all_close(masked, expected, atol=1e-11)


@pytest.mark.few(1)
@plain
def test_one_marginal_is_completed_in_each_segment(implementation):
    operands, ids = inputs(**LONG), SEGMENTS["key_segment_ids"]
    a = positive(6, (B, N, 11))
    eye = jnp.broadcast_to(jnp.eye(13)[:, None], (B, 13, K, 13))
    plan = sinkhorn_attention(
        *operands[:2],
        eye,
        query_marginal=a,
        num_iters=200,
        implementation=implementation,
        **SEGMENTS,
    )
    plan = jnp.swapaxes(plan, 1, 2)
    for b in range(B):
        for i in set(QUERY_IDS[b]) & set(KEY_IDS[b]) - {0}:
            t = np.equal(QUERY_IDS[b], i)
            s = np.flatnonzero(ids[b] == i)
            share = a[b][:, t].sum(axis=-1) / len(s)
            np.testing.assert_allclose(
                plan[b].sum(axis=1)[:, s],
                np.broadcast_to(share[:, None], (N, len(s))),
                atol=1e-9,
            )


@pytest.mark.few(3)
@plain
@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e38])
def test_junk_in_padding_reaches_nothing(implementation, poison):
    operands = inputs("float32", **LONG)
    padded = [np.array(x) <= 0 for x in (QUERY_IDS, KEY_IDS)]
    padded[1] |= np.array(KEY_IDS) == 9
    pads = padded[0], padded[1], padded[1]
    poisoned = tuple(
        jnp.where(pad[:, :, None, None], poison, x)
        for x, pad in zip(operands, pads, strict=True)
    )
    options = {"implementation": implementation, **SEGMENTS}

    def run(operands):
        def loss(operands):
            out = sinkhorn_attention(*operands, num_iters=3, **options)
            return (out * random(9, out.shape).astype("float32")).sum(), out

        return jax.value_and_grad(loss, has_aux=True)(operands)

    chex.assert_trees_all_equal(run(poisoned), run(operands))


@pytest.mark.few(1)
@pytest.mark.parametrize(("window", "bound"), [((1, 1), 6e-2), ((4, 4), 2e-2)])
def test_the_iteration_converges_within_a_window(window, bound):
    arrays = inputs("float64", t=64, s=64)

    def error(num_iters):
        _, error = sinkhorn_attention(
            *arrays,
            num_iters=num_iters,
            local_window_size=window,
            return_marginal_error=True,
        )
        return error.max()

    assert error(10) < bound
    assert error(4000) < 1e-4


def test_streaming_holds_nothing_of_the_size_of_the_plan():
    t, window = 4096, 64
    shape = jax.ShapeDtypeStruct((1, t, 1, 16), "float32")

    def loss(query, key, value):
        return sinkhorn_attention(
            query,
            key,
            value,
            local_window_size=window,
            query_segment_ids=jnp.arange(t) // 100 + 1,
            key_segment_ids=jnp.arange(t) // 100 + 1,
            implementation="streaming",
        ).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    memory = gradient.lower(shape, shape, shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * t * t / 10


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"local_window_size": (1, 0)}, ValueError, "one-sided.*identity"),
        ({"local_window_size": 0}, ValueError, r"got \(0, 0\)"),
        ({"local_window_size": -1}, ValueError, r"got \(-1, -1\)"),
        ({"local_window_size": 1.5}, TypeError, "integer"),
        ({"local_window_size": (1, 2, 3)}, TypeError, "pair"),
        (
            {
                "query_segment_ids": np.full(T, 2**32 + 1),
                "key_segment_ids": np.ones(S, int),
            },
            ValueError,
            "query_segment_ids must be in the range of int32, got 4294967297",
        ),
        ({"local_window_size": (None, 2)}, TypeError, "a pair of them"),
        ({"query_segment_ids": jnp.ones((B, T), int)}, ValueError, "without key_seg"),
        ({"key_segment_ids": jnp.ones((B, S), int)}, ValueError, "without query_seg"),
        (
            {"query_segment_ids": jnp.ones(T), "key_segment_ids": jnp.ones(S)},
            TypeError,
            "query_segment_ids must be integer",
        ),
        (
            {
                "query_segment_ids": jnp.ones(T, int),
                "key_segment_ids": jnp.ones((3, S), int),
            },
            ValueError,
            r"key_segment_ids must broadcast to \(2, 7\)",
        ),
        (
            {
                "query_segment_ids": jnp.array([1, 1, 1, 2, 2]),
                "key_segment_ids": jnp.array([1, 1, 1, 2, 2, 2, 2]),
                "query_marginal": jnp.ones(T),
                "key_marginal": jnp.full(S, T / S),
            },
            ValueError,
            "total, got 3.0 and 2.14.*Each segment",
        ),
    ],
    ids=str,
)
def test_bad_input(options, error, says):
    with pytest.raises(error, match=says):
        sinkhorn_attention(*inputs(), **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"local_window_size": 2}, "no local_window_size"),
        (
            {
                "query_segment_ids": jnp.ones(T, int),
                "key_segment_ids": jnp.ones(S, int),
            },
            "no segment ids",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", sorted(set(IMPLEMENTATIONS) - set(PLAIN)))
def test_kernels_say_what_they_do_not_take(name, options, says):
    arrays = inputs("bfloat16")
    with pytest.raises(NotImplementedError, match=says):
        jax.eval_shape(
            lambda: sinkhorn_attention(*arrays, implementation=name, **options)
        )


@pytest.mark.slow
@pytest.mark.few(1)
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("implementation", ["scaling", "streaming"])
def test_programs_with_a_symbolic_length(implementation):
    operands = inputs(**LONG)
    ids = SEGMENTS["query_segment_ids"], SEGMENTS["key_segment_ids"]

    def attend(operands, query_ids, key_ids):
        return sinkhorn_attention(
            *operands,
            query_segment_ids=query_ids,
            key_segment_ids=key_ids,
            local_window_size=(2, 3),
            implementation=implementation,
        )

    t, s = jax.export.symbolic_shape("t, s")
    shapes = (B, t, N, 3), (B, s, K, 3), (B, s, K, 6)
    arrays = tuple(jax.ShapeDtypeStruct(shape, "float64") for shape in shapes)
    of_ids = (jax.ShapeDtypeStruct((B, n), ids[0].dtype) for n in (t, s))
    program = jax.export.export(jax.jit(attend))(arrays, *of_ids)
    got = program.call(operands, *ids)
    np.testing.assert_allclose(got, attend(operands, *ids), atol=1e-12)


@pytest.mark.usefixtures("unchecked")
def test_windows_and_ids_of_other_types():
    operands = inputs(**LONG)
    ids = {name: np.array(x, np.int16) for name, x in SEGMENTS.items()}
    window = np.array([2, 3])
    expected = sinkhorn_attention(*operands, **SEGMENTS, local_window_size=(2, 3))
    got = sinkhorn_attention(*operands, **ids, local_window_size=window)
    np.testing.assert_array_equal(got, expected)


@plain
def test_a_window_that_excludes_nothing_changes_no_program(implementation):
    arrays = inputs("float32")

    def lowered(**options):
        attend = lambda *x: sinkhorn_attention(
            *x, implementation=implementation, **options
        )
        return jax.jit(attend).lower(*arrays).as_text()

    assert lowered(local_window_size=7) == lowered()


@pytest.mark.slow
@pytest.mark.few(1)
@plain
def test_transforms(implementation):
    operands = inputs(**LONG)
    ids = SEGMENTS["query_segment_ids"], SEGMENTS["key_segment_ids"]

    def attend(query, key, value, query_ids, key_ids):
        return sinkhorn_attention(
            query,
            key,
            value,
            query_segment_ids=query_ids,
            key_segment_ids=key_ids,
            local_window_size=(3, 4),
            num_iters=3,
            implementation=implementation,
        )

    expected = attend(*operands, *ids)
    _, scanned = jax.lax.scan(lambda _, x: (None, attend(*x)), None, (*operands, *ids))
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)
    for got in (
        jax.jit(attend)(*operands, *ids),
        jax.vmap(attend)(*operands, *ids),
        scanned,
        sharded(*operands, *ids),
    ):
        np.testing.assert_allclose(got, expected, atol=1e-13)


def test_the_oracle_agrees():
    operands = inputs(**LONG)
    mask = np.broadcast_to(band((2, 3), **LONG), (1, 1, 11, 13))
    expected = reference.sinkhorn_attention(*operands, num_iters=3, mask=mask)
    got = sinkhorn_attention(*operands, num_iters=3, local_window_size=(2, 3))
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_a_window_longer_than_positions_are_wide():
    operands = inputs()
    got = sinkhorn_attention(*operands, local_window_size=(2**40, 2))
    expected = sinkhorn_attention(*operands, local_window_size=(T, 2))
    np.testing.assert_array_equal(got, expected)


def test_the_largest_id_is_a_segment_like_any_other():
    ids = {"query": jnp.array([[1, 1, 2, 2, 2]] * B), "key": jnp.array([[1, 1, 2, 2]])}
    operands = inputs(t=5, s=4)

    def attend(top):
        as_given = {
            f"{name}_segment_ids": jnp.where(x == 2, top, x) for name, x in ids.items()
        }
        return sinkhorn_attention(*operands, **as_given)

    np.testing.assert_array_equal(attend(2**31 - 1), attend(2))
