"""The networks: shapes, initialization, attention, and what they do with text."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from common.digits.captions import CAPTIONS
from lesson_01_ddpm.diffusion import ddpm_sample, loss_simple, training_loss
from lesson_01_ddpm.model import UNET_CONFIG as LESSON_1
from lesson_01_ddpm.unet import UNet, timestep_embedding
from lesson_02_improved_ddpm.ddim import SAMPLERS, ddim_sample
from lesson_02_improved_ddpm.model import make_diffusion
from lesson_02_improved_ddpm.variational_bound import loss_hybrid
from lesson_03_adm.adm_unet import ADMConfig, ClassConditionalUNet
from lesson_03_adm.classifier_guidance import classifier_gradient, condition_mean
from lesson_03_adm.noisy_classifier import CLASSIFIER_CONFIG, NoisyClassifier
from lesson_04_text_conditioning.model import UNET_CONFIG as LESSON_4
from lesson_04_text_conditioning.studies.attention_maps import record_attention, token_attention
from lesson_04_text_conditioning.text_transformer import TextConfig, TextTransformer
from lesson_04_text_conditioning.text_unet import TextAttention, TextUNet
from lesson_04_text_conditioning.tokenizer import CaptionTokenizer
from lesson_04_text_conditioning.velocity import VelocityPrediction, loss_hybrid_velocity
from lesson_05_cfg.dpm_solver import dpmpp_2m_sample
from lesson_05_cfg.guidance import cfg_denoiser, dynamic_threshold, prompt_denoiser

TINY = replace(
    LESSON_4, num_channels=16, channel_mult=(1, 2), attention_resolutions=(16,), num_head_channels=16
)
NO_EMB = torch.zeros(2, 1)  # an attention layer does not use the embedding


@pytest.fixture(scope="module")
def tokenizer():
    return CaptionTokenizer.train(CAPTIONS)


def text_unet(tokenizer, seed=0, **options):
    torch.manual_seed(seed)
    text_config = TextConfig(tokenizer.vocab_size, tokenizer.context_length, width=32, layers=2)
    return TextUNet(TINY, text_config, **options)


def awake(network):
    """Fill the layers that start at zero, so that every path counts."""
    torch.manual_seed(5)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return network.eval()


BUILDERS = {
    "ddpm": lambda tokenizer: UNet(LESSON_1),
    "adm": lambda tokenizer: ClassConditionalUNet(ADMConfig(channel_mult=(0.5, 1, 2), num_head_channels=32)),
    "text": lambda tokenizer: TextUNet(TINY, TextConfig(tokenizer.vocab_size)),
    "classifier": lambda tokenizer: NoisyClassifier(),
}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_every_parameter_is_initialized(build, tokenizer):
    """Uninitialized memory would differ under one seed or agree under two; zeros and ones are intended."""

    def parameters(seed):
        junk = torch.full((4_000_000,), 123.0)  # freed at once: an uninitialized tensor may get this memory
        del junk
        torch.manual_seed(seed)
        return dict(build(tokenizer).named_parameters())

    first, again, other = parameters(0), parameters(0), parameters(1)
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name]), f"{name} differs under one seed"
        constant = bool((parameter == 0).all() or (parameter == 1).all())
        assert constant or not torch.equal(parameter, other[name]), f"{name} agrees under two seeds"
        assert parameter.isfinite().all() and parameter.abs().max() < 20


@pytest.mark.parametrize("context_length, width", [(8, 64), (24, 64), (128, 512)])
def test_captions_start_apart_however_much_padding_there_is(context_length, width, tokenizer):
    torch.manual_seed(0)
    text = TextTransformer(TextConfig(tokenizer.vocab_size, context_length, width, layers=2), 96)
    read = CaptionTokenizer(tokenizer.tokenizer, context_length)
    with torch.no_grad():
        assert text(*read.encode([""])).pooled.abs().max() < 1e-4
        assert 0.5 < text(*read.encode(CAPTIONS)).pooled.std(0).mean() < 4


def test_the_order_of_words_shows_from_the_start(tokenizer):
    """Without positions the two captions of the same words would have one embedding."""
    torch.manual_seed(0)
    text = TextTransformer(TextConfig(tokenizer.vocab_size, context_length=24), 192)
    read = CaptionTokenizer(tokenizer.tokenizer, context_length=24)
    with torch.no_grad():
        code, turned, other = text(*read.encode(["a red seven", "seven a red", "a blue four"])).pooled
    assert (code - turned).norm() > 0.05 * (code - other).norm()


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_every_parameter_learns(build, tokenizer):
    network = awake(build(tokenizer))
    channels = 3 if isinstance(network, TextUNet) else 1
    more = {"text": network.encode_text(*tokenizer.encode(["a red 7", "a 2"]))} if channels == 3 else {}
    more = {"y": torch.tensor([3, 4])} if isinstance(network, ClassConditionalUNet) else more
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
    process, small = make_diffusion(), replace(TINY, in_channels=c, out_channels=2 * c)
    x_0, y = torch.rand(2, c, 32, 32) * 2 - 1, torch.tensor([3, 7])
    tokens, mask = tokenizer.encode(["a red seven", ""])
    gray = UNet(replace(LESSON_1, in_channels=c, out_channels=c))
    by_class = partial(ClassConditionalUNet(small), y=y)
    text_config = TextConfig(tokenizer.vocab_size, tokenizer.context_length)
    by_text = VelocityPrediction(TextUNet(small, text_config), process.alpha_bar)
    text, empty = by_text.encode_text(tokens, mask), by_text.encode_text(tokens, mask & False)
    classifier = NoisyClassifier(replace(CLASSIFIER_CONFIG, in_channels=c))
    mean_fn = condition_mean(classifier_gradient(classifier, y, 1.0))
    few = process.respace_evenly(3)
    for denoiser, loss, sampler in (
        (gray, loss_simple, ddpm_sample),
        (by_class, loss_hybrid, ddim_sample),
        (by_class, loss_hybrid, partial(SAMPLERS["ddpm"], mean_fn=mean_fn)),
        (partial(by_text, text=text), loss_hybrid_velocity, dpmpp_2m_sample),
        (
            cfg_denoiser(by_text, text, empty, 3),
            loss_hybrid_velocity,
            partial(ddim_sample, denoised_fn=dynamic_threshold),
        ),
    ):
        assert training_loss(loss, process, denoiser, x_0).isfinite().all()
        *_, last = sampler(few, denoiser, torch.randn_like(x_0), generator=torch.Generator())
        assert last.x_prev.shape == x_0.shape and last.x_prev.isfinite().all()


def test_timestep_embedding_tells_all_timesteps_apart():
    embedding = timestep_embedding(torch.arange(1000), 32)
    assert embedding.shape == (1000, 32)
    distance = torch.cdist(embedding, embedding) + 10 * torch.eye(1000)
    assert distance.min() > 0.1


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="heads of 48"):
        ClassConditionalUNet(ADMConfig(num_head_channels=48))


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
    torch.testing.assert_close(layer(x, NO_EMB, states), expected.view_as(x), rtol=1e-4, atol=1e-5)


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

    maps = token_attention(layer, x, states)
    layer.extend_kv = only_the_token
    torch.nn.init.eye_(layer.proj.weight[:, :, 0])
    torch.testing.assert_close((layer(x, NO_EMB, states) - x)[:, 0], maps[:, token], rtol=1e-4, atol=1e-5)
    assert maps.shape == (2, 5, 4, 4) and (maps.sum(1) < 1).all()


def test_attention_maps_are_recorded_per_call_and_the_network_is_unchanged(tokenizer):
    network = text_unet(tokenizer).eval()
    text = network.encode_text(*tokenizer.encode(["a red seven", "a 2"]))
    x_t, t = torch.randn(2, 3, 32, 32), torch.tensor([500, 500])
    before = network(x_t, t, text)
    with record_attention(network, size=16) as maps:
        again = [network(x_t, t, text) for _ in range(3)]
    network(x_t, t, text)
    assert [m.shape for m in maps] == 3 * [(2, tokenizer.context_length, 16, 16)]
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


def test_text_is_encoded_once_per_prompt_not_once_per_step(tokenizer):
    network = text_unet(tokenizer).eval()
    encoded = []
    network.text_encoder.register_forward_hook(lambda module, args, output: encoded.append(len(args[0])))

    denoiser = prompt_denoiser(network, tokenizer, ["a 1", "a 2", "a 1"], 3)
    few = make_diffusion().respace_evenly(6)
    for _ in dpmpp_2m_sample(few, denoiser, torch.randn(3, 3, 32, 32)):
        pass
    assert encoded == [2, 1]  # two different prompts, one empty caption


def test_velocity_and_eps_hat_are_one_prediction(tokenizer):
    """eps_hat and x_0 follow from the velocity, and the loss is its squared error (Salimans & Ho 2022)."""
    diffusion = make_diffusion()
    torch.manual_seed(0)
    config = TextConfig(tokenizer.vocab_size, width=32, layers=1)
    network = awake(VelocityPrediction(TextUNet(TINY, config), diffusion.alpha_bar))
    x_0, noise, t = torch.rand(3, 3, 32, 32) * 2 - 1, torch.randn(3, 3, 32, 32), torch.tensor([5, 500, 980])
    x_t = diffusion.q_sample(x_0, t, noise)
    text = network.encode_text(*tokenizer.encode(["a red seven"] * 3))
    with torch.no_grad():
        velocity = network.network(x_t, t, text)[:, :3]
        output = network(x_t, t, text)
        loss = loss_hybrid_velocity(diffusion, lambda x, t: output, x_0, t, noise)
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
    image, low_res = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 8, 8)
    mask = torch.ones(2, 1, 32, 32)
    mask[:, :, :16] = 0
    with torch.no_grad():
        known = {"inpaint_image": image, "inpaint_mask": mask}
        output = network(x_t, t, text, low_res=low_res, **known)
        image[:, :, :16] = 9  # the network does not see unknown pixels
        assert torch.equal(output, network(x_t, t, text, low_res=low_res, **known))
        assert not torch.equal(output, network(x_t, t, text, low_res=low_res))
        assert not torch.equal(output, network(x_t, t, text, low_res=-low_res, **known))


def test_tokenizer(tokenizer):
    tokens, mask = tokenizer.encode(["A Red SEVEN", "a red seven", "", "snow ☃ " * 20])
    assert torch.equal(tokens[0], tokens[1])
    assert mask.sum(1).tolist() == [3, 3, 0, tokenizer.context_length]
    assert (tokens[~mask] == tokenizer.padding_id).all()
    assert max(len(tokenizer.token_ids(caption)) for caption in CAPTIONS) <= tokenizer.context_length
    again = CaptionTokenizer.from_json(tokenizer.to_json(), tokenizer.context_length)
    assert torch.equal(again.encode(CAPTIONS)[0], tokenizer.encode(CAPTIONS)[0])
    assert (
        tokenizer.tokenizer.decode(tokenizer.token_ids("the digit 7 in orange ☃"))
        == "the digit 7 in orange ☃"
    )
