"""What every pretrained file computes, against reference outputs of the code that it was trained with.

tests/reference_samples.npz holds uint8 samples [4, C, H, W] and float32 features [4, D]. The inputs are drawn
again, from seeds. Everything is in fp32.
"""

import numpy as np
import pytest
import torch

from common.digits.classifier import load_digit_classifier
from common.images import to_tensor, to_uint8
from common.sampling import last_sample
from common.training.checkpoints import pretrained_path
from lesson_01_ddpm import model as lesson_1
from lesson_02_improved_ddpm import model as lesson_2
from lesson_02_improved_ddpm.ddim import SAMPLERS, ddim_sample
from lesson_03_adm import model as lesson_3
from lesson_04_text_conditioning import model as lesson_4
from lesson_05_cfg.guidance import prompt_denoiser
from lesson_05_cfg.pipeline import TextToImagePipeline
from lesson_06_miniglide.editing.inpaint_inputs import InpaintInputs
from lesson_06_miniglide.pipeline import MiniGlidePipeline, UpsamplerPipeline
from lesson_06_miniglide.scoring.dog_classifier import load_dog_classifier
from lesson_06_miniglide.shapes.render import render_captions
from lesson_06_miniglide.studies.clip_study import load_clip
from tests.conftest import ROOT

PROMPTS = ["a red seven", "the digit 2 in white", "a yellow eight", "a green 0"]
SHAPES = ["a large red circle", "three small green triangles", "two blue squares", "a small white circle"]


@pytest.fixture(scope="module")
def reference():
    with np.load(ROOT / "tests" / "reference_samples.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(autouse=True)
def in_fp32(monkeypatch):
    """Sample in fp32 on CPUs with fast bf16, too; pipelines would use bf16 there."""
    monkeypatch.setattr("common.device.has_fast_bf16", lambda device: False)


@pytest.fixture(scope="module")
def inputs():
    """The inputs of the networks that return features, drawn from one generator in this order."""
    generator = torch.Generator().manual_seed(0)
    return {
        "clip": torch.randn(4, 3, 32, 32, generator=generator),
        "clip_of_shapes": torch.randn(4, 3, 64, 64, generator=generator),
        "digit_classifier": torch.rand(4, 1, 32, 32, generator=generator) * 2 - 1,
        "dog_classifier": (torch.rand(4, 64, 64, 3, generator=generator) * 255).byte(),
    }


def draw(process, denoiser, shape, sampler, steps=10):
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(4, *shape, generator=generator)
    with torch.no_grad():
        return to_uint8(last_sample(sampler(process.respace_evenly(steps), denoiser, x_T, generator)))


def draw_lesson_1():
    network, process, _ = lesson_1.load()
    return draw(process, network, lesson_1.IMAGE_SHAPE, ddim_sample)


def draw_lesson_2():
    network, process, _ = lesson_2.load()
    return draw(process, network, lesson_2.IMAGE_SHAPE, SAMPLERS["ddpm"])


def draw_lesson_3():
    network, process, _ = lesson_3.load()
    denoiser = lesson_3.class_denoiser(network, torch.arange(4))(torch.arange(4))
    return draw(process, denoiser, lesson_3.IMAGE_SHAPE, ddim_sample)


def draw_lesson_4():
    network, process, metadata = lesson_4.load()
    denoiser = prompt_denoiser(network, lesson_4.tokenizer_from_metadata(metadata), PROMPTS, 1)
    return draw(process, denoiser, lesson_4.IMAGE_SHAPE, ddim_sample)


def draw_pipeline(pipe, prompts, sampler, steps):
    denoiser = prompt_denoiser(pipe.network, pipe.tokenizer, prompts, 3)
    return draw(pipe.process, denoiser, pipe.image_shape, sampler, steps)


def draw_lesson_5():
    pipe = TextToImagePipeline.from_pretrained(device="cpu")
    return draw_pipeline(pipe, PROMPTS, ddim_sample, 10)


def load_lesson_6(name=None):
    return MiniGlidePipeline.from_pretrained(str(pretrained_path("lesson_06_miniglide", name)), "cpu")


def draw_dogs():
    pipe = load_lesson_6("dogs")
    return draw_pipeline(pipe, list(pipe.metadata["prompts"][:4]), ddim_sample, 20)


def draw_shapes():
    return draw_pipeline(load_lesson_6(), SHAPES, ddim_sample, 10)


def draw_small_shapes():
    return draw_pipeline(load_lesson_6("small"), SHAPES, ddim_sample, 10)


def draw_upsampled():
    path = str(pretrained_path("lesson_06_miniglide", "upsampler"))
    pipe, images = UpsamplerPipeline.from_pretrained(path, "cpu"), to_tensor(render_captions(SHAPES, 0))
    return to_uint8(pipe.super_resolve(images, SHAPES, 50, steps=3, sampler="ddim"))


def draw_inpainted():
    pipe, keep_mask = load_lesson_6("inpainting"), torch.ones(4, 1, 64, 64)
    keep_mask[:, :, :32] = 0
    inputs = InpaintInputs(to_tensor(render_captions(SHAPES, 0)), keep_mask)
    sampler, unet_kwargs = inputs.make_sampler(pipe.network, ddim_sample, 4, 1)
    return to_uint8(pipe(SHAPES, 1, 3, sampler, progress_bar=False, **unet_kwargs).tensor)


DRAW = {
    "lesson_01_ddpm": draw_lesson_1,
    "lesson_02_improved_ddpm": draw_lesson_2,
    "lesson_03_adm": draw_lesson_3,
    "lesson_04_text_conditioning": draw_lesson_4,
    "lesson_05_cfg": draw_lesson_5,
    "dogs": draw_dogs,
    "lesson_06_miniglide": draw_shapes,
    "small": draw_small_shapes,
    "upsampler": draw_upsampled,
    "inpainting": draw_inpainted,
}


@pytest.mark.parametrize("name", DRAW)
def test_samples_are_those_of_the_reference(name, reference):
    samples, expected = DRAW[name](), reference[name]
    assert samples.shape == expected.shape and samples.dtype == expected.dtype == torch.uint8
    difference = (samples.int() - expected.int()).abs()  # in gray levels
    assert difference.max() <= 3 and difference.float().mean() < 0.1


def assert_features(features, expected):
    assert features.shape == expected.shape
    assert (features - expected).norm() <= 2e-3 * expected.norm()
    torch.testing.assert_close(features, expected, rtol=2e-3, atol=2e-3 * expected.abs().mean().item())


@torch.no_grad()
def test_clip_of_digits(reference, inputs):
    clip, tokenizer = load_clip("clip")
    images = clip.encode_image(inputs["clip"], torch.tensor([0, 200, 500, 900]))
    assert_features(images, reference["clip_images"])
    assert_features(clip.encode_text(*tokenizer.encode(PROMPTS)), reference["clip_captions"])


@torch.no_grad()
def test_clip_of_shapes(reference, inputs):
    clip, tokenizer = load_clip("clip_of_shapes")
    images = clip.encode_image(inputs["clip_of_shapes"], torch.tensor([0, 200, 500, 900]))
    assert_features(images, reference["clip_of_shapes_images"])
    captions = clip.encode_text(*tokenizer.encode(SHAPES))
    assert_features(captions, reference["clip_of_shapes_captions"])


def test_the_digit_classifier(reference, inputs):
    features, _ = load_digit_classifier().predict(inputs["digit_classifier"])
    assert_features(features, reference["digit_classifier"])


def test_the_dog_classifier(reference, inputs):
    features, _ = load_dog_classifier().predict(inputs["dog_classifier"].numpy())
    assert_features(features, reference["dog_classifier"])
