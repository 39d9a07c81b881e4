"""The exercises in the notebooks of all lessons: right answers pass, and wrong ones hear what is wrong."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

from common.exercises import WrongAnswer, exercise, expect_shape, is_blank, judge, numbered
from lesson_01_ddpm import checks as checks_1
from lesson_01_ddpm import solutions as lesson_1
from lesson_01_ddpm.diffusion import GaussianDiffusion, clamp_x_0
from lesson_01_ddpm.solutions import alpha_bar, alpha_bar_prev, beta_tilde, betas, per_image, q_sample
from lesson_02_improved_ddpm import checks as checks_2
from lesson_02_improved_ddpm import solutions as lesson_2
from lesson_02_improved_ddpm.variational_bound import discretized_nll_bits, vb_terms_bpd
from lesson_03_adm import checks as checks_3
from lesson_03_adm import solutions as lesson_3
from lesson_04_text_conditioning import checks as checks_4
from lesson_04_text_conditioning import solutions as lesson_4
from lesson_04_text_conditioning.model import encode_prompts
from lesson_04_text_conditioning.studies import empty_file
from lesson_05_cfg import checks as checks_5
from lesson_05_cfg import solutions as lesson_5
from lesson_05_cfg.dpm_solver import dpmpp_2m_sample
from lesson_06_miniglide import checks as checks_6
from lesson_06_miniglide import editing_checks
from lesson_06_miniglide import solutions as lesson_6
from lesson_06_miniglide.flow import checks as flow_checks
from lesson_06_miniglide.flow import solutions as flow_solutions

LESSONS = {
    1: (checks_1, lesson_1),
    2: (checks_2, lesson_2),
    3: (checks_3, lesson_3),
    4: (checks_4, lesson_4),
    5: (checks_5, lesson_5),
    6: (checks_6, lesson_6),
    "editing": (editing_checks, lesson_6),
    "flow": (flow_checks, flow_solutions),
}


def exercises(lesson):
    """Return the names of a lesson's exercises, in their order."""
    checks, solutions = LESSONS[lesson]
    names = [name for name, value in vars(checks).items() if isinstance(getattr(value, "number", None), str)]
    assert all(hasattr(solutions, name) for name in names)
    return sorted(
        names,
        key=lambda name: [int(part) for part in getattr(checks, name).number.partition(",")[0].split(".")],
    )


ALL = [(lesson, name) for lesson in LESSONS for name in exercises(lesson)]


def test_the_number_of_exercises():
    assert [len(exercises(lesson)) for lesson in LESSONS] == [10, 10, 9, 10, 9, 11, 9, 3]


@pytest.mark.parametrize("lesson, name", ALL)
def test_solutions_are_correct(lesson, name):
    checks, solutions = LESSONS[lesson]
    assert judge(getattr(solutions, name), getattr(checks, name)) == "correct."


# -- lesson 1 ------------------------------------------------------------------------------------------------


def residual_block(block, x, emb, use_emb=True, skip=True, activation=F.silu, emb_activation=F.silu):
    h = block.conv_1(activation(block.norm_1(x)))
    if use_emb:
        h = h + block.emb(emb_activation(emb))[:, :, None, None]
    h = block.conv_2(F.silu(block.norm_2(h)))
    return block.skip(x) + h if skip else h


def late_emb(block, x, emb, after_silu):
    h, emb = block.norm_2(block.conv_1(F.silu(block.norm_1(x)))), block.emb(F.silu(emb))[:, :, None, None]
    return block.skip(x) + block.conv_2(F.silu(h) + emb if after_silu else F.silu(h + emb))


def loss_fn(network, x_0, t=None, target=None, noisy=True, reduce=torch.mean, shift=0):
    t = torch.randint(1000, (len(x_0),)) if t is None else t
    noise = torch.randn_like(x_0)
    x_t = q_sample(x_0, t, noise) if noisy else x_0
    eps_hat = network(x_t, (t + shift).clamp(min=0))
    return reduce((eps_hat - (noise if target is None else target(x_0))).square())


def same_noise_in_all_pixels(network, x_0):
    t, noise = torch.randint(1000, (len(x_0),)), torch.randn(len(x_0), 1, 1, 1)
    return (network(q_sample(x_0, t, noise), t) - noise).square().mean()


def same_noise_in_all_images(network, x_0):
    t, noise = torch.randint(1000, (len(x_0),)), torch.randn_like(x_0[:1])
    return (network(q_sample(x_0, t, noise), t) - noise).square().mean()


def best_x_0(x_t, t, faint=True, std=False, factor=1):
    a = per_image(alpha_bar, t)
    return (factor * (a.sqrt() if faint else 1) * x_t / ((1 - a).sqrt() if std else 1 - a)).tanh()


def two_exponentials(x_t, t):
    z = per_image(alpha_bar.sqrt() / (1 - alpha_bar), t) * x_t
    return (z.exp() - (-z).exp()) / (z.exp() + (-z).exp())


@torch.no_grad()
def update_average(average, network, step, rate=lambda step: max(1 / step, 0.05)):
    for mean, weight in zip(average.parameters(), network.parameters()):
        mean.lerp_(weight, rate(step))


def posterior_mean(x_0, x_t, t, previous=alpha_bar_prev, swap=False, power=0.5, previous_power=0.5):
    coef_0 = previous**previous_power * betas / (1 - alpha_bar)
    coef_t = (1 - betas) ** power * (1 - previous) / (1 - alpha_bar)
    x_0, x_t = (x_t, x_0) if swap else (x_0, x_t)
    return per_image(coef_0, t) * x_0 + per_image(coef_t, t) * x_t


def reverse_step(network, x_t, t, std=None, last=False, clamp=True, noise=torch.randn_like, shift=0):
    steps = torch.full((len(x_t),), t)
    x_0 = lesson_1.x_0_from_noise(x_t, steps, network(x_t, (steps + shift).clamp(0, 999)))
    mean = lesson_1.posterior_mean(x_0.clamp(-1, 1) if clamp else x_0, x_t, steps)
    std = beta_tilde.sqrt() if std is None else std
    sigma = std[max(t, 1)].float() if t or last else 0
    return mean + sigma * noise(x_t)


def step_with_mean(network, x_t, t, mean):
    steps = torch.full((len(x_t),), t)
    eps_hat = network(x_t, steps)
    x_0 = lesson_1.x_0_from_noise(x_t, steps, eps_hat).clamp(-1, 1)
    noise = beta_tilde[t].sqrt() * torch.randn_like(x_t)
    return mean(x_0, eps_hat.clamp(-1, 1), x_t, steps) + noise


def root(table, t):
    return per_image(table.sqrt(), t)


def sample(network, n, timesteps=range(999, -1, -1), start=torch.randn, keep=True):
    x = x_T = start(n, 1, 32, 32)
    for t in timesteps:
        x = lesson_1.reverse_step(network, x if keep else x_T, t)
    return x


def ideal_denoiser(
    data, x_t, t, faint=True, factor=-0.5, reduce=torch.sum, dim=1, of_noise=True, std=False, power=0.5
):
    a = per_image(alpha_bar, t)
    images = (a.sqrt()[:, None] if faint else 1) * data
    distance = reduce((x_t[:, None] - images).square(), (2, 3, 4))
    scale = (1 - a.view(-1, 1)) ** (0.5 if std else 1)
    x_0 = torch.einsum("nm,mchw->nchw", (factor * distance / scale).softmax(dim), data)
    return (x_t - a.sqrt() * x_0) / (1 - a) ** power if of_noise else x_0


WRONG_1 = {
    "q_sample": {
        "take their roots": lambda x, t, n: per_image(alpha_bar, t) * x + per_image(1 - alpha_bar, t) * n,
        "too weak": lambda x, t, n: root(alpha_bar, t) * x + per_image(1 - alpha_bar, t) * n,
        "a single step": lambda x, t, n: root(1 - betas, t) * x + root(betas, t) * n,
        "too faint": lambda x, t, n: per_image(alpha_bar, t) * x + root(1 - alpha_bar, t) * n,
        "each other's": lambda x, t, n: root(1 - alpha_bar, t) * x + root(alpha_bar, t) * n,
        "the chain gives": lambda x, t, n: root(alpha_bar, t) * x + 1.1 * root(1 - alpha_bar, t) * n,
        "expected": lambda x, t, n: x[0],
        "one number per image": lambda x, t, n: alpha_bar[t].sqrt() * x + (1 - alpha_bar[t]).sqrt() * n,
        "draw none of your own": lambda x, t, n: q_sample(x, t, torch.randn_like(x)),
        "starts at 0": lambda x, t, n: root(alpha_bar, t - 1) * x + root(1 - alpha_bar, t - 1) * n,
    },
    "best_x_0": {
        "probability p": lambda *args: (best_x_0(*args) + 1) / 2,
        "more probable": lambda x, t: x.sign(),
        "sign is wrong": lambda *args: best_x_0(*args, factor=-1),
        "are fainter": lambda *args: best_x_0(*args, faint=False),
        "by the variance": lambda *args: best_x_0(*args, std=True),
        "factor of 2": lambda *args: best_x_0(*args, factor=2),
        "only be -1 or 1": lambda x, t: x / root(alpha_bar, t),
        "overflows": two_exponentials,
        "the average is 0.103": lambda *args: 0.9 * best_x_0(*args),
        "That is the ratio": lambda *args: (1 + best_x_0(*args)) / (1 - best_x_0(*args)),
    },
    "x_0_from_noise": {
        "as faint": lambda x, t, n: x - root(1 - alpha_bar, t) * n,
        "once too often": lambda x, t, n: (x - root(1 - alpha_bar, t) * n) / per_image(alpha_bar, t),
        "Only x_t": lambda x, t, n: x / root(alpha_bar, t) - root(1 - alpha_bar, t) * n,
        "sign is wrong": lambda x, t, n: (x + root(1 - alpha_bar, t) * n) / root(alpha_bar, t),
        "You multiply": lambda x, t, n: (x - root(1 - alpha_bar, t) * n) * root(alpha_bar, t),
        "At t = 500": lambda x, t, n: x,
        "Only the noise": lambda x, t, n: x - root(1 - alpha_bar, t) / root(alpha_bar, t) * n,
        "A root is missing": lambda x, t, n: (x - per_image(1 - alpha_bar, t) * n) / per_image(alpha_bar, t),
    },
    "residual_block": {
        "input is missing": lambda *args: residual_block(*args, skip=False),
        "depend on emb": lambda *args: residual_block(*args, use_emb=False),
        "no activation": lambda *args: residual_block(*args, emb_activation=nn.Identity()),
        "block.skip": lambda block, x, emb: x + residual_block(block, x, emb, skip=False),
        "added at the end": lambda block, x, emb: (
            residual_block(block, x, emb, use_emb=False) + block.emb(F.silu(emb))[:, :, None, None]
        ),
        "order is norm": lambda *args: residual_block(*args, activation=F.relu),
        "emb is added after norm_2": partial(late_emb, after_silu=False),
        "right after conv_1, before": partial(late_emb, after_silu=True),
        "takes the block's input x": lambda block, x, emb: block.skip(block.conv_1(x)),
        "norm_1 comes before": lambda block, x, emb: block.norm_1(block.conv_1(x)),
    },
    "loss_fn": {
        "same t": lambda network, x: loss_fn(network, x, torch.randint(1000, (1,)).expand(len(x))),
        "add the noise first": lambda network, x: loss_fn(network, x, noisy=False),
        "noise in x_t": lambda network, x: loss_fn(network, x, target=lambda x: 3**0.5 * x),
        "sum over images and pixels": lambda network, x: loss_fn(network, x, reduce=torch.sum),
        "a sum over pixels": lambda network, x: loss_fn(network, x, reduce=lambda e: e.sum((1, 2, 3)).mean()),
        "near 1": lambda network, x: loss_fn(network, x, target=torch.zeros_like),
        "not a Python number": lambda network, x: loss_fn(network, x).item(),
        "has no gradient": lambda network, x: loss_fn(network, x).detach(),
        "is inclusive": lambda network, x: loss_fn(network, x, torch.randint(1, 1000, (len(x),))),
        "one integer t": lambda network, x: loss_fn(network, x, torch.randint(1000, (1,))),
        "from 0 to 999": lambda network, x: loss_fn(network, x, torch.randint(100, (len(x),))),
        "is exclusive": lambda network, x: loss_fn(network, x, torch.randint(999, (len(x),))),
        "not called": lambda network, x: torch.tensor(1.0),
        "single number": lambda network, x: loss_fn(network, x, reduce=lambda e: e.mean((1, 2, 3))),
        "counts t from 1 to 1000": lambda network, x: loss_fn(network, x, torch.randint(1, 1001, (len(x),))),
        "absolute error": lambda network, x: loss_fn(network, x, reduce=lambda e: e.sqrt().mean()),
        "pixels of an image get the same noise": same_noise_in_all_pixels,
        "All images get the same noise": same_noise_in_all_images,
        "Both take the same t": partial(loss_fn, shift=1),
        "and the network was given": partial(loss_fn, shift=-1),
    },
    "update_average": {
        "random initial": partial(update_average, rate=lambda step: 0.05),
        "exchanged": partial(update_average, rate=lambda step: 1 - max(1 / step, 0.05)),
        "must not fall": partial(update_average, rate=lambda step: 1 / step),
        "not 0.05": partial(update_average, rate=lambda step: max(1 / step, 0.02)),
        "copies": partial(update_average, rate=lambda step: 1),
        "their mean is 5": partial(update_average, rate=lambda step: 1 if step == 1 else 0.05),
        "has not changed": lambda average, network, step: None if step else average,
        "Keep @torch.no_grad()": update_average.__wrapped__,
        "of `network` have changed": lambda average, network, step: update_average(network, average, 2),
    },
    "posterior_mean": {
        "swapped": lambda *args: posterior_mean(*args, swap=True),
        "At t = 0": lambda x_0, x_t, t: posterior_mean(x_0, x_t, t, alpha_bar_prev.clamp(max=0.9999)),
        "one step earlier": lambda x_0, x_t, t: posterior_mean(x_0, x_t, t, alpha_bar),
        "A root is missing": partial(posterior_mean, power=1),
        "The factor of x_t": partial(posterior_mean, power=0),
        "the product of the densities": lambda x_0, x_t, t: 1.1 * posterior_mean(x_0, x_t, t),
        "root of alpha_bar_prev": lambda x_0, x_t, t: posterior_mean(
            per_image((alpha_bar / alpha_bar_prev).sqrt(), t) * x_0, x_t, t
        ),
        "simplify first": lambda x_0, x_t, t: (
            posterior_mean(x_0, x_t, t) + per_image(0 / (1 - alpha_bar_prev), t)
        ),
        "contains sqrt(alpha_bar_prev)": partial(posterior_mean, previous_power=1),
        "factor of x_0 contains": partial(posterior_mean, previous_power=1, power=1),
        "at t = 50 it is": partial(posterior_mean, previous_power=0),
    },
    "reverse_step": {
        "adds no noise": lambda *args: reverse_step(*args, std=0 * betas),
        "the paper's t > 1": lambda *args: reverse_step(*args, std=beta_tilde.sqrt() * (betas > betas[1])),
        "beta_tilde is": lambda *args: reverse_step(*args, std=betas.sqrt()),
        "multiplied by the variance": lambda *args: reverse_step(*args, std=beta_tilde),
        "standard deviation": lambda *args: reverse_step(*args, std=2 * beta_tilde.sqrt()),
        "last step": lambda *args: reverse_step(*args, last=True),
        "not clipped": lambda *args: reverse_step(*args, clamp=False),
        "one t per image": lambda network, x_t, t: network(x_t, torch.tensor([t])),
        "predicted noise": lambda network, x_t, t: network(x_t, torch.full((len(x_t),), t)),
        "pass it through": partial(step_with_mean, mean=lambda x_0, eps, x_t, t: posterior_mean(eps, x_t, t)),
        "swapped": partial(step_with_mean, mean=lambda x_0, eps, x_t, t: posterior_mean(x_t, x_0, t)),
        "not x_0_hat itself": partial(step_with_mean, mean=lambda x_0, eps, x_t, t: x_0),
        "not x_t itself": partial(step_with_mean, mean=lambda x_0, eps, x_t, t: x_t),
        "the posterior mean is": partial(step_with_mean, mean=lambda x_0, eps, x_t, t: (x_0 + x_t) / 2),
        "as a tensor": lambda network, x_t, t: network(x_t, t),
        "not x_{t-1}": lambda *args: reverse_step(*args).clamp(-1, 1),
        "At t = 0 the result is off": partial(reverse_step, last=True),
        "was given t = 2": partial(reverse_step, shift=1),
        "was given t = 0": partial(reverse_step, shift=-1),
        "get the same noise": lambda *args: reverse_step(
            *args, noise=lambda x_t: torch.randn(len(x_t), 1, 1, 1)
        ),
    },
    "sample": {
        "Gradients are on": sample,
        "upwards": torch.no_grad()(partial(sample, timesteps=range(1000))),
        "999 timesteps, from 999 to 1": torch.no_grad()(partial(sample, timesteps=range(999, 0, -1))),
        "white noise": torch.no_grad()(partial(sample, start=torch.rand)),
        "same noise": torch.no_grad()(partial(sample, keep=False)),
        "expected (3, 1, 32, 32)": torch.no_grad()(lambda network, n: sample(network, n)[:1]),
        "from 1000 to 1": torch.no_grad()(partial(sample, timesteps=range(1000, 0, -1))),
    },
    "ideal_denoiser": {
        "predicted x_0": partial(ideal_denoiser, of_noise=False),
        "fainter": partial(ideal_denoiser, faint=False),
        "factor 2": partial(ideal_denoiser, factor=-1.0),
        "sum over pixels": partial(ideal_denoiser, reduce=torch.mean),
        "nearest image": partial(ideal_denoiser, factor=0.5),
        "same weight": partial(ideal_denoiser, factor=0.0),
        "over the images": partial(ideal_denoiser, dim=0),
        "divides by the variance": partial(ideal_denoiser, std=True),
        "root of that": partial(ideal_denoiser, power=1),
        "noise of the nearest image": partial(ideal_denoiser, factor=-1e6),
        "All pairs": lambda data, x_t, t: x_t - data,
    },
}


def step_with(**wrong):
    """Return a reverse step with this mistake in its posterior mean."""
    return partial(step_with_mean, mean=lambda x_0, eps, x_t, t: posterior_mean(x_0, x_t, t, **wrong))


@pytest.mark.parametrize(
    "loss, step, said",
    [
        (lesson_1.loss_fn, lesson_1.reverse_step, "The loss: correct.\nThe reverse step: correct.\n"),
        (WRONG_1["loss_fn"]["is exclusive"], lesson_1.reverse_step, "The loss: not yet. In 20,000 draws"),
        (lesson_1.loss_fn, WRONG_1["reverse_step"]["adds no noise"], "step: not yet. It adds no noise"),
        (lesson_1.loss_fn, step_with(power=1), "mean, alpha_t stands"),
        (lesson_1.loss_fn, step_with(previous_power=1), "mean, alpha_bar_prev stands"),
        (lesson_1.loss_fn, step_with(power=0), "after the step at t = 300 the image has"),
    ],
)
def test_the_empty_file_of_lesson_1_is_checked(loss, step, said, capsys):
    checks_1.empty_file(loss, step)
    assert said in capsys.readouterr().out


# -- lesson 2 ------------------------------------------------------------------------------------------------


def cosine_betas(T, power=2, largest=0.999, offset=0.008, angle=math.pi / 2):
    u = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((u + offset) / (1 + offset) * angle) ** power
    return (1 - f[1:] / f[:-1]).clamp(max=largest)


def loss_hybrid(
    diffusion,
    network,
    x_0,
    t,
    noise,
    weight=1.0,
    stop_eps=True,
    stop_v=False,
    simple=1,
    stop_simple=False,
    swap=False,
):
    x_t = diffusion.q_sample(x_0, t, noise)
    eps_hat, v = network(x_t, t).chunk(2, 1)
    parts = [eps_hat.detach() if stop_eps else eps_hat, v.detach() if stop_v else v]
    bits = vb_terms_bpd(diffusion, torch.cat(parts[::-1] if swap else parts, 1), x_0, x_t, t)
    eps_hat = eps_hat.detach() if stop_simple else eps_hat
    return simple * (eps_hat - noise).square().flatten(1).mean(1) + weight * bits


def learned_range(
    process,
    output,
    x_t,
    t,
    channel=1,
    swap=False,
    halved=True,
    mix=lambda f, x, y: f * y + (1 - f) * x,
    keep=True,
):
    f = output[:, channel : channel + 1] if keep else output[:, channel]
    f = (f + 1) / 2 if halved else f
    low, high = (process.extract(x, t, x_t) for x in (process.posterior_log_variance, process.log_betas))
    return mix(f, *((high, low) if swap else (low, high)))


def vlb_term(
    process,
    output,
    x_0,
    x_t,
    i,
    variance,
    reverse=False,
    per=None,
    first=True,
    denoised_fn=clamp_x_0,
    q_table=None,
):
    t = torch.full((len(x_0),), i)
    p = process.p_mean_variance(output, x_t, t, variance, denoised_fn=denoised_fn)
    table = process.posterior_log_variance if q_table is None else q_table
    q = (process.q_posterior_mean(x_0, x_t, t), process.extract(table, t, x_t))
    if i == 0 and first:
        return discretized_nll_bits(x_0, p.mean, p.log_variance) / (math.log(2) if first == "bits" else 1)
    pair = ((p.mean, p.log_variance), q) if reverse else (q, (p.mean, p.log_variance))
    return lesson_2.normal_kl(*pair[0], *pair[1]) / (per or math.log(2))


def best_variance(process, i, error, power=2, table=None, keep=True, large=False):
    c = process.posterior_mean_coef1[i] if table is None else table[i]
    return (process.betas if large else process.beta_tilde)[i] * keep + c**power * error


@torch.no_grad()
def family_sample(process, network, x, eta, index=False, room=True):
    for i in reversed(range(process.num_timesteps)):
        t = torch.full((len(x),), i)
        eps_hat = (network(x, t) if index else process.predict(network, x, t))[:, :1]
        x_0_hat = process.x_0_from_noise(x, t, eps_hat).clamp(-1, 1)
        eps_hat = process.noise_from_x_0(x, t, x_0_hat)
        sigma = eta * process.beta_tilde[i].item() ** 0.5
        x = lesson_2.ddim_step(x_0_hat, eps_hat, process.alpha_bar_prev[i].item(), sigma * room)
        x = x + sigma * torch.randn_like(x)
    return x


@torch.no_grad()
def ddim(process, network, x, clip=True, again=True, noise=0, predict=None, order=reversed, of=None):
    for i in order(range(process.num_timesteps)):
        t = torch.full((len(x),), i)
        eps_hat = (predict or process.predict)(network, x, t)[:, :1]
        x_0_hat = process.x_0_from_noise(x, t, eps_hat)
        x_0_hat = x_0_hat.clamp(-1, 1) if clip else x_0_hat
        eps_hat = process.noise_from_x_0(x, t, x_0_hat) if again else eps_hat
        x = lesson_2.ddim_step(
            x_0_hat, eps_hat, (process.alpha_bar_prev if of is None else of)[i].item(), 0.0
        )
        x = x + noise * torch.randn_like(x)
    return x


WRONG_2 = {
    "cosine_betas": {
        "clip to 0.999": lambda T: cosine_betas(T, largest=1.0),
        "largest beta is 0.9900": lambda T: cosine_betas(T, largest=0.99),
        "square of the cosine": lambda T: cosine_betas(T, power=1),
        "alpha_bar is g": lambda T: cosine_betas(T, power=3),
        "offset 0.008": lambda T: cosine_betas(T, offset=0),
        "two successive": lambda T: 1 - (1 - cosine_betas(T, largest=1.0)).cumprod(0).clamp(min=0.001),
        "difference of two": lambda T: (
            -torch.cat([torch.ones(1).double(), (1 - cosine_betas(T)).cumprod(0)]).diff()
        ),
        "betas are negative: divide": lambda T: 1 - 1 / (1 - cosine_betas(T)),
        "end at pi/2": partial(cosine_betas, angle=math.pi),
        "shifted by one step": lambda T: torch.cat([torch.zeros(1).double(), cosine_betas(T)[:-1]]),
    },
    "normal_kl": {
        "the reverse": lambda m, v, n, w: lesson_2.normal_kl(n, w, m, v),
        "NaN": lambda m, v, n, w: lesson_2.normal_kl(m, v.log(), n, w),
        "in bits": lambda *args: lesson_2.normal_kl(*args) / math.log(2),
        "where is the 1/2": lambda *args: 2 * lesson_2.normal_kl(*args),
        "the divergence is 0; your": lambda *args: lesson_2.normal_kl(*args) + 0.5,
        "is 0; your formula gives": lambda m, v, n, w: lesson_2.normal_kl(m, v, n, w) + v - w + m.exp(),
        "the part with the variances": lambda *args: 3 * lesson_2.normal_kl(*args),
        "check its signs": lambda m, v, n, w: lesson_2.normal_kl(m, v, n, w) + v - w,
        "variance that divides it": lambda m, v, n, w: (
            lesson_2.normal_kl(m, v, m, w) + (m - n) ** 2 / (2 * v.exp())
        ),
        "its factor": lambda m, v, n, w: lesson_2.normal_kl(m, v, m, w) + (m - n) ** 2 / w.exp(),
    },
    "best_variance": {
        "no effect": lambda process, i, error: process.beta_tilde[i],
        "standard deviation; return": lambda *args: lesson_2.best_variance(*args).sqrt(),
        "the logarithm": lambda *args: lesson_2.best_variance(*args).log(),
        "a part is missing": partial(best_variance, keep=False),
        "which factor": partial(best_variance, power=0),
        "by c^2": partial(best_variance, power=1),
        "of t - 1, not of t": lambda process, i, error: best_variance(
            process, i, error, table=process.alpha_bar.sqrt() * process.betas / (1 - process.alpha_bar)
        ),
        "square only the factor": lambda process, i, error: best_variance(process, i, error**2),
        "With an error of 0 the variance must be beta_tilde =": partial(best_variance, large=True),
        "the factor of x_t in eq. 7": lambda process, i, error: best_variance(
            process, i, error, table=process.posterior_mean_coef2
        ),
        "Gaussian data of standard deviation": lambda process, i, error: (
            process.beta_tilde[i] + error * (process.betas[i] - process.beta_tilde[i])
        ),
    },
    "learned_range": {
        "v has no effect": partial(learned_range, channel=0),
        "limits are swapped": partial(learned_range, swap=True),
        "between 0 and 1": partial(learned_range, halved=False),
        "return its logarithm": lambda *args: learned_range(*args).exp(),
        "Interpolate the logarithms": partial(
            learned_range, mix=lambda f, low, high: (f * high.exp() + (1 - f) * low.exp()).log()
        ),
        "v is clipped": partial(learned_range, mix=lambda f, low, high: low + f.clamp(0, 1) * (high - low)),
        "NaN or infinity": partial(
            learned_range, mix=lambda f, low, high: f * high.log() + (1 - f) * low.log()
        ),
        "should give log beta_tilde": lambda process, output, x_t, t: learned_range(
            process, torch.cat([output[:, :1], 2 * output[:, 1:].sigmoid() - 1], 1), x_t, t
        ),
        "expected (3, 1, 4, 4)": lambda process, output, x_t, t: learned_range(process, output, x_t, t)[:, 0],
        "Keep the channel axis": partial(learned_range, keep=False),
    },
    "loss_hybrid": {
        "VLB is missing": lambda *args: loss_hybrid(*args, weight=0),
        "far too small": lambda *args: loss_hybrid(*args, weight=1e-6),
        "L_simple is missing": lambda *args: loss_hybrid(*args, simple=0),
        "swapped in the VLB": lambda *args: loss_hybrid(*args, swap=True),
        "no gradient at all": lambda *args: loss_hybrid(*args, stop_simple=True),
        "1000 times too small": lambda *args: loss_hybrid(*args, weight=0.001),
        "factor 0.001": lambda *args: loss_hybrid(*args, weight=1000),
        "reaches eps_hat": lambda *args: loss_hybrid(*args, stop_eps=False),
        "v gets no gradient": lambda *args: loss_hybrid(*args, stop_v=True),
        "exceeds L_simple": lambda *args: loss_hybrid(*args, weight=2),
        "gets the index": loss_hybrid,
        "its factor is 0.001 * process.num_timesteps": lambda process, network, *args: loss_hybrid(
            process, partial(process.predict, network), *args
        ),
        "outputs are swapped": lambda process, network, *args: lesson_2.loss_hybrid(
            process, lambda x_t, t: network(x_t, t).flip(1), *args
        ),
    },
    "respaced_betas": {
        "old betas": lambda alpha_bar, kept: betas[kept],
        "wrong noise level": lambda alpha_bar, kept: 1 - (1 - betas[kept]) ** 2,
        "whole noise so far": lambda alpha_bar, kept: 1 - alpha_bar[kept],
        "before in `kept`": lambda alpha_bar, kept: 1 - alpha_bar[kept] / alpha_bar[(kept - 1).clamp(min=0)],
        "expected (4,)": lambda alpha_bar, kept: betas,
        "first kept timestep is missing": lambda alpha_bar, kept: (
            1 - alpha_bar[kept][1:] / alpha_bar[kept][:-1]
        ),
        "their ratio": lambda alpha_bar, kept: -torch.cat([torch.ones(1).double(), alpha_bar[kept]]).diff(),
        "A beta is negative": lambda alpha_bar, kept: 1 - alpha_bar[kept] / alpha_bar[kept].roll(1),
        "before the first kept": lambda alpha_bar, kept: (
            1 - alpha_bar[kept] / torch.cat([torch.zeros(1).double(), alpha_bar[kept][:-1]])
        ),
    },
    "ddim_step": {
        "square roots": lambda x, eps, a, s: a * x + (1 - a) * eps,
        "noise is gone": lambda x, eps, a, s: a**0.5 * x,
        "each other's": lambda x, eps, a, s: (1 - a) ** 0.5 * x + a**0.5 * eps,
        "must be q_sample": lambda x, eps, a, s: x + (1 - a) ** 0.5 * eps,
        "no effect": lambda x, eps, a, s: a**0.5 * x + (1 - a) ** 0.5 * eps,
        "Two calls differ": lambda *args: lesson_2.ddim_step(*args) + args[3] * torch.randn_like(args[0]),
        "add up to": lambda x, eps, a, s: a**0.5 * x + (1 - a - s) ** 0.5 * eps,
    },
    "vlb_term": {
        "reversed": partial(vlb_term, reverse=True),
        "in nats": partial(vlb_term, per=1),
        "expected (3, 1, 4, 4)": lambda *args: vlb_term(*args).flatten(1).mean(1),
        "no KL term": partial(vlb_term, first=False),
        "in bits already": partial(vlb_term, first="bits"),
        "At i = 3 the first pixel": lambda *args: 2 * vlb_term(*args),
        "Pass log variances": partial(vlb_term, q_table=beta_tilde),
        "taken as beta_t": partial(vlb_term, q_table=betas.log()),
        "as in the sampler": partial(vlb_term, denoised_fn=None),
    },
    "family_sample": {
        "Both bugs are left": partial(family_sample, index=True, room=False),
        "One bug is left. Print": partial(family_sample, index=True),
        "adds no noise": lambda process, network, x, eta: lesson_2.ddim(process, network, x),
        "One bug is left. Samples": partial(family_sample, room=False),
    },
    "ddim": {
        "Gradients are on": lambda process, network, x: network(x, torch.zeros(3)),
        "gets the index": partial(ddim, predict=lambda network, x, t: network(x, t)),
        "runs upwards": partial(ddim, order=iter),
        "not clipped": partial(ddim, clip=False),
        "compute it again": partial(ddim, again=False),
        "DDIM adds none": partial(ddim, noise=0.1),
        "alpha_bar_prev[i]": partial(ddim, of=alpha_bar),
        "not [999": lambda process, network, x: ddim(process.respace([0, 2]), network, x),
        "[:, :1]": torch.no_grad()(lambda process, network, x: network(x, torch.zeros(3)) + x[:, :, :3, :3]),
    },
}

# -- lesson 3 ------------------------------------------------------------------------------------------------


def ada_gn(norm, h, emb, one=1, shifted=True, swap=False):
    scale, shift = emb[:, :, None, None].chunk(2, 1)
    scale, shift = (shift, scale) if swap else (scale, shift)
    return norm(h) * (one + scale) + shift * shifted


def adm_block(
    block,
    x,
    emb,
    both=True,
    early=True,
    use_emb=True,
    skip=True,
    project=True,
    activation=F.silu,
    emb_activation=F.silu,
    modulate=lesson_3.ada_gn,
    last=F.silu,
    order=None,
):
    resample = block.resample or nn.Identity()
    h = activation(block.norm_1(x))
    h = block.conv_1(resample(h)) if early else resample(block.conv_1(h))
    h = block.conv_1(order(block.norm_1, resample, x)) if order else h
    h = modulate(block.norm_2, h, block.emb(emb_activation(emb if use_emb else 0 * emb)))
    h = block.conv_2(last(h))
    x = resample(x) if both else x
    return (block.skip(x) if project else x) + h if skip else h


def added_emb(norm, h, emb):
    return norm(h + emb[:, :, None, None])


class ClassConditional(nn.Module):
    """The right answer, and what typical wrong ones do differently."""

    def __init__(self, unet, classes, width, table=nn.Embedding, seen=None, of=None, stored=True):
        super().__init__()
        self.table = table(classes, width)
        self.seen, self.of = seen or (lambda t, y: y), of or (lambda unet, x, t, e: unet(x, t, embedding=e))
        if stored:
            self.unet = unet
        self.hidden = [unet]

    def forward(self, x_t, t, y):
        return self.of(self.hidden[0], x_t, t, self.table(self.seen(t, y)))


def log_density(x_t, data, a, root=torch.sqrt, sign=-1, factor=2, power=1, reduce=torch.sum, join=None):
    squares = reduce((x_t[:, None] - root(a) * data).square(), (2, 3, 4))
    return (join or (lambda e: e.logsumexp(1)))(sign * squares / (factor * (1 - a) ** power))


def classifier_loss(
    diffusion, classifier, x_0, label, t=None, noisy=True, of=F.cross_entropy, noise=torch.randn_like, shift=0
):
    t = torch.randint(1000, (len(x_0),)) if t is None else t
    x_t = diffusion.q_sample(x_0, t, noise(x_0)) if noisy else x_0
    return of(classifier(x_t, (t + shift) % 1000), label)


def log_p_gradient(
    classifier,
    x_t,
    t,
    y,
    log_p=lambda logits: logits.log_softmax(1),
    start=lambda x: x.detach(),
    pick=lambda log_p, y: log_p.gather(1, y[:, None]),
    add=torch.sum,
):
    with torch.enable_grad():
        x_t = start(x_t).requires_grad_(True)
        return torch.autograd.grad(add(pick(log_p(classifier(x_t, t)), y)), x_t)[0]


WRONG_3 = {
    "ada_gn": {
        "1 + scale": partial(ada_gn, one=0),
        "not normalized": lambda norm, h, emb: ada_gn(nn.Identity(), h, emb),
        "learned weights": lambda norm, h, emb: ada_gn(nn.GroupNorm(4, 8), h, emb),
        "must be norm(h)": lambda norm, h, emb: ada_gn(nn.GroupNorm(8, 8), h, emb),
        "swapped": partial(ada_gn, swap=True),
        "shift is missing": partial(ada_gn, shifted=False),
        "normalize first": lambda norm, h, emb: norm(ada_gn(nn.Identity(), h, emb)),
        "before it": lambda norm, h, emb: norm(h * (1 + emb[:, :8, None, None])) + emb[:, 8:, None, None],
        "for the pixels": lambda norm, h, emb: norm(h) * (1 + emb[:, :8]) + emb[:, 8:],
        "not the batch": lambda norm, h, emb: norm(h) * (1 + emb[:1, :, None, None]),
        "every second": lambda norm, h, emb: ada_gn(norm, h, torch.cat([emb[:, ::2], emb[:, 1::2]], 1)),
        "scaled, too": lambda norm, h, emb: (norm(h) + emb[:, 8:, None, None]) * (1 + emb[:, :8, None, None]),
        "must become": lambda norm, h, emb: ada_gn(norm, h, 2 * emb),
    },
    "adm_block": {
        "different sizes": partial(adm_block, both=False),
        "not after it": partial(adm_block, early=False),
        "depend on emb": partial(adm_block, use_emb=False),
        "no activation": partial(adm_block, emb_activation=nn.Identity()),
        "before the linear layer": lambda block, x, emb: adm_block(
            block,
            x,
            emb,
            emb_activation=nn.Identity(),
            modulate=lambda norm, h, e: lesson_3.ada_gn(norm, h, F.silu(e)),
        ),
        "skip connection": partial(adm_block, skip=False),
        "SiLU before each": partial(adm_block, activation=nn.Identity()),
        "norm_1, SiLU, resample": partial(adm_block, order=lambda norm, resample, x: resample(F.silu(x))),
        "through block.skip": partial(adm_block, project=False),
        "not an addition": lambda block, x, emb: adm_block(block, x, emb, modulate=added_emb),
        "is None in a block": lambda block, x, emb: adm_block(block, block.resample(x), emb),
        "after norm_1": partial(adm_block, order=lambda norm, resample, x: F.silu(norm(resample(x)))),
        "after AdaGN": lambda block, x, emb: adm_block(
            block, x, emb, modulate=lambda norm, h, e: lesson_3.ada_gn(norm, F.silu(h), e), last=nn.Identity()
        ),
    },
    "split_heads": {
        "plain reshape": lambda x, heads: x.reshape(len(x), heads, x.shape[1], -1),
        "every third": lambda x, heads: x.unflatten(2, (-1, heads)).permute(0, 3, 1, 2),
        "expected (2, 3, 5, 4)": lambda x, heads: x.unflatten(2, (heads, -1)),
    },
    "class_conditional": {
        "not learn the class": partial(ClassConditional, of=lambda unet, x, t, e: unet(x, t)),
        "not y itself": lambda unet, n, c: ClassConditional(unet, n, c, table=lambda n, c: nn.Identity()),
        "UNet was not called": partial(ClassConditional, of=lambda unet, x, t, e: x),
        "t as they are": partial(ClassConditional, of=lambda unet, x, t, e: unet(x, 0 * t, embedding=e)),
        "t stays as it is": partial(ClassConditional, of=lambda unet, x, t, e: unet(x, t + e)),
        "classes first": partial(ClassConditional, table=lambda n, c: nn.Embedding(c, n)),
        "when only y changes": partial(ClassConditional, seen=lambda t, y: t),
        "no parameter of shape": partial(
            ClassConditional, table=lambda n, c: lambda y: y[:, None].float().expand(-1, c)
        ),
        "self.unet": partial(ClassConditional, stored=False),
        "expected (4, 6)": partial(ClassConditional, table=lambda n, c: nn.Embedding(n, n)),
        "No gradient": partial(ClassConditional, of=lambda unet, x, t, e: unet(x, t, embedding=e.detach())),
        "reaches the rows": partial(ClassConditional, seen=lambda t, y: y // 2),
    },
    "log_density": {
        "per clean image": partial(log_density, join=lambda e: e),
        "wrong dimension": partial(log_density, join=lambda e: e.logsumexp(0)),
        "return its logarithm": partial(log_density, join=lambda e: e.logsumexp(1).exp()),
        "must count less": partial(log_density, sign=1),
        "near the data": partial(log_density, join=lambda e: -e.logsumexp(1)),
        "The mean is not x_0": partial(log_density, root=torch.ones_like),
        "have the factor": partial(log_density, root=lambda a: a),
        "not its root": partial(log_density, power=0.5),
        "is missing": partial(log_density, factor=1),
        "do not average": partial(log_density, reduce=torch.mean),
        "nearest image": partial(log_density, join=lambda e: e.amax(1)),
        "densities first": partial(log_density, join=lambda e: e.sum(1)),
        "then take the logarithm": partial(log_density, join=lambda e: e.mean(1)),
        "makes room": lambda x_t, data, a: (x_t - a.sqrt() * data).square().sum((1, 2, 3)),
        "not alpha_bar": lambda x_t, data, a: log_density(x_t, data, a, factor=2 * a / (1 - a)),
        "Square the distances": lambda x_t, data, a: (
            -(x_t[:, None] - a.sqrt() * data).flatten(2).norm(dim=2) / (2 * (1 - a))
        ).logsumexp(1),
        "must differ by": partial(log_density, factor=3),
        "use logsumexp": partial(log_density, join=lambda e: e.exp().sum(1).log()),
        "expected (6,)": partial(log_density, join=lambda e: e.logsumexp(1).sum()),
    },
    "guided_mean": {
        "on the step": lambda mean, variance, g, s: mean + s * g,
        "the variance belongs": lambda mean, variance, g, s: mean + s * variance.sqrt() * g,
        "Downhill": lambda mean, variance, g, s: mean - s * variance * g,
        "scale is missing": lambda mean, variance, g, s: mean + variance * g,
        "smaller the shift": lambda mean, variance, g, s: mean + s * g / variance,
        "must move by": lambda mean, variance, g, s: mean + 2 * s * variance * g,
        "return a tensor": lambda mean, variance, g, s: print(end=""),
    },
    "log_p_gradient": {
        "the logarithm": lambda *args: log_p_gradient(*args, log_p=lambda logits: logits.softmax(1)),
        "softmax is missing": lambda *args: log_p_gradient(*args, log_p=lambda logits: logits),
        "sign is wrong": lambda *args: -log_p_gradient(*args),
        "size of the batch": lambda *args: log_p_gradient(*args) / 5,
        "enable_grad": lambda classifier, x, t, y: torch.autograd.grad(classifier(x, t).sum(), x)[0],
        "x_t.detach()": lambda *args: log_p_gradient(*args, start=lambda x: x),
        "must get t": lambda classifier, x, t, y: log_p_gradient(classifier, x, 0 * t, y),
        "as your function gets them": lambda classifier, x, t, y: log_p_gradient(classifier, x, t[0], y),
        "the class y": lambda c, x, t, y: log_p_gradient(c, x, t, 0 * y),
        "gather one each": partial(log_p_gradient, pick=lambda log_p, y: log_p[:, y]),
        "over all classes": partial(log_p_gradient, pick=lambda log_p, y: log_p),
        "a single number": partial(log_p_gradient, add=lambda of_y: of_y),
        "one gradient per input": lambda *args: (log_p_gradient(*args),),
        "over the batch": partial(log_p_gradient, log_p=lambda logits: logits.log_softmax(0)),
    },
    "guided_noise": {
        "sign is wrong": lambda eps, g, a, s: eps + s * (1 - a).sqrt() * g,
        "by the factor": lambda eps, g, a, s: eps - s * g,
        "scale is missing": lambda eps, g, a, s: eps - (1 - a).sqrt() * g,
        "you divide by it": lambda eps, g, a, s: eps - s * g / (1 - a).sqrt(),
        "Turn it into a noise": lambda eps, g, a, s: s * g - eps / (1 - a).sqrt(),
        "the root of": lambda eps, g, a, s: eps - s * (1 - a) * g,
        "not sqrt(alpha_bar)": lambda eps, g, a, s: eps - s * a.sqrt() * g,
        "gradient alone": lambda eps, g, a, s: s * (eps - (1 - a).sqrt() * g),
        "must be": lambda eps, g, a, s: eps - 2 * s * (1 - a).sqrt() * g,
    },
    "classifier_loss": {
        "clean images": lambda *args: classifier_loss(*args, noisy=False),
        "noise is zero": lambda *args: classifier_loss(*args, noise=torch.zeros_like),
        "from randn": lambda *args: classifier_loss(*args, noise=torch.rand_like),
        "the same t": lambda *args: classifier_loss(*args, shift=400),
        "always gets t = 0": lambda d, c, x, y: classifier_loss(d, lambda x_t, t: c(x_t, 0 * t), x, y),
        "softmax itself": lambda *args: classifier_loss(
            *args, of=lambda logits, y: F.cross_entropy(logits.softmax(1), y)
        ),
        "t of its own": lambda d, c, x, y: classifier_loss(d, c, x, y, torch.full((len(x),), 500)),
        "single number": lambda *args: classifier_loss(
            *args, of=lambda logits, y: F.cross_entropy(logits, y, reduction="none")
        ),
        "log 10": lambda *args: classifier_loss(*args, of=lambda logits, y: 1 + logits.square().mean()),
        "nll_loss expects": lambda *args: classifier_loss(*args, of=F.nll_loss),
        "not called": lambda *args: torch.tensor(2.3026),
    },
}


class OneHotClassConditional(ClassConditional):
    """A linear layer on one-hot vectors: the same function as a table."""

    def __init__(self, unet, classes, width):
        linear = nn.Linear(classes, width, bias=False)
        super().__init__(unet, classes, width, table=lambda n, c: lambda y: linear(F.one_hot(y, n).float()))
        self.linear = linear


class ParameterClassConditional(nn.Module):
    """A bare parameter of another name, which is a table, too."""

    def __init__(self, unet, classes, width):
        super().__init__()
        self.unet, self.embedding = unet, nn.Parameter(torch.randn(classes, width))

    def forward(self, x_t, t, y):
        return self.unet(x_t, t, embedding=self.embedding[y])


@pytest.mark.parametrize("answer", [OneHotClassConditional, ParameterClassConditional])
def test_other_forms_of_the_class_vectors_are_right(answer):
    assert judge(answer, checks_3.class_conditional) == "correct."


# -- lesson 4 ------------------------------------------------------------------------------------------------


def merge_again(tokens, pair):
    """Merge what has just been merged once more."""
    tokens = list(tokens)
    for i in reversed(range(len(tokens) - 1)):
        if (tokens[i], tokens[i + 1]) == pair:
            tokens[i : i + 2] = ["".join(pair)]
    return tokens


def merge_first(tokens, pair):
    i = next((i for i in range(len(tokens)) if tuple(tokens[i : i + 2]) == pair), None)
    return list(tokens) if i is None else [*tokens[:i], "".join(pair), *tokens[i + 2 :]]


def attention(q, k, v, scale=4, dim=1):
    return (q @ k.T / scale).softmax(dim) @ v


def plain_exponential(q, k, v):
    weights = (q @ k.T / 4).exp()
    return weights / weights.sum(1, keepdim=True) @ v


def merge_past_the_end(tokens, pair):
    return ["".join(pair) if (tokens[i], tokens[i + 1]) == pair else tokens[i] for i in range(len(tokens))]


def transformer_block(
    block,
    x,
    parts_first=False,
    ln_1=None,
    ln_2=None,
    activation=F.gelu,
    skip=(1, 1),
    merged=lambda y: y.transpose(1, 2).flatten(2),
    norm_skip=(False, False),
):
    qkv, split = block.qkv((ln_1 or block.ln_1)(x)), lesson_3.split_heads
    if parts_first:
        q, k, v = (split(part, block.num_heads) for part in qkv.chunk(3, -1))
    else:
        q, k, v = split(qkv, block.num_heads).chunk(3, -1)
    x = skip[0] * (block.ln_1(x) if norm_skip[0] else x) + block.proj(merged(lesson_4.attention(q, k, v)))
    carried = block.ln_2(x) if norm_skip[1] else x
    return skip[1] * carried + block.fc_2(activation(block.fc_1((ln_2 or block.ln_2)(x))))


def block_in_place(block, x):
    x += transformer_block(block, x) - x
    return x


def parallel_block(block, x):
    return transformer_block(block, x, skip=(1, 0)) * 0 + block.fc_2(F.gelu(block.fc_1(block.ln_2(x)))) + x


def text_forward(transformer, tokens, mask, select=None, pool=lambda states: states[:, -1]):
    x, padding = transformer.token_embedding(tokens), transformer.padding_embedding
    position, mask = transformer.positional_embedding, mask[..., None]
    inputs = (select or (lambda *p: torch.where(p[3], p[0] + p[1], p[2])))(x, position, padding, mask)
    states = transformer.transform(inputs)
    return transformer.proj(pool(states)), states


def text_attention(layer, x, states, cat=torch.cat, skip=True, put_together=lambda y: y.mT.flatten(1, 2)):
    (q, k, v), (text_k, text_v) = layer.project_qkv(x), layer.project_text(states)
    attended = lesson_4.attention(q, cat([text_k, k], 2), torch.cat([text_v, v], 2))
    return layer.proj(put_together(attended)).view_as(x) + (x if skip else 0)


def added_before_proj(layer, x, states):
    (q, k, v), (text_k, text_v) = layer.project_qkv(x), layer.project_text(states)
    attended = lesson_4.attention(q, torch.cat([text_k, k], 2), torch.cat([text_v, v], 2))
    return layer.proj(x.flatten(2) + attended.mT.flatten(1, 2)).view_as(x)


def queries_from_both(layer, x, states):
    (q, k, v), (text_k, text_v) = layer.project_qkv(x), layer.project_text(states)
    keys = torch.cat([text_k, k], 2)
    attended = lesson_4.attention(torch.cat([text_k, q], 2), keys, torch.cat([text_v, v], 2))
    return x + layer.proj(attended.mT.flatten(1, 2)).view_as(x)


def exchanged_after_proj(layer, x, states):
    (q, k, v), (text_k, text_v) = layer.project_qkv(x), layer.project_text(states)
    attended = lesson_4.attention(q, torch.cat([text_k, k], 2), torch.cat([text_v, v], 2))
    return x + layer.proj(attended.mT.flatten(1, 2)).mT.reshape(x.shape)


def separate_attention(layer, x, states, text=1, image=1):
    (q, k, v), (text_k, text_v) = layer.project_qkv(x), layer.project_text(states)
    attended = text * lesson_4.attention(q, text_k, text_v) + image * lesson_4.attention(q, k, v)
    return x + layer.proj(attended.mT.flatten(1, 2)).view_as(x)


def velocity_loss(
    network,
    process,
    x_0,
    tokens,
    mask,
    draw_t=lambda n: torch.randint(1000, (n,)),
    target=None,
    noisy=True,
    channels=slice(3),
    reduce=torch.mean,
    text=lambda network, *args: network.encode_text(*args),
    shift=0,
    shape=(-1, 1, 1, 1),
    repeat=1,
):
    t, noise = draw_t(len(x_0)), torch.randn_like(x_0)
    x_t = process.q_sample(x_0, t, noise) if noisy else x_0
    output = network(x_t, t, text=text(network, tokens, mask))[:, channels]
    alpha_bar_t = process.alpha_bar[(t + shift) % 1000].float().view(shape)
    target = (target or lesson_4.velocity)(x_0, noise, alpha_bar_t)
    return reduce((output - (target if repeat == 1 else target.repeat(1, repeat, 1, 1))).square())


def without_gradient(network, *args):
    return network.encode_text(*args).detach()


def converted(wrapper, x_t, t, function=None, shape=(-1, 1, 1, 1), channels=3, **text):
    output, alpha_bar_t = wrapper.network(x_t, t, **text), wrapper.alpha_bar[t].view(shape)
    eps_hat = (function or lesson_4.noise_from_velocity)(x_t, output[:, :channels], alpha_bar_t)
    return torch.cat([eps_hat, output[:, channels:]], 1)


def root_of(a):
    return a.sqrt(), (1 - a).sqrt()


WRONG_4 = {
    "merge": {
        "became": merge_again,
        "stayed as it is": lambda tokens, pair: tokens,
        "never equals a tuple": lambda tokens, pair: list(tokens),
        "must not change the text": lambda tokens, pair: [t for t in tokens if t not in pair],
        "return a list": lambda tokens, pair: "".join(tokens),
        "has changed": lambda tokens, pair: tokens.append("x"),
        "wanted is": lambda tokens, pair: merge_first(tokens, pair),
        "no neighbor on its right": merge_past_the_end,
    },
    "attention": {
        "not divided": partial(attention, scale=1),
        "divided by d": partial(attention, scale=16),
        "number of keys": partial(attention, scale=6**0.5),
        "over the queries": partial(attention, dim=0),
        "softmax is missing": lambda q, k, v: (q @ k.T / 4) @ v,
        "inf or NaN": plain_exponential,
        "expected (4, 3)": lambda q, k, v: attention(q, k, v).T,
        "differs from PyTorch": lambda q, k, v: attention(-q, k, v),
        "transpose k (.mT)": lambda q, k, v: (q @ k / 4).softmax(-1) @ v,
        "is right for q [Q, d]": lambda q, k, v: (q @ k.T / 4).softmax(-1) @ v,
        "dim=-1 in softmax": lambda q, k, v: (q @ k.mT / 4).softmax(1) @ v,
    },
    "transformer_block": {
        "before the heads": partial(transformer_block, parts_first=True),
        "around the attention": partial(transformer_block, skip=(0, 1)),
        "around the MLP": partial(transformer_block, skip=(1, 0)),
        "`ln_1`": partial(transformer_block, ln_1=lambda x: x),
        "`ln_2`": partial(transformer_block, ln_2=lambda x: x),
        "no GELU": partial(transformer_block, activation=lambda x: x),
        "has a ReLU": partial(transformer_block, activation=F.relu),
        "mixed up": partial(transformer_block, merged=lambda y: y.reshape(3, 5, 8)),
        "to [N, L, width]": partial(transformer_block, merged=lambda y: y.mT.flatten(1, 2).mT[:, :4]),
        "wrong width. `attention`": partial(transformer_block, merged=lambda y: y.mT.flatten(1, 2)),
        "gets the wrong width": partial(transformer_block, merged=lambda y: y.flatten(2)),
        "has a SiLU": partial(transformer_block, activation=F.silu),
        "not ln_1(x)": partial(transformer_block, norm_skip=(True, False)),
        "without ln_2": partial(transformer_block, norm_skip=(False, True)),
        "without LayerNorm": partial(transformer_block, norm_skip=(True, True)),
        "works in place": block_in_place,
        "first the attention": parallel_block,
    },
    "text_forward": {
        "mask is not used": partial(text_forward, select=lambda x, pos, pad, mask: x + pos),
        "inverted": partial(text_forward, select=lambda x, pos, pad, mask: torch.where(mask, pad, x + pos)),
        "added to the padding": partial(
            text_forward, select=lambda x, pos, pad, mask: torch.where(mask, x, pad) + pos
        ),
        "not added to them": partial(text_forward, select=lambda x, pos, pad, mask: x + pos + pad * ~mask),
        "positions are missing": partial(
            text_forward, select=lambda x, pos, pad, mask: torch.where(mask, x, pad)
        ),
        "padding is zero": partial(
            text_forward, select=lambda x, pos, pad, mask: torch.where(mask, x + pos, 0.0)
        ),
        "token states differ": partial(
            text_forward, select=lambda x, pos, pad, mask: torch.where(mask, x - pos, pad)
        ),
        "use mask[..., None]": partial(
            text_forward, select=lambda x, pos, pad, mask: torch.where(mask[..., 0], x + pos, pad)
        ),
        "mean over all positions": partial(text_forward, pool=lambda states: states.mean(1)),
        "first position": partial(text_forward, pool=lambda states: states[:, 0]),
        "last token": lambda *args: text_forward(
            *args, pool=lambda states: states[torch.arange(3), args[2].sum(1) - 1]
        ),
        "apply `proj`": partial(text_forward, pool=lambda states: states[:, -2]),
        "Return two things": lambda *args: text_forward(*args)[1],
        "outputs are exchanged": lambda *args: text_forward(*args)[::-1],
    },
    "text_attention": {
        "text is missing": partial(separate_attention, text=0),
        "the text only": partial(separate_attention, image=0),
        "two attentions": separate_attention,
        "skip connection": partial(text_attention, skip=False),
        "before `proj`": added_before_proj,
        "different orders": partial(text_attention, cat=lambda kv, dim: torch.cat(kv[::-1], dim)),
        "add up to 1 over the 4": partial(separate_attention, text=0.5),
        "heads put together": partial(text_attention, put_together=lambda y: y.mT.flatten(1, 2).flip(1)),
        "(.mT)": partial(text_attention, put_together=lambda y: y.flatten(1, 2)),
        "then flatten": partial(text_attention, put_together=lambda y: y.mT),
        "which is 2": partial(text_attention, cat=lambda kv, dim: torch.cat(kv, 1)),
        "shape of `features`": lambda layer, x, states: x + layer.proj(x.flatten(2)),
        "Only the image has queries": queries_from_both,
        "needs no .mT": exchanged_after_proj,
        "expected (2, 8, 3, 3)": lambda *args: text_attention(*args).flatten(2),
    },
    "velocity": {
        "sign is wrong": lambda x_0, noise, a: root_of(a)[1] * x_0 - root_of(a)[0] * noise,
        "sign of x_0": lambda x_0, noise, a: root_of(a)[0] * noise + root_of(a)[1] * x_0,
        "each other's": lambda x_0, noise, a: root_of(a)[0] * x_0 - root_of(a)[1] * noise,
        "becomes minus the sine": lambda x_0, noise, a: root_of(a)[1] * noise - root_of(a)[0] * x_0,
        "x_t itself": lambda x_0, noise, a: root_of(a)[0] * x_0 + root_of(a)[1] * noise,
        "roots of": lambda x_0, noise, a: a * noise - (1 - a) * x_0,
        "derivative of x_t": lambda x_0, noise, a: noise - x_0,
    },
    "x_0_from_velocity": {
        "That is the noise": lambda x_t, v, a: root_of(a)[1] * x_t + root_of(a)[0] * v,
        "sign of v": lambda x_t, v, a: root_of(a)[0] * x_t + root_of(a)[1] * v,
        "each other's": lambda x_t, v, a: root_of(a)[1] * x_t - root_of(a)[0] * v,
        "That is -x_0": lambda x_t, v, a: root_of(a)[1] * v - root_of(a)[0] * x_t,
        "treats v as the noise": lambda x_t, v, a: (x_t - root_of(a)[1] * v) / root_of(a)[0],
        "not the image": lambda x_t, v, a: a * x_t - (1 - a) * v,
    },
    "noise_from_velocity": {
        "That is x_0": lambda x_t, v, a: root_of(a)[0] * x_t - root_of(a)[1] * v,
        "sign of v": lambda x_t, v, a: root_of(a)[1] * x_t - root_of(a)[0] * v,
        "each other's": lambda x_t, v, a: root_of(a)[0] * x_t + root_of(a)[1] * v,
        "negative noise": lambda x_t, v, a: -root_of(a)[1] * x_t - root_of(a)[0] * v,
        "v itself": lambda x_t, v, a: v,
        "not the noise": lambda x_t, v, a: (v + root_of(a)[1] * x_t) / root_of(a)[0],
    },
    "convert_output": {
        "are missing": lambda *args, **text: lesson_4.convert_output(*args, **text)[:, :3],
        "have changed": lambda *args, **text: lesson_4.convert_output(*args, **text).flip(1).roll(3, 1),
        "still the velocity": lambda wrapper, *args, **text: wrapper.network(*args, **text),
        "does not reach": lambda wrapper, x_t, t, **text: lesson_4.convert_output(wrapper, x_t, t),
        "use `noise_from_velocity`": partial(converted, function=lesson_4.x_0_from_velocity),
        "use .view": partial(converted, shape=(-1,)),
        "only the first three": partial(converted, channels=6),
    },
    "velocity_loss": {
        "caption is missing": lambda network, process, x_0, tokens, mask: x_0.mean(),
        "not called": lambda network, *args: network.encode_text(*args[-2:]).mean(),
        "single number": partial(velocity_loss, reduce=lambda e: e.mean((1, 2, 3))),
        "same t": partial(velocity_loss, draw_t=lambda n: torch.randint(1000, (1,)).expand(n)),
        "from 0 to 999": partial(velocity_loss, draw_t=lambda n: torch.randint(100, (n,))),
        "clean images": partial(velocity_loss, noisy=False),
        "target is the noise": partial(velocity_loss, target=lambda x_0, noise, a: noise),
        "target is the image": partial(velocity_loss, target=lambda x_0, noise, a: x_0),
        "negative velocity": partial(velocity_loss, target=lambda *args: -lesson_4.velocity(*args)),
        "noise exchanged": partial(
            velocity_loss, target=lambda x_0, noise, a: lesson_4.velocity(noise, x_0, a)
        ),
        "no gradient": torch.no_grad()(velocity_loss),
        "for the variance": partial(velocity_loss, channels=slice(6), repeat=2),
        "six channels": partial(velocity_loss, channels=slice(6)),
        "use .view": partial(velocity_loss, shape=(-1,)),
        "another mask": partial(
            velocity_loss, text=lambda network, tokens, mask: network.encode_text(tokens, ~mask)
        ),
        "mask than the batch's": partial(
            velocity_loss,
            text=lambda network, tokens, mask: network.encode_text(tokens, torch.ones_like(mask)),
        ),
        "other tokens": partial(
            velocity_loss, text=lambda network, tokens, mask: network.encode_text(tokens.flip(0), mask)
        ),
        "without the caption": partial(velocity_loss, text=lambda network, *args: None),
        "same noise and the same t": partial(velocity_loss, shift=300),
        "take the mean": partial(velocity_loss, reduce=torch.sum),
        "reaches the text transformer": partial(velocity_loss, text=without_gradient),
    },
}


def encoder_with(tokens, mask, pooled=lambda pooled: pooled, states=lambda states: states):
    result = empty_file.encoder(tokens, mask)
    return pooled(result[0]), states(result[1])


def encoder_without_order(tokens, mask):
    return empty_file.encoder(torch.where(mask, tokens, 99).sort(1)[0].clamp(max=29), mask)


def read_text_with(x, states, text=True, image=True, shift=0):
    """Let image positions attend to the text and to each other, without weights."""
    keys, values = [states] * text + [x] * image, [states.roll(shift, 1)] * text + [x] * image
    return x + lesson_4.attention(x, torch.cat(keys, 1), torch.cat(values, 1))


def loss_with(network, x_0, text, target=lesson_4.velocity, reduce=torch.mean):
    t, noise = torch.randint(1000, (len(x_0),)), torch.randn_like(x_0)
    a = empty_file.alpha_bar[t].view(-1, 1, 1, 1)
    v = network(a.sqrt() * x_0 + (1 - a).sqrt() * noise, t, text)
    return reduce((v - target(x_0, noise, a)).square())


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({}, "attention: correct.\nencoder: correct.\nread_text: correct.\nloss: correct.\n"),
        ({"attention": partial(attention, scale=1)}, "attention: not yet. The scores are not divided"),
        ({"encoder": lambda tokens, mask: empty_file.encoder(tokens, mask | True)}, "Use the mask"),
        ({"encoder": encoder_without_order}, "order of the words is lost"),
        ({"encoder": partial(encoder_with, pooled=torch.ones_like)}, "pooled embedding is the same"),
        ({"encoder": partial(encoder_with, states=torch.ones_like)}, "token states are the same"),
        ({"encoder": partial(encoder_with, pooled=lambda pooled: pooled[:1])}, "expected (2, 64)"),
        ({"read_text": read_text_with}, "read_text: correct."),
        ({"read_text": partial(read_text_with, text=False)}, "all attend to text"),
        ({"read_text": partial(read_text_with, image=False)}, "not attend to each other"),
        ({"read_text": partial(read_text_with, shift=1)}, "in the same order"),
        ({"loss": partial(loss_with, target=lambda x_0, noise, a: noise)}, "that knows the velocity has"),
        ({"loss": partial(loss_with, reduce=torch.sum)}, "that returns 0 has"),
        ({"loss": partial(loss_with, reduce=lambda e: e[0].mean())}, "only the first image"),
        ({"loss": partial(loss_with, reduce=lambda e: e.mean((1, 2, 3)))}, "expected ()"),
    ],
)
def test_the_empty_file_of_lesson_4_is_checked(wrong, said, capsys):
    torch.manual_seed(0)
    names = ("attention", "encoder", "read_text", "loss")
    checks_4.empty_file(*(wrong.get(name, getattr(empty_file, name)) for name in names))
    assert said in capsys.readouterr().out


# -- lesson 5 ------------------------------------------------------------------------------------------------


def guide(cond, uncond, scale, channels, variance="cond"):
    eps = uncond[:, :channels] + scale * (cond[:, :channels] - uncond[:, :channels])
    rest = {"cond": cond, "uncond": uncond}[variance][:, channels:]
    return torch.cat([eps, rest], 1)


def threshold(x_0, percentile, per_image=True, least=1.0, divide=True, size=torch.abs):
    s = size(x_0).flatten(1).quantile(percentile / 100, dim=1) if per_image else x_0.abs().quantile(0.9)
    s = s.clamp(min=least).view(-1, 1, 1, 1)
    return x_0.clamp(-s, s) / (s if divide else 1)


def interval(
    network,
    cond,
    uncond,
    scale,
    low,
    high,
    first=lambda t: t[0],
    turn=bool,
    outside_uncond=False,
    always_twice=False,
    combine=guide,
):
    def denoiser(x_t, t):
        inside = turn(low <= first(t) <= high)
        with_caption = network(x_t, t, cond if inside or not outside_uncond else uncond)
        without = network(x_t, t, uncond) if inside or always_twice else None
        return combine(with_caption, without, scale, x_t.shape[1]) if inside else with_caption

    return denoiser


def in_one_batch(network, cond, uncond, scale, low, high):
    def denoiser(x_t, t):
        both = network(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([cond, uncond]))
        return guide(*both.chunk(2), scale, x_t.shape[1])

    return denoiser


def everywhere(cond, uncond, scale, channels):
    return uncond + scale * (cond - uncond)


def sigma_of(lambda_):
    return (-2 * lambda_).sigmoid().sqrt()


def sigma_ratio(start, end):
    return sigma_of(end) / sigma_of(start)


def step(x, x_0, start, end, ratio=sigma_ratio, factor=sigma_of, sign=1, weight=torch.exp):
    return ratio(start, end) * x + sign * factor(end) * (weight(end) - weight(start)) * x_0


def alpha_of(lambda_):
    return sigma_of(-lambda_)


def lengths(h, i):
    return h[i], h[i - 1]


def solver(
    predict_x_0,
    x,
    lambdas,
    remember=True,
    twice=False,
    keep_middle=False,
    lengths=lengths,
    replace=True,
    part=1,
    extrapolates=lambda i, n: True,
):
    before, h = None, lambdas.diff()
    for i in range(len(h)):
        x_0 = predict_x_0(x, i)
        if twice:
            predict_x_0(x, i)
        second_order = before is not None and extrapolates(i, len(h))
        middle = lesson_5.x_0_in_the_middle(x_0, before, *lengths(h, i)) if second_order else x_0
        x = lesson_5.exponential_step(x, middle, lambdas[i], lambdas[i] + part * h[i])
        if remember and (replace or before is None):
            before = middle if keep_middle else x_0
    return x


def nearest(lambdas, wanted):
    return [(lambdas - value).abs().argmin().item() for value in wanted]


def even(lambdas, n, end=-1):
    return nearest(lambdas, torch.linspace(lambdas[0], lambdas[end], n, dtype=lambdas.dtype))


WRONG_SOLVER = {
    "8 times": partial(solver, twice=True),
    "step before it": partial(solver, remember=False),
    "not its extrapolation": partial(solver, keep_middle=True),
    "h and h_before are exchanged": partial(solver, lengths=lambda h, i: (h[i - 1], h[i])),
    "equally long": partial(solver, lengths=lambda h, i: (h[i], h[i])),
    "replaced in every step": partial(solver, replace=False),
    "ends in its middle": partial(solver, part=0.5),
    "once per step": lambda predict, x, lambdas: solver(predict, x, lambdas[:-1]),
    "asked at i = 4": lambda predict, x, lambdas: solver(lambda x, i: predict(x, i + 1), x, lambdas),
}


WRONG_5 = {
    "guide": {
        "variance is guided": everywhere,
        "which is s - 1": lambda cond, uncond, s, c: guide(cond, uncond, s + 1, c),
        "Only eps_hat comes back": lambda cond, uncond, s, c: guide(cond, uncond, s, c)[:, :c],
        "expected (2, 6, 4, 4)": lambda cond, uncond, s, c: guide(cond, uncond, s, c)[:1],
        "not the batch": lambda cond, uncond, s, c: torch.cat(
            [uncond[:c] + s * (cond[:c] - uncond[:c]), cond[c:]], 1
        ),
        "sign is wrong": lambda cond, uncond, s, c: guide(cond, uncond, -s, c),
        "those of cond": partial(guide, variance="uncond"),
        "exchanged": lambda cond, uncond, s, c: guide(cond, uncond, 1 - s, c),
        "no effect": lambda cond, uncond, s, c: cond,
        "changes cond or uncond": lambda cond, uncond, s, c: guide(
            cond, uncond.sub_(uncond - uncond.roll(1)), s, c
        ),
        "With channels = 1": lambda cond, uncond, s, c: guide(cond, uncond, s, 3),
    },
    "drop_captions": {
        "Add an axis": lambda mask, p: mask & (torch.rand(len(mask)) > p),
        "with a bool": lambda mask, p: mask & (torch.rand(len(mask), 1) > p).float(),
        "must stay bool": lambda mask, p: mask * (torch.rand(len(mask), 1) > p).float(),
        "some of their tokens": lambda mask, p: mask & (torch.rand(mask.shape) > p),
        "shares one random number": lambda mask, p: mask & (torch.rand(1) > p),
        "wrong way round": lambda mask, p: mask & (torch.rand(len(mask), 1) < p),
        "became a token": lambda mask, p: torch.ones_like(mask) & (torch.rand(len(mask), 1) > p),
        "has changed": lambda mask, p: mask.logical_and_(torch.rand(len(mask), 1) > p).clone(),
        "drop the same captions": lambda mask, p: mask & (torch.arange(len(mask)) >= p * len(mask))[:, None],
    },
    "dynamic_threshold": {
        "plain clipping": lambda x_0, percentile: x_0.clamp(-1, 1),
        "its own percentile": partial(threshold, per_image=False),
        "at least 1": partial(threshold, least=0.0),
        "remain": partial(threshold, divide=False),
        "not clipped at": lambda x_0, p: threshold(x_0, 99),
        "Add axes": lambda x_0, p: x_0 / x_0.abs().flatten(1).quantile(p / 100, dim=1),
        "divide the percentile": lambda x_0, p: x_0 * x_0.flatten(1).quantile(p, dim=1)[:, None, None, None],
        "absolute value first": lambda x_0, p: threshold(x_0, p, size=lambda x_0: x_0),
        "its own percentile. Take one per image": lambda x_0, p: threshold(
            x_0.flatten(0, 1)[:, None], p
        ).view_as(x_0),
        "clipped at 1": lambda x_0, p: (
            x_0.clamp(-1, 1) / (threshold(x_0, p, divide=False).abs().amax((1, 2, 3), True).clamp(min=1))
        ),
    },
    "interval_denoiser": {
        "compare t[0]": partial(interval, first=lambda t: t),
        "does not return a function": lambda network, cond, *rest: network(
            torch.zeros(2, 3, 4, 4), torch.zeros(2), cond
        ),
        "use <=": lambda network, cond, uncond, s, low, high: interval(
            network, cond, uncond, s, low + 1, high - 1
        ),
        "is not guided": partial(interval, turn=lambda inside: not inside),
        "outside of the interval 300 to 600": partial(interval, turn=lambda inside: True),
        "must get cond": partial(interval, outside_uncond=True),
        "must be evaluated once": partial(interval, always_twice=True),
        "two predictions are exchanged": lambda network, cond, uncond, *rest: interval(
            network, uncond, cond, *rest
        ),
        "t is a tensor": partial(interval, first=lambda t: t.item()),
        "call the network twice": in_one_batch,
        "variance is guided": partial(interval, combine=everywhere),
        "neither the guided": partial(interval, combine=lambda *args: 2 * guide(*args)),
    },
    "exponential_step": {
        "upside down": partial(step, ratio=lambda start, end: sigma_of(start) / sigma_of(end)),
        "lacks its factor sigma_end / sigma_start": partial(step, ratio=lambda start, end: 1),
        "lacks its factor sigma_end.": partial(step, factor=lambda end: 1),
        "e^end - e^start": partial(step, sign=-1),
        "e^lambda is missing": partial(step, weight=lambda lambda_: lambda_),
        "exchanged": partial(step, ratio=lambda start, end: alpha_of(end) / alpha_of(start), factor=alpha_of),
        "is the square root": lambda x, x_0, start, end: step(
            x, x_0, start, end, lambda a, b: sigma_ratio(a, b) ** 2, lambda end: sigma_of(end) ** 2
        ),
        "is not e^(end - start)": lambda x, x_0, start, end: (
            sigma_ratio(start, end) * x + sigma_of(end) * (end - start).exp() * x_0
        ),
        "integrate it": lambda x, x_0, start, end: (
            sigma_ratio(start, end) * x + sigma_of(end) * (end - start) * start.exp() * x_0
        ),
        "in the middle is": lambda x, x_0, start, end: (
            sigma_ratio(start, end) * x + sigma_of(end) * (end - start) * ((start + end) / 2).exp() * x_0
        ),
        "the 2 is missing": partial(
            step, ratio=lambda a, b: sigma_ratio(a / 2, b / 2), factor=lambda end: sigma_of(end / 2)
        ),
        "at the end of the step": lambda x, x_0, start, end: (
            sigma_ratio(start, end) * x + sigma_of(start) * (end.exp() - start.exp()) * x_0
        ),
        "The paper's h": lambda x, x_0, start, end: (
            sigma_ratio(start, end) * x + alpha_of(end) * (1 - (end - start).exp()) * x_0
        ),
        "must become": lambda x, x_0, start, end: x_0,
    },
    "x_0_in_the_middle": {
        "start of the step": lambda x_0, before, h, h_before: x_0,
        "end of the step": lambda x_0, before, h, h_before: x_0 + (x_0 - before) * h / h_before,
        "sign is wrong": lambda x_0, before, h, h_before: x_0 - (x_0 - before) * h / (2 * h_before),
        "equally long": lambda x_0, before, h, h_before: x_0 + (x_0 - before) / 2,
        "h and h_before are exchanged": lambda x_0, before, h, h_before: (
            x_0 + (x_0 - before) * h_before / (2 * h)
        ),
        "in parentheses": lambda x_0, before, h, h_before: x_0 + (x_0 - before) * h / 2 * h_before,
        "followed from x_0_before": lambda x_0, before, h, h_before: (
            before + (x_0 - before) * h / (2 * h_before)
        ),
        "without h_before": lambda x_0, before, h, h_before: (
            x_0 + (x_0 - before) * (h + h_before) / (2 * h_before)
        ),
        "h is missing": lambda x_0, before, h, h_before: x_0 + (x_0 - before) / (2 * h_before),
        "mean of both": lambda x_0, before, h, h_before: (x_0 + before) / 2,
        "is 3.05": lambda x_0, before, h, h_before: before,
    },
    "dpm_solver": {
        **WRONG_SOLVER,
        "That is exercise 5.10": partial(solver, extrapolates=lambda i, n: i < n - 1),
        "steps of unequal length": partial(solver, lengths=lambda h, i: (h[i], h[0])),
        "should by 4": partial(solver, extrapolates=lambda i, n: i % 2),
        "is off by": lambda predict, x, lambdas: 2 * solver(predict, x, lambdas),
    },
    "dpm_solver_final": {
        **WRONG_SOLVER,
        "still extrapolates": solver,
        "last two steps": partial(solver, extrapolates=lambda i, n: i < n - 2),
        "other way round": partial(solver, extrapolates=lambda i, n: i == n - 1),
        "four times as long": partial(solver, extrapolates=lambda i, n: i == 2),
        "limited to 1": partial(solver, lengths=lambda h, i: (min(h[i], h[i - 1]), h[i - 1])),
        "nothing but the last one": lambda predict, x, lambdas: 2 * solver(predict, x, lambdas),
    },
    "even_in_lambda": {
        "increasing": lambda lambdas, n: even(lambdas, n)[::-1],
        "sort the timesteps": lambda lambdas, n: list({63: 0, 0: 0, 100: 0, 45: 0, 89: 0, 77: 0}),
        "even in t": lambda lambdas, n: torch.linspace(0, 100, n).round().int().tolist(),
        "and should from": partial(even, end=-2),
        "Six timesteps": lambda lambdas, n: even(lambdas, n - 1)[::-1] if n > 6 else [0, 50, 100],
        "yours are": lambda lambdas, n: [t + (t == 45) for t in even(lambdas, n)],
        "occur twice": lambda lambdas, n: sorted(even(lambdas, n)),
    },
}

# -- lesson 6 ------------------------------------------------------------------------------------------------


def load_batch(folder, order=sorted, mode="RGB", size=(64, 64), scale=127.5, axes=(2, 0, 1), fit=False):
    images, captions = [], []
    for path in order(folder.glob("*.jpg")):
        image = Image.open(path)
        image = ImageOps.fit(image.convert(mode), size) if fit else image.convert(mode).resize(size)
        pixels = torch.from_numpy(np.array(image)).float()
        images.append(pixels.permute(*axes) / scale - (1 if scale == 127.5 else 0))
        captions.append(path.with_suffix(".txt").read_text(encoding="utf-8").strip())
    return torch.stack(images), captions


def accumulate(network, loss_fn, batch, parts, zero=True, weigh=True, inside=False):
    if zero and not inside:
        network.zero_grad()
    chunks = list(zip(*(x.chunk(parts) for x in batch)))
    for chunk in chunks:
        if inside:
            network.zero_grad()
        loss = loss_fn(network, *chunk).mean()
        (loss / len(chunks) if weigh else loss).backward()


def shift_schedule(alpha_bar, k, by=None, factor=lambda a, shifted: (a / shifted).sqrt()):
    ratio = alpha_bar / (1 - alpha_bar) / (by or k**2)
    return ratio / (1 + ratio), factor(alpha_bar, ratio / (1 + ratio))


def text_to_image_loss(
    model, x_0, tokens, mask, dropout, keep=None, t=None, noise=None, target=None, reduce=(1, 2, 3), text=None
):
    n, (network, process, _) = len(x_0), model
    keep = torch.rand(n, 1) >= dropout if keep is None else keep(mask, dropout)
    encoded = network.encode_text(tokens, mask & keep)
    text = encoded if text is None else text
    t = torch.randint(10, (n,)) if t is None else t(n)
    noise = torch.randn_like(x_0) if noise is None else noise(x_0)
    x_t = process.q_sample(x_0, t, noise)
    v_hat = network.network(x_t, t, text=text)[:, :3]
    a = process.alpha_bar[t].float().view(-1, 1, 1, 1)
    v = a.sqrt() * noise - (1 - a).sqrt() * x_0
    return (v_hat - (v if target is None else target(v, noise))).square().mean(reduce)


def text_to_image_noise(model, x_0, tokens, mask, dropout):
    network, process, _ = model
    text = network.encode_text(tokens, mask & (torch.rand(len(mask), 1) >= dropout))
    t, noise = torch.randint(10, (len(x_0),)), torch.randn_like(x_0)
    eps_hat = network(process.q_sample(x_0, t, noise), t, text=text)[:, :3]
    return (eps_hat - noise).square().mean((1, 2, 3))


def text_to_image(
    model, tokenizer, prompts, scale, steps, guide=None, start=torch.randn, kept=None, last=None, empty=""
):
    network, process, _ = model
    cond = encode_prompts(network, tokenizer, prompts)
    uncond = encode_prompts(network, tokenizer, [empty] * len(prompts))

    def denoiser(x_t, t):
        c, u = network(x_t, t, text=cond), network(x_t, t, text=uncond)
        return u + scale * (c - u) if guide is None else guide(c, u, scale)

    process = process.respace_evenly(steps) if kept is None else kept(process)
    samples = [*dpmpp_2m_sample(process, denoiser, start(len(prompts), 3, 4, 4))]
    return samples[-1].x_prev if last is None else last(samples)


def drops_nothing_or_tokens(mask):
    return mask.all() or (mask.any(1) != mask.all(1)).any()


def one_backward(network, loss_fn, batch, parts):
    network.zero_grad()
    losses = [loss_fn(network, *chunk) for chunk in zip(*(x.chunk(parts) for x in batch))]
    torch.cat(losses).mean().backward()


def velocity_loss(
    model, x_0, tokens, mask, dropout, network=None, shape=(-1, 1, 1, 1), channels=3, factors=None
):
    text = model.network.encode_text(tokens, mask & (torch.rand(len(mask), 1) >= dropout))
    t, noise = torch.randint(10, (len(x_0),)), torch.randn_like(x_0)
    network = (network or (lambda model: model.network.network))(model)
    v_hat = network(model.process.q_sample(x_0, t, noise), t, text=text)[:, :channels]
    a = model.process.alpha_bar[t].float()
    v = a.view(-1, 1, 1, 1).sqrt() * noise - (1 - a.view(shape)).sqrt() * x_0
    if factors:
        noise_factor, x_0_factor = factors(a.view(shape))
        v = noise_factor * noise + x_0_factor * x_0
    return (v_hat - v).square().mean((1, 2, 3))


def one_empty_caption(model, tokenizer, prompts, scale, steps):
    network = model.network
    cond, uncond = encode_prompts(network, tokenizer, prompts), encode_prompts(network, tokenizer, [""])

    def denoiser(x_t, t):
        u = network(x_t, t, text=uncond)
        return u + scale * (network(x_t, t, text=cond) - u)

    x_T = torch.randn(len(prompts), *network.image_shape)
    return [*dpmpp_2m_sample(model.process.respace_evenly(steps), denoiser, x_T)][-1].x_prev


def schedule_is(alpha_bar, low, high):
    """A test of the SNR at t = 500, relative to the cosine schedule."""

    def test(process):
        ratio = process.alpha_bar[500] / (1 - process.alpha_bar[500]) * (1 - alpha_bar) / alpha_bar
        assert low < ratio < high

    return test


def fail_if(condition):
    def test(part):
        assert not condition(part)

    return test


COSINE_500 = GaussianDiffusion(cosine_betas(1000)).alpha_bar[500]
WRONG_6 = {
    "shift_schedule": {
        "alpha_bar itself": lambda a, k: (a / k**2, a),
        "the new ratio": lambda a, k: (a / (1 - a) / k**2, a),
        "is multiplied": lambda a, k: shift_schedule(a, k, 1 / k**2),
        "divided by k": lambda a, k: shift_schedule(a, k, k),
        "still divided by 4": lambda a, k: shift_schedule(a, k, 4),
        "their ratio is 4.000": lambda a, k: (a, a),
        "two tensors": lambda a, k: shift_schedule(a, k)[0],
        "Take the root": partial(shift_schedule, factor=lambda a, shifted: a / shifted),
        "upside down": partial(shift_schedule, factor=lambda a, shifted: (shifted / a).sqrt()),
        "shifted is right": partial(shift_schedule, factor=lambda a, shifted: 0 * a + 2),
    },
    "on_patches": {
        "must get the shape (2, 12, 4, 4), and gets (2, 3, 8, 8)": lambda net, x, t, size: net(x, t),
        "gets (2, 3, 4, 4)": lambda net, x, t, size: net(F.avg_pool2d(x, size), t),
        "still gets patches of 2x2": lambda net, x, t, size: lesson_6.on_patches(net, x, t, 2),
        "not its patch": lambda net, x, t, size: net(x.reshape(2, 3 * size**2, 8 // size, -1), t),
        "one position per patch": lambda net, x, t, size: net(F.pixel_unshuffle(x, size), t),
        "the timesteps t": lambda net, x, t, size: lesson_6.on_patches(net, x, t // size, size),
        "wrong order": lambda net, x, t, size: net(F.pixel_unshuffle(x, size), t).reshape(2, 6, 8, 8),
    },
    "text_to_image_loss": {
        "no caption is dropped": partial(text_to_image_loss, keep=lambda mask, p: mask),
        "Draw one number per image": partial(text_to_image_loss, keep=lambda mask, p: torch.rand(1) >= p),
        "all captions are dropped": partial(text_to_image_loss, keep=lambda mask, p: mask & False),
        "Single tokens": partial(text_to_image_loss, keep=lambda mask, p: torch.rand(mask.shape) >= p),
        "of the captions are dropped": partial(
            text_to_image_loss, keep=lambda mask, p: torch.rand(len(mask), 1) < p
        ),
        "encoded captions as text": partial(text_to_image_loss, text=torch.zeros(1)),
        "one timestep for each": partial(text_to_image_loss, t=lambda n: torch.full((n,), 3)),
        "only 0 to 8": partial(text_to_image_loss, t=lambda n: torch.randint(9, (n,))),
        "the same noise": partial(text_to_image_loss, noise=lambda x: torch.randn(1, 3, 2, 2).expand_as(x)),
        "q_sample": partial(text_to_image_loss, noise=torch.rand_like),
        "predicted noise with noise": text_to_image_noise,
        "compare it with the noise": partial(text_to_image_loss, target=lambda v, noise: noise),
        "wrong sign": partial(text_to_image_loss, target=lambda v, noise: -v),
        "factors are exchanged": partial(velocity_loss, factors=lambda a: ((1 - a).sqrt(), -a.sqrt())),
        "subtracted, not added": partial(velocity_loss, factors=lambda a: (a.sqrt(), (1 - a).sqrt())),
        "Take the roots": partial(velocity_loss, factors=lambda a: (a, a - 1)),
        "one loss per image": partial(text_to_image_loss, reduce=(0, 1, 2, 3)),
        "sum over the pixels": lambda *args: 12 * text_to_image_loss(*args),
        "not the error": lambda *args: 2 * text_to_image_loss(*args),
        "model.network predicts noise": partial(velocity_loss, network=lambda model: model.network),
        "has 10 timesteps": partial(text_to_image_loss, t=lambda n: torch.randint(1000, (n,))),
        "the first three are": partial(velocity_loss, channels=6),
        "the shape [N, 1, 1, 1]": partial(velocity_loss, shape=-1),
    },
    "text_to_image": {
        "white noise": partial(text_to_image, start=torch.zeros),
        "the last of the process": partial(text_to_image, kept=lambda p: p.respace(range(5))),
        "It visits 1000": partial(text_to_image, kept=lambda p: p),
        "still contains noise": partial(text_to_image, last=lambda steps: steps[0].x_prev),
        "without guidance": partial(text_to_image, guide=lambda c, u, s: c),
        "the unconditional sample": partial(text_to_image, guide=lambda c, u, s: u),
        "from the conditional prediction": partial(text_to_image, guide=lambda c, u, s: c + s * (c - u)),
        "are exchanged": partial(text_to_image, guide=lambda c, u, s: u + s * (u - c) + c - u),
        "must be eps_uncond": partial(text_to_image, empty="0"),
        "expected (2, 3, 4, 4)": partial(text_to_image, last=lambda steps: steps[-1].x_prev[0]),
        "2 images and 1 encoded": one_empty_caption,
        "from model.network.image_shape": partial(
            text_to_image, start=lambda n, *_: torch.randn(n, 3, 64, 64)
        ),
        "use model.network.": lambda model, *args: text_to_image(
            model._replace(network=model.network.network), *args
        ),
        "last_sample": lambda model, tokenizer, prompts, *args: torch.zeros(len(prompts), 3, 4, 4),
    },
    "test_range": {
        "have no negative value": fail_if(lambda x: x.abs().max() > 1),
        "images in [0, 255]": fail_if(lambda x: x.max() == 1 or 0 < x.min() < 1),
        "mean 0": fail_if(lambda x: x.min() >= 0),
        "from -0.8": fail_if(lambda x: x.min() != -1),
        "Write assert": lambda x: bool(x.min() < 0),
    },
    "test_every_timestep": {
        "never reach t = 999": fail_if(lambda draw_t: draw_t(100_000).min() != 0),
        "never reach t = 0": fail_if(lambda draw_t: draw_t(100_000).max() != 999),
        "not the right ones": fail_if(lambda draw_t: len(draw_t(100_000).unique()) != 1000),
        "no t = 1000": fail_if(lambda draw_t: not set(range(1000)) <= set(draw_t(100_000).tolist())),
        "by chance": fail_if(lambda draw_t: len(draw_t(1000).unique()) < 1000),
        "an odd t": fail_if(lambda draw_t: (draw_t(100_000).min(), draw_t(100_000).max()) != (0, 999)),
    },
    "test_captions_dropped": {
        "never drops": fail_if(lambda drop: not drop(torch.ones(2000, 9) > 0).any()),
        "single tokens": fail_if(lambda drop: drop(torch.ones(2000, 9) > 0).float().mean() > 0.9),
        "allow for chance": fail_if(lambda drop: drop(torch.ones(10, 9) > 0).any(1).sum() != 8),
        "drops all": fail_if(lambda drop: drops_nothing_or_tokens(drop(torch.ones(2000, 9) > 0))),
        "drops 80 %": fail_if(
            lambda drop: drops_nothing_or_tokens(m := drop(torch.ones(2000, 9) > 0)) or not m.any()
        ),
    },
    "test_finite": {
        "NaN in a parameter": fail_if(lambda network: False),
        "infinity": fail_if(lambda network: any(p.isnan().any() for p in network.parameters())),
        "are finite": fail_if(lambda network: True),
        "second parameter": fail_if(lambda network: not next(network.parameters()).isfinite().all()),
    },
    "test_schedule": {
        "multiplied by 4": fail_if(lambda process: False),
        "without a shift": schedule_is(COSINE_500, 0, 2),
        "divided by 2": schedule_is(COSINE_500, 0, 0.7),
        "divided by 16": schedule_is(COSINE_500, 0, 0.3),
        "a quarter of the cosine": schedule_is(COSINE_500, 0.9, 1.1),
        "Write assert": lambda process: process.alpha_bar[500] < 0.3,
    },
    "load_batch": {
        "convert('RGB')": lambda folder: load_batch(folder, mode=None),
        "channels come last": partial(load_batch, axes=(0, 1, 2)),
        "Sort the files": partial(load_batch, order=lambda paths: sorted(paths, reverse=True)),
        "[-1, 1]": partial(load_batch, scale=255),
        "Rows and columns": partial(load_batch, axes=(2, 1, 0)),
        "do not crop": partial(load_batch, fit=True),
        "in UTF-8": lambda folder: (load_batch(folder)[0], ["a dog"] * 4),
        "list of captions": lambda folder: (list(load_batch(folder)[0]), load_batch(folder)[1]),
        "two things": lambda folder: load_batch(folder)[0],
        "float32": lambda folder: (load_batch(folder)[0].double(), load_batch(folder)[1]),
    },
    "accumulate_gradients": {
        "step before": partial(accumulate, zero=False),
        "Twice the gradient": partial(accumulate, weigh=False),
        "between the parts": partial(accumulate, inside=True),
        "4, 4 and 2": accumulate,
        "at once": lambda *args: lesson_6.accumulate_gradients(*args[:3], 1),
        "no gradient": lambda network, loss_fn, batch, parts: network.zero_grad(),
        "no backward between": one_backward,
        "gradient of the sum": lambda network, loss_fn, batch, parts: lesson_6.accumulate_gradients(
            network, lambda *args: len(batch[0]) * loss_fn(*args), batch, parts
        ),
    },
}


def noisy(x, a, noise):
    return a**0.5 * x + (1 - a) ** 0.5 * noise


def seeded():
    return torch.Generator().manual_seed(0)


def upsampler_inputs(
    process, image, level, small=lambda x: F.avg_pool2d(x, 4), noisy=None, draw=torch.randn_like
):
    low_res = small(image)
    noisy = noisy or type(process).q_sample
    return {"low_res": noisy(process, low_res, level, draw(low_res)), "noise_level": level}


def upsampler_loss(network, process, image, text, t, level, told=None, noisy_t=None, target=None, **changes):
    """A right answer that can be made wrong; changes: other inputs of the network than the right ones."""
    noise = torch.randn_like(image)
    x_t = process.q_sample(image, t if noisy_t is None else noisy_t(t, level), noise)
    low_res = process.q_sample(F.avg_pool2d(image, 4), level, torch.randn(len(image), 3, 16, 16))
    inputs = {"low_res": low_res, "noise_level": level if told is None else told(t)}
    inputs |= {name: change(image, noise, process, t, level) for name, change in changes.items()}
    a = process.alpha_bar[t].float().view(-1, 1, 1, 1)
    v = a.sqrt() * noise - (1 - a).sqrt() * image
    v = v if target is None else target(v, noise, image)
    return (network(x_t, t, text, **inputs)[:, :3] - v).square().mean((1, 2, 3))


def same_noise(image, noise, process, t, level):
    return process.q_sample(F.avg_pool2d(image, 4), level, 4 * F.avg_pool2d(noise, 4))


def repaint_step(reverse, insert, forward, x_t, repeats, last=False, again=True, early=True):
    x = x_t
    for i in range(repeats):
        x_prev = reverse(x)
        x_prev = insert(x_prev) if early or i == repeats - 1 else x_prev
        if i < repeats - 1 or last:
            x_forward = forward(x_prev)
            x = x_forward if again else x_t
    return x_prev


def clip_loss(images, captions, scale, normalize=F.normalize, ways=2, factor=1):
    logits = scale * normalize(images) @ normalize(captions).T
    right = torch.arange(len(images))
    return factor * sum(F.cross_entropy(x, right) for x in (logits, logits.T)[:ways]) / ways


def clip_loss_of_logits(images, captions, scale, criterion):
    logits, right = scale * F.normalize(images) @ F.normalize(captions).T, torch.arange(len(images))
    return criterion(logits, right)


def similarity_gradient(
    encode, captions, x_t, t, scale, grad=True, t_of=lambda t: t, total=lambda a, b: (a * b).sum(), f=1
):
    with torch.set_grad_enabled(grad):
        x_t = x_t.detach().requires_grad_(True)
        return f * scale * torch.autograd.grad(total(encode(x_t, t_of(t)), captions), x_t)[0]


def similarity_gradient_with_graph(encode, captions, x_t, t, scale):
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_(True)
        total = (encode(x_t, t) * captions).sum()
        return scale * torch.autograd.grad(total, x_t, create_graph=True)[0]


WRONG_EDITING = {
    "upsampler_inputs": {
        "fifteen are lost": partial(upsampler_inputs, small=lambda x: x[:, :, ::4, ::4]),
        "mean of 4x4": partial(upsampler_inputs, small=lambda x: F.max_pool2d(x, 4)),
        "noise is missing": partial(upsampler_inputs, noisy=lambda p, x, level, noise: x),
        "smaller first": lambda p, image, level: {
            "low_res": F.avg_pool2d(p.q_sample(image, level, torch.randn_like(image)), 4),
            "noise_level": level,
        },
        "full strength": partial(
            upsampler_inputs,
            noisy=lambda p, x, level, noise: x + (1 - p.alpha_bar[level[0]].item()) ** 0.5 * noise,
        ),
        "at timestep": partial(
            upsampler_inputs, noisy=lambda p, x, level, noise: p.q_sample(x, level // 2, noise)
        ),
        "each time": partial(upsampler_inputs, draw=lambda x: torch.randn(x.shape, generator=seeded())),
        "a dict": lambda *args: upsampler_inputs(*args)["low_res"],
        "as it is given": lambda *args: upsampler_inputs(*args) | {"noise_level": 300},
    },
    "upsampler_loss": {
        "has no noise": partial(upsampler_loss, low_res=lambda image, *_: F.avg_pool2d(image, 4)),
        "the noise of `level`": partial(
            upsampler_loss, low_res=lambda image, noise, p, t, level: same_noise(image, noise, p, t, t)
        ),
        "independently": partial(upsampler_loss, low_res=same_noise),
        "level of its low_res": partial(upsampler_loss, told=lambda t: t),
        "noise of timestep t": partial(upsampler_loss, noisy_t=lambda t, level: level),
        "target is the noise": partial(upsampler_loss, target=lambda v, noise, image: noise),
        "target is the image": partial(upsampler_loss, target=lambda v, noise, image: image),
        "wrong sign": partial(upsampler_loss, target=lambda v, noise, image: -v),
        "expected (8,)": lambda *args: upsampler_loss(*args).mean(),
        "first three": lambda network, p, image, text, t, level: (
            network(image, t, text, image, level) - image
        ).square(),
        "does not get low_res and noise_level": lambda network, p, image, text, t, level: (
            network(image, t, text)[:, :3].square().mean((1, 2, 3))
        ),
        "for each image": lambda *args: 2 * upsampler_loss(*args),
    },
    "insert_known": {
        "no noise": lambda x, image, keep, a, noise: torch.where(keep > 0, image, x),
        "exchanged": lambda x, image, keep, a, noise: torch.where(keep > 0, x, noisy(image, a, noise)),
        "what was sampled": lambda x, image, keep, a, noise: noisy(image, a, noise),
        "full strength": lambda x, image, keep, a, noise: torch.where(keep > 0, image + 0.6**0.5 * noise, x),
        "must replace it": lambda x, image, keep, a, noise: x + keep * noisy(image, a, noise),
    },
    "repaint_step": {
        "no forward step after": partial(repaint_step, last=True),
        "start from the result": partial(repaint_step, again=False),
        "then insert": lambda reverse, insert, forward, x, n: reverse(x),
        "wanted is reverse": lambda reverse, insert, forward, x, n: insert(reverse(x)),
        "the network's own pixels": partial(repaint_step, early=False),
    },
    "expand_inputs": {
        "come first": lambda w, more: F.pad(w, (0, 0, 0, 0, more, 0)),
        "must be zero": lambda w, more: torch.cat([w, torch.randn(5, more, 3, 3)], 1),
        "stay as they are": lambda w, more: torch.zeros(5, 3 + more, 3, 3),
        "expected (5, 7, 3, 3)": lambda w, more: F.pad(w, (0, more)),
    },
    "inpainting_inputs": {
        "has to fill": lambda image, keep: torch.cat([image, keep], 1),
        "exchanged": lambda image, keep: torch.cat([image * (1 - keep), 1 - keep], 1),
        "mask is missing": lambda image, keep: image * keep,
        "then the mask": lambda image, keep: torch.cat([keep, image * keep], 1),
    },
    "sdedit_start": {
        "counts from 0": lambda x, s, a, noise: (round(s * 100), x),
        "two values": lambda x, s, a, noise: x,
        "little noise": lambda x, s, a, noise: (round((1 - s) * 100) - 1, x),
        "noise alone": lambda x, s, a, noise: (round(s * 100) - 1, noise),
        "eq. 4": lambda x, s, a, noise: (round(s * 100) - 1, x),
        "t must be": lambda x, s, a, noise: (7, x),
    },
    "clip_loss": {
        "length 1": partial(clip_loss, normalize=lambda x: x),
        "Only one direction": partial(clip_loss, ways=1),
        "multiplied by scale": lambda x, y, scale: clip_loss(x, y, 1 / scale),
        "are added": partial(clip_loss, factor=2),
        "column i": lambda x, y, scale: clip_loss(x, y.roll(1, 0), scale),
        "dim=1": partial(clip_loss, normalize=partial(F.normalize, dim=0)),
        "Do not take exp": lambda x, y, scale: clip_loss(x, y, scale.exp()),
        "no softmax": partial(
            clip_loss_of_logits,
            criterion=lambda logits, right: (
                sum(F.cross_entropy(p, right) for p in (logits.softmax(1), logits.softmax(1).T)) / 2
            ),
        ),
        "are missing": lambda x, y, scale: -F.cosine_similarity(x, y).mean(),
        "one of N captions": partial(
            clip_loss_of_logits,
            criterion=lambda logits, right: F.binary_cross_entropy_with_logits(logits, torch.eye(len(right))),
        ),
    },
    "similarity_gradient": {
        "enable_grad": partial(similarity_gradient, grad=False),
        "has a graph": similarity_gradient_with_graph,
        "timestep t": partial(similarity_gradient, t_of=torch.zeros_like),
        "scale is missing": lambda *args: similarity_gradient(*args[:4], 1),
        "size of the batch": partial(similarity_gradient, total=lambda a, b: (a * b).sum(1).mean()),
        "sign is wrong": partial(similarity_gradient, f=-1),
        "elementwise": partial(similarity_gradient, total=lambda a, b: (a @ b.T).sum()),
    },
}


def flow_loss(network, x_0, s, noise, factors=lambda w: (1 - w, w), target=None, time=lambda s: s):
    image_factor, noise_factor = factors(s.view(-1, 1, 1, 1))
    target = noise - x_0 if target is None else target(x_0, noise)
    return (network(image_factor * x_0 + noise_factor * noise, time(s)) - target).square().mean((1, 2, 3))


def euler(velocity, x, times, sign=1, at_end=False, fixed=False, last=False):
    start = x
    for s, s_next in pairwise(times):
        x = x + sign * (s_next - s) * velocity(start if fixed else x, s_next if at_end else s)
    return x + 0 * velocity(x, times[-1]) if last else x


def euler_in_place(velocity, x, times):
    for s, s_next in pairwise(times):
        x += (s_next - s) * velocity(x, s)
    return x


def euler_in_equal_steps(velocity, x, times):
    for s in times[:-1]:
        x = x - velocity(x, s) / (len(times) - 1)
    return x


def to_flow(x_t, eps_hat, alpha_bar, s=None, divide=True, sign=1):
    good_s, x_s, velocity = flow_solutions.flow_from_diffusion(x_t, eps_hat, alpha_bar)
    return good_s if s is None else s(alpha_bar), x_s if divide else x_t, sign * velocity


WRONG_FLOW = {
    "flow_loss": {
        "are exchanged": partial(flow_loss, factors=lambda w: (w, 1 - w)),
        "square roots": partial(flow_loss, factors=lambda w: ((1 - w).sqrt(), w.sqrt())),
        "point of the line": partial(flow_loss, factors=lambda w: (1, w)),
        "also be given tau": partial(flow_loss, time=lambda s: 1 - s),
        "from the noise to the image": partial(flow_loss, target=lambda x_0, noise: x_0 - noise),
        "Your target is the noise": partial(flow_loss, target=lambda x_0, noise: noise),
        "Your target is the image": partial(flow_loss, target=lambda x_0, noise: x_0),
        "expected (4,)": lambda *args: flow_loss(*args).mean(),
        "tau.view": lambda network, x_0, s, noise: network((1 - s) * x_0 + s * noise, s),
    },
    "euler": {
        "wrong way": partial(euler, sign=-1),
        "three steps between": partial(euler, last=True),
        "must fall by 1": partial(euler, sign=2),
        "Take it at its start": partial(euler, at_end=True),
        "not at the first one": partial(euler, fixed=True),
        "caller's noise": euler_in_place,
        "equally long": euler_in_equal_steps,
        "one time for the whole batch": lambda velocity, x, times: euler(
            lambda x, s: velocity(x, s.expand(len(x))), x, times
        ),
    },
    "flow_from_diffusion": {
        "tau = 1 - alpha_bar": partial(to_flow, s=lambda a: 1 - a),
        "tau = sigma": partial(to_flow, s=lambda a: (1 - a).sqrt()),
        "must solve": partial(to_flow, s=lambda a: a / 2),
        "as it is": partial(to_flow, divide=False),
        "wrong sign": partial(to_flow, sign=-1),
        "three values": lambda *args: to_flow(*args)[2],
        "eps_hat minus": partial(to_flow, sign=2),
    },
}
WRONG = {
    1: WRONG_1,
    2: WRONG_2,
    3: WRONG_3,
    4: WRONG_4,
    5: WRONG_5,
    6: WRONG_6,
    "editing": WRONG_EDITING,
    "flow": WRONG_FLOW,
}


@pytest.mark.parametrize("lesson, name", ALL)
def test_every_exercise_has_at_least_three_wrong_answers(lesson, name):
    assert len(WRONG[lesson][name]) >= 3


@pytest.mark.parametrize(
    "lesson, name, message",
    [(lesson, name, message) for lesson, name in ALL for message in WRONG[lesson][name]],
)
def test_wrong_answers_hear_what_is_wrong(lesson, name, message):
    check, answer = getattr(LESSONS[lesson][0], name), WRONG[lesson][name][message]
    verdict = judge(answer, check)
    assert verdict.startswith("not yet. ") and message in verdict, verdict
    assert "\n" not in verdict


# -- the machinery -------------------------------------------------------------------------------------------


@numbered("1.5")
def check_double(answer):
    if answer(torch.ones(2)).tolist() != [2, 2]:
        raise WrongAnswer("1 becomes 2.")


def double(x):
    return 2 * x


def blank(x):
    """Return 2 x."""
    ...


@torch.no_grad()
def blank_below_a_decorator(x): ...


def forgetful(x):
    x = 2 * x


def passes(x):
    pass


def test_a_right_answer_is_used(capsys):
    def mine(x):
        return x + x

    assert exercise(mine, check=check_double, reference=double) is mine
    assert capsys.readouterr().out == "Exercise 1.5: correct.\n"


@pytest.mark.parametrize(
    "answer, verdict",
    [
        (blank, "to do."),
        (passes, "to do."),
        (lambda x: x, "not yet. 1 becomes 2."),
        (forgetful, "not yet. It raises AttributeError: 'NoneType' object has no attribute 'tolist'"),
    ],
    ids=["blank", "passes", "wrong", "forgetful"],
)
def test_a_blank_or_wrong_answer_is_replaced_by_the_reference(answer, verdict, capsys):
    assert exercise(answer, check=check_double, reference=double) is double
    expected = f"Exercise 1.5: {verdict} The notebook continues with the reference solution.\n"
    assert capsys.readouterr().out == expected


def test_only_functions_without_code_are_blank():
    assert is_blank(blank) and is_blank(passes) and is_blank(blank_below_a_decorator)
    assert not any(is_blank(f) for f in (double, forgetful, lambda x: x, lambda x: 1, partial(blank)))


def test_a_wrong_shape_is_named():
    expect_shape(torch.zeros(2, 3), (2, 3))
    with pytest.raises(WrongAnswer, match=r"It returns the shape \(3, 2\); expected \(2, 3\)\."):
        expect_shape(torch.zeros(3, 2), (2, 3))
    with pytest.raises(WrongAnswer, match=r"It returns NoneType; return a tensor\."):
        expect_shape(None, (2, 3))
