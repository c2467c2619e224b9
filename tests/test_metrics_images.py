from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from introvae.errors import ConfigError, DataError
from introvae.metrics.classifier import CONFIDENT, PixelClassifier
from introvae.metrics.manifold import precision_recall
from introvae.metrics.reconstruction import mse, psnr_db, ssim, ssim_sigma


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blurred_pair(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    # Smooth images and noisy copies: unlike pure noise they have an SSIM well inside (0, 1).
    draws = generator()
    x = torch.nn.functional.avg_pool2d(torch.rand(shape, generator=draws), 3, stride=1, padding=1)
    return x, (x + 0.1 * torch.randn(shape, generator=draws)).clamp(0, 1)


def ssim_in_numpy(x: Tensor, y: Tensor, sigma: float, radius: int, border: str) -> np.ndarray:
    # Wang et al. 2004, Eq. 13 with the Gaussian window of their section III-C; border is "interior" or "reflect".
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    window = np.outer(weights, weights) / weights.sum() ** 2

    def smooth(image: np.ndarray) -> np.ndarray:
        if border == "reflect":
            image = np.pad(image, radius, mode="reflect")
        patches = np.lib.stride_tricks.sliding_window_view(image, window.shape)
        return np.einsum("hwij,ij->hw", patches, window)

    def of_channel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        mean_a, mean_b = smooth(a), smooth(b)
        var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
        cov = smooth(a * b) - mean_a * mean_b
        c1, c2 = 0.01**2, 0.03**2
        return (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))

    pairs = zip(x.double().numpy(), y.double().numpy(), strict=True)
    return np.array([np.mean([of_channel(a, b) for a, b in zip(u, v, strict=True)]) for u, v in pairs])


def precision_recall_by_loops(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
    def inside(points: np.ndarray, manifold: np.ndarray) -> float:
        radii = []
        for i, centre in enumerate(manifold):
            others = [math.dist(centre, other) for j, other in enumerate(manifold) if j != i]
            radii.append(sorted(others)[k - 1])
        hits = [any(math.dist(p, c) <= r for c, r in zip(manifold, radii, strict=True)) for p in points]
        return sum(hits) / len(hits)

    return inside(fake, real), inside(real, fake)


@pytest.mark.parametrize("shape", [(3, 1, 4, 4), (2, 3, 5, 7), (4, 6)])
@pytest.mark.parametrize("difference", [1.0, 0.5, 0.01])
def test_mse_and_psnr_of_a_constant_difference(shape: tuple[int, ...], difference: float):
    x = torch.full(shape, 1.0 - difference)
    y = torch.ones(shape)
    assert mse(x, y).shape == psnr_db(x, y).shape == shape[:1]
    np.testing.assert_allclose(mse(x, y), difference**2, rtol=1e-4)
    np.testing.assert_allclose(psnr_db(x, y), -20 * math.log10(difference), atol=1e-3)


def test_mse_is_one_value_for_each_image():
    x = torch.zeros(3, 2, 4, 4)
    y = torch.zeros(3, 2, 4, 4)
    y[1, 0, 0, 0] = 0.8
    y[2, :, 1] = 0.5
    np.testing.assert_allclose(mse(x, y), [0, 0.64 / 32, 0.25 * 8 / 32], rtol=1e-6)
    np.testing.assert_allclose(psnr_db(x, y), [100, 10 * math.log10(50), 10 * math.log10(16)], rtol=1e-6)
    np.testing.assert_array_equal(mse(x, y), mse(y, x))


def test_identical_images_have_100_db_and_ssim_1():
    x, _ = blurred_pair((4, 3, 24, 24))
    np.testing.assert_array_equal(mse(x, x), 0)
    np.testing.assert_allclose(psnr_db(x, x), 100, atol=1e-5)
    np.testing.assert_allclose(ssim(x, x), 1, atol=1e-6)


def test_psnr_stops_at_100_db():
    x = torch.full((1, 1, 4, 4), 0.5)
    np.testing.assert_allclose(psnr_db(x, x + 1e-6), 100, atol=1e-4)
    np.testing.assert_allclose(psnr_db(x, x + 1e-4), 80, atol=0.02)


@pytest.mark.parametrize("metric", [mse, psnr_db, ssim])
def test_images_that_cannot_be_compared(metric: Callable[[Tensor, Tensor], Tensor]):
    x = torch.rand(2, 1, 16, 16, generator=generator())
    with pytest.raises(DataError, match=r"shape \(2, 1, 16, 16\) cannot be compared with \(1, 1, 16, 16\)"):
        metric(x, x[:1])
    for bad in (math.nan, math.inf):
        y = x.clone()
        y[1, 0, 3, 3] = bad
        for pair in ((x, y), (y, x)):
            with pytest.raises(DataError, match="NaN or infinite"):
                metric(*pair)


@pytest.mark.parametrize(("side", "sigma"), [(3, 0.5), (8, 0.5), (15, 0.5), (16, 1.5), (28, 1.5), (256, 1.5)])
def test_ssim_sigma(side: int, sigma: float):
    assert ssim_sigma(side) == sigma


@pytest.mark.parametrize("shape", [(4, 1, 16, 16), (3, 3, 20, 31)])
def test_ssim_against_torchmetrics(shape: tuple[int, ...]):
    x, y = blurred_pair(shape)
    values = ssim(x, y)
    assert values.shape == shape[:1]
    wanted = structural_similarity_index_measure(y, x, reduction="none", data_range=1.0)
    np.testing.assert_allclose(values, wanted, atol=1e-6)
    mean = structural_similarity_index_measure(x, y, reduction="elementwise_mean", data_range=1.0)
    assert values.mean().item() == pytest.approx(float(mean), abs=1e-6)
    assert len(set(values.tolist())) == len(values)
    assert (values > 0.1).all()
    assert (values < 0.99).all()


@pytest.mark.parametrize("shape", [(3, 1, 16, 16), (2, 3, 20, 31), (2, 1, 28, 28)])
def test_ssim_is_the_papers_over_all_pixels_with_a_mirrored_border(shape: tuple[int, ...]):
    # What torchmetrics computes from 1.4.2 on (pull request 2721); before, it left the border out.
    x, y = blurred_pair(shape)
    np.testing.assert_allclose(ssim(x, y), ssim_in_numpy(x, y, 1.5, 5, "reflect"), atol=1e-5)


@pytest.mark.parametrize("side", [3, 8, 15])
def test_ssim_of_small_images_has_a_window_of_5_pixels(side: int):
    x, y = blurred_pair((3, 1, side, side))
    np.testing.assert_allclose(ssim(x, y), ssim_in_numpy(x, y, 0.5, 2, "reflect"), atol=1e-5)


def test_ssim_of_flat_images_in_closed_form():
    # No variance and no covariance: only the luminance term is left.
    x, y = torch.full((1, 1, 16, 16), 0.2), torch.full((1, 1, 16, 16), 0.6)
    assert ssim(x, y).item() == pytest.approx((2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4), abs=1e-4)


def test_ssim_does_not_rescale_to_the_images_own_range():
    x, y = blurred_pair((1, 1, 16, 16))
    assert ssim(0.1 * x, 0.1 * y).item() > ssim(x, y).item() + 0.05


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("n", "m", "shape"), [(40, 30, (2,)), (30, 40, (1, 3, 3))])
def test_precision_recall_against_loops(n: int, m: int, shape: tuple[int, ...], k: int):
    draws = generator()
    real = torch.randn(n, *shape, generator=draws)
    fake = 0.7 * torch.randn(m, *shape, generator=draws) + 0.5
    found = precision_recall(real, fake, k)
    wanted = precision_recall_by_loops(real.flatten(1).double().numpy(), fake.flatten(1).double().numpy(), k)
    assert found == pytest.approx(wanted, abs=1e-12)
    assert precision_recall(fake, real, k) == pytest.approx(wanted[::-1], abs=1e-12)
    assert 0 < min(found) < 1


def test_precision_recall_by_hand():
    # Real 0, 1, 2, 10 with k = 1 has radii 1, 1, 1, 8: it covers [-1, 3] and [2, 18]. Fake 3, 4, 30 has radii 1, 1, 26:
    # [2, 4], [3, 5] and [4, 56].
    real = torch.tensor([0.0, 1.0, 2.0, 10.0])[:, None]
    fake = torch.tensor([3.0, 4.0, 30.0])[:, None]
    assert precision_recall(real, fake, k=1) == pytest.approx((2 / 3, 2 / 4), abs=1e-12)


def test_precision_recall_of_equal_and_of_distant_sets():
    x = torch.randn(20, 4, generator=generator())
    assert precision_recall(x, x.clone()) == (1.0, 1.0)
    assert precision_recall(x, x + 100) == (0.0, 0.0)


def test_precision_and_recall_tell_a_collapsed_from_a_wild_sampler():
    draws = generator()
    real = torch.randn(300, 2, generator=draws)
    precision, recall = precision_recall(real, 0.05 * torch.randn(300, 2, generator=draws))
    assert precision == 1.0
    assert recall < 0.1
    precision, recall = precision_recall(real, 10 * torch.randn(300, 2, generator=draws))
    assert precision < 0.2
    assert recall > 0.8


def test_precision_recall_radius_skips_the_point_itself_but_not_its_copies():
    real = torch.tensor([[0.0], [0.0], [5.0]])
    fake = torch.tensor([[0.1], [5.0], [5.0]])
    # Real radii 0, 0, 5 with k = 1, so 0.1 is inside only the ball of 5 around 5; fake radii 4.9, 0, 0.
    assert precision_recall(real, fake, k=1) == pytest.approx((1.0, 1.0), abs=1e-12)
    assert precision_recall(real[:2], fake, k=1) == pytest.approx((0.0, 1.0), abs=1e-12)


@pytest.mark.parametrize(("n", "m", "name"), [(3, 10, "real"), (10, 3, "fake"), (1, 10, "real")])
def test_precision_recall_needs_more_than_k_points(n: int, m: int, name: str):
    real, fake = torch.rand(n, 2, generator=generator()), torch.rand(m, 2, generator=generator())
    with pytest.raises(ConfigError, match=f"{name} samples have no 3-th neighbour: give more than 3"):
        precision_recall(real, fake, k=3)


def bars(labels: list[int], noise: float = 0.0) -> Tensor:
    # Images of 4 x 4 pixels with one bright column: the class is its place.
    x = torch.zeros(len(labels), 1, 4, 4)
    x[torch.arange(len(labels)), 0, :, torch.tensor(labels)] = 1.0
    return (x + noise * torch.randn(x.shape, generator=generator())).clamp(0, 1)


def test_classifier_is_right_and_sure_on_separable_images():
    labels = [0, 1, 2, 3] * 50
    judge = PixelClassifier.fit(bars(labels, noise=0.1), torch.tensor(labels))
    p = judge.probabilities(bars([3, 0, 1, 2]))
    assert p.shape == (4, 4)
    np.testing.assert_allclose(p.sum(dim=1), 1, atol=1e-6)
    assert p.argmax(dim=1).tolist() == [3, 0, 1, 2]
    assert (p.amax(dim=1) > 0.9).all()
    assert judge.confident_share(bars([3, 0, 1, 2])) == 1.0


def test_classifier_is_not_sure_of_mixtures():
    labels = [0, 1] * 50
    judge = PixelClassifier.fit(bars(labels), torch.tensor(labels))
    pure, mixed = bars([0, 1, 0]), (bars([0]) + bars([1])) / 2
    np.testing.assert_allclose(judge.probabilities(mixed), 0.5, atol=1e-4)
    assert judge.confident_share(mixed) == 0.0
    assert judge.confident_share(torch.cat([pure, mixed])) == 0.75
    assert judge.confident_share(mixed, threshold=0.49) == 1.0
    assert judge.confident_share(pure, threshold=1.0) == 0.0
    assert CONFIDENT == 0.8


@pytest.mark.parametrize(
    ("labels", "shares"),
    [
        ([0, 1, 2, 3], [0.25] * 4),
        ([2] * 7, [1.0]),
        ([0, 0, 3, 3], [0.5, 0.5]),
        ([0, 0, 0, 1], [0.75, 0.25]),
    ],
)
def test_class_entropy_in_closed_form(labels: list[int], shares: list[float]):
    known = [0, 1, 2, 3] * 50
    judge = PixelClassifier.fit(bars(known, noise=0.1), torch.tensor(known))
    wanted = -sum(share * math.log(share) for share in shares)
    assert judge.class_entropy_nats(bars(labels)) == pytest.approx(wanted, abs=1e-12)
    assert judge.max_entropy_nats == pytest.approx(math.log(4), abs=1e-12)


def test_class_entropy_counts_classes_and_not_label_values():
    known = [0, 3] * 50
    judge = PixelClassifier.fit(bars(known), torch.tensor(known) + 4)
    assert judge.class_entropy_nats(bars([0, 3])) == pytest.approx(math.log(2), abs=1e-12)
    assert judge.max_entropy_nats == pytest.approx(math.log(2), abs=1e-12)


def test_classifier_needs_two_classes():
    with pytest.raises(DataError, match="at least two classes"):
        PixelClassifier.fit(bars([1] * 10), torch.ones(10, dtype=torch.long))
