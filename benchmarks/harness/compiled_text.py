"""Counts products, exponentials, and collectives and their bytes in compiled programs.

Read from its text, where a loop's body counts as often as it runs. XLA's own cost
analysis counts it once.
"""

import collections
import math
import re

COLLECTIVES = (
    *("all-gather", "all-reduce", "all-to-all", "collective-permute"),
    *("collective-broadcast", "reduce-scatter"),
)
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)


def count(program) -> collections.Counter:
    """Counts of the work that each device does in a compiled program.

    They are products of two numbers that are added up (`multiply_add`), exponentials
    (`exponential`), each collective by its name, and the bytes of its results by its
    name and "bytes".
    """
    bodies, entry = _computations(program.as_text())
    return _count(bodies, entry, {})


def collectives(program) -> dict[str, int]:
    """How often each collective of a compiled program runs."""
    return {name: n for name, n in count(program).items() if name in COLLECTIVES}


def _computations(text):
    bodies, name, entry = {}, None, None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$", line)
        if head and "=" not in line.split("(")[0]:
            name = head.group(2)
            bodies[name] = []
            entry = name if head.group(1) else entry
        elif name is not None:
            bodies[name].append(line)
    assert entry is not None
    return bodies, entry


def _count(bodies, name, known):
    if name in known:
        return known[name]
    total, shapes = collections.Counter(), {}
    for line in bodies[name]:
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        result, shape, operation = found.groups()
        shapes[result] = _shape(shape)
        if operation == "dot":
            total["multiply_add"] += _products(line, shapes, result)
        elif operation == "exponential":
            total["exponential"] += math.prod(shapes[result])
        elif operation.removesuffix("-start") in COLLECTIVES:
            collective = operation.removesuffix("-start")
            total[collective] += 1
            total[f"{collective} bytes"] += _bytes(shape)
        called = _CALLED.findall(line)
        branches = re.search(r"branch_computations=\{([^}]*)\}", line)
        if branches:
            called += [x.strip().lstrip("%") for x in branches.group(1).split(",")]
        times = 1
        if operation == "while":
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
            times = int(trips.group(1)) if trips else 1
        for other in called:
            inner = _count(bodies, other, known)
            total += collections.Counter({k: n * times for k, n in inner.items()})
    known[name] = total
    return total


def _shape(text):
    found = re.match(r"\w+\[([\d,]*)\]", text)
    return [int(x) for x in found.group(1).split(",") if x] if found else []


def _bytes(text):
    """The bytes of an array or of a tuple of arrays, from its type in the text."""
    sizes = (
        math.prod([int(x) for x in dims.split(",") if x]) * int(bits) // 8
        for bits, dims in re.findall(r"[a-z]+(\d+)\[([\d,]*)\]", text)
    )
    return sum(sizes)


def _products(line, shapes, result):
    left = re.search(r"dot\((?:\S+ )?%?([\w.\-]+)", line).group(1)
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line).group(1)
    contracted = [shapes[left][int(axis)] for axis in axes.split(",") if axis]
    return math.prod(shapes[result]) * math.prod(contracted)
