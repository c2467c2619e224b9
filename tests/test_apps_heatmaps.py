"""Heat maps against plain transcriptions; a pasted square is where the map is high."""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from introvae import IntrospectiveVAE
from introvae.apps import heatmaps
from introvae.apps.heatmaps import MAPS, combined_map, latent_map, overlay, residual_map, smoothed
from introvae.data.digits import load_digits
from introvae.errors import ConfigError, DataError

SHAPES = {"tiny-conv": (1, 8, 8), "conv": (3, 16, 16)}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def built(network: str, classes: int | None = None) -> IntrospectiveVAE:
    torch.manual_seed(0)
    options: dict[str, Any] = {"channels": [4, 8]} if network == "conv" else {}
    return IntrospectiveVAE.build(SHAPES[network], network, latent_dim=3, classes=classes, **options).eval()


def smooth_network() -> IntrospectiveVAE:
    """Twice differentiable, in float64, on 3 x 4 images of two channels."""
    torch.manual_seed(0)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(24, 9), nn.Tanh(), nn.Linear(9, 6))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            mean, logvar = self.layers(x).chunk(2, dim=1)
            return mean, logvar

    decoder = nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 24), nn.Unflatten(1, (2, 3, 4)))
    return IntrospectiveVAE(Encoder(), decoder, latent_dim=3).double()


# --- formulas


def test_maps_equal_their_formulas_in_numpy():
    model, x = smooth_network(), draw(5, 2, 3, 4).double()
    residual, latent, both = (function(model, x, smooth=0) for function in (residual_map, latent_map, combined_map))
    for i in range(5):

        def mean(image: Tensor) -> np.ndarray:
            with torch.no_grad():
                return model.encode(image[None]).mean[0].numpy()

        with torch.no_grad():
            posterior = model.encode(x[i : i + 1])
            y = model.decode(posterior.mean)[0]
        expected = np.abs(x[i].numpy() - y.numpy()).mean(axis=0)
        np.testing.assert_allclose(residual[i], expected, rtol=1e-12)
        d = (mean(x[i]) - mean(y)) / np.exp(0.5 * posterior.logvar[0].numpy())
        jacobian, step = np.zeros((3, 2, 3, 4)), 1e-6
        for place in np.ndindex(2, 3, 4):
            up, down = x[i].clone(), x[i].clone()
            up[place] += step
            down[place] -= step
            jacobian[(slice(None), *place)] = (mean(up) - mean(down)) / (2 * step)
        weighted = np.abs(np.einsum("k,kchw->chw", d, jacobian)).mean(axis=0)
        np.testing.assert_allclose(latent[i], weighted, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(both[i], np.sqrt(expected * weighted), rtol=1e-6, atol=1e-9)


def test_scales_multiply_the_combined_map():
    model, x = smooth_network(), draw(2, 2, 3, 4).double()
    plain, scaled = combined_map(model, x), combined_map(model, x, scales=(0.5, 8.0))
    torch.testing.assert_close(scaled, plain / 2)
    torch.testing.assert_close(plain, (residual_map(model, x) * latent_map(model, x)).sqrt())


def test_smoothing_is_a_gaussian_s():
    heat = draw(2, 30, 40).double()
    inside = slice(10, -10)
    for image, found in zip(heat, smoothed(heat, 1.5), strict=True):
        expected = gaussian_filter(image.numpy(), 1.5, truncate=6)
        np.testing.assert_allclose(found[inside, inside], expected[inside, inside], rtol=1e-6)
    torch.testing.assert_close(smoothed(torch.ones(1, 5, 7), 3.0), torch.ones(1, 5, 7))
    assert smoothed(heat, 0) is heat
    model, x = built("conv"), draw(2, 3, 16, 16)
    for function in (residual_map, latent_map):
        torch.testing.assert_close(function(model, x), smoothed(function(model, x, smooth=0), 1.0))
        assert not torch.equal(function(model, x, smooth=0), function(model, x))


# --- the law


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("network", list(SHAPES))
@pytest.mark.parametrize("name", list(MAPS))
def test_one_image_has_the_same_map_alone_as_in_a_batch(name: str, network: str, classes: int | None, monkeypatch):
    model, x = built(network, classes), draw(7, *SHAPES[network])
    condition = None if classes is None else torch.arange(7) % classes
    batch = MAPS[name](model, x, condition=condition)
    assert batch.shape == (7, *SHAPES[network][1:])
    assert batch.min() >= 0
    scale = batch.amax().item()
    for row in range(7):
        known = None if condition is None else condition[row : row + 1]
        alone = MAPS[name](model, x[row : row + 1], condition=known)
        torch.testing.assert_close(alone[0], batch[row], rtol=1e-5, atol=1e-5 * scale)
    monkeypatch.setattr(heatmaps, "at_once", lambda shape: 16)  # two at a time with a gradient
    torch.testing.assert_close(MAPS[name](model, x, condition=condition), batch, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("name", list(MAPS))
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_model_and_the_images_are_left_as_they_were(name: str, context):
    model, x = built("tiny-conv").train(), draw(3, 1, 8, 8)
    frozen = list(model.encoder.parameters())[::2]
    for parameter in frozen:
        parameter.requires_grad_(False)
    kept = next(model.decoder.parameters())
    kept.grad = torch.full_like(kept, 7)
    before = [parameter.requires_grad for parameter in model.parameters()]
    with context():
        found = MAPS[name](model, x)
    assert not found.requires_grad
    assert torch.isfinite(found).all()
    assert not x.requires_grad
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert all(parameter.grad is None for parameter in model.parameters() if parameter is not kept)
    assert torch.equal(kept.grad, torch.full_like(kept, 7))
    torch.testing.assert_close(found, MAPS[name](model.eval().requires_grad_(False), x))


# --- where it is


@lru_cache
def trained() -> IntrospectiveVAE:
    """A VAE of the digits after 300 steps."""
    torch.manual_seed(0)
    x = load_digits().train.tensor()
    model = IntrospectiveVAE.build(shape=(1, 8, 8), network="mlp", latent_dim=8, hidden=64, depth=2)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(300):
        batch = x[torch.randint(len(x), (64,))]
        loss = -model.elbo(batch, beta_kl=0.1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def pasted(x: Tensor, side: int = 3) -> tuple[Tensor, Tensor]:
    """Images with a square of the colour that is not around it, and where it is, `[N, H, W]`."""
    generator = torch.Generator().manual_seed(0)
    y, mask = x.clone(), torch.zeros(len(x), *x.shape[2:], dtype=torch.bool)
    for i in range(len(x)):
        top, left = torch.randint(0, x.shape[2] - side + 1, (2,), generator=generator).tolist()
        square = (slice(top, top + side), slice(left, left + side))
        y[i][(slice(None), *square)] = 1 - x[i][(slice(None), *square)].mean().round()
        mask[i][square] = True
    return y, mask


@pytest.mark.parametrize(("name", "least"), [("residual", 0.85), ("combined", 0.75)])
def test_maps_are_higher_inside_a_pasted_square(name: str, least: float):
    x, mask = pasted(load_digits().heldout.tensor()[:150])
    heat = MAPS[name](trained(), x)
    inside, outside = ((heat * part).sum(dim=(1, 2)) / part.sum(dim=(1, 2)) for part in (mask, ~mask))
    assert (inside > outside).double().mean() > 0.9
    assert roc_auc_score(mask.flatten(), heat.flatten()) > least


def test_the_latent_map_is_hot_where_a_pixel_moves_an_inconsistent_latent():
    """Each latent sees a quadrant; one of them cannot be drawn, so it is lost when an image is encoded again."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            mean = nn.functional.avg_pool2d(x, 4).flatten(1) * self.gain
            return mean, torch.full_like(mean, -2.0)

    class Decoder(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            drawn = z * torch.tensor([1.0, 1.0, 0.0, 1.0])
            return drawn.reshape(-1, 1, 2, 2).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)

    model = IntrospectiveVAE(Encoder(), Decoder(), latent_dim=4)
    x = 0.2 + 0.8 * draw(3, 1, 8, 8)
    heat = latent_map(model, x, smooth=0)
    # d = (m - 0) / s in the lower left, 0 elsewhere, and each of its 16 pixels moves m by 1/16.
    expected = x[:, 0, 4:, :4].mean(dim=(1, 2)) * math.e / 16
    torch.testing.assert_close(heat[:, 4:, :4], expected[:, None, None].expand(-1, 4, 4))
    heat[:, 4:, :4] = 0
    assert heat.abs().max() < 1e-6


# --- the overlay


@pytest.mark.parametrize("channels", [1, 3])
def test_an_overlay_goes_from_grey_to_the_last_colour(channels: int):
    x = draw(2, channels, 6, 5)
    heat = torch.zeros(2, 6, 5)
    heat[0, 1, 2], heat[1, 3, 3], heat[1, 0, 0] = 2.0, 50.0, 1.0
    found = overlay(x, heat, top=2.0, opacity=0.75)
    assert found.shape == (2, 3, 6, 5)
    assert found.min() >= 0
    assert found.max() <= 1
    grey = x[:, 0] if channels == 1 else 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]
    torch.testing.assert_close(
        found[heat[:, None].expand(-1, 3, -1, -1) == 0],
        grey[:, None].expand(-1, 3, -1, -1)[heat[:, None].expand(-1, 3, -1, -1) == 0],
    )
    last, half = (torch.tensor(colormaps["plasma"](share)[:3]).float() for share in (1.0, 0.5))
    torch.testing.assert_close(found[0, :, 1, 2], 0.25 * grey[0, 1, 2] + 0.75 * last)
    torch.testing.assert_close(found[1, :, 3, 3], 0.25 * grey[1, 3, 3] + 0.75 * last)  # no more than the last colour
    torch.testing.assert_close(found[1, :, 0, 0], 0.625 * grey[1, 0, 0] + 0.375 * half)


def test_an_overlay_of_one_image_does_not_depend_on_others():
    x, heat = draw(4, 1, 6, 6), draw(4, 6, 6, seed=1)
    heat[3] *= 100
    assert torch.equal(overlay(x, heat, 1.0)[:1], overlay(x[:1], heat[:1], 1.0))


# --- bad input


@pytest.mark.parametrize("function", MAPS.values())
def test_what_has_no_map_is_refused(function):
    vectors = IntrospectiveVAE.build(shape=(5,), latent_dim=2)
    with pytest.raises(DataError, match=r"shape \(3, 5\) have no heat map: give images"):
        function(vectors, draw(3, 5))
    with pytest.raises(DataError, match=r"takes data of shape \(1, 8, 8\), not \(3, 8, 8\)"):
        function(built("tiny-conv"), draw(2, 3, 8, 8))
    with pytest.raises(ConfigError, match="smooth is -1: it must be a number and not be negative"):
        function(built("tiny-conv"), draw(2, 1, 8, 8), smooth=-1)
    with pytest.raises(ConfigError, match="the model knows 3 classes: give the condition"):
        function(built("tiny-conv", 3), draw(2, 1, 8, 8))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (partial(overlay, draw(2, 2, 4, 4), draw(2, 4, 4), 1.0), DataError, "give .* with 1 or 3 channels"),
        (
            partial(overlay, draw(2, 1, 4, 4), draw(2, 4, 5), 1.0),
            DataError,
            r"maps have shape \(2, 4, 5\), .*give a map",
        ),
        (
            partial(overlay, draw(2, 1, 4, 4), draw(2, 4, 4), 0.0),
            ConfigError,
            "top is 0.0: it must be a number above 0",
        ),
        (
            partial(overlay, draw(2, 1, 4, 4), draw(2, 4, 4), 1.0, opacity=1.5),
            ConfigError,
            "opacity is 1.5: give a share",
        ),
        (
            partial(
                combined_map, IntrospectiveVAE(nn.Identity(), nn.Identity(), 2), draw(2, 1, 4, 4), scales=(0.0, 1.0)
            ),
            ConfigError,
            r"scales\[0\] is 0.0",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(call, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call()
