"""Whether the pages of the documentation quote the committed results."""

import json
import pathlib
import re

import numpy as np

from docs.draw import curves, diagrams, plans

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
CONVERGENCE = ROOT / "experiments" / "results" / "convergence" / "convergence.json"


def test_iterations_that_are_needed():
    page = (DOCS / "choosing.md").read_text()
    (rows,) = re.findall(r"<!-- defects:begin -->\n(.*?)<!--", page, re.DOTALL)
    result = json.loads(CONVERGENCE.read_text())
    cells = [x for x in result["cells"] if x["num_tokens"] == 256]
    assert result["config"]["tolerance"] == 1e-3
    expected = []
    for cell in cells:
        defect = dict(
            zip(result["iterations"], np.median(cell["defect"], axis=0), strict=True)
        )
        needed = np.median(cell["needed"])
        # Float64 has no smaller defect than this of columns near 1.
        shown = ["0" if x < 1e-16 else f"{x:.0e}" for x in (defect[10], defect[50])]
        expected.append([f"{cell['deviation']:g}", *shown, f"{np.ceil(needed):g}"])
    found = [re.split(r" *\| *", line.strip("| ")) for line in rows.splitlines()[2:]]
    assert found == expected


def test_spread_and_defect_of_trained_encoders():
    page = " ".join((DOCS / "choosing.md").read_text().split())
    networks = json.loads(CONVERGENCE.read_text())["networks"]
    trained = [x for x in networks if x["learning_rate"] is not None]
    before = [x for x in networks if x["learning_rate"] is None]
    spread = np.concatenate([x["deviation"] for x in trained])
    first = np.concatenate([x["deviation"] for x in before]).mean()
    worst = 100 * np.concatenate([x["worst_at_trained"] for x in trained])
    assert f"about {first:.1f} before training" in page
    assert f"between {spread.min():.1f} and {spread.max():.1f} after it" in page
    assert f"between {worst.min():.2f} % and {worst.max():.0f} %" in page
    slowest = max(np.max(x["needed"]) for x in trained)
    assert f"needs {slowest} iterations to 0.1 %" in page


def test_iterations_of_the_worst_seed():
    page = " ".join((DOCS / "choosing.md").read_text().split())
    cells = json.loads(CONVERGENCE.read_text())["cells"]
    worst = {x["num_tokens"]: max(x["needed"]) for x in cells if x["deviation"] == 10}
    assert f"needs {worst[256]} iterations to 0.1 % with 256 tokens" in page
    assert f"tokens and {worst[32]} with 32" in page


def cells_of(line):
    return [cell.strip() for cell in line.strip("| ").split("|")]


def test_times_of_the_home_page_are_those_of_the_committed_rows():
    folder = ROOT / "benchmarks" / "results" / "cpu-intel-xeon-processor-2cores"
    rows = [cells_of(x) for x in (folder / "README.md").read_text().splitlines()]
    rows = [row for row in rows if len(row) > 10 and row[1] == "float32"]
    ten = [row for row in rows if row[2] == "10"]
    default = {row[0]: row for row in ten if row[3].startswith("**")}
    torch = {row[0]: row for row in ten if row[3] == "`torch_softmax`"}
    expected = {
        shape: [row[5], row[7], torch[shape][5], torch[shape][7]]
        for shape, row in default.items()
    }
    page = (DOCS / "index.md").read_text().replace(" \N{MULTIPLICATION SIGN} ", "x")
    table = map(cells_of, re.findall(r"^\| \d.*$", page, re.MULTILINE))
    assert {shape: cells for shape, *cells in table} == expected

    forward, both, *others = np.array(list(expected.values()), float).T
    assert f"between {both.min():.2f} and {both.max():.2f} times" in page
    assert f"between {forward.min():.2f} and {forward.max():.2f} times" in page
    assert (others < np.minimum([forward, both], 1)).all()
    (fifty,) = (x for x in rows if x[2] == "50" and x[3].startswith("**"))
    assert f"takes {fifty[5]} and {fifty[7]} times as long at {fifty[0]}" in page

    arrays = lambda name: [float(row[10]) for row in ten if row[3] == name]
    low, high = (f(arrays("`softmax`")) for f in (min, max))
    assert f"allocates {low:.0f} to {high:.0f} arrays" in page
    low, high = (f(arrays("**`scaling`**")) for f in (min, max))
    assert f"`scaling` allocates {low:.0f} to {high:.0f}" in page
    streaming = {x for x, row in default.items() if row[3] == "**`streaming`**"}
    assert streaming == {"2x8192", "2x16384"}  # The last two rows of the table.


def test_scaling_is_the_fastest_of_this_package_in_every_row():
    """As docs/choosing.md says, with 1 iteration or more."""
    folder = ROOT / "benchmarks" / "results" / "cpu-intel-xeon-processor-2cores"
    times = {}
    for path in sorted(folder.glob("????-??-??.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            names = ("shape_btnh", "kv_len", "dtype", "num_iters", "mode")
            case = str([row[name] for name in names])
            if row["num_iters"]:
                times.setdefault(case, {})[row["implementation"]] = row["median_ms"]
    others = "streaming", "reference"
    slower = [x[o] > x["scaling"] for x in times.values() for o in others if o in x]
    assert slower
    assert all(slower)


def test_time_of_a_window():
    folder = ROOT / "benchmarks" / "results" / "cpu-amd-epyc-2cores" / "arguments"
    (path,) = folder.glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    (row,) = (
        row
        for row in rows
        if (row["implementation"], row["argument"]) == ("streaming", "window")
        and (row["mode"], row["tokens"]) == ("forward_backward", 32768)
    )
    page = (DOCS / "masks.md").read_text()
    assert row["window"] == 256
    assert f"forward and backward take {row['ratio_to_plain']:.3f} of the time" in page


def test_every_picture_is_drawn_and_shown():
    drawn = [*plans.PICTURES, *curves.PICTURES, *diagrams.PICTURES]
    found = {path.stem for path in (DOCS / "pictures").iterdir()}
    assert found == set(drawn)
    pages = "".join(path.read_text() for path in DOCS.glob("*.md"))
    assert all(f"(pictures/{name}.svg)" in pages for name in drawn)


def test_the_floor_in_a_picture_is_that_of_the_protocol():
    assert (
        f"{curves.FLOOR:.0e}".replace("e-07", "e-7")
        in (DOCS / "protocol.md").read_text()
    )
