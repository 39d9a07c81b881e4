"""What lessons 4 and 5 share: captioned MNIST as tokens, the network for it, and drawing from prompts."""

from dataclasses import asdict
from functools import partial

import torch

from common.captions import CAPTIONS, CaptionedDigits
from common.runs import as_config
from lesson_02_improved_ddpm.train_mnist import new_diffusion
from lesson_03_adm.adm_unet import ADMConfig
from lesson_04_text_conditioning.text_transformer import Text, TextConfig
from lesson_04_text_conditioning.tokenizer import CaptionTokenizer
from lesson_04_text_conditioning.velocity import VelocityUNet

IMAGE_SHAPE = (3, 32, 32)
# What the pictures show: pairs from training, one caption without a colour, two held-out pairs.
PROMPTS = ["a red seven", "the digit 2 in white", "the digit 5 in purple", "a yellow eight", "an orange six"]
PROMPTS += ["the digit 4", "a blue three", "a green 0"]
ADM = ADMConfig(
    in_channels=3,
    out_channels=6,
    channel_mult=(1, 1, 2, 2),
    attention_resolutions=(8, 4),
    num_head_channels=32,
)


def train_tokenizer():
    return CaptionTokenizer.train(CAPTIONS)


def new_network(tokenizer):
    """The network of lessons 4 and 5, and the facts that rebuild it from a checkpoint."""
    text = TextConfig(tokenizer.vocab_size, tokenizer.context)
    facts = {"network": asdict(ADM), "text": asdict(text), "tokenizer": tokenizer.to_json()}
    return VelocityUNet(ADM, text, new_diffusion().alpha_bar), facts


def rebuild(facts):
    config, text = as_config(ADMConfig, facts["network"]), as_config(TextConfig, facts["text"])
    diffusion = new_diffusion()
    return VelocityUNet(config, text, diffusion.alpha_bar), diffusion


def tokenizer_of(facts):
    return CaptionTokenizer.from_json(facts["tokenizer"], facts["text"]["context"])


class TokenizedDigits:
    """CaptionedDigits whose captions come as tokens: batches (x_0, tokens, mask)."""

    def __init__(self, digits, tokenizer):
        self.name, self.captioned = digits.name, CaptionedDigits(digits)
        self.tokens, self.mask = tokenizer.encode(CAPTIONS)

    def __len__(self):
        return len(self.captioned)

    def batch(self, indices):
        x_0, caption = self.captioned.batch(indices)
        return x_0, self.tokens[caption], self.mask[caption]


def encode_prompts(network, tokenizer, prompts):
    """Text of the prompts, on the network's device; each different prompt is encoded once."""
    device = next(network.parameters()).device
    distinct = list(dict.fromkeys(prompts))
    place = torch.tensor([distinct.index(prompt) for prompt in prompts], device=device)
    tokens, mask = tokenizer.encode(distinct)
    with torch.no_grad():
        text = network.encode_text(tokens.to(device), mask.to(device))
    return Text(*(part[place] for part in text))


def conditional(network, text, empty):
    """The denoiser that follows the caption as the network learned it."""
    return partial(network, text=text)


def denoiser_of_prompts(network, tokenizer, prompts, denoiser_for=conditional):
    """What common.sampling asks for: (indices) -> a denoiser for the samples of these prompts.

    denoiser_for: (network, text, empty) -> denoiser, given encoded prompts and as many empty captions.
    """
    text, empty = encode_prompts(network, tokenizer, prompts), encode_prompts(network, tokenizer, [""])

    def denoiser_of(indices):
        here = Text(*(part[indices.to(part.device)] for part in text))
        no_text = Text(*(part.expand_as(like) for part, like in zip(empty, here)))
        return denoiser_for(network, here, no_text)

    return denoiser_of
