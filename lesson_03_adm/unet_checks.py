"""What checks the parts of a UNet that the reader writes in adm.ipynb; `checks.py` has all checks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.exercises import WrongAnswer, allclose, expect_shape, explaining, numbered
from common.layers import avg_pool_2x, upsample_nearest_2x
from lesson_03_adm.adm_unet import ADMConfig, ResBlock


@numbered("3.1")
def ada_gn(answer: Callable) -> None:
    """What a zero embedding, a scale and a shift must do."""
    torch.manual_seed(0)
    norm, h, emb = nn.GroupNorm(4, 8), 3 + torch.randn(2, 8, 5, 5), torch.randn(2, 16)
    nn.init.normal_(norm.weight)
    plain = norm(h)
    with (
        explaining(
            "dimension 3", "Scale and shift are [N, C]: give them two dimensions more, for the pixels."
        ),
        explaining("(16)", "The scales are the first C of the 2C numbers: split dimension 1, not the batch."),
    ):
        at_zero = answer(norm, h, torch.zeros(2, 16))
    expect_shape(at_zero, (2, 8, 5, 5))
    if not at_zero.any():
        raise WrongAnswer("Scales of 0 switch everything off: multiply by 1 + scale, not by scale.")
    if allclose(at_zero, h):
        raise WrongAnswer("h is not normalized.")
    if allclose(at_zero, F.group_norm(h, 4)):
        raise WrongAnswer("Call the layer, norm(h): it has learned weights, which F.group_norm ignores.")
    if not allclose(at_zero, plain):
        raise WrongAnswer("If all scales and shifts are 0, the result must be norm(h).")

    def expected(scale: Tensor, shift: Tensor) -> Tensor:
        return torch.einsum("nchw,nc->nchw", plain, 1 + scale) + shift[:, :, None, None]

    ours = answer(norm, h, emb)
    scale, shift = emb[:, :, None, None].chunk(2, 1)
    if any(allclose(ours, late) for late in (norm(h * (1 + scale) + shift), norm(h * (1 + scale)) + shift)):
        raise WrongAnswer(
            "The normalization undoes a scale before it: normalize first, then scale and shift."
        )
    if allclose(ours, expected(emb[:, 8:], emb[:, :8])):
        raise WrongAnswer("Scale and shift are swapped: the scales are the first half.")
    if allclose(ours, expected(emb[:, ::2], emb[:, 1::2])):
        raise WrongAnswer("You take every second number; the scales are the first half.")
    if allclose(ours, (plain + shift) * (1 + scale)):
        raise WrongAnswer("The shift is scaled, too: multiply first, then add the shift.")
    if allclose(ours, expected(emb[:, :8], torch.zeros(2, 8))):
        raise WrongAnswer("The shift is missing.")
    if not allclose(ours, expected(emb[:, :8], emb[:, 8:])):
        raise WrongAnswer("With scale a and shift b, a channel n of norm(h) must become n * (1 + a) + b.")


@numbered("3.2")
def split_heads(answer: Callable) -> None:
    """The first C / heads channels must be the first head's."""
    x = torch.arange(2 * 5 * 12.0).view(2, 5, 12)
    result = answer(x, 3)
    expect_shape(result, (2, 3, 5, 4))
    wanted = torch.stack([x[..., 0:4], x[..., 4:8], x[..., 8:12]], 1)
    if torch.equal(result, torch.stack([x[..., i::3] for i in range(3)], 1)):
        raise WrongAnswer("Each head gets every third channel; it should get neighboring channels.")
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

    def modulated(normed: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return torch.einsum("nchw,nc->nchw", normed, 1 + scale) + shift[..., None, None]

    for resample, size in ((None, 8), (avg_pool_2x, 4), (upsample_nearest_2x, 16)):
        block, x = ResBlock(4, 6, config, resample), torch.randn(2, 4, 8, 8)
        nn.init.normal_(block.conv_2.weight, std=0.3)
        resized = resample or nn.Identity()
        main = block.conv_1(resized(F.silu(block.norm_1(x))))
        scale, shift = block.emb(F.silu(emb)).split(6, 1)
        normed = modulated(block.norm_2(main), scale, shift)
        skip, wanted_main = block.skip(resized(x)), block.conv_2(F.silu(normed))
        try:
            result = answer(block, x, emb)
        except TypeError as error:
            if "NoneType" in str(error):
                raise WrongAnswer("block.resample is None in a block that keeps its resolution.") from error
            raise
        except RuntimeError as error:
            if "must match the size" not in str(error):
                raise
            reason = "The convolutions' output and x have different sizes: resample both."
            if "dimension 1" in str(error):
                reason = (
                    "The convolutions return 6 channels and x has 4: pass x through block.skip, then add it."
                )
            if "(12)" in str(error):
                reason = "block.emb returns 12 numbers, 6 scales and 6 shifts: use ada_gn, not an addition."
            raise WrongAnswer(reason) from error
        expect_shape(result, (2, 6, size, size))
        if allclose(result, wanted_main):
            raise WrongAnswer("The skip connection is missing: add block.skip(x) at the end.")
        if allclose(result, answer(block, x, 0 * emb)):
            raise WrongAnswer("The result does not depend on emb: use ada_gn with block.emb(F.silu(emb)).")
        late = modulated(block.norm_2(resized(block.conv_1(F.silu(block.norm_1(x))))), scale, shift)
        if resample and allclose(result, skip + block.conv_2(F.silu(late))):
            raise WrongAnswer("Resampling comes before the first convolution, not after it.")
        if allclose(result, skip + block.conv_2(modulated(block.norm_2(F.silu(main)), scale, shift))):
            raise WrongAnswer("The second SiLU comes after AdaGN.")
        plain = modulated(block.norm_2(main), *block.emb(emb).split(6, 1))
        if allclose(result, skip + block.conv_2(F.silu(plain))):
            raise WrongAnswer("emb has no activation: use block.emb(F.silu(emb)).")
        after = modulated(block.norm_2(main), *F.silu(block.emb(emb)).split(6, 1))
        if allclose(result, skip + block.conv_2(F.silu(after))):
            raise WrongAnswer("The SiLU belongs before the linear layer: block.emb(F.silu(emb)).")
        if not allclose(result, skip + wanted_main):
            early = modulated(block.norm_2(block.conv_1(F.silu(block.norm_1(resized(x))))), scale, shift)
            if allclose(result, skip + block.conv_2(F.silu(early))):
                raise WrongAnswer("Resampling comes after norm_1 and its SiLU.")
            off = (result - skip - wanted_main).abs().max().item()
            raise WrongAnswer(
                f"The result is off by up to {off:.2f}. Is there a SiLU before each convolution? Compare the "
                "order with figure 1: norm_1, SiLU, resample, conv_1, AdaGN, SiLU, conv_2; block.skip gets x."
            )


class RecordingUNet(nn.Module):
    """A stand-in for a UNet that remembers what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor | None]] = []

    def forward(self, x_t: Tensor, t: Tensor, embedding: Tensor | None = None) -> Tensor:
        self.seen.append((t, embedding))
        if embedding is not None and embedding.dim() == 1:
            raise WrongAnswer("Pass the vectors of the classes y, not y itself.")
        return x_t if embedding is None else x_t + embedding.sum(1)[:, None, None, None]


@numbered("3.4")
def class_conditional(answer: Callable) -> None:
    """The output must depend on y, and only the rows of the batch's classes may get a gradient."""
    torch.manual_seed(0)
    unet = RecordingUNet()
    network = answer(unet, 10, 6)
    x_t, t, y = torch.randn(4, 1, 8, 8), torch.tensor([5, 5, 8, 9]), torch.tensor([3, 7, 3, 0])
    try:
        with explaining("must match the size", "t stays as it is; pass the vectors as embedding=..."):
            network(x_t, t, y)
    except IndexError as error:
        raise WrongAnswer(
            "nn.Embedding takes the number of classes first, then the size of a vector."
        ) from error
    if not unet.seen:
        raise WrongAnswer("The UNet was not called.")
    seen_t, embedding = unet.seen[-1]
    if not torch.equal(seen_t, t):
        raise WrongAnswer("The UNet must get the timesteps t as they are.")
    if embedding is None:
        raise WrongAnswer("The UNet does not learn the class: pass it the vectors as embedding=...")
    expect_shape(embedding, (4, 6))
    if allclose(network(x_t, t, y), network(x_t, t, (y + 1) % 10)):
        raise WrongAnswer("The output stays the same when only y changes: look up the vectors of y.")
    if not any(module is unet for module in network.modules()):
        raise WrongAnswer("Store the UNet as self.unet; otherwise the optimizer will not train it.")
    tables = [p for p in network.parameters() if p.shape in ((10, 6), (6, 10))]
    if not tables:
        raise WrongAnswer("There is no parameter of shape [10, 6]. Does __init__ create an nn.Embedding?")
    if not embedding.requires_grad:
        raise WrongAnswer("No gradient reaches the class vectors, so they would never learn.")
    gradient = torch.autograd.grad(embedding.square().sum(), tables[0])[0]
    gradient = gradient if len(gradient) == 10 else gradient.T  # nn.Linear on one-hot vectors is a table, too
    rows = gradient.any(1).nonzero().flatten().tolist()
    if rows != [0, 3, 7]:
        raise WrongAnswer(f"For a batch of the classes 3, 7 and 0 the gradient reaches the rows {rows}.")
