"""The checks of the exercises of lessons 4 to 6: a wrong answer gets a line that helps."""

import math

import pytest
import torch
from PIL import ImageOps
from torch.nn.functional import avg_pool2d, cross_entropy
from torch.nn.functional import normalize as unit
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torchvision.transforms.functional import to_tensor

from common.exercises import WrongAnswer, run_checks
from common.training.trainer import batch_indices
from lesson_04_text_conditioning import exercises as lesson_4
from lesson_05_cfg import exercises as lesson_5
from lesson_06_miniglide import editing_exercises as editing
from lesson_06_miniglide import exercises as lesson_6


def plain_exponential(q, k, v):
    weights = (q @ k.T / 4).exp()
    return weights / weights.sum(1, keepdim=True) @ v


def batch_threshold(x_0, percentile):
    s = x_0.abs().quantile(percentile / 100).clamp(min=1)
    return x_0.clamp(-s, s) / s


def step_2m(x_s, x_0_before, x_0, before, start, end, weight=0.5, sign=1):
    """A step of DPM-Solver++(2M), with mistakes on request."""
    alpha_s, alpha_t = (1 / math.sqrt(1 + math.exp(-2 * x)) for x in (start, end))
    h = end - start
    d = x_0 + weight * (x_0 - x_0_before) * h / (start - before)
    ratio = alpha_t * math.exp(-end) / (alpha_s * math.exp(-start))
    return ratio * x_s - sign * alpha_t * math.expm1(-h) * d


def noisy(x, a, noise):
    return a**0.5 * x + (1 - a) ** 0.5 * noise


def clip_loss(images, captions, scale, normalize=unit, ways=2):
    """CLIP's, with mistakes on request."""
    logits = scale * normalize(images) @ normalize(captions).T
    right = torch.arange(len(images))
    return sum(cross_entropy(x, right) for x in (logits, logits.T)[:ways]) / ways


def to_network(image):
    return to_tensor(image.convert("RGB").resize((64, 64))) * 2 - 1


WRONG = [
    (lesson_4.check_merge, lambda tokens, pair: "".join(tokens).split(), "became"),
    (lesson_4.check_merge, lambda tokens, pair: tokens, "wanted"),
    (lesson_4.check_look_up, lambda q, k, v: (q @ k.T).softmax(1) @ v, "sqrt"),
    (lesson_4.check_look_up, lambda q, k, v: (q @ k.T / 4).softmax(0) @ v, "over the queries"),
    (lesson_4.check_look_up, plain_exponential, "inf or nan"),
    (lesson_4.check_read, lambda tokens, place, pad, mask: tokens + place, "under the padding"),
    (lesson_4.check_read, lambda x, place, pad, m: torch.where(m[..., None], x, pad) + place, "position"),
    (lesson_4.check_look_around, lambda q, k, v, *text: sdpa(q, k, v) + sdpa(q, *text), "two softmaxes"),
    (lesson_4.check_look_around, lambda q, k, v, tk, tv: sdpa(q, k, v), "nobody looks"),
    (
        lesson_4.check_look_around,
        lambda q, k, v, tk, tv: sdpa(q, torch.cat([k, tk], 1), torch.cat([tv, v], 1)),
        "same order",
    ),
    (lesson_5.check_guide, lambda cond, uncond, s: uncond + s * (cond - uncond), "v is guided too"),
    (lesson_5.check_guide, lambda cond, uncond, s: (1 + s) * cond - s * uncond, "w = s - 1"),
    (lesson_5.check_guide, lambda cond, uncond, s: (uncond + s * (cond - uncond))[:, :3], "v must be kept"),
    (lesson_5.check_drop, lambda mask, p: mask & (torch.rand(mask.shape) > p), "a part of their tokens"),
    (lesson_5.check_drop, lambda mask, p: mask & (torch.rand(1) > p), "the whole batch"),
    (lesson_5.check_drop, lambda mask, p: mask & (torch.rand(len(mask), 1) < p), "the share to keep"),
    (lesson_5.check_threshold, lambda x_0, percentile: x_0.clamp(-1, 1), "plain clipping"),
    (lesson_5.check_threshold, lambda x_0, p: x_0 / x_0.abs().amax((1, 2, 3), keepdim=True), "in range"),
    (lesson_5.check_threshold, batch_threshold, "a percentile each"),
    (lesson_5.check_step_2m, lambda *args: step_2m(*args, weight=0), "that is DDIM"),
    (lesson_5.check_step_2m, lambda *args: step_2m(*args, weight=0.8), "not 8 times"),
    (lesson_5.check_step_2m, lambda *args: step_2m(*args, sign=-1), "sign and size"),
    (lesson_6.check_breed, lambda folder: folder.split("-")[1].replace("_", " "), "second hyphen"),
    (lesson_6.check_breed, lambda folder: folder.split("-", 1)[1], "underscores"),
    (lesson_6.check_to_network, lambda image: to_tensor(image.convert("RGB").resize((64, 64))), "-1, 1"),
    (lesson_6.check_to_network, lambda image: to_network(image).permute(1, 2, 0), "channels come last"),
    (lesson_6.check_to_network, lambda image: to_network(image).transpose(1, 2), "on its side"),
    (lesson_6.check_to_network, lambda image: to_network(ImageOps.fit(image, (64, 64))), "do not crop"),
    (lesson_6.check_hybrid, lambda simple, kl, T: simple + 0.001 * kl / math.log(2), "times too little"),
    (lesson_6.check_hybrid, lambda simple, kl, T: simple + 0.001 * T * kl, "in nats"),
    (lesson_6.check_deal, lambda s, n, b, r, w, seed: batch_indices(s, n, b, seed), "same examples"),
    (lesson_6.check_deal, lambda s, n, b, r, w, seed: batch_indices(s, n, b, seed + r), "never seen"),
    (lesson_6.check_attention_parameters, lambda c, heads, w: 4 * c * c + 2 * c * w + 2 * c, "biases"),
    (
        lesson_6.check_attention_parameters,
        lambda c, heads, w: heads * (4 * c * c + 2 * c * w),
        "number of heads",
    ),
    (editing.check_conditioning, lambda x, size, a, e: noisy(x[:, :, ::4, ::4], a, e), "fifteen are lost"),
    (editing.check_conditioning, lambda x, size, a, e: avg_pool2d(x, 4) + (1 - a) ** 0.5 * e, "fainter"),
    (editing.check_conditioning, lambda x, size, a, e: noisy(x, a, unit(x)), "made small|must be"),
    (editing.check_repaint, lambda x, image, known, a, e: torch.where(known > 0, image, x), "no noise"),
    (
        editing.check_repaint,
        lambda x, image, known, a, e: torch.where(known > 0, x, noisy(image, a, e)),
        "changed places",
    ),
    (editing.check_repaint, lambda x, image, known, a, e: noisy(image, a, e), "what was drawn"),
    (editing.check_half_way, lambda x, s, a, e: (round(s * 100), x), "counts from 0"),
    (editing.check_half_way, lambda x, s, a, e: (round((1 - s) * 100) - 1, x), "changes little"),
    (editing.check_half_way, lambda x, s, a, e: (round(s * 100) - 1, e), "noise alone"),
    (editing.check_clip_loss, lambda *args: clip_loss(*args, normalize=lambda x: x), "length 1"),
    (editing.check_clip_loss, lambda *args: clip_loss(*args, ways=1), "one question"),
    (editing.check_clip_loss, lambda x, y, scale: clip_loss(x, y, 1 / scale), "multiplied"),
]


@pytest.mark.parametrize("check, answer, help", WRONG, ids=lambda value: getattr(value, "__name__", None))
def test_a_wrong_answer_gets_a_line_that_helps(check, answer, help):
    with pytest.raises(WrongAnswer, match=help):
        check(answer)


@pytest.mark.parametrize(
    "lesson", [lesson_4, lesson_5, lesson_6, editing], ids=lambda lesson: lesson.__name__
)
def test_an_untouched_exercise_is_still_to_do(lesson, capsys):
    run_checks(lesson.CHECKS)
    verdicts = capsys.readouterr().out.splitlines()
    assert len(verdicts) == len(lesson.CHECKS) and all("still to do" in verdict for verdict in verdicts)


def test_an_answer_that_breaks_leaves_the_other_checks_alone(capsys):
    def check_first():
        return None.shape

    def check_second():
        pass

    run_checks([check_first, check_second])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("first: not yet: it ends in AttributeError") and second == "second: right"
