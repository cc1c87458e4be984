"""The README's table, the page of a device and its figures, from made-up rows."""

import pytest
from matplotlib.image import imread
from support.benchmark_rows import SKIP, row

from benchmarks.harness import cases, record
from benchmarks.harness.program import MODES
from benchmarks.report import figures, page, readme, table


def of(case, **fields):
    """A row of the case."""
    return row(**case.fields, **fields)


def run_of(sweep, names=("softmax", "scaling", "pot"), **fields):
    """Rows of a sweep: `scaling` is the default, `pot` slow."""
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
        for case in cases.SWEEPS[sweep]
        for mode in MODES
        for name in names
    ]


def line_of(text, *words):
    """The cells of the only table line with the words."""
    found = [
        line
        for line in text.splitlines()
        if line.startswith("|") and all(word in line for word in words)
    ]
    assert len(found) == 1, found
    return [cell.strip() for cell in found[0].strip("|").split("|")]


def write(results, rows, skips=()):
    path = results / "cpu-some-cpu-2cores" / "2026-01-01.jsonl"
    record.append(path, rows)
    record.append(record.skips_path(path), skips)
    return path.parent


def test_the_section_has_a_line_for_each_case_shown():
    text = readme.section([*run_of("heads"), *run_of("tokens")])
    lines = [x for x in text.splitlines() if x.startswith("|")][2:]
    names = [line.split("|")[1].strip() for line in lines]
    assert names == ["96x197", "16x1024", "2x4096", "2x16384"]
    cells = ["2 / 2", "0.50 / 0.50", "- / -", "- / -", "8.00 / 8.00 (`pot`)"]
    assert line_of(text, "2x16384")[1:] == cells
    assert "**Some CPU, 2 cores**, jax 0.0, commit `abc1234`, 2026-01-01" in text
    assert "cpu-some-cpu-2cores/README.md" in text
    assert "png" not in text


def test_the_best_other_library_is_named():
    won = of(
        cases.Case(96, 197),
        mode="forward_backward",
        implementation="ott_implicit",
        version="ott-jax 1.0",
        median_ms=0.5,
        ratio_to_softmax=0.25,
    )
    text = readme.section([*run_of("heads"), won])
    assert line_of(text, "96x197")[-1] == "8.00 / 0.25 (`pot`, `ott_implicit`)"


def test_the_section_shows_the_newest_run_and_what_is_missing():
    rows = [x for x in run_of("heads") if x.mode == "forward_backward"]
    old = [of(x.case, median_ms=77.0, date="2025-01-01") for x in rows]
    text = readme.section([*old, *rows])
    assert "77" not in text
    assert line_of(text, "96x197")[1:3] == ["- / 2", "- / 0.50"]


def test_the_section_keeps_devices_apart():
    fields = {"device": "Some GPU", "platform": "gpu", "date": "2025-01-01"}
    text = readme.section([*run_of("tokens"), *run_of("gpu", **fields)])
    assert text.count("| heads x tokens |") == 1  # None of the GPU's cases is shown.
    assert text.index("**Some CPU, 2 cores**") < text.index("**Some GPU**")
    assert "some-gpu/README.md" in text
    assert text.count(readme.LEGEND) == 1


def test_the_page_has_all_numbers():
    rows = run_of("iterations", names=("softmax", "scaling", "reference"))
    for_gpu = run_of("gpu", device="Some CPU", names=("softmax",))
    skips = [SKIP, record.Skip(**{**vars_of(SKIP), "mode": "forward_backward"})]
    text = page.text([*rows, *for_gpu], skips)
    assert "## Iterations" in text
    assert "## GPU" in text
    cells = line_of(text, "4x1024", "| 50 |", "`scaling`")
    assert cells[:4] == ["4x1024", "float32", "50", "**`scaling`**"]
    assert cells[4:8] == ["1 ± 0.25", "0.50", "1 ± 0.25", "0.50"]
    assert cells[8:11] == ["0.167", "1.5", "2"]  # Forward + backward.
    reason = "* `pot`: POT is not installed. (4x64 float32 10 iterations forward; "
    assert f"{reason}4x64 float32 10 iterations forward + backward)" in text
    assert "![Time over that of softmax against iterations](iterations.png)" in text
    assert len({x.count("|") for x in text.splitlines() if x.startswith("|")}) == 1
    assert "## Other cases" in page.text([row()], [])


def vars_of(line):
    return {name: getattr(line, name) for name in line.__dataclass_fields__}


def test_memory_that_was_measured_is_marked():
    case = cases.SWEEPS["tokens"][0]
    rows = [
        of(case, mode="forward_backward", memory_source=source, implementation=source)
        for source in table.MARKS
    ]
    text = table.sweep(rows)
    assert line_of(text, "`compiled`")[9] == "1.5"
    assert line_of(text, "`resident`")[9] == "1.5\\*"


def test_figures_are_written(tmp_path):
    rows = [*run_of("tokens"), *run_of("iterations")]
    # One ends early, and one has no memory and is of an older commit.
    rows = [x for x in rows if (x.implementation, x.case.tokens) != ("pot", 2**14)]
    rows += [
        of(x.case, mode=x.mode, implementation="gone", peak_mib=None)
        for x in rows
        if x.implementation == "softmax"
    ]
    assert list(figures.names(rows)) == ["tokens.png", "iterations.png"]
    figures.draw(rows, tmp_path)
    for name in figures.names(rows):
        height, width, _ = imread(tmp_path / name).shape
        assert width > 1000
        assert height > 400


def test_readme_and_pages_are_written(tmp_path):
    config = readme.Config(readme=tmp_path / "README.md", results=tmp_path / "results")
    config.readme.write_text(
        f"before\n\n{readme.BEGIN}\nstale\n{readme.END}\n\nafter\n"
    )
    folder = write(config.results, run_of("tokens"), [SKIP])
    readme.run(config)
    text = config.readme.read_text()
    assert text.startswith(f"before\n\n{readme.BEGIN}\n**Some CPU")
    assert text.endswith(f"\n{readme.END}\n\nafter\n")
    assert "stale" not in text
    assert "2x16384" in (folder / "README.md").read_text()
    assert (folder / "tokens.png").exists()
    readme.run(config)
    assert config.readme.read_text() == text


def test_readme_needs_markers_and_rows(tmp_path):
    config = readme.Config(readme=tmp_path / "README.md", results=tmp_path)
    config.readme.write_text("no markers")
    with pytest.raises(ValueError, match="There are no rows below"):
        readme.run(config)
    write(tmp_path, [row()])
    for text in ("no markers", readme.BEGIN, f"{readme.END}\n{readme.BEGIN}"):
        config.readme.write_text(text)
        with pytest.raises(ValueError, match="README must have one line"):
            readme.run(config)
        assert config.readme.read_text() == text
