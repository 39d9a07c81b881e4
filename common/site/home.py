"""The home page of the site."""

from pathlib import Path

from common.site.sources import LESSONS, Links, toctree

TITLES = {
    "lesson_01_ddpm": (
        "1 DDPM",
        "Noise an image, train a network to predict the noise, and reverse the process.",
    ),
    "lesson_02_improved_ddpm": (
        "2 Improved DDPM",
        "Schedules, a learned variance, a bound on the likelihood, and ten steps instead of a thousand.",
    ),
    "lesson_03_adm": (
        "3 ADM and the score",
        "A larger UNet, the gradient of the log density, classifier guidance.",
    ),
    "lesson_04_text_conditioning": (
        "4 Text",
        "A tokenizer, a text transformer, and attention from pixels to words: digits that you describe.",
    ),
    "lesson_05_cfg": (
        "5 Guidance",
        "Classifier-free guidance, the method behind every text-to-image system, and fast samplers.",
    ),
    "lesson_06_miniglide": (
        "6 miniGLIDE",
        "64x64 photos and shapes on one GPU, upsampling, inpainting, CLIP guidance, OpenAI's GLIDE.",
    ),
}
PAGE = """\
---
html_theme.sidebar_secondary.remove: true
---
# Text-to-image diffusion, in six lessons

Build a text-to-image diffusion model from nothing, one piece per lesson, up to a small GLIDE. You need to
know PyTorch, and nothing about diffusion. You write the core of each method yourself, and a check tells you
what is wrong.

![eight captions, and the digits that form out of noise]({image})

{buttons}

## The lessons

::::{{grid}} 1 2 2 3
:gutter: 3

{cards}
::::

Start with `pip install -r requirements.txt && python lesson_05_cfg/sample.py --prompt "a red seven"`
([how to begin](README.md)).
"""
CARD = """\
:::{{grid-item-card}} {title}
:link: {lesson}/README
:link-type: doc

{text}
:::
"""


def home_page(links: Links) -> str:
    """Return the Markdown of the home page."""
    home = Path("index.md")
    cards = "\n".join(
        CARD.format(title=title, lesson=lesson, text=text) for lesson, (title, text) in TITLES.items()
    )
    buttons = (
        "```{button-link} explorer/index.html\n:color: primary\n:expand:\n\n"
        "Play with it: a diffusion model in this page\n```\n\n"
        "```{button-ref} lesson_01_ddpm/README\n:color: secondary\n:expand:\n\nRead it: lesson 1\n```"
    )
    image = links.target("lesson_05_cfg/results/forming.gif", home)
    page = PAGE.format(image=image, cards=cards, buttons=buttons)
    page += toctree(["Start here <README>", *(f"{lesson}/README" for lesson in LESSONS)], "The course")
    return page + toctree(["CONTRIBUTING", "api/index"], "Reference")
