"""Differentiable augmentation: a function of images and draws, sample by sample, that gradients pass."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from introvae.augment import DRAWS, Augmentation, color, cutout, list_policies, translation
from introvae.errors import ConfigError, DataError

ALL = "color,translation,cutout"


def images(n: int = 6, channels: int = 3, height: int = 12, width: int = 10, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, height, width, generator=generator, dtype=torch.float64)


def draws(n: int = 6, seed: int = 1) -> Tensor:
    return Augmentation.draw(n, torch.Generator().manual_seed(seed)).double()


# --- against a transcription, pixel by pixel, for images in [-1, 1] as in the paper


def slow_color(image: list[Any], u: list[float]) -> list[Any]:
    channels, height, width = len(image), len(image[0]), len(image[0][0])
    y = [[[image[c][i][j] + (u[0] - 0.5) for j in range(width)] for i in range(height)] for c in range(channels)]
    for i in range(height):
        for j in range(width):
            mean = sum(y[c][i][j] for c in range(channels)) / channels
            for c in range(channels):
                y[c][i][j] = (y[c][i][j] - mean) * (u[1] * 2) + mean
    mean = sum(y[c][i][j] for c in range(channels) for i in range(height) for j in range(width))
    mean /= channels * height * width
    return [[[(v - mean) * (u[2] + 0.5) + mean for v in row] for row in plane] for plane in y]


def slow_translation(image: list[Any], u: list[float]) -> list[Any]:
    height, width = len(image[0]), len(image[0][0])
    most = int(height * 0.125 + 0.5), int(width * 0.125 + 0.5)
    down, right = (math.floor(d * (2 * m + 1)) - m for d, m in zip(u, most, strict=True))
    found = [[[0.0] * width for _ in range(height)] for _ in image]
    for plane, to in zip(image, found, strict=True):
        for i in range(height):
            for j in range(width):
                if 0 <= i + down < height and 0 <= j + right < width:
                    to[i + down][j + right] = plane[i][j]
    return found


def slow_cutout(image: list[Any], u: list[float]) -> list[Any]:
    height, width = len(image[0]), len(image[0][0])
    sides = int(height * 0.5 + 0.5), int(width * 0.5 + 0.5)
    top, left = (math.floor(d * (n + (1 - s % 2))) - s // 2 for d, n, s in zip(u, (height, width), sides, strict=True))
    found = [[list(row) for row in plane] for plane in image]
    for plane in found:
        for i in range(max(0, top), min(height, top + sides[0])):
            for j in range(max(0, left), min(width, left + sides[1])):
                plane[i][j] = 0.0
    return found


SLOW = {"color": (slow_color, slice(0, 3)), "translation": (slow_translation, slice(3, 5))}
SLOW |= {"cutout": (slow_cutout, slice(5, 7))}


@pytest.mark.parametrize("policy", ["color", "translation", "cutout", ALL, "cutout,color", "translation,translation"])
@pytest.mark.parametrize("shape", [(3, 12, 10), (1, 8, 8), (3, 7, 9), (2, 16, 5)])
def test_it_is_the_paper_s(policy: str, shape: tuple[int, int, int]) -> None:
    x, u = images(8, *shape), draws(8)
    found = Augmentation(policy, 1.0)(x, u)
    for image, own, result in zip(x, u.tolist(), found, strict=True):
        expected = (2 * image - 1).tolist()
        for name in policy.split(","):
            function, columns = SLOW[name]
            expected = function(expected, own[columns])
        assert (2 * result - 1 - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-13


# --- laws


@pytest.mark.parametrize("policy", ["color", "translation", "cutout", ALL])
@pytest.mark.parametrize("probability", [0.5, 1.0])
def test_gradients_pass(policy: str, probability: float) -> None:
    augment, u = Augmentation(policy, probability), draws(3)
    x = images(3, 3, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: augment(x, u), x)
    assert torch.autograd.gradgradcheck(lambda x: augment(x, u) ** 2, x)


def test_gradients_are_those_of_what_can_be_seen() -> None:
    x, u = images(50).requires_grad_(), draws(50)
    augment = Augmentation("cutout", 1.0)
    (gradient,) = torch.autograd.grad(augment(x, u).sum(), x)
    seen = augment(torch.full_like(x, 7.0), u) == 7.0
    assert torch.equal(gradient, seen.double())
    assert 0.5 < seen.double().mean() < 0.9


@pytest.mark.parametrize("policy", ["color", "translation", "cutout", ALL])
def test_an_image_s_change_depends_on_its_own_draws_alone(policy: str) -> None:
    augment, x, u = Augmentation(policy, 0.7), images(9), draws(9)
    whole = augment(x, u)
    for rows in (slice(0, 3), slice(3, 4), slice(4, 9)):
        assert torch.allclose(augment(x[rows], u[rows]), whole[rows], rtol=0, atol=1e-15)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(augment(x[order], u[order]), whole[order], rtol=0, atol=1e-15)
    assert torch.equal(augment(x, u), whole)


def test_real_and_fake_get_the_same_change_from_the_same_draws() -> None:
    """What the squared error between T(x; u) and T(D(z); u) rests on: T is affine in the image."""
    x, y, u = images(seed=3), images(seed=4), draws()
    augment = Augmentation(ALL, 0.8)
    between = augment(0.25 * x + 0.75 * y, u)
    assert torch.allclose(between, 0.25 * augment(x, u) + 0.75 * augment(y, u), rtol=0, atol=1e-14)


@pytest.mark.parametrize("augment", [Augmentation(""), Augmentation(" , "), Augmentation(ALL, 0.0)])
def test_nothing_is_changed_where_nothing_is_asked_for(augment: Augmentation) -> None:
    x = images()
    assert augment(x, draws()) is x


def test_draws_in_the_middle_change_no_colour() -> None:
    x = images()
    assert torch.allclose(color(x, torch.full((6, 3), 0.5, dtype=torch.float64)), x, rtol=0, atol=1e-15)
    assert torch.equal(translation(x, torch.full((6, 2), 0.5, dtype=torch.float64)), x)


def test_grey_images_have_no_saturation() -> None:
    x, u = images(channels=1), draws()
    other = u.clone()
    other[:, 1] = 1 - other[:, 1]
    assert torch.allclose(color(x, u[:, :3]), color(x, other[:, :3]), rtol=0, atol=1e-15)


def test_ends_of_the_draws_stay_in_the_image() -> None:
    x = images(2, 1, 8, 8)
    ends = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    moved = translation(x, ends)
    assert torch.equal(moved[0, :, :7, :7], x[0, :, 1:, 1:])
    assert torch.equal(moved[1, :, 1:, 1:], x[1, :, :7, :7])
    assert torch.equal(moved[0, :, 7], torch.full((1, 8), 0.5, dtype=torch.float64))
    cut = cutout(x, ends)
    assert (cut[0, :, :2, :2] == 0.5).all()
    assert (cut[1, :, 6:, 6:] == 0.5).all()
    assert (cut != x).sum() == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_type_of_the_images_stays(dtype: torch.dtype) -> None:
    assert Augmentation()(images().to(dtype), draws().float()).dtype == dtype


# --- statistics


N = 20_000


def test_draws_are_uniform_and_each_image_has_its_own() -> None:
    u = Augmentation.draw(N, torch.Generator().manual_seed(0))
    assert u.shape == (N, DRAWS)
    assert ((u >= 0) & (u < 1)).all()
    assert (u.mean(dim=0) - 0.5).abs().max() < 4 / math.sqrt(12 * N)
    correlation = torch.corrcoef(u.T) - torch.eye(DRAWS)
    assert correlation.abs().max() < 5 / math.sqrt(N)
    assert torch.equal(Augmentation.draw(5, torch.Generator().manual_seed(0)), u[:5])
    assert torch.equal(Augmentation.draw(3, torch.Generator().manual_seed(0), kinds=2).flatten(0, 1), u[:6])


def test_brightness_and_contrast_have_their_spread() -> None:
    x = torch.zeros(N, 1, 2, 2, dtype=torch.float64)
    x[:, :, 0] = 1.0
    found = color(x, draws(N)[:, :3])
    shift, contrast = found.mean(dim=(1, 2, 3)) - 0.5, found.amax(dim=(1, 2, 3)) - found.amin(dim=(1, 2, 3))
    for values, half in ((shift, 0.25), (contrast - 1, 0.5)):  # uniform in [-half, half]
        assert values.abs().max() <= half + 1e-12
        assert abs(values.mean()) < 4 * half / math.sqrt(3 * N)
        assert values.std() == pytest.approx(half / math.sqrt(3), rel=0.02)


def test_every_shift_is_as_likely() -> None:
    x = torch.zeros(N, 1, 16, 24, dtype=torch.float64)
    x[:, :, 8, 12] = 1.0
    place = translation(x, draws(N)[:, 3:5]).flatten(1).argmax(dim=1)
    counts = torch.bincount(place, minlength=16 * 24).view(16, 24)
    assert (counts > 0).nonzero().amin(dim=0).tolist() == [6, 9]
    assert (counts > 0).nonzero().amax(dim=0).tolist() == [10, 15]
    inner, expected = counts[6:11, 9:16].double(), N / 35
    assert ((inner - expected) ** 2 / expected).sum() < 70  # chi^2 with 34 degrees of freedom: p < 0.0003


def test_the_cut_s_centre_is_anywhere() -> None:
    cut = cutout(torch.zeros(N, 1, 8, 8, dtype=torch.float64), draws(N)[:, 5:7]) == 0.5
    # 9 places, a row r in a cut of 4 rows for the centres r - 1 ... r + 2.
    rows = torch.tensor([sum(0 <= c <= 8 for c in range(r - 1, r + 3)) / 9 for r in range(8)])
    expected = rows[:, None] * rows
    assert (cut.double().mean(dim=(0, 1)) - expected).abs().max() < 4 * 0.5 / math.sqrt(N)


@pytest.mark.parametrize("probability", [0.3, 0.8])
def test_the_share_of_changed_images(probability: float) -> None:
    x = images(1, 1, 4, 4).expand(N, -1, -1, -1)
    same = (Augmentation("color", probability)(x, draws(N)) == x).flatten(1).all(dim=1)
    assert same.double().mean() == pytest.approx(1 - probability, abs=4 * 0.5 / math.sqrt(N))


# --- names and errors


def test_policies_by_name() -> None:
    assert list_policies() == ["color", "translation", "cutout"]
    assert Augmentation(" color, cutout ").names == ("color", "cutout")
    assert Augmentation("color") == Augmentation("color", 0.8)
    with pytest.raises(ConfigError, match="unknown augmentation 'blur': choose one of color, translation, cutout"):
        Augmentation("color,blur")
    for probability in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="probability"):
            Augmentation("color", probability)


def test_vectors_and_wrong_draws_are_refused() -> None:
    with pytest.raises(DataError, match=r"images \[N, C, H, W\]"):
        Augmentation()(torch.rand(4, 2), draws(4))
    for wrong in (draws(5), draws(4)[:, :7]):
        with pytest.raises(DataError, match="need draws"):
            Augmentation()(images(4), wrong)
