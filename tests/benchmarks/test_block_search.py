"""The search for the GPU kernels' blocks: what is tried, refused and found."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import pytest

# Not public: the switch of the GPU's interpreter.
from jax._src.pallas.mosaic_gpu.interpret import params as interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu
from support.interpreted_registers import interpret_registers

from benchmarks import gpu_block_search as search_blocks
from benchmarks import programs as _programs
from benchmarks.harness import cases as _cases
from benchmarks.harness import machine as _machine
from benchmarks.harness import timing as _turns
from benchmarks.harness.program import MODES
from sinkhorn_jax.attention._mosaic_gpu.blocks import Blocks, default_blocks

ONCE = search_blocks.Config(calls=1, repeats=1, budget_s=0)
CASE = _cases.Case(1, 64, head_dim=8, dtype="bfloat16", num_iters=2)


def of(tokens, **fields):
    return _programs.problem(_cases.Case(128, tokens, dtype="bfloat16", **fields))


def test_all_fields_of_blocks_are_searched():
    """A new one must be given its values."""
    assert set(search_blocks.CHOICES) == {x.name for x in dataclasses.fields(Blocks)}


@pytest.mark.parametrize("case", _cases.BY_PLATFORM["gpu"], ids=str)
def test_the_default_is_tried_and_nothing_twice(case):
    problem = _programs.problem(case)
    found = list(search_blocks.candidates(problem))
    assert default_blocks(problem) in found
    assert len(set(found)) == len(found) > 0
    assert all(search_blocks.fits(problem, blocks) for blocks in found)


def test_a_head_that_stays_needs_no_room_for_a_strip():
    """Some blocks of threads hold a head of few queries, and no strip of its keys."""
    narrow = dataclasses.replace(of(64), s=1000)
    assert default_blocks(narrow).cluster == 1
    assert default_blocks(narrow) in set(search_blocks.candidates(narrow))


def test_what_shared_memory_has_no_room_for_is_not_tried():
    tried = lambda *args, **fields: {
        (blocks.head_dtype, blocks.cluster)
        if blocks.period
        else ("no head", blocks.cluster if blocks.is_held else 0)
        for blocks in search_blocks.candidates(of(*args, **fields))
    }
    strips = {("no head", size) for size in (0, 1, 2)}
    short, wide = "bfloat16", "float32"
    assert tried(64) == {("no head", 0), ("no head", 1), (short, 1), (wide, 1)}
    assert tried(128) == {*strips, (short, 1), (short, 2), (wide, 1), (wide, 2)}
    strips.add(("no head", 4))
    assert tried(256) == {
        *strips,
        *((short, x) for x in (1, 2, 4)),
        (wide, 2),
        (wide, 4),
    }
    strips.add(("no head", 8))
    assert tried(512) == {*strips, (short, 4), (short, 8), (wide, 8)}
    assert tried(4096) == {("no head", size) for size in (0, 8)}
    assert tried(256, num_iters=0) == strips - {("no head", 8)}


def test_limits_that_leave_a_head_to_other_warpgroups_are_tried():
    def limits(tokens):
        return [
            blocks.max_warpgroups
            for blocks in search_blocks.candidates(of(tokens))
            if (blocks.period, blocks.head_dtype, blocks.cluster)
            == (default_blocks(of(tokens)).period, "bfloat16", 1)
        ]

    assert limits(64) == [4]
    assert limits(128) == [1, 4]
    assert limits(256) == [1, 2, 4]
    strips = [x.max_warpgroups for x in search_blocks.candidates(of(1024))]
    assert strips == [4] * len(strips)


def test_a_field_that_nobody_knows_is_an_error(monkeypatch):
    known = {k: v for k, v in search_blocks.CHOICES.items() if k != "is_held"}
    monkeypatch.setattr(search_blocks, "CHOICES", known)
    with pytest.raises(ValueError, match=r"fields \['is_held'\] that are not searched"):
        list(search_blocks.candidates(of(128)))


OF_STREAMING = search_blocks._expected


@functools.cache
def expected(case, mode):
    return OF_STREAMING(case, mode, _cases.inputs(case))


@pytest.fixture
def device(monkeypatch):
    """A GPU that is not there: attention by `streaming`, and times as they are set.

    `device.break_(text, how)` changes what blocks give whose description has the text.
    """
    return Device(monkeypatch)


class Device:
    def __init__(self, monkeypatch):
        self.ms, self.broken = {}, {}
        monkeypatch.setattr(search_blocks, "_build", self.build)
        monkeypatch.setattr(
            search_blocks, "_expected", lambda case, mode, inputs: expected(case, mode)
        )
        monkeypatch.setattr(_turns, "time_in_turns", self.time_in_turns)

    def build(self, problem, blocks, case, mode, calls):
        change = next(
            (how for text, how in self.broken.items() if text in str(blocks)), None
        )

        def call(*inputs):
            result = expected(case, mode)
            return (result if change is None else change(result),)

        return call

    def time_in_turns(self, calls, repeats, budget_s, reference, first_result):
        times = {
            name: [self.ms[text] for text in self.ms if text in name] for name in calls
        }
        return _turns.Times(times, {})


def test_a_time_is_that_of_one_call(device):
    device.ms = {"is_held": 30.0}
    row = search_blocks.search(CASE, "forward", search_blocks.Config(calls=10))
    assert (row["calls"], row["median_ms"]) == (10, 3.0)
    assert set(row["all_median_ms"].values()) == {3.0}


@pytest.mark.parametrize("mode", MODES)
def test_the_fastest_that_is_right_is_found(device, mode):
    device.ms = {"is_held=True": 3.0, "is_held=False": 2.0}
    row = search_blocks.search(CASE, mode, ONCE)
    assert row["blocks"]["is_held"] is False
    assert row["is_default"] is False
    assert row["median_ms"] == 2.0
    assert row["ratio_to_default"] == pytest.approx(2 / 3)
    assert sorted(row["all_median_ms"].values()) == [2, 3, 3, 3]
    assert row["refused"] == {}
    assert "64 bfloat16" in search_blocks.sentence(row)
    json.dumps(row)


def refuse(result):
    raise ValueError("no room\nfor it")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda x: jax.tree.map(lambda y: 1.02 * y, x), "2.0e-02 from 'streaming'"),
        (lambda x: jax.tree.map(lambda y: y * float("nan"), x), "nan from 'streaming'"),
        (refuse, "ValueError: no room"),
    ],
)
def test_what_is_wrong_is_refused_however_fast(device, capsys, how, reason):
    device.ms = {"is_held=True": 3.0, "is_held=False": 2.0}
    device.broken = {"is_held=False": how}
    row = search_blocks.search(CASE, "forward_backward", ONCE)
    assert row["blocks"]["is_held"] is True
    assert len(row["refused"]) == 1
    for name, text in row["refused"].items():
        assert "is_held=False" in name
        assert reason in text
    assert f"Refused {name}, {CASE} forward_backward: " in capsys.readouterr().out


def test_without_right_blocks_there_is_no_line(device):
    device.broken = {"is_held": refuse}
    with pytest.raises(RuntimeError, match=r"No blocks are right for 1x64 .*no room"):
        search_blocks.search(CASE, "forward", ONCE)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="They compile there.")
def test_what_does_not_compile_is_refused():
    """Here that is everything."""
    with pytest.raises(RuntimeError, match="No blocks are right") as error:
        search_blocks.search(CASE, "forward", ONCE)
    assert str(error.value).count("ValueError: ") == 4


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_search_in_the_interpreter(monkeypatch, mode):
    """Nothing stands in for anything but the device; its times mean nothing."""
    # The interpreter knows of no layouts.
    monkeypatch.setattr(plgpu, "layout_cast", lambda x, layout: x)
    interpret_registers(monkeypatch)
    jax.clear_caches()
    with interpreter.force_gpu_interpret_mode(interpreter.InterpretGPUParams()):
        config = dataclasses.replace(ONCE, calls=2)
        row = search_blocks.search(CASE, mode, config)
    assert row["refused"] == {}
    assert row["median_ms"] == min(row["all_median_ms"].values()) > 0
    assert len(row["all_median_ms"]) == 4
    assert 0 < row["max_rel_error"] < 1e-2
    jax.clear_caches()


def test_a_line_for_each_case_and_mode(device, monkeypatch, tmp_path):
    device.ms = {"is_held": 1.0}
    monkeypatch.setattr(_cases, "select", lambda *_: [CASE])
    monkeypatch.setattr(_machine, "require", lambda *_: None)
    output = tmp_path / "new" / "rows.jsonl"
    search_blocks.main(["--output", str(output)])
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["mode"] for line in lines] == list(MODES)
    for line in lines:
        assert line["device"]
        assert line["jax_version"] == jax.__version__
        assert re.fullmatch("unknown|[0-9a-f]{7,}(-dirty)?", line["commit"])
        assert Blocks(**line["blocks"]).tile == 64


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="There is one.")
def test_without_a_gpu_it_is_refused(tmp_path):
    output = tmp_path / "rows.jsonl"
    with pytest.raises(RuntimeError, match="search for blocks needs a GPU, and JAX"):
        search_blocks.main(["--cases", "128x128", "--output", str(output)])
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cases": ("1x1",)}, r"Unknown cases \['1x1'\]; expected some of \['128x128'"),
        ({"dtypes": ("float32",)}, r"Unknown dtypes .* \['bfloat16', 'float16'\]"),
        ({"calls": 0}, "calls must be at least 1, got 0"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        search_blocks.Config(**options)


def lowered(problem, blocks):
    """The program for CUDA of output and gradients."""
    shape = problem.batch, problem.t, problem.num_heads, problem.head_dim
    arrays = [jax.ShapeDtypeStruct(shape, problem.dtype)] * 3

    def step(*operands):
        out, pull_back = jax.vjp(
            lambda *x: search_blocks.attend(problem, blocks, *x), *operands
        )
        return out, pull_back(jnp.ones_like(out))

    jax.clear_caches()
    program = jax.jit(step).trace(*arrays).lower(lowering_platforms=("cuda",))
    return program.as_text()


def test_the_kernels_are_cut_as_the_blocks_say():
    problem = of(128)
    blocks = default_blocks(problem)
    assert blocks.period
    in_one, in_launches = (
        lowered(problem, dataclasses.replace(blocks, period=period))
        for period in (blocks.period, 0)
    )
    assert "sinkhorn_attention_resident" in in_one
    assert "sinkhorn_attention_apply" in in_launches


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("tokens", [128, 192, 512, 1024])
def test_all_blocks_lower_for_cuda(tokens, dtype):
    problem = _programs.problem(_cases.Case(4, tokens, dtype=dtype))
    for blocks in search_blocks.candidates(problem):
        names = re.findall("sinkhorn_attention_([a-z_]+)", lowered(problem, blocks))
        assert ("resident" in names) == (blocks.period > 0), blocks
        assert any("pull_back" in name for name in names), blocks
