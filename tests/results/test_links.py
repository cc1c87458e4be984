"""Whether the links of the committed pages lead somewhere."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
MARKDOWN_LINK = re.compile(r"\]\(([^)\s]+)\)")
HTML_IMAGE = re.compile(r'src="([^"]+)"')
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
FOLDERS = r"(?:sinkhorn_jax|experiments|benchmarks|tests|docs)/[\w/.-]*"
MODULE = r"[\w/-]+/\w+\.py"
PATH = re.compile(rf"`({FOLDERS}|{MODULE})`|class=\"file\"[^>]*>({MODULE})<")


def anchors(page):
    """The fragments of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    names = {re.sub(r"[^\w -]", "", x).lower().replace(" ", "-") for x in headings}
    # In the reference, what is named so gets the anchor from its full name.
    return names | set(re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_exist(page):
    text = CODE.sub("", page.read_text())
    links = MARKDOWN_LINK.findall(text) + HTML_IMAGE.findall(text)
    for link in links:
        if link.startswith("http"):
            continue
        path, _, fragment = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if fragment:
            assert fragment in anchors(target), link


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "docs" / "architecture.svg"], ids=lambda page: page.name
)
def test_paths_of_the_repository_exist(page):
    for path in map("".join, PATH.findall(page.read_text())):
        # Paths inside the package may leave its name out.
        assert (ROOT / path).exists() or (ROOT / "sinkhorn_jax" / path).exists(), path
