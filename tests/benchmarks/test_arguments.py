"""The benchmark of further arguments: a smoke run and what it keeps."""

import json

from benchmarks import arguments


def test_a_quick_run_has_a_row_for_every_argument(tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    config = arguments.Config(quick=True, repeats=2, output=output)
    rows = arguments.run(config)
    kept = [json.loads(line) for line in output.read_text().splitlines()]
    assert kept == rows
    names = list(arguments.arguments(config, 8))
    for name in ("scaling", "streaming"):
        of_name = [row for row in rows if row["implementation"] == name]
        assert [row["argument"] for row in of_name] == names
        assert of_name[0]["ratio_to_plain"] == 1
        assert all(row["median_ms"] > 0 and row["repeats"] == 2 for row in of_name)
    assert "| streaming | 64 | window |" in capsys.readouterr().out
