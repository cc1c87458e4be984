"""Counts messages and memory with divided tokens.

Forward and backward of `sinkhorn_attention` with a `sequence_axis`, compiled for
simulated devices in float32 and not run: messages and temporary memory of one device,
read from the compiled programs. docs/scaling.md shows them, and the time of one step on
real devices, on paper, from the published rates of the devices.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sinkhorn_jax import sinkhorn_attention

from .harness import compiled_text, machine, record
from .harness.program import temp_bytes
from .report import table
from .report.readme import with_section

RESULTS: Final = record.RESULTS / "many_devices"
PAGE: Final = machine.ROOT / "docs" / "scaling.md"
COUNTED: Final = ("<!-- counted:begin -->", "<!-- counted:end -->")
ON_PAPER: Final = ("<!-- on paper:begin -->", "<!-- on paper:end -->")
AXIS: Final = "tokens"
HEAD_DIM: Final = 64


class Call(NamedTuple):
    """A call of attention, for all devices together."""

    strategy: str
    devices: int
    tokens: int
    heads: int
    num_iters: int


CALLS: Final = (
    *(Call("mixed", devices, 131_072, 1, 10) for devices in (2, 4, 8)),
    *(Call("mixed", 8, tokens, 1, 10) for tokens in (32_768, 65_536)),
    Call("mixed", 8, 131_072, 1, 5),
    Call("mixed", 8, 65_536, 4, 10),
    Call("ulysses", 8, 65_536, 8, 10),
)
QUICK: Final = (Call("mixed", 2, 64, 1, 2), Call("ulysses", 2, 64, 2, 2))


class Device(NamedTuple):
    """Published peak rates of a device, of which a step reaches a part."""

    name: str
    devices: int
    products: float  # Multiply-adds in bfloat16 a second, dense.
    exponentials: float  # A second.
    bytes_sent: float  # A second, to one neighbour.
    source: str


# docs/scaling.md names the sources and what is assumed.
DEVICES: Final = (
    Device("H100 SXM", 8, 989e12 / 2, 132 * 16 * 1.83e9, 450e9, "NVLink 4"),
    Device("TPU v5e", 256, 197e12 / 2, 8 * 128 * 1.5e9, 50e9, "one ICI link"),
)
REACHED: Final = 0.5  # The part of a peak rate that is reached.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the count."""

    quick: bool = False  # Tiny sizes; files are written only if `output` is given.
    output: Path | None = None  # A folder; None: the committed one, and the docs' page.


def run(config: Config) -> list[dict[str, Any]]:
    """Compiles and counts, writes the rows and the page, and prints the table."""
    # Before anything computes: JAX simulates devices only from its start.
    jax.config.update("jax_num_cpu_devices", 8)
    facts = {"jax_version": jax.__version__, "commit": machine.commit()}
    rows = [counts(call) | facts for call in (QUICK if config.quick else CALLS)]
    print(counted(rows))
    folder = RESULTS if config.output is None and not config.quick else config.output
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(row) for row in rows)
        (folder / "rows.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    if folder == RESULTS:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    return rows


def counts(call: Call) -> dict[str, Any]:
    """A row: what one device does in the forward and backward pass of a call."""
    program = compile_step(call)
    count = compiled_text.count(program)
    messages = {name: count[name] for name in compiled_text.COLLECTIVES if count[name]}
    sent = {name: count[f"{name} bytes"] for name in messages}
    return {
        **call._asdict(),
        "head_dim": HEAD_DIM,
        "messages": messages,
        "message_bytes": sent,
        "temp_bytes": temp_bytes(program),
    }


def compile_step(call: Call) -> Any:
    """The compiled forward and backward pass, which is not run."""
    devices = jax.devices()[: call.devices]
    kinds = (AxisType.Auto,)
    mesh = jax.make_mesh((call.devices,), (AXIS,), axis_types=kinds, devices=devices)
    attend = functools.partial(
        sinkhorn_attention,
        num_iters=call.num_iters,
        implementation="streaming",
        sequence_axis=AXIS,
        sequence_strategy=call.strategy,
    )
    parts = PartitionSpec(None, AXIS)
    attend = jax.shard_map(attend, mesh=mesh, in_specs=parts, out_specs=parts)

    def step(query, key, value, dout):
        out, pull_back = jax.vjp(attend, query, key, value)
        return out, pull_back(dout)

    shape = 1, call.tokens, call.heads, HEAD_DIM
    array = jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, parts))
    return jax.jit(step).lower(*[array] * 4).compile()


def page(text: str, rows: list[dict[str, Any]]) -> str:
    """The page with the tables of these rows."""
    for marks, lines in ((COUNTED, counted(rows)), (ON_PAPER, on_paper())):
        text = with_section(text, f"\n\n{lines}\n\n", *marks, name=PAGE.name)
    return text


def counted(rows: list[dict[str, Any]]) -> str:
    """The table of what was counted."""
    lines = [
        {
            "strategy": row["strategy"],
            "devices": row["devices"],
            "tokens": f"{row['tokens']:,}",
            "heads": row["heads"],
            "iterations": row["num_iters"],
            "messages": ", ".join(f"{n} {name}" for name, n in row["messages"].items()),
            "MiB received": sum(row["message_bytes"].values()) / 2**20,
            "temporary MiB": row["temp_bytes"] / 2**20,
        }
        for row in rows
    ]
    return table.plain(lines, list(lines[0]))


def on_paper() -> str:
    """The table of the times of one step, by `seconds`."""
    lines = []
    for device in DEVICES:
        for tokens in (131_072, 1_048_576):
            call = Call("mixed", device.devices, tokens, 16, 10)
            times = seconds(device, call, head_dim=128)
            lines.append(
                {
                    "devices": f"{device.devices} {device.name}",
                    "tokens": f"{tokens:,}",
                    **{f"{name}, s": time for name, time in times.items()},
                }
            )
    return table.plain(lines, list(lines[0]))


def seconds(device: Device, call: Call, head_dim: int) -> dict[str, float]:
    """The time of a "mixed" step if each resource did its part alone.

    For each entry of a head's logits, with L iterations and a head dimension of H: an
    exponential in each of the 2 L + 4 passes, H multiply-adds for its logit in each, 4
    in each iteration for the sums, 2 L + 1 for the correction, and 5 H for the
    products with values and gradients.
    """
    iterations = call.num_iters
    passes = 2 * iterations + 4
    products = (passes + 5) * head_dim + 4 * iterations + 2 * iterations + 1
    entries = call.tokens**2 * call.heads / call.devices
    part = call.tokens // call.devices * head_dim * call.heads
    # The column sums are float32, and an all-reduce sends each number twice. Six arrays
    # go round: keys twice, values twice in bfloat16; their cotangents in float32.
    sums = (2 * iterations + 1) * call.tokens * call.heads * 4 * 2
    trips = (call.devices - 1) * part * (4 * 2 + 2 * 4)
    return {
        "products": entries * products / (device.products * REACHED),
        "exponentials": entries * passes / (device.exponentials * REACHED),
        "messages": (sums + trips) / (device.bytes_sent * REACHED),
    }
