"""The small CLIP: its loss against a table written out, its gradient against differences, what it learns."""

from dataclasses import replace

import torch

from lesson_02_improved_ddpm.train_mnist import new_diffusion
from lesson_03_adm.adm_unet import ADMConfig
from lesson_04_text_conditioning.text_transformer import TextConfig
from lesson_06_miniglide import shapes
from lesson_06_miniglide.captioned_images import drawn_shapes
from lesson_06_miniglide.clip import NoisyCLIP, PatchCLIP, clip_gradient, loss_clip, nearest_caption
from lesson_06_miniglide.clip_experiments import turned_round

IMAGES = ADMConfig(
    image_size=8,
    num_channels=8,
    channel_mult=(1, 2),
    attention_resolutions=(4,),
    num_head_channels=8,
    groups=4,
)
CAPTIONS = TextConfig(10, context=3, width=16, layers=1, heads=2)
PROCESS = new_diffusion()
TOKENS = torch.tensor([[1, 2, 0], [3, 4, 0], [1, 2, 5]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0]]).bool()  # so the first and the last read the same


def small():
    torch.manual_seed(0)
    return NoisyCLIP(IMAGES, CAPTIONS, 4)


def test_the_loss_is_that_of_the_table_of_similarities():
    clip, x_0 = small(), torch.rand(3, 1, 8, 8)
    pairs = iter([torch.eye(4)[:3], torch.eye(4)[[0, 1, 0]]])  # pictures, captions
    clip.embed_images, clip.embed_captions = (lambda *_: next(pairs) for _ in range(2))
    with torch.no_grad():
        clip.log_scale.fill_(1.0)
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
        return (clip.embed_images(x, t) * captions).sum(1)

    h = 1e-2
    slope = (similarity(x_t + h * step) - similarity(x_t - h * step)) / (2 * h)
    torch.testing.assert_close((gradient * step).sum((1, 2, 3)), 2 * slope, rtol=0.02, atol=1e-4)


def test_it_learns_which_caption_is_whose():
    """Two kinds of pictures, bright above or below, with a caption each; noise hides them."""
    clip, tokens = small(), torch.tensor([[1, 0, 0], [2, 0, 0]])
    mask = torch.tensor([[1, 0, 0]]).bool().expand(2, -1)
    optimizer = torch.optim.Adam(clip.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)

    def pictures(n):
        kind = torch.randint(2, (n,), generator=generator)
        x_0 = -torch.ones(n, 1, 8, 8)
        x_0[kind == 0, :, :4], x_0[kind == 1, :, 4:] = 1.0, 1.0
        return x_0, kind

    for _ in range(90):
        x_0, kind = pictures(32)
        optimizer.zero_grad()
        loss_clip(PROCESS, clip, x_0, tokens[kind], mask[kind]).mean().backward()
        optimizer.step()
    x_0, kind = pictures(500)
    captions = clip.eval().embed_captions(tokens, mask)
    heard = (nearest_caption(PROCESS, clip, x_0, captions, t) for t in (100, 999))
    clear, hidden = ((nearest == kind).float().mean() for nearest in heard)
    assert clear > 0.95 and 0.35 < hidden < 0.65


def test_patches_lose_nothing_of_a_picture():
    images = replace(IMAGES, in_channels=12)
    torch.manual_seed(0)
    clip, x_t, t = PatchCLIP(images, CAPTIONS, 4), torch.randn(2, 3, 16, 16), torch.tensor([5, 900])
    patches = torch.stack([x_t[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 2).flatten(1, 2)
    plain = NoisyCLIP(images, CAPTIONS, 4)
    plain.load_state_dict(clip.state_dict())
    torch.testing.assert_close(clip.embed_images(x_t, t), plain.embed_images(patches, t))


def test_a_caption_turned_round_is_false():
    drawn = drawn_shapes(40)
    captions = drawn.captions_of(torch.arange(40))
    pairs = [i for i, caption in enumerate(captions) if shapes.parse(caption).relation]
    assert len(pairs) > 10
    for i in pairs:
        assert shapes.check(drawn.images[i], captions[i])
        assert not shapes.check(drawn.images[i], turned_round(captions[i]))
