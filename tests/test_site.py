"""The site: every document is a page, every link leads somewhere, and a browser shows all without errors."""

import ast
import functools
import http.server
import re
import shutil
import threading
from pathlib import Path

import pytest

from common.cli import run_command
from common.errors import UserError
from common.site import __main__ as site
from common.site.api import public, signature
from common.site.sources import LESSONS, Links, documents, repository_url, site_url
from tests.conftest import ROOT

CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


def test_links_stay_inside_the_site_or_lead_to_the_repository():
    links, notebook = Links(), Path("lesson_02_improved_ddpm/improved_ddpm.ipynb")
    rewritten = {
        "[x](../lesson_03_adm/adm.ipynb)": "[x](../lesson_03_adm/adm.ipynb)",
        "[x](RESULTS.md#seeds)": "[x](RESULTS.md#seeds)",
        "[x](../lesson_01_ddpm)": "[x](../lesson_01_ddpm/README.md)",
        "[x](ddim.py)": f"[x]({repository_url()}/blob/main/lesson_02_improved_ddpm/ddim.py)",
        "[x](../common)": f"[x]({repository_url()}/tree/main/common)",
        "[x](https://a.b/c.md)": "[x](https://a.b/c.md)",
        "[x](#section)": "[x](#section)",
    }
    for text, expected in rewritten.items():
        assert links.rewrite(text, notebook) == expected
    assert not links.images
    assert links.rewrite("![x](results/samples.png)", notebook) == "![x](results/samples.png)"
    assert links.images == {Path("lesson_02_improved_ddpm/results/samples.png")}
    with pytest.raises(FileNotFoundError, match="leads nowhere"):
        links.rewrite("[x](nothing.md)", notebook)


def test_every_notebook_is_listed_in_the_order_of_the_course():
    listed = [f"{lesson}/{name}.ipynb" for lesson, names in LESSONS.items() for name in names]
    assert sorted(listed) == sorted(p.as_posix() for p in documents() if p.suffix == ".ipynb")


def test_signatures_are_as_written():
    method = '    @property\n    def f(\n        self, a: int = 3\n    ) -> int:\n        """F."""\n'
    source = f'class A(B):\n    """A."""\n\n{method}'
    (node,) = public(ast.parse(source))
    assert signature(node, source) == "class A(B)"
    (method,) = public(node)
    assert signature(method, source) == "def f(\n    self, a: int = 3\n) -> int"


def test_without_sphinx_the_command_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(site, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        run_command(site.main, site.Config, argv=["--out", str(tmp_path / "site")])
    assert stop.value.code == 2 and "pip install -e '.[site]'" in capsys.readouterr().err
    assert not (tmp_path / "site").exists()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site") / "site"
    try:
        site.main(site.Config(out=str(folder)))  # warnings are errors
    except UserError as error:
        if "missing" in str(error):
            pytest.skip(str(error))
        raise
    return folder


def pages_of(folder):
    pages = [
        p for p in folder.rglob("*.html") if p.relative_to(folder).parts[0] not in ("_static", "explorer")
    ]
    return sorted(p for p in pages if p.name not in ("genindex.html", "search.html"))


@pytest.mark.slow
def test_all_documents_are_pages_and_no_link_is_dead(built):
    pages = pages_of(built)
    expected = {built / document.with_suffix(".html") for document in documents()}
    assert expected <= set(pages)
    anchors = {page: set(re.findall(r'id="([^"]+)"', page.read_text())) for page in pages}
    for page in pages:
        for link in re.findall(r'<a[^>]* href="([^"]+)"', page.read_text()):
            path, _, anchor = link.partition("#")
            if "://" in link or link.startswith("mailto:") or "explorer/" in link:
                continue
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page}: {link}"
            assert not anchor or target not in anchors or anchor in anchors[target], f"{page}: {link}"


@pytest.fixture(scope="module")
def address(built):
    """The address under which the site is served."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(built))
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("localhost", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser(built):
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.mark.slow
def test_every_page_opens_without_errors_and_with_all_images_and_formulas(built, address, browser):
    page, problems = browser.new_page(), []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith((address, "data:")) else problems.append(r.url))
    for path in pages_of(built):
        page.goto(f"{address}/{path.relative_to(built).as_posix()}", wait_until="load")
        page.wait_for_function("!document.querySelector('.math') || document.querySelector('mjx-container')")
        assert not problems, (path, problems)
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)"), path
        assert page.evaluate("document.querySelectorAll('mjx-merror, [data-mjx-error]').length") == 0, path
        formulas = page.evaluate("document.querySelectorAll('mjx-container').length")
        if path.stem in ("ddpm", "improved_ddpm", "adm", "text_conditioning", "cfg", "fast_sampling"):
            assert formulas > 20, path


@pytest.mark.slow
def test_the_search_finds_classifier_free_guidance(address, browser):
    page = browser.new_page()
    page.goto(f"{address}/search.html?q=classifier-free+guidance", wait_until="load")
    page.wait_for_selector("ul.search li a")
    found = page.eval_on_selector_all("ul.search li a", "links => links.map(link => link.href)")
    assert any("lesson_05_cfg/cfg.html" in link for link in found)


@pytest.mark.slow
def test_pages_fit_on_a_phone_and_solutions_are_folded(address, browser):
    page = browser.new_page(viewport={"width": 390, "height": 800})
    for path in ("index.html", "lesson_01_ddpm/ddpm.html"):
        page.goto(f"{address}/{path}", wait_until="load")
        width = page.evaluate("document.scrollingElement.scrollWidth")
        assert width <= 390, (path, width)
    folded = page.eval_on_selector_all(".bd-article details", "all => all.map(d => d.open)")
    assert len(folded) > 8 and not any(folded)


def test_addresses_in_documents_follow_from_the_package_metadata():
    assert repository_url() in (ROOT / "pyproject.toml").read_text()
    for document in documents():
        text = (ROOT / document).read_text(encoding="utf-8")
        for address in re.findall(r"https://[\w.-]*github[.]io/[^\s)\"]*", text):
            assert address.startswith(site_url()), (document, address)
