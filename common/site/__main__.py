"""Build the course as a web site: every lesson as a page, from the stored notebooks. Nothing is executed.

    pip install -e ".[site]"
    python -m common.site                  # writes build/site; open build/site/index.html
    python -m http.server -d build/site    # for the explorer, which browsers only run from a server

Needs Sphinx and its extensions (the extra "site"). Warnings of Sphinx are errors.
"""

import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from common.cli import run_command
from common.errors import UserError
from common.files import ROOT, make_folder, write_text
from common.site.api import write_api
from common.site.home import home_page
from common.site.sources import Links, copy_document, documents

BUILDERS = ("sphinx", "myst_nb", "sphinx_book_theme", "sphinx_copybutton", "sphinx_design")


@dataclass(frozen=True)
class Config:
    """Build the course as a web site."""

    out: str = "build/site"  # folder for the pages; its content is replaced
    explorer: str | None = None  # folder of the built explorer; default: lesson_05_cfg's, if it is built


def main(config: Config) -> None:
    """Write the sources of all pages, and the pages. Raises UserError if Sphinx is missing or complains."""
    if missing := [name for name in BUILDERS if find_spec(name) is None]:
        raise UserError(f"{', '.join(missing)} missing: pip install -e '.[site]' in the repository's folder")
    out = Path(config.out)
    sources = out.parent / f"{out.name}_sources"
    for folder in (out, sources):
        shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder, "--out")
    write_sources(sources)

    from sphinx.cmd.build import build_main

    configuration = str(Path(__file__).parent)
    if build_main(["-W", "--keep-going", "-q", "-c", configuration, str(sources), str(out)]):
        raise UserError("Sphinx found errors; they are listed above")
    explorer = Path(config.explorer) if config.explorer else ROOT / "lesson_05_cfg" / "explorer" / "dist"
    if explorer.is_dir():
        shutil.copytree(explorer, out / "explorer", dirs_exist_ok=True)
    else:
        print(f"{explorer} does not exist: the site has no explorer", file=sys.stderr)
    print(f"open {out / 'index.html'}")


def write_sources(out: Path) -> None:
    """Write the sources of all pages and copy the images that they show."""
    links = Links()
    for document in documents():
        copy_document(document, out, links)
    write_text(out / "index.md", home_page(links))
    write_api(out)
    for image in sorted(links.images):
        (out / image).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / image, out / image)


if __name__ == "__main__":
    run_command(main, Config)
