"""Exercises on what lesson 6 does besides drawing: enlarging, filling holes, editing, CLIP.

Fill in a function, then see what its check says:

    python lesson_06_miniglide/editing_exercises.py

No training is needed. The answers stand in solutions.ipynb, behind those of exercises.py.
"""

import torch
import torch.nn.functional as F

from common.exercises import WrongAnswer, allclose, run_checks

# -- 1. A small picture, not to be trusted        topic: noise conditioning; easy; 10 minutes


def conditioning(image, size, alpha_bar, noise):
    """What an upsampler sees in training: the picture [N, C, H, W] made small, then noised as x_t is.

    size: of the small picture. alpha_bar: a float. noise: [N, C, size, size].
    Hint: `F.avg_pool2d` makes each small pixel the mean of those that it stands for.
    """
    raise NotImplementedError


def check_conditioning(answer=conditioning):
    """Against means taken by hand, with little noise and with much."""
    torch.manual_seed(0)
    image, noise = torch.rand(2, 3, 64, 64) * 2 - 1, torch.randn(2, 3, 16, 16)
    small = image.unflatten(3, (16, 4)).unflatten(2, (16, 4)).mean((3, 5))
    clean = answer(image, 16, 1.0, noise)
    if clean.shape != small.shape:
        raise WrongAnswer(f"the small picture must be [2, 3, 16, 16], not {list(clean.shape)}")
    if allclose(clean, image[:, :, ::4, ::4]):
        raise WrongAnswer("one pixel of each 4x4 is taken and fifteen are lost; take their mean")
    if not allclose(clean, small):
        raise WrongAnswer(
            "without noise (alpha_bar = 1) it must be the picture made small, pixel by pixel a mean"
        )
    seen = answer(image, 16, 0.3, noise)
    if allclose(seen, small + 0.7**0.5 * noise):
        raise WrongAnswer(
            "noise is added to the whole signal; in x_t the signal is fainter, by sqrt(alpha_bar)"
        )
    if not allclose(seen, 0.3**0.5 * small + 0.7**0.5 * noise):
        raise WrongAnswer("signal and noise are not those of x_t: sqrt(alpha_bar) and sqrt(1 - alpha_bar)")


# -- 2. Filling a hole        topic: inpainting; medium; 10 minutes


def repaint(drawn, image, known, alpha_bar, noise):
    """x_{t-1} of RePaint: the known pixels as noisy as x_{t-1} is, all others as the network has drawn them.

    drawn: x_{t-1} as sampled, [N, C, H, W]. image: the picture, without noise. known: [N, 1, H, W], 1 where
    the image is kept. alpha_bar: that of x_{t-1}, a float. noise: [N, C, H, W].
    """
    raise NotImplementedError


def check_repaint(answer=repaint):
    """Half a picture is known; its noise must be that of the other half."""
    torch.manual_seed(0)
    drawn, image, noise = torch.randn(3, 2, 3, 8, 8)
    known = torch.zeros(2, 1, 8, 8)
    known[..., :4] = 1
    x = answer(drawn, image, known, 0.4, noise)
    noisy = 0.4**0.5 * image + 0.6**0.5 * noise
    if allclose(x[..., 4:], noisy[..., 4:]) and allclose(x[..., :4], drawn[..., :4]):
        raise WrongAnswer("drawn and kept have changed places: `known` is 1 where the image is kept")
    if not allclose(x[..., 4:], drawn[..., 4:]):
        raise WrongAnswer("where nothing is known, x must be what was drawn")
    if allclose(x[..., :4], image[..., :4]):
        raise WrongAnswer(
            "the known pixels have no noise; the network has never seen a picture that is half noisy"
        )
    if not allclose(x[..., :4], noisy[..., :4]):
        raise WrongAnswer("signal and noise of the known pixels: sqrt(alpha_bar) and sqrt(1 - alpha_bar)")


# -- 3. Half way back        topic: image to image; easy; 5 minutes


def half_way(image, strength, alpha_bar, noise):
    """Where SDEdit begins: (t, x_t) after the share `strength` of the T noising steps. At 1: t = T - 1.

    alpha_bar: [T]. Hint: t counts from 0, so after n steps it is n - 1.
    """
    raise NotImplementedError


def check_half_way(answer=half_way):
    """A quarter, a half, all of 100 steps."""
    torch.manual_seed(0)
    alpha_bar, (image, noise) = torch.linspace(0.99, 0.01, 100), torch.randn(2, 2, 3, 8, 8)
    for strength in (0.25, 0.5, 1.0):
        t, x_t = answer(image, strength, alpha_bar, noise)
        wanted = round(strength * 100) - 1
        if t == 99 - wanted - 1 and strength == 0.25:
            raise WrongAnswer("a strength of 0.25 changes little: a quarter of the steps, not three quarters")
        if t == wanted + 1:
            raise WrongAnswer(f"after {wanted + 1} steps t is {wanted}: it counts from 0")
        if t != wanted:
            raise WrongAnswer(f"strength {strength} of 100 steps: t is {t}, wanted {wanted}")
        if allclose(x_t, noise):
            raise WrongAnswer("x_t is noise alone; it must keep what is left of the image")
        if not allclose(x_t, alpha_bar[t] ** 0.5 * image + (1 - alpha_bar[t]) ** 0.5 * noise):
            raise WrongAnswer("x_t must be q(x_t | image) at the alpha_bar of that t")


# -- 4. Pictures and captions that belong together        topic: CLIP; hard; 20 minutes


def clip_loss(images, captions, scale):
    """CLIP's loss, a number: images and captions are [N, D], row i of one belongs to row i of the other.

    Their cosines, times scale, are logits: which caption is this picture's, and which picture is this
    caption's? The loss is the mean of the two cross entropies.
    """
    raise NotImplementedError


def check_clip_loss(answer=clip_loss):
    """Against the definition, on vectors of any length."""
    torch.manual_seed(0)
    images, captions = torch.randn(2, 6, 16)
    captions = captions + images

    def loss(cosines, ways=(0, 1)):
        logits = 8 * cosines
        log_p = [logits.log_softmax(1 - way).diagonal().mean() for way in ways]
        return -sum(log_p) / len(ways)

    cosines = F.cosine_similarity(images[:, None], captions[None], dim=2)
    said = answer(images, captions, 8.0)
    if allclose(said, loss(images @ captions.T)):
        raise WrongAnswer("long vectors count more: bring them to length 1 first")
    if any(allclose(said, loss(cosines, ways=(way,))) for way in (0, 1)):
        raise WrongAnswer(
            "one question only; ask for each picture's caption *and* for each caption's picture"
        )
    if allclose(said, loss(cosines / 64)):
        raise WrongAnswer("the cosines are divided by the scale; they are to be multiplied")
    if allclose(said, 2 * loss(cosines)):
        raise WrongAnswer("the two cross entropies are added; take their mean")
    if not allclose(said, loss(cosines)):
        raise WrongAnswer(f"{said:.4f}, but the definition gives {loss(cosines):.4f}")


CHECKS = [check_conditioning, check_repaint, check_half_way, check_clip_loss]

if __name__ == "__main__":
    run_checks(CHECKS)
