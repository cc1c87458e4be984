"""Runs the examples of the documentation, and compares what they print.

    python tests/page_examples.py            # All pages; an error names the example.
    python tests/page_examples.py --write    # Writes what they print into the pages.

The Python blocks of a page are one program. A block of text right after one of them is
what it prints. Numbers may differ by 2 % or 0.002, whichever is more.
"""

import contextlib
import io
import pathlib
import re
import sys
import warnings

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from support.xla_flags import compile_quickly

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
EXAMPLE = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]?\d+)?")


def outputs(page):
    """Runs a page; yields for each example its code, what it prints, and what it says.

    The last is None where the page has no text after the example.
    """
    names = {"__name__": "page"}
    for match in EXAMPLE.finditer(page.read_text(encoding="utf-8")):
        code, said = match.groups()
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"{page.name}: {code.splitlines()[0]}", "exec"), names)
        # A line of spaces would be lost in an editor.
        lines = (line.rstrip() for line in printed.getvalue().splitlines())
        yield code, "".join(f"{line}\n" for line in lines), said


def agree(printed, said):
    """Whether two texts are the same, but for the rounding of their numbers."""
    if NUMBER.sub("", printed).split() != NUMBER.sub("", said).split():
        return False
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(said), strict=True)
    return all(
        abs(float(x) - float(y)) <= max(0.02 * abs(float(y)), 0.002) for x, y in pairs
    )


def main(write=False):
    """Compares, or writes."""
    warnings.simplefilter("error")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for code, printed, said in outputs(page):
            if write and said is not None:
                block = "```python\n{}```\n\n```text\n{}```"
                text = text.replace(block.format(code, said), block.format(code, printed))
            elif said is None and printed:
                raise AssertionError(f"{page.name} does not show:\n{code}{printed}")
            elif said is not None and not agree(printed, said):
                raise AssertionError(
                    f"{page.name}:\n{code}prints\n{printed}and the page says\n{said}"
                )
        if write:
            page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    compile_quickly()
    main(write="--write" in sys.argv)
