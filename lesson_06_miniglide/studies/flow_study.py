"""Flow matching next to diffusion, on lesson 5's captioned digits. Run by experiments.py."""

from functools import partial

import torch
from torch import Tensor

from common.plotting import plot_curves
from common.protocols import Model, Sampler
from common.results.experiments import ExperimentConfig, save_figure, save_image_rows, with_default_steps
from lesson_02_improved_ddpm.ddim import ddim_sample
from lesson_02_improved_ddpm.model import make_diffusion
from lesson_04_text_conditioning.captioned_mnist import PROMPTS
from lesson_04_text_conditioning.studies.captioned_digits import (
    Study,
    measure_prompts,
    open_study,
    train_captioned,
)
from lesson_05_cfg.dpm_solver import dpmpp_2m_sample
from lesson_05_cfg.guidance import caption_loss, drop_captions
from lesson_05_cfg.pipeline import LESSON as LESSON_5
from lesson_05_cfg.pipeline import TextToImagePipeline
from lesson_05_cfg.timesteps import sample_noisy_timesteps
from lesson_06_miniglide.flow.rectified_flow import (
    FlowAsDiffusion,
    FlowPipeline,
    build_model,
    euler_sample,
    loss_flow,
)
from lesson_06_miniglide.networks.noisy_clip import LR_SCALES
from lesson_06_miniglide.networks.presets import LESSON

SCALE = 3  # guidance scale of all samples
EVALUATIONS = (5, 10, 20)
COLUMN_TITLES = {"training": "trained as", "steps": "sampling steps"}


def train_flow(study: Study) -> FlowPipeline:
    """Train lesson 5's network as a flow: the same data, captions, optimizer, steps and density of t."""
    torch.manual_seed(study.config.seed)
    network, flow, metadata = build_model(study.tokenizer)
    drop_fn = partial(drop_captions, probability=0.1)
    loss = caption_loss(loss_flow, flow, drop_fn, sample_t=sample_noisy_timesteps)
    network = train_captioned(study, "flow", network, loss, lr_scales=dict(LR_SCALES), metadata=metadata)
    return FlowPipeline(Model(network, flow, metadata), study.tokenizer)


def draw(pipe: TextToImagePipeline, sampler: Sampler, seed: int, steps: int, prompts: list[str]) -> Tensor:
    """Return guided samples of these prompts, [N, 3, 32, 32]."""
    return pipe(prompts, SCALE, steps, sampler, seed=seed, progress_bar=False).tensor


def flow_matching(config: ExperimentConfig) -> None:
    """Compare a network that was trained as a flow with lesson 5's, by sampler and by steps."""
    study = open_study(LESSON, with_default_steps(config, 2000), weights_of=LESSON_5)
    flow, diffusion = train_flow(study), TextToImagePipeline.from_pretrained(device=config.device)
    process = make_diffusion()
    as_diffusion = FlowAsDiffusion(flow.network, process.alpha_bar).to(flow.device)
    converted = TextToImagePipeline(Model(as_diffusion, process, {}), study.tokenizer)
    cases: dict[str, tuple[TextToImagePipeline, Sampler]] = {
        "diffusion, DDIM": (diffusion, ddim_sample),
        "diffusion, DPM-Solver++": (diffusion, dpmpp_2m_sample),
        "flow, Euler": (flow, euler_sample),
        "flow, DPM-Solver++": (converted, dpmpp_2m_sample),
    }
    curves: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    shown = {}
    for name, (pipe, sampler) in cases.items():
        training, _, sampler_name = name.partition(", ")
        sample = partial(draw, pipe, sampler, config.seed)
        for steps in EVALUATIONS:
            measure = partial(measure_prompts, partial(sample, steps), config.num_samples, study.reference)
            row = study.table.row(measure, training=training, sampler=sampler_name, steps=steps)
            curves[name].append((steps, row["fid"]))
        shown[f"{name}, 10"] = sample(10, PROMPTS)
    save_figure(study.table, plot_curves(curves, "network evaluations (with and without caption)", "FID"))
    save_image_rows(study.table, shown, "_samples", scale=2.2, column_labels=PROMPTS)
