"""Distances between sets of features: FID, KID and diversity. Nothing here knows what the features are of."""

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Features = Float[Tensor, "n d"]


def frechet_distance(
    mean_1: Float[Tensor, "d"],
    covariance_1: Float[Tensor, "d d"],
    mean_2: Float[Tensor, "d"],
    covariance_2: Float[Tensor, "d d"],
) -> float:
    """Return the Fréchet distance of two Gaussians (Heusel et al. 2017).

    |mean_1 - mean_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)), with the trace of the root as the sum of the
    roots of the eigenvalues of C_1 C_2.
    """
    squared_distance = (mean_1.double() - mean_2.double()).square().sum()
    eigenvalues = torch.linalg.eigvals(covariance_1.double() @ covariance_2.double())
    trace_of_root = eigenvalues.sqrt().real.sum()
    return (squared_distance + covariance_1.trace() + covariance_2.trace() - 2 * trace_of_root).item()


def mean_and_covariance(features: Features) -> tuple[Float[Tensor, "d"], Float[Tensor, "d d"]]:
    """Return mean and unbiased covariance of features in float64. Raises ValueError for fewer than two."""
    if len(features) < 2:
        raise ValueError(f"{len(features)} features have no covariance; at least 2 are needed")
    features = features.double()
    return features.mean(0), features.T.cov()


def fid_between(real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"]) -> float:
    """Return the FID of two sets of features, each of at least 2. Lower is better; it grows as n shrinks."""
    return frechet_distance(*mean_and_covariance(real), *mean_and_covariance(fake))


def kid_between(real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"]) -> float:
    """Return the unbiased kernel distance (Bińkowski et al. 2018), averaged over subsets; may be negative."""
    from torchmetrics.image.kid import KernelInceptionDistance  # here, because importing it takes seconds

    size = min(1000, len(fake), len(real))
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        metric = KernelInceptionDistance(
            feature=identity_extractor(real.shape[1]), subsets=20, subset_size=size
        )
        metric.update(real, real=True)
        metric.update(fake, real=False)
        return metric.compute()[0].item()


def identity_extractor(num_features: int) -> nn.Module:
    """Return a feature extractor for torchmetrics that passes features through."""
    extractor = nn.Identity()
    extractor.num_features = num_features  # type: ignore[assignment]  # torchmetrics looks for it
    return extractor


def within_group_variance(features: Features, groups: Int[Tensor, "n"]) -> float:
    """Return the mean over groups of the features' total variance; NaN if no group has two members."""
    variances = [features[groups == g].var(0).sum() for g in groups.unique() if (groups == g).sum() > 1]
    return torch.stack(variances).mean().item() if variances else float("nan")
