"""A page in the browser that samples from a checkpoint of any lesson.

    python lesson_06_miniglide/demo.py        # needs: pip install gradio

You choose prompt, guidance scale, steps, sampler, thresholding and seed, and watch the samples form out of
noise. You can also upload an image and paint over the part that you want to replace.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from common.cli import Bounds, run_command
from common.errors import UserError
from lesson_05_cfg.dpm_solver import SAMPLERS
from lesson_06_miniglide.demo_model import MAX_PROMPT, MAX_SAMPLES, MAX_SCALE, DemoModel, Frame, sample_frames

Port = Annotated[int, Bounds(1, 65535, "lie between 1 and 65535")]


@dataclass(frozen=True)
class Config:
    """Open a page in the browser that samples from a checkpoint of any lesson."""

    # a .safetensors file or a run's folder; default: lesson 5's pretrained weights
    checkpoint: str | None = None
    host: str = "127.0.0.1"  # address to listen on: this machine; 0.0.0.0 is the whole network
    port: Port = 7860  # of the page
    device: str = "auto"  # auto, cpu, cuda or mps


def build_page(model: DemoModel) -> Any:
    """Return the gradio page, ready to launch; at most eight requests wait in its queue. Raises UserError."""
    gr = import_gradio()

    def generate(*values: Any) -> Iterator[tuple[Frame, Frame]]:
        try:
            yield from sample_frames(model, *values)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    examples = model.metadata.get("prompts", ["a red seven"] if model.pipe else ["7"])
    with gr.Blocks(title="Text-to-image diffusion") as blocks:
        gr.Markdown(f"## {model.lesson}")
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox(examples[0], label="Prompt", max_length=MAX_PROMPT)
                scale = gr.Slider(
                    0, MAX_SCALE, 3, step=0.5, label="Guidance scale (1 is the plain conditional model)"
                )
                steps = gr.Slider(2, model.max_steps, 20, step=1, label="Steps")
                sampler = gr.Dropdown(list(SAMPLERS), value="dpm++", label="Sampler")
                thresholding = gr.Checkbox(False, label="Dynamic thresholding")
                seed = gr.Number(0, label="Seed", precision=0)
                n = gr.Slider(1, MAX_SAMPLES, 4, step=1, label="Number of samples")
                with gr.Accordion("Inpainting: replace a part of an image", open=False):
                    drawing = gr.ImageEditor(
                        type="numpy", label="Upload an image and paint over the part to replace"
                    )
                    gr.Markdown("A model that was not trained to inpaint uses RePaint with the ddpm sampler.")
                button = gr.Button("Generate", variant="primary")
            with gr.Column():
                noisy = gr.Image(label="x_t, and finally the samples", format="png")
                prediction = gr.Image(label="Predicted x_0", format="png")
        inputs = [prompt, scale, steps, sampler, thresholding, seed, n, drawing]
        button.click(generate, inputs, [noisy, prediction])
        gr.Examples([[example] for example in examples], [prompt])
    return blocks.queue(max_size=8, default_concurrency_limit=1)


def import_gradio() -> Any:
    """Return the module gradio. Raises UserError, with the reason, if it cannot be imported."""
    try:
        import gradio
    except Exception as error:  # a broken library, or a proxy that it cannot use, raises anything
        if isinstance(error, ModuleNotFoundError) and error.name == "gradio":
            raise UserError("the page needs a library: pip install gradio") from None
        message = f"gradio is installed, but importing it fails ({describe(error)}){proxy_advice()}"
        raise UserError(message) from None
    return gradio


def describe(error: Exception) -> str:
    """Return an exception as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def proxy_advice() -> str:
    """Return what to try where the environment names a proxy; "" elsewhere."""
    names = [f"{kind}_proxy" for kind in ("http", "https", "all")]
    proxies = [name for name in os.environ if name.lower() in names and os.environ[name]]
    if not proxies:
        return ""
    return f"; it may be the proxy (no_proxy={os.environ.get('no_proxy')}): try `unset {' '.join(proxies)}`"


def bypass_proxy(host: str) -> None:
    """Let this process reach `host` and its own machine without a proxy, as gradio does when it starts."""
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = ",".join(filter(None, [known, "127.0.0.1", "localhost", host]))


def main(config: Config) -> None:
    bypass_proxy(config.host)
    page = build_page(DemoModel(config.checkpoint, config.device))
    address = f"--host {config.host} --port {config.port}"
    try:
        page.launch(server_name=config.host, server_port=config.port, max_file_size="10mb", show_error=False)
    except OSError as error:
        raise UserError(f"{address} cannot be opened ({error}); choose others") from None
    except Exception as error:  # gradio has no class of its own for a page that cannot be reached
        raise UserError(f"the page does not start at {address} ({describe(error)}){proxy_advice()}") from None


if __name__ == "__main__":
    run_command(main, Config)
