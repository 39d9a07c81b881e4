"""The sources of the site: copies of all documents with their links turned into links of the site.

A link to a document or an image stays inside the site. A link to any other file leads to the repository,
whose address stands in pyproject.toml.
"""

import json
import os
import re
from importlib.metadata import metadata
from pathlib import Path, PurePosixPath

from common.files import ROOT, write_text

# Notebooks in the order of the course.
LESSONS = {
    "lesson_01_ddpm": ("ddpm",),
    "lesson_02_improved_ddpm": ("improved_ddpm",),
    "lesson_03_adm": ("adm",),
    "lesson_04_text_conditioning": ("text_conditioning",),
    "lesson_05_cfg": ("cfg", "fast_sampling"),
    "lesson_06_miniglide": ("miniglide", "upsampling", "editing", "clip_guidance", "flow_matching"),
}
TARGET = re.compile(r'(?<=\]\()(?P<markdown>[^)\s]+)(?=\))|(?<=src=")(?P<html>[^"]+)(?=")')
IMAGES = (".png", ".gif", ".webp", ".svg")
SET_UP = "# @title Set-up"  # how the set-up cell of every notebook begins
COLAB = "https://colab.research.google.com/github"


def repository_url() -> str:
    """Return the repository's address, from the package's metadata."""
    urls = dict(line.split(", ") for line in metadata("diffusion-lessons").get_all("Project-URL") or [])
    return urls["Repository"]


def site_url() -> str:
    """Return the address under which GitHub Pages serves the site of this repository."""
    owner, name = repository_url().split("/")[-2:]
    return f"https://{owner}.github.io/{name}/"


def documents() -> list[Path]:
    """Return the documents that become pages, relative to the repository's root."""
    patterns = ("README.md", "CONTRIBUTING.md", "lesson_*/*.md", "lesson_*/*.ipynb", "lesson_*/*/README.md")
    return sorted(p.relative_to(ROOT) for pattern in patterns for p in ROOT.glob(pattern))


class Links:
    """Rewrites the links of documents; remembers the images that they show."""

    def __init__(self) -> None:
        self.pages = set(documents())
        self.images: set[Path] = set()

    def rewrite(self, text: str, document: Path) -> str:
        """Return the Markdown text of a document with the links of the site."""
        return TARGET.sub(lambda match: self.target(match.group(), document), text)

    def target(self, link: str, document: Path) -> str:
        """Return where a link of a document leads on the site."""
        path, _, anchor = link.partition("#")
        if not path or "://" in link or link.startswith("mailto:"):
            return link
        file = Path(os.path.normpath(document.parent / path))
        anchor = f"#{anchor}" if anchor else ""
        if (ROOT / file).is_dir() and file / "README.md" in self.pages:
            file = file / "README.md"
        if file in self.pages:
            return relative(file, document) + anchor
        if file.suffix in IMAGES and (ROOT / file).exists():
            self.images.add(file)
            return relative(file, document)
        if not (ROOT / file).exists():
            raise FileNotFoundError(f"{document}: the link {link} leads nowhere")
        kind = "tree" if (ROOT / file).is_dir() else "blob"
        return f"{repository_url()}/{kind}/main/{file.as_posix()}{anchor}"


def relative(file: Path, document: Path) -> str:
    """Return the path of a file as a link in a document."""
    return PurePosixPath(os.path.relpath(file, document.parent)).as_posix()


def copy_document(document: Path, out: Path, links: Links) -> None:
    """Write a document's source with the links of the site; a lesson's README lists the lesson's pages."""
    text = (ROOT / document).read_text(encoding="utf-8")
    if document.suffix == ".ipynb":
        notebook = json.loads(text)
        for cell in notebook["cells"]:
            cell["source"] = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                cell["source"] = links.rewrite(cell["source"], document)
            elif cell["source"].startswith(SET_UP):
                cell["metadata"]["tags"] = ["hide-cell"]
        button = (
            f"[Open in Colab]({COLAB}/{repository_url().split('/', 3)[3]}/blob/main/{document.as_posix()})"
        )
        notebook["cells"][0]["source"] += f"\n\n{button}"
        text = json.dumps(notebook)
    else:
        text = links.rewrite(text, document)
        text += toctree(pages_of(document.parent)) if document.name == "README.md" else ""
    (out / document).parent.mkdir(parents=True, exist_ok=True)
    write_text(out / document, text)


def pages_of(lesson: Path) -> list[str]:
    """Return the pages of a lesson in reading order, without its README."""
    if lesson.name not in LESSONS:
        return []
    first, *notebooks = LESSONS[lesson.name]
    texts = [p.relative_to(lesson) for p in documents() if lesson in p.parents and p.suffix == ".md"]
    others = [p.with_suffix("").as_posix() for p in texts if p.as_posix() != "README.md"]
    return [f"The notebook <{first}>", *notebooks, *others]


def toctree(pages: list[str], caption: str = "", options: str = ":hidden:\n") -> str:
    """Return the list of pages that Sphinx puts into its navigation; "" for none."""
    caption = f":caption: {caption}\n" if caption else ""
    return "\n\n```{toctree}\n" + options + caption + "\n".join(pages) + "\n```\n" if pages else ""
