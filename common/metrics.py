"""Distances between sets of features: FID, KID and diversity. Nothing here knows what the features are of."""

import math
import warnings
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Features = Float[Tensor, "n d"]
KID_SUBSETS, KID_SUBSET_SIZE = 20, 1000


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


class KIDEstimate(NamedTuple):
    kid: float
    kid_error: float  # standard error; NaN for fewer than four features


def kid_between(real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"]) -> float:
    """Return the unbiased kernel distance (Bińkowski et al. 2018), averaged over subsets; may be negative."""
    return kid_with_error(real, fake).kid


def kid_with_error(real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"]) -> KIDEstimate:
    """Return the unbiased kernel distance (Bińkowski et al. 2018), averaged over subsets, and its error.

    The squared error is the variance of the distance of all features, plus that of the mean over subsets. It
    is how much the distance varies if real images and samples are drawn again, independently.
    """
    from torchmetrics.image.kid import KernelInceptionDistance  # here, because importing it takes seconds

    size = min(KID_SUBSET_SIZE, len(fake), len(real))
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        metric = KernelInceptionDistance(
            feature=identity_extractor(real.shape[1]), subsets=KID_SUBSETS, subset_size=size
        )
        metric.update(real, real=True)
        metric.update(fake, real=False)
        kid, std_of_subsets = (value.item() for value in metric.compute())
    variance = mmd_variance(real, fake) + std_of_subsets**2 / (KID_SUBSETS - 1)
    return KIDEstimate(kid, math.sqrt(variance))


def mmd_variance(real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"]) -> float:
    """Estimate the variance of the unbiased squared MMD of two sets of features with KID's cubic kernel.

    The MMD is a U-statistic: mean k(x, x') + mean k(y, y') - 2 mean k(x, y). Hoeffding's decomposition splits
    it into uncorrelated sums, over features and over pairs of them, with the variance

        4 var(a) / n + 4 var(b) / m + 2 var(g_xx) / n(n-1) + 2 var(g_yy) / m(m-1) + 4 var(g_xy) / nm.

    a(x) = E k(x, x') - E k(x, y), b(y) likewise; g is the kernel minus its means given either argument. The
    variances are estimated without bias, from at most KID_SUBSET_SIZE features of each set. The first two
    terms together are set to 0 where they are estimated below 0. For equal distributions, where they are 0,
    the standard error is therefore about a fifth too large. NaN if a set has fewer than four features.
    """
    n, m = len(real), len(fake)
    if min(n, m) < 4:
        return math.nan
    x, y = (random_rows(features, KID_SUBSET_SIZE).double() for features in (real, fake))
    k_xy = (x @ y.T / x.shape[1] + 1) ** 3
    g_xy = k_xy - k_xy.mean(0) - k_xy.mean(1, keepdim=True) + k_xy.mean()
    var_xy = g_xy.square().sum() / ((len(x) - 1) * (len(y) - 1))
    of_features, of_pairs = 0.0, 4 * var_xy / (n * m)
    for points, cross, size, other_size in ((x, k_xy, n, len(y)), (y, k_xy.T, m, len(x))):
        k, count = ((points @ points.T / x.shape[1] + 1) ** 3).fill_diagonal_(0), len(points)
        own = k.sum(1) / (count - 2)
        g = k - own - own[:, None] + k.sum() / ((count - 1) * (count - 2))  # off the diagonal; U-centered
        var_g = g.fill_diagonal_(0).square().sum() / (count * (count - 3))
        noise = var_g / (count - 2) + var_xy / other_size  # in the means of rows
        of_features = of_features + 4 * ((own - cross.mean(1)).var() - noise).item() / size
        of_pairs = of_pairs + 2 * var_g / (size * (size - 1))
    return max(of_features, 0) + of_pairs.item()


def random_rows(features: Features, most: int) -> Float[Tensor, "m d"]:
    """Return at most so many of the features, always the same."""
    return features[torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:most]]


def identity_extractor(num_features: int) -> nn.Module:
    """Return a feature extractor for torchmetrics that passes features through."""
    extractor = nn.Identity()
    extractor.num_features = num_features  # type: ignore[assignment]  # torchmetrics looks for it
    return extractor


def within_group_variance(features: Features, groups: Int[Tensor, "n"]) -> float:
    """Return the pooled total variance of the features; NaN if no group has two members.

    It is the mean of the groups' unbiased variances, each weighted by its degrees of freedom, the number of
    its members minus 1. A group of two has little weight, and groups of one have none.
    """
    _, group, sizes = groups.unique(return_inverse=True, return_counts=True)
    features = features.double()
    sums = features.new_zeros(len(sizes), features.shape[1]).index_add_(0, group, features)
    squares = (features - (sums / sizes[:, None])[group]).square().sum().item()
    degrees_of_freedom = len(features) - len(sizes)
    return squares / degrees_of_freedom if degrees_of_freedom else math.nan
