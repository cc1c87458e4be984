"""One encoder for texts and images, with a switch for what may prevent rank collapse.

Pooling matters for doubly stochastic attention: its columns sum to one, so the mean
over tokens of P V is that of V, and the mean of a single layer's output does not see
how attention moved them. The maximum over tokens does, and so does a class token.
"""

import math
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt8

from sinkhorn_jax import sinkhorn, sinkhorn_attention

LayerNorm = Literal["none", "pre", "post"]
Pooling = Literal["mean", "max", "class_token"]
Position = Literal["learned", "sinusoidal", "none"]
Finish = Literal["rows", "columns"]

# Of the mesh axis over which a batch is divided.
BATCH_AXIS = "batch"


class Intermediates(NamedTuple):
    """What the encoder computed on the way. L layers, N heads, T with a class token."""

    hidden_states: Float[Array, "L+1 B T D"]  # The embedding, then each layer's output.
    plans: Float[Array, "L B N T T"] | None  # Padding is zero.
    where: Bool[Array, "B T"]  # True where a token is not padding.


class Encoder(nn.Module):
    """Tokens or images to class logits through `depth` equal layers.

    With skip connections a layer is $x + A(x)$ and, with an MLP, $y + M(y)$ after it;
    without, $A(x)$ and $M(y)$. LayerNorm "pre" acts on the input of A and M, "post" on
    the sum, as in the original Transformer. Images become patches, as in Dosovitskiy
    et al. 2021, https://arxiv.org/abs/2010.11929, or with `has_conv_stem` as many
    tokens through 3 x 3 convolutions of stride 2, after Xiao et al. 2021,
    https://arxiv.org/abs/2106.14881. Parameters do not depend on `num_iters`, `finish`
    and `logit_scale`, so those of a softmax encoder serve a Sinkhorn one.
    """

    depth: int
    width: int
    num_heads: int
    num_iters: int  # Sinkhorn iterations; 0 is softmax.
    vocab_size: int | None = None  # Of texts; None for images.
    seq_len: int | None = None  # Most tokens of a text; None for images.
    patch_size: int | None = None  # Side of an image's square patches; None for texts.
    has_conv_stem: bool = False  # Convolutions that halve the image, not patches.
    num_classes: int = 2
    has_mlp: bool = True
    mlp_width: int | None = None  # None is four times the width.
    layer_norm: LayerNorm = "pre"
    pooling: Pooling = "mean"
    position: Position = "learned"
    dropout_rate: float = 0.0  # Of the embedding and of what A and M add.
    dtype: Any = jnp.float32  # Of the computation; parameters are float32.
    has_scan: bool = True  # One compiled layer, `lax.scan`; parameters are stacked.
    has_remat: bool = False  # Recompute layers in the backward pass.
    finish: Finish = "rows"  # What the last half step normalises.
    logit_scale: float = 1.0  # Multiplies the attention's logits; inverse temperature.
    mesh: Mesh | None = None  # With an axis BATCH_AXIS, that divides the batch.

    def __post_init__(self):
        for name, choices in (
            ("layer_norm", LayerNorm),
            ("pooling", Pooling),
            ("position", Position),
            ("finish", Finish),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{name} must be one of {get_args(choices)}, got "
                    f"{getattr(self, name)!r}."
                )
        if self.width % self.num_heads:
            raise ValueError(
                f"width must be a multiple of num_heads, got {self.width} and "
                f"{self.num_heads}: heads share it evenly."
            )
        if (self.vocab_size is None) == (self.patch_size is None):
            raise ValueError(
                "Give vocab_size for texts or patch_size for images, got "
                f"vocab_size={self.vocab_size} and patch_size={self.patch_size}."
            )
        if self.vocab_size is not None and self.seq_len is None:
            raise ValueError("Texts need seq_len, their most tokens, got None.")
        if self.has_conv_stem and (self.patch_size or 0).bit_count() != 1:
            raise ValueError(
                "has_conv_stem halves images, so patch_size must be a power of two, "
                f"got {self.patch_size}."
            )
        if self.finish == "columns" and not self.num_iters:
            raise ValueError(
                'finish="columns" needs num_iters of at least 1, got 0: softmax has '
                "no column step."
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        inputs: Int[Array, "B T"] | UInt8[Array, "B H W C"],
        lengths: Int[Array, " B"] | None = None,
        *,
        has_skip: bool | Bool[Array, ""] = True,
        has_mlp_skip: bool | Bool[Array, ""] | None = None,
        is_training: bool = False,
        with_plans: bool = False,
    ) -> tuple[Float[Array, "B C"], Intermediates]:
        """Class logits, and what was computed on the way.

        Args:
            inputs: Word identifiers, which beyond the length change nothing, or images.
            lengths: Valid tokens of each text; None for images.
            has_skip: Whether layers have skip connections. An argument, for it changes
                no parameter: one compiled program serves both.
            has_mlp_skip: The same for the MLPs alone; None is as `has_skip`.
            is_training: Whether to drop out, which needs a "dropout" key.
            with_plans: Also compute the attention plans, each a full matrix.

        Raises:
            ValueError: The image's sides are no multiples of `patch_size`, without
                `has_conv_stem`, which rounds up.
        """
        x = self._embed(inputs)  # [B, T, D]
        lengths, x = self._with_class_token(lengths, x)
        x = nn.Dropout(self.dropout_rate)(x, deterministic=not is_training)
        has_skip = jnp.asarray(has_skip)
        skips = (has_skip, has_skip if has_mlp_skip is None else has_mlp_skip)
        skips = tuple(map(jnp.asarray, skips))
        # Spelled out, because a scanned module has no keyword arguments.
        options = (
            self._attention,
            (self.mlp_width or 4 * self.width) if self.has_mlp else None,
            self.layer_norm,
            self.dropout_rate,
            is_training,
            with_plans,
            self.dtype,
            self.mesh,
        )
        layer = _Layer
        if self.has_remat:
            # In a scan nothing is common to forward and backward pass anyway.
            layer = nn.remat(_Layer, prevent_cse=not self.has_scan)
        if self.has_scan:
            layers = nn.scan(
                layer,
                variable_axes={"params": 0},  # Stacked: [L, ...].
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=self.depth,
            )(*options, name="layers")
            out, (hidden_states, plans) = layers(x, lengths, skips)
        else:
            out, outputs = x, []
            for i in range(self.depth):
                out, output = layer(*options, name=f"layer_{i}")(out, lengths, skips)
                outputs.append(output)
            hidden_states, plans = jax.tree.map(lambda *y: jnp.stack(y), *outputs)
        if self.layer_norm == "pre":
            out = _norm(out, self.dtype)
        if lengths is None:
            where = jnp.ones(out.shape[:2], bool)
        else:
            where = valid_tokens(lengths, out.shape[1])
        pooled = _pool(out.astype(jnp.float32), where, self.pooling)
        logits = nn.Dense(self.num_classes, name="head")(pooled)
        hidden_states = jnp.concatenate([x[None], hidden_states])
        return logits, Intermediates(hidden_states, plans, where)

    @property
    def _attention(self):
        return _Attention(
            self.num_heads, self.num_iters, self.finish, float(self.logit_scale)
        )

    def _embed(self, inputs):
        # Small, so that a few hundred steps of Adam can tell words apart: at deviation
        # 1 the validation accuracy is still 0.5 after 200 steps, at 0.02 it is 0.72.
        small = nn.initializers.normal(0.02)
        if self.patch_size is None:
            embed = nn.Embed(
                self.vocab_size, self.width, embedding_init=small, dtype=self.dtype
            )
            x = embed(inputs)
            num_positions = self.seq_len
        else:
            x = inputs if self.has_conv_stem else patches(inputs, self.patch_size)
            x = x.astype(self.dtype) / np.asarray(255, self.dtype)
            if self.has_conv_stem:
                x = self._convolve(x)
            x = nn.Dense(self.width, dtype=self.dtype, name="patch")(x)
            num_positions = x.shape[1]
        if self.position == "learned":
            shape = (num_positions, self.width)
            position = self.param("position", small, shape, jnp.float32)
        elif self.position == "sinusoidal":
            position = jnp.asarray(sinusoids(num_positions, self.width))
        else:
            return x
        return x + position[None, : x.shape[1]].astype(self.dtype)

    def _convolve(self, x):
        num_halvings = self.patch_size.bit_length() - 1
        for i in reversed(range(num_halvings)):
            # Twice the features at half the side, up to the width.
            features = max(1, self.width >> i)
            x = nn.Conv(features, (3, 3), strides=2, dtype=self.dtype)(x)
            x = nn.relu(x)
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def _with_class_token(self, lengths, x):
        if self.pooling != "class_token":
            return lengths, x
        small = nn.initializers.normal(0.02)
        token = self.param("class_token", small, (self.width,), jnp.float32)
        first = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.width))
        lengths = None if lengths is None else lengths + np.asarray(1, lengths.dtype)
        return lengths, jnp.concatenate([first, x], axis=1)


class _Attention(NamedTuple):
    num_heads: int
    num_iters: int
    finish: Finish
    logit_scale: float


class _Layer(nn.Module):
    options: _Attention
    mlp_width: int | None
    layer_norm: LayerNorm
    dropout_rate: float
    is_training: bool
    with_plans: bool
    dtype: Any
    mesh: Mesh | None

    @nn.compact
    def __call__(self, x, lengths, skips):
        has_attention_skip, has_mlp_skip = skips
        attention = _SelfAttention(
            self.options,
            self.with_plans,
            self.dtype,
            self.mesh,
            name="attention",
        )
        y, plan = attention(self._before(x), lengths)
        x = self._after(x, y, has_attention_skip)
        if self.mlp_width is not None:
            y = nn.Dense(self.mlp_width, dtype=self.dtype)(self._before(x))
            y = nn.Dense(x.shape[-1], dtype=self.dtype)(nn.relu(y))
            x = self._after(x, y, has_mlp_skip)
        return x, (x, plan)

    def _before(self, x):
        return _norm(x, self.dtype) if self.layer_norm == "pre" else x

    def _after(self, x, y, has_skip):
        y = nn.Dropout(self.dropout_rate)(y, deterministic=not self.is_training)
        y = jnp.where(has_skip, x + y, y)
        return _norm(y, self.dtype) if self.layer_norm == "post" else y


def _norm(x, dtype):
    # Flax's LayerNorm mixes bfloat16 with the float32 in which it takes the mean.
    with jax.numpy_dtype_promotion("standard"):
        return nn.LayerNorm(dtype=dtype)(x)


class _SelfAttention(nn.Module):
    options: _Attention
    with_plans: bool
    dtype: Any
    mesh: Mesh | None

    @nn.compact
    def __call__(self, x, lengths):
        num_heads = self.options.num_heads
        heads = (num_heads, x.shape[-1] // num_heads)
        # Without biases, so that pure attention is the recursion of pure_attention.py.
        project = lambda name: nn.DenseGeneral(
            heads, use_bias=False, dtype=self.dtype, name=name
        )(x)
        query, key, value = project("query"), project("key"), project("value")
        y = self._attend(query, key, value, lengths)
        out = nn.DenseGeneral(
            x.shape[-1], axis=(-2, -1), use_bias=False, dtype=self.dtype, name="out"
        )(y)
        plan = None
        if self.with_plans:
            plan = attention_plan(
                query,
                key,
                lengths,
                self.options.num_iters,
                finish=self.options.finish,
                logit_scale=self.options.logit_scale,
            )
        return out, plan

    def _attend(self, query, key, value, lengths):
        def attend(query, key, value, lengths):
            return sinkhorn_attention(
                query,
                key,
                value,
                num_iters=self.options.num_iters,
                scale=self.options.logit_scale / math.sqrt(query.shape[-1]),
                finish=self.options.finish,
                query_seq_lengths=lengths,
                key_value_seq_lengths=lengths,
            )

        if self.mesh is not None:
            # On each device its own part of the batch. The loop over heads and batch
            # that the attention may be made of would gather a divided axis.
            spec = PartitionSpec(BATCH_AXIS)
            attend = jax.shard_map(
                attend, mesh=self.mesh, in_specs=spec, out_specs=spec
            )
        return attend(query, key, value, lengths)


def _pool(x, where, pooling):
    if pooling == "class_token":
        return x[:, 0]
    if pooling == "max":
        # A text without words, which no data set has, is read as its first padding.
        where = where.at[:, 0].set(True)
        # By index: the derivative of `max` looks for entries equal to the maximum, and
        # has none, 0 / 0, where XLA computes the same entry twice with other roundings.
        index = jnp.where(where[..., None], x, -jnp.inf).argmax(axis=1, keepdims=True)
        return jnp.take_along_axis(x, index, axis=1)[:, 0]
    count = jnp.maximum(where.sum(axis=1).astype(x.dtype), 1.0)[:, None]
    return jnp.where(where[..., None], x, 0.0).sum(axis=1) / count


def patches(
    images: UInt8[Array, "B H W C"], size: int
) -> UInt8[Array, "B (H*W)/(size*size) size*size*C"]:
    """Square patches row by row, each as one vector.

    Raises:
        ValueError: The sides are no multiples of `size`.
    """
    b, h, w, c = images.shape
    if h % size or w % size:
        raise ValueError(
            f"patch_size must divide the image's sides, got {size} and {h} x {w}."
        )
    x = images.reshape(b, h // size, size, w // size, size, c)
    return x.swapaxes(2, 3).reshape(b, (h // size) * (w // size), size * size * c)


def sinusoids(num: int, width: int) -> Float[np.ndarray, "num width"]:
    """Positions as sines and cosines of Vaswani et al. 2017, arXiv:1706.03762."""
    rate = 10_000.0 ** (-np.arange(0, width, 2) / width)
    angle = np.arange(num)[:, None] * rate
    both = np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(num, -1)
    return both[:, :width].astype(np.float32)


def attention_plan(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    lengths: Int[Array, " B"] | None,
    num_iters: int,
    *,
    finish: Finish = "rows",
    logit_scale: float = 1.0,
) -> Float[Array, "B N T T"]:
    """The matrix that `sinkhorn_attention` applies to the values, in float32."""
    query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    logits = jnp.einsum("btnh,bsnh->bnts", query, key)
    logits = logits * (logit_scale / math.sqrt(query.shape[-1]))
    if lengths is None:
        return sinkhorn(logits, num_iters, finish=finish)
    where = valid_tokens(lengths, query.shape[1])
    pairs = where[:, None, :, None] & where[:, None, None, :]  # [B, 1, T, T]
    return sinkhorn(logits, num_iters, where=pairs, finish=finish)


def valid_tokens(lengths: Int[Array, " B"], seq_len: int) -> Bool[Array, "B T"]:
    """True where a token is not padding."""
    return jnp.arange(seq_len, dtype=lengths.dtype)[None, :] < lengths[:, None]


def num_parameters(params) -> int:
    """Trainable numbers."""
    return sum(x.size for x in jax.tree.leaves(params))
