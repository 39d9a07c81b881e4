"""What checks the reader's training loss and sampling function, exercise 6.4."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.exercises import WrongAnswer, allclose, expect_shape, explaining, numbered
from common.protocols import Model
from lesson_01_ddpm.diffusion import GaussianDiffusion
from lesson_02_improved_ddpm.schedules import cosine_betas
from lesson_04_text_conditioning.velocity import VelocityPrediction


class Recorder(nn.Module):
    """Stands in for a network: keeps what it is given, and returns fixed random values."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.output = torch.randn(n, 6, 2, 2)
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        self.mask: Tensor | None = None
        self.text: Tensor | None = None

    def encode_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        self.mask = mask
        self.text = text = tokens + mask
        return text

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        self.calls.append((x_t, t, text))
        return self.output


@numbered("6.4, text_to_image_loss")
def text_to_image_loss(answer: Callable) -> None:
    """A network that keeps its inputs: from them follow the noise and the velocity."""
    torch.manual_seed(0)
    n, process = 2000, GaussianDiffusion(cosine_betas(10))
    x_0, mask = 2 * torch.rand(n, 3, 2, 2) - 1, torch.ones(n, 4, dtype=torch.bool)
    inner = Recorder(n)
    model = Model(VelocityPrediction(inner, process.alpha_bar), process, {})
    tokens = torch.arange(n)[:, None].expand(n, 4)
    message = (
        "The network returns six channels, and the first three are the velocity. alpha_bar[t] needs the "
    )
    try:
        with explaining("size of tensor", message + "shape [N, 1, 1, 1]."):
            loss = answer(model, x_0, tokens, mask, 0.25)
    except IndexError as error:
        raise WrongAnswer(
            "The check's process has 10 timesteps: draw t below process.num_timesteps."
        ) from error
    if inner.mask is None or not inner.calls:
        raise WrongAnswer("Encode the captions with encode_text, and call the network.")
    check_dropout(inner.mask, mask, 0.25)
    x_t, t, text = inner.calls[-1]
    if text is not inner.text:
        raise WrongAnswer("The network must get the encoded captions as text=.")
    if t.shape != (n,) or len(t.unique()) == 1:
        raise WrongAnswer("Draw one timestep for each image.")
    if len(t.unique()) < 10:
        raise WrongAnswer(f"Of the timesteps 0 to 9, you draw only {t.min()} to {t.max()}.")
    a = process.alpha_bar[t].float()[:, None, None, None]
    noise = (x_t - a.sqrt() * x_0) / (1 - a).sqrt()
    if torch.allclose(noise[0], noise[1], atol=1e-3):
        raise WrongAnswer("All images get the same noise. Draw noise of the shape of x_0.")
    if abs(noise.std() - 1) > 0.05:
        raise WrongAnswer("The network must get x_t: process.q_sample(x_0, t, noise).")
    v = a.sqrt() * noise - (1 - a).sqrt() * x_0
    v_hat = inner.output[:, :3]

    def is_error(difference: Tensor) -> bool:
        error = difference.square()
        means = (error.mean((1, 2, 3)), error.mean(), error.sum((1, 2, 3)))
        return any(allclose(loss, mean) for mean in means)

    eps_hat = a.sqrt() * v_hat + (1 - a).sqrt() * x_t
    if is_error(eps_hat - v):
        raise WrongAnswer("model.network predicts noise. The velocity comes from model.network.network.")
    if is_error(v_hat - x_0):
        raise WrongAnswer("The network predicts a velocity, and you compare it with x_0.")
    if is_error(a.sqrt() * (v_hat - v)):
        raise WrongAnswer("You compare predicted noise with noise. Compare the velocities.")
    if is_error(v_hat - noise):
        raise WrongAnswer("The network predicts a velocity, and you compare it with the noise.")
    if is_error(v_hat + v):
        raise WrongAnswer("The velocity has the wrong sign: it is nearly -x_0 at large t.")
    if isinstance(loss, Tensor) and loss.ndim == 0 and is_error(v_hat - v):
        raise WrongAnswer("That is the mean over the batch. Return one loss per image, [N].")
    expect_shape(loss, (n,))
    if allclose(loss, (v_hat - v).square().sum((1, 2, 3))):
        raise WrongAnswer("That is the sum over the pixels. Take the mean.")
    for what, target in (
        ("The factors are exchanged: the noise has sqrt(alpha_bar)", (1 - a).sqrt() * noise - a.sqrt() * x_0),
        ("The term of x_0 is subtracted, not added", a.sqrt() * noise + (1 - a).sqrt() * x_0),
        ("Take the roots of alpha_bar and 1 - alpha_bar", a * noise - (1 - a) * x_0),
    ):
        if is_error(v_hat - target):
            raise WrongAnswer(f"{what}. At large t, the velocity is nearly -x_0 (lesson 4).")
    if not allclose(loss, (v_hat - v).square().mean((1, 2, 3))):
        raise WrongAnswer("The inputs of the network are right. The result is not the error of the velocity.")


def check_dropout(found: Tensor, mask: Tensor, dropout: float) -> None:
    """Raise WrongAnswer unless captions are dropped as a whole, at this rate."""
    if torch.equal(found, mask):
        raise WrongAnswer(
            "In this batch no caption is dropped. Draw one number per image (torch.rand(len(mask))), and set "
            "the whole row of the mask to False where it is below dropout."
        )
    if (found.any(1) != found.all(1)).any():
        raise WrongAnswer("Single tokens are dropped. Drop a caption as a whole: all of its tokens or none.")
    rate = 1 - found.any(1).float().mean()
    if rate == 1:
        raise WrongAnswer("In this batch all captions are dropped. Draw one number per image.")
    if abs(rate - dropout) > 0.06:
        raise WrongAnswer(f"At a dropout of {dropout:.0%}, {rate:.0%} of the captions are dropped.")


class Toy(nn.Module):
    """Stands in for a network: each caption is an image of one gray value, and the empty one is -0.1."""

    image_shape = (3, 4, 4)

    def __init__(self, alpha_bar: Tensor) -> None:
        super().__init__()
        self.weight, self.alpha_bar = nn.Parameter(torch.zeros(1)), alpha_bar
        self.calls: list[tuple[Tensor, Tensor]] = []

    def encode_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask[:, 0], tokens[:, 0] / 100, -0.1)

    @property
    def network(self) -> Any:
        raise WrongAnswer(
            "model.network.network predicts velocity. A sampler needs noise: use model.network."
        )

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        if len(text) != len(x_t):
            raise WrongAnswer(
                f"The network gets {len(x_t)} images and {len(text)} encoded captions. Each image needs one, "
                'also if it is empty: [""] * len(prompts).'
            )
        if x_t.shape[1:] != self.image_shape:
            raise WrongAnswer(
                f"x_T has the shape {tuple(x_t.shape)}, and the check uses smaller images. Take the size "
                "from model.network.image_shape."
            )
        self.calls.append((x_t, t))
        a = self.alpha_bar[t].float()[:, None, None, None]
        eps = (x_t - a.sqrt() * text[:, None, None, None]) / (1 - a).sqrt()
        return torch.cat([eps, 0 * eps], 1)

    @staticmethod
    def encode(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The tokenizer: a prompt is its number; the empty one has no token."""
        numbers = torch.tensor([[int(prompt or 0)] for prompt in prompts])
        return numbers, torch.tensor([[bool(prompt)] for prompt in prompts])


@numbered("6.4, text_to_image")
def text_to_image(answer: Callable) -> None:
    """Captions are gray values, so the guided result is known: -0.1 + s (c + 0.1)."""
    torch.manual_seed(0)
    process = GaussianDiffusion(cosine_betas(1000))
    toy, c = Toy(process.alpha_bar), torch.tensor([0.1, -0.2])
    result = answer(Model(toy, process, {}), toy, ["10", "-20"], 3.0, 5)
    if not toy.calls:
        raise WrongAnswer("The network is not called. last_sample(...) runs a sampler to its end.")
    (x_T, t), visited = toy.calls[0], {int(t[0]) for _, t in toy.calls}
    if abs(x_T.std() - 1) > 0.3:
        raise WrongAnswer("Sampling starts from white noise: torch.randn, one image per prompt.")
    if t[0] != 999:
        raise WrongAnswer(f"Sampling starts at timestep {t[0]}; it must be the last of the process, 999.")
    if len(visited) != 5:
        raise WrongAnswer(f"It visits {len(visited)} timesteps; steps = 5. Respace the process (lesson 2).")
    expect_shape(result, (2, 3, 4, 4))
    found = result.mean((1, 2, 3))
    if result.flatten(1).std(1).max() > 0.05:
        raise WrongAnswer("The result still contains noise. Return x_prev of the last step.")
    for what, value in (
        ("the conditional sample, without guidance. Use scale", c),
        ("the unconditional sample. Guidance needs the encoded captions, too", -0.1 + 0 * c),
        ("guided from the conditional prediction. Start from the empty caption", c + 3 * (c + 0.1)),
        ("guided away from the caption: conditional and unconditional are exchanged", c - 3 * (c + 0.1)),
    ):
        if torch.allclose(found, value.clamp(-1, 1), atol=0.02):
            raise WrongAnswer(f"The result is {what}.")
    if not torch.allclose(found, -0.1 + 3 * (c + 0.1), atol=0.02):
        raise WrongAnswer("The guided noise must be eps_uncond + scale (eps_cond - eps_uncond).")
