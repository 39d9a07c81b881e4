"""The outputs of the published reference implementations are reproduced (tests/golden/README.md).

Sizes, schedules, respacings and networks are read from the files; GOLDEN_DIR names another folder.
"""

import math
import zlib

import numpy as np
import pytest
import torch

from lesson_01_ddpm import diffusion as lesson_01_diffusion
from lesson_01_ddpm.diffusion import GaussianDiffusion, clamp_x_0, ddpm_sample, linear_betas, loss_simple
from lesson_02_improved_ddpm import ddim, variational_bound
from lesson_02_improved_ddpm.ddim import ddim_mean_sigma, ddim_reverse_step, ddim_sample
from lesson_02_improved_ddpm.schedules import cosine_betas, space_timesteps
from lesson_02_improved_ddpm.variational_bound import (
    learned_range,
    loss_hybrid,
    loss_vlb,
    prior_bpd,
    vb_terms_bpd,
)
from lesson_03_adm.classifier_guidance import condition_mean, condition_score
from lesson_03_adm.openai_checkpoints import adm_from_openai
from lesson_04_text_conditioning.openai_checkpoints import glide_from_openai
from lesson_04_text_conditioning.tokenizer import CaptionTokenizer
from tests.conftest import golden_arrays, golden_json

SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}
TABLES = {
    "betas": "betas",
    "alphas_cumprod": "alpha_bar",
    "posterior_variance": "beta_tilde",
    "posterior_log_variance_clipped": "posterior_log_variance",
    "posterior_mean_coef1": "posterior_mean_coef1",
    "posterior_mean_coef2": "posterior_mean_coef2",
}


@pytest.mark.parametrize("key", golden_arrays("schedules"))
def test_schedules(key):
    golden = golden_arrays("schedules")[key]
    schedule, num_timesteps, table = key.split("_", 2)
    ours = getattr(GaussianDiffusion(SCHEDULES[schedule](int(num_timesteps))), TABLES[table])
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, golden, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "row", golden_json("respacing"), ids=lambda row: f"{row['num_timesteps']}-{row['spec']}"
)
def test_respacing(row):
    assert space_timesteps(row["num_timesteps"], row["spec"]) == row["timesteps"]


class OneStep:
    """The arrays of one_step.npz and the process they were made with."""

    def __init__(self):
        settings = golden_json("one_step")
        self.golden = golden_arrays("one_step")
        self.diffusion = GaussianDiffusion(SCHEDULES[settings["schedule"]](settings["num_timesteps"]))
        first = settings["prior_first_half_of"]
        half = GaussianDiffusion(SCHEDULES[first["schedule"]](first["num_timesteps"]))
        self.half = half.respace(range(first["num_timesteps"] // 2))
        self.x_0, self.t, self.noise = (self.golden[k] for k in ("x_0", "t", "noise"))
        self.output = self.golden["model_output"]
        self.x_t = self.golden["x_t"]

    def network(self, x_t, t):
        return self.output

    def reverse(self, denoised_fn):
        return self.diffusion.p_mean_variance(self.output, self.x_t, self.t, learned_range, denoised_fn)

    def check(self, ours, name, tolerance=2e-5, scale=1.0):
        golden = self.golden[name]
        limit = tolerance * scale * golden.flatten(1).abs().amax(1).clamp(min=1) if golden.ndim > 1 else (
            tolerance * scale * golden.abs().clamp(min=1)
        )  # fmt: skip
        difference = (ours - golden).abs()
        worst = difference.flatten(1).amax(1) if golden.ndim > 1 else difference
        assert (worst <= limit).all(), f"{name}: off by {worst.tolist()}, allowed {limit.tolist()}"


@pytest.fixture(scope="module")
def one_step():
    return OneStep()


def test_forward_and_posterior(one_step):
    s, d = one_step, one_step.diffusion
    s.check(d.q_sample(s.x_0, s.t, s.noise), "x_t")
    s.check(d.q_posterior_mean(s.x_0, s.x_t, s.t), "posterior_mean")
    s.check(d.extract(d.beta_tilde, s.t, s.x_t).expand_as(s.x_t), "posterior_variance")
    s.check(d.extract(d.posterior_log_variance, s.t, s.x_t).expand_as(s.x_t), "posterior_log_variance")


@pytest.mark.parametrize("kind, denoised_fn", [("clipped", clamp_x_0), ("unclipped", None)])
def test_reverse_gaussian(one_step, kind, denoised_fn):
    s, p = one_step, one_step.reverse(denoised_fn)
    s.check(p.mean, f"p_mean_{kind}")
    s.check(p.log_variance, f"p_log_variance_{kind}")
    s.check(p.x_0, f"pred_x_0_{kind}", scale=s.diffusion.alpha_bar[s.t].rsqrt().float())


def test_losses_and_bound(one_step):
    s, d = one_step, one_step.diffusion
    bits = vb_terms_bpd(d, s.output, s.x_0, s.x_t, s.t)
    s.check(bits, "vb_terms_bits")
    s.check(d.num_timesteps / 1000 * bits, "loss_vlb_scaled")
    s.check(loss_simple(d, s.network, s.x_0, s.t, s.noise), "loss_simple")
    s.check(loss_hybrid(d, s.network, s.x_0, s.t, s.noise), "loss_hybrid")


def test_bound_only_loss(one_step):
    s, num_timesteps = one_step, one_step.diffusion.num_timesteps
    ours = loss_vlb(s.diffusion, s.network, s.x_0, s.t, s.noise) / num_timesteps
    golden = s.golden["loss_vlb_only"] / num_timesteps
    assert ((ours - golden).abs() <= 2e-5 * golden.abs().clamp(min=1)).all()


@pytest.mark.parametrize("name", ["prior_bits", "prior_bits_first_half"])
def test_prior(one_step, name):
    process = one_step.half if name.endswith("first_half") else one_step.diffusion
    torch.testing.assert_close(prior_bpd(process, one_step.x_0), one_step.golden[name], rtol=0.02, atol=1e-6)


def test_ancestral_step(one_step):
    s, p = one_step, one_step.reverse(clamp_x_0)
    noise = s.golden["step_noise"] * (s.t > 0).view(-1, 1, 1, 1)
    s.check(p.mean + (0.5 * p.log_variance).exp() * noise, "ancestral_step")


@pytest.mark.parametrize("name", [k for k in golden_arrays("one_step") if k.startswith("ddim_step_eta_")])
def test_ddim_step(one_step, name):
    s, x_0 = one_step, one_step.reverse(clamp_x_0).x_0
    mean, sigma = ddim_mean_sigma(s.diffusion, s.x_t, s.t, x_0, eta=float(name.rsplit("_", 1)[1]))
    s.check(mean + sigma * s.golden["step_noise"] * (s.t > 0).view(-1, 1, 1, 1), name, tolerance=5e-5)


def test_reverse_ddim_step(one_step):
    s, x_0 = one_step, one_step.reverse(clamp_x_0).x_0
    s.check(ddim_reverse_step(s.diffusion, s.x_t, s.t, x_0), "ddim_reverse_step", tolerance=5e-5)


def test_classifier_guidance_of_the_mean(one_step):
    s, p = one_step, one_step.reverse(clamp_x_0)
    mean_fn = condition_mean(lambda x_t, t: s.golden["cond_grad"])
    s.check(mean_fn(s.diffusion, p, s.x_t, s.t), "classifier_guided_mean")


def test_classifier_guidance_of_the_ddim_score(one_step):
    s = one_step
    eps = condition_score(s.diffusion, s.network, lambda x_t, t: s.golden["cond_grad"])(s.x_t, s.t)
    x_0 = s.diffusion.x_0_from_noise(s.x_t, s.t, eps)
    scale = s.diffusion.alpha_bar[s.t].rsqrt().float()
    s.check(x_0, "classifier_guided_ddim_pred_x_0", scale=scale)


class Trajectory:
    """trajectory.npz: whole sampling runs of a network in closed form, and the noise they used."""

    def __init__(self):
        settings = golden_json("trajectory")
        self.golden = golden_arrays("trajectory")
        self.full = GaussianDiffusion(SCHEDULES[settings["schedule"]](settings["num_timesteps"]))
        kept = space_timesteps(settings["num_timesteps"], settings["respacing"])
        self.diffusion = self.full.respace(kept)

    def network(self, x, t):
        """Return eps = sqrt(1 - alphas_cumprod[t]) x + 0.1 cos(pi t / T), v = tanh(0.2 x): see the .json."""
        one_minus = (1 - self.full.alpha_bar[t]).sqrt().float().view(-1, 1, 1, 1)
        wave = 0.1 * torch.cos(math.pi * t.float() / self.full.num_timesteps).view(-1, 1, 1, 1)
        return torch.cat([one_minus * x + wave, torch.tanh(0.2 * x)], 1)

    def replay(self, monkeypatch, module):
        """Let the module's code draw the noise of the reference, step by step."""
        noises = iter(self.golden["step_noises"])
        monkeypatch.setattr(module, "gaussian_noise", lambda x, generator: next(noises))


@pytest.fixture(scope="module")
def trajectory():
    return Trajectory()


def close(ours, golden):
    torch.testing.assert_close(ours, golden, rtol=0, atol=1e-4)


def test_ancestral_trajectory(trajectory, monkeypatch):
    trajectory.replay(monkeypatch, lesson_01_diffusion)
    *_, last = ddpm_sample(
        trajectory.diffusion, trajectory.network, trajectory.golden["x_T"], log_variance_fn=learned_range
    )
    close(last.x_prev, trajectory.golden["ancestral_sample"])


def test_ddim_trajectory(trajectory, monkeypatch):
    monkeypatch.setattr(ddim, "gaussian_noise", None)  # eta = 0 draws nothing
    *_, last = ddim_sample(trajectory.diffusion, trajectory.network, trajectory.golden["x_T"])
    close(last.x_prev, trajectory.golden["ddim_sample"])


def test_whole_bound(trajectory, monkeypatch):
    trajectory.replay(monkeypatch, variational_bound)
    ours = variational_bound.variational_bound(
        trajectory.diffusion, trajectory.network, trajectory.golden["x_0"]
    )
    names = {"vb_bits": ours.vb_bpd, "total_bits": ours.total_bpd, "prior_bits": ours.prior_bpd}
    for name, values in (names | {"x_0_mse": ours.x_0_mse, "eps_mse": ours.eps_mse}).items():
        close(values, trajectory.golden[name])


def published_weights(parameters):
    """Return a published state dict, each weight a function of its name (tests/golden/README.md)."""
    weights = {}
    for name, shape in parameters.items():
        w = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        if len(shape) > 1:
            w /= math.sqrt(math.prod(shape[1:]))
        else:
            w = 0.1 * w + (1.0 if name.endswith("weight") else 0.0)
        weights[name] = torch.from_numpy(w.astype(np.float32))
    return weights


@pytest.mark.parametrize("name", golden_json("networks"))
@torch.no_grad()
def test_network(name):
    settings, golden = golden_json(name), golden_arrays(name)
    weights, inputs = published_weights(settings["parameters"]), [golden["in_x"], golden["in_timesteps"]]
    if settings["kind"] == "adm":
        network = adm_from_openai(settings["config"], weights)
        output = network(*inputs, golden["in_y"]) if "in_y" in golden else network(*inputs)
    else:
        network = glide_from_openai(settings["config"], weights)
        names = ("inpaint_image", "inpaint_mask", "low_res")
        unet_kwargs = {name: golden[f"in_{name}"] for name in names if f"in_{name}" in golden}
        output = network(*inputs, network.encode_text(golden["in_tokens"], golden["in_mask"]), **unet_kwargs)
    torch.testing.assert_close(output, golden["output"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", [name for name in golden_json("networks") if name.startswith("adm")])
def test_qkv_rows_of_the_new_attention_order_are_grouped_by_head(name):
    """With `use_new_attention_order` the rows of a qkv layer are split into q, k and v, then into heads."""
    settings = golden_json(name)
    weights = published_weights(settings["parameters"])
    legacy = adm_from_openai(settings["config"], weights).state_dict()
    reordered = adm_from_openai(settings["config"] | {"use_new_attention_order": True}, weights).state_dict()
    width = settings["config"].get("num_head_channels", -1)
    for key, old in legacy.items():
        if "qkv" not in key:
            assert torch.equal(reordered[key], old)
            continue
        heads = len(old) // 3 // width if width > 0 else settings["config"].get("num_heads", 1)
        q_k_v = [part.chunk(heads) for part in old.chunk(3)]
        for ours, theirs in zip(reordered[key].chunk(heads), zip(*q_k_v)):
            assert torch.equal(ours, torch.cat(theirs))


def test_glide_tokens(gpt2_vocabulary):
    golden = golden_json("glide_tokens")
    files = gpt2_vocabulary / "encoder.json", gpt2_vocabulary / "vocab.bpe"
    tokenizer = CaptionTokenizer.from_gpt2_files(*files, golden["text_ctx"])
    assert (tokenizer.vocab_size, tokenizer.padding_id) == (golden["n_vocab"], golden["end_token"])
    for row in golden["rows"]:
        tokens, mask = tokenizer.encode([row["text"]])
        assert tokenizer.token_ids(row["text"]) == row["tokens"]
        assert tokens[0].tolist() == row["padded"]
        assert mask.sum() == row["length"]
