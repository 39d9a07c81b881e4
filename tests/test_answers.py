"""The exercises in the notebooks of lessons 1 to 3: right answers pass, and wrong ones hear what is wrong."""

import math

import pytest
import torch
import torch.nn.functional as F

from common.exercises import WrongAnswer, exercise, expect_shape, is_blank, judge, numbered
from lesson_01_ddpm import checks as checks_1
from lesson_01_ddpm import solutions as lesson_1
from lesson_01_ddpm.solutions import alpha_bar, alpha_bar_prev, beta_tilde, betas, per_image, q_sample
from lesson_02_improved_ddpm import checks as checks_2
from lesson_02_improved_ddpm import solutions as lesson_2
from lesson_02_improved_ddpm.variational_bound import vb_terms_bpd
from lesson_03_adm import checks as checks_3
from lesson_03_adm import solutions as lesson_3

LESSONS = {1: (checks_1, lesson_1), 2: (checks_2, lesson_2), 3: (checks_3, lesson_3)}


def exercises(lesson):
    """Return the names of a lesson's exercises, in their order."""
    checks, solutions = LESSONS[lesson]
    names = [name for name in vars(checks) if hasattr(getattr(checks, name), "number")]
    assert all(hasattr(solutions, name) for name in names)
    return sorted(names, key=lambda name: getattr(checks, name).number)


ALL = [(lesson, name) for lesson in LESSONS for name in exercises(lesson)]


def test_the_number_of_exercises():
    assert [len(exercises(lesson)) for lesson in LESSONS] == [7, 6, 7]


@pytest.mark.parametrize("lesson, name", ALL)
def test_solutions_are_correct(lesson, name):
    checks, solutions = LESSONS[lesson]
    assert judge(getattr(solutions, name), getattr(checks, name)) == "correct."


# -- lesson 1 ------------------------------------------------------------------------------------------------


def residual_block(block, x, emb, use_emb=True, skip=True, activation=F.silu):
    h = block.conv_1(activation(block.norm_1(x)))
    if use_emb:
        h = h + block.emb(F.silu(emb))[:, :, None, None]
    h = block.conv_2(F.silu(block.norm_2(h)))
    return block.skip(x) + h if skip else h


def loss_fn(network, x_0, t=None, target=None, noisy=True, reduce=torch.mean):
    t = torch.randint(1000, (len(x_0),)) if t is None else t
    noise = torch.randn_like(x_0)
    x_t = q_sample(x_0, t, noise) if noisy else x_0
    return reduce((network(x_t, t) - (noise if target is None else target(x_0))).square())


def train_step(network, optimizer, x_0, zero=True, step=True, as_float=True):
    loss = lesson_1.loss_fn(network, x_0)
    if zero:
        optimizer.zero_grad()
    loss.backward()
    if step:
        optimizer.step()
    return loss.item() if as_float else loss


def posterior_mean(x_0, x_t, t, previous=alpha_bar_prev, swap=False):
    coef_0 = previous.sqrt() * betas / (1 - alpha_bar)
    coef_t = (1 - betas).sqrt() * (1 - previous) / (1 - alpha_bar)
    x_0, x_t = (x_t, x_0) if swap else (x_0, x_t)
    return per_image(coef_0, t) * x_0 + per_image(coef_t, t) * x_t


def reverse_step(network, x_t, t, std=None, last=False, clamp=True):
    steps = torch.full((len(x_t),), t)
    x_0 = lesson_1.x_0_from_noise(x_t, steps, network(x_t, steps))
    mean = lesson_1.posterior_mean(x_0.clamp(-1, 1) if clamp else x_0, x_t, steps)
    std = beta_tilde.sqrt() if std is None else std
    sigma = std[max(t, 1)].float() if t or last else 0
    return mean + sigma * torch.randn_like(x_t)


def root(table, t):
    return per_image(table.sqrt(), t)


WRONG_1 = {
    "q_sample": {
        "take their roots": lambda x, t, n: per_image(alpha_bar, t) * x + per_image(1 - alpha_bar, t) * n,
        "too weak": lambda x, t, n: root(alpha_bar, t) * x + per_image(1 - alpha_bar, t) * n,
        "a single step": lambda x, t, n: root(1 - betas, t) * x + root(betas, t) * n,
        "too faint": lambda x, t, n: per_image(alpha_bar, t) * x + root(1 - alpha_bar, t) * n,
        "each other's": lambda x, t, n: root(1 - alpha_bar, t) * x + root(alpha_bar, t) * n,
        "the chain gives": lambda x, t, n: root(alpha_bar, t) * x + 1.1 * root(1 - alpha_bar, t) * n,
        "expected": lambda x, t, n: x[0],
    },
    "x_0_from_noise": {
        "as faint": lambda x, t, n: x - root(1 - alpha_bar, t) * n,
        "once too often": lambda x, t, n: (x - root(1 - alpha_bar, t) * n) / per_image(alpha_bar, t),
        "Only x_t": lambda x, t, n: x / root(alpha_bar, t) - root(1 - alpha_bar, t) * n,
        "sign is wrong": lambda x, t, n: (x + root(1 - alpha_bar, t) * n) / root(alpha_bar, t),
    },
    "residual_block": {
        "skip connection": lambda *args: residual_block(*args, skip=False),
        "depend on emb": lambda *args: residual_block(*args, use_emb=False),
        "order is norm": lambda *args: residual_block(*args, activation=F.relu),
    },
    "loss_fn": {
        "same t": lambda network, x: loss_fn(network, x, torch.randint(1000, (1,)).expand(len(x))),
        "add the noise first": lambda network, x: loss_fn(network, x, noisy=False),
        "noise in x_t": lambda network, x: loss_fn(network, x, target=lambda x: 3**0.5 * x),
        "near 1": lambda network, x: loss_fn(network, x, reduce=torch.sum),
        "one integer t": lambda network, x: loss_fn(network, x, torch.randint(1000, (1,))),
        "from 0 to 999": lambda network, x: loss_fn(network, x, torch.randint(100, (len(x),))),
        "is exclusive": lambda network, x: loss_fn(network, x, torch.randint(999, (len(x),))),
        "not called": lambda network, x: torch.tensor(1.0),
        "single number": lambda network, x: loss_fn(network, x, reduce=lambda e: e.mean((1, 2, 3))),
    },
    "train_step": {
        "zero_grad": lambda *args: train_step(*args, zero=False),
        "has not changed": lambda *args: train_step(*args, step=False),
        "as a float": lambda *args: train_step(*args, as_float=False),
    },
    "posterior_mean": {
        "swapped": lambda *args: posterior_mean(*args, swap=True),
        "At t = 0": lambda x_0, x_t, t: posterior_mean(x_0, x_t, t, alpha_bar_prev.clamp(max=0.9999)),
        "the product of the densities": lambda x_0, x_t, t: posterior_mean(x_0, x_t, t, alpha_bar),
    },
    "reverse_step": {
        "adds no noise": lambda *args: reverse_step(*args, std=0 * betas),
        "beta_tilde is": lambda *args: reverse_step(*args, std=betas.sqrt()),
        "multiplied by the variance": lambda *args: reverse_step(*args, std=beta_tilde),
        "standard deviation": lambda *args: reverse_step(*args, std=2 * beta_tilde.sqrt()),
        "last step": lambda *args: reverse_step(*args, last=True),
        "not clamped": lambda *args: reverse_step(*args, clamp=False),
        "one t per image": lambda network, x_t, t: network(x_t, torch.tensor([t])),
    },
}

# -- lesson 2 ------------------------------------------------------------------------------------------------


def cosine_betas(T, power=2, largest=0.999):
    u = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** power
    return (1 - f[1:] / f[:-1]).clamp(max=largest)


def loss_hybrid(diffusion, network, x_0, t, noise, weight=1.0, stop_eps=True, stop_v=False):
    x_t = diffusion.q_sample(x_0, t, noise)
    eps_hat, v = network(x_t, t).chunk(2, 1)
    parts = [eps_hat.detach() if stop_eps else eps_hat, v.detach() if stop_v else v]
    bits = vb_terms_bpd(diffusion, torch.cat(parts, 1), x_0, x_t, t)
    return (eps_hat - noise).square().flatten(1).mean(1) + weight * bits


WRONG_2 = {
    "cosine_betas": {
        "clamp to 0.999": lambda T: cosine_betas(T, largest=1.0),
        "clips at 0.999": lambda T: cosine_betas(T, largest=0.99),
        "square of the cosine": lambda T: cosine_betas(T, power=1),
        "alpha_bar is c": lambda T: cosine_betas(T, power=3),
    },
    "normal_kl": {
        "the reverse": lambda m, v, n, w: lesson_2.normal_kl(n, w, m, v),
        "NaN": lambda m, v, n, w: lesson_2.normal_kl(m, v.log(), n, w),
        "in bits": lambda *args: lesson_2.normal_kl(*args) / math.log(2),
        "your formula gives": lambda *args: 2 * lesson_2.normal_kl(*args),
    },
    "learned_log_variance": {
        "limits are swapped": lambda v, low, high: lesson_2.learned_log_variance(v, high, low),
        "v = -1 gives": lambda v, low, high: v * high + (1 - v) * low,
        "Interpolate the logarithms": lambda v, low, high: (
            (v + 1) / 2 * high.exp() + (1 - v) / 2 * low.exp()
        ).log(),
    },
    "loss_hybrid": {
        "bound is missing": lambda *args: loss_hybrid(*args, weight=0),
        "1000 times too little": lambda *args: loss_hybrid(*args, weight=0.001),
        "factor 0.001": lambda *args: loss_hybrid(*args, weight=1000),
        "reaches eps_hat": lambda *args: loss_hybrid(*args, stop_eps=False),
        "v gets no gradient": lambda *args: loss_hybrid(*args, stop_v=True),
        "squared_error + ": lambda *args: loss_hybrid(*args, weight=2),
    },
    "respaced_betas": {
        "old betas": lambda alpha_bar, kept: betas[kept],
        "A beta is 1 -": lambda alpha_bar, kept: 1 - (1 - betas[kept]) ** 2,
        "expected (4,)": lambda alpha_bar, kept: betas,
    },
    "ddim_step": {
        "square roots": lambda x, eps, a: a * x + (1 - a) * eps,
        "noise is gone": lambda x, eps, a: a**0.5 * x,
        "each other's": lambda x, eps, a: (1 - a) ** 0.5 * x + a**0.5 * eps,
        "must be q_sample": lambda x, eps, a: x + (1 - a) ** 0.5 * eps,
    },
}

# -- lesson 3 ------------------------------------------------------------------------------------------------


def ada_gn(h, emb, groups, one=1, shifted=True, norm=F.group_norm, swap=False):
    scale, shift = emb[:, :, None, None].chunk(2, 1)
    scale, shift = (shift, scale) if swap else (scale, shift)
    return norm(h, groups) * (one + scale) + shift * shifted


def classifier_loss(
    diffusion, classifier, x_0, label, t=None, noisy=True, of=F.cross_entropy, noise=torch.randn_like, shift=0
):
    t = torch.randint(1000, (len(x_0),)) if t is None else t
    x_t = diffusion.q_sample(x_0, t, noise(x_0)) if noisy else x_0
    return of(classifier(x_t, (t + shift) % 1000), label)


def log_p_gradient(classifier, x_t, t, y, log_p=lambda logits: logits.log_softmax(1)):
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_(True)
        of_y = log_p(classifier(x_t, t)).gather(1, y[:, None])
        return torch.autograd.grad(of_y.sum(), x_t)[0]


WRONG_3 = {
    "ada_gn": {
        "1 + scale": lambda *args: ada_gn(*args, one=0),
        "not normalized": lambda *args: ada_gn(*args, norm=lambda h, groups: h),
        "num_groups groups": lambda h, emb, groups: ada_gn(h, emb, 8),
        "swapped": lambda *args: ada_gn(*args, swap=True),
        "shift is missing": lambda *args: ada_gn(*args, shifted=False),
    },
    "split_heads": {
        "plain reshape": lambda x, heads: x.reshape(len(x), heads, x.shape[1], -1),
        "every third": lambda x, heads: x.unflatten(2, (-1, heads)).permute(0, 3, 1, 2),
        "expected (2, 3, 5, 4)": lambda x, heads: x.unflatten(2, (heads, -1)),
    },
    "score_from_noise": {
        "sign is wrong": lambda eps, a: eps / (1 - a).sqrt(),
        "Divide by": lambda eps, a: -eps * (1 - a).sqrt(),
        "not by its variance": lambda eps, a: -eps / (1 - a),
        "your formula gives": lambda eps, a: -2 * eps / (1 - a).sqrt(),
    },
    "guided_mean": {
        "on the step": lambda mean, variance, g, s: mean + s * g,
        "the variance belongs": lambda mean, variance, g, s: mean + s * variance.sqrt() * g,
        "Downhill": lambda mean, variance, g, s: mean - s * variance * g,
        "scale is missing": lambda mean, variance, g, s: mean + variance * g,
        "must move by": lambda mean, variance, g, s: mean + 2 * s * variance * g,
    },
    "log_p_gradient": {
        "the logarithm": lambda *args: log_p_gradient(*args, log_p=lambda logits: logits.softmax(1)),
        "softmax is missing": lambda *args: log_p_gradient(*args, log_p=lambda logits: logits),
        "sign is wrong": lambda *args: -log_p_gradient(*args),
        "size of the batch": lambda *args: log_p_gradient(*args) / 5,
        "enable_grad": lambda classifier, x, t, y: torch.autograd.grad(classifier(x, t).sum(), x)[0],
        "the class y": lambda c, x, t, y: log_p_gradient(c, x, t, 0 * y),
    },
    "guided_noise": {
        "sign is wrong": lambda eps, g, a, s: eps + s * (1 - a).sqrt() * g,
        "by the factor": lambda eps, g, a, s: eps - s * g,
        "scale is missing": lambda eps, g, a, s: eps - (1 - a).sqrt() * g,
        "must be": lambda eps, g, a, s: eps - s * (1 - a) * g,
    },
    "classifier_loss": {
        "clean images": lambda *args: classifier_loss(*args, noisy=False),
        "noise is zero": lambda *args: classifier_loss(*args, noise=torch.zeros_like),
        "from randn": lambda *args: classifier_loss(*args, noise=torch.rand_like),
        "the same t": lambda *args: classifier_loss(*args, shift=400),
        "softmax itself": lambda *args: classifier_loss(
            *args, of=lambda logits, y: F.cross_entropy(logits.softmax(1), y)
        ),
        "t of its own": lambda d, c, x, y: classifier_loss(d, c, x, y, torch.full((len(x),), 500)),
        "single number": lambda *args: classifier_loss(
            *args, of=lambda logits, y: F.cross_entropy(logits, y, reduction="none")
        ),
        "log 10": lambda *args: classifier_loss(*args, of=lambda logits, y: logits.square().mean()),
        "not called": lambda *args: torch.tensor(2.3026),
    },
}
WRONG = {1: WRONG_1, 2: WRONG_2, 3: WRONG_3}


@pytest.mark.parametrize("lesson, name", ALL)
def test_every_exercise_has_at_least_three_wrong_answers(lesson, name):
    assert len(WRONG[lesson][name]) >= 3


@pytest.mark.parametrize(
    "lesson, name, message",
    [(lesson, name, message) for lesson, name in ALL for message in WRONG[lesson][name]],
)
def test_wrong_answers_hear_what_is_wrong(lesson, name, message):
    check, answer = getattr(LESSONS[lesson][0], name), WRONG[lesson][name][message]
    verdict = judge(answer, check)
    assert verdict.startswith("not yet. ") and message in verdict, verdict
    assert "\n" not in verdict


# -- the machinery -------------------------------------------------------------------------------------------


@numbered("1.5")
def check_double(answer):
    if answer(torch.ones(2)).tolist() != [2, 2]:
        raise WrongAnswer("1 becomes 2.")


def double(x):
    return 2 * x


def blank(x):
    """Return 2 x."""
    ...


def forgetful(x):
    x = 2 * x


def passes(x):
    pass


def test_a_right_answer_is_used(capsys):
    def mine(x):
        return x + x

    assert exercise(mine, check=check_double, reference=double) is mine
    assert capsys.readouterr().out == "Exercise 1.5: correct.\n"


@pytest.mark.parametrize(
    "answer, verdict",
    [
        (blank, "to do."),
        (passes, "to do."),
        (lambda x: x, "not yet. 1 becomes 2."),
        (forgetful, "not yet. It raises AttributeError: 'NoneType' object has no attribute 'tolist'"),
    ],
    ids=["blank", "passes", "wrong", "forgetful"],
)
def test_a_blank_or_wrong_answer_is_replaced_by_the_reference(answer, verdict, capsys):
    assert exercise(answer, check=check_double, reference=double) is double
    expected = f"Exercise 1.5: {verdict} The notebook continues with the reference solution.\n"
    assert capsys.readouterr().out == expected


def test_only_functions_without_code_are_blank():
    assert is_blank(blank) and is_blank(passes)
    assert not any(is_blank(f) for f in (double, forgetful, lambda x: x, lambda x: 1))


def test_a_wrong_shape_is_named():
    expect_shape(torch.zeros(2, 3), (2, 3))
    with pytest.raises(WrongAnswer, match=r"It returns the shape \(3, 2\); expected \(2, 3\)\."):
        expect_shape(torch.zeros(3, 2), (2, 3))
    with pytest.raises(WrongAnswer, match=r"It returns NoneType; return a tensor\."):
        expect_shape(None, (2, 3))
