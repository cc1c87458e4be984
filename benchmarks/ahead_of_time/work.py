"""What the Pallas kernels of a program do, counted in their traced code.

A kernel's body is run for every point of its grid with its scalars alone: positions in
the grid, loop counters and what it keeps in SMEM are followed, arrays are not. So
branches and loops go as on the device, and operations on arrays are counted as often.
"""

import collections
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from . import h100_specs as _hopper

# What the vector unit does with each element, as far as it costs an instruction.
VECTOR: Final = frozenset(
    "add add_any sub mul div max min neg abs sign select_n eq ne lt le gt ge and or "
    "not convert_element_type integer_pow reduce_sum reduce_max reduce_min".split()
)
# Those that a GPU does with a product in one.
SUMS: Final = frozenset("add add_any sub reduce_sum".split())
TRANSCENDENTAL: Final = frozenset("exp exp2 log log1p tanh logistic".split())
# Passes of bfloat16 products through the matrix unit that make one of float32.
HIGHEST_PASSES: Final = 6

_SCALARS: Final[Mapping[str, Callable]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": lambda x, y: x // y if x * y >= 0 else -(-x // y),
    "rem": math.fmod,
    "max": max,
    "min": min,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "and": operator.and_,
    "or": operator.or_,
    "not": lambda x: not x,
    "neg": operator.neg,
    "sign": lambda x: (x > 0) - (x < 0),
    "select_n": lambda which, *cases: cases[int(which)],
    "convert_element_type": lambda x: x,
    "multiple_of": lambda x: x,
    "squeeze": lambda x: x,
    "reshape": lambda x: x,
}


class Work(NamedTuple):
    """Of one kernel, over its whole grid."""

    name: str
    flops: int = 0  # Of matrix products, 2 for each product of numbers.
    passes: int = 0  # The same, as often as float32 goes through the matrix unit.
    exps: int = 0  # With logarithms and the like, of array elements.
    vector: int = 0  # Operations on array elements, sums with them.
    num_bytes: int = 0  # Moved between HBM and VMEM.
    shared: int = 0  # Bytes that a GPU's shared memory could have moved meanwhile.
    estimate: Any = None  # The kernel's own `pl.CostEstimate`.
    times: int = 1  # Launches, of Mosaic GPU's.


def count(
    fn: Callable, *arrays: jax.ShapeDtypeStruct, smem: Mapping[str, Sequence[int]]
) -> list[Work]:
    """The work of each kernel of a function.

    Args:
        fn: The function.
        *arrays: Its arguments.
        smem: By name of a kernel, what its operands in SMEM hold. A branch on something
            that is not known is the first one, which is "no" of `pl.when`.
    """
    return [
        _kernel(eqn, smem.get(eqn.params["name"], ()))
        for eqn, _ in _repeated(jax.make_jaxpr(fn)(*arrays).jaxpr, "pallas_call")
    ]


def count_gpu(fn: Callable, *arrays: jax.ShapeDtypeStruct) -> list[Work]:
    """The work of each Mosaic GPU kernel of a function, in one of its launches.

    All programs of a kernel do alike, and the first one is counted, with all of its
    warpgroups, in all blocks of threads if it is a cluster of them. A product that is
    only added to something is one operation with that sum, as it is to the compiler.
    Shared memory moves what is read and written; but a load of a vector takes it as
    long as 128 bytes for each warp, which all read what they need of it.
    What comes from outside a multiprocessor is not counted: most of it may be cached.

    Raises:
        ValueError: A kernel's loop ends by what arrays hold.
    """
    return [
        _gpu_kernel(eqn, times)
        for eqn, times in _repeated(jax.make_jaxpr(fn)(*arrays).jaxpr, "mpmd_map")
    ]


def _gpu_kernel(eqn, times) -> Work:
    (mesh,), (jaxpr,) = eqn.params["meshes"], eqn.params["jaxprs"]
    counter = _Counter(fuses=True)
    names = *mesh.cluster_names, mesh.thread_name
    sizes = *mesh.cluster, mesh.num_threads or 1
    for at in itertools.product(*map(range, sizes)):
        refs = [_Ref() for _ in jaxpr.invars]
        counter.run(jaxpr, (), refs, dict(zip(names, at, strict=True)))
    num_programs = math.prod(mesh.grid)
    return Work(
        name=eqn.params["name"],
        flops=counter.flops * num_programs,
        passes=counter.passes * num_programs,
        exps=counter.exps * num_programs,
        vector=counter.vector * num_programs,
        shared=counter.shared * num_programs,
        times=times,
    )


def _repeated(jaxpr, primitive, times=1) -> Iterator[tuple[Any, int]]:
    """Equations of a primitive, and how often loops of known length come to them."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == primitive:
            yield eqn, times
        length = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for inner in _inner(eqn):
            yield from _repeated(inner, primitive, times * length)


def _inner(eqn):
    for value in eqn.params.values():
        for x in value if isinstance(value, (tuple, list)) else (value,):
            x = getattr(x, "jaxpr", x)
            if hasattr(x, "eqns"):
                yield x


class _Ref:
    """A reference to memory; of one in SMEM, what was last written there."""

    def __init__(self, value=None):
        self.value = value


class _Counter:
    def __init__(self, *, fuses=False):
        self.flops = self.passes = self.exps = self.vector = self.shared = 0
        # Loops come to a jaxpr again and again.
        self._fused = functools.cache(_fused if fuses else lambda jaxpr: frozenset())
        self._layouts = functools.cache(_layouts)

    def run(self, jaxpr, consts, args, grid_point):
        """Results, None where they are not followed."""
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(x):
            return _number(x.val) if hasattr(x, "val") else env.get(x)

        fused, layouts = self._fused(jaxpr), self._layouts(jaxpr)
        for eqn in jaxpr.eqns:
            if fused.intersection(eqn.outvars):
                continue
            self._count_shared(eqn, layouts)
            results = self._equation(eqn, [read(x) for x in eqn.invars], grid_point)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(x) for x in jaxpr.outvars]

    def _equation(self, eqn, values, at):
        name, params = eqn.primitive.name, eqn.params
        if name == "program_id":
            return [at[params["axis"]]]
        if name == "axis_index":  # Of a GPU's kernel; of its grid no more is known.
            return [at.get(params["axis_name"])]
        if name == "get":
            return [values[0].value]
        if name == "swap":
            ref, old = values[0], values[0].value
            ref.value = values[1]
            return [old]
        if name == "cond":
            branch = params["branches"][int(values[0] or 0)]
            return self.run(branch.jaxpr, branch.consts, values[1:], at)
        if name == "while":
            return self._while(params, values, at)
        if name == "scan":
            return self._scan(params, values, at)
        if name == "run_scoped":
            inner = params["jaxpr"]
            return self.run(inner, values, [_Ref() for _ in inner.invars], at)
        if inner := params.get("jaxpr"):  # Of jit and its like.
            return self.run(inner.jaxpr, inner.consts, values, at)
        is_known = all(x is not None for x in values)
        if name in _SCALARS and is_known and not eqn.outvars[0].aval.shape:
            return [_SCALARS[name](*values)]
        self._count(eqn)
        return [None] * len(eqn.outvars)

    def _count_shared(self, eqn, layouts):
        name = eqn.primitive.name
        if name == "wgmma_ref":
            for x in eqn.invars[1:3]:
                self._add_shared(x, x.aval.shape[-4:])
        elif name == "copy_gmem_to_smem":
            self._add_shared(eqn.invars[1], _copied_shape(eqn))
        elif name == "get":
            ref, out = eqn.invars[0], eqn.outvars[0]
            self._add_shared(ref, out.aval.shape, layouts.get(out))
        elif name == "swap":
            self._add_shared(eqn.invars[0], eqn.invars[1].aval.shape)

    def _add_shared(self, ref, shape, layout=None):
        if "smem" not in str(ref.aval):
            return
        if layout and len(shape) == 1:
            num_loads = math.prod(layout.registers_shape(shape))
            self.shared += num_loads * _hopper.WARPGROUP * _hopper.WAVEFRONT
        else:
            self.shared += math.prod(shape) * ref.aval.dtype.itemsize

    def _while(self, params, values, at):
        num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
        cond, body = params["cond_jaxpr"], params["body_jaxpr"]
        cond_values, values = values[:num_cond], values[num_cond:]
        body_values, carry = values[:num_body], values[num_body:]

        def goes_on():
            (value,) = self.run(cond.jaxpr, cond.consts, [*cond_values, *carry], at)
            if value is None:
                raise ValueError(
                    "A loop ends by what arrays hold; it cannot be counted."
                )
            return value

        while goes_on():
            carry = self.run(body.jaxpr, body.consts, [*body_values, *carry], at)
        return carry

    def _scan(self, params, values, at):
        body, length = params["jaxpr"], params["length"]
        num_consts, num_carry = params["num_consts"], params["num_carry"]
        consts, rest = values[:num_consts], values[num_consts:]
        carry, unknown = rest[:num_carry], [None] * len(rest[num_carry:])
        results = []
        for _ in range(length):
            args = [*consts, *carry, *unknown]
            results = self.run(body.jaxpr, body.consts, args, at)
            carry = results[:num_carry]
        num_stacked = len(body.jaxpr.outvars) - num_carry
        return [*carry, *[None] * num_stacked]

    def _count(self, eqn):
        name = eqn.primitive.name
        if name == "dot_general":
            ((contract, _), _) = eqn.params["dimension_numbers"]
            x = eqn.invars[0].aval
            flops = 2 * math.prod(x.shape[i] for i in contract)
            flops *= math.prod(eqn.outvars[0].aval.shape)
            precision = eqn.params["precision"]
            precision = precision[0] if isinstance(precision, tuple) else precision
            is_highest = (
                x.dtype == jnp.float32 and precision == jax.lax.Precision.HIGHEST
            )
            self.flops += flops
            self.passes += flops * (HIGHEST_PASSES if is_highest else 1)
        elif name == "wgmma_ref":
            accumulator, x, *_ = (x.aval for x in eqn.invars)
            # In shared memory a matrix is in tiles for the tensor cores, on four axes,
            # and may be one slot of several.
            depth = math.prod(x.shape[-4:]) // accumulator.shape[0]
            self.flops += 2 * math.prod(accumulator.shape) * depth
            self.passes += 2 * math.prod(accumulator.shape) * depth
        elif name in TRANSCENDENTAL or name in VECTOR:
            # A reduction's operand, or what the result is as large as.
            size = max(math.prod(x.aval.shape) for x in (*eqn.invars, *eqn.outvars))
            if size > 1:
                if name in TRANSCENDENTAL:
                    self.exps += size
                else:
                    self.vector += size


def _kernel(eqn, smem) -> Work:
    jaxpr, mapping = eqn.params["jaxpr"], eqn.params["grid_mapping"]
    smem = iter(smem)
    refs = [_Ref() for _ in jaxpr.invars]
    operands = zip(jaxpr.invars, refs, strict=True)
    for var, ref in itertools.islice(operands, mapping.num_inputs):
        if "smem" in str(var.aval):
            ref.value = next(smem, None)
    counter = _Counter()
    blocks = [_Block(x) for x in mapping.block_mappings]
    for at in itertools.product(*map(range, mapping.grid)):
        counter.run(jaxpr, (), refs, at)
        for block in blocks:
            block.visit(at)
    return Work(
        name=eqn.params["name"],
        flops=counter.flops,
        passes=counter.passes,
        exps=counter.exps,
        vector=counter.vector,
        num_bytes=sum(x.num_bytes for x in blocks),
        estimate=eqn.params["cost_estimate"],
    )


class _Block:
    """An operand or result: moved whenever the grid comes to another block of it."""

    def __init__(self, mapping):
        self._mapping = mapping
        self._index = None
        self.num_bytes = 0
        array = mapping.array_aval
        self._size = math.prod(mapping.transformed_block_aval.shape)
        self._size *= array.dtype.itemsize
        self._moves = "smem" not in str(mapping.transformed_block_aval)

    def visit(self, at):
        index_map = self._mapping.index_map_jaxpr
        # What belongs to scalars that were fetched before is not followed.
        args = [*at, *[_Ref() for _ in index_map.jaxpr.invars[len(at) :]]]
        index = _Counter().run(index_map.jaxpr, index_map.consts, args, at)
        if self._moves and index != self._index:
            self._index = index
            self.num_bytes += self._size


def _fused(jaxpr):
    """Products of arrays that are only added to something, one for each sum."""
    read = [_variables(eqn.invars) for eqn in jaxpr.eqns]
    uses = collections.Counter(itertools.chain(*read, _variables(jaxpr.outvars)))
    products = {
        eqn.outvars[0]
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "mul"
        and eqn.outvars[0].aval.shape
        and uses[eqn.outvars[0]] == 1
    }
    return {
        next((x for x in some if x in products), None)
        for some, eqn in zip(read, jaxpr.eqns, strict=True)
        if eqn.primitive.name in SUMS
    }


def _layouts(jaxpr):
    """How registers hold an array, by variable."""
    return {
        eqn.invars[0]: eqn.params["new_layout"].to_mgpu()
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "layout_cast"
    }


def _copied_shape(eqn):
    """Of what is copied to shared memory: the source may be some of an array."""
    tree, shape = eqn.params["src_transforms_treedef"], eqn.invars[0].aval.shape
    for part in jax.tree.unflatten(tree, [0] * tree.num_leaves):
        shape = part.get_indexer_shape()
    return shape


def _variables(some):
    return [x for x in some if not hasattr(x, "val")]


def _number(x):
    return x.item() if getattr(x, "shape", None) == () else x
