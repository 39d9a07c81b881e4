"""What checks the reader's tests of training set-ups, exercise 6.6."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common.exercises import WrongAnswer, numbered
from lesson_01_ddpm.diffusion import GaussianDiffusion
from lesson_02_improved_ddpm.schedules import cosine_betas
from lesson_06_miniglide.networks.presets import shifted_cosine_betas
from lesson_06_miniglide.training.mistakes import RIGHT, SETUPS, T, initialized, uninitialized


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
        "draws that never reach an odd t below 999": lambda n: (
            torch.randint(0, T + 1, (n,)).div(2, rounding_mode="floor").mul(2).clamp(max=T - 1)
        ),
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
        "a function that drops 80 % of the captions": lambda m: m & (torch.rand(len(m)) < 0.2)[:, None],
    }
    hint = "Each caption is dropped with a probability of 20 %. Take many captions, and allow for chance."
    check_test(answer, RIGHT.drop, wrong, hint)


@numbered("6.6, test_finite")
def test_finite(answer: Callable) -> None:
    """One NaN in a parameter is enough, and infinity is not finite either."""
    infinite = initialized()
    infinite.embedding.data[0, 0] = float("inf")  # type: ignore[operator,union-attr]
    wrong = {"a network with NaN in a parameter": uninitialized(), "a network with infinity in it": infinite}
    wrong["a network whose second parameter is NaN"] = second = initialized()
    second.last = nn.Parameter(torch.tensor(float("nan")))  # type: ignore[assignment]
    check_test(answer, initialized(), wrong, "All of its parameters are finite.")


@numbered("6.6, test_schedule")
def test_schedule(answer: Callable) -> None:
    """The shift can be missing, reversed, too small or too large."""
    wrong = {
        "a schedule whose SNR is multiplied by 4 instead of divided": SETUPS["F"].process,
        "the schedule of 32x32 images, without a shift": GaussianDiffusion(cosine_betas(T)),
        "a schedule whose SNR is divided by 2 instead of 4": GaussianDiffusion(shifted_cosine_betas(T, 2)),
        "a schedule whose SNR is divided by 16, as for 128x128 images": GaussianDiffusion(
            shifted_cosine_betas(T, 16)
        ),
    }
    hint = "Its SNR is a quarter of the cosine schedule's. If you measure it with noise, allow for chance."
    check_test(answer, RIGHT.process, wrong, hint)
