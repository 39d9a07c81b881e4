"""FID, KID and diversity of features against torchmetrics, closed forms and the definitions, in numpy."""

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from common.metrics import (
    fid_between,
    frechet_distance,
    identity_extractor,
    kid_between,
    mean_and_covariance,
    within_group_variance,
)


def features(n, d, seed):
    """Return correlated features with a mean."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator)
    return torch.randn(n, d, generator=generator) @ mix + torch.randn(d, generator=generator)


def torchmetrics_fid(real, fake):
    metric = FrechetInceptionDistance(feature=identity_extractor(real.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return metric.compute().item()


@pytest.mark.parametrize("n, m, d", [(400, 300, 8), (100, 90, 64), (40, 30, 64)])
def test_fid_is_that_of_torchmetrics(n, m, d):
    """In the last case there are fewer features than dimensions, and the covariances are singular."""
    real, fake = features(n, d, 0), features(m, d, 1)
    assert fid_between(real, fake) == pytest.approx(torchmetrics_fid(real, fake), rel=1e-4)
    assert fid_between(real, real + 0.5) == pytest.approx(0.25 * d, rel=1e-4)


def test_fid_is_the_trace_formula_in_its_symmetric_form():
    """tr((A B)^(1/2)) = tr((A^(1/2) B A^(1/2))^(1/2)), where numpy needs roots of symmetric matrices only."""
    real, fake = features(200, 12, 2).double().numpy(), features(150, 12, 3).double().numpy()
    a, b = np.cov(real.T), np.cov(fake.T)
    values, vectors = np.linalg.eigh(a)
    root_a = vectors * np.sqrt(values) @ vectors.T
    trace_of_root = np.sqrt(np.linalg.eigvalsh(root_a @ b @ root_a)).sum()
    expected = np.square(real.mean(0) - fake.mean(0)).sum() + np.trace(a) + np.trace(b) - 2 * trace_of_root
    assert fid_between(torch.from_numpy(real), torch.from_numpy(fake)) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_gaussians_with_diagonal_covariance():
    """|mean_1 - mean_2|^2 + sum (sigma_1 - sigma_2)^2, also after a rotation of the space."""
    generator = torch.Generator().manual_seed(0)
    mean_1, mean_2 = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    sigma_1, sigma_2 = torch.rand(2, 6, generator=generator, dtype=torch.float64) * 3
    expected = (mean_1 - mean_2).square().sum() + (sigma_1 - sigma_2).square().sum()
    distance = frechet_distance(mean_1, sigma_1.square().diag(), mean_2, sigma_2.square().diag())
    assert distance == pytest.approx(expected.item(), rel=1e-9)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    covariances = [rotation @ sigma.square().diag() @ rotation.T for sigma in (sigma_1, sigma_2)]
    rotated = frechet_distance(rotation @ mean_1, covariances[0], rotation @ mean_2, covariances[1])
    assert rotated == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_a_gaussian_to_itself_is_zero():
    mean, covariance = mean_and_covariance(features(100, 16, 4))
    assert frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-8)
    point = torch.zeros(16, 16)  # a distribution of a single point, whose distance is the total variance
    assert frechet_distance(mean, covariance, mean, point) == pytest.approx(covariance.trace().item())


def test_mean_and_covariance_are_numpys():
    x = features(50, 5, 5)
    mean, covariance = mean_and_covariance(x)
    assert mean.dtype == covariance.dtype == torch.float64
    np.testing.assert_allclose(mean, x.double().mean(0), rtol=1e-9)
    np.testing.assert_allclose(covariance, np.cov(x.double().numpy().T), rtol=1e-9)
    with pytest.raises(ValueError, match="1 features have no covariance"):
        mean_and_covariance(x[:1])


def test_kid_is_the_unbiased_squared_mmd_of_a_cubic_kernel():
    """With equally many features, every subset of torchmetrics holds all of them."""
    real, fake = features(30, 4, 6), features(30, 4, 7)

    def kernel(x, y):
        return (x.double().numpy() @ y.double().numpy().T / 4 + 1) ** 3

    def without_diagonal(k):
        return (k.sum() - np.trace(k)) / (30 * 29)

    within = without_diagonal(kernel(real, real)) + without_diagonal(kernel(fake, fake))
    assert kid_between(real, fake) == pytest.approx(within - 2 * kernel(real, fake).mean(), rel=1e-4)


def test_kid_is_reproducible_and_leaves_the_random_numbers_alone():
    real, fake = features(60, 4, 8), features(20, 4, 9)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = kid_between(real, fake)
    assert torch.equal(torch.rand(3), expected)
    assert kid_between(real, fake) == first


def test_a_group_of_two_does_not_weigh_like_one_of_a_thousand():
    """Groups of one distribution in sizes that differ, two of them lopsided by chance or by hand."""
    x, groups = features(1002, 3, 10).double(), torch.cat([torch.zeros(1000), torch.ones(2)]).long()
    alone = x[:1000].var(0).sum().item()
    x[1000:] = x[:1]  # two equal members
    assert within_group_variance(x, groups) == pytest.approx(alone * 999 / 1000)
    x[1001] += 100
    assert within_group_variance(x, groups) == pytest.approx(alone * 0.999 + 3 * 100**2 / 2 / 1000)


def test_within_group_variance_by_hand():
    x = torch.tensor([[0.0, 0.0], [2.0, 4.0], [1.0, 1.0], [1.0, 3.0], [1.0, 5.0], [9.0, 9.0]])
    groups = torch.tensor([0, 0, 7, 7, 7, 3])  # total variances 2 + 8 and 0 + 4; a group of one is left out
    assert within_group_variance(x, groups) == pytest.approx((1 * 10 + 2 * 4) / (1 + 2))
    assert np.isnan(within_group_variance(x, torch.arange(6)))
