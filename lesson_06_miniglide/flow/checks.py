"""What checks the reader's functions of flow_matching.ipynb."""

from collections.abc import Callable

import torch
from torch import Tensor

from common.exercises import WrongAnswer, allclose, expect_shape, explaining, numbered


@numbered("6.19")
def flow_loss(answer: Callable) -> None:
    """A network whose outputs are known, and what it is given."""
    torch.manual_seed(0)
    x_0, noise = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 3, 8, 8)
    tau = torch.tensor([0.0, 0.25, 0.5, 1.0])
    seen: list[tuple[Tensor, Tensor]] = []

    def network(x: Tensor, times: Tensor) -> Tensor:
        seen.append((x, times))
        return torch.full_like(x, 0.5)

    message = "tau is [N] and images are [N, C, H, W]; tau.view(-1, 1, 1, 1) fits."
    with explaining("must match the size", message):
        result = answer(network, x_0, tau, noise)
    expect_shape(result, (4,))
    if len(seen) != 1:
        raise WrongAnswer(f"The network is evaluated {len(seen)} times; once is enough.")
    x_tau, times = seen[0]
    w = tau.view(4, 1, 1, 1)
    line = (1 - w) * x_0 + w * noise
    if allclose(x_tau, w * x_0 + (1 - w) * noise):
        raise WrongAnswer("Image and noise are exchanged: tau = 0 is the image and tau = 1 the noise.")
    if allclose(x_tau, (1 - w).sqrt() * x_0 + w.sqrt() * noise):
        raise WrongAnswer("There are square roots in your x_tau. A straight line has none.")
    if not allclose(x_tau, line):
        raise WrongAnswer("The network must see the point of the line at tau, one tau per image.")
    if not allclose(times, tau):
        raise WrongAnswer("The network must also be given tau, as a tensor [N].")
    for target, message in (
        (
            x_0 - noise,
            "Your target points from the noise to the image. As tau grows, x_tau moves to the noise.",
        ),
        (noise, "Your target is the noise. The target is the derivative of x_tau with respect to tau."),
        (x_0, "Your target is the image. The target is the derivative of x_tau with respect to tau."),
    ):
        if allclose(result, (0.5 - target).square().mean((1, 2, 3))):
            raise WrongAnswer(message)
    if not allclose(result, (0.5 - (noise - x_0)).square().mean((1, 2, 3))):
        raise WrongAnswer("Return the mean squared error of the velocity, one number per image.")


@numbered("6.20")
def euler(answer: Callable) -> None:
    """A constant velocity is followed exactly; dx/ds = x grows by a known factor in each step."""
    x, times = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([1.0, 0.7, 0.2, 0.0])
    seen: list[float] = []

    def constant(x: Tensor, tau: Tensor) -> Tensor:
        if tau.numel() != 1:
            raise WrongAnswer("Pass velocity one time for the whole batch, the time where the step starts.")
        seen.append(float(tau))
        return torch.ones_like(x)

    before = x.clone()
    result = answer(constant, x, times)
    if not torch.equal(x, before):
        raise WrongAnswer("x += ... changes the caller's noise. Write x = x + ...")
    expect_shape(result, (2, 2))
    if allclose(result, x + 1):
        raise WrongAnswer("The steps go the wrong way: tau falls from 1 to 0, so each step is negative.")
    if len(seen) == 4:
        raise WrongAnswer("Four times have three steps between them. At tau = 0 there is nothing left to do.")
    if not allclose(result, x - 1):
        raise WrongAnswer("With the velocity 1, x must fall by 1 between tau = 1 and tau = 0.")
    if allclose(torch.tensor(seen), times[1:]):
        raise WrongAnswer("The velocity is taken at the end of each step. Take it at its start.")
    if not allclose(torch.tensor(seen), times[:-1]):
        raise WrongAnswer("Evaluate the velocity once per step, at the time where the step starts.")
    grown = answer(lambda x, tau: x, x, times)
    if allclose(grown, x * (2 / 3) ** 3):
        raise WrongAnswer("Your steps are equally long. These times are not: a step is tau_next - tau.")
    if not allclose(grown, x * 0.7 * 0.5 * 0.8):
        raise WrongAnswer("Evaluate the velocity at the current x in each step, not at the first one.")


@numbered("6.22")
def flow_from_diffusion(answer: Callable) -> None:
    """At a known image and noise, x_tau must lie on their line and the velocity must be that of the line."""
    torch.manual_seed(0)
    x_0, noise = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 8, 8)
    for alpha_bar in (0.9, 0.36, 0.02):
        alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        result = answer(alpha * x_0 + sigma * noise, noise, torch.tensor(alpha_bar))
        if not isinstance(result, tuple) or len(result) != 3:
            raise WrongAnswer("Return three values: tau, x_tau and the velocity.")
        tau, x_tau, velocity = result
        if abs(float(tau) - (1 - alpha_bar)) < 1e-4:
            raise WrongAnswer("You take tau = 1 - alpha_bar. Solve tau / (1 - tau) = sigma / alpha for tau.")
        if abs(float(tau) - sigma) < 1e-4:
            raise WrongAnswer("You take tau = sigma. Solve tau / (1 - tau) = sigma / alpha for tau.")
        if abs(float(tau) - sigma / (alpha + sigma)) > 1e-4:
            raise WrongAnswer("tau must solve tau / (1 - tau) = sigma / alpha.")
        if allclose(x_tau, alpha * x_0 + sigma * noise):
            raise WrongAnswer(
                "x_t is returned as it is. Its factors add up to alpha + sigma, those of x_tau to 1."
            )
        if not allclose(x_tau, (1 - tau) * x_0 + tau * noise):
            raise WrongAnswer("x_tau must be (1 - tau) x_0 + tau noise. Which factor takes x_t there?")
        expect_shape(velocity, (2, 3, 8, 8))
        if allclose(velocity, x_0 - noise):
            raise WrongAnswer("The velocity has the wrong sign: it points from the image to the noise.")
        if not allclose(velocity, noise - x_0):
            raise WrongAnswer("The velocity is eps_hat minus the x_0 that belongs to x_t and eps_hat.")
