"""The heat map that knows what is usual: against a transcription, alone and in batches, and what it finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from introvae import ConfigError, DataError, IntrospectiveVAE
from introvae.apps.heatmaps import residual_map, smoothed
from introvae.apps.local_map import FLOOR, RIDGE, SCALES, LocalMap, local_features
from introvae.metrics.pixel_curve import PixelCurve


def images(n: int, seed: int = 0, channels: int = 1, side: int = 24) -> Tensor:
    """Fine texture on one half and nothing on the other."""
    x = torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed))
    x[..., side // 2 :] = 0.5 + 0.02 * x[..., side // 2 :]
    return x


def build(channels: int = 1, side: int = 24) -> IntrospectiveVAE:
    torch.manual_seed(0)
    return IntrospectiveVAE.build((channels, side, side), "mlp", 4)


def fitted(model: IntrospectiveVAE, normal: Tensor) -> LocalMap:
    found = LocalMap(model)
    for part in normal.split(17):
        found.update(part)
    return found


@pytest.mark.parametrize("channels", [1, 3])
def test_it_is_the_mahalanobis_distance_at_each_place(channels: int) -> None:
    model, normal, x = build(channels), images(60, 1, channels), images(3, 2, channels)
    with torch.no_grad():
        known, asked = (local_features(i, model.eval().reconstruct(i)).double().numpy() for i in (normal, x))
    mean = known.mean(axis=0)
    ridge = RIDGE * known.reshape(-1, known.shape[-1]).var(axis=0)
    heat = np.zeros(asked.shape[:3])
    for row in range(24):
        for column in range(24):
            covariance = np.cov(known[:, row, column].T, bias=True) + np.diag(ridge)
            off = asked[:, row, column] - mean[row, column]
            heat[:, row, column] = np.sqrt(np.einsum("ni,ij,nj->n", off, np.linalg.inv(covariance), off))
    np.testing.assert_allclose(fitted(model, normal)(x, smooth=0).numpy(), heat, rtol=2e-3)


def test_the_features_are_what_they_are_called() -> None:
    x, y = images(2, 3, 3), images(2, 4, 3)
    found = local_features(x, y)
    assert found.shape == (2, 24, 24, 2 * 5)
    for i, scale in enumerate(SCALES):
        sigma = 24 / scale
        for c in range(3):
            assert found[..., 5 * i + c].allclose(smoothed(x[:, c] - y[:, c], sigma), atol=1e-6)
        detail = torch.stack([x[:, c] - smoothed(x[:, c], sigma) for c in range(3)], dim=1)
        for place, part in ((3, x - y), (4, detail)):
            energy = smoothed(part.square().mean(dim=1), sigma)
            assert found[..., 5 * i + place].allclose((energy + FLOOR).log(), atol=1e-4)


def test_an_image_alone_has_the_heat_that_it_has_in_a_batch() -> None:
    model, x = build(), images(5, 2)
    heat = fitted(model, images(40, 1))
    together = heat(x)
    assert together.shape == (5, 24, 24)
    for i in range(5):
        assert heat(x[i : i + 1])[0].allclose(together[i], rtol=1e-4)


def test_how_normal_images_are_divided_changes_nothing() -> None:
    model, normal, x = build(), images(40, 1), images(3, 2)
    whole = LocalMap(model)
    whole.update(normal)
    assert whole.count == 40
    assert fitted(model, normal)(x).allclose(whole(x), rtol=1e-4)


def test_it_finds_a_plain_patch_in_texture_which_the_residual_misses() -> None:
    """A patch of the texture's mean colour: an untrained model's residual is lower there than around it."""
    model, normal, x = build(), images(200, 1), images(20, 2)
    where = torch.zeros(20, 24, 24, dtype=torch.bool)
    where[:, 6:14, 2:10] = True
    x = torch.where(where[:, None], 0.5, x)
    found = {}
    for name, heat in (("local", fitted(model, normal)(x)), ("residual", residual_map(model, x))):
        curve = PixelCurve()
        curve.update(heat, where)
        found[name] = curve.auroc
    assert found["residual"] < 0.6 < 0.95 < found["local"], found


def test_large_images_have_fewer_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares of 2 x 2 pixels: a quarter of the memory, and nearly the same heat at each pixel."""
    model, normal, x = build(), images(200, 1), images(20, 2)
    x[:, :, 6:14, 2:10] = 0.5
    every = fitted(model, normal)
    monkeypatch.setattr("introvae.apps.local_map.FINEST", 12)
    fewer = fitted(model, normal)
    assert (every.places, fewer.places) == ((24, 24), (12, 12))
    assert torch.corrcoef(torch.stack([every(x).flatten(), fewer(x).flatten()]))[0, 1] > 0.97


def test_more_images_after_a_map_are_counted() -> None:
    model, x = build(), images(3, 2)
    heat = fitted(model, images(20, 1))
    before = heat(x)
    heat.update(images(100, 5))
    assert not heat(x).allclose(before)


def test_the_model_is_left_as_it_was() -> None:
    model = build().train()
    fitted(model, images(20, 1))(images(2, 2))
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_what_it_does_not_take() -> None:
    model = build()
    with pytest.raises(DataError, match="at least two"):
        LocalMap(model)(images(2))
    one = LocalMap(model)
    one.update(images(1))
    with pytest.raises(DataError, match="1 normal images"):
        one(images(2))
    with pytest.raises(DataError, match="no heat map"):
        one.update(torch.rand(4, 24))
    with pytest.raises(DataError, match="takes data of shape"):
        one.update(torch.rand(4, 1, 8, 8))
    with pytest.raises(ConfigError, match="smooth"):
        fitted(model, images(20))(images(2), smooth=-1)
    with pytest.raises(DataError, match="give a model of images"):
        LocalMap(IntrospectiveVAE.build((2,), "tiny-mlp", latent_dim=2))


def test_constant_images_have_a_finite_heat() -> None:
    model = build()
    heat = fitted(model, torch.full((20, 1, 24, 24), 0.5))
    assert heat(images(2)).isfinite().all()
    assert heat(torch.full((1, 1, 24, 24), 0.5)).max() < 1e-3
