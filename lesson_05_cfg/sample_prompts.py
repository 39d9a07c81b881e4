"""What the sample.py of lessons 5 and 6 share: from flags and a pipeline to a file of samples."""

from pathlib import Path
from typing import Any

from common.cli import check_choice
from common.files import write_atomically
from common.plotting import sampling_frames, save_gif
from common.sampling import check_output_path, write_images
from lesson_04_text_conditioning.prompts import grid_layout, warn_truncated
from lesson_05_cfg.dpm_solver import SAMPLERS
from lesson_05_cfg.pipeline import TextToImagePipeline


def check_sampling_flags(config: Any) -> None:
    """Raise UserError for an unknown sampler or an --out that cannot be written, before a model is loaded."""
    check_choice("--sampler", config.sampler, SAMPLERS)
    check_output_path(config.out)


def sample_prompts(config: Any, pipe: TextToImagePipeline) -> None:
    """Draw every prompt of a PromptConfig with a guidance scale, and write config.out."""
    prompts = config.prompts(pipe.metadata.get("prompts", ["a red seven"]))
    warn_truncated(pipe.tokenizer, prompts)
    layout, path = grid_layout(prompts), Path(config.out)
    settings = {
        "guidance_scale": config.guidance_scale,
        "steps": config.steps,
        "sampler": config.sampler,
        "seed": config.seed,
    }
    if path.suffix == ".gif":
        labels = prompts if len(set(prompts)) == len(prompts) <= 8 else []  # one sample of each
        columns = len(labels) or layout.get("columns", 8)
        frames = sampling_frames(pipe.trajectory(prompts, **settings), columns)
        write_atomically(path, lambda part: save_gif(part, frames, column_labels=labels))
    else:
        write_images(path, pipe(prompts, **settings).tensor, prompts, **layout)
    print(f"{len(prompts)} samples, {config.steps} steps of {config.sampler}: {path}")
