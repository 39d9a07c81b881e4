"""The networks: shapes, seams, initialisation, and that text is read once."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from common.captions import CAPTIONS
from lesson_01_ddpm import unet
from lesson_01_ddpm.diffusion import ddpm_sample, loss_at_random_t, loss_simple
from lesson_01_ddpm.train_mnist import NETWORK as LESSON_1
from lesson_01_ddpm.unet import UNet, attend, suits_one_kernel, timestep_embedding
from lesson_02_improved_ddpm.ddim import SAMPLERS, ddim_sample
from lesson_02_improved_ddpm.train_mnist import new_diffusion
from lesson_02_improved_ddpm.variational_bound import loss_hybrid
from lesson_03_adm.adm_unet import ADMConfig, ClassUNet
from lesson_03_adm.classifier_guidance import classifier_gradient, guide_mean
from lesson_03_adm.noisy_classifier import NETWORK as NOISY
from lesson_03_adm.noisy_classifier import NoisyClassifier
from lesson_04_text_conditioning.attention_maps import recorded, text_weights
from lesson_04_text_conditioning.captioned_mnist import ADM, denoiser_of_prompts
from lesson_04_text_conditioning.text_transformer import TextConfig, TextTransformer
from lesson_04_text_conditioning.text_unet import TextAttention, TextUNet
from lesson_04_text_conditioning.tokenizer import CaptionTokenizer
from lesson_04_text_conditioning.velocity import VelocityUNet, loss_velocity
from lesson_05_cfg.dpm_solver import dpm_solver_sample
from lesson_05_cfg.guidance import dynamic_threshold, guided

TINY = replace(ADM, num_channels=16, channel_mult=(1, 2), attention_resolutions=(16,), num_head_channels=16)


@pytest.fixture(scope="module")
def tokenizer():
    return CaptionTokenizer.train(CAPTIONS)


def text_unet(tokenizer, seed=0, **options):
    torch.manual_seed(seed)
    return TextUNet(TINY, TextConfig(tokenizer.vocab_size, tokenizer.context, width=32, layers=2), **options)


def awake(network):
    """Fill the layers that start at zero, so that every path counts."""
    torch.manual_seed(5)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return network.eval()


BUILDERS = {
    "ddpm": lambda tokenizer: UNet(LESSON_1),
    "adm": lambda tokenizer: ClassUNet(ADMConfig(channel_mult=(0.5, 1, 2), num_head_channels=32)),
    "text": lambda tokenizer: TextUNet(TINY, TextConfig(tokenizer.vocab_size)),
    "classifier": lambda tokenizer: NoisyClassifier(),
}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_every_parameter_is_initialised(build, tokenizer):
    """Uninitialised memory would differ under one seed or agree under two; zeros and ones are meant."""

    def parameters(seed):
        junk = torch.full((4_000_000,), 123.0)  # freed at once: what an uninitialised tensor may get to see
        del junk
        torch.manual_seed(seed)
        return dict(build(tokenizer).named_parameters())

    first, again, other = parameters(0), parameters(0), parameters(1)
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name]), f"{name} differs under one seed"
        constant = bool((parameter == 0).all() or (parameter == 1).all())
        assert constant or not torch.equal(parameter, other[name]), f"{name} agrees under two seeds"
        assert parameter.isfinite().all() and parameter.abs().max() < 20


@pytest.mark.parametrize("context, width", [(8, 64), (24, 64), (128, 512)])
def test_captions_begin_apart_however_much_padding_there_is(context, width, tokenizer):
    torch.manual_seed(0)
    text = TextTransformer(TextConfig(tokenizer.vocab_size, context, width, layers=2), 96)
    read = CaptionTokenizer(tokenizer.tokenizer, context)
    with torch.no_grad():
        assert text(*read.encode([""])).embedding.abs().max() < 1e-4
        assert 0.5 < text(*read.encode(CAPTIONS)).embedding.std(0).mean() < 4


def test_the_order_of_words_shows_from_the_start(tokenizer):
    """Without positions the two captions of the same words would have one embedding."""
    torch.manual_seed(0)
    text = TextTransformer(TextConfig(tokenizer.vocab_size, context=24), 192)
    read = CaptionTokenizer(tokenizer.tokenizer, context=24)
    with torch.no_grad():
        code, turned, other = text(*read.encode(["a red seven", "seven a red", "a blue four"])).embedding
    assert (code - turned).norm() > 0.05 * (code - other).norm()


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_every_parameter_learns(build, tokenizer):
    network = awake(build(tokenizer))
    channels = 3 if isinstance(network, TextUNet) else 1
    more = {"text": network.encode_text(*tokenizer.encode(["a red 7", "a 2"]))} if channels == 3 else {}
    more = {"y": torch.tensor([3, 4])} if isinstance(network, ClassUNet) else more
    network(torch.randn(2, channels, 32, 32), torch.tensor([3, 900]), **more).square().sum().backward()
    idle = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


@pytest.mark.parametrize("build", [BUILDERS["ddpm"], BUILDERS["adm"], BUILDERS["text"]], ids=["1", "3", "4"])
def test_every_residual_branch_starts_at_zero(build, tokenizer):
    network = build(tokenizer)
    blocks = [module for module in network.modules() if hasattr(module, "conv_2")]
    assert len(blocks) > 5 and not any(block.conv_2.weight.any() for block in blocks)
    attentions = [
        module for module in network.modules() if hasattr(module, "qkv") and hasattr(module, "norm")
    ]
    assert attentions and not any(attention.proj.weight.any() for attention in attentions)


def test_output_starts_at_zero_and_has_the_right_shape():
    network = UNet(replace(LESSON_1, in_channels=3, out_channels=6))
    output = network(torch.randn(2, 3, 32, 32), torch.tensor([0, 999]))
    assert output.shape == (2, 6, 32, 32) and not output.any()


@pytest.mark.parametrize("c", [1, 3])
def test_every_lesson_learns_and_draws_gray_and_colour(c, tokenizer):
    """Each lesson's network, loss and samplers, on images of 1 and of 3 channels."""
    torch.manual_seed(0)
    process, small = new_diffusion(), replace(TINY, in_channels=c, out_channels=2 * c)
    x_0, y = torch.rand(2, c, 32, 32) * 2 - 1, torch.tensor([3, 7])
    tokens, mask = tokenizer.encode(["a red seven", ""])
    gray = UNet(replace(LESSON_1, in_channels=c, out_channels=c))
    by_class = partial(ClassUNet(small), y=y)
    reads = VelocityUNet(small, TextConfig(tokenizer.vocab_size, tokenizer.context), process.alpha_bar)
    text, empty = reads.encode_text(tokens, mask), reads.encode_text(tokens, mask & False)
    classifier = NoisyClassifier(replace(NOISY, in_channels=c))
    lead = guide_mean(classifier_gradient(classifier, y, 1.0))
    few = process.evenly(3)
    for denoiser, loss, sampler in (
        (gray, loss_simple, ddpm_sample),
        (by_class, loss_hybrid, ddim_sample),
        (by_class, loss_hybrid, partial(SAMPLERS["ddpm"], guide=lead)),
        (partial(reads, text=text), loss_velocity, dpm_solver_sample),
        (guided(reads, text, empty, 3), loss_velocity, partial(ddim_sample, bound=dynamic_threshold)),
    ):
        assert loss_at_random_t(loss, process, denoiser, x_0).isfinite().all()
        *_, last = sampler(few, denoiser, torch.randn_like(x_0), generator=torch.Generator())
        assert last.x_prev.shape == x_0.shape and last.x_prev.isfinite().all()


def test_timestep_embedding_tells_all_timesteps_apart():
    embedding = timestep_embedding(torch.arange(1000), 32)
    assert embedding.shape == (1000, 32)
    distance = torch.cdist(embedding, embedding) + 10 * torch.eye(1000)
    assert distance.min() > 0.1


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="heads of 48"):
        ClassUNet(ADMConfig(num_head_channels=48))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("places", [64, 300])
def test_attention_is_a_softmax_in_each_of_its_ways(places, dtype):
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, 3, n, 16, dtype=dtype).requires_grad_() for n in (places, places + 8, places + 8)
    )
    assert suits_one_kernel(q) == (places == 300 and dtype == torch.float32)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    answers = attend(q, k, v), F.scaled_dot_product_attention(*exact)
    gradients = [torch.autograd.grad(a.square().sum(), x) for a, x in zip(answers, ((q, k, v), exact))]
    bounds = {"rtol": 3e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(answers[0].double(), answers[1], **bounds)
    for ours, wanted in zip(*gradients):
        torch.testing.assert_close(ours.double(), wanted, **bounds)
    torch.testing.assert_close(attend(*(x.detach() for x in (q, k, v))).double(), answers[1], **bounds)


@pytest.mark.parametrize("amx", [True, False])
def test_the_fused_kernel_is_for_the_way_forth_on_cpus_with_amx(amx, monkeypatch):
    monkeypatch.setattr(unet, "cpu_has", lambda instructions: amx and instructions == "amx_tile")
    q = torch.randn(1, 1, 300, 16, dtype=torch.bfloat16)
    assert suits_one_kernel(q) == amx
    assert not suits_one_kernel(q.requires_grad_())
    assert suits_one_kernel(q.to("meta"))  # not a CPU


def test_text_attention_is_one_softmax_over_tokens_and_pixels():
    torch.manual_seed(0)
    config = replace(TINY, num_head_channels=32)
    layer = TextAttention(32, config, text_width=8)
    torch.nn.init.normal_(layer.proj.weight, std=0.2)
    x, states = torch.randn(2, 32, 4, 4), torch.randn(2, 5, 8)
    q, k, v = layer.qkv(layer.norm(x).flatten(2)).chunk(3, 1)
    text_k, text_v = layer.text_kv(states.mT).chunk(2, 1)
    k, v = torch.cat([k, text_k], 2), torch.cat([v, text_v], 2)
    weights = F.softmax(torch.einsum("ncp,ncq->npq", q, k) / 32**0.5, -1)
    expected = x.flatten(2) + layer.proj(torch.einsum("npq,ncq->ncp", weights, v))
    torch.testing.assert_close(layer(x, None, states), expected.view_as(x), rtol=1e-4, atol=1e-5)


def test_the_text_s_keys_and_values_are_computed_once_a_prompt(monkeypatch):
    torch.manual_seed(0)
    layer = TextAttention(32, replace(TINY, num_head_channels=32), text_width=8)
    torch.nn.init.normal_(layer.proj.weight, std=0.2)
    x, first, second = torch.randn(2, 32, 4, 4), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    expected = [layer(x, None, states).detach() for states in (first, second)]  # with gradients: always anew
    asked = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *args: asked.append(args[1].shape[1]) or linear(*args))
    with torch.no_grad():
        found = [layer(x, None, states) for states in (first, first, first, second, first.clone())]
    assert asked.count(8) == 3  # the text's width: for first, second and the copy
    for output, wanted in zip(found, (0, 0, 0, 1, 0)):
        torch.testing.assert_close(output, expected[wanted], rtol=0, atol=0)
    layer(x, None, first), layer(x, None, first)
    assert asked.count(8) == 5 and layer.kept is None


def test_attention_maps_are_the_weights_that_the_layer_uses():
    """With values that are 1 for one token and 0 elsewhere, attention's output is that token's weight."""
    torch.manual_seed(0)
    layer = TextAttention(32, replace(TINY, num_head_channels=32), text_width=8)
    x, states, token = torch.randn(2, 32, 4, 4), torch.randn(2, 5, 8), 3

    def only_the_token(k, v, context):
        text_k = layer.text_kv(context.mT)[:, None, :32].transpose(2, 3)
        values = torch.zeros(2, 1, 5 + 16, 32)
        values[:, :, token] = 1
        return torch.cat([text_k, k], 2), values

    maps = text_weights(layer, x, states)
    layer.look_further = only_the_token
    torch.nn.init.eye_(layer.proj.weight[:, :, 0])
    torch.testing.assert_close((layer(x, None, states) - x)[:, 0], maps[:, token], rtol=1e-4, atol=1e-5)
    assert maps.shape == (2, 5, 4, 4) and (maps.sum(1) < 1).all()


def test_attention_maps_are_recorded_a_call_and_the_network_is_left_as_it_was(tokenizer):
    network = text_unet(tokenizer).eval()
    text = network.encode_text(*tokenizer.encode(["a red seven", "a 2"]))
    x_t, t = torch.randn(2, 3, 32, 32), torch.tensor([500, 500])
    before = network(x_t, t, text)
    with recorded(network, size=16) as maps:
        again = [network(x_t, t, text) for _ in range(3)]
    network(x_t, t, text)
    assert [m.shape for m in maps] == 3 * [(2, tokenizer.context, 16, 16)]
    assert torch.equal(before, again[0])


def test_the_caption_changes_the_output_and_padding_tokens_do_not(tokenizer):
    network = awake(text_unet(tokenizer))
    x_t, t = torch.randn(1, 3, 32, 32), torch.tensor([500])

    def output(tokens, mask):
        with torch.no_grad():
            return network(x_t, t, network.encode_text(tokens, mask))

    tokens, mask = tokenizer.encode(["a red seven"])
    red = output(tokens, mask)
    assert not torch.allclose(red, output(*tokenizer.encode(["a blue seven"])), atol=1e-4)
    assert not torch.allclose(red, output(*tokenizer.encode(["seven red a"])), atol=1e-4)  # order counts
    tokens[~mask] = 7
    assert torch.equal(red, output(tokens, mask))


def test_text_is_encoded_once_a_prompt_not_once_a_step(tokenizer):
    network = text_unet(tokenizer).eval()
    encoded = []
    network.text.register_forward_hook(lambda module, args, output: encoded.append(len(args[0])))

    denoiser_for = partial(guided, guidance_scale=3)
    denoiser_of = denoiser_of_prompts(network, tokenizer, ["a 1", "a 2", "a 1"], denoiser_for)
    few = new_diffusion().evenly(6)
    for _ in dpm_solver_sample(few, denoiser_of(torch.arange(3)), torch.randn(3, 3, 32, 32)):
        pass
    assert encoded == [2, 1]  # two different prompts, one empty caption


def test_velocity_is_another_reading_of_the_same_output(tokenizer):
    """eps_hat and x_0 follow from the velocity, and the loss is its squared error (Salimans & Ho 2022)."""
    diffusion = new_diffusion()
    torch.manual_seed(0)
    config = TextConfig(tokenizer.vocab_size, width=32, layers=1)
    network = awake(VelocityUNet(TINY, config, diffusion.alpha_bar))
    x_0, noise, t = torch.rand(3, 3, 32, 32) * 2 - 1, torch.randn(3, 3, 32, 32), torch.tensor([5, 500, 980])
    x_t = diffusion.q_sample(x_0, t, noise)
    text = network.encode_text(*tokenizer.encode(["a red seven"] * 3))
    with torch.no_grad():
        velocity = TextUNet.forward(network, x_t, t, text)[:, :3]
        output = network(x_t, t, text)
        loss = loss_velocity(diffusion, lambda x, t: output, x_0, t, noise)
        hybrid = loss_hybrid(diffusion, lambda x, t: output, x_0, t, noise)
    alpha_bar = diffusion.alpha_bar[t].float().view(-1, 1, 1, 1)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x_0_hat = diffusion.x_0_from_noise(x_t, t, output[:, :3])
    torch.testing.assert_close(x_0_hat, alpha * x_t - sigma * velocity, rtol=0, atol=1e-3)
    wanted = alpha * noise - sigma * x_0
    bits = hybrid - (output[:, :3] - noise).square().flatten(1).mean(1)
    torch.testing.assert_close(
        loss - bits, (velocity - wanted).square().flatten(1).mean(1), rtol=1e-3, atol=1e-3
    )


def test_inpainting_and_upsampling_inputs(tokenizer):
    network = awake(text_unet(tokenizer, inpaint=True, upsample=True))
    text = network.encode_text(*tokenizer.encode(["a 3"] * 2))
    x_t, t = torch.randn(2, 3, 32, 32), torch.tensor([5, 6])
    image, mask, low_res = torch.randn(2, 3, 32, 32), torch.ones(2, 1, 32, 32), torch.randn(2, 3, 8, 8)
    mask[:, :, :16] = 0
    with torch.no_grad():
        output = network(x_t, t, text, image=image, mask=mask, low_res=low_res)
        image[:, :, :16] = 9  # unknown pixels are not looked at
        assert torch.equal(output, network(x_t, t, text, image=image, mask=mask, low_res=low_res))
        assert not torch.equal(output, network(x_t, t, text, low_res=low_res))
        assert not torch.equal(output, network(x_t, t, text, image=image, mask=mask, low_res=-low_res))


def test_tokenizer(tokenizer):
    tokens, mask = tokenizer.encode(["A Red SEVEN", "a red seven", "", "snow ☃ " * 20])
    assert torch.equal(tokens[0], tokens[1])
    assert mask.sum(1).tolist() == [3, 3, 0, tokenizer.context]
    assert (tokens[~mask] == tokenizer.padding_id).all()
    assert max(len(tokenizer.pieces(caption)) for caption in CAPTIONS) <= tokenizer.context
    again = CaptionTokenizer.from_json(tokenizer.to_json(), tokenizer.context)
    assert torch.equal(again.encode(CAPTIONS)[0], tokenizer.encode(CAPTIONS)[0])
    assert (
        tokenizer.tokenizer.decode(tokenizer.pieces("the digit 7 in orange ☃")) == "the digit 7 in orange ☃"
    )
