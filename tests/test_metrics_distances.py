"""Kernel distance, neighbourhoods, MS-SSIM and posteriors against closed forms, loops and torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.kid import poly_mmd

from introvae.errors import ConfigError
from introvae.metrics import kernel, manifold
from introvae.metrics.diversity import WEIGHTS, ms_ssim, ms_ssim_scales, ms_ssim_window
from introvae.metrics.kernel import kernel_distances, polynomial_mmd
from introvae.metrics.manifold import Manifold, expected_coverage, neighbourhoods, precision_recall
from introvae.metrics.posterior import active_units, aggregate_kl_nats


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- kernel distance


def mmd_by_loops(x: np.ndarray, y: np.ndarray) -> float:
    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    def within(points: np.ndarray) -> float:
        n = len(points)
        return sum(k(points[i], points[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))

    return within(x) + within(y) - 2 * float(np.mean([k(a, b) for a in x for b in y]))


@pytest.mark.parametrize(("n", "m", "dim"), [(2, 2, 1), (7, 5, 3), (12, 12, 40)])
def test_kernel_distance_is_the_definition(n: int, m: int, dim: int):
    x, y = normal(n, dim), 1 + 2 * normal(m, dim, seed=1)
    assert polynomial_mmd(x, y) == pytest.approx(mmd_by_loops(x.numpy(), y.numpy()), rel=1e-10)
    assert polynomial_mmd(y, x) == pytest.approx(polynomial_mmd(x, y), rel=1e-10)


def test_kernel_distance_is_torchmetrics():
    x, y = normal(200, 16), 0.5 + normal(200, 16, seed=1)
    assert polynomial_mmd(x, y) == pytest.approx(poly_mmd(x, y).item(), rel=1e-9)
    assert polynomial_mmd(x.float(), y.float()) == pytest.approx(polynomial_mmd(x, y), rel=1e-4)


def test_kernel_distance_is_unbiased():
    found = torch.tensor([polynomial_mmd(normal(20, 4, seed=2 * i), normal(20, 4, seed=2 * i + 1)) for i in range(300)])
    assert abs(found.mean()) < 4 * found.std() / math.sqrt(300)
    assert (found < 0).any()  # a biased estimate would never be


def test_kernel_distance_of_a_shift_in_closed_form():
    # In one dimension k(a, b) = (ab + 1)^3. For x ~ N(m, 1) the moments are 1, m, m^2 + 1, m^3 + 3m, and
    # MMD^2 = sum over powers p of C(3, p) (E x^p - E y^p)^2.
    m = 0.5
    wanted = 3 * m**2 + 3 * (m**2) ** 2 + (m**3 + 3 * m) ** 2
    assert polynomial_mmd(normal(2000, 1), normal(2000, 1, seed=1) + m) == pytest.approx(wanted, rel=0.25)


def test_kernel_distances_of_subsets():
    x, y = normal(60, 3), normal(50, 3, seed=1) + 1
    found = kernel_distances(x, y, torch.Generator().manual_seed(0), subset=20, subsets=200)
    assert len(found) == len(set(found)) == 200
    assert kernel_distances(x, y, torch.Generator().manual_seed(0), subset=20, subsets=200) == found
    assert np.mean(found) == pytest.approx(polynomial_mmd(x, y), rel=0.1)
    assert kernel_distances(x, y, torch.Generator(), subset=60) == [polynomial_mmd(x, y)]  # nothing to choose


def test_the_kernel_distances_of_subsets_are_theirs_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel, "BLOCK", 16)
    for n, m in ((60, 50), (15, 70), (70, 15)):  # a set below the size of a subset is taken whole
        x, y = normal(n, 3), normal(m, 3, seed=1) + 1
        for subsets in (15, 2):  # all at once, and one after the other
            found = kernel_distances(x, y, torch.Generator().manual_seed(3), subset=20, subsets=subsets)
            draws = torch.Generator().manual_seed(3)
            assert len(found) == subsets
            for distance in found:
                ours, theirs = (points[torch.randperm(len(points), generator=draws)[:20]] for points in (x, y))
                assert distance == pytest.approx(mmd_by_loops(ours.numpy(), theirs.numpy()), rel=1e-6)


def test_kernel_distance_needs_two_points():
    with pytest.raises(ConfigError, match="1 samples have no kernel distance: give at least two"):
        polynomial_mmd(normal(1, 2), normal(5, 2))
    with pytest.raises(ConfigError, match="1 samples have no kernel distance: give at least two"):
        kernel_distances(normal(30, 2), normal(1, 2), torch.Generator(), subset=20)


@pytest.mark.parametrize("points", [10, 30])
def test_kernel_distance_needs_one_feature_space(points: int):
    with pytest.raises(ConfigError, match="of 2 and of 3 features cannot be compared"):
        kernel_distances(normal(points, 2), normal(points, 3), torch.Generator(), subset=20, subsets=2)


# --- neighbourhoods


def by_loops(real: np.ndarray, fake: np.ndarray, k: int, density_k: int) -> tuple[float, float, float, float]:
    """The papers' sums, written out."""

    def radius(points: np.ndarray, i: int, k: int) -> float:
        return sorted(math.dist(points[i], other) for j, other in enumerate(points) if j != i)[k - 1]

    def near(a: np.ndarray, points: np.ndarray, i: int, k: int) -> bool:
        return math.dist(a, points[i]) <= radius(points, i, k)

    n, m = len(real), len(fake)
    precision = sum(any(near(y, real, i, k) for i in range(n)) for y in fake) / m
    recall = sum(any(near(x, fake, j, k) for j in range(m)) for x in real) / n
    density = sum(near(y, real, i, density_k) for i in range(n) for y in fake) / (density_k * m)
    coverage = sum(any(near(y, real, i, density_k) for y in fake) for i in range(n)) / n
    return precision, recall, density, coverage


@pytest.mark.parametrize(("n", "m", "dim"), [(12, 9, 1), (9, 14, 2), (10, 10, 5)])
@pytest.mark.parametrize(("k", "density_k"), [(1, 1), (3, 5)])
def test_neighbourhoods_are_the_definitions(n: int, m: int, dim: int, k: int, density_k: int):
    x, y = normal(n, dim), 0.3 + 0.7 * normal(m, dim, seed=1)
    found = neighbourhoods(Manifold(x, [k, density_k]), Manifold(y, [k]), k, density_k)
    assert found == pytest.approx(by_loops(x.numpy(), y.numpy(), k, density_k), abs=1e-12)
    assert precision_recall(x, y, k) == (found.precision, found.recall)


def test_neighbourhoods_do_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch):
    x, y = normal(50, 3), normal(40, 3, seed=1)

    def found() -> manifold.Neighbourhoods:
        return neighbourhoods(Manifold(x, [3, 5]), Manifold(y, [3]))

    whole = found()
    monkeypatch.setattr(manifold, "BLOCK", 7)
    assert found() == whole


def test_density_and_coverage_of_one_law_are_what_the_paper_derives():
    n = 200
    found = [
        neighbourhoods(Manifold(normal(n, 2, seed=2 * i), [3, 5]), Manifold(normal(n, 2, seed=2 * i + 1), [3]))
        for i in range(40)
    ]
    density, coverage = (np.array([getattr(f, name) for f in found]) for name in ("density", "coverage"))
    # Naeem et al. 2020, Lemmas 1 and 2, for any continuous law: E density = 1 and, for n = m, E coverage as here.
    assert abs(density.mean() - 1) < 4 * density.std() / math.sqrt(40)
    wanted = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, 6))
    assert expected_coverage(n, n) == pytest.approx(wanted, rel=1e-12)
    assert abs(coverage.mean() - wanted) < 4 * coverage.std() / math.sqrt(40)


def test_an_odd_real_point_raises_precision_but_neither_density_nor_coverage():
    real, fake = normal(100, 2), normal(100, 2, seed=1) + 30
    odd = torch.cat([real, torch.full((1, 2), 60.0)])
    before, after = (neighbourhoods(Manifold(x, [3, 5]), Manifold(fake, [3])) for x in (real, odd))
    assert (before.precision, before.density, before.coverage) == (0, 0, 0)
    assert after.precision == 1
    assert after.density == pytest.approx(1 / 5, rel=1e-12)  # the one ball, of five that would be fair
    assert after.coverage == pytest.approx(1 / 101, rel=1e-12)


def test_a_set_needs_more_points_than_neighbours():
    with pytest.raises(ConfigError, match="5 given samples have no 5-th neighbour: give more than 5"):
        Manifold(normal(5, 2), [3, 5])


def test_neighbourhoods_need_the_radii_and_one_feature_space():
    points = normal(9, 2)
    with pytest.raises(ConfigError, match=r"of the neighbours \[3\], where 5 is needed"):
        neighbourhoods(Manifold(points, [3]), Manifold(points, [3]))
    with pytest.raises(ConfigError, match=r"of the neighbours \[1\], where 3 is needed"):
        neighbourhoods(Manifold(points, [3, 5]), Manifold(points, [1]))
    with pytest.raises(ConfigError, match="of 2 and of 4 features cannot be compared"):
        precision_recall(points, normal(9, 4))


# --- MS-SSIM


def smooth_images(count: int, side: int, seed: int) -> Tensor:
    x = torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.avg_pool2d(x, 5, stride=1, padding=2)


def ssim_terms(x: np.ndarray, y: np.ndarray, sigma: float, radius: int) -> tuple[float, float]:
    """Whole similarity with a mirrored border, and contrast and structure alone without the border, of two images."""
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    window = np.outer(weights, weights) / weights.sum() ** 2

    def smooth(image: np.ndarray) -> np.ndarray:
        padded = np.pad(image, radius, mode="reflect")
        return np.einsum("hwij,ij->hw", np.lib.stride_tricks.sliding_window_view(padded, window.shape), window)

    a, b = smooth(x), smooth(y)
    spread = 2 * (smooth(x * y) - a * b) + 0.03**2
    contrast = spread / (smooth(x * x) - a * a + smooth(y * y) - b * b + 0.03**2)
    whole = contrast * (2 * a * b + 0.01**2) / (a * a + b * b + 0.01**2)
    return whole.mean(), contrast[radius:-radius, radius:-radius].mean()


@pytest.mark.parametrize(("side", "sigma"), [(8, 0.5), (24, 1.5), (48, 1.5)])
def test_ms_ssim_is_the_definition(side: int, sigma: float):
    x, y = smooth_images(3, side, 0), smooth_images(3, side, 1)
    y = 0.6 * x + 0.4 * y
    scales, radius = ms_ssim_scales(side), (ms_ssim_window(side) - 1) // 2
    weights = np.array(WEIGHTS[:scales]) / sum(WEIGHTS[:scales])
    wanted = []
    for a, b in zip(x[:, 0].double().numpy(), y[:, 0].double().numpy(), strict=True):
        product = 1.0
        for scale, weight in enumerate(weights):
            whole, contrast = ssim_terms(a, b, sigma, radius)
            product *= (whole if scale == scales - 1 else contrast) ** weight
            a, b = (v.reshape(len(v) // 2, 2, len(v) // 2, 2).mean(axis=(1, 3)) for v in (a, b))
        wanted.append(product)
    assert 0.1 < np.mean(wanted) < 0.99
    np.testing.assert_allclose(ms_ssim(x, y), wanted, rtol=1e-4)


def test_ms_ssim_with_one_scale_is_ssim():
    x, y = smooth_images(4, 10, 0), smooth_images(4, 10, 1)
    assert ms_ssim_scales(8) == 1
    x, y = x[..., :8, :8], (0.7 * x + 0.3 * y)[..., :8, :8]
    wanted = structural_similarity_index_measure(x, y, sigma=0.5, reduction="none", data_range=1.0)
    np.testing.assert_allclose(ms_ssim(x, y), wanted, rtol=1e-4)


@pytest.mark.parametrize("side", [5, 10, 28, 32, 64, 99, 176])
def test_ms_ssim_of_sides_that_are_used(side: int):
    x = smooth_images(2, side, 0)
    assert 1 <= ms_ssim_scales(side) <= 5
    np.testing.assert_allclose(ms_ssim(x, x), 1, atol=1e-5)
    assert ms_ssim(x[:1], x[1:]).shape == (1,)
    assert ms_ssim(x[:1], x[1:]) < 1


def test_five_scales_need_176_pixels():
    assert [ms_ssim_scales(side) for side in (4, 5, 98, 99, 175, 176, 1024)] == [0, 1, 3, 4, 4, 5, 5]


# --- posteriors


def test_active_units():
    mean = normal(500, 4) * torch.tensor([1.0, 0.2, 0.05, 0.0], dtype=torch.float64) + 7
    assert active_units(mean) == 2  # variances 1, 0.04, 0.0025 and 0


def test_aggregate_kl_of_one_gaussian_in_closed_form():
    m, logvar = torch.tensor([0.5, -1.0, 0.0]), torch.tensor([0.0, -1.0, 0.7])
    wanted = 0.5 * (m.square() + logvar.exp() - 1 - logvar).sum().item()
    found = aggregate_kl_nats(m.expand(10, 3), logvar.expand(10, 3))
    assert found == pytest.approx(wanted, rel=1e-6)


def test_aggregate_kl_of_a_mixture_is_that_of_its_moments():
    means, logvar = normal(50, 3) @ normal(3, 3, seed=1), 0.3 * normal(50, 3, seed=2)
    c = np.cov(means.numpy().T, bias=True) + np.diag(logvar.exp().mean(dim=0).numpy())
    m = means.mean(dim=0).numpy()
    wanted = (np.trace(c) + m @ m - 3 - np.linalg.slogdet(c)[1]) / 2
    assert aggregate_kl_nats(means, logvar) == pytest.approx(wanted, rel=1e-10)


def test_aggregate_kl_is_zero_where_posteriors_make_up_the_prior_and_below_their_own():
    share = 0.9  # of the variance between posteriors
    means = share**0.5 * normal(20_000, 4)
    logvar = torch.full_like(means, math.log(1 - share))
    single = 0.5 * (means.square() + logvar.exp() - 1 - logvar).sum(dim=1).mean().item()
    assert aggregate_kl_nats(means, logvar) < 0.005 < 2 < single


def test_aggregate_kl_of_too_few_means_without_variance():
    with pytest.raises(ConfigError, match="of 3 samples has a singular covariance: give more than 4"):
        aggregate_kl_nats(normal(3, 4), torch.full((3, 4), -torch.inf))
