"""Steps of the site's build: pages outside docs/, links to them, and equations.

Pages in docs/ link to committed files beside that folder, as GitHub resolves links. The
site takes in every file that is linked so, under its path in the repository. A recipe
of examples/ is a page: its docstring, its picture and its code.
"""

import ast
import html
import os
import pathlib
import posixpath
import re

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[2]
LINK = re.compile(r'(\]\(|src=")([^)\s"#]+)')
TAG = re.compile(r"\\tag\{(\w+)\}")
EQUATION = re.compile(
    r'<(?P<box>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=box)>',
    re.DOTALL,
)
FIGURE = re.compile(r'(<img[^>]*src="([^"]+\.png)"[^>]*>)')
# The name of a function before a letter, which needs a space between them.
FUNCTION = re.compile(r"(<mi>(?:exp|log)</mi>)(?=<mi>|<msub>)")
# Pages of the repository that only the navigation names.
ALSO = ("CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")
# The page of each script with a picture.
RECIPES = {
    f"examples/{picture.stem}.py": f"examples/{picture.stem}.md"
    for picture in sorted((ROOT / "examples" / "figures").glob("*.png"))
}


def on_config(config):
    """Leaves out 404.html, whose links are from the root of a server."""
    config.theme.static_templates.discard("404.html")
    return config


def on_files(files, config):
    """Adds what pages link to outside docs/, and what is linked from there."""
    known = {path_of(file): file for file in files}
    waiting = [path for path in known if path.endswith(".md")]
    for script, page in RECIPES.items():
        text = recipe(ROOT / script)
        known[script] = File.generated(config, page, content=text)
        files.append(known[script])
    for path in ALSO:
        known[path] = added(files, config, path)
        waiting.append(path)
    while waiting:
        page = waiting.pop()
        for target in linked(page, (ROOT / page).read_text(encoding="utf-8")).values():
            # README.md is what the home page is on the site.
            if target in known or target == "README.md":
                continue
            if (ROOT / target).is_file():
                known[target] = added(files, config, target)
                waiting += [target] if target.endswith(".md") else []
    return files


def recipe(script):
    """The page of a script: its docstring, its picture and its code."""
    code = script.read_text(encoding="utf-8")
    title, _, about = ast.get_docstring(ast.parse(code)).partition("\n")
    code = code.split('"""', 2)[2].strip()
    about = re.sub(r"https://[^\s)]*[^\s),.]", r"<\g<0>>", about)
    picture = f"![What it draws](figures/{script.stem}.png)"
    return f"# {title.rstrip('.')}\n{about}\n\n{picture}\n\n```python\n{code}\n```\n"


def added(files, config, path):
    """The file of the repository, which becomes one of the site."""
    file = File.generated(config, path, abs_src_path=str(ROOT / path))
    files.append(file)
    return file


def path_of(file):
    """The path in the repository of a file of the site."""
    if file.abs_src_path is None:
        return file.src_uri
    return os.path.relpath(file.abs_src_path, ROOT)


def linked(page, text):
    """The paths that a page links to, by the text of the link."""
    links = {link for _, link in LINK.findall(text) if not link.startswith("http")}
    folder = posixpath.dirname(page)
    return {link: posixpath.normpath(posixpath.join(folder, link)) for link in links}


def on_page_markdown(markdown, page, config, files):
    """The page with links as they are on the site."""
    path = path_of(page.file)
    targets = linked(path, markdown)
    sources = {path_of(file): file.src_uri for file in files if file.abs_src_path}
    sources |= {"README.md": "index.md"} | RECIPES
    folder = posixpath.dirname(page.file.src_uri)

    def replaced(match):
        before, link = match.groups()
        source = sources.get(targets.get(link))
        return (
            match[0] if source is None else before + posixpath.relpath(source, folder)
        )

    markdown = re.sub(LINK, replaced, markdown)
    for link, target in targets.items():
        if (ROOT / target).is_dir():  # The site has no page for a folder.
            markdown = re.sub(rf"\[([^\]]+)\]\({re.escape(link)}\)", r"\1", markdown)
    return markdown


def on_page_content(content, page, config, files):
    """The page with MathML in the place of TeX, so that it needs no script.

    A figure of results is a link to itself, because it may be large.
    """
    content = FIGURE.sub(r'<a class="figure" href="\2">\1</a>', content)
    return EQUATION.sub(mathml, content)


def mathml(match):
    """An equation as MathML, with its number beside it."""
    tex = html.unescape(match["tex"]).replace(r"\mathrel{-}=", r"\;{-}{=}\;")
    is_block = match["box"] == "div"
    number = TAG.search(tex)
    made = FUNCTION.sub(
        r"\1<mspace width='0.17em'/>",
        convert(TAG.sub("", tex), display="block" if is_block else "inline"),
    )
    if not is_block:
        # A long one scrolls by itself, like a block; a baseline matters less there.
        is_long = len(tex) > 45
        return f'<span class="formula">{made}</span>' if is_long else made
    beside = f'<span class="number">({number[1]})</span>' if number else ""
    return f'<div class="equation">{made}{beside}</div>'
