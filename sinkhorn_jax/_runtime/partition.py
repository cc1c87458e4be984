"""Functions that each device computes on its own part of the arrays.

XLA divides most programs over devices by itself. It does not divide a loop over heads
or matrices: it gathers them, and every device computes all. Where the axes of a mesh
are Explicit, types say how arrays are divided, and `jax.shard_map` computes each part
on its own. Where they are Auto, only the partitioner knows, after tracing, and
`custom_partitioning` asks it.

The axes of an array are named in a string, such as "b.n." for batch, tokens, heads and
features. A dot is an axis that stays whole on every device, and so is each axis that
the string does not reach. "k" are key heads, each of which belongs to the same number
of consecutive heads "n". An array may have one in place of a size.
"""

import concurrent.futures
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from .arguments import are_known, has_traced_checks
from .explicit_axes import padded
from .prime_mesh import prime_mesh


def by_part(
    fn: Callable[..., Any], names: Any, result_names: Any, *operands: Any
) -> Any:
    """`fn(*operands)`, computed by each device on its part where axes are Auto.

    A derivative of the result is right but not divided: the callers define their own,
    so it would be the second one. Within a context such as `jax.enable_x64` nothing is
    divided.

    Args:
        fn: A function of trees of arrays, which reads sizes from their shapes.
        names: The axes of the operands: strings, each for all arrays of a subtree.
        result_names: The axes of what `fn` returns, likewise. Parts of a result that
            lacks an axis are added up over this axis.
        *operands: Trees of arrays.
    """
    leaves, tree = jax.tree.flatten(operands)
    is_whole = jax.device_count() == 1 or _is_manual() or not _has_partitioner()
    if is_whole or not all(are_known(*x.shape) for x in leaves):
        return fn(*operands)
    # The partitioner takes no typed keys.
    impls = [jax.random.key_impl(x) if _is_key(x) else None for x in leaves]
    data = [jax.random.key_data(x) if _is_key(x) else x for x in leaves]

    def of_data(*data):
        leaves = [
            x if impl is None else jax.random.wrap_key_data(x, impl=impl)
            for x, impl in zip(data, impls, strict=True)
        ]
        return fn(*jax.tree.unflatten(tree, leaves))

    inputs = _axes(names, jax.tree.unflatten(tree, data))
    outputs = _axes(result_names, jax.eval_shape(of_data, *data))
    return _by_part(of_data, Division.of(inputs, outputs), data)


def by_typed_part(
    fn: Callable[..., Any],
    names: Any,
    result_names: Any,
    *operands: Any,
    why_whole: str,
) -> Any:
    """`fn(*operands)`, computed by each device on its part where axes are Explicit.

    Args:
        fn: As in `by_part`.
        names: Likewise. The first operand with an axis decides how it is divided.
        result_names: Likewise; every result has all axes.
        *operands: Trees of arrays.
        why_whole: Why an axis without a name cannot be divided, and what to do, with a
            place for the axis of the mesh.

    Raises:
        ValueError: An axis without a name is divided, or one that `jax.vmap` maps over.
        NotImplementedError: `traced_checks` are on.
    """
    leaves, tree = jax.tree.flatten(operands)
    types = [jax.typeof(x) for x in leaves]
    meshes = (x.sharding.mesh for x in types)
    mesh = next((x for x in meshes if AxisType.Explicit in x.axis_types), None)
    if mesh is None:
        return fn(*operands)
    if has_traced_checks():
        raise NotImplementedError(
            "traced_checks cannot look at arrays on a mesh with Explicit axes: "
            "checkify does not see into the jax.shard_map that divides the call. "
            "Check the program on one device, or on a mesh whose axes are Auto."
        )
    inputs = _axes(names, operands)
    specs = [padded(x.sharding.spec, x.ndim) for x in types]
    for axes, spec in zip(inputs, specs, strict=True):
        for name, axis in zip(axes.names, spec, strict=True):
            if name is None and axis is not None:
                raise ValueError(why_whole.format(axis))
    division = Division.of(inputs, [])
    divided, wanted = (division.over(mesh, specs, evenly=x) for x in (True, False))

    def to_types(arrays, specs):
        return [
            jax.sharding.reshard(x, NamedSharding(mesh, spec))
            for x, spec in zip(arrays, specs, strict=True)
        ]

    in_specs = tuple(_spec(axes.names, divided) for axes in division.inputs)
    explicit = zip(mesh.axis_names, mesh.axis_types, strict=True)
    divide = jax.shard_map(
        lambda *leaves: fn(*jax.tree.unflatten(tree, leaves)),
        mesh=mesh,
        in_specs=in_specs,
        out_specs=jax.tree.map(lambda x: _spec(_parsed(x), divided), result_names),
        axis_names={axis for axis, kind in explicit if kind == AxisType.Explicit},
    )
    try:
        out, out_tree = jax.tree.flatten(divide(*to_types(leaves, in_specs)))
    except ValueError as error:
        if "axis_names" not in str(error):
            raise
        raise ValueError(
            "jax.vmap maps over an axis that an Explicit mesh axis divides, which "
            "jax.shard_map cannot do inside it. Give the call this axis as one of its "
            "own leading axes, or reshard it first: jax.sharding.reshard(x, jax.P())."
        ) from error
    specs = [
        _spec(axes.names, wanted)
        for axes in _axes(result_names, out_tree.unflatten(out))
    ]
    return jax.tree.unflatten(out_tree, to_types(out, specs))


class Axes(NamedTuple):
    """The axes of one array."""

    names: tuple[str | None, ...]  # None for an axis that stays whole.
    shape: tuple[int, ...]


class Division(NamedTuple):
    """The axes of a function's operands and results that devices can divide."""

    inputs: list[Axes]
    outputs: list[Axes]
    # In how many parts an axis can be divided: heads as their key heads are.
    sizes: dict[str, int]

    @classmethod
    def of(cls, inputs: list[Axes], outputs: list[Axes]) -> "Division":
        """The division; axes of size 1, and "k" where it equals "n", lose their names.

        A single key head, then, is on every device.
        """
        sizes = {}
        for axes in inputs:
            sizes |= {n: s for n, s in zip(*axes, strict=True) if n and s != 1}
        others = {"k": "n"} if sizes.get("k") == sizes.get("n") else {}

        def renamed(axes):
            names = (
                None if size == 1 else others.get(name, name)
                for name, size in zip(*axes, strict=True)
            )
            return Axes(tuple(names), axes.shape)

        if "k" in sizes:
            sizes["n"] = sizes["k"]
        return cls([*map(renamed, inputs)], [*map(renamed, outputs)], sizes)

    def over(
        self,
        mesh: Mesh | AbstractMesh,
        specs: Iterable[Iterable[Any]],
        *,
        evenly: bool = True,
    ) -> dict[str, tuple[str, ...]]:
        """The axes of the mesh that divide each axis: those of its first operand.

        An axis of the mesh that divides one axis already divides no other.

        Args:
            mesh: The mesh.
            specs: How each operand is divided.
            evenly: Take the first of them only, as many as divide the axis evenly.
        """
        divided, used = {}, set()
        for (names, _), spec in zip(self.inputs, specs, strict=True):
            for name, axes in zip(names, spec, strict=True):
                if name in (None, "k") or not axes or name in divided:
                    continue
                axes = axes if isinstance(axes, tuple) else (axes,)
                if used & set(axes):
                    continue
                while evenly and self.sizes[name] % math.prod(
                    mesh.shape[x] for x in axes
                ):
                    axes = axes[:-1]
                divided[name] = axes
                used |= set(axes)
        return divided | {"k": divided.get("n", ())}

    def rule(self) -> tuple[str, tuple[str, ...]]:
        """The rule for the partitioner, and which of its factors stay whole.

        It lets heads and key heads be divided differently, which `over` mends.
        """
        whole = []

        def factor(name):
            if name is None:
                whole.append(f"x{len(whole)}")
            return name or whole[-1]

        def text(arrays):
            return ", ".join(" ".join(map(factor, axes.names)) for axes in arrays)

        return f"{text(self.inputs)} -> {text(self.outputs)}", tuple(whole)


def _by_part(fn, division, leaves):
    # Without this, a second derivative would be an error.
    @jax.custom_jvp
    def call(*leaves):
        return batched(*leaves)

    @call.defjvp
    def _(primals, tangents):
        return jax.jvp(fn, primals, tangents)

    @custom_vmap
    def batched(*leaves):
        return _partitioned(fn, division)(*leaves)

    @batched.def_vmap
    def _(size, in_batched, *leaves):
        mapped = f"m{len(division.sizes)}"
        in_axes = [0 if is_batched else None for is_batched in in_batched]
        inputs = [
            Axes((mapped, *axes.names), (size, *axes.shape)) if is_batched else axes
            for axes, is_batched in zip(division.inputs, in_batched, strict=True)
        ]
        outputs = [Axes((mapped, *x.names), (size, *x.shape)) for x in division.outputs]
        sizes = division.sizes | {mapped: size}
        out = _by_part(
            jax.vmap(fn, in_axes),
            division._replace(inputs=inputs, outputs=outputs, sizes=sizes),
            leaves,
        )
        return out, jax.tree.map(lambda _: True, out)

    return call(*leaves)


def _partitioned(fn, division):
    """The function as an operation that the partitioner knows how to divide."""

    def partition(_, arg_shapes, result_shape):
        mesh, specs = prime_mesh([(x.sharding, x.shape) for x in arg_shapes])
        divided = division.over(mesh, specs)

        def of_parts(*parts):
            leaves, tree = jax.tree.flatten(fn(*parts))
            for i, (names, _) in enumerate(division.outputs):
                has = {"n" if name == "k" else name for name in names} | {"k"}
                lacking = (x for name, x in divided.items() if name not in has)
                summed = tuple(axis for axes in lacking for axis in axes)
                if summed:
                    leaves[i] = jax.lax.psum(leaves[i], summed)
            return jax.tree.unflatten(tree, leaves)

        to_sharding = lambda axes: NamedSharding(mesh, _spec(axes.names, divided))
        tree = jax.tree.structure(result_shape)
        out = jax.tree.unflatten(tree, [*map(to_sharding, division.outputs)])
        return mesh, of_parts, out, tuple(map(to_sharding, division.inputs))

    call = custom_partitioning(fn)
    rule, whole = division.rule()
    call.def_partition(
        partition,
        sharding_rule=rule,
        need_replication_factors=whole,
        decode_shardings=False,
    )
    return call


def _axes(names, tree) -> list[Axes]:
    """The axes of each array of a tree, from a prefix of strings."""
    found = []

    def add(text, x):
        parsed = padded(_parsed(text), x.ndim)
        found.append(Axes(parsed, x.shape))

    def add_all(text, part):
        jax.tree.map(lambda x: add(text, x), part)

    jax.tree.map(add_all, names, tree)
    return found


def _parsed(text: str) -> tuple[str | None, ...]:
    return tuple(None if name == "." else name for name in text)


def _spec(
    names: tuple[str | None, ...], divided: dict[str, tuple[str, ...]]
) -> PartitionSpec:
    """How an array is divided."""
    return PartitionSpec(*(divided.get(name or "") or None for name in names))


def _is_key(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _has_partitioner() -> bool:
    """Whether the partitioner can call back, and with the settings of this thread.

    It calls in a thread of its own, where contexts such as `jax.enable_x64` do not
    hold.
    """
    if not getattr(jax.config, "jax_use_shardy_partitioner", True):
        return False
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return _settings() == pool.submit(_settings).result()


def _settings():
    names = "jax_enable_x64", "jax_threefry_partitionable", "jax_default_prng_impl"
    return [getattr(jax.config, name) for name in names]


def _is_manual() -> bool:
    return bool(jax.sharding.get_abstract_mesh().manual_axes)
