"""Build the explorer, lesson 5's model as a page in the browser, and open it.

    python lesson_05_cfg/explorer/serve.py     # needs: npm (Node.js), pip install onnx onnxscript

The build is a folder of static files for any web server. It needs no network once it is made.
"""

import functools
import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any

from common.cli import Bounds, run_command
from common.errors import UserError
from common.files import ROOT, make_folder, read_json, read_text, write_text
from common.site.sources import repository_url
from common.training.checkpoints import weights_hash
from lesson_05_cfg.export_onnx import DIST, MODEL_FILES, export_model
from lesson_05_cfg.pipeline import TextToImagePipeline

SOURCE = Path(__file__).parent
PAGE = ("index.html", "style.css", "explorer.js", "network.js", "sampling.js", "tokenizer.js", "view.js")
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
# Loaded only if the visitor chooses WebGPU
RUNTIME_WEBGPU = ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.jsep.mjs", "ort-wasm-simd-threaded.jsep.wasm")
Link = Callable[[str, str], str]  # (notebook, heading) -> address
Port = Annotated[int, Bounds(0, 65535, "lie between 0 (any free port) and 65535")]


@dataclass(frozen=True)
class Config:
    """Build the explorer, lesson 5's model as a page in the browser, and open it."""

    checkpoint: str | None = None  # a .safetensors file or a run's folder; default: the pretrained weights
    out: str | None = None  # folder to build in; default: lesson_05_cfg/explorer/dist
    serve: bool = True  # --no-serve: only build
    port: Port = 8000  # of the page, on this machine only
    # address of the lessons' HTML pages, for the links; default: the notebooks in the repository
    lessons: str | None = None


def notebook_link(notebook: str, heading: str) -> str:
    """Return the address of a notebook's section in the repository."""
    return f"{repository_url()}/blob/main/{notebook}#{heading.replace(' ', '-')}"


def page_link(lessons: str, notebook: str, heading: str) -> str:
    """Return the address of the section in a site that Sphinx built. lessons: address of the site."""
    anchor = re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-")
    return f"{lessons.rstrip('/')}/{notebook.removesuffix('.ipynb')}.html#{anchor.lstrip('0123456789-')}"


def find_heading(notebook: str, title: str) -> str:
    """Return a section's heading with its number, which changes when a section is added. Raises UserError."""
    cells = read_json(ROOT / notebook)["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    found = re.search(rf"^#+ ((?:\d+\. )?{re.escape(title)})$", text, re.MULTILINE)
    if not found:
        raise UserError(f"the explorer links to a section that {notebook} does not have: {title}")
    return found[1]


def fill_in(text: str, values: dict[str, str], link: Link) -> str:
    """Replace {{name}} by values[name], and {{notebook.ipynb#title}} by a link to that section."""

    def replacement(match: re.Match[str]) -> str:
        notebook, _, title = match[1].partition("#")
        return link(notebook, find_heading(notebook, title)) if title else values[match[1]]

    return re.sub(r"\{\{(.+?)\}\}", replacement, text)


def install_runtime(folder: Path) -> None:
    """Copy onnxruntime-web, of the version in package-lock.json, from npm to `folder`. Raises UserError."""
    wanted = read_json(SOURCE / "package.json")["dependencies"]["onnxruntime-web"]
    installed = folder / "package.json"
    if installed.exists() and read_json(installed)["version"] == wanted:
        return
    npm = shutil.which("npm")
    if not npm:
        raise UserError("the page needs onnxruntime-web, and npm to install it: install Node.js (nodejs.org)")
    make_folder(folder, "--out")
    with tempfile.TemporaryDirectory() as place:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(SOURCE / name, place)
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"]
        result = subprocess.run(command, cwd=place, capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip() or result.stdout.strip()).splitlines()
            raise UserError(f"npm cannot install onnxruntime-web {wanted} ({reason[0] if reason else '?'})")
        package = Path(place, "node_modules", "onnxruntime-web")
        for name in (*RUNTIME, *RUNTIME_WEBGPU):
            shutil.copy(package / "dist" / name, folder)
        shutil.copy(package / "package.json", folder)  # last: it says that the others are complete


def is_exported(pipe: TextToImagePipeline, folder: Path) -> bool:
    """Return whether a folder holds the export of this model."""
    complete = all((folder / name).exists() for name in MODEL_FILES)
    return complete and read_json(folder / "model.json").get("weights") == weights_hash(pipe.network)


def build(out: Path, checkpoint: str | None = None, link: Link = notebook_link) -> None:
    """Write the page, its runtime and the model to a folder. Raises UserError.

    The model is exported only if the folder does not hold it already.
    """
    make_folder(out, "--out")
    install_runtime(out / "ort")
    pipe = TextToImagePipeline.from_pretrained(checkpoint, "cpu")
    if not is_exported(pipe, out / "model"):
        print("exporting the model (half a minute)", flush=True)
        export_model(pipe, out / "model")
    loaded = [*(f"ort/{name}" for name in RUNTIME), *(f"model/{name}" for name in MODEL_FILES)]
    values = {
        "repository": repository_url(),
        "bytes": str(sum((out / name).stat().st_size for name in loaded)),
    }
    for name in PAGE:
        write_text(out / name, fill_in(read_text(SOURCE / name), values, link))
    files = [*PAGE, *loaded]
    digest = hashlib.sha256(b"".join((out / name).read_bytes() for name in files)).hexdigest()
    values |= {"version": digest[:12], "files": json.dumps(["./", *files])}
    worker = fill_in(read_text(SOURCE / "service_worker.js"), values, link)
    write_text(out / "service_worker.js", worker)


class StaticFiles(SimpleHTTPRequestHandler):
    """Serves a folder, with the types that browsers insist on, whatever the machine's own table says."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def log_message(self, *args: Any) -> None:
        """Print nothing per request."""


def make_server(folder: Path, port: int) -> ThreadingHTTPServer:
    """Return a web server for a folder that only this machine reaches. Raises UserError."""
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), functools.partial(StaticFiles, directory=str(folder)))
    except OSError as error:
        raise UserError(f"--port {port} cannot be opened ({error.strerror}); choose another") from None


def main(config: Config) -> None:
    out = Path(config.out) if config.out else DIST
    build(
        out,
        config.checkpoint,
        functools.partial(page_link, config.lessons) if config.lessons else notebook_link,
    )
    if not config.serve:
        return print(f"the page is in {out}")
    with make_server(out, config.port) as server:
        print(f"open http://127.0.0.1:{server.server_port} (Ctrl-C ends it)")
        server.serve_forever()


if __name__ == "__main__":
    run_command(main, Config)
