"""The API reference: a page per package, from docstrings and type hints. The code is read, not imported."""

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path

from common.files import ROOT, write_text
from common.site.sources import LESSONS

PACKAGES = ("common", *LESSONS)
Definition = ast.FunctionDef | ast.ClassDef


def modules_of(package: str) -> list[Path]:
    """Return a package's modules, relative to the repository's root, without those that build this site."""
    paths = sorted(path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py"))
    return [path for path in paths if "site" not in path.parts and not path.stem.startswith("__")]


def public(node: ast.Module | ast.ClassDef) -> Iterator[Definition]:
    """Yield the public functions and classes that have a docstring, in the order of the file."""
    for child in node.body:
        if isinstance(child, Definition) and not child.name.startswith("_") and ast.get_docstring(child):
            yield child


def signature(node: Definition, source: str) -> str:
    """Return the head of a definition as it is written, without the colon."""
    lines = source.splitlines()[node.lineno - 1 : node.body[0].lineno - 1]
    return textwrap.dedent("\n".join(lines)).rstrip().removesuffix(":")


def describe(node: Definition | ast.Module) -> str:
    """Return a docstring as Markdown; its indented parts become blocks of code."""
    text = ast.get_docstring(node) or ""
    for character in "\\<*$|":
        text = text.replace(character, f"\\{character}")
    return text


def entry(node: Definition, source: str) -> str:
    """Return the text about a function or a class, with the public methods of the latter."""
    methods = list(public(node)) if isinstance(node, ast.ClassDef) else []
    parts = [f"### {node.name}"]
    parts += [f"```python\n{signature(n, source)}\n```\n\n{describe(n)}" for n in (node, *methods)]
    return "\n\n".join(parts)


def write_api(out: Path) -> None:
    """Write api/index.md and a page per package."""
    folder = out / "api"
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        parts = [f"# {package}"]
        for path in modules_of(package):
            source = (ROOT / path).read_text(encoding="utf-8")
            module = ast.parse(source)
            entries = [entry(node, source) for node in public(module)]
            if entries:
                name = path.with_suffix("").as_posix().replace("/", ".")
                parts += [f"## {name}", describe(module).split("\n\n")[0], *entries]
        write_text(folder / f"{package}.md", "\n\n".join(parts) + "\n")
    pages = "\n".join(PACKAGES)
    text = "# Reference\n\nEvery public class and function, from its docstring.\n\n"
    write_text(folder / "index.md", text + "```{toctree}\n:maxdepth: 2\n\n" + pages + "\n```\n")
