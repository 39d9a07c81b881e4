"""The small CLIP: its loss against a table written out, its gradient against differences, what it learns."""

from dataclasses import replace

import torch

from lesson_02_improved_ddpm.model import make_diffusion
from lesson_03_adm.adm_unet import ADMConfig
from lesson_04_text_conditioning.text_transformer import TextConfig
from lesson_06_miniglide.image_data.captioned_images import make_shapes
from lesson_06_miniglide.networks.noisy_clip import NoisyCLIP, clip_gradient, loss_clip, nearest_caption
from lesson_06_miniglide.shapes.checker import matches_caption
from lesson_06_miniglide.shapes.scenes import parse
from lesson_06_miniglide.studies.clip_study import swap_relation

IMAGES = ADMConfig(
    image_size=8,
    num_channels=8,
    channel_mult=(1, 2),
    attention_resolutions=(4,),
    num_head_channels=8,
    num_groups=4,
)
CAPTIONS = TextConfig(10, context_length=3, width=16, layers=1, heads=2)
PROCESS = make_diffusion()
TOKENS = torch.tensor([[1, 2, 0], [3, 4, 0], [1, 2, 5]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0]]).bool()  # so the first and the last read the same


def small():
    torch.manual_seed(0)
    return NoisyCLIP(IMAGES, CAPTIONS, 4)


def test_the_loss_is_that_of_the_table_of_similarities():
    clip, x_0 = small(), torch.rand(3, 1, 8, 8)
    pairs = iter([torch.eye(4)[:3], torch.eye(4)[[0, 1, 0]]])  # images, captions
    clip.encode_image, clip.encode_text = (lambda *_: next(pairs) for _ in range(2))
    with torch.no_grad():
        clip.logit_scale.fill_(1.0)
    scale = torch.tensor(1.0).exp()
    logits = scale * torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 0]])
    log_p, log_q = logits.log_softmax(1), logits.T.log_softmax(1)
    target = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]])
    expected = -(target * (log_p + log_q)).sum(1) / 2
    torch.testing.assert_close(loss_clip(PROCESS, clip, x_0, TOKENS, MASK), expected)


def test_the_gradient_is_that_of_the_similarity():
    clip, x_t, t = small(), torch.randn(3, 1, 8, 8), torch.tensor([5, 500, 900])
    captions = torch.nn.functional.normalize(torch.randn(3, 4), dim=1)
    gradient, step = clip_gradient(clip, captions, 2.0)(x_t, t), torch.randn_like(x_t)

    def similarity(x):
        return (clip.encode_image(x, t) * captions).sum(1)

    h = 1e-2
    slope = (similarity(x_t + h * step) - similarity(x_t - h * step)) / (2 * h)
    torch.testing.assert_close((gradient * step).sum((1, 2, 3)), 2 * slope, rtol=0.02, atol=1e-4)


def test_it_learns_which_caption_is_whose():
    """Two kinds of images, bright above or below, with a caption each; noise hides them."""
    clip, tokens = small(), torch.tensor([[1, 0, 0], [2, 0, 0]])
    mask = torch.tensor([[1, 0, 0]]).bool().expand(2, -1)
    optimizer = torch.optim.Adam(clip.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)

    def images(n):
        kind = torch.randint(2, (n,), generator=generator)
        x_0 = -torch.ones(n, 1, 8, 8)
        x_0[kind == 0, :, :4], x_0[kind == 1, :, 4:] = 1.0, 1.0
        return x_0, kind

    for _ in range(90):
        x_0, kind = images(32)
        optimizer.zero_grad()
        loss_clip(PROCESS, clip, x_0, tokens[kind], mask[kind]).mean().backward()
        optimizer.step()
    x_0, kind = images(500)
    captions = clip.eval().encode_text(tokens, mask)
    heard = (nearest_caption(PROCESS, clip, x_0, captions, t) for t in (100, 999))
    clear, hidden = ((nearest == kind).float().mean() for nearest in heard)
    assert clear > 0.95 and 0.35 < hidden < 0.65


def test_patches_lose_nothing_of_an_image():
    torch.manual_seed(0)
    clip = NoisyCLIP(replace(IMAGES, image_size=16, in_channels=3, patch_size=2), CAPTIONS, 4)
    x_t, t = torch.randn(2, 3, 16, 16), torch.tensor([5, 900])
    patches = torch.stack([x_t[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 2).flatten(1, 2)
    plain = NoisyCLIP(replace(IMAGES, in_channels=12), CAPTIONS, 4)
    plain.load_state_dict(clip.state_dict())
    torch.testing.assert_close(clip.encode_image(x_t, t), plain.encode_image(patches, t))


def test_a_caption_with_the_opposite_relation_is_false():
    drawn = make_shapes(40)
    captions = drawn.captions_for(torch.arange(40))
    pairs = [i for i, caption in enumerate(captions) if parse(caption).relation]
    assert len(pairs) > 10
    for i in pairs:
        assert matches_caption(drawn.images[i], captions[i])
        assert not matches_caption(drawn.images[i], swap_relation(captions[i]))
