"""Whether the documentation runs, and names everything that is public."""

import inspect
import pathlib
import re
import subprocess
import sys

import page_examples
import pytest

import sinkhorn_jax
from sinkhorn_jax import collapse, linen, nnx

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
WITH_EXAMPLES = [x for x in PAGES if page_examples.EXAMPLE.search(x.read_text())]
SITE = (ROOT / "mkdocs.yml").read_text()


# In one program each, because pages compile the same functions.
@pytest.mark.parametrize("pages", [WITH_EXAMPLES[::2], WITH_EXAMPLES[1::2]])
def test_examples_run_and_print_what_the_pages_say(pages):
    assert pages
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "page_examples.py", *pages],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr


def test_what_is_printed_is_compared_but_for_rounding():
    assert page_examples.agree("a 1.001 -2e-9\n", "a  1.0 0\n")
    assert not page_examples.agree("a 1.1", "a 1.0")
    assert not page_examples.agree("a 1.0", "b 1.0")
    assert not page_examples.agree("a 1.0 1.0", "a 1.0")


def test_every_page_is_in_the_navigation():
    for page in PAGES:
        name = page.relative_to(ROOT / "docs").as_posix()
        assert re.search(rf": {re.escape(name)}\n", SITE), name


@pytest.mark.parametrize(
    ("module", "page"),
    [
        (sinkhorn_jax, "functions"),
        (collapse, "collapse"),
        (linen, "flax"),
        (nnx, "flax"),
    ],
    ids=["functions", "collapse", "linen", "nnx"],
)
def test_every_public_name_is_in_the_reference(module, page):
    text = (ROOT / "docs" / "api" / f"{page}.md").read_text()
    if module in (linen, nnx):
        names = {"attention_fn", "MultiHeadSinkhornAttention"}
    else:
        public = {x: y for x, y in vars(module).items() if not x.startswith("_")}
        # Submodules have pages of their own, and an alias of a type has no docstring.
        names = {x for x, y in public.items() if inspect.isclass(y) or callable(y)}
        names -= {"Norm", "Normaliser"}
    shown = set(re.findall(rf"^::: {module.__name__}\.(\w+)$", text, re.MULTILINE))
    assert shown == names
