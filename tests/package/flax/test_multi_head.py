"""`MultiHeadSinkhornAttention` of linen and nnx: one suite, the frameworks as cases."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from support import reference

import sinkhorn_jax.linen
import sinkhorn_jax.nnx
from sinkhorn_jax import sinkhorn_attention

HEADS, FEATURES, T, S = 2, 8, 6, 5
NUM_ITERS = 3


class Linen:
    """A linen layer and its parameters, called like an nnx layer."""

    softmax = linen.MultiHeadDotProductAttention
    sinkhorn = sinkhorn_jax.linen.MultiHeadSinkhornAttention

    def __init__(self, *, is_sinkhorn=True, parameters=None, **options):
        self.layer = (self.sinkhorn if is_sinkhorn else self.softmax)(HEADS, **options)
        x = jnp.zeros((1, T, FEATURES), "float32")
        rngs = {"params": jax.random.key(1), "dropout": jax.random.key(2)}
        self.variables = self.layer.init(rngs, x, deterministic=True)
        if parameters is not None:
            chex.assert_trees_all_equal_shapes(parameters, self.parameters)
            self.variables = {"params": parameters}

    @property
    def parameters(self):
        return self.variables["params"]

    def __call__(self, *inputs, seed=0, **options):
        rngs = {"dropout": jax.random.key(seed)}
        return self.layer.apply(self.variables, *inputs, rngs=rngs, **options)

    def sown(self, *inputs, **options):
        _, state = self.layer.apply(
            self.variables, *inputs, mutable=["intermediates"], **options
        )
        return {name: x for name, (x,) in state.get("intermediates", {}).items()}


class Nnx:
    """An nnx layer."""

    softmax = nnx.MultiHeadAttention
    sinkhorn = sinkhorn_jax.nnx.MultiHeadSinkhornAttention

    def __init__(self, *, is_sinkhorn=True, parameters=None, **options):
        make = self.sinkhorn if is_sinkhorn else self.softmax
        self.layer = make(
            HEADS, FEATURES, rngs=nnx.Rngs(1), **{"decode": False} | options
        )
        if parameters is not None:
            nnx.update(self.layer, parameters)

    @property
    def parameters(self):
        return nnx.state(self.layer, nnx.Param)

    def __call__(self, *inputs, seed=0, **options):
        return self.layer(*inputs, rngs=nnx.Rngs(dropout=seed), **options)

    def sown(self, *inputs, **options):
        _, state = nnx.capture(self.layer, nnx.Intermediate)(*inputs, **options)
        return {name: x.get_value()[0] for name, x in state.items()}


frameworks = pytest.mark.parametrize("framework", [Linen, Nnx])


def tokens(seed=0, length=T, batch=(3,)):
    return jax.random.normal(
        jax.random.key(seed), (*batch, length, FEATURES), "float32"
    )


@frameworks
def test_parameters_of_softmax_attention_load_unchanged(framework):
    x, y = tokens(), tokens(1, S)
    softmax = framework(is_sinkhorn=False, normalize_qk=True)
    same = framework(num_iters=0, normalize_qk=True, parameters=softmax.parameters)
    chex.assert_trees_all_equal(same.parameters, softmax.parameters)
    for inputs in ((x,), (x, y), (x, y, -y)):
        chex.assert_trees_all_close(same(*inputs), softmax(*inputs), atol=1e-6)
    other = framework(num_iters=5, parameters=softmax.parameters, normalize_qk=True)
    assert abs(other(x) - softmax(x)).max() > 1e-4


@pytest.mark.few(2)
@frameworks
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_lengths_equal_cropping(framework, batch):
    layer = framework(num_iters=NUM_ITERS)
    x, y = tokens(batch=batch), tokens(1, S, batch)
    lengths = jnp.array(4, "int8")  # Of a narrow type, and broadcast to the batch.
    out = layer(x, query_seq_lengths=lengths)
    chex.assert_trees_all_close(out[..., :4, :], layer(x[..., :4, :]), atol=1e-6)
    out = layer(x, y, query_seq_lengths=lengths, key_value_seq_lengths=lengths - 1)
    cropped = layer(x[..., :4, :], y[..., :3, :])
    chex.assert_trees_all_close(out[..., :4, :], cropped, atol=1e-6)


@frameworks
@pytest.mark.parametrize("dtype", ["bool", "float32"])
@pytest.mark.parametrize("shape", ["pairs", "keys"])
def test_masks_of_padding_equal_cropping_in_self_attention(framework, dtype, shape):
    layer = framework(num_iters=NUM_ITERS)
    x, valid = tokens(), jnp.arange(T)[None] < 4
    mask = {
        "pairs": linen.make_attention_mask(valid, valid, dtype=dtype),
        "keys": valid[:, None, None, :].astype(dtype),
    }[shape]
    out = layer(x, mask=mask)
    chex.assert_trees_all_close(out[:, :4], layer(x[:, :4]), atol=1e-6)


@frameworks
def test_a_mask_of_keys_alone_warns_where_padded_queries_may_be_meant(framework):
    layer = framework(num_iters=NUM_ITERS)
    mask = (jnp.arange(T) < 4)[None, None, None]
    with pytest.warns(UserWarning, match="pour mass into the columns"):
        out = layer(tokens(), tokens(1), mask=mask)
    # The excluded keys are left out all the same.
    changed = tokens(1).at[:, 4:].set(7)
    with pytest.warns(UserWarning, match="keys alone"):
        same = layer(tokens(), changed, mask=mask)
    chex.assert_trees_all_close(out, same, atol=1e-6)
    layer(tokens(), tokens(1, S), mask=mask[..., :S])  # No warning: T differs from S.


@frameworks
def test_sown_plan_is_what_multiplies_the_values(framework):
    layer = framework(num_iters=NUM_ITERS)
    x, y = tokens(), tokens(1, S)
    lengths = [6, 4, 2], [5, 3, 1]
    padding = dict(
        query_seq_lengths=jnp.array(lengths[0]),
        key_value_seq_lengths=jnp.array(lengths[1]),
    )
    out = layer(x, y, **padding)
    sown = layer.sown(x, y, sow_weights=True, sow_marginal_error=True, **padding)
    plan, error = sown["attention_weights"], sown["marginal_error"]
    chex.assert_shape(plan, (3, HEADS, T, S))
    chex.assert_shape(error, (3, HEADS))
    kernel = lambda name: np.asarray(layer.parameters[name]["kernel"], np.float64)
    query, key, value = (
        np.einsum("btd,dnh->bnth", tokens, kernel(name))
        for name, tokens in (("query", x), ("key", y), ("value", y))
    )
    for b, (t, s) in enumerate(zip(*lengths, strict=True)):
        for n in range(HEADS):
            logits = query[b, n, :t] @ key[b, n, :s].T / np.sqrt(FEATURES / HEADS)
            expected = reference.sinkhorn(logits, NUM_ITERS)
            np.testing.assert_allclose(plan[b, n, :t, :s], expected, atol=1e-6)
            defect = abs(expected.sum(0) - t / s).sum() / t
            np.testing.assert_allclose(error[b, n], defect, atol=1e-6)
        assert (plan[b, :, t:] == 0).all()
        assert (plan[b, :, :, s:] == 0).all()
    attended = np.einsum("bnts,bnsh->btnh", plan, value)
    expected = np.einsum("btnh,nhd->btd", attended, kernel("out"))
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.few(1)
@frameworks
def test_the_sown_plan_is_that_of_each_segment(framework):
    # A last row step would hide a share of the columns that is not the segment's.
    layer, x = framework(num_iters=NUM_ITERS, finish="columns"), tokens()
    ids = jnp.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1], [2, 1, 2, 1, 1, 0]])
    keys = jnp.array([[1, 2, 2, 2, 2], [1, 1, 1, 0, 0], [2, 2, 1, 1, 1]])
    segments = {"query_segment_ids": ids, "key_segment_ids": keys}
    y = tokens(1, S)
    plan = layer.sown(x, y, sow_weights=True, **segments)["attention_weights"]
    kernel = lambda name: layer.parameters[name]["kernel"]
    value = jnp.einsum("btd,dnh->bnth", y, kernel("value"))
    attended = jnp.einsum("bnts,bnsh->btnh", plan, value)
    expected = jnp.einsum("btnh,nhd->btd", attended, kernel("out"))
    chex.assert_trees_all_close(layer(x, y, **segments), expected, atol=1e-5)


@frameworks
def test_nothing_is_sown_unasked(framework):
    assert framework(num_iters=NUM_ITERS).sown(tokens()) == {}


@frameworks
def test_dropout_follows_its_key_and_can_be_left_out(framework):
    layer = framework(num_iters=NUM_ITERS, dropout_rate=0.5)
    still = framework(num_iters=NUM_ITERS, parameters=layer.parameters)
    out = layer(tokens(), deterministic=False)
    chex.assert_trees_all_equal(out, layer(tokens(), deterministic=False))
    assert abs(out - layer(tokens(), deterministic=False, seed=1)).max() > 1e-3
    chex.assert_trees_all_close(layer(tokens(), deterministic=True), still(tokens()))


@frameworks
def test_dtypes(framework):
    layer = framework(num_iters=NUM_ITERS, dtype=jnp.bfloat16)
    out = layer(tokens())
    assert out.dtype == jnp.bfloat16
    leaves = jax.tree.leaves(layer.parameters)
    assert {x.dtype for x in leaves} == {jnp.dtype("float32")}
    exact = framework(num_iters=NUM_ITERS, parameters=layer.parameters)(tokens())
    chex.assert_trees_all_close(out.astype("float32"), exact, atol=5e-2)
    options = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    half = framework(num_iters=NUM_ITERS, **options)
    leaves = jax.tree.leaves(half.parameters)
    assert {x.dtype for x in leaves} == {jnp.dtype("bfloat16")}


@frameworks
@pytest.mark.parametrize("implementation", ["reference", "scaling", "streaming"])
def test_implementations_agree(framework, implementation):
    layer = framework(num_iters=NUM_ITERS)
    named = framework(
        num_iters=NUM_ITERS,
        implementation=implementation,
        parameters=layer.parameters,
    )
    chex.assert_trees_all_close(named(tokens()), layer(tokens()), atol=1e-6)
    sown, expected = (x.sown(tokens(), sow_weights=True) for x in (named, layer))
    chex.assert_trees_all_close(sown, expected, atol=1e-6)


@frameworks
def test_bad_input_is_explained(framework):
    with pytest.raises(TypeError, match="attention_fn"):
        framework(attention_fn=linen.dot_product_attention)
    with pytest.raises(ValueError, match="negative"):
        framework(num_iters=-1)
    with pytest.raises(ValueError, match="single row"):
        framework(decode=True)(tokens())
    layer = framework(num_iters=NUM_ITERS)
    causal = linen.make_causal_mask(jnp.ones((1, T)))
    with pytest.raises(ValueError, match="identity as the only doubly stochastic"):
        layer(tokens(), mask=causal)
    with pytest.raises(ValueError, match="identity as the only doubly stochastic"):
        jax.jit(lambda x: layer(x, mask=causal))(tokens())  # Known there too.
    with pytest.raises(ValueError, match="inputs_k"):
        layer(tokens(), None, tokens())


def test_linen_layers_clone_and_carry_partitioning():
    init = linen.with_partitioning(
        linen.initializers.lecun_normal(), (None, "model", None)
    )
    layer = Linen.sinkhorn(HEADS, kernel_init=init, num_iters=1)
    x = tokens()
    variables = layer.init(jax.random.key(0), x)
    spec = linen.get_partition_spec(variables)["params"]["query"]["kernel"]
    assert spec == jax.sharding.PartitionSpec(None, "model", None)
    cloned = layer.clone(num_iters=7)
    same = Linen.sinkhorn(HEADS, kernel_init=init, num_iters=7)
    chex.assert_trees_all_equal(cloned.apply(variables, x), same.apply(variables, x))


def test_linen_layers_in_scan_and_remat():
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, lengths):
            layer = linen.remat(Linen.sinkhorn)(HEADS, num_iters=NUM_ITERS)
            return x + layer(x, query_seq_lengths=lengths), None

    stack = linen.scan(
        Block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=linen.broadcast,
        length=2,
    )()
    x, lengths = tokens(), jnp.array([6, 4, 2])
    variables = stack.init(jax.random.key(0), x, lengths)
    (out, _) = stack.apply(variables, x, lengths)
    expected = x
    for i in range(2):
        params = jax.tree.map(lambda p, i=i: p[i], variables["params"])
        (one,) = params.values()
        layer = Linen.sinkhorn(HEADS, num_iters=NUM_ITERS)
        expected = expected + layer.apply(
            {"params": one}, expected, query_seq_lengths=lengths
        )
    chex.assert_trees_all_close(out, expected, atol=1e-6)
    grads = jax.grad(lambda v: stack.apply(v, x, lengths)[0].sum())(variables)
    chex.assert_tree_all_finite(grads)


def test_nnx_layers_group_queries_and_carry_sharding():
    options = {
        "num_kv_heads": 1,
        "kernel_metadata": {"out_sharding": (None, "model", None)},
    }
    with nnx.use_eager_sharding(False):  # There is no mesh.
        softmax = Nnx(is_sinkhorn=False, **options)
        layer = Nnx(num_iters=0, parameters=softmax.parameters, **options)
    chex.assert_trees_all_close(layer(tokens()), softmax(tokens()), atol=1e-6)
    assert layer.layer.query.kernel.out_sharding == (None, "model", None)
    plan = layer.sown(tokens(), sow_weights=True)["attention_weights"]
    chex.assert_trees_all_close(plan.sum(-1), jnp.ones((3, HEADS, T)), atol=1e-6)


def test_nnx_modes_and_missing_keys_of_dropout():
    layer = Nnx.sinkhorn(HEADS, FEATURES, dropout_rate=0.5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="deterministic"):
        layer(tokens())
    layer.train()
    assert abs(layer(tokens()) - layer(tokens())).max() > 1e-3  # The key moves on.
    layer.eval()
    chex.assert_trees_all_equal(layer(tokens()), layer(tokens()))
    bare = Nnx.sinkhorn(
        HEADS, FEATURES, dropout_rate=0.5, keep_rngs=False, rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match="rngs"):
        bare(tokens(), deterministic=False)


@pytest.mark.few(3)
@frameworks
@pytest.mark.parametrize("kind", ["lengths", "mask", "segments", "marginals"])
@pytest.mark.parametrize("is_self_attention", [True, False])
def test_junk_in_padded_tokens_reaches_no_gradient_of_a_layer(
    framework, is_self_attention, kind
):
    layer = framework(num_iters=NUM_ITERS)
    lengths = jnp.array([4, 2, 6]), jnp.array([3, 5, 1])
    names = "query_seq_lengths", "key_value_seq_lengths"
    given = 1 if is_self_attention else 2
    padding = dict(zip(names[:given], lengths[:given], strict=True))
    if kind == "mask":
        queries, keys = lengths[0], lengths[given - 1]
        rows = np.arange(T)[None, :, None] < queries[:, None, None]
        cols = np.arange(T if given == 1 else S)[None, None] < keys[:, None, None]
        padding = {"mask": (rows & cols)[:, None]}
    elif kind != "lengths":
        is_valid = [
            jnp.arange(size)[None, :] < n[:, None]
            for size, n in zip((T, S)[:given], lengths, strict=False)
        ]
        names = "query_segment_ids", "key_segment_ids"
        padding = {n: x.astype("int32") for n, x in zip(names, is_valid, strict=False)}
        if kind == "marginals":
            share = lengths[0] / lengths[given - 1]
            padding = {
                "query_marginal": is_valid[0][:, None].astype("float32"),
                "key_marginal": jnp.where(
                    is_valid[-1][:, None], share[:, None, None], 0.0
                ).astype("float32"),
            }

    def gradients(junk):
        inputs = [tokens(), tokens(1, S)][:given]
        inputs = [
            jnp.where(np.arange(x.shape[1])[None, :, None] < n[:, None, None], x, junk)
            for x, n in zip(inputs, lengths[:given], strict=True)
        ]

        def loss(parameters, inputs):
            out = framework(num_iters=NUM_ITERS, parameters=parameters)(
                *inputs, **padding
            )
            valid = jnp.arange(T)[None] < lengths[0][:, None]
            return (jnp.where(valid[..., None], out, 0) ** 2).sum()

        return jax.value_and_grad(loss, (0, 1))(layer.parameters, inputs)

    expected = gradients(0.0)
    for junk in (np.nan, 3e38):
        chex.assert_trees_all_equal(gradients(junk), expected)


@pytest.mark.few(2)
@frameworks
@pytest.mark.parametrize("kind", ["leading axes", "mask and lengths"])
def test_junk_that_mask_and_lengths_exclude_together(framework, kind):
    """A key is excluded if the lengths exclude every query that may attend to it."""
    lengths = {}
    if kind == "leading axes":
        inputs, rows, cols = [tokens()[0]], np.arange(T) < 4, np.arange(T) < 4
        mask = (rows[:, None] & cols)[None, None, None]
    else:
        inputs, rows, cols = (
            [tokens(), tokens(1, S)],
            np.arange(T) < 3,
            np.arange(S) < 2,
        )
        mask = np.where(rows[:, None], cols, ~cols)[None, None]
        lengths = {"query_seq_lengths": jnp.full(3, 3)}
    used = (rows, cols)[: len(inputs)]

    def gradients(junk):
        given = [
            jnp.where(keep[:, None], x, junk).astype(x.dtype)
            for x, keep in zip(inputs, used, strict=True)
        ]

        def loss(parameters, given):
            layer = framework(num_iters=NUM_ITERS, parameters=parameters)
            out = layer(*given, mask=jnp.asarray(mask), **lengths)
            return (jnp.where(jnp.asarray(rows)[:, None], out, 0) ** 2).sum()

        parameters = framework(num_iters=NUM_ITERS).parameters
        return jax.value_and_grad(loss, (0, 1))(parameters, given)

    chex.assert_trees_all_equal(gradients(np.nan), gradients(0.0))


@pytest.mark.few(2)
@frameworks
@pytest.mark.parametrize(
    "options",
    [
        {"column_tau": 0.3},
        {"column_tau": "learned", "initial_column_tau": 0.3},
        {"tolerance": 0.05},
    ],
    ids=str,
)
def test_marginals_and_options_reach_the_plan(framework, options):
    layer, x = framework(num_iters=NUM_ITERS, **options), tokens()
    marginals = {
        "query_marginal": 0.5 + jax.random.uniform(jax.random.key(3), (3, HEADS, T)),
        "key_marginal": jnp.array([2.0, 1, 1, 1, 0.5, 0]),
    }
    total = marginals["key_marginal"].sum()
    rows = marginals["query_marginal"].sum(axis=-1, keepdims=True)
    marginals["query_marginal"] *= total / rows
    sown = layer.sown(x, sow_weights=True, sow_marginal_error=True, **marginals)
    query, key = (
        jnp.einsum("btd,dnh->btnh", x, layer.parameters[name]["kernel"])
        for name in ("query", "key")
    )
    plan, error = sinkhorn_attention(
        query,
        key,
        jnp.broadcast_to(jnp.eye(T, dtype=x.dtype)[:, None], (3, T, HEADS, T)),
        num_iters=NUM_ITERS,
        column_tau=0.3 if "column_tau" in options else 1.0,
        tolerance=options.get("tolerance"),
        return_marginal_error=True,
        **marginals,
    )
    plan = jnp.swapaxes(plan, 1, 2)
    chex.assert_trees_all_close(sown["attention_weights"], plan, atol=1e-5)
    chex.assert_trees_all_close(sown["marginal_error"], error, atol=1e-5)


@frameworks
def test_a_learned_column_tau_learns(framework):
    layer, x = framework(column_tau="learned", initial_column_tau=0.3), tokens()
    logits = layer.parameters["column_tau_logit"]
    logits = logits if framework is Linen else logits[...]
    np.testing.assert_allclose(jax.nn.sigmoid(logits), [0.3] * HEADS, rtol=1e-6)
    if framework is Linen:
        gradient = jax.grad(
            lambda variables: (layer.layer.apply(variables, x) ** 2).sum()
        )(layer.variables)["params"]["column_tau_logit"]
    else:
        loss = lambda layer: (layer(x) ** 2).sum()
        gradient = nnx.grad(loss)(layer.layer)["column_tau_logit"][...]
    assert (abs(gradient) > 1e-6).all()


@pytest.mark.usefixtures("unchecked")
@frameworks
def test_wrong_column_taus_are_explained(framework):
    x = tokens()
    for options, says in (
        ({"column_tau": 1.5}, "between 0 .* and 1"),
        ({"column_tau": "learnt"}, "'learned', got 'learnt'"),
        ({"column_tau": "learned", "initial_column_tau": 1.0}, "initial_column_tau"),
    ):
        with pytest.raises(ValueError, match=says):
            framework(**options)(x)


def test_nnx_options_are_attributes_that_can_be_set():
    class Network(nnx.Module):
        def __init__(self, **options):
            self.first, self.second = (
                Nnx.sinkhorn(HEADS, FEATURES, rngs=nnx.Rngs(i), **options)
                for i in range(2)
            )

        def __call__(self, x):
            return self.second(self.first(x))

    call = nnx.jit(lambda network, x: network(x))
    network, x = Network(num_iters=1, implementation="reference"), tokens()
    before = call(network, x)
    changed = {"num_iters": 7, "scale": 2.0, "finish": "columns"}
    network.set_attributes(**changed)
    expected = Network(**changed, implementation="reference")(x)
    chex.assert_trees_all_close(call(network, x), expected, atol=1e-6)
    assert abs(before - expected).max() > 1e-4
    network.set_attributes(num_iters=-1)
    with pytest.raises(ValueError, match="negative, got -1"):
        network(x)


def test_linen_layers_need_the_name_of_the_class_that_they_replace():
    class Block(linen.Module):
        layer: Any
        options: dict

        @linen.compact
        def __call__(self, x):
            return x + self.layer(HEADS, **self.options)(x)

    x = tokens()
    softmax = Block(Linen.softmax, {})
    trained = softmax.init(jax.random.key(0), x)
    name = {"name": "MultiHeadDotProductAttention_0"}
    same = Block(Linen.sinkhorn, {"num_iters": 0} | name)
    chex.assert_trees_all_close(
        same.apply(trained, x), softmax.apply(trained, x), atol=1e-6
    )


def test_nnx_layers_train_under_jit():
    layer = Nnx.sinkhorn(HEADS, FEATURES, num_iters=NUM_ITERS, rngs=nnx.Rngs(0))

    @nnx.jit
    def loss_and_grads(layer, x):
        return nnx.value_and_grad(lambda layer: (layer(x) ** 2).mean())(layer)

    loss, grads = loss_and_grads(layer, tokens())
    stepped = jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(layer, nnx.Param), grads)
    nnx.update(layer, stepped)
    assert loss_and_grads(layer, tokens())[0] < loss
