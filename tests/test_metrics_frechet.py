"""Fréchet distances against closed forms, scipy and torchmetrics; statistics against numpy; the features by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from introvae.data import load_data
from introvae.errors import ConfigError, DataError
from introvae.metrics.features import FEATURES, THUMB, WIDTHS, feature_space, randconv, thumb, values
from introvae.metrics.frechet import GaussianStatistics, frechet_distance


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(n: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=generator(seed), dtype=torch.float64)


def of(x: Tensor, batch: int = 10**6) -> GaussianStatistics:
    found = GaussianStatistics(x.shape[1])
    for part in x.split(batch):
        found.update(part)
    return found


def whitened(n: int, dim: int, seed: int) -> Tensor:
    """Points whose mean is 0 and whose unbiased covariance is the identity, but for rounding."""
    x = normal(n, dim, seed)
    x = x - x.mean(dim=0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.from_numpy(np.atleast_2d(np.cov(x.numpy().T)))).T)


def with_moments(mean: Tensor, covariance: Tensor, seed: int = 0, n: int = 64) -> GaussianStatistics:
    """Statistics of points with exactly these moments."""
    root = torch.linalg.cholesky(covariance)
    return of(whitened(n, len(mean), seed) @ root.T + mean)


def covariance(dim: int, seed: int) -> Tensor:
    x = normal(dim + 3, dim, seed)
    return x.T @ x / dim + 0.1 * torch.eye(dim, dtype=torch.float64)


def by_scipy(a: Tensor, b: Tensor) -> float:
    """The definition, from points."""
    first, second = np.atleast_2d(np.cov(a.numpy().T)), np.atleast_2d(np.cov(b.numpy().T))
    root = scipy.linalg.sqrtm(first @ second).real
    shift = a.numpy().mean(axis=0) - b.numpy().mean(axis=0)
    return float(shift @ shift + np.trace(first + second - 2 * root))


# --- the distance


def test_in_one_dimension_by_hand():
    # Means 1 and 5, unbiased variances 2 and 8: (1 - 5)^2 + (sqrt 2 - sqrt 8)^2 = 16 + 2.
    a, b = (of(torch.tensor(x)[:, None]) for x in ([0.0, 2.0], [3.0, 7.0]))
    assert frechet_distance(a, b) == pytest.approx(18.0, rel=1e-12)


@pytest.mark.parametrize("dim", [1, 3, 8])
def test_of_diagonal_gaussians_is_the_distance_of_means_and_deviations(dim: int):
    draws = generator(1)
    means = [torch.randn(dim, generator=draws, dtype=torch.float64) for _ in range(2)]
    stds = [0.2 + torch.rand(dim, generator=draws, dtype=torch.float64) for _ in range(2)]
    a, b = (with_moments(m, torch.diag(s**2), seed) for seed, (m, s) in enumerate(zip(means, stds, strict=True)))
    wanted = (means[0] - means[1]).square().sum() + (stds[0] - stds[1]).square().sum()
    assert frechet_distance(a, b) == pytest.approx(wanted.item(), rel=1e-9)


def test_of_full_covariances_in_closed_form():
    # Two by two: the trace of the root of M is sqrt(tr M + 2 sqrt(det M)).
    first, second = covariance(2, 0), covariance(2, 1)
    product = first @ second
    root = (product.trace() + 2 * torch.linalg.det(product).sqrt()).sqrt()
    wanted = (first + second).trace() - 2 * root
    zero = torch.zeros(2, dtype=torch.float64)
    found = frechet_distance(with_moments(zero, first), with_moments(zero, second, seed=1))
    assert found == pytest.approx(wanted.item(), rel=1e-9)


def test_of_a_covariance_and_its_multiple_is_that_of_the_deviations():
    c = covariance(6, 2)
    zero = torch.zeros(6, dtype=torch.float64)
    found = frechet_distance(with_moments(zero, c), with_moments(zero, 4 * c, seed=1))
    assert found == pytest.approx(c.trace().item(), rel=1e-9)  # (2 - 1)^2 tr C


def test_of_a_shifted_copy_is_the_squared_shift():
    x, shift = normal(50, 5), torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0], dtype=torch.float64)
    assert frechet_distance(of(x), of(x + shift)) == pytest.approx(float(shift.square().sum()), rel=1e-9)


@pytest.mark.parametrize(("n", "dim"), [(50, 5), (5, 50), (2, 30)])
def test_of_equal_sets_is_zero_and_never_below(n: int, dim: int):
    x = normal(n, dim)
    for pair in ((of(x), of(x)), (of(x), of(x.flip(0)))):
        assert 0 <= frechet_distance(*pair) < 1e-6  # the root of a rounding error


@pytest.mark.parametrize(("n", "m", "dim"), [(100, 80, 1), (100, 80, 7), (400, 300, 20)])
def test_against_scipy(n: int, m: int, dim: int):
    a, b = normal(n, dim, 1) @ covariance(dim, 3), normal(m, dim, 2) * 0.5 + 0.3
    assert frechet_distance(of(a), of(b)) == pytest.approx(by_scipy(a, b), rel=1e-8)
    assert frechet_distance(of(b), of(a)) == pytest.approx(frechet_distance(of(a), of(b)), rel=1e-10)


class Features(nn.Module):
    """Features of ours, as torchmetrics wants a network."""

    def __init__(self, function: Callable[[Tensor], Tensor], count: int) -> None:
        super().__init__()
        self.function, self.num_features = function, count

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(("name", "count"), [("thumb", THUMB**2), ("randconv", 2 * sum(WIDTHS)), ("mnist", 96)])
def test_against_torchmetrics(name: str, count: int):
    draws, space = generator(), feature_space(name)
    n = 2 * count  # more than features: torchmetrics' root of a singular product is itself not exact to 1e-6
    real = torch.rand(n, 1, 16, 16, generator=draws)
    fake = nn.functional.avg_pool2d(torch.rand(n, 1, 16, 16, generator=draws), 3, stride=1, padding=1)

    def double(x: Tensor) -> Tensor:
        return space(x).double()  # torchmetrics gives its answer in the features' type

    theirs = FrechetInceptionDistance(feature=Features(double, count), normalize=True).set_dtype(torch.float64)
    ours = {True: GaussianStatistics(count), False: GaussianStatistics(count)}
    for images, is_real in ((real, True), (fake, False)):
        for part in images.split(100):
            theirs.update(part, real=is_real)
            ours[is_real].update(space(part))
    assert frechet_distance(ours[True], ours[False]) == pytest.approx(theirs.compute().item(), rel=1e-6)


# --- the statistics


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("batch", [1, 7, 50])
def test_batch_by_batch_equals_all_at_once_and_numpy(offset: float, batch: int):
    x = normal(50, 6) + offset
    parts = of(x, batch)
    assert parts.count == 50
    np.testing.assert_allclose(parts.mean, x.numpy().mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(parts.covariance, np.cov(x.numpy().T), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(parts.covariance, of(x).covariance, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_the_order_does_not_matter(offset: float):
    x = normal(60, 4) + offset
    x[:10] += 100  # a first batch that is far from the rest
    there, back = of(x, 7), of(x.flip(0), 7)
    np.testing.assert_allclose(there.mean, back.mean, rtol=1e-12)
    np.testing.assert_allclose(there.covariance, back.covariance, rtol=1e-10)


def test_features_of_single_precision_are_summed_in_double():
    x = (normal(1000, 3) + 1e3).float()
    found = of(x, 100)
    assert found.mean.dtype == found.covariance.dtype == torch.float64
    np.testing.assert_allclose(found.covariance, np.cov(x.double().numpy().T), rtol=1e-10, atol=1e-10)


def test_fewer_samples_than_features_have_a_singular_symmetric_covariance():
    a, b = normal(5, 40), normal(6, 40, 1) + 1
    c = of(a).covariance
    assert torch.equal(c, c.T)
    eigenvalues = torch.linalg.eigvalsh(c)
    assert (eigenvalues > 1e-9).sum() == 4
    assert eigenvalues.min() > -1e-9
    # sqrtm fails at singular products. With C1 = X'X and C2 = Y'Y, tr (C1 C2)^(1/2) is the nuclear norm of X Y'.
    x, y = ((z - z.mean(dim=0)) / math.sqrt(len(z) - 1) for z in (a, b))
    shared = torch.linalg.matrix_norm(x @ y.T, ord="nuc")
    wanted = (a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum() - 2 * shared
    assert frechet_distance(of(a), of(b)) == pytest.approx(wanted.item(), rel=1e-6)


def assert_equal(a: GaussianStatistics, b: GaussianStatistics) -> None:
    assert a.count == b.count
    np.testing.assert_allclose(a.mean, b.mean, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(a.covariance, b.covariance, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("cut", [1, 20, 59])
def test_merged_parts_equal_one_pass(offset: float, cut: int):
    x = normal(60, 5) + offset
    x[:cut] += 3  # the two parts subtract different points before squaring
    parts = [of(x[:cut], 7), of(x[cut:], 11)]
    before = parts[1].covariance.clone() if cut < 59 else None
    parts[0].merge(parts[1])
    assert_equal(parts[0], of(x))
    assert before is None or torch.equal(parts[1].covariance, before)
    other = of(normal(50, 5, seed=1) + offset)
    assert frechet_distance(parts[0], other) == pytest.approx(frechet_distance(of(x), other), rel=1e-10)


def test_merging_with_nothing_changes_nothing():
    full, empty = of(normal(20, 3)), GaussianStatistics(3)
    full.merge(GaussianStatistics(3))
    empty.merge(full)
    assert_equal(full, of(normal(20, 3)))
    assert_equal(empty, of(normal(20, 3)))
    empty.update(normal(5, 3, seed=1))  # what was merged is a copy
    assert_equal(full, of(normal(20, 3)))


def test_statistics_of_two_spaces_are_not_merged():
    with pytest.raises(ConfigError, match="of 3 and of 4 features cannot be merged"):
        of(normal(9, 3)).merge(of(normal(9, 4)))


WORKER = """
import sys, torch
from torch import distributed
from introvae.metrics.frechet import GaussianStatistics, frechet_distance
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
found, lonely, nothing = (GaussianStatistics(4) for _ in range(3))
x = torch.load(f"{folder}/x.pt")
for part in (x[:30], x[30:])[rank].split(8):
    found.update(part)
if rank == 1:
    lonely.update(x)
for statistics in (found, lonely, nothing):
    statistics.all_reduce()
assert nothing.count == 0
other = GaussianStatistics(4)
other.update(torch.load(f"{folder}/other.pt"))
found = [(s.count, s.mean, s.covariance, frechet_distance(s, other)) for s in (found, lonely)]
torch.save(found, f"{folder}/{rank}.pt")
distributed.destroy_process_group()
"""


def test_processes_that_each_saw_a_part_have_the_sums_of_one(tmp_path: Path):
    x = normal(100, 4) + 1e3
    x[:30] *= 2
    other = x[:60] + normal(60, 4, seed=1)
    torch.save(x, tmp_path / "x.pt")
    torch.save(other, tmp_path / "other.pt")
    words = [sys.executable, "-c", WORKER]
    processes = [
        subprocess.Popen([*words, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    whole = of(x)
    distance = frechet_distance(whole, of(other))
    for rank in range(2):
        for count, mean, covariance, found in torch.load(tmp_path / f"{rank}.pt"):
            assert count == 100
            np.testing.assert_allclose(mean, whole.mean, rtol=1e-10)
            np.testing.assert_allclose(covariance, whole.covariance, rtol=1e-10, atol=1e-7)  # of thousands, squared
            assert found == pytest.approx(distance, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_and_not_counted(bad: float):
    found = of(normal(10, 3))
    before = found.mean.clone()
    x = normal(4, 3)
    x[2, 1] = bad
    with pytest.raises(DataError, match="NaN or infinite"):
        found.update(x)
    assert found.count == 10
    assert torch.equal(found.mean, before)


@pytest.mark.parametrize("shape", [(4, 1), (4, 2), (3,), (4, 3, 1)])
def test_features_of_another_shape_are_refused_and_not_counted(shape: tuple[int, ...]):
    found = of(normal(10, 3))
    with pytest.raises(DataError, match=r"where \[N, 3\] is needed"):
        found.update(torch.ones(shape))
    assert found.count == 10


def test_statistics_of_two_spaces_are_not_compared():
    with pytest.raises(ConfigError, match="of 3 and of 4 features cannot be compared"):
        frechet_distance(of(normal(9, 3)), of(normal(9, 4)))


def test_one_sample_has_no_covariance():
    with pytest.raises(ConfigError, match="1 samples have no covariance: give at least two"):
        of(normal(1, 3)).covariance  # noqa: B018
    with pytest.raises(ConfigError, match="give at least two"):
        frechet_distance(of(normal(1, 3)), of(normal(9, 3)))


# --- the features


@pytest.mark.parametrize(
    ("shape", "thumbs"),
    [((1, 64, 64), 64), ((3, 64, 64), 192), ((1, 8, 8), 64), ((3, 4, 4), 48), ((1, 20, 13), 64), ((1, 4, 20), 32)],
)
def test_shapes(shape: tuple[int, ...], thumbs: int):
    x = torch.rand(3, *shape, generator=generator())
    assert thumb(x).shape == (3, thumbs)
    assert values(x).shape == (3, math.prod(shape))
    if min(shape[1:]) >= 8:  # its third layer needs two pixels
        assert randconv(x).shape == (3, 384)


def test_values_are_the_vectors():
    x = torch.rand(4, 5, generator=generator())
    assert torch.equal(values(x), x)


def test_thumb_is_the_mean_of_each_patch():
    x = torch.rand(2, 3, 32, 24, generator=generator())
    wanted = torch.stack(
        [x[:, :, 4 * i : 4 * i + 4, 3 * j : 3 * j + 3].mean(dim=(2, 3)) for i in range(8) for j in range(8)], dim=2
    )
    np.testing.assert_allclose(thumb(x), wanted.flatten(1), atol=1e-6)


def test_thumb_of_eight_pixels_is_the_image():
    x = torch.rand(2, 1, 8, 8, generator=generator())
    np.testing.assert_allclose(thumb(x), x.flatten(1), atol=1e-7)


def test_randconv_is_the_same_in_every_process_and_seed():
    x = torch.linspace(0, 1, 256).reshape(1, 1, 16, 16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = randconv(x)
        torch.manual_seed(2)
        np.random.seed(3)
        assert torch.equal(randconv(x), first)
    np.testing.assert_allclose(first, randconv_in_numpy(x.numpy()), rtol=1e-4, atol=1e-5)


def randconv_in_numpy(x: np.ndarray) -> np.ndarray:
    """The docstring, written out: 4x4 convolutions of stride 2, replicated border, LeakyReLU; mean and deviation."""
    draws = np.random.RandomState(0)
    h, found = np.repeat(x.astype(np.float64), 3, axis=1) * 2 - 1, []
    for outputs in (32, 64, 96):
        weight = draws.standard_normal((outputs, h.shape[1], 4, 4)) * math.sqrt(2 / (h.shape[1] * 16))
        padded = np.pad(h, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
        patches = np.lib.stride_tricks.sliding_window_view(padded, (4, 4), axis=(2, 3))[:, :, ::2, ::2]
        h = np.einsum("nchwij,ocij->nohw", patches, weight)
        h = np.where(h > 0, h, 0.2 * h)
        found += [h.mean(axis=(2, 3)), h.std(axis=(2, 3))]
    return np.concatenate(found, axis=1)


def test_randconv_of_grey_is_that_of_three_equal_channels():
    x = torch.rand(4, 1, 24, 24, generator=generator())
    assert torch.equal(randconv(x), randconv(x.repeat(1, 3, 1, 1)))
    assert not torch.allclose(randconv(torch.rand(4, 3, 24, 24, generator=generator())), randconv(x))


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("side", [8, 32])
def test_a_batch_of_one_equals_a_batch_of_many(name: str, side: int):
    x = torch.rand(5, 1, side, side, generator=generator())
    alone = torch.cat([FEATURES[name](part) for part in x.split(1)])
    np.testing.assert_allclose(FEATURES[name](x), alone, atol=1e-5)
    assert len(alone.unique(dim=0)) == 5


def blurred(x: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(nn.functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def test_randconv_tells_blurred_digits_from_sharp_ones():
    x = load_data("digits").train.tensor()
    half = len(x) // 2
    sharp, other = randconv(x[:half]), randconv(x[half:])
    floor = frechet_distance(of(sharp), of(other))
    assert frechet_distance(of(sharp), of(randconv(blurred(x[half:])))) > 20 * floor > 0


def test_thumb_tells_dark_images_from_bright_ones():
    x = load_data("digits").train.tensor()
    half = len(x) // 2
    floor = frechet_distance(of(thumb(x[:half])), of(thumb(x[half:])))
    assert frechet_distance(of(thumb(x[:half])), of(thumb(0.5 * x[half:]))) > 10 * floor > 0
