"""One encoder for texts and images, with a switch for what may prevent rank collapse.

Pooling matters for doubly stochastic attention. The columns of its plan P sum to one,
so the mean over tokens of P V is that of V: mean pooling after a single layer does not
see how attention moved the tokens. The maximum over tokens and a class token do.
"""

import functools
import math
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from sinkhorn_jax.linen import MultiHeadSinkhornAttention

from . import tokens
from .tokens import Pooling

LayerNorm = Literal["none", "pre", "post"]
Position = Literal["learned", "sinusoidal", "none"]
Finish = Literal["rows", "columns"]

# The deviation of initial embeddings, small so that a few hundred updates of Adam can
# tell words apart: at 1 the validation accuracy is still 0.5 after 200 updates, at 0.02
# it is 0.72.
_SMALL = nn.initializers.normal(0.02)


class Intermediates(NamedTuple):
    """Results inside an encoder. L layers, N heads, T counts a class token too."""

    hidden_states: Float[Array, "L+1 B T D"]  # The embedding, then each layer's output.
    plans: Float[Array, "L B N T T"] | None  # Padding is zero. See apply_with_plans.
    where: Bool[Array, "B T"]  # True where a token is not padding.


class Encoder(nn.Module):
    """Tokens or images to class logits through `depth` equal layers.

    With skip connections a layer is $x + A(x)$ and, with an MLP, $y + M(y)$ after it;
    without skip connections it is $A(x)$ and $M(y)$. LayerNorm "pre" acts on the input
    of A and M, "post" on the sum, as in the original Transformer. Images become
    patches, as in Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, or with
    `has_conv_stem` the same number of tokens through 3 x 3 convolutions of stride 2,
    after Xiao et al. 2021, https://arxiv.org/abs/2106.14881. All tokens share the
    projection to the width unless `has_own_projections`. Parameters do not depend
    on `num_iters`, `finish`, `column_tau` and `logit_scale`, so the parameters of a
    softmax encoder serve a Sinkhorn encoder.
    """

    depth: int
    width: int
    num_heads: int
    num_iters: int  # Sinkhorn iterations; 0 is softmax.
    vocab_size: int | None = None  # Words of texts; None for images.
    seq_len: int | None = None  # Most tokens of a text; None for images.
    patch_size: int | None = None  # Side of an image's square patches; None for texts.
    has_conv_stem: bool = False  # Convolutions that halve the image, not patches.
    has_own_projections: bool = False  # Each place of an image has its projection.
    num_classes: int = 2
    has_mlp: bool = True
    mlp_width: int | None = None  # None is four times the width.
    layer_norm: LayerNorm = "pre"
    pooling: Pooling = "mean"
    position: Position = "learned"
    dropout_rate: float = 0.0  # For the embedding, A and M.
    dtype: Any = jnp.float32  # The computation's; parameters are float32.
    has_remat: bool = False  # Recompute layers in the backward pass.
    finish: Finish = "rows"  # The side that the last half step normalises.
    column_tau: float = 1.0  # 1 is doubly stochastic, 0 is softmax.
    logit_scale: float = 1.0  # Multiplies the attention's logits; inverse temperature.

    def __post_init__(self):
        literals = {"layer_norm": LayerNorm, "pooling": Pooling, "position": Position}
        for name, choices in literals.items():
            if (value := getattr(self, name)) not in get_args(choices):
                raise ValueError(
                    f"{name} must be one of {get_args(choices)}, got {value!r}."
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
        sow_plans: bool = False,
    ) -> tuple[Float[Array, "B C"], Intermediates]:
        """Class logits, and what was computed on the way.

        Args:
            inputs: Images, or word identifiers, which are ignored beyond the length.
            lengths: Valid tokens of each text; None for images.
            has_skip: Whether layers have skip connections. It is an argument because it
                changes no parameter: one compiled program serves both values.
            has_mlp_skip: The same for the MLPs alone; None takes `has_skip`.
            is_training: Whether to drop out, which needs a "dropout" key.
            sow_plans: Whether the attention layers sow their plans, each a full matrix.

        Raises:
            ValueError: A side of the image is no multiple of `patch_size`, and there is
                no `has_conv_stem`, which rounds up.
        """
        x = self._embed(inputs)  # [B, T, D]
        if self.pooling == "class_token":
            lengths, x = self._with_class_token(lengths, x)
        x = nn.Dropout(self.dropout_rate)(x, deterministic=not is_training)
        # In a scan nothing is common to the forward and the backward pass anyway.
        layer = nn.remat(_Layer, prevent_cse=False) if self.has_remat else _Layer
        layers = nn.scan(
            layer,
            variable_axes={"params": 0, "intermediates": 0},  # Stacked: [L, ...].
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=self.depth,
        )(
            attention=functools.partial(
                MultiHeadSinkhornAttention,
                num_heads=self.num_heads,
                num_iters=self.num_iters,
                scale=self.logit_scale / math.sqrt(self.width // self.num_heads),
                finish=self.finish,
                column_tau=self.column_tau,
                # Without biases pure attention is the recursion of pure_attention.py.
                use_bias=False,
                dtype=self.dtype,
            ),
            mlp_width=(self.mlp_width or 4 * self.width) if self.has_mlp else None,
            layer_norm=self.layer_norm,
            dropout_rate=self.dropout_rate,
            is_training=is_training,
            sow_plans=sow_plans,
            dtype=self.dtype,
            name="layers",
        )
        skips = (has_skip, has_skip if has_mlp_skip is None else has_mlp_skip)
        out, hidden_states = layers(x, lengths, tuple(map(jnp.asarray, skips)))
        if self.layer_norm == "pre":
            out = _norm(out, self.dtype)
        if lengths is None:
            where = jnp.ones(out.shape[:2], bool)
        else:
            where = tokens.is_valid(lengths, out.shape[1])
        pooled = tokens.pool(out.astype(jnp.float32), where, self.pooling)
        logits = nn.Dense(self.num_classes, name="head")(pooled)
        hidden_states = jnp.concatenate([x[None], hidden_states])
        return logits, Intermediates(hidden_states, None, where)

    def _embed(self, inputs):
        if self.patch_size is None:
            options = {"embedding_init": _SMALL, "dtype": self.dtype}
            x = nn.Embed(self.vocab_size, self.width, **options)(inputs)
            num_positions = self.seq_len
        else:
            if not self.has_conv_stem:
                inputs = tokens.patches(inputs, self.patch_size)
            x = inputs.astype(self.dtype) / np.asarray(255, self.dtype)
            if self.has_conv_stem:
                x = self._convolve(x)
            x = self._project(x)
            num_positions = x.shape[1]
        if self.position == "learned":
            shape = (num_positions, self.width)
            position = self.param("position", _SMALL, shape, jnp.float32)
        elif self.position == "sinusoidal":
            position = jnp.asarray(tokens.sinusoids(num_positions, self.width))
        else:
            return x
        return x + position[None, : x.shape[1]].astype(self.dtype)

    def _convolve(self, x):
        for _ in range(self.patch_size.bit_length() - 1):
            x = nn.relu(nn.Conv(self.width, (3, 3), strides=2, dtype=self.dtype)(x))
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def _project(self, x):
        if not self.has_own_projections:
            return nn.Dense(self.width, dtype=self.dtype, name="patch")(x)
        return nn.Einsum(
            (*x.shape[1:], self.width),
            "btp,tpd->btd",
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.lecun_normal(batch_axis=0),
            name="patch",
        )(x)

    def _with_class_token(self, lengths, x):
        token = self.param("class_token", _SMALL, (self.width,), jnp.float32)
        first = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.width))
        lengths = None if lengths is None else lengths + np.asarray(1, lengths.dtype)
        return lengths, jnp.concatenate([first, x], axis=1)


class _Layer(nn.Module):
    attention: functools.partial
    mlp_width: int | None  # None leaves the MLP out.
    layer_norm: LayerNorm
    dropout_rate: float
    is_training: bool
    sow_plans: bool
    dtype: Any

    # A scanned module takes no keyword arguments.
    @nn.compact
    def __call__(self, x, lengths, skips):
        has_attention_skip, has_mlp_skip = skips
        y = self.attention(name="attention")(
            self._before(x), query_seq_lengths=lengths, sow_weights=self.sow_plans
        )
        x = self._after(x, y, has_attention_skip)
        if self.mlp_width is not None:
            y = nn.Dense(self.mlp_width, dtype=self.dtype)(self._before(x))
            y = nn.Dense(x.shape[-1], dtype=self.dtype)(nn.relu(y))
            x = self._after(x, y, has_mlp_skip)
        return x, x

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


def apply_with_plans(
    model: Encoder,
    params: Any,
    inputs: Int[Array, "B T"] | UInt8[Array, "B H W C"],
    lengths: Int[Array, " B"] | None = None,
    *,
    has_skip: bool | Bool[Array, ""] = True,
) -> tuple[Float[Array, "B C"], Intermediates]:
    """Class logits and intermediates, with the plans of the attention in float32."""
    options = {"has_skip": has_skip, "sow_plans": True, "mutable": "intermediates"}
    (logits, intermediates), sown = model.apply(
        {"params": params}, inputs, lengths, **options
    )
    (plans,) = sown["intermediates"]["layers"]["attention"]["attention_weights"]
    return logits, intermediates._replace(plans=plans)


def num_parameters(params: Any) -> int:
    """The number of trainable numbers."""
    return sum(x.size for x in jax.tree.leaves(params))
