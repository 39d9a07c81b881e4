"""Image i of a seed is the same whatever the number of samples and the batch size, with every sampler."""

from functools import partial

import pytest
import torch

from common.errors import UserError
from common.images import to_uint8
from common.protocols import NoiseStreams
from common.sampling import last_sample, sample_batches, sample_trajectory
from common.training.checkpoints import pretrained_path
from lesson_01_ddpm.diffusion import GaussianDiffusion, ddpm_sample, fixed_large, gaussian_noise, linear_betas
from lesson_01_ddpm.mistakes import sample_with_final_noise
from lesson_02_improved_ddpm.ddim import SAMPLERS, ddim_sample
from lesson_03_adm.classifier_guidance import condition_mean
from lesson_05_cfg.dpm_solver import dpmpp_2m_sample
from lesson_05_cfg.pipeline import TextToImagePipeline
from lesson_06_miniglide import demo_model, pipeline
from lesson_06_miniglide.demo_model import DemoModel, sample_frames
from lesson_06_miniglide.editing.samplers import image_to_image, repaint_sample
from lesson_06_miniglide.networks.presets import LESSON
from lesson_06_miniglide.networks.upsampler import noise_augment
from lesson_06_miniglide.pipeline import UpsamplerPipeline

PROCESS = GaussianDiffusion(linear_betas(1000)).respace_evenly(6)
SHAPE = (3, 5, 3)  # not a multiple of 16 numbers, in which PyTorch draws
IMAGE, KEEP = torch.linspace(-1, 1, 45).view(1, *SHAPE), (torch.arange(3) < 2).float().expand(1, 1, 5, 3)
DRAWING = {
    "ancestral": partial(ddpm_sample, log_variance_fn=fixed_large),
    "learned variance": SAMPLERS["ddpm"],
    "guided mean": partial(ddpm_sample, mean_fn=condition_mean(lambda x_t, t: -x_t)),
    "noise in the last step": sample_with_final_noise,
    "DDIM, eta 1": partial(ddim_sample, eta=1.0),
    "RePaint": partial(repaint_sample, image=IMAGE, keep_mask=KEEP, num_resamples=3),
    "SDEdit": partial(image_to_image, image=IMAGE, strength=0.7, sampler=ddpm_sample),
}


def toy_denoiser(x_t, t):
    """Treat every sample by itself, so that batches change no bit."""
    return x_t.tanh() * (1 + t.view(-1, 1, 1, 1) / 1000)


def draw(sampler, n, seed=0, batch_size=250, shape=SHAPE):
    bound = partial(sampler, PROCESS)
    return sample_batches(bound, lambda indices: toy_denoiser, shape, n, seed=seed, batch_size=batch_size)


@pytest.mark.parametrize("name", DRAWING)
def test_a_sample_does_not_depend_on_the_others(name):
    samples = draw(DRAWING[name], 7)
    for n, batch_size in ((7, 1), (7, 3), (4, 4), (3, 2), (1, 250)):
        assert torch.equal(draw(DRAWING[name], n, batch_size=batch_size), samples[:n]), (n, batch_size)
    other = draw(DRAWING[name], 7, seed=1)
    both = torch.cat([samples, other]).flatten(1)
    assert (torch.cdist(both, both) > 1e-3).sum() == 14 * 13  # all differ


def test_a_trajectory_is_that_of_the_samples():
    steps = sample_trajectory(partial(ddpm_sample, PROCESS), lambda indices: toy_denoiser, SHAPE, 5)
    assert torch.equal(steps[-1].x_prev, draw(ddpm_sample, 9, batch_size=2)[:5])


def test_deterministic_samplers_keep_the_noise_of_one_generator():
    x_T = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    for sampler in (ddim_sample, dpmpp_2m_sample):
        expected = last_sample(sampler(PROCESS, toy_denoiser, x_T))
        assert torch.equal(draw(sampler, 5, seed=3, batch_size=2, shape=(1, 4, 4)), expected)


def test_an_ordinary_generator_draws_for_the_batch_as_before():
    x, generator = torch.zeros(4, *SHAPE), torch.Generator().manual_seed(5)
    expected = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    assert torch.equal(gaussian_noise(x, generator), expected)
    torch.manual_seed(5)
    assert torch.equal(gaussian_noise(x, None), expected)


# -- streams -------------------------------------------------------------------------------------------------


def test_streams_are_independent_white_noise():
    """Moments of 1,000 streams of two seeds, within five standard errors of those of white noise."""
    streams = [NoiseStreams(seed, range(1000)) for seed in (0, 1)]
    first, later, other = (s.randn((1000, 64)).double() for s in (streams[0], *streams))
    assert abs(first.mean()) < 5 * 64_000**-0.5 and abs(first.var() - 1) < 5 * (2 / 64_000) ** 0.5
    assert abs(first.pow(4).mean() - 3) < 5 * (96 / 64_000) ** 0.5
    for a, b in ((first, later), (first, other), (first[:-1], first[1:]), (first[:, :32], first[:, 32:])):
        assert abs((a * b).mean()) < 5 * a.numel() ** -0.5
    between = first @ first.T / 8  # standard normal off the diagonal
    assert abs(between[~torch.eye(1000, dtype=torch.bool)]).max() < 8


def test_all_streams_of_a_seed_differ():
    """PyTorch keeps 32 bits of a seed: of 100,000 random ones, two would be equal with probability 0.7."""
    generators = NoiseStreams(0, range(100_000)).streams
    assert len({generator.initial_seed() % 2**32 for generator in generators}) == 100_000


def test_noise_for_another_number_of_samples_is_refused():
    with pytest.raises(ValueError, match="noise for 3 samples, but there are 2 streams"):
        NoiseStreams(0, range(2)).randn((3, 4))


def test_a_sampler_of_ones_own_may_take_it_for_a_generator():
    """PyTorch's functions draw from it, seeded, as from any generator."""

    def sampler(process, denoiser, x_T, generator=None):
        for step in ddim_sample(process, denoiser, x_T):
            yield step._replace(x_prev=step.x_prev + torch.randn(x_T.shape, generator=generator))

    first, again, other = draw(sampler, 4), draw(sampler, 4), draw(sampler, 4, seed=1)
    assert torch.equal(first, again) and not torch.equal(first, other)


# -- networks ------------------------------------------------------------------------------------------------


def test_a_pipeline_draws_the_same_first_images(monkeypatch):
    """Up to the last bits of the network, whose kernels depend on the size of the batch."""
    monkeypatch.setattr("common.device.has_fast_bf16", lambda device: False)
    pipe = TextToImagePipeline.from_pretrained(device="cpu")
    one, two, five = (
        pipe("a red seven", 1, 4, "ddpm", seed=2, num_images_per_prompt=n, progress_bar=False).tensor
        for n in (1, 2, 5)
    )
    for few in (one, two):
        torch.testing.assert_close(few, five[: len(few)], rtol=0, atol=1e-3)


def test_an_upsampler_sees_the_same_noise_in_its_first_images(monkeypatch):
    seen = []
    upsampler = UpsamplerPipeline.from_pretrained(str(pretrained_path(LESSON, "upsampler")), "cpu")
    recording = lambda *args: seen.append(noise_augment(*args)) or seen[-1]  # noqa: E731
    monkeypatch.setattr(pipeline, "noise_augment", recording)
    images = torch.linspace(-1, 1, 3 * 3 * 16 * 16).view(3, 3, 16, 16)
    prompts = ["a red circle", "a blue square", "two white circles"]
    three, one = (upsampler.super_resolve(images[:n], prompts[:n], 300, 1, "ddim", seed=4) for n in (3, 1))
    assert torch.equal(seen[1]["low_res"], seen[0]["low_res"][:1])
    assert (to_uint8(one).int() - to_uint8(three[:1]).int()).abs().max() <= 3


def test_the_demo_draws_the_same_first_image(monkeypatch):
    monkeypatch.setattr(demo_model, "to_frame", lambda images: images.clone())
    model = DemoModel(device="cpu")
    model.make_denoiser = lambda *args, **kwargs: toy_denoiser
    one, three = (list(sample_frames(model, "7", 3, 3, "ddpm", False, 0, n)) for n in (1, 3))
    assert len(one) == len(three) == 4
    for few, many in zip(one, three):
        assert torch.equal(few[0], many[0][:1]) and torch.equal(few[1], many[1][:1])


def test_samples_that_are_not_finite_are_an_error():
    def breaks_image_1(x_t, t):
        return torch.where(torch.arange(3).view(3, 1, 1, 1) == 1, torch.nan, x_t)

    sampler = partial(ddpm_sample, PROCESS, denoised_fn=None)
    with pytest.raises(UserError, match="1 of 3 samples are not finite; the checkpoint is broken"):
        sample_batches(sampler, lambda indices: breaks_image_1, SHAPE, 3)
    assert sample_batches(sampler, lambda indices: lambda x_t, t: x_t, SHAPE, 3).isfinite().all()
