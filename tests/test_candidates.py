"""sample.py --candidates: this lesson's CLIP ranks samples, and the best of each prompt are kept."""

import random

import numpy as np
import pytest
import torch

from common.cli import run_command
from common.images import to_tensor
from common.training.checkpoints import pretrained_path
from lesson_06_miniglide import sample
from lesson_06_miniglide.networks.noisy_clip import best_of, clip_similarity, load_clip
from lesson_06_miniglide.networks.presets import LESSON
from lesson_06_miniglide.shapes.render import render
from lesson_06_miniglide.shapes.scenes import parse

PROMPTS = ("a large red circle", "three green triangles", "a small blue square")
OF_SHAPES = str(pretrained_path(LESSON, "clip_of_shapes"))


def drawn(folder, *flags):
    """Return the images and prompts that sample.py writes, in two steps."""
    few = ["--steps", "2", "--device", "cpu", "--out", str(folder / "out.npz")]
    run_command(sample.main, sample.Config, argv=[*few, *flags])
    with np.load(folder / "out.npz") as file:
        return file["images"], file["prompts"].tolist()


def test_the_best_of_each_prompt_are_kept_best_first():
    similarity = torch.tensor([0.1, 0.9, 0.5, 0.2, 0.3, 0.7, 0.8, 0.6])
    assert best_of(similarity, 4, 2).tolist() == [1, 2, 6, 5]
    assert best_of(similarity, 4, 4).tolist() == [1, 2, 3, 0, 6, 5, 7, 4]
    assert best_of(similarity, 1, 1).tolist() == list(range(8))


def test_the_pretrained_clip_finds_the_image_of_a_caption():
    """Of eight rendered images, of which one is of the prompt, that one is the best."""
    clip, tokenizer = load_clip(OF_SHAPES)
    rng, correct = random.Random(0), 0
    for prompt in PROMPTS:
        others = ("two yellow circles", "a green square", "a white triangle", "a purple circle")
        others += ("a yellow triangle above a white circle", "two white squares", "a large purple square")
        images = np.stack([render(parse(caption), rng) for caption in (*others, prompt)])
        similarity = clip_similarity(clip, tokenizer, to_tensor(images), [prompt] * 8)
        correct += best_of(similarity, 8, 1).tolist() == [7]
    assert correct == len(PROMPTS)


def test_the_command_keeps_the_most_similar_of_the_samples_it_would_have_drawn(tmp_path, capsys):
    prompts = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]
    images, all_prompts = drawn(tmp_path, *prompts, "--num-samples", "4")
    kept, kept_prompts = drawn(tmp_path, *prompts, "--candidates", "4", "--keep", "2")
    assert kept_prompts == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2 and kept.shape == (4, 64, 64, 3)
    clip, tokenizer = load_clip(OF_SHAPES)
    similarity = clip_similarity(clip, tokenizer, to_tensor(images), all_prompts).view(2, 4)
    for i in (0, 1):
        order = sorted(range(4), key=lambda j, row=similarity[i]: -row[j])[:2]
        assert (kept[2 * i : 2 * i + 2] == images[4 * i : 4 * i + 4][order]).all()
    assert "of those kept" in capsys.readouterr().out
    one, _ = drawn(tmp_path, *prompts, "--candidates", "4", "--clip", OF_SHAPES)
    assert (one == kept[::2]).all()


def test_a_cascade_is_ranked_after_the_upsampler(tmp_path):
    small, upsampler = (str(pretrained_path(LESSON, name)) for name in ("small", "upsampler"))
    cascade = ["--checkpoint", small, "--upsampler", upsampler, "--prompt", PROMPTS[0]]
    images, _ = drawn(tmp_path, *cascade, "--candidates", "2")
    both, _ = drawn(tmp_path, *cascade, "--num-samples", "2")
    assert images.shape == (1, 64, 64, 3) and any((images[0] == image).all() for image in both)


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--candidates", "2", "--keep", "3"], "--keep is 3; of --candidates 2 so many cannot be kept"),
        (["--candidates", "0"], "--candidates is 0"),
        (["--candidates", "2", "--keep", "0"], "--keep is 0"),
        (["--keep", "2"], "--keep needs --candidates"),
        (["--clip", "x"], "--clip needs --candidates"),
        (["--candidates", "2", "--num-samples", "2"], "--num-samples has no effect with --candidates"),
        (["--candidates", "2", "--out", "x.gif"], "with --candidates name a .png"),
        (["--candidates", "2", "--clip", "none.safetensors"], "--clip none.safetensors does not exist"),
        (["--candidates", "2", "--clip", "{dogs}"], "is not a CLIP of this lesson"),
        (["--candidates", "2", "--clip", "{clip}"], "ranks 32x32 pixels, these have 64x64"),
        (["--candidates", "2", "--checkpoint", "{small}"], "ranks 64x64 pixels, these have 16x16"),
        (["--candidates", "2", "--checkpoint", "{dogs}"], "captions of another vocabulary"),
        (
            ["--candidates", "2", "--checkpoint", "{dogs}", "--clip", OF_SHAPES],
            "captions of another vocabulary",
        ),
    ],
)
def test_errors_are_one_line(flags, line, place, capsys):
    paths = {name: pretrained_path(LESSON, name) for name in ("dogs", "clip", "small")}
    with pytest.raises(SystemExit, match="2"):
        run_command(sample.main, sample.Config, argv=[flag.format(**paths) for flag in flags])
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1 and not list(place.iterdir())
