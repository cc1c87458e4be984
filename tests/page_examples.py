"""Runs the examples of pages, and compares what they print, or writes it into them.

    python tests/page_examples.py docs/tour.md ...
    python tests/page_examples.py --write docs/tour.md ...

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
    if NUMBER.sub("#", printed).split() != NUMBER.sub("#", said).split():
        return False
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(said), strict=True)
    return all(
        abs(float(x) - float(y)) <= max(0.02 * abs(float(y)), 0.002) for x, y in pairs
    )


def main(pages, write):
    """Compares, or writes.

    Raises:
        AssertionError: A page does not show what an example prints, or shows another.
    """
    warnings.simplefilter("error")
    for page in map(pathlib.Path, pages):
        text = page.read_text(encoding="utf-8")
        for code, printed, said in outputs(page):
            if write and said is not None:
                block = "```python\n{}```\n\n```text\n{}```"
                text = text.replace(
                    block.format(code, said), block.format(code, printed)
                )
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
    arguments = sys.argv[1:]
    main([x for x in arguments if x != "--write"], write="--write" in arguments)
