"""The page of report: HTML that needs no other file, narrow or wide."""

import base64
import collections
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
.figure { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid #ddd; padding: .4rem .6rem .4rem 0;
  text-align: left; vertical-align: top; }
td:first-child { width: 35%; }
.verdict { width: 8rem; font-weight: 600; overflow-wrap: normal; }
.supported { color: #00674f; } .not-supported { color: #a63d00; }
.undecided { color: #555; }
summary { cursor: pointer; margin: .5rem 0; }
@media (max-width: 40rem) {
  thead { display: none; }
  .figure img { max-width: none; width: 56rem; }  /* Read by scrolling. */
  tr, td, td:first-child, .verdict { display: block; width: auto; }
  td { border: 0; padding: 0; } tr { border-bottom: 1px solid #ddd; padding: .6rem 0; }
}
"""

# Claims of an experiment; where there are more, the reader unfolds them.
MOST_OPEN: Final = 16


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
        f'<li><a href="#{section.name}">{html.escape(_title(section))}</a> '
        f"({_counts(section.result['findings'])})</li>"
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
        "undecided. Nothing is corrected for the number of claims: where there is no "
        "effect at all, one claim of twenty gets a verdict by chance.</p>"
        f"<ol>{contents}</ol>{body}</body></html>\n"
    )


def _title(section):
    question = section.about.strip().split("\n")[0]
    return f"{section.name}: {question}"


def _counts(findings):
    counts = collections.Counter(finding["verdict"] for finding in findings)
    return ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items()))


def _about(text):
    """Paragraphs and lists of a docstring, its lines joined; commands as they are."""
    parts = []
    for block in text.strip("\n").split("\n\n"):
        if block.startswith("    "):
            parts.append(f"<pre>{html.escape(block.strip())}</pre>")
            continue
        first, *rest = ("\n" + block).split("\n* ")
        if first.strip():
            parts.append(f"<p>{html.escape(' '.join(first.split()))}</p>")
        if rest:
            items = "".join(
                f"<li>{html.escape(' '.join(x.split()))}</li>" for x in rest
            )
            parts.append(f"<ul>{items}</ul>")
    return "".join(parts)


def _section(section):
    _, _, about = section.about.strip().partition("\n")
    figure = base64.b64encode(section.figure.read_bytes()).decode()
    result, environment = section.result, section.result["environment"]
    rows = "".join(
        f"<tr><td>{html.escape(finding['claim'])}</td>"
        f'<td class="verdict {finding["verdict"].replace(" ", "-")}">'
        f"{finding['verdict']}</td>"
        f"<td>{html.escape(finding['text'])}</td></tr>"
        for finding in result["findings"]
    )
    is_open = " open" if len(result["findings"]) <= MOST_OPEN else ""
    alt = html.escape(f"Figure of {section.name}; its numbers are in the JSON.")
    return (
        f'<h2 id="{section.name}">{html.escape(_title(section))}</h2>'
        f"{_about(about)}"
        f'<p class="figure"><img alt="{alt}" src="data:image/png;base64,{figure}"></p>'
        f"<details{is_open}><summary>Claims: {_counts(result['findings'])}</summary>"
        "<table><thead><tr><th>claim</th><th>verdict</th><th>measured</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></details>"
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
