"""Exercises of lesson 3. Fill in a function, then see what its check says:

    python lesson_03_adm/exercises.py

No training is needed. The answers stand in solutions.ipynb.
"""

import torch
import torch.nn.functional as F

from common.exercises import Wrong, close, run_checks

# -- 1. Scale and shift        topic: AdaGN; easy; 5 minutes


def ada_gn(h, y, groups):
    """(1 + scale) GroupNorm(h) + shift. h: [N, C, H, W]. y: [N, 2C], all channels' scales, then the shifts.

    Hint: `F.group_norm`, `chunk`, and two more axes for y.
    """
    raise NotImplementedError


def check_ada_gn(answer=ada_gn):
    """What a zero y, a scale of -1 and a shift must do."""
    torch.manual_seed(0)
    h, y = 3 + torch.randn(2, 8, 5, 5), torch.randn(2, 16)
    plain, at_zero = F.group_norm(h, 4), answer(h, torch.zeros(2, 16), 4)
    if not at_zero.any():
        raise Wrong("a zero y switches everything off: the scale is added to 1")
    if close(at_zero, h):
        raise Wrong("h is not normalised")
    if not close(at_zero, plain):
        raise Wrong("with a zero y it must be GroupNorm, as many groups as asked for")

    def expected(first, second):
        return torch.einsum("nchw,nc->nchw", plain, 1 + first) + second[:, :, None, None]

    ours, wanted = answer(h, y, 4), expected(y[:, :8], y[:, 8:])
    if close(ours, expected(y[:, 8:], y[:, :8])):
        raise Wrong("scale and shift are swapped: the scales come first in y")
    if not close(ours, wanted):
        raise Wrong(f"off by up to {(ours - wanted).abs().max():.2f} for y that is not zero")


# -- 2. In heads        topic: attention; medium; 15 minutes


def attend_in_heads(q, k, v, heads):
    """q, k, v: [N, places, C] -> [N, places, C]. Each head attends with its own C / heads channels.

    Hint: einops' `rearrange`, or `unflatten` and `transpose`; `F.scaled_dot_product_attention`.
    """
    raise NotImplementedError


def check_attend_in_heads(answer=attend_in_heads):
    """Against each head by itself."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 7, 12).unbind(0)
    ours = answer(q, k, v, 3)
    if ours.shape != q.shape:
        raise Wrong(f"the result has shape {tuple(ours.shape)}, wanted {tuple(q.shape)}")
    if close(ours, F.scaled_dot_product_attention(q, k, v)):
        raise Wrong("that is one head of all channels")
    parts = [slice(4 * i, 4 * i + 4) for i in range(3)]
    wanted = [F.scaled_dot_product_attention(q[..., p], k[..., p], v[..., p]) for p in parts]
    if not close(ours, torch.cat(wanted, 2)):
        raise Wrong("a head's channels must stay together: the first C / heads channels are the first head's")


# -- 3. What the classifier says        topic: classifier guidance; medium; 15 minutes


def gradient(classifier, x_t, t, y):
    """grad log p(y | x_t) by x_t, [N, C, H, W]. classifier: (x_t, t) -> logits [N, K]. y: int64 [N].

    Samplers run under `torch.no_grad()`. Hint: `torch.enable_grad`, `log_softmax`, `torch.autograd.grad`.
    """
    raise NotImplementedError


def check_gradient(answer=gradient):
    """A linear classifier, whose gradient has a formula."""
    torch.manual_seed(0)
    weights = torch.randn(4, 3)
    x_t, t, y = torch.randn(5, 1, 2, 2), torch.arange(5), torch.tensor([0, 1, 2, 0, 1])

    def classifier(x, t):
        return x.flatten(1) @ weights

    with torch.no_grad():
        try:
            ours = answer(classifier, x_t.clone(), t, y)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            raise Wrong("no gradient under no_grad: enable it inside") from None
    p = (x_t.flatten(1) @ weights).softmax(1)
    of_logit = weights.T[y].view_as(x_t)
    wanted = of_logit - (p @ weights.T).view_as(x_t)
    if close(ours, of_logit):
        raise Wrong("that is the logit's gradient; log p also has the other classes, through log_softmax")
    if close(ours, wanted * p.gather(1, y[:, None])[:, :, None, None]):
        raise Wrong("that is the gradient of p, not of log p")
    if not close(ours, wanted):
        raise Wrong(f"off by up to {(ours - wanted).abs().max():.2f}; is it log p of each sample's own y?")
    if ours.requires_grad:
        raise Wrong("the result still hangs on the graph; the sampler would keep all steps in memory")


# -- 4. A led step        topic: classifier guidance; easy; 5 minutes


def led_mean(mean, log_variance, grad, scale):
    """The mean of an ancestral step that the classifier leads (Dhariwal & Nichol 2021, algorithm 1)."""
    raise NotImplementedError


def check_led_mean(answer=led_mean):
    """How far it is pushed, and where to."""
    mean, grad = torch.tensor([0.3, -1.0]), torch.tensor([2.0, 0.5])
    log_variance = torch.tensor([0.04, 0.25]).log()
    ours = answer(mean, log_variance, grad, 3.0)
    if close(ours, mean + 3 * grad):
        raise Wrong("a push of the same size at every step: it must shrink with the step's variance")
    if close(ours, mean + 3 * (0.5 * log_variance).exp() * grad):
        raise Wrong("that is the standard deviation; the variance belongs there")
    if close(ours, mean - 3 * log_variance.exp() * grad):
        raise Wrong("downhill: log p(y | x_t) must rise")
    if not close(ours, mean + 3 * log_variance.exp() * grad):
        raise Wrong(f"{ours.tolist()} instead of mean + scale * variance * gradient")


CHECKS = [check_ada_gn, check_attend_in_heads, check_gradient, check_led_mean]

if __name__ == "__main__":
    run_checks(CHECKS)
