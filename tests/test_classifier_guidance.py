"""Classifier guidance of two Gaussian classes, whose mixture and classifier are known exactly."""

import math
from functools import partial

import pytest
import torch

from lesson_01_ddpm.diffusion import GaussianDiffusion, ddpm_sample, linear_betas
from lesson_02_improved_ddpm.ddim import ddim_sample
from lesson_03_adm.classifier_guidance import classifier_gradient, condition_mean, condition_score
from lesson_03_adm.noisy_classifier import exact_classifier, loss_classifier
from lesson_03_adm.solutions import log_density

DIFFUSION = GaussianDiffusion(linear_betas(1000))
MEANS, VARIANCE = torch.tensor([-0.5, 0.5]), 0.01  # of every pixel, given the class


def spread_of(t):
    """Return sqrt(alpha_bar) and the variance of x_t given the class, each [N, 1, 1, 1]."""
    alpha_bar = DIFFUSION.alpha_bar[t].float().view(-1, 1, 1, 1)
    return alpha_bar.sqrt(), alpha_bar * VARIANCE + 1 - alpha_bar


def class_denoiser(x_t, t, y):
    """Return the exact eps_hat = -sqrt(1 - alpha_bar) grad log p(x_t | y)."""
    signal, variance = spread_of(t)
    return (1 - signal**2).sqrt() * (x_t - signal * MEANS[y].view(-1, 1, 1, 1)) / variance


def classifier(x_t, t):
    """Return log p(x_t | y) + constant for both y, the logits of p(y | x_t) of equally frequent classes."""
    signal, variance = spread_of(t)
    distances = [(x_t - signal * mean).square() / (2 * variance) for mean in MEANS]
    return -torch.stack([d.flatten(1).sum(1) for d in distances], 1)


def mixture_denoiser(x_t, t):
    share = classifier(x_t, t).softmax(1)
    each = [class_denoiser(x_t, t, torch.full((len(x_t),), y)) for y in (0, 1)]
    return sum(share[:, y].view(-1, 1, 1, 1) * each[y] for y in (0, 1))


X_T, T, Y = torch.randn(6, 1, 2, 2), torch.tensor([5, 100, 300, 500, 700, 999]), torch.tensor([0, 1] * 3)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_bayes_rule(scale):
    """Scale 1 gives the class's own denoiser, every other scale that of classifier-free guidance."""
    gradient = classifier_gradient(classifier, Y, scale)
    guided = condition_score(DIFFUSION, mixture_denoiser, gradient, denoised_fn=None)(X_T, T)
    cond, uncond = class_denoiser(X_T, T, Y), mixture_denoiser(X_T, T)
    torch.testing.assert_close(guided, uncond + scale * (cond - uncond), rtol=1e-3, atol=1e-3)


def test_the_gradient_by_finite_differences():
    gradient = classifier_gradient(classifier, Y, scale=2.0)(X_T, T)
    step = torch.zeros_like(X_T)
    step[:, 0, 1, 0] = 1e-2
    above, below = (classifier(X_T + s, T).log_softmax(1)[range(6), Y] for s in (step, -step))
    torch.testing.assert_close(gradient[:, 0, 1, 0], 2 * (above - below) / 2e-2, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("method", ["mean", "score"])
def test_guided_samples_are_of_the_class(method):
    """Unguided samples are half of each class; guided ones have the mean and the spread of their class."""
    torch.manual_seed(0)
    n, few = 400, DIFFUSION.respace_evenly(250)
    y = torch.ones(n, dtype=torch.long)
    gradient = classifier_gradient(classifier, y)
    x_T = torch.randn(n, 1, 2, 2)
    if method == "mean":
        sampler, denoiser = partial(ddpm_sample, mean_fn=condition_mean(gradient)), mixture_denoiser
    else:
        sampler, denoiser = (
            partial(ddim_sample, denoised_fn=None),
            condition_score(DIFFUSION, mixture_denoiser, gradient),
        )
    *_, free = ddpm_sample(few, mixture_denoiser, x_T)
    assert 0.4 < (free.x_prev.mean((1, 2, 3)) > 0).float().mean() < 0.6
    *_, last = sampler(few, denoiser, x_T)
    samples = last.x_prev
    assert samples.mean((1, 2, 3)).min() > 0.2
    assert samples.mean() == pytest.approx(0.5, abs=0.02)
    assert samples.std() == pytest.approx(math.sqrt(VARIANCE), rel=0.2)


def test_the_sampler_does_not_learn():
    """Only the image has a gradient: no parameter receives one, and no graph is kept."""
    layer = torch.nn.Linear(4, 2)
    x_t = torch.randn(6, 1, 2, 2)
    with torch.no_grad():
        gradient = classifier_gradient(lambda x, t: layer(x.flatten(1)), Y)(x_t, T)
    assert layer.weight.grad is None and not gradient.requires_grad and not x_t.requires_grad
    assert gradient.abs().sum() > 0


def test_the_loss_is_the_cross_entropy_of_the_prediction_from_x_t():
    torch.manual_seed(0)
    x_0 = MEANS[Y].view(-1, 1, 1, 1).expand(-1, 1, 2, 2).repeat(500, 1, 1, 1)
    seen = []

    def spy(x_t, t):
        seen.append(t)
        return classifier(x_t, t)

    losses = loss_classifier(DIFFUSION, spy, x_0, Y.repeat(500))
    t = seen[0]
    assert t.min() < 10 and t.max() > 990
    assert losses[t < 60].mean() < 1e-3  # little noise: the class is certain
    assert losses[t > 900].mean().item() == pytest.approx(
        math.log(2), abs=0.03
    )  # no information about the class is left


def test_the_exact_classifier_of_a_finite_data_set():
    """Its logits are log p(x_t, y) up to a constant that is the same for all classes."""
    images, labels = 0.5 * torch.randn(7, 1, 4, 4), torch.tensor([0, 1, 2, 1, 0, 2, 2])
    x_t, t = torch.randn(5, 1, 4, 4), torch.full((5,), 300)
    alpha_bar_t = DIFFUSION.alpha_bar[300].float()
    wanted = torch.stack([log_density(x_t, images[labels == y], alpha_bar_t) for y in range(3)], 1)
    logits = exact_classifier(DIFFUSION, images, labels)(x_t, t)
    torch.testing.assert_close(logits.log_softmax(1), wanted.log_softmax(1), rtol=1e-4, atol=1e-4)
