"""What checks the reader's text transformer; `checks.py` names these functions with the others."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.exercises import WrongAnswer, allclose, expect_shape, explaining, numbered
from lesson_03_adm.adm_unet import split_heads
from lesson_04_text_conditioning.text_transformer import TextConfig, TextTransformer, TransformerBlock


@numbered("4.3, block")
def transformer_block(answer: Callable) -> None:
    """Compare with a block computed here, and with blocks that lack one part."""
    torch.manual_seed(0)
    config = TextConfig(vocab_size=11, context_length=5, width=8, layers=1, heads=2)
    block = TransformerBlock(config).requires_grad_(False)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(3, 5, 8)
    given = x.clone()
    back = "`attention` returns [N, heads, L, d]. Bring it to [N, L, width]."
    width = f"A linear layer gets the wrong width. {back}"
    with explaining("must match the size", back), explaining("cannot be multiplied", width):
        result = answer(block, given)
    if not allclose(given, x):
        raise WrongAnswer("The input has changed: `x += ...` works in place. Write x = x + ...")
    expect_shape(result, (3, 5, 8))

    def output(
        split: Any = split_heads, ln_1: Any = block.ln_1, ln_2: Any = block.ln_2, gelu: Any = F.gelu,
        skip_1: Any = lambda y: y, skip_2: Any = lambda y: y,
        merged: Any = lambda y: y.transpose(1, 2).flatten(2),
    ) -> Tensor:  # fmt: skip
        attended = F.scaled_dot_product_attention(*split(block.qkv(ln_1(x)), 2, 3))
        h = skip_1(x) + block.proj(merged(attended))
        return skip_2(h) + block.fc_2(gelu(block.fc_1(ln_2(h))))

    def parts_first(qkv: Tensor, heads: int, parts: int) -> list[Tensor]:
        return [split_heads(part, heads, 1)[0] for part in qkv.chunk(parts, -1)]

    wrong = {
        "q, k and v are taken apart before the heads. The channels are ordered head by head: split the "
        "heads first.": output(split=parts_first),
        "The skip connection around the attention is missing.": output(skip_1=torch.zeros_like),
        "The skip connection around the MLP is missing.": output(skip_2=torch.zeros_like),
        "The skip connection around the attention must carry x, not ln_1(x).": output(skip_1=block.ln_1),
        "The skip connection around the MLP must carry its input without ln_2.": output(skip_2=block.ln_2),
        "Both skip connections must carry their inputs without LayerNorm.": output(
            skip_1=block.ln_1, skip_2=block.ln_2
        ),
        "The attention needs normalized inputs: `ln_1`.": output(ln_1=nn.Identity()),
        "The MLP needs normalized inputs: `ln_2`.": output(ln_2=nn.Identity()),
        "The MLP has no GELU between its two layers.": output(gelu=nn.Identity()),
        "The MLP has a ReLU; OpenAI's weights are for a GELU.": output(gelu=F.relu),
        "The MLP has a SiLU; OpenAI's weights are for a GELU.": output(gelu=F.silu),
        "Heads and tokens are mixed up: move the heads next to the components before you flatten.": output(
            merged=lambda y: y.reshape(3, 5, 8)
        ),
    }
    for message, mistake in wrong.items():
        if allclose(result, mistake):
            raise WrongAnswer(message)
    if not allclose(result, output()):
        raise WrongAnswer(
            "The output differs: first the attention, then the MLP, which sees the attention's sum."
        )


@numbered("4.3, outputs")
def text_forward(answer: Callable) -> None:
    """Compare with outputs computed here, and with typical mistakes."""
    torch.manual_seed(0)
    transformer = TextTransformer(TextConfig(vocab_size=11, context_length=5, width=8, layers=1, heads=2), 6)
    transformer.requires_grad_(False)
    for parameter in transformer.parameters():
        nn.init.normal_(parameter)
    tokens, mask = torch.randint(11, (3, 5)), torch.arange(5) < torch.tensor([[2], [4], [0]])
    token, position = transformer.token_embedding(tokens), transformer.positional_embedding
    padding, has_token = transformer.padding_embedding, mask[..., None]
    with explaining(
        "must match the size", "The mask is [N, L] and the embeddings are [N, L, width]: use mask[..., None]."
    ):
        result = answer(transformer, tokens, mask)
    if not isinstance(result, tuple) or len(result) != 2:
        raise WrongAnswer("Return two things: the pooled embedding and the token states.")
    pooled, states = result
    if pooled.shape == (3, 5, 8):
        raise WrongAnswer("The outputs are exchanged: return the pooled embedding, then the token states.")
    expect_shape(states, (3, 5, 8))
    expect_shape(pooled, (3, 6))
    wrong = {
        "The mask is not used: token ids at padded positions change the result.": token + position,
        "The mask is inverted: True means that there is a token.": torch.where(
            has_token, padding, token + position
        ),
        "The position is added to the padding, too. The padding embeddings differ by position already.": (
            torch.where(has_token, token, padding) + position
        ),
        "The positions are missing. Without them the order of the words is lost.": torch.where(
            has_token, token, padding
        ),
        "The padding embedding replaces token and position. It is not added to them.": (
            token + position + padding * ~has_token
        ),
        "The padding is zero. Where the mask is False, the input is the padding embedding.": torch.where(
            has_token, token + position, 0.0
        ),
    }
    for message, x in wrong.items():
        if allclose(states, transformer.transform(x)):
            raise WrongAnswer(message)
    wanted = transformer.transform(torch.where(has_token, token + position, padding))
    if not allclose(states, wanted):
        raise WrongAnswer("The token states differ. They are the output of `transform` at all positions.")
    if allclose(pooled, transformer.proj(wanted.mean(1))):
        raise WrongAnswer("That is the mean over all positions. Take the output at the last position.")
    if allclose(pooled, transformer.proj(wanted[:, 0])):
        raise WrongAnswer("That is the first position. Take the last one.")
    if allclose(pooled, transformer.proj(wanted[torch.arange(3), mask.sum(1) - 1])):
        raise WrongAnswer(
            "That is the last token. Take the last position, which is padding in most captions."
        )
    if not allclose(pooled, transformer.proj(wanted[:, -1])):
        raise WrongAnswer("The pooled embedding differs: apply `proj` to the output at the last position.")
