"""Lesson 1, measured: python lesson_01_ddpm/experiments.py NAME

    variances       fixed small and large variance at 10 to 1000 steps
    along_training  FID and loss of the averaged weights, along one training
    ema             one training's weights averaged over more or fewer steps, or not at all
    neighbours      samples above the training digits nearest to them
    mistakes        the classic bugs, each trained beside the right version

Each writes results/NAME.json and NAME.png; interrupted, it goes on with the rows that are missing.
"""

import copy
from dataclasses import dataclass
from functools import partial
from shutil import copyfile

import torch
from safetensors.torch import load_file
from torch import nn

from common.command import pick_device, run_command
from common.evaluation import reference_for
from common.experiments import Experiment, ExperimentConfig, quality, run_experiment
from common.pictures import curves, label_grid
from common.runs import newest, read_metrics, write_atomically
from common.sampling import load_network, sample_batches
from lesson_01_ddpm import diffusion as ddpm
from lesson_01_ddpm.train_mnist import IMAGE_SHAPE, NETWORK, new_diffusion, rebuild
from lesson_01_ddpm.unet import UNet

LESSON = "lesson_01_ddpm"
SHOWN_STEPS = 100  # of the samples that are compared
STEPS = (10, 25, 50, 100, 250, 1000)
DECAYS = (0.0, 0.9, 0.99, 0.995, 0.999, 0.9995)  # of the averages that are compared


@dataclass(frozen=True)
class Config(ExperimentConfig):
    __doc__ = __doc__


def draw(denoiser, n, steps, config, **settings):
    sampler = partial(ddpm.ddpm_sample, new_diffusion().evenly(steps), **settings)
    return sample_batches(sampler, lambda indices: denoiser, IMAGE_SHAPE, n, config)


def compare(experiment, key, drawers):
    """A row and a line of samples for each. drawers: name -> (n, steps, config) -> samples."""
    config = experiment.config
    reference = reference_for(experiment.digits)

    def measure(drawer):
        return quality(drawer(config.num_samples, SHOWN_STEPS, config), reference)

    for name, drawer in drawers.items():
        experiment.row(measure, drawer, **{key: name})
    experiment.save_rows({name: drawer(16, SHOWN_STEPS, config) for name, drawer in drawers.items()})


def loss_simple(network, x_0, label):
    return ddpm.loss_at_random_t(ddpm.loss_simple, new_diffusion(), network, x_0)


def new_network(config):
    torch.manual_seed(config.seed)
    return UNet(NETWORK)


def variances(config):
    """Which fixed variance is better depends on the number of steps (Nichol & Dhariwal 2021, section 3.1)."""
    network, _, _ = load_network(None, LESSON, rebuild, config.device)
    experiment = Experiment(LESSON, config, weights_of=LESSON)
    reference, lines = reference_for(experiment.digits), {}

    def measure(variance, steps):
        samples = draw(network, config.samples_at(steps), steps, config, log_variance=variance)
        return quality(samples, reference)

    for variance in (ddpm.fixed_small, ddpm.fixed_large):
        name = variance.__name__
        for steps in STEPS:
            row = experiment.row(measure, variance, steps, variance=name, steps=steps)
            lines.setdefault(name, []).append((steps, row["fid"] - row["fid_floor"]))
    experiment.save(curves(lines, "steps", "FID above that of real digits"))


def one_training(experiment):
    """The training that `along_training` and `ema` measure: (averaged network, its `Averages`, the folder).

    moments/ in that folder holds the averaged network's weights at every 500 steps, as step_NNNNNNN.
    """
    config, folder = experiment.config, experiment.folder_of()
    (folder / "moments").mkdir(parents=True, exist_ok=True)

    def keep(network):
        latest = newest(folder / "right", "safetensors", "--out")
        write_atomically(folder / "moments" / latest.name, lambda part: copyfile(latest, part))
        return label_grid(draw(network, 16, 10, config))

    network = new_network(config)
    loss = Averages(network, DECAYS, config.device)
    return experiment.train("right", network, loss, keep, checkpoint_every=500), loss, folder


def along_training(config):
    """The loss flattens while the samples still get better: one training, looked at every 500 steps."""
    experiment = Experiment(LESSON, config, trainings="one_training")
    reference = reference_for(experiment.digits)
    folder = one_training(experiment)[-1]

    def measure(file):
        network = new_network(config).to(pick_device(config.device)).eval()
        network.load_state_dict(load_file(file))
        return quality(draw(network, config.num_samples, SHOWN_STEPS, config), reference)

    lines = {"FID": [], "1000 L_simple, validation": []}
    losses = {
        row["step"]: row.get("validation_loss") for row in read_metrics(folder / "right" / "metrics.csv")
    }
    for file in sorted(folder.glob("moments/step_*.safetensors")):
        step = int(file.stem.removeprefix("step_"))
        loss = losses[step]
        row = experiment.row(measure, file, step=step, loss=loss)
        lines["FID"].append((step, row["fid"]))
        lines["1000 L_simple, validation"].append((step, 1000 * loss))
    experiment.save(curves(lines, "step", "of the averaged weights"))


class Averages(nn.Module):
    """lesson 1's loss, which on the way averages the weights of the network it is given, in several ways.

    decays: of the averages, without warm-up; 0 keeps the weights as they are. device: as --device says it.
    """

    def __init__(self, network, decays, device):
        super().__init__()
        self.decays, self.averages = decays, nn.ModuleList(copy.deepcopy(network) for _ in decays)
        self.to(pick_device(device))

    def forward(self, network, x_0, label):
        if torch.is_grad_enabled():
            for decay, average in zip(self.decays, self.averages):
                torch._foreach_lerp_(
                    [p.data for p in average.parameters()], [p.data for p in network.parameters()], 1 - decay
                )
        return loss_simple(network, x_0, label)


def ema(config):
    """What averaging the weights is worth, and what it costs to average too long or from the start."""
    experiment = Experiment(LESSON, config, trainings="one_training")
    with_warm_up, loss, _ = one_training(experiment)
    averages = {"0.995 with warm-up": with_warm_up} | dict(zip(map(str, DECAYS), loss.averages))
    compare(experiment, "decay", {name: partial(draw, net.eval()) for name, net in averages.items()})


def neighbours(config):
    """Samples are not training digits: they are as far from them as unseen digits are."""
    network, _, _ = load_network(None, LESSON, rebuild, config.device)
    experiment = Experiment(LESSON, config, weights_of=LESSON)
    seen, unseen = experiment.digits, experiment.held_back
    samples = draw(network, config.num_samples, SHOWN_STEPS, config).clamp(-1, 1)

    def nearest(images):
        parts = [torch.cdist(x.flatten(1), seen.images.flatten(1)).min(1) for x in images.split(100)]
        return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])

    def distances(images):
        quantiles = nearest(images)[0].quantile(torch.tensor([0.01, 0.5, 0.99])).tolist()
        return {"n": len(images)} | dict(zip(("1 %", "50 %", "99 %"), quantiles))

    experiment.row(distances, samples, images="samples")
    experiment.row(distances, unseen.images[: len(samples)], images="unseen digits")
    closest = seen.images[nearest(samples[:16])[1]]
    experiment.save_rows({"sample": samples[:16], "nearest in training": closest})


def unscaled_loss(network, x_0, label):
    """The mistake: pictures in [0, 1], which `loss_simple` would refuse."""
    diffusion, x_0 = new_diffusion(), (x_0 + 1) / 2
    t, noise = torch.randint(1000, (len(x_0),)).to(x_0.device), torch.randn_like(x_0)
    return ddpm.squared_error(network(diffusion.q_sample(x_0, t, noise), t), noise)


def forgetful(network):
    """The mistake: the network is told the same t always."""
    return lambda x_t, t: network(x_t, torch.full_like(t, 500))


def one_off(network):
    """The mistake: the paper's t, counted from 1, given to a network that counts from 0."""
    return lambda x_t, t: network(x_t, (t + 1).clamp(max=999))


def grainy(denoiser, n, steps, config):
    """The mistake: noise in the last step too, as much as that step's beta."""
    samples = draw(denoiser, n, steps, config)
    beta = new_diffusion().evenly(steps).betas[0].item()
    return samples + beta**0.5 * torch.randn_like(samples)


def mistakes(config):
    """Each bug beside the right version, trained for the same time: what it does to the samples."""
    experiment, network = Experiment(LESSON, config, steps=1000), new_network(config)
    cold = Averages(network, (0.999,), config.device)

    def no_t_loss(network, x_0, label):
        return loss_simple(forgetful(network), x_0, label)

    right = experiment.train("right", network, cold)
    unscaled = experiment.train("unscaled", new_network(config), unscaled_loss)
    no_t = experiment.train("no_t", new_network(config), no_t_loss)
    drawers = {
        "right": partial(draw, right),
        "images in [0, 1]": partial(draw, unscaled),
        "t forgotten": partial(draw, forgetful(no_t)),
        "t off by one": partial(draw, one_off(right)),
        "EMA 0.999, cold": partial(draw, cold.averages[0].eval()),
        "noise at the end": partial(grainy, right),
    }
    compare(experiment, "mistake", drawers)
    experiment.save_losses(["right", "unscaled", "no_t"])


EXPERIMENTS = {f.__name__: f for f in (variances, along_training, ema, neighbours, mistakes)}

if __name__ == "__main__":
    run_command(lambda config: run_experiment(EXPERIMENTS, config), Config)
