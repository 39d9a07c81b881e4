"""Lesson 4, measured: python lesson_04_text_conditioning/experiments.py NAME

    class_or_caption  the same network told the pair's number, or a caption
    readers           the caption as one vector, among the keys and values, or both
    held_out          pairs of digit and colour that training never showed, against those it did
    wordings          other words, other orders
    attention         which pixels look at which token along the trajectory
    mistakes          the classic bugs, each trained beside the right version

Each writes results/NAME.json and NAME.png; interrupted, it goes on with the rows that are missing.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from common.captions import CAPTIONS, COLOURS, VARIANTS, WORDS, balanced_prompts, caption_index, held_out_mask
from common.command import run_command
from common.evaluation import reference_for
from common.experiments import Experiment, ExperimentConfig, quality, run_experiment
from common.pictures import label_grid, spread
from common.sampling import load_network, sample_batches
from common.training import MuonConfig
from lesson_01_ddpm.diffusion import loss_at_random_t
from lesson_02_improved_ddpm.ddim import SAMPLERS
from lesson_02_improved_ddpm.train_mnist import new_diffusion
from lesson_02_improved_ddpm.variational_bound import loss_hybrid
from lesson_04_text_conditioning import captioned_mnist
from lesson_04_text_conditioning.attention_maps import recorded
from lesson_04_text_conditioning.captioned_mnist import ADM, IMAGE_SHAPE, PROMPTS, TokenizedDigits
from lesson_04_text_conditioning.text_transformer import TextConfig
from lesson_04_text_conditioning.text_unet import TextUNet
from lesson_04_text_conditioning.velocity import VelocityUNet, loss_velocity

LESSON = "lesson_04_text_conditioning"
SHOWN_STEPS = 25  # of DDIM, where samples are compared


@dataclass(frozen=True)
class Config(ExperimentConfig):
    __doc__ = __doc__


def draw(network, tokenizer, prompts, config, denoiser_for=captioned_mnist.conditional):
    sampler = partial(SAMPLERS["ddim"], new_diffusion().evenly(SHOWN_STEPS))
    denoiser_of = captioned_mnist.denoiser_of_prompts(network, tokenizer, prompts, denoiser_for)
    return sample_batches(sampler, denoiser_of, IMAGE_SHAPE, len(prompts), config)


def measure_prompts(network, tokenizer, config, reference, denoiser_for=captioned_mnist.conditional):
    prompts, digits, colours = balanced_prompts(config.num_samples)
    return quality(draw(network, tokenizer, prompts, config, denoiser_for), reference, digits, colours)


class Captioned(Experiment):
    """An experiment on captioned digits, with the tokenizer of their captions."""

    lesson, kind = LESSON, MuonConfig  # of the settings of each training

    def __init__(self, config, **settings):
        super().__init__(self.lesson, config, **settings)
        self.reference, self.tokenizer = reference_for(self.digits), captioned_mnist.train_tokenizer()

    def train(self, variant, network, loss, tokenizer=None, **settings):
        tokenizer = tokenizer or self.tokenizer
        torch.manual_seed(0)
        validation = TokenizedDigits(self.held_back, tokenizer).batch(torch.arange(self.validated))
        data = TokenizedDigits(self.digits, tokenizer), validation
        return super().train(variant, network, loss, data=data, kind=self.kind, **settings)

    def new_network(self):
        torch.manual_seed(self.config.seed)
        return captioned_mnist.new_network(self.tokenizer)[0]


def loss_of_text(loss, see):
    """(network, x_0, tokens, mask) -> [N]. see: what of the encoded text the network gets."""

    def of_batch(network, x_0, tokens, mask):
        text = see(network.encode_text(tokens, mask))
        return loss_at_random_t(loss, new_diffusion(), partial(network, text=text), x_0)

    return of_batch


def all_of_it(text):
    return text


def vector_only(text):
    return text._replace(states=torch.zeros_like(text.states))


def attention_only(text):
    return text._replace(embedding=torch.zeros_like(text.embedding))


def seeing(see):
    """What `draw` takes as denoiser_for: a network that gets only so much of the text."""
    return lambda network, text, empty: partial(network, text=see(text))


class PairNumbers:
    """Stands in for a tokenizer: a caption's only token is the number of its digit and colour."""

    context, vocab_size = 1, len(CAPTIONS) // VARIANTS

    def encode(self, captions):
        tokens = torch.tensor([[CAPTIONS.index(c) // VARIANTS if c else 0] for c in captions])
        return tokens, torch.ones_like(tokens, dtype=torch.bool)


def class_or_caption(config):
    """At equal steps, is a caption as good as the number of what it says?"""
    experiment = Captioned(config, steps=2000, trainings="told")
    numbers = PairNumbers()
    torch.manual_seed(config.seed)
    table = TextConfig(numbers.vocab_size, numbers.context, layers=0)
    told_numbers = VelocityUNet(ADM, table, new_diffusion().alpha_bar)
    told_numbers.slow = {}  # a table of classes may learn as fast as the rest
    loss, shown = loss_of_text(loss_velocity, all_of_it), {}

    def measure(network, tokenizer):
        return measure_prompts(network, tokenizer, config, experiment.reference)

    captions = experiment.train("both", experiment.new_network(), loss)
    classes = experiment.train("class", told_numbers, loss, numbers)
    for name, network, tokenizer in (
        ("caption", captions, experiment.tokenizer),
        ("class", classes, numbers),
    ):
        experiment.row(measure, network, tokenizer, told=name)
        shown[name] = draw(network, tokenizer, PROMPTS, config)
    experiment.save_rows(shown)


def readers(config):
    """GLIDE gives the UNet the caption twice. Which of the two ways is needed for what?"""
    experiment, shown = Captioned(config, steps=2000, trainings="told"), {}
    for name, see in {"both": all_of_it, "vector": vector_only, "attention": attention_only}.items():
        network = experiment.new_network()
        network = experiment.train(name, network, loss_of_text(loss_velocity, see))

        def measure(network, see):
            return measure_prompts(
                network, experiment.tokenizer, config, experiment.reference, denoiser_for=seeing(see)
            )

        experiment.row(measure, network, see, network_sees=name)
        shown[name] = draw(network, experiment.tokenizer, PROMPTS, config, seeing(see))
    experiment.save_rows(shown)


def shipped(config):
    """(network, tokenizer, experiment) with this lesson's weights."""
    network, _, facts = load_network(None, LESSON, captioned_mnist.rebuild, config.device)
    return network, captioned_mnist.tokenizer_of(facts), Captioned(config, weights_of=LESSON)


def held_out(config):
    """Does the network compose digit and colour, or remember pairs?"""
    network, tokenizer, experiment = shipped(config)

    def measure(pairs):
        chosen = pairs[torch.arange(config.num_samples) % len(pairs)]
        variants = torch.arange(config.num_samples) // len(pairs) % VARIANTS
        prompts = [CAPTIONS[i] for i in caption_index(*chosen.T, variants)]
        return quality(draw(network, tokenizer, prompts, config), experiment.reference, *chosen.T)

    pairs = {"never shown": held_out_mask().nonzero(), "shown": (~held_out_mask()).nonzero()}
    for name, these in pairs.items():
        experiment.row(measure, these, pairs=name)
    caption = WORDINGS["trained"]
    names = [caption(COLOURS[colour], WORDS[digit]) for digit, colour in pairs["never shown"].tolist()]
    picture = draw(network, tokenizer, names * 4, config)
    experiment.save(label_grid(picture, len(names), column_labels=names))


def an(word):
    return "an" if word in ("orange", "eight") else "a"


WORDINGS = {  # of a colour and a digit; only the first two were trained (but for the held-out pairs)
    "trained": lambda colour, digit: f"{an(colour)} {colour} {digit}",
    "trained, too": lambda colour, digit: f"the digit {digit} in {colour}",
    "capitals": lambda colour, digit: f"{an(colour)} {colour} {digit}".upper(),
    "wrong article": lambda colour, digit: f"{an(digit)} {colour} {digit}",
    "no article, so no space": lambda colour, digit: f"{colour} {digit}",
    "templates mixed": lambda colour, digit: f"the {colour} digit {digit}",
    "turned round": lambda colour, digit: f"a {digit} {colour}",
    "shortened": lambda colour, digit: f"the {digit} in {colour}",
    "unknown word before": lambda colour, digit: f"draw {an(colour)} {colour} {digit}",
    "unknown word behind": lambda colour, digit: f"{an(colour)} {colour} {digit} please",
}


def wordings(config):
    """What the network has not been told in these words, and how long it understands."""
    network, tokenizer, experiment = shipped(config)
    _, digits, colours = balanced_prompts(config.num_samples)
    names = [(COLOURS[c], WORDS[d]) for c, d in zip(colours.tolist(), digits.tolist())]

    def measure(prompts):
        return quality(draw(network, tokenizer, prompts, config), experiment.reference, digits, colours)

    shown = {}
    for kind, wording in WORDINGS.items():
        prompts = [wording(*name) for name in names]
        experiment.row(measure, prompts, wording=kind, example=prompts[-1])
        shown[kind] = draw(network, tokenizer, prompts[:10], config)
    experiment.save_rows(shown)


def attention(config):
    """Which pixels look at which token: a row for some steps, a column for each place of the caption."""
    network, tokenizer, experiment = shipped(config)
    prompt = "a red seven"
    with recorded(network) as maps:
        draw(network, tokenizer, [prompt], config)
    maps = torch.stack(maps)[:, 0]  # [steps, context, 8, 8]

    words = [tokenizer.tokenizer.decode([i]).strip() for i in tokenizer.pieces(prompt)]
    words += [f"padding {i}" for i in range(len(words), tokenizer.context)]
    for place, word in enumerate(words):
        half = len(maps) // 2
        early, late = (part[:, place].mean().item() for part in (maps[:half], maps[half:]))
        experiment.row(lambda early, late: {"early": early, "late": late}, early, late, token=word)
    chosen = torch.stack(spread(list(maps), 8))
    chosen = F.interpolate(chosen / chosen.amax((1, 2, 3), keepdim=True), scale_factor=4)
    experiment.save(label_grid(2 * chosen.flatten(0, 1)[:, None] - 1, len(words), column_labels=words))


def random_padding(network, x_0, tokens, mask):
    """The mistake, in training only: padding is whatever token happens to stand there, and counts."""
    tokens = torch.where(mask, tokens, torch.randint_like(tokens, network.text_config.vocab_size))
    return loss_of_text(loss_velocity, all_of_it)(network, x_0, tokens, torch.ones_like(mask))


def inverted_mask(network, x_0, tokens, mask):
    """The mistake, in training only: padding is read and the caption is not."""
    return loss_of_text(loss_velocity, all_of_it)(network, x_0, tokens, ~mask)


def mistakes(config):
    """Each bug beside the right version, trained with it."""
    experiment, tokenizer = Captioned(config, steps=1000), captioned_mnist.train_tokenizer()
    right = loss_of_text(loss_velocity, all_of_it)
    losses = {"right": right, "random padding": random_padding, "mask inverted": inverted_mask}
    networks = {name: experiment.train(name, experiment.new_network(), loss) for name, loss in losses.items()}

    fast = experiment.new_network()
    fast.slow = {}
    networks["text learns fast"] = experiment.train("text learns fast", fast, right)
    torch.manual_seed(config.seed)
    plain = TextUNet(ADM, TextConfig(tokenizer.vocab_size, tokenizer.context))
    of_eps = loss_of_text(loss_hybrid, all_of_it)
    networks["eps, not velocity"] = experiment.train("eps, not velocity", plain, of_eps)

    def measure(network):
        return measure_prompts(network, tokenizer, config, experiment.reference)

    for name, network in networks.items():
        experiment.row(measure, network, mistake=name)
    experiment.save_rows({n: draw(net, tokenizer, PROMPTS, config) for n, net in networks.items()})
    experiment.save_losses(networks)


EXPERIMENTS = {f.__name__: f for f in (class_or_caption, readers, held_out, wordings, attention, mistakes)}

if __name__ == "__main__":
    run_command(lambda config: run_experiment(EXPERIMENTS, config), Config)
