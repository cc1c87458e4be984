"""The page of report: HTML that needs no other file, narrow or wide."""

import base64
import html
import pathlib
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; margin: 0 auto;
  max-width: 64rem; padding: 1rem; overflow-wrap: anywhere; }
h2 { margin-top: 3rem; border-top: 1px solid #ccc; padding-top: 1.5rem; }
img { max-width: 100%; height: auto; }
pre, code { white-space: pre-wrap; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid #ddd; padding: .4rem .6rem .4rem 0;
  text-align: left; vertical-align: top; }
td:first-child { width: 35%; }
td:nth-child(2) { width: 8rem; font-weight: 600; overflow-wrap: normal; }
.supported { color: #00674f; } .not-supported { color: #a63d00; }
.undecided { color: #555; }
summary { cursor: pointer; margin: .5rem 0; }
@media (max-width: 40rem) {
  thead { display: none; }
  tr, td, td:first-child, td:nth-child(2) { display: block; width: auto; }
  td { border: 0; padding: 0; } tr { border-bottom: 1px solid #ddd; padding: .6rem 0; }
}
"""


class Section(NamedTuple):
    """One run of an experiment."""

    name: str
    about: str  # The docstring of its module.
    result: dict[str, Any]  # Its JSON, with `findings`, `config` and `environment`.
    figure: pathlib.Path  # PNG.


def render(sections: Sequence[Section]) -> str:
    """The page.

    Raises:
        FileNotFoundError: A figure is not there.
        KeyError: A result lacks its findings, configuration or environment.
    """
    contents = "".join(
        f'<li><a href="#{section.name}">{html.escape(_title(section))}</a></li>'
        for section in sections
    )
    body = "".join(map(_section, sections))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Doubly stochastic attention: findings</title><style>{STYLE}</style>"
        "</head><body><h1>Doubly stochastic attention: findings</h1>"
        "<p>Intervals are of 95 %, over seeds. A claim is supported, or not, where the "
        "whole interval says so, and at the scale of the experiment alone; else it is "
        f"undecided.</p><ol>{contents}</ol>{body}</body></html>\n"
    )


def _title(section):
    question = section.about.strip().split("\n")[0]
    return f"{section.name}: {question}"


def _section(section):
    _, _, about = section.about.strip().partition("\n")
    figure = base64.b64encode(section.figure.read_bytes()).decode()
    result, environment = section.result, section.result["environment"]
    rows = "".join(
        f"<tr><td>{html.escape(finding['claim'])}</td>"
        f'<td class="{finding["verdict"].replace(" ", "-")}">{finding["verdict"]}</td>'
        f"<td>{html.escape(finding['text'])}</td></tr>"
        for finding in result["findings"]
    )
    alt = html.escape(f"Figure of {section.name}; its numbers are in the JSON.")
    return (
        f'<h2 id="{section.name}">{html.escape(_title(section))}</h2>'
        "<table><thead><tr><th>claim</th><th>verdict</th><th>measured</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
        f'<p><img alt="{alt}" src="data:image/png;base64,{figure}"></p>'
        f"<details><summary>How it is done</summary><pre>{html.escape(about.strip())}"
        "</pre></details>"
        f"{_details('Configuration', result['config'])}"
        f"{_details('Definitions', result.get('definitions', {}))}"
        f"{_details('Versions, device and commit', environment)}"
    )


def _details(title, values):
    if not values:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in values.items()
    )
    return f"<details><summary>{title}</summary><table>{rows}</table></details>"
