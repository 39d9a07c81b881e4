"""Which t lesson 5 trains on: their distributions in closed form, and how evenly a batch is spread."""

import torch

from lesson_01_ddpm.diffusion import GaussianDiffusion, linear_betas, loss_at_random_t, uniform
from lesson_05_cfg.guidance import loss_of_captions
from lesson_05_cfg.timesteps import mostly_large

T = 10
DRAWS = {uniform: torch.full((T,), 1 / T), mostly_large: ((torch.arange(T + 1) / T) ** (5 / 3)).diff()}


def shares(t):
    return torch.bincount(t, minlength=T) / len(t)


def test_every_t_comes_up_as_often_as_it_should():
    """P(t < k) is k / T, and where t is mostly large (k / T)^(5/3)."""
    torch.manual_seed(0)
    for draw_t, expected in DRAWS.items():
        t = torch.cat([draw_t(4, T) for _ in range(50_000)])
        assert t.dtype == torch.int64
        torch.testing.assert_close(shares(t), expected, rtol=0, atol=0.005)


def test_each_batch_is_spread_over_all_t():
    """Of 100 t at most one lies on the wrong side of any limit; drawn one by one it would be several."""
    torch.manual_seed(0)
    for _ in range(20):
        share = shares(mostly_large(100, T))
        assert ((share - DRAWS[mostly_large]).cumsum(0).abs() <= 0.0101).all()


def test_the_order_of_t_is_random():
    """Else the first images of a batch would always get the least noise."""
    torch.manual_seed(0)
    first = torch.stack([mostly_large(100, 1000)[0] for _ in range(400)]).double()
    assert abs(first.mean() - 625) < 5 * 253 / 400**0.5  # their mean and deviation: of u^0.6, times 1000


def test_t_never_leaves_its_range(monkeypatch):
    """(n - 1 + u) / n rounds to 1 for the largest u below 1."""
    largest = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    monkeypatch.setattr(torch, "rand", lambda n: largest.expand(n))
    assert mostly_large(32, 1000).max() == 999


class Network:
    def __call__(self, x_t, t, text):
        raise AssertionError("no loss here asks it")

    def encode_text(self, tokens, mask):
        return tokens


def test_uniform_t_are_those_of_the_lessons_before():
    """The same numbers, not only the same distribution: runs of lesson 6 can be resumed."""
    asked, x_0 = [], torch.randn(6, 3, 4, 4)

    def at_t(diffusion, denoiser, x_0, t, noise):
        asked.append((t, noise))
        return torch.zeros(len(x_0))

    diffusion = GaussianDiffusion(linear_betas(50))
    torch.manual_seed(1)
    loss_at_random_t(at_t, diffusion, None, x_0)
    torch.manual_seed(1)
    loss_of_captions(at_t, diffusion, lambda mask: mask)(Network(), x_0, None, None)
    (t, noise), (same_t, same_noise) = asked
    assert torch.equal(t, same_t) and torch.equal(noise, same_noise)
