"""TextToImagePipeline: from prompts to images in one call, with the pretrained weights of lesson 5."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from common.cli import run_command
from common.errors import UserError
from common.images import to_pixels
from common.protocols import Model
from common.sampling import last_sample, respace_sampler, sample_batches
from common.training.checkpoints import pretrained_path
from lesson_02_improved_ddpm.ddim import ddim_sample
from lesson_02_improved_ddpm.model import make_diffusion
from lesson_04_text_conditioning.captioned_mnist import train_tokenizer
from lesson_04_text_conditioning.model import UNET_CONFIG, encode_prompts
from lesson_04_text_conditioning.text_transformer import TextConfig
from lesson_04_text_conditioning.text_unet import TextUNet
from lesson_05_cfg import sample as sample_script
from lesson_05_cfg.dpm_solver import SAMPLERS, dpmpp_2m_sample
from lesson_05_cfg.guidance import dynamic_threshold, prompt_denoiser
from lesson_05_cfg.pipeline import PipelineOutput, TextToImagePipeline

PROMPTS = ["a red seven", "the digit 2 in white"]
QUICK = {"steps": 3, "progress_bar": False}


@pytest.fixture(scope="module")
def pipe():
    return TextToImagePipeline.from_pretrained(device="cpu")


def one_line(error):
    message = str(error.value)
    return message and "\n" not in message


# -- samples -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler, steps, scale, seed", [("dpm++", 4, 3.0, 0), ("ddim", 3, 1.0, 5), ("ddpm", 3, 1.5, 7)]
)
def test_a_call_draws_what_the_script_writes(pipe, sampler, steps, scale, seed, tmp_path):
    flags = ["--sampler", sampler, "--steps", str(steps), "--guidance-scale", str(scale)]
    flags += ["--seed", str(seed), "--num-samples", "2", "--device", "cpu"]
    flags += [flag for prompt in PROMPTS for flag in ("--prompt", prompt)]
    out = tmp_path / "samples.npz"
    run_command(sample_script.main, sample_script.Config, argv=[*flags, "--out", str(out)])
    output = pipe(PROMPTS, scale, steps, sampler, seed=seed, num_images_per_prompt=2, progress_bar=False)
    with np.load(out) as file:
        assert file["prompts"].tolist() == output.prompts == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
        np.testing.assert_array_equal(file["images"], to_pixels(output.tensor))


def test_a_call_is_the_sampler_with_the_guided_denoiser(pipe):
    """The same samples from the parts of which the pipeline consists."""
    output = pipe(PROMPTS, 3, 4, "ddim", seed=2, progress_bar=False)
    denoiser = prompt_denoiser(pipe.network, pipe.tokenizer, PROMPTS, 3)
    bound_sampler = respace_sampler(ddim_sample, pipe.process, 4)
    parts = sample_batches(bound_sampler, lambda indices: denoiser, pipe.image_shape, 2, seed=2)
    assert torch.equal(output.tensor, parts)


def test_one_string_is_one_prompt(pipe):
    output = pipe("a red seven", **QUICK)
    assert isinstance(output, PipelineOutput) and output.prompts == ["a red seven"]
    assert output.tensor.shape == (1, 3, 32, 32) and output.tensor.device.type == "cpu"
    assert torch.equal(output.tensor, pipe(["a red seven"], **QUICK).tensor)


def test_each_prompt_has_several_images(pipe):
    output = pipe(PROMPTS, num_images_per_prompt=3, **QUICK)
    assert output.prompts == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    assert torch.equal(output.tensor, pipe(output.prompts, **QUICK).tensor)
    assert not torch.equal(output.tensor[0], output.tensor[1])  # each has noise of its own


def test_images_are_pil_images_of_the_samples(pipe):
    output = pipe(PROMPTS, **QUICK)
    assert len(output.images) == 2
    for image, sample in zip(output.images, output.tensor):
        assert isinstance(image, Image.Image) and image.size == (32, 32) and image.mode == "RGB"
        expected = ((sample.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(np.asarray(image), expected)


def test_the_seed_decides_the_samples(pipe):
    first, again, other = (pipe(PROMPTS, seed=seed, **QUICK).tensor for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(9)  # torch's global generator does not
    assert torch.equal(first, pipe(PROMPTS, seed=1, **QUICK).tensor)


def test_a_sampler_may_be_a_function(pipe):
    def thresholded(process, denoiser, x_T, generator=None):
        return dpmpp_2m_sample(process, denoiser, x_T, generator, denoised_fn=dynamic_threshold)

    named, by_function = (pipe(PROMPTS, sampler=s, **QUICK).tensor for s in ("dpm++", SAMPLERS["dpm++"]))
    assert torch.equal(named, by_function)
    assert not torch.equal(named, pipe(PROMPTS, sampler=thresholded, **QUICK).tensor)


def test_the_trajectory_ends_at_the_samples(pipe):
    steps = pipe.trajectory(PROMPTS, 3, 4, seed=1)
    assert len(steps) == 4 and [step.t for step in steps] == [3, 2, 1, 0]
    assert torch.equal(steps[-1].x_prev, pipe(PROMPTS, 3, 4, seed=1, progress_bar=False).tensor)


def test_samples_are_drawn_in_batches(pipe, monkeypatch):
    """The noise does not depend on the size of the batches."""
    all_at_once = pipe("a red seven", num_images_per_prompt=5, **QUICK).tensor
    in_batches = lambda *args, **kwargs: sample_batches(*args, batch_size=2, **kwargs)  # noqa: E731
    monkeypatch.setattr("lesson_05_cfg.pipeline.sample_batches", in_batches)
    torch.testing.assert_close(
        pipe("a red seven", num_images_per_prompt=5, **QUICK).tensor, all_at_once, rtol=0, atol=0.02
    )


def test_further_inputs_of_the_network_belong_to_their_samples():
    """An upsampler in batches of two: each sample sees its own low-resolution image."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer()
    config = replace(UNET_CONFIG, num_channels=16, channel_mult=(1, 1), attention_resolutions=(16,))
    config = replace(config, num_head_channels=16, out_channels=3)
    text_config = TextConfig(tokenizer.vocab_size, tokenizer.context_length)
    network = TextUNet(config, text_config, upsample=True).eval()
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    upsampler = TextToImagePipeline(Model(network, make_diffusion(), {}), tokenizer)
    prompts, low_res = [*PROMPTS, "a green 0"], torch.rand(3, 3, 8, 8) * 2 - 1
    x_t, t = torch.randn(2, 3, 32, 32), torch.tensor([300, 300])
    with torch.no_grad():
        both = upsampler.make_denoiser(prompts, 2.0, low_res=low_res)(torch.tensor([2, 0]))(x_t, t)
        for k, i in enumerate((2, 0)):
            alone = prompt_denoiser(network, tokenizer, [prompts[i]], 2.0, low_res=low_res[i : i + 1])
            torch.testing.assert_close(both[k : k + 1], alone(x_t[k : k + 1], t[:1]), rtol=1e-4, atol=1e-4)
            other = prompt_denoiser(network, tokenizer, [prompts[i]], 2.0, low_res=low_res[1:2])
            assert (alone(x_t[k : k + 1], t[:1]) - other(x_t[k : k + 1], t[:1])).abs().max() > 1e-2


# -- guidance ------------------------------------------------------------------------------------------------


def plain_samples(pipe, prompts):
    """Samples of the conditional network alone, without any code of lesson 5's guidance."""
    text = encode_prompts(pipe.network, pipe.tokenizer, prompts)
    x_T = torch.randn(len(prompts), *pipe.image_shape, generator=torch.Generator().manual_seed(0))
    denoiser = lambda x_t, t: pipe.network(x_t, t, text=text)  # noqa: E731
    with torch.no_grad():
        return last_sample(dpmpp_2m_sample(pipe.process.respace_evenly(3), denoiser, x_T))


def test_scale_1_is_the_plain_conditional_network(pipe, monkeypatch):
    monkeypatch.setattr("common.sampling.autocast", lambda device: torch.autocast("cpu", enabled=False))
    assert torch.equal(pipe(PROMPTS, 1, **QUICK).tensor, plain_samples(pipe, PROMPTS))


def test_scale_0_ignores_the_prompts(pipe, monkeypatch):
    monkeypatch.setattr("common.sampling.autocast", lambda device: torch.autocast("cpu", enabled=False))
    one, other = (pipe(prompts, 0, **QUICK).tensor for prompts in (PROMPTS, ["a green 0", "a blue three"]))
    assert torch.equal(one, other) and torch.equal(one, plain_samples(pipe, ["", ""]))
    assert not torch.equal(pipe(PROMPTS, 1, **QUICK).tensor, one)


def test_guidance_may_be_confined_to_an_interval(pipe):
    everywhere, nowhere, noisy = (
        pipe(PROMPTS, 3, guidance_interval=interval, **QUICK).tensor
        for interval in ((0, 999), (1000, 2000), (500, 999))
    )
    assert torch.equal(everywhere, pipe(PROMPTS, 3, **QUICK).tensor)
    assert torch.equal(nowhere, pipe(PROMPTS, 1, **QUICK).tensor)
    assert not torch.equal(noisy, everywhere) and not torch.equal(noisy, nowhere)


# -- saving and loading --------------------------------------------------------------------------------------


def test_a_saved_pipeline_draws_the_same_samples(pipe, tmp_path):
    path = tmp_path / "mine.safetensors"
    pipe.save_pretrained(path)
    loaded = TextToImagePipeline.from_pretrained(str(path), device="cpu")
    assert loaded.tokenizer.to_json() == pipe.tokenizer.to_json()
    assert loaded.metadata["network"] == pipe.metadata["network"] and loaded.metadata["lesson"] == pipe.lesson
    for name, weight in pipe.network.state_dict().items():
        assert torch.equal(weight, loaded.network.state_dict()[name])
    assert torch.equal(loaded(PROMPTS, **QUICK).tensor, pipe(PROMPTS, **QUICK).tensor)


# -- the progress bar ----------------------------------------------------------------------------------------


def test_the_progress_bar_counts_steps_and_can_be_switched_off(pipe, capsys):
    pipe(PROMPTS, steps=3)
    assert "/3 [" in capsys.readouterr().err  # fast steps are not all shown
    pipe(PROMPTS, steps=3, progress_bar=False)
    assert capsys.readouterr() == ("", "")


# -- wrong input ---------------------------------------------------------------------------------------------


WRONG = {
    "no prompts": (([],), {}, "name at least one prompt"),
    "no images": (("a 7",), {"num_images_per_prompt": 0}, "one image per prompt"),
    "unknown sampler": (("a 7",), {"sampler": "euler"}, "sampler euler is unknown; choose ddpm, ddim, dpm"),
    "too many steps": (("a 7",), {"steps": 1001}, "steps 1001: cannot take 1001 of 1000 timesteps"),
    "no steps": (("a 7",), {"steps": 0}, "steps 0: cannot take 0 of 1000 timesteps"),
    "negative scale": (("a 7",), {"guidance_scale": -1.0}, "a guidance scale of -1.0: it must be 0"),
    "infinite scale": (("a 7",), {"guidance_scale": float("inf")}, "a guidance scale of inf: it must be 0"),
    "no number": (("a 7",), {"guidance_scale": float("nan")}, "a guidance scale of nan: it must be 0"),
}


@pytest.mark.parametrize("args, kwargs, message", WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_user_error(pipe, args, kwargs, message):
    for call in (pipe, pipe.trajectory):
        if "num_images_per_prompt" in kwargs and call == pipe.trajectory:
            continue
        with pytest.raises(UserError, match=message) as error:
            call(*args, **kwargs)
        assert one_line(error)


def test_a_checkpoint_of_another_lesson_is_refused():
    path = str(pretrained_path("lesson_04_text_conditioning"))
    message = "comes from lesson_04_text_conditioning, not from lesson_05_cfg"
    with pytest.raises(UserError, match=message) as error:
        TextToImagePipeline.from_pretrained(path, device="cpu")
    assert one_line(error)


@pytest.mark.parametrize(
    "checkpoint, message", [("nowhere.safetensors", "does not exist"), (".", "a folder")]
)
def test_a_missing_checkpoint_is_refused(checkpoint, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        TextToImagePipeline.from_pretrained(checkpoint, device="cpu")
    assert one_line(error)


def test_an_unknown_device_is_refused():
    with pytest.raises(UserError, match="abacus") as error:
        TextToImagePipeline.from_pretrained(device="abacus")
    assert one_line(error)
