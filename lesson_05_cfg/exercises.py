"""Exercises of lesson 5. Fill in a function, then see what its check says:

    python lesson_05_cfg/exercises.py

No training is needed. The answers stand in solutions.ipynb.
"""

import numpy as np
import torch

from common.exercises import WrongAnswer, allclose, run_checks

# -- 1. Guidance        topic: classifier-free guidance; easy; 5 minutes


def guide(cond, uncond, s):
    """The network's two answers, each [N, 2C, H, W] (eps_hat, then v) -> the guided answer, of that shape.

    Hint: s = 0 is the answer without caption, s = 1 the one with it. And v is no score.
    """
    raise NotImplementedError


def check_guide(answer=guide):
    """Both ends, beyond, and the variance channels."""
    cond, uncond = torch.randn(2, 6, 4, 4), torch.randn(2, 6, 4, 4)
    at_0, at_1, at_3 = (answer(cond, uncond, s) for s in (0, 1, 3))
    if at_3.shape != cond.shape:
        raise WrongAnswer(f"the answer has shape {tuple(at_3.shape)}; v must be kept, {tuple(cond.shape)}")
    if allclose(at_0[:, :3], cond[:, :3]):
        raise WrongAnswer("at s = 0 the caption still counts: that is w = s - 1 of Ho & Salimans")
    if not (allclose(at_0[:, :3], uncond[:, :3]) and allclose(at_1[:, :3], cond[:, :3])):
        raise WrongAnswer("s = 0 must be the answer without caption, s = 1 the one with it")
    if not allclose(at_3[:, :3] - at_1[:, :3], 2 * (at_1[:, :3] - at_0[:, :3])):
        raise WrongAnswer("from s = 1 to 3 it must go on twice as far as from 0 to 1, on the same line")
    if not allclose(at_3[:, 3:], cond[:, 3:]):
        raise WrongAnswer("v is guided too; it is no score, take it from the answer with the caption")


# -- 2. Who loses the caption        topic: caption dropout; easy; 5 minutes


def drop(mask, probability):
    """mask: bool [N, context], True where there is a token. Each caption goes whole, or stays whole."""
    raise NotImplementedError


def check_drop(answer=drop):
    """The rate, and that every example is drawn by itself."""
    torch.manual_seed(0)
    mask = torch.arange(5) < torch.randint(1, 6, (4000, 1))
    kept = answer(mask.clone(), 0.2)
    gone = ~kept.any(1)
    if (kept != mask)[~gone].any():
        raise WrongAnswer(
            "some captions lose only a part of their tokens; a caption goes whole or stays whole"
        )
    if gone.all() or not gone.any():
        raise WrongAnswer("the whole batch shares one draw; every example needs its own")
    if abs(gone.float().mean() - 0.8) < 0.05:
        raise WrongAnswer("80 % are dropped: that is the share to keep")
    if abs(gone.float().mean() - 0.2) > 0.05:
        raise WrongAnswer(f"{gone.float().mean():.0%} are dropped, not 20 %")


# -- 3. How strong is strong?        topic: dynamic thresholding; medium; 10 minutes


def threshold(x_0, percentile):
    """x_0 [N, C, H, W], out of range after guidance, cut at that percentile of |x_0| and divided by it.

    Hint: `quantile`; the percentile is each sample's own; a sample that is in range stays as it is.
    """
    raise NotImplementedError


def check_threshold(answer=threshold):
    """Against numpy, sample by sample."""
    torch.manual_seed(0)
    x_0 = torch.randn(3, 3, 16, 16) * torch.tensor([0.1, 1.0, 4.0]).view(3, 1, 1, 1)
    ours = answer(x_0.clone(), 90)
    if ours.abs().max() > 1.0001:
        raise WrongAnswer(
            f"values up to {ours.abs().max():.2f} are left; after the division all are in [-1, 1]"
        )
    if not allclose(answer(x_0[1:2].clone(), 90)[0], ours[1]):
        raise WrongAnswer(
            "what becomes of a sample depends on the others in the batch; take a percentile each"
        )
    if not allclose(ours[0], x_0[0]):
        raise WrongAnswer("a sample that was in range changed: the threshold must be at least 1")
    s = np.percentile(np.abs(x_0[2].numpy()), 90)
    if allclose(ours[2], x_0[2].clamp(-1, 1)):
        raise WrongAnswer("that is plain clipping; cut at the percentile, then divide by it")
    if not allclose(ours[2], torch.from_numpy(np.clip(x_0[2].numpy(), -s, s) / s)):
        raise WrongAnswer(
            "the strongest sample is not cut at its own 90th percentile of |x_0| and divided by it"
        )


# -- 4. A step of second order        topic: DPM-Solver++(2M); hard; 20 minutes


def step_2m(x_s, x_0_before, x_0, lambda_before, lambda_s, lambda_t):
    """From x_s to x_t, with x_0 predicted at lambda_before and lambda_s; lambda = log(alpha / sigma).

    Lu et al. 2022, eq. 17: x_t = (sigma_t / sigma_s) x_s - alpha_t (e^-h - 1) D, h = lambda_t - lambda_s, and
    D = (1 + 1 / (2 r)) x_0 - 1 / (2 r) x_0_before, r = (lambda_s - lambda_before) / h.
    Hint: alpha^2 + sigma^2 = 1, so alpha^2 = sigmoid(2 lambda).
    """
    raise NotImplementedError


def check_step_2m(answer=step_2m):
    """For x_0(lambda) = a + b lambda the exact x_t is an integral; the step's error is of third order."""

    def exact(x_s, a, b, start, end):
        """x_t = (sigma_t / sigma_s) x_s + sigma_t * integral of e^lambda (a + b lambda)."""
        sigma_s, sigma_t = (1 / np.sqrt(1 + np.exp(2 * x)) for x in (start, end))
        integral = np.exp(end) * (a + b * (end - 1)) - np.exp(start) * (a + b * (start - 1))
        return sigma_t / sigma_s * x_s + sigma_t * integral

    x_s, a, b, errors = torch.tensor([0.7]), 0.3, 0.5, []
    for h in (0.2, 0.1):
        before, start, end = -0.5 - 0.8 * h, -0.5, -0.5 + h
        x_0_before, x_0 = (torch.tensor([a + b * x]) for x in (before, start))
        ours = answer(x_s, x_0_before, x_0, before, start, end)
        first_order = exact(x_s, a + b * start, 0.0, start, end)
        if (ours - first_order).abs() < 1e-6:
            raise WrongAnswer(
                "x_0 is taken as constant: that is DDIM; the prediction before it must count too"
            )
        errors.append((ours - exact(x_s, a, b, start, end)).abs().item())
    if errors[0] > 0.02:
        raise WrongAnswer(
            f"the step is off by {errors[0]:.3f}; compare sign and size of each term with eq. 17"
        )
    if errors[0] / max(errors[1], 1e-9) < 6:
        ratio = errors[0] / errors[1]
        raise WrongAnswer(
            f"half the step makes the error {ratio:.1f} times smaller, not 8 times; look at D, and r"
        )


CHECKS = [check_guide, check_drop, check_threshold, check_step_2m]

if __name__ == "__main__":
    run_checks(CHECKS)
