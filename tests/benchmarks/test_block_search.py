"""The search for the GPU kernels' blocks: what is tried, refused and recorded."""

import json
import re

import jax
import pytest
from support.gpu_interpreter import interpreted

from benchmarks import gpu_block_search, programs
from benchmarks.harness import accuracy, cases, machine, timing
from benchmarks.harness.program import MODES
from sinkhorn_jax.attention._mosaic_gpu.heuristics import default_blocks

CASE = cases.Case(1, 64, head_dim=8, dtype="bfloat16", num_iters=2)


@pytest.mark.parametrize("case", cases.SWEEPS["gpu"], ids=str)
def test_the_default_is_the_first_candidate_and_none_is_tried_twice(case):
    problem = programs.problem(case)
    found = list(gpu_block_search.candidates(problem))
    assert found[0] == default_blocks(problem)
    assert len(set(found)) == len(found) > 1


@pytest.fixture
def device(monkeypatch):
    """A GPU that is not there: exact results, and times that the test sets."""
    return Device(monkeypatch)


class Device:
    def __init__(self, monkeypatch):
        self.ms, self.broken = {}, {}
        monkeypatch.setattr(gpu_block_search, "build", self.build)
        monkeypatch.setattr(timing, "time_in_turns", self.time_in_turns)

    def build(self, blocks, case, mode):
        change = next(
            (x for text, x in self.broken.items() if text in str(blocks)), None
        )
        result = accuracy.expected(case)
        return lambda *inputs: (result if change is None else change(result),)

    def time_in_turns(self, calls, repeats, budget_s, baseline, first_result):
        times = {
            name: [ms for text, ms in self.ms.items() if text in name] for name in calls
        }
        return timing.Times(times, {})


@pytest.mark.parametrize("mode", MODES)
def test_a_candidate_has_a_row_with_the_time_of_one_call(device, mode):
    device.ms = {"cluster=1": 30.0}
    rows = gpu_block_search.search(CASE, mode)
    assert [row["is_default"] for row in rows] == [True] + [False] * (len(rows) - 1)
    for row in rows:
        assert (row["calls"], row["median_ms"], row["refused"]) == (10, 3.0, None)
        assert row["ratio_to_default"] == 1
        assert row["max_abs_error"] == 0
    json.dumps(rows)


def refuse(result):
    raise ValueError("no room\nfor it")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda x: jax.tree.map(lambda y: 1.02 * y, x), "its error is 2.0e-02"),
        (lambda x: jax.tree.map(lambda y: y * float("nan"), x), "its error is nan"),
        (refuse, "ValueError: no room"),
    ],
)
def test_what_is_wrong_is_refused_with_the_reason(device, how, reason):
    device.ms = {"cluster=1": 3.0}
    device.broken = {"max_warpgroups=1": how}
    rows = gpu_block_search.search(CASE, "forward_backward")
    refused = [row for row in rows if row["refused"]]
    assert 0 < len(refused) < len(rows)
    for row in refused:
        assert row["blocks"]["max_warpgroups"] == 1
        assert row["refused"] == reason
        assert "median_ms" not in row


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="They compile there.")
def test_what_does_not_compile_is_refused():
    """On a CPU nothing compiles."""
    rows = gpu_block_search.search(CASE, "forward")
    assert all(row["refused"].startswith("ValueError: ") for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_search_in_the_interpreter(monkeypatch, mode):
    """The kernels run as they do on a GPU; their times mean nothing."""
    for name, few in {"CALLS": 2, "REPEATS": 1, "BUDGET_S": 0}.items():
        monkeypatch.setattr(gpu_block_search, name, few)
    with interpreted():
        rows = gpu_block_search.search(CASE, mode)
    for row in rows:
        assert row["refused"] is None
        assert row["median_ms"] > 0
        assert 0 < row["max_abs_error"] < 1e-2


def test_rows_of_each_case_and_mode_are_appended(device, monkeypatch, tmp_path):
    device.ms = {"cluster=1": 1.0}
    monkeypatch.setattr(cases, "select", lambda *_: [CASE])
    monkeypatch.setattr(machine, "require", lambda *_: None)
    output = tmp_path / "new" / "rows.jsonl"
    gpu_block_search.run(gpu_block_search.Config(output=output))
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["mode"] for line in lines if line["is_default"]] == list(MODES)
    for line in lines:
        assert line["device"]
        assert line["jax_version"] == jax.__version__


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="There is one.")
def test_without_a_gpu_it_is_refused(tmp_path):
    output = tmp_path / "rows.jsonl"
    with pytest.raises(RuntimeError, match="search for blocks needs a GPU, and JAX"):
        gpu_block_search.run(gpu_block_search.Config(cases=("128x128",), output=output))
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cases": ("1x1",)}, r"Unknown cases \['1x1'\]; expected some of \['128x128'"),
        ({"dtypes": ("float32",)}, r"Unknown dtypes .* \['bfloat16', 'float16'\]"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        gpu_block_search.Config(**options)


@pytest.fixture
def lowered(monkeypatch):
    """Names of the kernels of a candidate, lowered for CUDA."""
    monkeypatch.setattr(gpu_block_search, "CALLS", 1)

    def kernels(blocks, case):
        texts = []

        def lower(fn, *shapes):
            traced = jax.jit(fn).trace(*shapes)
            texts.append(traced.lower(lowering_platforms=("cuda",)).as_text())
            return None, 0.0

        monkeypatch.setattr(gpu_block_search, "compile_within_limits", lower)
        jax.clear_caches()
        gpu_block_search.build(blocks, case, "forward_backward")
        return set(re.findall("sinkhorn_attention_([a-z_]+)", texts[0]))

    return kernels


@pytest.mark.slow
def test_the_kernels_divide_a_head_as_the_blocks_say(lowered):
    case = cases.Case(128, 128, dtype="bfloat16")
    resident, streamed, *_ = gpu_block_search.candidates(programs.problem(case))
    assert "resident" in lowered(resident, case)
    assert "apply" in lowered(streamed, case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("tokens", [128, 192, 512, 1024])
def test_all_candidates_lower_for_cuda_or_lack_shared_memory(lowered, tokens, dtype):
    case = cases.Case(4, tokens, dtype=dtype)
    found = list(gpu_block_search.candidates(programs.problem(case)))
    assert lowered(found[0], case)
    for blocks in found[1:]:
        try:
            names = lowered(blocks, case)
        except ValueError as error:
            if "exceeds available shared memory" not in str(error):
                raise
            continue
        assert ("resident" in names) == (blocks.regime == "resident"), blocks
