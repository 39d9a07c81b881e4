"""Denoising diffusion: the forward process, its posterior, the simple loss, and ancestral sampling.

Everything of Ho et al. 2020 ("DDPM") that is not the network. Two conventions hold in all lessons:

- t counts from 0: t = 0 is one noising step, t = T - 1 is nearly pure noise (the paper's t is ours + 1).
- A *denoiser* is any function `denoiser(x_t, t) -> output`, whose first C channels are eps_hat, the guess of
  the noise in x_t [N, C, H, W]. Whatever it is conditioned on is bound beforehand.
"""

from typing import NamedTuple

import torch

from common.data import check_range


def linear_betas(num_timesteps):
    """From 1e-4 to 0.02 at T = 1000 (Ho et al. 2020, section 4); for another T > 20 scaled by 1000 / T."""
    if num_timesteps <= 20:
        raise ValueError(
            f"a linear schedule of {num_timesteps} timesteps has betas over 1; take more than 20"
        )
    return torch.linspace(0.1 / num_timesteps, 20 / num_timesteps, num_timesteps, dtype=torch.float64)


def betas_of(alpha_bar):
    """The betas whose 1 - beta multiply up to alpha_bar, float64 [T]."""
    return 1 - alpha_bar / torch.cat([torch.ones(1).double(), alpha_bar[:-1]])


class Reverse(NamedTuple):
    """p(x_{t-1} | x_t), a Gaussian, and the x_0 it was made from; each [N, C, H, W]."""

    mean: torch.Tensor
    log_variance: torch.Tensor
    x_0: torch.Tensor


class Step(NamedTuple):
    """What a sampler yields, from the noisiest step to the cleanest; the last `x_prev` is the sample."""

    t: int  # index of the step in the diffusion that was sampled
    x_t: torch.Tensor
    x_0: torch.Tensor  # predicted from x_t
    x_prev: torch.Tensor  # x_{t-1}


def clip(x_0):
    return x_0.clamp(-1, 1)


class GaussianDiffusion:
    """q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) and what follows from it. Tables are float64
    [T].

    timesteps: the number of each step in the process that the network was trained on, which is what a network
    is told. It is 0 .. T-1 except in a diffusion made by `keep`.
    """

    def __init__(self, betas, timesteps=None):
        self.betas = torch.as_tensor(betas, dtype=torch.float64)
        if self.betas.ndim != 1 or not ((self.betas > 0) & (self.betas < 1)).all():
            raise ValueError("betas must be a vector of numbers strictly between 0 and 1")
        self.num_timesteps = len(self.betas)
        self.timesteps = torch.arange(self.num_timesteps) if timesteps is None else torch.as_tensor(timesteps)

        self.alpha_bar = (1 - self.betas).cumprod(0)
        self.alpha_bar_prev = torch.cat([torch.ones(1).double(), self.alpha_bar[:-1]])
        # q(x_{t-1} | x_t, x_0) = N(coef1 x_0 + coef2 x_t, beta_tilde), eq. 6-7
        self.beta_tilde = self.betas * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)
        self.posterior_mean_coef1 = self.betas * self.alpha_bar_prev.sqrt() / (1 - self.alpha_bar)
        self.posterior_mean_coef2 = (1 - self.alpha_bar_prev) * (1 - self.betas).sqrt() / (1 - self.alpha_bar)
        # beta_tilde is 0 at t = 0, where no noise is added; its logarithm borrows the next step's value.
        first = self.beta_tilde[1:2] if self.num_timesteps > 1 else self.betas
        self.posterior_log_variance = torch.cat([first, self.beta_tilde[1:]]).log()
        self.log_betas = self.betas.log()

    def at(self, table, t, x):
        """table[t] as float32 [N, 1, 1, 1] on x's device. t: int64 [N]."""
        return table[t.cpu()].float().to(x.device).view(-1, *[1] * (x.ndim - 1))

    def keep(self, timesteps):
        """The same forward process seen at some of its timesteps only: alpha_bar there is as before.

        timesteps: increasing indices into this diffusion (Nichol & Dhariwal 2021, section 4).
        """
        timesteps = torch.as_tensor(timesteps)
        return GaussianDiffusion(betas_of(self.alpha_bar[timesteps]), self.timesteps[timesteps])

    def evenly(self, num_steps):
        """Keep `num_steps` timesteps, evenly spaced from the last to the first. Raises ValueError."""
        if not 1 <= num_steps <= self.num_timesteps:
            raise ValueError(f"cannot take {num_steps} of {self.num_timesteps} timesteps")
        spaced = torch.linspace(self.num_timesteps - 1, 0, num_steps, dtype=torch.float64)
        return self.keep(spaced.round().long().flip(0))

    # -- forward ---------------------------------------------------------------------------------------------

    def q_sample(self, x_0, t, noise):
        """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise (eq. 4)."""
        signal, spread = self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()
        return self.at(signal, t, x_0) * x_0 + self.at(spread, t, x_0) * noise

    def q_posterior_mean(self, x_0, x_t, t):
        """The mean of q(x_{t-1} | x_t, x_0) (eq. 7); its variance is `beta_tilde`."""
        coef1, coef2 = self.posterior_mean_coef1, self.posterior_mean_coef2
        return self.at(coef1, t, x_t) * x_0 + self.at(coef2, t, x_t) * x_t

    # -- between noise and image -----------------------------------------------------------------------------

    def x_0_from_noise(self, x_t, t, noise):
        """Solve `q_sample` for x_0."""
        scale, ratio = self.alpha_bar.rsqrt(), (1 / self.alpha_bar - 1).sqrt()
        return self.at(scale, t, x_t) * x_t - self.at(ratio, t, x_t) * noise

    def noise_from_x_0(self, x_t, t, x_0):
        """Solve `q_sample` for the noise."""
        scale, ratio = self.alpha_bar.rsqrt(), (1 / self.alpha_bar - 1).rsqrt()
        return (self.at(scale, t, x_t) * x_t - x_0) * self.at(ratio, t, x_t)

    # -- reverse ---------------------------------------------------------------------------------------------

    def ask(self, denoiser, x_t, t):
        """The denoiser's output at index t of this diffusion: the network is told the original timestep."""
        return denoiser(x_t, self.timesteps[t.cpu()].to(x_t.device)).float()

    def p_mean_variance(self, output, x_t, t, log_variance, bound=clip):
        """p(x_{t-1} | x_t): the posterior, with the network's guess in the place of x_0.

        output: the denoiser's. log_variance: a function (diffusion, output, x_t, t) -> [N, C or 1, H or 1, W
        or 1] such as `fixed_small`. bound: what is done to the predicted x_0; None leaves it as it is.
        """
        x_0 = self.x_0_from_noise(x_t, t, output[:, : x_t.shape[1]])
        x_0 = bound(x_0) if bound else x_0
        mean = self.q_posterior_mean(x_0, x_t, t)
        return Reverse(mean, log_variance(self, output, x_t, t).expand_as(mean), x_0)


def fixed_small(diffusion, output, x_t, t):
    """log beta_tilde_t: right when x_0 is a single point (Ho et al. 2020, section 3.2)."""
    return diffusion.at(diffusion.posterior_log_variance, t, x_t)


def fixed_large(diffusion, output, x_t, t):
    """log beta_t: right when x_0 is white noise (Ho et al. 2020, section 3.2)."""
    return diffusion.at(diffusion.log_betas, t, x_t)


def squared_error(output, noise):
    """Mean over C, H, W of |noise - eps_hat|^2, eps_hat being the first C channels of output: [N]."""
    return (noise - output[:, : noise.shape[1]]).square().flatten(1).mean(1)


def loss_simple(diffusion, denoiser, x_0, t, noise):
    """L_simple (eq. 14): how well the noise in x_t is guessed, one number a sample: [N].

    Raises ValueError if x_0 is plainly not scaled to [-1, 1].
    """
    check_range(x_0)
    return squared_error(diffusion.ask(denoiser, diffusion.q_sample(x_0, t, noise), t), noise)


def uniform(n, num_timesteps):
    """n timesteps, each drawn by itself, every one as likely as any other: int64 [n]."""
    return torch.randint(num_timesteps, (n,))


def loss_at_random_t(loss, diffusion, denoiser, x_0, draw_t=uniform):
    """What training minimises (algorithm 1): `loss` at a uniformly drawn t, with fresh noise: [N].

    t stays on the CPU, where the tables are: to ask a GPU for it would be to wait for all that it has to do.
    draw_t: (n, num_timesteps) -> int64 [n]; lesson 5 draws t in another way.
    """
    t = draw_t(len(x_0), diffusion.num_timesteps)
    return loss(diffusion, denoiser, x_0, t, torch.randn_like(x_0))


def gaussian_noise(x, generator):
    """White noise like x, drawn where the generator lives: on the CPU, it is the same for every device."""
    device = generator.device if generator else x.device
    return torch.randn(x.shape, generator=generator, device=device).to(x.device)


@torch.no_grad()
def ddpm_sample(diffusion, denoiser, x_T, generator=None, log_variance=fixed_small, bound=clip, guide=None):
    """Ancestral sampling (algorithm 2) from x_T, white noise [N, C, H, W]. Yields a Step per timestep.

    guide: (diffusion, p, x_t, t) -> another mean than p's; lesson 3 uses it.
    """
    x_t = x_T
    for i in reversed(range(diffusion.num_timesteps)):
        t = torch.full((len(x_t),), i)
        output = diffusion.ask(denoiser, x_t, t)
        p = diffusion.p_mean_variance(output, x_t, t, log_variance, bound)
        x_prev = guide(diffusion, p, x_t, t) if guide else p.mean
        if i > 0:  # the last step gives the image: noise there would only be seen
            x_prev = x_prev + (0.5 * p.log_variance).exp() * gaussian_noise(x_t, generator)
        yield Step(i, x_t, p.x_0, x_prev)
        x_t = x_prev
