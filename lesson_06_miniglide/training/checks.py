"""What checks the reader's training loss, sampling function and tests, exercises 6.3, 6.4 and 6.6."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.exercises import WrongAnswer, allclose, expect_shape, numbered
from common.protocols import Model
from lesson_01_ddpm.diffusion import GaussianDiffusion
from lesson_02_improved_ddpm.schedules import cosine_betas
from lesson_04_text_conditioning.velocity import VelocityPrediction
from lesson_06_miniglide.training.mistakes import RIGHT, SETUPS, T, initialized, uninitialized


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


@numbered("6.3")
def text_to_image_loss(answer: Callable) -> None:
    """A network that keeps its inputs: from them follow the noise and the velocity."""
    torch.manual_seed(0)
    n, process = 2000, GaussianDiffusion(cosine_betas(10))
    x_0, mask = 2 * torch.rand(n, 3, 2, 2) - 1, torch.ones(n, 4, dtype=torch.bool)
    inner = Recorder(n)
    model = Model(VelocityPrediction(inner, process.alpha_bar), process, {})
    loss = answer(model, x_0, torch.arange(n)[:, None].expand(n, 4), mask, 0.25)
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
    if not allclose(loss, (v_hat - v).square().mean((1, 2, 3))):
        raise WrongAnswer("The inputs of the network are right. The result is not the error of the velocity.")


def check_dropout(found: Tensor, mask: Tensor, dropout: float) -> None:
    """Raise WrongAnswer unless captions are dropped as a whole, at this rate."""
    if torch.equal(found, mask):
        raise WrongAnswer("No caption is dropped. Set the whole row of the mask to False for some images.")
    if (found.any(1) != found.all(1)).any():
        raise WrongAnswer("Single tokens are dropped. Drop a caption as a whole: all of its tokens or none.")
    rate = 1 - found.any(1).float().mean()
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

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        self.calls.append((x_t, t))
        a = self.alpha_bar[t].float()[:, None, None, None]
        eps = (x_t - a.sqrt() * text[:, None, None, None]) / (1 - a).sqrt()
        return torch.cat([eps, 0 * eps], 1)

    @staticmethod
    def encode(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The tokenizer: a prompt is its number; the empty one has no token."""
        numbers = torch.tensor([[int(prompt or 0)] for prompt in prompts])
        return numbers, torch.tensor([[bool(prompt)] for prompt in prompts])


@numbered("6.4")
def text_to_image(answer: Callable) -> None:
    """Captions are gray values, so the guided result is known: -0.1 + s (c + 0.1)."""
    torch.manual_seed(0)
    process = GaussianDiffusion(cosine_betas(1000))
    toy, c = Toy(process.alpha_bar), torch.tensor([0.1, -0.2])
    result = answer(Model(toy, process, {}), toy, ["10", "-20"], 3.0, 5)
    if not toy.calls:
        raise WrongAnswer("The network is not called.")
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


def check_test(answer: Callable, right: Any, wrong: dict[str, Any], hint: str) -> None:
    """Run the reader's test: it must pass for the right part, and fail for each wrong one (name -> part)."""
    for _ in range(20):  # a test that draws random numbers must not fail by chance
        try:
            result = answer(right)
        except AssertionError:
            raise WrongAnswer(f"Your test fails for the right version. {hint}") from None
    if isinstance(result, bool | Tensor):
        raise WrongAnswer("A test returns nothing. Write assert in front of the condition.")
    for what, part in wrong.items():
        try:
            answer(part)
        except AssertionError:
            continue
        raise WrongAnswer(f"Your test passes {what}.")


@numbered("6.6, test_range")
def test_range(answer: Callable) -> None:
    """Images of shapes have no black pixels, so their minimum is above -1."""
    pixels = torch.randint(25, 246, (8, 3, 16, 16)).to(torch.uint8)
    scaled = RIGHT.scale(pixels)
    wrong = {
        "images in [0, 1]. They lie in [-1, 1], too, but have no negative value": SETUPS["E"].scale(pixels),
        "images in [0, 255]": pixels.float(),
        "images with mean 0 and variance 1": (scaled - scaled.mean()) / scaled.std(),
    }
    check_test(answer, scaled, wrong, "Its values run from -0.8 to 0.9: no image has to reach -1 or 1.")


@numbered("6.6, test_every_timestep")
def test_every_timestep(answer: Callable) -> None:
    """Few draws miss timesteps by chance, and counting them does not find draws of 1 to 1000."""
    wrong = {
        "draws that never reach t = 999": SETUPS["D"].draw_t,
        "draws that never reach t = 0": lambda n: torch.randint(1, T, (n,)),
        "draws of 1 to 1000, which are 1000 timesteps, but not the right ones": lambda n: torch.randint(
            1, T + 1, (n,)
        ),
        "draws of 0 to 1000, and there is no t = 1000": lambda n: torch.randint(0, T + 1, (n,)),
    }
    hint = "Draw so often that no timestep is missed by chance. Each has a chance of 1 in 1000."
    check_test(answer, RIGHT.draw_t, wrong, hint)


@numbered("6.6, test_captions_dropped")
def test_captions_dropped(answer: Callable) -> None:
    """Captions may be never dropped, token by token, or all of a batch at once."""
    wrong = {
        "a function that never drops a caption": SETUPS["A"].drop,
        "a function that drops single tokens instead of captions": lambda m: m & (torch.rand(m.shape) >= 0.2),
        "a function that drops all captions": torch.zeros_like,
    }
    hint = "Each caption is dropped with a probability of 20 %. Take many captions, and allow for chance."
    check_test(answer, RIGHT.drop, wrong, hint)


@numbered("6.6, test_finite")
def test_finite(answer: Callable) -> None:
    """One NaN in a parameter is enough, and infinity is not finite either."""
    infinite = initialized()
    infinite.embedding.data[0, 0] = float("inf")  # type: ignore[operator,union-attr]
    wrong = {"a network with NaN in a parameter": uninitialized(), "a network with infinity in it": infinite}
    check_test(answer, initialized(), wrong, "All of its parameters are finite.")
