"""A page to draw with, in the browser: python lesson_06_miniglide/demo.py        (needs: pip install gradio)

Takes any checkpoint of any lesson: prompt, guidance scale, steps, sampler, thresholding, seed; the samples as
they form out of the noise; and a picture to paint over, whose painted part is drawn anew.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image

from common.command import UserError, autocast, check_choice, pick_device, run_command
from common.data import to_uint8
from common.pictures import as_grid
from common.runs import shipped_weights
from common.sampling import load_network
from lesson_01_ddpm import train_mnist as lesson_1
from lesson_01_ddpm.diffusion import clip
from lesson_02_improved_ddpm import train_mnist as lesson_2
from lesson_03_adm import train_mnist as lesson_3
from lesson_03_adm.adm_unet import ClassUNet
from lesson_04_text_conditioning import captioned_mnist
from lesson_05_cfg.dpm_solver import SAMPLERS
from lesson_05_cfg.guidance import dynamic_threshold
from lesson_06_miniglide import presets
from lesson_06_miniglide.generate import guided_denoisers, reader_of
from lesson_06_miniglide.inpainting import Repainting, coarse, squished
from lesson_06_miniglide.upsampler import UpsamplingUNet

STEPS, SAMPLES, LETTERS, SIDE = 250, 16, 300, 4096  # at most, for one who asks
FRAMES = 25  # of the samples as they form
RESAMPLED = 5  # times, repainting with a network that was not trained to
REBUILD = {
    "lesson_01_ddpm": lesson_1.rebuild,
    "lesson_02_improved_ddpm": lesson_2.rebuild,
    "lesson_03_adm": lesson_3.rebuild,
    "lesson_04_text_conditioning": captioned_mnist.rebuild,
    "lesson_05_cfg": captioned_mnist.rebuild,
    "lesson_06_miniglide": presets.rebuild,
}


@dataclass(frozen=True)
class Config:
    """Open a page to draw with."""

    # of any lesson: a .safetensors file or a run's folder; default: lesson 5's, which is shipped
    checkpoint: str | None = None
    host: str = "127.0.0.1"  # who may come in: this machine; 0.0.0.0 is everyone on the network
    port: int = 7860
    device: str = "auto"  # auto, cpu, cuda, mps


class Model:
    """A checkpoint of any lesson, asked in one way. Raises UserError."""

    def __init__(self, checkpoint, device="auto"):
        def rebuild(facts):
            return REBUILD[facts["lesson"]](facts)

        loaded = load_network(checkpoint or shipped_weights("lesson_05_cfg"), None, rebuild, device)
        self.network, self.diffusion, self.facts = loaded
        if isinstance(self.network, UpsamplingUNet):
            raise UserError("--checkpoint enlarges pictures; the page needs a network that draws them")
        self.device = pick_device(device)
        self.reader = reader_of(self.facts) if "text" in self.facts else None
        self.image_shape = getattr(self.network, "image_shape", lesson_1.IMAGE_SHAPE)

    def denoiser(self, prompt, n, guidance_scale, **seen):
        """For n samples of a prompt; lesson 3's is a digit, lessons 1 and 2 take none."""
        asked, all_of_them = self.network, torch.arange(n)
        if self.reader:
            guided = guided_denoisers(self.network, self.reader, [prompt] * n, guidance_scale, **seen)
            asked = guided(all_of_them)
        elif isinstance(self.network, ClassUNet):
            if not (len(prompt) == 1 and prompt in "0123456789"):
                raise UserError("This network draws the digit it is told: write one, 0 to 9.")
            asked = lesson_3.denoiser_of_classes(self.network, torch.full((n,), int(prompt)))(all_of_them)

        def denoiser(x_t, t):
            with autocast(self.device):
                return asked(x_t, t)

        return denoiser


def draw(model, prompt, guidance_scale, steps, sampler, thresholding, seed, n, drawing=None):
    """Yields (x_t, the predicted x_0) as pictures, uint8 [H, W, 3], and at last the samples, twice.

    drawing: what gradio's ImageEditor gives. Raises UserError before the first picture, in words for whoever
    looks at the page.
    """
    try:
        guidance_scale, steps, n, seed = float(guidance_scale), int(steps), int(n), int(seed)
    except (TypeError, ValueError, OverflowError):
        raise UserError("A field is empty: guidance scale, steps, seed and samples are numbers.") from None
    prompt = (prompt or "").strip()
    check(model, prompt, guidance_scale, steps, sampler, seed, n)
    bound, seen = dynamic_threshold if thresholding else clip, {}
    sample = partial(SAMPLERS[sampler], bound=bound)
    if repainting := repainting_of(drawing, model.image_shape):
        sample, seen = repainting.drawn_by(model.network, sample, n, RESAMPLED, bound)
    generator = torch.Generator().manual_seed(seed)
    x_T = torch.randn(n, *model.image_shape, generator=generator).to(model.device)
    process, denoiser = model.diffusion.evenly(steps), model.denoiser(prompt, n, guidance_scale, **seen)
    for i, step in enumerate(sample(process, denoiser, x_T, generator)):
        if i % -(-steps // FRAMES) == 0:
            yield picture(step.x_t), picture(step.x_0)
    yield picture(step.x_prev), picture(step.x_prev)


def check(model, prompt, guidance_scale, steps, sampler, seed, n):
    """What a page lets through, and what only a program could send."""
    if len(prompt) > LETTERS:
        raise UserError(f"The prompt has {len(prompt)} letters; at most {LETTERS} are read.")
    if model.reader and not prompt:
        raise UserError("Write what to draw.")
    if not 0 <= guidance_scale <= 20:
        raise UserError("The guidance scale must lie between 0 and 20.")
    if not 2 <= steps <= min(STEPS, model.diffusion.num_timesteps):
        raise UserError(f"The steps must lie between 2 and {min(STEPS, model.diffusion.num_timesteps)}.")
    if not 1 <= n <= SAMPLES:
        raise UserError(f"The number of samples must lie between 1 and {SAMPLES}.")
    if not 0 <= seed < 2**31:
        raise UserError("The seed must lie between 0 and 2147483647.")
    check_choice("The sampler", sampler, SAMPLERS)


def repainting_of(drawing, image_shape):
    """A Repainting of what was painted over a picture; None if there is no picture, or no paint.

    drawing: {"background": uint8 [H, W, 3 or 4], "layers": [uint8 [H, W, 4]]}, alpha being the paint.
    """
    if not drawing or drawing.get("background") is None:
        return None
    channels, size, _ = image_shape
    if max(drawing["background"].shape[:2]) > SIDE:
        raise UserError(f"The picture is larger than {SIDE} pixels.")
    paint = np.zeros(drawing["background"].shape[:2], bool)
    for layer in drawing.get("layers") or []:
        paint |= layer[..., 3] > 0
    if not paint.any():
        return None
    known = torch.from_numpy(~coarse(paint, size)).float()[None, None]
    return Repainting(squished(Image.fromarray(drawing["background"]), size, channels), known)


def picture(images):
    """[N, C, H, W] in [-1, 1] -> a grid, uint8 [H, W, 3], large enough to look at."""
    columns = -(-len(images) // max(1, int(len(images) ** 0.5)))
    grid = as_grid(to_uint8(images.float().cpu()), columns, padding=1).permute(1, 2, 0).numpy()
    times = max(1, 512 // max(grid.shape))
    return grid.repeat(times, 0).repeat(times, 1)


def page(model):
    """The page, ready to launch; requests wait in a queue of at most eight."""
    import gradio as gr

    def generate(*values):
        try:
            yield from draw(model, *values)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    known = model.facts.get("prompts", ["a red seven"] if model.reader else ["7"])
    with gr.Blocks(title="Text-to-image diffusion") as blocks:
        gr.Markdown(f"## {model.facts['lesson']}")
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox(known[0], label="Prompt", max_length=LETTERS)
                scale = gr.Slider(0, 20, 3, step=0.5, label="Guidance scale (1: the plain model)")
                steps = gr.Slider(2, STEPS, 20, step=1, label="Steps")
                sampler = gr.Dropdown(
                    list(SAMPLERS), value="dpm++", label="Sampler (repainting untrained: always ddpm)"
                )
                thresholding = gr.Checkbox(False, label="Dynamic thresholding")
                seed = gr.Number(0, label="Seed", precision=0)
                n = gr.Slider(1, SAMPLES, 4, step=1, label="Samples")
                with gr.Accordion("Repaint a part of a picture", open=False):
                    drawing = gr.ImageEditor(type="numpy", label="Paint over what is to be drawn anew")
                button = gr.Button("Draw", variant="primary")
            with gr.Column():
                noisy = gr.Image(label="x_t, and at last the samples", format="png")
                guess = gr.Image(label="what the network takes it for: x_0", format="png")
        inputs = [prompt, scale, steps, sampler, thresholding, seed, n, drawing]
        button.click(generate, inputs, [noisy, guess])
        gr.Examples([[example] for example in known], [prompt])
    return blocks.queue(max_size=8, default_concurrency_limit=1)


def main(config):
    if not 0 < config.port < 65536:
        raise UserError(f"--port is {config.port}; it must lie between 1 and 65535")
    model = Model(config.checkpoint, config.device)
    try:
        blocks = page(model)
    except ImportError:
        raise UserError("the page needs a library: pip install gradio") from None
    try:
        settings = {"server_name": config.host, "server_port": config.port, "max_file_size": "10mb"}
        blocks.launch(**settings, quiet=False, show_error=False)
    except OSError as error:
        where = f"--host {config.host} --port {config.port}"
        raise UserError(f"{where} cannot be opened ({error}); name another") from None


if __name__ == "__main__":
    run_command(main, Config)
