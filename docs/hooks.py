"""What mkdocs does beside its plugins: pages from the root and from notebooks, and shapes that stay shapes."""

from __future__ import annotations

import re
from base64 import b64encode
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files of the root, where GitHub shows them, and the pages that they are on the site."""

TUTORIALS = Path(__file__).parent / "tutorials"
"""Notebooks, kept with their outputs."""

NOTEBOOK = re.compile(r"\]\(([\w/.-]+)\.ipynb\)")
SECTION = re.compile(r"(?<=[^\n])\n(?=(?:Args|Attributes|Examples|Raises|Returns|Warns):\n)")
NAMES = re.compile(r"^    (\w+(?:, \w+)+):(.*(?:\n     .*)*)", re.MULTILINE)
SESSION = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
SHAPE = re.compile(r"(?<![`\w\]])\[[^\[\]`\n]*\](?![\[(:])")
NAME = re.compile(r"`((?:lopt|lopt_kernels)(?:\.\w+)+)`")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the root, with links as they are from inside docs/."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text().replace("](docs/", "](")
        for source, target in PAGES.items():
            text = text.replace(f"]({source}", f"]({target}")
        files.append(File.generated(config, page, content=text))
    for path in sorted(TUTORIALS.glob("*.ipynb")):
        page = f"tutorials/{path.stem}.md"
        files.append(File.generated(config, page, content=write_notebook(path)))
    return files


def write_notebook(path: Path) -> str:
    """A notebook with its outputs as a page; pictures lie in it."""
    from nbconvert import MarkdownExporter

    text, resources = MarkdownExporter().from_filename(str(path))
    for name, data in resources["outputs"].items():
        text = text.replace(f"({name})", f"(data:image/png;base64,{b64encode(data).decode()})")
    source = f"*This page is a notebook, `docs/tutorials/{path.name}`.*"
    return text.replace("\n\n", f"\n\n{source}\n\n", 1)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Writes `::: package.*` out: a directive for every module of the folder that no page names itself."""
    pages = "\n".join(path.read_text() for path in Path(__file__).parent.glob("reference/*.md"))
    named = set(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE))

    def list_modules(match: re.Match[str]) -> str:
        folder = ROOT / ("kernels" if match[1].startswith("lopt_kernels") else "") / match[1].replace(".", "/")
        modules = [f"{match[1]}.{path.stem}" for path in sorted(folder.glob("[!_]*.py"))]
        return "\n\n".join(f"::: {module}" for module in modules if module not in named)

    markdown = NOTEBOOK.sub(r"](\1.md)", markdown)
    return link_names(re.sub(r"^::: ([\w.]+)\.\*$", list_modules, markdown, flags=re.MULTILINE))


def link_names(text: str) -> str:
    """Links names such as `lopt.rules.base` to the reference, where it has them."""
    return NAME.sub(r'<autoref optional identifier="\1"><code>\1</code></autoref>', text)


class Docstrings(griffe.Extension):
    """Reads docstrings as they are written here.

    Sections need no blank line before them, names may share a text, examples and shapes are code without a mark.
    """

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring:
            text = NAMES.sub(self._repeat, SECTION.sub("\n\n", obj.docstring.value))
            text = SESSION.sub(r"```pycon\n\g<0>\n```", text)
            # Markdown would look for links and emphasis in a shape, `[*batch, n]`, that is not marked as code.
            pieces = CODE.split(text)
            pieces[::2] = [SHAPE.sub(lambda shape: f"`{shape[0]}`", piece) for piece in pieces[::2]]
            obj.docstring.value = link_names("".join(pieces))

    def _repeat(self, match: re.Match[str]) -> str:
        """The text of `a, b: text` for each of them, so that every name is looked for in the signature."""
        return "\n".join(f"    {name}:{match[2]}" for name in match[1].split(", "))
