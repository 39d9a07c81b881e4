"""Denoising diffusion: the forward process, its posterior, the simple loss, and ancestral sampling.

This file is Ho et al. 2020 ("DDPM") without the network. Two conventions hold in all lessons:

- t counts from 0: t = 0 is one noising step, t = T - 1 is nearly pure noise (the paper's t is ours + 1).
- A *denoiser* is any function `denoiser(x_t, t) -> output` whose first C channels are eps_hat, the predicted
  noise in x_t [N, C, H, W]. Whatever it is conditioned on is bound beforehand (common/protocols.py).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.images import check_range
from common.protocols import DenoisedFn, Denoiser, LogVarianceFn, LossAtT, NoiseStreams, Process, SamplerStep


def linear_betas(num_timesteps: int) -> Float[Tensor, "{num_timesteps}"]:
    """Return betas from 1e-4 to 0.02 for T = 1000 (Ho et al. 2020, section 4), scaled by 1000 / T otherwise.

    Raises ValueError for T <= 20, where a beta would reach 1.
    """
    if num_timesteps <= 20:
        raise ValueError(
            f"a linear schedule of {num_timesteps} timesteps has betas of 1 or more; use at least 21"
        )
    return torch.linspace(0.1 / num_timesteps, 20 / num_timesteps, num_timesteps, dtype=torch.float64)


def betas_from_alpha_bar(alpha_bar: Float[Tensor, "T"]) -> Float[Tensor, "T"]:
    """Return the betas for which the cumulative product of 1 - beta is alpha_bar."""
    return 1 - alpha_bar / torch.cat([torch.ones(1).double(), alpha_bar[:-1]])


class PMeanVariance(NamedTuple):
    """The Gaussian p(x_{t-1} | x_t), and the predicted x_0 that it was computed from."""

    mean: Float[Tensor, "n c h w"]
    log_variance: Float[Tensor, "n c h w"]
    x_0: Float[Tensor, "n c h w"]


def clamp_x_0(x_0: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Clip the predicted x_0 to [-1, 1], the range of images."""
    return x_0.clamp(-1, 1)


class GaussianDiffusion:
    """The process q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) and what follows from it.

    betas: [T], each strictly between 0 and 1. timesteps: for each index the timestep of the process that the
    network was trained on, which is what the network is given; 0 .. T-1 except after `respace`. All tables
    are float64 [T]. Raises ValueError for other betas.
    """

    def __init__(self, betas: Float[Tensor, "T"], timesteps: Int[Tensor, "T"] | None = None):
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
        # beta_tilde is 0 at t = 0, where no noise is added; its logarithm takes the value of t = 1
        first = self.beta_tilde[1:2] if self.num_timesteps > 1 else self.betas
        self.posterior_log_variance = torch.cat([first, self.beta_tilde[1:]]).log()
        self.log_betas = self.betas.log()

    def extract(
        self, table: Float[Tensor, "T"], t: Int[Tensor, "n"], x: Float[Tensor, "n ..."]
    ) -> Float[Tensor, "n ..."]:
        """Return table[t] as float32 on the device of x, shaped to broadcast over x: [N, 1, ..., 1]."""
        return table[t.cpu()].float().to(x.device).view(-1, *[1] * (x.ndim - 1))

    def respace(self, timesteps: Int[Tensor, "S"] | Sequence[int]) -> "GaussianDiffusion":
        """Return the same process restricted to some of its timesteps; alpha_bar there does not change.

        timesteps: increasing indices into this process (Nichol & Dhariwal 2021, section 4).
        """
        kept = torch.as_tensor(timesteps)
        return GaussianDiffusion(betas_from_alpha_bar(self.alpha_bar[kept]), self.timesteps[kept])

    def respace_evenly(self, num_steps: int) -> "GaussianDiffusion":
        """Keep `num_steps` evenly spaced timesteps, the last and the first included.

        Raises ValueError if num_steps is not between 1 and T.
        """
        if not 1 <= num_steps <= self.num_timesteps:
            raise ValueError(f"cannot take {num_steps} of {self.num_timesteps} timesteps")
        spaced = torch.linspace(self.num_timesteps - 1, 0, num_steps, dtype=torch.float64)
        return self.respace(spaced.round().long().flip(0))

    # -- forward process -------------------------------------------------------------------------------------

    def q_sample(
        self, x_0: Float[Tensor, "n ..."], t: Int[Tensor, "n"], noise: Float[Tensor, "n ..."]
    ) -> Float[Tensor, "n ..."]:
        """Return x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise (eq. 4)."""
        signal_scale, noise_scale = self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()
        return self.extract(signal_scale, t, x_0) * x_0 + self.extract(noise_scale, t, x_0) * noise

    def q_posterior_mean(
        self, x_0: Float[Tensor, "n ..."], x_t: Float[Tensor, "n ..."], t: Int[Tensor, "n"]
    ) -> Float[Tensor, "n ..."]:
        """Return the mean of q(x_{t-1} | x_t, x_0) (eq. 7); its variance is `beta_tilde`."""
        coef1, coef2 = self.posterior_mean_coef1, self.posterior_mean_coef2
        return self.extract(coef1, t, x_t) * x_0 + self.extract(coef2, t, x_t) * x_t

    # -- between noise and image -----------------------------------------------------------------------------

    def x_0_from_noise(
        self, x_t: Float[Tensor, "n ..."], t: Int[Tensor, "n"], noise: Float[Tensor, "n ..."]
    ) -> Float[Tensor, "n ..."]:
        """Solve `q_sample` for x_0."""
        scale, ratio = self.alpha_bar.rsqrt(), (1 / self.alpha_bar - 1).sqrt()
        return self.extract(scale, t, x_t) * x_t - self.extract(ratio, t, x_t) * noise

    def noise_from_x_0(
        self, x_t: Float[Tensor, "n ..."], t: Int[Tensor, "n"], x_0: Float[Tensor, "n ..."]
    ) -> Float[Tensor, "n ..."]:
        """Solve `q_sample` for the noise."""
        scale, ratio = self.alpha_bar.rsqrt(), (1 / self.alpha_bar - 1).rsqrt()
        return (self.extract(scale, t, x_t) * x_t - x_0) * self.extract(ratio, t, x_t)

    # -- reverse process -------------------------------------------------------------------------------------

    def predict(
        self, denoiser: Denoiser, x_t: Float[Tensor, "n ..."], t: Int[Tensor, "n"]
    ) -> Float[Tensor, "n ..."]:
        """Return the denoiser's output in float32; it is given the original timesteps of the indices t."""
        return denoiser(x_t, self.timesteps[t.cpu()].to(x_t.device)).float()

    def p_mean_variance(
        self,
        output: Float[Tensor, "n out_c h w"],
        x_t: Float[Tensor, "n c h w"],
        t: Int[Tensor, "n"],
        log_variance_fn: LogVarianceFn,
        denoised_fn: DenoisedFn | None = clamp_x_0,
    ) -> PMeanVariance:
        """Return p(x_{t-1} | x_t): the posterior with the predicted x_0 in place of the true one.

        output: the denoiser's, eps_hat first. log_variance_fn: such as `fixed_small`; its result must
        broadcast to x_t. denoised_fn: applied to the predicted x_0; None leaves it unchanged.
        """
        x_0 = self.x_0_from_noise(x_t, t, output[:, : x_t.shape[1]])
        x_0 = denoised_fn(x_0) if denoised_fn else x_0
        mean = self.q_posterior_mean(x_0, x_t, t)
        return PMeanVariance(mean, log_variance_fn(self, output, x_t, t).expand_as(mean), x_0)


def fixed_small(diffusion: GaussianDiffusion, output: Tensor, x_t: Tensor, t: Int[Tensor, "n"]) -> Tensor:
    """Return log beta_tilde_t, the variance if x_0 is a single point (Ho et al. 2020, section 3.2)."""
    return diffusion.extract(diffusion.posterior_log_variance, t, x_t)


def fixed_large(diffusion: GaussianDiffusion, output: Tensor, x_t: Tensor, t: Int[Tensor, "n"]) -> Tensor:
    """Return log beta_t, the variance if x_0 is white noise (Ho et al. 2020, section 3.2)."""
    return diffusion.extract(diffusion.log_betas, t, x_t)


def squared_error(
    output: Float[Tensor, "n out_c *size"], noise: Float[Tensor, "n c *size"]
) -> Float[Tensor, "n"]:
    """Return the mean squared error of eps_hat, the first C channels of `output`, for each sample."""
    return (noise - output[:, : noise.shape[1]]).square().flatten(1).mean(1)


def loss_simple(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    x_0: Float[Tensor, "n c *size"],
    t: Int[Tensor, "n"],
    noise: Float[Tensor, "n c *size"],
) -> Float[Tensor, "n"]:
    """Return L_simple (eq. 14), the squared error of the predicted noise, for each sample.

    Raises ValueError if x_0 is plainly not scaled to [-1, 1].
    """
    check_range(x_0)
    return squared_error(diffusion.predict(denoiser, diffusion.q_sample(x_0, t, noise), t), noise)


def uniform_timesteps(n: int, num_timesteps: int) -> Int[Tensor, "{n}"]:
    """Draw n independent timesteps, all equally likely."""
    return torch.randint(num_timesteps, (n,))


def training_loss(
    loss: LossAtT,
    diffusion: Process,
    denoiser: Denoiser,
    x_0: Float[Tensor, "n c *size"],
    sample_t: Callable[[int, int], Tensor] = uniform_timesteps,
) -> Float[Tensor, "n"]:
    """Return `loss` at random timesteps with fresh noise, per sample: what training minimizes (algorithm 1).

    loss: such as `loss_simple`. sample_t: (n, num_timesteps) -> int64 [n]; lesson 5 uses another one. The
    timesteps stay on the CPU, where the tables are: reading them from a GPU would force a synchronization.
    """
    t = sample_t(len(x_0), diffusion.num_timesteps)
    return loss(diffusion, denoiser, x_0, t, torch.randn_like(x_0))


def gaussian_noise(x: Float[Tensor, "*shape"], generator: torch.Generator | None) -> Float[Tensor, "*shape"]:
    """Draw white noise like x on the generator's device: a CPU generator gives all devices the same."""
    if isinstance(generator, NoiseStreams):  # then the noise of a sample does not depend on the others
        return generator.randn(x.shape).to(x.device)
    device = generator.device if generator else x.device
    return torch.randn(x.shape, generator=generator, device=device).to(x.device)


MeanFn = Callable[
    [GaussianDiffusion, PMeanVariance, Tensor, Tensor], Tensor
]  # (diffusion, p, x_t, t) -> mean


@torch.no_grad()
def ddpm_sample(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    x_T: Float[Tensor, "n c h w"],
    generator: torch.Generator | None = None,
    log_variance_fn: LogVarianceFn = fixed_small,
    denoised_fn: DenoisedFn | None = clamp_x_0,
    mean_fn: MeanFn | None = None,
) -> Iterator[SamplerStep]:
    """Sample ancestrally (algorithm 2) from x_T, white noise; yield one step per timestep.

    mean_fn: returns a mean to use instead of p's; lesson 3 guides the sampler with it.
    """
    x_t = x_T
    for i in reversed(range(diffusion.num_timesteps)):
        t = torch.full((len(x_t),), i)
        output = diffusion.predict(denoiser, x_t, t)
        p = diffusion.p_mean_variance(output, x_t, t, log_variance_fn, denoised_fn)
        x_prev = mean_fn(diffusion, p, x_t, t) if mean_fn else p.mean
        if i > 0:  # the last step returns the image, to which noise would only add grain
            x_prev = x_prev + (0.5 * p.log_variance).exp() * gaussian_noise(x_t, generator)
        yield SamplerStep(i, x_t, p.x_0, x_prev)
        x_t = x_prev
