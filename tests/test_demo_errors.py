"""The demo with a gradio that is missing, broken or behind a proxy. gradio is a fake module of the test."""

import socket
import sys
import urllib.request

import pytest

from common.cli import run_command
from lesson_06_miniglide import demo
from lesson_06_miniglide.demo_model import DemoModel

SOCKS = "Using SOCKS proxy, but the 'socksio' package is not installed. Use `pip install httpx[socks]`."
PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No proxy, no gradio, and no checkpoint to load."""
    for name in (*PROXIES, "no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")  # so that what demo.py sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(demo, "DemoModel", lambda *args: object.__new__(DemoModel))
    monkeypatch.delitem(sys.modules, "gradio", raising=False)


@pytest.fixture
def error_line(capsys):
    """A function that runs the demo, which ends with exit code 2, and returns the one line of its error."""

    def run(*argv):
        with pytest.raises(SystemExit, match="2"):
            run_command(demo.main, demo.Config, argv=list(argv))
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    return run


@pytest.fixture
def gradio(monkeypatch, tmp_path):
    """A function that writes the module `gradio`."""
    monkeypatch.syspath_prepend(tmp_path)
    return (tmp_path / "gradio.py").write_text


@pytest.fixture
def launch(monkeypatch):
    """A function that sets what the page's `launch` does."""

    def set_launch(launch):
        page = type("Page", (), {"launch": lambda self, **kwargs: launch()})
        monkeypatch.setattr(demo, "build_page", lambda model: page())

    return set_launch


def fail(error):
    raise error


def test_a_missing_gradio(error_line, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install gradio" in error_line()


@pytest.mark.parametrize(
    "source, reason",
    [
        (f"raise ImportError({SOCKS!r})", SOCKS),
        ("import a_missing_library", "No module named 'a_missing_library'"),
        (
            "raise ValueError('Unknown scheme for proxy URL socks://x')\n",
            "Unknown scheme for proxy URL socks://x",
        ),
        ("raise TypeError('two\\nlines')", "TypeError: two"),
    ],
)
def test_a_gradio_that_cannot_be_imported_says_why(source, reason, error_line, gradio, monkeypatch):
    gradio(source)
    line = error_line()
    assert reason in line and "pip install gradio" not in line and "_proxy" not in line.replace(reason, "")
    sys.modules.pop("gradio", None)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    assert "unset ALL_PROXY" in error_line()


@pytest.mark.parametrize("host", ["127.0.0.1", "10.1.2.3"])
def test_the_page_reaches_itself_in_spite_of_a_proxy(host, launch, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://10.0.0.1:3128")
    monkeypatch.setenv("NO_PROXY", "intranet.example")
    seen = []
    launch(lambda: seen.extend(map(urllib.request.proxy_bypass_environment, names)))
    names = (host, "127.0.0.1:7860", "localhost", "intranet.example", "example.org")
    run_command(demo.main, demo.Config, argv=["--host", host])
    assert list(map(bool, seen)) == [True, True, True, True, False]


@pytest.mark.parametrize(
    "error", [ValueError("localhost is not accessible"), Exception("startup failed (502)")]
)
def test_a_page_that_does_not_start_says_why(error, error_line, launch, monkeypatch):
    launch(lambda: fail(error))
    assert str(error) in error_line()
    monkeypatch.setenv("https_proxy", "http://10.0.0.1:3128")
    line = error_line()
    assert str(error) in line and "unset https_proxy" in line and "(no_proxy=127.0.0.1,localhost" in line


def test_a_port_in_use(error_line, launch):
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        launch(lambda: second.bind(first.getsockname()))
        assert "--port 7860 cannot be opened" in error_line()
