import dataclasses

import pytest
from matplotlib.image import imread
from support.benchmark_rows import SKIP, row

from benchmarks import programs as _programs
from benchmarks.harness import cases as _cases
from benchmarks.harness import program as _program
from benchmarks.harness import record as _record
from benchmarks.report import findings as _findings
from benchmarks.report import pages as _pages
from benchmarks.report import plots as _plots
from benchmarks.report import readme as _readme
from benchmarks.report import table as _table


def of(case, **fields):
    """A row of the case."""
    return row(
        shape_btnh=case.shape_btnh,
        dtype=case.dtype,
        num_iters=case.num_iters,
        **fields,
    )


def run_of(sweep, names=("softmax", "scaling", "pot"), **fields):
    """What one run gives of a sweep: `scaling` is the default, `pot` slow."""
    ratios = {"softmax": 1.0, "scaling": 0.5, "reference": 3.0, "pot": 8.0}
    return [
        of(
            case,
            mode=mode,
            implementation=name,
            median_ms=2.0 * ratios[name],
            ratio_to_softmax=ratios[name],
            is_default=name == "scaling",
            version="POT 1.0" if name == "pot" else "",
            **fields,
        )
        for case in _cases.SWEEPS[sweep]
        for mode in _program.MODES
        for name in names
    ]


def line_of(text, *words):
    found = [
        line
        for line in text.splitlines()
        if line.startswith("|") and all(word in line for word in words)
    ]
    assert len(found) == 1, found
    return [cell.strip() for cell in found[0].strip("|").split("|")]


def write(results, rows, skips=()):
    path = results / "cpu-some-cpu-2cores" / "2026-01-01.jsonl"
    _record.append(path, rows)
    _record.append(_record.skips_path(path), skips)
    return path.parent


def test_block_has_a_line_for_each_case_and_a_column_for_each_program():
    text = _readme.block([*run_of("heads"), *run_of("tokens")])
    header = line_of(text, "heads x tokens")
    assert header == ["heads x tokens", "`softmax`", "`scaling`", "`pot`"]
    lines = [x for x in text.splitlines() if x.startswith("|")][2:]
    names = [line.split("|")[1].strip() for line in lines]
    assert names == ["96x197", "32x512", "16x1024", "2x4096", "2x8192", "2x16384"]
    assert line_of(text, "2x8192")[1:] == ["2 / 2", "**0.50 / 0.50**", "8.00 / 8.00"]
    assert "**Some CPU, 2 cores**, jax 0.0, POT 1.0, commit `abc1234`, 2026" in text
    assert "cpu-some-cpu-2cores/README.md" in text
    assert "cpu-some-cpu-2cores/tokens.png" in text
    assert "iterations.png" not in text  # That sweep was not measured.


def test_block_shows_the_newest_run_and_what_is_missing():
    rows = [row_ for row_ in run_of("heads") if row_.mode == "forward"]
    old = [of(x.case, median_ms=77.0, date="2025-01-01") for x in rows]
    text = _readme.block([*old, *rows[:-1]])
    assert "77" not in text
    assert line_of(text, "96x197")[1:] == ["2 / -", "**0.50 / -**", "8.00 / -"]
    assert line_of(text, "2x4096")[1:] == ["2 / -", "**0.50 / -**", "-"]


def test_block_keeps_devices_apart():
    fields = {"device": "Some GPU", "platform": "gpu", "date": "2025-01-01"}
    text = _readme.block([*run_of("tokens"), *run_of("tokens", **fields)])
    assert text.count("| heads x tokens |") == 2
    assert text.index("**Some CPU, 2 cores**") < text.index("**Some GPU**")
    assert "some-gpu/README.md" in text
    assert "some-gpu/tokens.png" not in text  # On its page.
    assert text.count(_readme.LEGEND) == 1


def test_block_shows_one_dtype_of_the_sweep_for_a_gpu_and_its_page_both():
    rows = run_of("gpu", device="Some GPU", platform="gpu")
    text = _readme.block(rows)
    assert text.count("| heads x tokens |") == 1
    assert "**Some GPU**" in text
    assert ", bfloat16, 10 iterations (" in text
    assert "float16, 10" not in text.replace("bfloat16", "")
    names = [f"128x{2**i}" for i in range(7, 13)]
    lines = [x for x in text.splitlines() if x.startswith("| 128x")]
    assert [line.split("|")[1].strip() for line in lines] == names
    page = _pages.page(rows, [])
    assert "## GPU" in page
    assert line_of(page, "128x4096", "| float16 |", "`scaling`")
    assert line_of(page, "128x4096", "| bfloat16 |", "`scaling`")


def test_peers_that_win_are_named():
    rows = run_of("heads", names=("softmax", "scaling", "pot"))
    assert "No other library" in _findings.sentences(rows)
    won = of(
        _cases.SWEEPS["heads"][0],
        mode="forward_backward",
        implementation="pot",
        version="POT 1.0",
        median_ms=0.5,
    )
    text = _findings.sentences([*rows, won])
    assert "`pot` at 96x197 forward + backward, 0.5 against 1 ms" in text
    assert "No other library" not in text
    assert _findings.sentences(run_of("heads", names=("softmax", "scaling"))) == ""


@pytest.mark.parametrize(
    ("name", "whose"),
    [("torch_softmax", "PyTorch's fused"), ("cudnn_softmax", "cuDNN's")],
)
def test_a_faster_softmax_is_named(name, whose):
    peer = {"implementation": name, "version": "some 1.0"}
    case = _cases.SWEEPS["heads"][0]
    rows = [of(case), of(case, median_ms=0.5, **peer)]
    text = f"{whose} softmax attention is faster than JAX's in 1 of 1 entries, by up to"
    assert f"{text} 4.0 times" in _findings.sentences(rows)
    rows = [of(case), of(case, median_ms=5.0, **peer)]
    assert _findings.sentences(rows) == ""


def test_page_has_every_number_and_every_reason():
    rows = run_of("iterations", names=("softmax", "scaling", "reference"))
    rows.append(of(rows[0].case, implementation="pot", memory_source="resident"))
    skips = [SKIP, dataclasses.replace(SKIP, mode="forward_backward")]
    text = _pages.page(rows, skips)
    assert "## Iterations" in text
    assert "## Tokens" not in text
    cells = line_of(text, "| 20 |", "`scaling`")
    assert cells[:5] == ["4x1024", "float32", "20", "**`scaling`**", "1 ± 0.25"]
    assert cells[5:9] == ["0.50", "1 ± 0.25", "0.50", "6"]
    assert cells[-1] == "5 / 5"
    assert line_of(text, "`pot`")[9] == _table.MISSING  # Of forward + backward.
    reason = "* `pot`: POT is not installed. (4x64 float32 10 iterations forward; "
    assert f"{reason}4x64 float32 10 iterations forward + backward)" in text
    assert "![Time over that of softmax against iterations](iterations.png)" in text
    assert len({x.count("|") for x in text.splitlines() if x.startswith("|")}) == 1


def test_page_marks_memory_that_was_measured():
    case = _cases.SWEEPS["tokens"][0]
    rows = [
        of(case, mode="forward_backward", memory_source=source, implementation=source)
        for source in _pages.MARKS
    ]
    text = _pages.page(rows, [])
    assert line_of(text, "`compiled`")[9] == "1.5"
    assert line_of(text, "`resident`")[9] == "1.5\\*"
    assert line_of(text, "`allocator`")[9] == "1.5†"


def test_page_has_cases_of_no_sweep():
    assert "## Other cases" in _pages.page([row()], [])


def test_plots_are_written(tmp_path):
    rows = [*run_of("tokens"), *run_of("iterations")]
    # One ends early, one has no memory, and one is of an older commit.
    rows = [
        x
        for x in rows
        if (x.implementation, x.case.tokens) != ("pot", 2**14)
        and (x.implementation, x.num_iters) != ("pot", 0)
    ]
    rows += [
        of(x.case, mode=x.mode, implementation="gone", peak_mib=None)
        for x in rows
        if x.implementation == "softmax"
    ]
    assert list(_plots.names(rows)) == ["tokens.png", "iterations.png"]
    _plots.draw(rows, tmp_path)
    for name in _plots.names(rows):
        height, width, _ = imread(tmp_path / name).shape
        assert width > 1000
        assert height > 400


def test_names_of_curves_are_apart_and_in_order():
    ys = _plots._spread([0.1, 0.1, 0.11, 0.5, 0.98, 0.99, 1.0])
    assert (ys[1:] - ys[:-1] > 0.06).all()
    assert ys[0] >= 0
    assert ys[-1] <= 1.02
    # "b" ends early, below where "a" was then.
    curves = {"a": [(1, 1.0), (2, 10.0), (3, 100.0)], "b": [(1, 0.5), (2, 5.0)]}
    assert _plots._extended(curves, "b") < _plots._extended(curves, "a")


def test_programs_look_different():
    names = [_programs.SOFTMAX, *_programs.names()]
    styles = [_plots._style(name) for name in names]
    assert len({style["marker"] for style in styles}) == len(names)
    assert len({style["color"] for style in styles}) == len(names)


def test_readme_and_pages_are_written(tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(f"before\n\n{_readme.BEGIN}\nstale\n{_readme.END}\n\nafter\n")
    folder = write(results, run_of("tokens"), [SKIP])
    assert not _readme.is_current(readme, results)
    _readme.update(readme, results)
    assert _readme.is_current(readme, results)
    text = readme.read_text()
    assert text.startswith(f"before\n\n{_readme.BEGIN}\n**Some CPU")
    assert text.endswith(f"tokens.png)\n{_readme.END}\n\nafter\n")
    assert "stale" not in text
    _readme.update(readme, results)
    assert readme.read_text() == text
    page = folder / _pages.PAGE
    assert "2x16384" in page.read_text()
    page.write_text("other")
    assert not _readme.is_current(readme, results)
    _readme.update(readme, results)
    (folder / "tokens.png").unlink()
    assert not _readme.is_current(readme, results)


def test_readme_needs_markers_and_rows(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="There are no rows below"):
        _readme.update(readme, tmp_path)
    write(tmp_path, [row()])
    with pytest.raises(ValueError, match="got 0 and 0"):
        _readme.update(readme, tmp_path)
    assert readme.read_text() == "no markers"


def test_the_readme_says_what_the_rows_give():
    if not _record.read():
        pytest.skip("no rows are kept")
    if _readme.BEGIN not in _readme.README.read_text(encoding="utf-8"):
        pytest.skip("the README has no table")
    assert _readme.is_current(), "Run python -m benchmarks --readme."
