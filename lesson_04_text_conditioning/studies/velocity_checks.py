"""What checks the reader's functions about velocity; `checks.py` names them with the others."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from common.exercises import WrongAnswer, allclose, expect_shape, explaining, numbered
from lesson_02_improved_ddpm.model import make_diffusion


def angles() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x_0, noise, alpha_bar [3, 1, 1, 1] and x_t."""
    torch.manual_seed(0)
    x_0, noise = torch.randn(2, 3, 1, 4, 4).double()
    alpha_bar = torch.tensor([0.99, 0.5, 0.04]).double().view(-1, 1, 1, 1)
    return x_0, noise, alpha_bar, alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise


@numbered("4.5, velocity")
def velocity(answer: Callable) -> None:
    """Compare with the slope of x_t along the angle, by finite differences."""
    x_0, noise, alpha_bar, x_t = angles()
    result = answer(x_0, noise, alpha_bar)
    expect_shape(result, (3, 1, 4, 4))
    angle, step = alpha_bar.sqrt().acos(), 1e-5
    slope = ((angle + step).cos() * x_0 + (angle + step).sin() * noise - x_t) / step
    if allclose(result, -slope):
        raise WrongAnswer("The sign is wrong: with more noise, x_t moves towards the noise.")
    cos, sin = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if allclose(result, cos * noise + sin * x_0):
        raise WrongAnswer("The sign of x_0 is wrong: the derivative of the cosine is minus the sine.")
    if allclose(result, sin * noise - cos * x_0) or allclose(result, cos * x_0 - sin * noise):
        raise WrongAnswer("x_0 and noise have each other's factor: the cosine of x_0 becomes minus the sine.")
    if allclose(result, x_t):
        raise WrongAnswer("That is x_t itself. The derivative of the cosine is minus the sine.")
    if allclose(result, alpha_bar * noise - (1 - alpha_bar) * x_0):
        raise WrongAnswer("The factors are the roots of alpha_bar and of 1 - alpha_bar.")
    if not torch.allclose(result, slope, atol=1e-3):
        raise WrongAnswer(
            "The result is not the derivative of x_t by the angle (finite differences disagree)."
        )


@numbered("4.5, x_0")
def x_0_from_velocity(answer: Callable) -> None:
    """The velocity of known images and noise must give back the images."""
    x_0, noise, alpha_bar, x_t = angles()
    v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0
    result = answer(x_t, v, alpha_bar)
    expect_shape(result, (3, 1, 4, 4))
    if allclose(result, noise):
        raise WrongAnswer("That is the noise. Eliminate the noise from the two equations, not x_0.")
    if allclose(result, -x_0):
        raise WrongAnswer("That is -x_0: all signs are reversed.")
    if allclose(result, alpha_bar.sqrt() * x_t + (1 - alpha_bar).sqrt() * v):
        raise WrongAnswer("The sign of v is wrong: when you insert both formulas, the noise must cancel.")
    if allclose(result, (1 - alpha_bar).sqrt() * x_t - alpha_bar.sqrt() * v):
        raise WrongAnswer("x_t and v have each other's factor.")
    if allclose(result, (x_t - (1 - alpha_bar).sqrt() * v) / alpha_bar.sqrt()):
        raise WrongAnswer("This treats v as the noise. Use the equations of x_t and of v.")
    if not torch.allclose(result, x_0, atol=1e-6):
        raise WrongAnswer("For a known velocity the result is not the image x_0.")


@numbered("4.5, noise")
def noise_from_velocity(answer: Callable) -> None:
    """The velocity of known images and noise must give back the noise."""
    x_0, noise, alpha_bar, x_t = angles()
    v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0
    result = answer(x_t, v, alpha_bar)
    expect_shape(result, (3, 1, 4, 4))
    if allclose(result, x_0):
        raise WrongAnswer("That is x_0. For the noise, the factors of x_t and v change places.")
    if allclose(result, -noise):
        raise WrongAnswer("That is the negative noise: all signs are reversed.")
    if allclose(result, (1 - alpha_bar).sqrt() * x_t - alpha_bar.sqrt() * v):
        raise WrongAnswer("The sign of v is wrong: insert both formulas, and the terms with x_0 must cancel.")
    if allclose(result, alpha_bar.sqrt() * x_t + (1 - alpha_bar).sqrt() * v):
        raise WrongAnswer("x_t and v have each other's factor.")
    if allclose(result, v):
        raise WrongAnswer("That is v itself, which is the noise only where alpha_bar is 1.")
    if not torch.allclose(result, noise, atol=1e-6):
        raise WrongAnswer("For a known velocity the result is not the noise in x_t.")


@numbered("4.5, wrapper")
def convert_output(answer: Callable) -> None:
    """A network that knows the velocity must become one that knows the noise, with the same variance."""
    torch.manual_seed(0)
    alpha_bar, t = make_diffusion().alpha_bar.float(), torch.tensor([10, 400, 950])
    x_0, noise, variance = torch.randn(3, 3, 3, 4, 4)
    a = alpha_bar[t].view(-1, 1, 1, 1)
    x_t, v = a.sqrt() * x_0 + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x_0
    seen: dict[str, Any] = {}

    def network(x_t: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
        seen.update(conditioning)
        return torch.cat([v, variance], 1)

    view = "alpha_bar[t] has the shape [N]: use .view(-1, 1, 1, 1)."
    three = "x_t has three channels and the output six: only the first three are a velocity."
    with explaining("must match the size", view), explaining("non-singleton dimension 1", three):
        result = answer(SimpleNamespace(network=network, alpha_bar=alpha_bar), x_t, t, text="a red seven")
    if seen != {"text": "a red seven"}:
        raise WrongAnswer("The caption does not reach the network: pass **conditioning on.")
    if isinstance(result, Tensor) and result.shape == x_t.shape:
        raise WrongAnswer("Channels 3 to 5 are missing. They hold the variance: pass them on as they are.")
    expect_shape(result, (3, 6, 4, 4))
    if not allclose(result[:, 3:], variance):
        raise WrongAnswer("Channels 3 to 5 have changed. They hold the variance: pass them on as they are.")
    if allclose(result[:, :3], v):
        raise WrongAnswer("The first three channels are still the velocity.")
    if not allclose(result[:, :3], noise):
        raise WrongAnswer("The first three channels are not the noise: use `noise_from_velocity`.")


class FakeTextUNet(nn.Module):
    """Knows x_0, and returns its velocity times `scale` in channels 0 to 2 and 5 in channels 3 to 5."""

    def __init__(self, x_0: Tensor, alpha_bar: Tensor):
        super().__init__()
        self.text_encoder, self.scale = nn.Embedding(7, 1), nn.Parameter(torch.ones(2))
        nn.init.constant_(self.text_encoder.weight, 1.0)
        self.x_0, self.alpha_bar = x_0, alpha_bar
        self.texts: list[tuple[Tensor, Tensor]] = []
        self.x_t, self.t, self.noise = torch.zeros(0), torch.zeros(0), torch.zeros(0)

    def encode_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        self.texts.append((tokens, mask))
        return (self.text_encoder(tokens) * mask[..., None]).sum((1, 2)) / mask.sum(1)

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor | None = None) -> Tensor:
        if text is None:
            raise WrongAnswer("The network is called without the caption: pass text=...")
        self.x_t, self.t = x_t, t
        a = self.alpha_bar[t].view(-1, 1, 1, 1)
        self.noise = (x_t - a.sqrt() * self.x_0) / (1 - a).sqrt()
        v = a.sqrt() * self.noise - (1 - a).sqrt() * self.x_0
        return torch.cat([self.scale[0] * text.view(-1, 1, 1, 1) * v, self.scale[1] + 4 + 0 * v], 1)


@numbered("4.6")
def velocity_loss(answer: Callable) -> None:
    """A network that knows the velocity has the loss 0; gradients show what the loss depends on."""
    torch.manual_seed(0)
    process = make_diffusion()
    alpha_bar = process.alpha_bar.float()
    x_0, tokens = torch.rand(64, 3, 4, 4) * 2 - 1, torch.randint(7, (64, 5))
    mask = torch.arange(5) < torch.randint(1, 6, (64, 1))
    network = FakeTextUNet(x_0, alpha_bar)
    view = "alpha_bar[t] has the shape [N]: use .view(-1, 1, 1, 1)."
    three = "The network returns six channels, and the first three are the velocity: output[:, :3]."
    with explaining("must match the size", view), explaining("non-singleton dimension 1", three):
        loss = answer(network, process, x_0, tokens, mask)
    if not network.texts:
        raise WrongAnswer("The caption is missing: encode the text with network.encode_text(tokens, mask).")
    for given_tokens, given_mask in network.texts:
        if given_mask.dtype != torch.bool or not torch.equal(given_mask, mask):
            raise WrongAnswer("The text transformer got another mask than the batch's. Pass `mask` as it is.")
        if not torch.equal(given_tokens, tokens):
            raise WrongAnswer(
                "The text transformer got other tokens than the batch's. Pass `tokens` as they are."
            )
    if not len(network.t):
        raise WrongAnswer("The network is not called.")
    if not isinstance(loss, Tensor) or loss.ndim:
        raise WrongAnswer("The loss must be a single number: the mean of all squared errors.")
    if len(network.t.unique()) == 1:
        raise WrongAnswer("All images get the same t. Draw one per image: torch.randint(1000, (len(x_0),)).")
    if network.t.max() < 800:
        raise WrongAnswer(f"64 values of t are at most {network.t.max()}; t runs from 0 to 999.")
    if allclose(network.x_t, x_0):
        raise WrongAnswer("The network sees clean images. Add noise: diffusion.q_sample(x_0, t, noise).")
    if network.noise.std() > 2 or not 0.8 < network.noise[network.t > 100].std() < 1.2:
        raise WrongAnswer("x_t is not q_sample(x_0, t, noise) with noise from randn and the network's t.")
    a = alpha_bar[network.t].view(-1, 1, 1, 1)
    target = a.sqrt() * network.noise - (1 - a).sqrt() * x_0
    swapped = a.sqrt() * x_0 - (1 - a).sqrt() * network.noise
    targets = {"noise": network.noise, "image": x_0, "negative velocity": -target}
    targets["velocity with image and noise exchanged"] = swapped
    for name, wrong in targets.items():
        if abs(loss.item() - (target - wrong).square().mean().item()) < 0.02:
            raise WrongAnswer(f"The target is the {name}. Compare with velocity(x_0, noise, alpha_bar_t).")
    if loss.requires_grad:
        loss.backward()
    if network.scale.grad is None:
        raise WrongAnswer("The loss has no gradient. Do not use no_grad or detach.")
    if network.scale.grad[1].abs() > 1e-3:
        raise WrongAnswer("Channels 3 to 5 are for the variance. Compare output[:, :3] with the velocity.")
    if loss.item() > 1e-3:
        raise WrongAnswer(
            f"A network that knows the velocity has the loss {loss.item():.2f} and not 0. Do target and x_t "
            "have the same noise and the same t?"
        )
    network.scale.data[0] = 2.0  # twice the velocity: the mean squared error is that of the velocity
    loss = answer(network, process, x_0, tokens, mask)
    a = alpha_bar[network.t].view(-1, 1, 1, 1)
    wanted = (a.sqrt() * network.noise - (1 - a).sqrt() * x_0).square().mean().item()
    if abs(loss.item() - wanted) > 0.01 * wanted:
        raise WrongAnswer(
            f"The loss is {loss.item():.3g}, the mean squared error {wanted:.3g}. Square and take the mean."
        )
    network.text_encoder.weight.grad = None
    loss.backward()
    if network.text_encoder.weight.grad is None:
        raise WrongAnswer("No gradient reaches the text transformer. Encode without no_grad or detach.")
