"""The timesteps that lesson 5 trains on: their distribution in closed form, and how even a batch is."""

import torch
from torch import nn

from lesson_01_ddpm.diffusion import GaussianDiffusion, linear_betas, training_loss, uniform_timesteps
from lesson_05_cfg.guidance import caption_loss
from lesson_05_cfg.timesteps import sample_noisy_timesteps

T = 10
DISTRIBUTIONS = {
    uniform_timesteps: torch.full((T,), 1 / T),
    sample_noisy_timesteps: ((torch.arange(T + 1) / T) ** (5 / 3)).diff(),
}


def shares(t):
    return torch.bincount(t, minlength=T) / len(t)


def test_every_t_is_as_frequent_as_it_should_be():
    """P(t < k) is k / T, and (k / T)^(5/3) where large t are more frequent."""
    torch.manual_seed(0)
    for sample_t, expected in DISTRIBUTIONS.items():
        t = torch.cat([sample_t(4, T) for _ in range(50_000)])
        assert t.dtype == torch.int64
        torch.testing.assert_close(shares(t), expected, rtol=0, atol=0.005)


def test_each_batch_is_spread_over_all_t():
    """Of 100 t at most one is on the wrong side of any limit; drawn independently, several would be."""
    torch.manual_seed(0)
    for _ in range(20):
        share = shares(sample_noisy_timesteps(100, T))
        assert ((share - DISTRIBUTIONS[sample_noisy_timesteps]).cumsum(0).abs() <= 0.0101).all()


def test_the_order_of_t_is_random():
    """Otherwise the first images of a batch would always get the least noise."""
    torch.manual_seed(0)
    first = torch.stack([sample_noisy_timesteps(100, 1000)[0] for _ in range(400)]).double()
    assert abs(first.mean() - 625) < 5 * 253 / 400**0.5  # mean and standard deviation of u^0.6, times 1000


def test_t_never_leaves_its_range(monkeypatch):
    """(n - 1 + u) / n rounds to 1 for the largest u below 1."""
    largest = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    monkeypatch.setattr(torch, "rand", lambda n: largest.expand(n))
    assert sample_noisy_timesteps(32, 1000).max() == 999


class Network(nn.Module):
    image_shape = (3, 4, 4)

    def forward(self, x_t, t, text=None):
        raise AssertionError("the loss of this test does not evaluate the network")

    def encode_text(self, tokens, mask):
        return tokens


def test_uniform_t_are_those_of_earlier_lessons():
    """The same numbers, not only the same distribution: runs of lesson 6 can be resumed."""
    calls, x_0, mask = [], torch.randn(6, 3, 4, 4), torch.ones(6, 8, dtype=torch.bool)

    def at_t(diffusion, denoiser, x_0, t, noise):
        calls.append((t, noise))
        return torch.zeros(len(x_0))

    diffusion = GaussianDiffusion(linear_betas(50))
    torch.manual_seed(1)
    training_loss(at_t, diffusion, Network(), x_0)
    torch.manual_seed(1)
    caption_loss(at_t, diffusion, lambda mask: mask)(Network(), x_0, mask.long(), mask)
    (t, noise), (same_t, same_noise) = calls
    assert torch.equal(t, same_t) and torch.equal(noise, same_noise)
