"""What checks the reader's functions of adm.ipynb, against independent values."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.exercises import WrongAnswer, allclose, expect_shape, numbered
from common.layers import avg_pool_2x, upsample_nearest_2x
from lesson_01_ddpm.diffusion import GaussianDiffusion, linear_betas
from lesson_03_adm.adm_unet import ADMConfig, ResBlock

DIFFUSION = GaussianDiffusion(linear_betas(1000))


@numbered("3.1")
def ada_gn(answer: Callable) -> None:
    """What a zero embedding, a scale and a shift must do."""
    torch.manual_seed(0)
    norm, h, emb = nn.GroupNorm(4, 8), 3 + torch.randn(2, 8, 5, 5), torch.randn(2, 16)
    nn.init.normal_(norm.weight)
    plain, at_zero = norm(h), answer(norm, h, torch.zeros(2, 16))
    expect_shape(at_zero, (2, 8, 5, 5))
    if not at_zero.any():
        raise WrongAnswer("A zero embedding switches everything off: multiply by 1 + scale, not by scale.")
    if allclose(at_zero, h):
        raise WrongAnswer("h is not normalized.")
    if allclose(at_zero, F.group_norm(h, 4)):
        raise WrongAnswer("Call the layer, norm(h): it has learned weights, which F.group_norm ignores.")
    if not allclose(at_zero, plain):
        raise WrongAnswer("With a zero embedding the result must be norm(h).")

    def expected(scale: Tensor, shift: Tensor) -> Tensor:
        return torch.einsum("nchw,nc->nchw", plain, 1 + scale) + shift[:, :, None, None]

    ours = answer(norm, h, emb)
    if allclose(ours, expected(emb[:, 8:], emb[:, :8])):
        raise WrongAnswer("Scale and shift are swapped: the scales are the first half of emb.")
    if allclose(ours, expected(emb[:, :8], torch.zeros(2, 8))):
        raise WrongAnswer("The shift is missing.")
    if not allclose(ours, expected(emb[:, :8], emb[:, 8:])):
        raise WrongAnswer("The result is wrong for an embedding that is not zero. One scale per channel?")


@numbered("3.2")
def split_heads(answer: Callable) -> None:
    """The first C / heads channels must be the first head's."""
    x = torch.arange(2 * 5 * 12.0).view(2, 5, 12)
    result = answer(x, 3)
    expect_shape(result, (2, 3, 5, 4))
    wanted = torch.stack([x[..., 0:4], x[..., 4:8], x[..., 8:12]], 1)
    if torch.equal(result, torch.stack([x[..., i::3] for i in range(3)], 1)):
        raise WrongAnswer("Each head gets every third channel; it should get neighbouring channels.")
    if torch.equal(result, x.reshape(2, 3, 5, 4)):
        raise WrongAnswer("A plain reshape mixes positions and channels: split the channels, then transpose.")
    if not torch.equal(result, wanted):
        raise WrongAnswer("The channels of a head must stay together: the first 4 are the first head's.")


@numbered("3.3")
def adm_block(answer: Callable) -> None:
    """Compare with the block's parts, taken one by one, with and without a change of resolution."""
    torch.manual_seed(0)
    config = ADMConfig(num_channels=4, num_groups=2)
    emb = torch.randn(2, config.emb_channels)
    for resample, size in ((None, 8), (avg_pool_2x, 4), (upsample_nearest_2x, 16)):
        block, x = ResBlock(4, 6, config, resample), torch.randn(2, 4, 8, 8)
        nn.init.normal_(block.conv_2.weight, std=0.3)
        resized = resample or nn.Identity()
        main = block.conv_1(resized(F.silu(block.norm_1(x))))
        scale, shift = block.emb(F.silu(emb)).split(6, 1)
        normed = torch.einsum("nchw,nc->nchw", block.norm_2(main), 1 + scale) + shift[..., None, None]
        skip, wanted_main = block.skip(resized(x)), block.conv_2(F.silu(normed))
        try:
            result = answer(block, x, emb)
        except RuntimeError as error:
            if "must match the size" in str(error):
                raise WrongAnswer(
                    "The branches have different sizes: resample the main branch and x."
                ) from error
            raise
        expect_shape(result, (2, 6, size, size))
        if allclose(result, wanted_main):
            raise WrongAnswer("The skip connection is missing: add block.skip(x) at the end.")
        if allclose(result, answer(block, x, 0 * emb)):
            raise WrongAnswer("The result does not depend on emb: use ada_gn with block.emb(F.silu(emb)).")
        late = block.norm_2(resized(block.conv_1(F.silu(block.norm_1(x)))))
        late = torch.einsum("nchw,nc->nchw", late, 1 + scale) + shift[..., None, None]
        if resample and allclose(result, skip + block.conv_2(F.silu(late))):
            raise WrongAnswer("Resampling comes before the first convolution, not after it.")
        scale, shift = block.emb(emb).split(6, 1)
        plain = torch.einsum("nchw,nc->nchw", block.norm_2(main), 1 + scale) + shift[..., None, None]
        if allclose(result, skip + block.conv_2(F.silu(plain))):
            raise WrongAnswer("emb has no activation: use block.emb(F.silu(emb)).")
        if not allclose(result, skip + wanted_main):
            off = (result - skip - wanted_main).abs().max().item()
            raise WrongAnswer(
                f"The result is off by up to {off:.2f}. Is there a SiLU before each convolution?"
            )


@numbered("3.4")
def score_from_noise(answer: Callable) -> None:
    """Data from a Gaussian, whose score at every noise level is known."""
    mean, variance = 0.5, 0.3
    x_t = torch.linspace(-2, 2, 9)
    for t in (10, 500, 900):
        a = DIFFUSION.alpha_bar[t].float()
        score = -(x_t - a.sqrt() * mean) / (a * variance + 1 - a)  # of N(sqrt(a) mean, a variance + 1 - a)
        x_0 = mean + a.sqrt() * variance * -score  # E[x_0 | x_t], by linear regression
        eps_hat = (x_t - a.sqrt() * x_0) / (1 - a).sqrt()
        result = answer(eps_hat, a)
        if allclose(result, score):
            continue
        if allclose(result, -score):
            raise WrongAnswer("The sign is wrong: the score points away from the noise, towards the data.")
        if allclose(result, -eps_hat * (1 - a).sqrt()):
            raise WrongAnswer("Divide by sqrt(1 - alpha_bar) instead of multiplying.")
        if allclose(result, -eps_hat / (1 - a)):
            raise WrongAnswer("Divide by the standard deviation of the noise, not by its variance.")
        found = f"at t = {t} and x_t = {x_t[0]:.0f} the score is {score[0]:.3f}"
        raise WrongAnswer(f"For Gaussian data, {found}; your formula gives {result[0]:.3f}.")


@numbered("3.6")
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


@numbered("3.5")
def guided_mean(answer: Callable) -> None:
    """How far the mean moves, and in which direction."""
    mean, gradient, variance = torch.tensor([0.3, -1.0]), torch.tensor([2.0, 0.5]), torch.tensor([0.04, 0.25])
    result = answer(mean, variance, gradient, 3.0)
    if allclose(result, mean + 3 * gradient):
        raise WrongAnswer("The shift does not depend on the step: multiply it by the variance of the step.")
    if allclose(result, mean + 3 * variance.sqrt() * gradient):
        raise WrongAnswer("That is the standard deviation; the variance belongs there.")
    if allclose(result, mean - 3 * variance * gradient):
        raise WrongAnswer("Downhill: log p(y | x_t) must rise, so add the gradient.")
    if allclose(result, mean + variance * gradient):
        raise WrongAnswer("The guidance scale is missing.")
    if not allclose(result, mean + 3 * variance * gradient):
        raise WrongAnswer(
            "For mean 0.3, variance 0.04, gradient 2 and scale 3 the mean must move by 0.24; "
            f"yours moves by {(result - mean)[0]:.2f}."
        )


@numbered("3.7")
def log_p_gradient(answer: Callable) -> None:
    """A linear classifier, whose gradient is known; called as a sampler does, without gradients."""
    torch.manual_seed(0)
    weight, x_t, y = torch.randn(3, 4), torch.randn(5, 1, 2, 2), torch.tensor([0, 1, 2, 1, 0])

    def classifier(x: Tensor, t: Tensor) -> Tensor:
        return x.flatten(1) @ weight.T

    p = classifier(x_t, y).softmax(1)
    wanted = (weight[y] - p @ weight).view_as(x_t)
    with torch.no_grad():
        try:
            result = answer(classifier, x_t, torch.zeros(5, dtype=torch.int64), y)
        except RuntimeError as error:
            if "does not require grad" in str(error):
                raise WrongAnswer(
                    "Samplers run without gradients: use torch.enable_grad(), and requires_grad_ on x_t."
                ) from error
            raise
    expect_shape(result, tuple(x_t.shape))
    if allclose(result, wanted * p.gather(1, y[:, None])[:, :, None, None]):
        raise WrongAnswer("That is the gradient of p(y | x_t). Take the logarithm: log_softmax.")
    if allclose(result, weight[y].view_as(x_t)):
        raise WrongAnswer("That is the gradient of a logit. The softmax is missing: log_softmax.")
    if allclose(result, -wanted):
        raise WrongAnswer("The sign is wrong: that is the gradient of the cross entropy.")
    if allclose(result * 5, wanted) or allclose(-result * 5, wanted):
        raise WrongAnswer("It is too small by the size of the batch: take the sum over images, not the mean.")
    if not allclose(result, wanted):
        raise WrongAnswer("For a linear classifier the gradient is wrong. Is it log p of the class y?")


@numbered("3.8")
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
    if allclose(result, eps_hat - 3 * 0.64 * gradient):
        raise WrongAnswer("The factor is the root of 1 - alpha_bar.")
    if not allclose(result, eps_hat - 3 * 0.8 * gradient):
        raise WrongAnswer(
            "For a predicted noise of 0.5, a gradient of 2, a scale of 3 and alpha_bar 0.36 the result must "
            f"be -4.30; yours is {result[0]:.2f}."
        )
