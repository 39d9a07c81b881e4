"""Classifier guidance (Dhariwal & Nichol 2021, section 4).

Bayes' rule says p(x_t | y) ~ p(x_t) p(y | x_t), so the score of the samples that a classifier takes for y is

    grad log p(x_t | y) = grad log p(x_t) + grad log p(y | x_t)

and the second term is the gradient of a classifier that can read x_t.
"""

import torch

from lesson_01_ddpm.diffusion import clip


def classifier_gradient(classifier, y, scale=1.0):
    """scale * grad log p(y | x_t) with respect to x_t, as a function (x_t, t) -> [N, C, H, W].

    classifier: (x_t, t) -> logits [N, K]. y: the classes wanted, int64 [N]. scale: above 1 the
    samples are surer of y, and less diverse.
    """

    def gradient(x_t, t):
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_(True)
            log_p = classifier(x_t, t).float().log_softmax(1)
            return scale * torch.autograd.grad(log_p.gather(1, y[:, None]).sum(), x_t)[0]

    return gradient


def guide_mean(gradient):
    """For `ddpm_sample(..., guide=)`: p(x_{t-1} | x_t) moves by its variance * gradient (algorithm 1)."""

    def guide(diffusion, p, x_t, t):
        return p.mean + p.log_variance.exp() * diffusion.ask(gradient, x_t, t)

    return guide


def guide_noise(diffusion, denoiser, gradient, bound=clip):
    """A denoiser that answers eps_hat - sqrt(1 - alpha_bar) gradient (algorithm 2), for `ddim_sample`.

    diffusion: the whole process, with all its timesteps. The predicted x_0 is bounded before the gradient
    is added and not after, so sample with bound=None.
    """

    def guided(x_t, t):
        x_0 = diffusion.x_0_from_noise(x_t, t, denoiser(x_t, t)[:, : x_t.shape[1]].float())
        eps_hat = diffusion.noise_from_x_0(x_t, t, bound(x_0) if bound else x_0)
        spread = (1 - diffusion.alpha_bar).sqrt()
        return eps_hat - diffusion.at(spread, t, x_t) * gradient(x_t, t)

    return guided
