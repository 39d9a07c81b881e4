"""What checks the reader's functions of adm.ipynb, against independent values."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common.exercises import WrongAnswer, allclose, expect_shape, explaining, numbered
from lesson_01_ddpm.diffusion import GaussianDiffusion, linear_betas
from lesson_03_adm.unet_checks import ada_gn, adm_block, class_conditional, split_heads

__all__ = [
    "ada_gn",
    "adm_block",
    "class_conditional",
    "classifier_loss",
    "guided_mean",
    "guided_noise",
    "log_density",
    "log_p_gradient",
    "split_heads",
]

DIFFUSION = GaussianDiffusion(linear_betas(1000))


@numbered("3.5")
def log_density(answer: Callable) -> None:
    """Compare differences between noisy images, in which a constant has no effect."""
    torch.manual_seed(0)
    data, x_t = 0.5 * torch.randn(3, 1, 4, 4), torch.randn(6, 1, 4, 4)

    def squared(fade: float) -> Tensor:
        return (x_t[:, None] - fade * data).square().sum((2, 3, 4))

    for a in (0.2, 0.6):
        exponent = -squared(a**0.5) / (2 * (1 - a))
        with explaining(
            "must match the size",
            "Compare each noisy image with every clean one: x_t[:, None] makes room for them.",
        ):
            result = answer(x_t, data, torch.tensor(a))
        if isinstance(result, Tensor) and result.shape == (6, 3):
            raise WrongAnswer("That is one value per clean image: sum their densities (dim 1).")
        if isinstance(result, Tensor) and result.shape == (3,):
            raise WrongAnswer(
                "The sum runs over the wrong dimension: one value per noisy image, not per clean one."
            )
        if not answer(x_t + 100, data, torch.tensor(a)).isfinite().all():
            raise WrongAnswer("Far from the data every density rounds to 0, and log 0 = -inf: use logsumexp.")
        expect_shape(result, (6,))
        for message, wrong in (
            ("That is the density; return its logarithm.", exponent.logsumexp(1).exp()),
            ("The sign is wrong: an image far away must count less.", (-exponent).logsumexp(1)),
            ("The sign is wrong: log p must be large near the data.", -exponent.logsumexp(1)),
            ("The mean is not x_0 but sqrt(alpha_bar) x_0.", (-squared(1) / (2 * (1 - a))).logsumexp(1)),
            ("The means have the factor sqrt(alpha_bar).", (-squared(a) / (2 * (1 - a))).logsumexp(1)),
            ("The variance is 1 - alpha_bar, not its root.", (exponent * (1 - a) ** 0.5).logsumexp(1)),
            ("The variance is 1 - alpha_bar, not alpha_bar.", (exponent * (1 - a) / a).logsumexp(1)),
            ("Square the distances.", (-squared(a**0.5).sqrt() / (2 * (1 - a))).logsumexp(1)),
            ("The 2 of the Gaussian's exponent is missing.", (2 * exponent).logsumexp(1)),
            ("Sum the squares over the pixels; do not average them.", (exponent / 16).logsumexp(1)),
            ("That is the nearest image alone; all of them count.", exponent.amax(1)),
            ("Add the densities first, then take the logarithm.", exponent.sum(1)),
            ("Add the densities first, then take the logarithm.", exponent.mean(1)),
        ):
            if allclose(result.diff(), wrong.diff()):
                raise WrongAnswer(message)
        wanted = exponent.logsumexp(1).diff()
        if not allclose(result.diff(), wanted):
            worst = int((result.diff() - wanted).abs().argmax())
            found = f"must differ by {wanted[worst]:.2f}; yours differ by {result.diff()[worst]:.2f}."
            raise WrongAnswer(f"The values of two noisy images {found}")


@numbered("3.6")
def log_p_gradient(answer: Callable) -> None:
    """A classifier linear in x, whose gradient is known; called as a sampler does, without gradients."""
    torch.manual_seed(0)
    weight, x_t, y = torch.randn(3, 4), torch.randn(5, 1, 2, 2), torch.tensor([0, 1, 2, 1, 0])
    t = torch.tensor([999, 0, 250, 500, 750])

    def classifier(x: Tensor, t: Tensor) -> Tensor:
        if x.shape[1:] != (1, 2, 2) or t.shape != x.shape[:1]:
            raise WrongAnswer("The classifier takes x_t [N, C, H, W] and t [N], as your function gets them.")
        return x.flatten(1) @ weight.T * (1 + t[:, None] / 500)

    def gradient(t: Tensor, label: Tensor = y) -> Tensor:
        p = classifier(x_t, t).softmax(1)
        return ((weight[label] - p @ weight) * (1 + t[:, None] / 500)).view_as(x_t)

    p, wanted = classifier(x_t, t).softmax(1), gradient(t)
    with (
        torch.no_grad(),
        explaining(
            "does not require grad",
            "Samplers run without gradients: use torch.enable_grad(), and requires_grad_ on x_t.",
        ),
        explaining("only for scalar outputs", "autograd.grad needs a single number: sum over the images."),
    ):
        result = answer(classifier, x_t, t, y)
    if isinstance(result, tuple):
        raise WrongAnswer("autograd.grad returns a tuple, one gradient per input: take [0].")
    if x_t.requires_grad:
        raise WrongAnswer("Your function changed the sampler's own x_t: start from x_t.detach().")
    expect_shape(result, tuple(x_t.shape))
    if any(allclose(result, gradient(torch.full_like(t, i))) for i in (0, 1)):
        raise WrongAnswer("The classifier must get t: it has to know how noisy x_t is.")
    if allclose(result, wanted * p.gather(1, y[:, None])[:, :, None, None]):
        raise WrongAnswer("That is the gradient of p(y | x_t). Take the logarithm: log_softmax.")
    if allclose(result, (weight[y] * (1 + t[:, None] / 500)).view_as(x_t)):
        raise WrongAnswer("That is the gradient of a logit. The softmax is missing: log_softmax.")
    if allclose(result, -wanted):
        raise WrongAnswer("The sign is wrong: that is the gradient of the cross entropy.")
    if allclose(result * 5, wanted) or allclose(-result * 5, wanted):
        raise WrongAnswer("It is too small by the size of the batch: take the sum over images, not the mean.")
    of_class = torch.stack([gradient(t, torch.full_like(y, k)) for k in range(3)])
    if allclose(result, of_class[y].sum(0)):
        raise WrongAnswer(
            "log_p[:, y] is [N, N], every image with every class of the batch: gather one each."
        )
    if allclose(result, of_class.sum(0)):
        raise WrongAnswer("That is the sum over all classes. Take log p of the class y only.")
    x = x_t.clone().requires_grad_()
    over_batch = classifier(x, t).log_softmax(0).gather(1, y[:, None]).sum()
    if allclose(result, torch.autograd.grad(over_batch, x)[0]):
        raise WrongAnswer("The softmax runs over the batch: log_softmax(1).")
    if not allclose(result, wanted):
        raise WrongAnswer("For a classifier linear in x the gradient is wrong. Is it log p of the class y?")


@numbered("3.7")
def guided_mean(answer: Callable) -> None:
    """How far the mean moves, and in which direction."""
    mean, gradient, variance = torch.tensor([0.3, -1.0]), torch.tensor([2.0, 0.5]), torch.tensor([0.04, 0.25])
    result = answer(mean, variance, gradient, 3.0)
    expect_shape(result, (2,))
    if allclose(result, mean + 3 * gradient):
        raise WrongAnswer("The shift does not depend on the step: multiply it by the variance of the step.")
    if allclose(result, mean + 3 * variance.sqrt() * gradient):
        raise WrongAnswer("That is the standard deviation; the variance belongs there.")
    if allclose(result, mean - 3 * variance * gradient):
        raise WrongAnswer("Downhill: log p(y | x_t) must rise, so add the gradient.")
    if allclose(result, mean + variance * gradient):
        raise WrongAnswer("The guidance scale is missing.")
    if allclose(result, mean + 3 * gradient / variance):
        raise WrongAnswer("The narrower the step, the smaller the shift: multiply by the variance.")
    if not allclose(result, mean + 3 * variance * gradient):
        raise WrongAnswer(
            "For mean 0.3, variance 0.04, gradient 2 and scale 3 the mean must move by 0.24; "
            f"yours moves by {(result - mean)[0]:.2f}."
        )


@numbered("3.8")
def classifier_loss(answer: Callable) -> None:
    """Classifiers whose loss is known; which images and timesteps they get."""
    torch.manual_seed(0)
    x_0, label, seen = torch.rand(200, 1, 8, 8) * 2 - 1, torch.arange(200) % 10, []

    def undecided(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append((x_t, t))
        return torch.zeros(len(x_t), 10)

    loss = answer(DIFFUSION, undecided, x_0, label)
    if not seen:
        raise WrongAnswer("The classifier was not called.")
    x_t, t = seen[0]
    if allclose(x_t, x_0):
        raise WrongAnswer("The classifier sees clean images; guidance will show it noisy ones. Use q_sample.")
    if t.shape == (200,) and not t.any():
        raise WrongAnswer("The classifier always gets t = 0: give it the t that q_sample got.")
    if t.shape != (200,) or len(t.unique()) < 50 or t.min() > 100 or t.max() < 900:
        raise WrongAnswer("Every image needs a random t of its own, between 0 and 999.")
    noise = DIFFUSION.noise_from_x_0(x_t, t, x_0)[t > 20]  # below, rounding is all there is
    if noise.abs().max() < 1e-2:
        raise WrongAnswer("The noise is zero: draw it with randn_like.")
    if abs(noise.std().item() - 1) > 0.05 or abs(noise.mean().item()) > 0.05:
        raise WrongAnswer(
            f"For the t that the classifier gets, the noise in x_t has mean {noise.mean():.2f} and standard "
            f"deviation {noise.std():.2f}. Is it from randn, and the same t in q_sample?"
        )
    if not isinstance(loss, Tensor) or loss.shape != ():
        raise WrongAnswer("Return a single number, the mean over the batch.")
    if abs(loss.item()) < 1e-6:
        raise WrongAnswer("nll_loss expects log probabilities; cross_entropy takes the logits.")
    if abs(loss.item() - math.log(10)) > 1e-4:
        raise WrongAnswer(
            f"A classifier that cannot decide has the loss log 10 = 2.303; yours is {loss:.3f}."
        )
    logits = 20.0 * F.one_hot(label, 10)
    certain = answer(DIFFUSION, lambda x_t, t: logits, x_0, label)
    if allclose(certain, F.cross_entropy(logits.softmax(1), label)):
        raise WrongAnswer("cross_entropy takes logits and applies the softmax itself.")
    if certain.item() > 1e-3:
        raise WrongAnswer("A classifier that is right and certain must have a loss of 0.")


@numbered("3.10")
def guided_noise(answer: Callable) -> None:
    """The score that the result stands for is the sum of the network's and the classifier's."""
    eps_hat, gradient, a = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.3]), torch.tensor(0.36)
    result = answer(eps_hat, gradient, a, 3.0)
    expect_shape(result, (2,))
    if allclose(result, eps_hat + 3 * 0.8 * gradient):
        raise WrongAnswer("The sign is wrong: noise points away from the data, so subtract the gradient.")
    if allclose(result, eps_hat - 3 * gradient):
        raise WrongAnswer("A gradient becomes a noise by the factor sqrt(1 - alpha_bar).")
    if allclose(result, eps_hat - 0.8 * gradient):
        raise WrongAnswer("The guidance scale is missing.")
    if allclose(result, eps_hat - 3 * gradient / 0.8):
        raise WrongAnswer("From a score to a noise you multiply by sqrt(1 - alpha_bar); you divide by it.")
    if allclose(result, eps_hat - 3 * 0.64 * gradient):
        raise WrongAnswer("The factor is the root of 1 - alpha_bar.")
    if allclose(result, eps_hat - 3 * 0.6 * gradient):
        raise WrongAnswer("The factor is sqrt(1 - alpha_bar), not sqrt(alpha_bar).")
    if allclose(result, 3 * (eps_hat - 0.8 * gradient)):
        raise WrongAnswer("The scale belongs to the gradient alone.")
    if allclose(result, -eps_hat / 0.8 + 3 * gradient):
        raise WrongAnswer("That is the guided score. Turn it into a noise again.")
    if not allclose(result, eps_hat - 3 * 0.8 * gradient):
        raise WrongAnswer(
            "For a predicted noise of 0.5, a gradient of 2, a scale of 3 and alpha_bar 0.36 the result must "
            f"be -4.30; yours is {result[0]:.2f}."
        )
