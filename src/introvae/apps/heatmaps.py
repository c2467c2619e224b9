"""Heat maps: where in an image is what does not belong to what a model was trained on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from introvae.apps.scores import evaluating, parts
from introvae.errors import ConfigError, DataError, not_negative, positive
from introvae.measures.entries import at_once
from introvae.model import IntrospectiveVAE
from introvae.precision import wide

GRADIENT = 8
"""Where activations are kept for a gradient, so many times fewer images are taken at a time."""
SMOOTH = 16
"""The default smoothing is a Gaussian with a standard deviation of the image's shorter side over this."""
COLOURS = "plasma"
"""A perceptually uniform colour map of matplotlib with neither black nor white, which grey images have."""
LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in an image's light (ITU-R BT.601)."""


def residual_map(
    model: IntrospectiveVAE, x: Tensor, *, smooth: float | None = None, condition: Tensor | int | str | None = None
) -> Tensor:
    """|x - D(E(x))|, mean over channels, smoothed: what the model cannot draw. `[N, H, W]` on the CPU, in pixel values.

    Arguments:
        model: a trained one; it works in evaluation mode and is left as it was.
        x: images `[N, C, H, W]` in [0, 1], on any device.
        smooth: standard deviation of the Gaussian, in pixels; 0 for none, by default a 16th of the shorter side.
        condition: classes of x, where the model has classes.

    Raises:
        DataError: x are no images, or have another shape than the model takes.
        ConfigError: smooth is negative.

    Example:
        >>> model = IntrospectiveVAE.build(shape=(1, 8, 8), network="mlp", latent_dim=4)
        >>> residual_map(model, torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 8, 8])
    """
    return _mapped(model, x, smooth, condition, _residual, 1)[0]


def latent_map(
    model: IntrospectiveVAE, x: Tensor, *, smooth: float | None = None, condition: Tensor | int | str | None = None
) -> Tensor:
    """Which pixels the latent's inconsistency comes from, `[N, H, W]` on the CPU.

    What belongs keeps its latent when it is reconstructed and encoded again. With m(x) and s(x) the posterior's mean
    and standard deviation and y = D(m(x)), the inconsistency is d = (m(x) - m(y)) / s(x), without unit. The map at
    pixel p is

        mean over channels c of | sum_k d_k * dm_k(x) / dx_cp |,

    smoothed, with d held fixed: a dimension of the latent counts by how far it is off, in units of s, and by how much
    the pixel can move it, in units of the prior's deviation. It has the unit 1 / pixel value.

    Arguments:
        model, x, smooth, condition: as in `residual_map`. Weights get no gradients.

    Raises:
        DataError, ConfigError: as in `residual_map`.

    Source: for |E(x) - E(D(E(x)))| as a sign of anomalies, Bercea et al. 2023, Reversing the Abnormal; that it
        is carried back to pixels by the encoder's Jacobian is our own.

    Example:
        >>> model = IntrospectiveVAE.build(shape=(1, 8, 8), network="mlp", latent_dim=4)
        >>> latent_map(model, torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 8, 8])
    """
    return _mapped(model, x, smooth, condition, _both, GRADIENT)[1]


def combined_map(
    model: IntrospectiveVAE,
    x: Tensor,
    *,
    smooth: float | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
    condition: Tensor | int | str | None = None,
) -> Tensor:
    """The geometric mean of `residual_map` and `latent_map`, each smoothed and in units of its scale, `[N, H, W]`.

    It is high where the model cannot draw the image and that moves the latent. The scales are the same for all images:
    scaled by its own maximum, each image would have a hottest pixel, the normal ones too. They only multiply the map,
    so that they change no order of pixels, and no threshold that was found with them.

    Arguments:
        model, x, smooth, condition: as in `residual_map`.
        scales: of the residual and the latent map, such as their means over normal images, in whose units 1 is then
            usual.

    Raises:
        DataError, ConfigError: as in `residual_map`; a scale that is not above 0.

    Example:
        >>> model = IntrospectiveVAE.build(shape=(1, 8, 8), network="mlp", latent_dim=4)
        >>> combined_map(model, torch.rand(5, 1, 8, 8), scales=(0.1, 2.0)).shape
        torch.Size([5, 8, 8])
    """
    positive(**{"scales[0]": scales[0], "scales[1]": scales[1]})
    residual, latent = _mapped(model, x, smooth, condition, _both, GRADIENT)
    return (residual / scales[0]).sqrt() * (latent / scales[1]).sqrt()


MAPS: dict[str, Callable[..., Tensor]] = {"residual": residual_map, "latent": latent_map, "combined": combined_map}
"""The maps by name."""
OF_POSTERIOR = ("latent", "combined")
"""Those that mean nothing where the encoder's log-variance is untrained (`Objective.encodes`)."""


def _residual(model: IntrospectiveVAE, x: Tensor, condition: Tensor | int | str | None) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return ((wide(x) - wide(model.reconstruct(x, condition))).abs().mean(dim=1),)


def _both(model: IntrospectiveVAE, x: Tensor, condition: Tensor | int | str | None) -> tuple[Tensor, ...]:
    """Residual and latent map, from one reconstruction."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        posterior = model.encode(x, condition)
        with torch.no_grad():
            y = model.decode(posterior.mode, condition)
            off = (posterior.mean - model.encode(y, condition).mean) / posterior.variance.sqrt()
        # Of the images alone: the weights' gradients stay what they are, and so does what is frozen.
        (slope,) = torch.autograd.grad((off * posterior.mean).sum(), x)
    return (wide(x).detach() - wide(y)).abs().mean(dim=1), wide(slope).abs().mean(dim=1)


def _mapped(
    model: IntrospectiveVAE,
    x: Tensor,
    smooth: float | None,
    condition: Tensor | int | str | None,
    function: Callable[[IntrospectiveVAE, Tensor, Tensor | int | str | None], tuple[Tensor, ...]],
    fewer: int,
) -> list[Tensor]:
    """A function's maps of all images, so many times fewer at a time, smoothed, on the CPU."""
    if x.ndim != 4 or not len(x):
        raise DataError(f"data of shape {tuple(x.shape)} have no heat map: give images [N, C, H, W]")
    smooth = min(x.shape[2:]) / SMOOTH if smooth is None else smooth
    not_negative(smooth=smooth)
    size = max(1, at_once(tuple(x.shape[1:])) // fewer)
    with evaluating(model):
        found = [
            [smoothed(heat, smooth).cpu() for heat in function(model, part, classes)]
            for part, classes in parts(model, x, condition, size)
        ]
    return [torch.cat(maps) for maps in zip(*found, strict=True)]


def smoothed(heat: Tensor, sigma: float) -> Tensor:
    """Maps `[N, H, W]`, each pixel the mean of its neighbours weighted by a Gaussian of `sigma` pixels; 0 for as it is.

    At the border the weights of the pixels that are there sum to 1.

    Raises:
        ConfigError: sigma is negative.

    Example:
        >>> smoothed(torch.ones(1, 4, 4), 2.0).allclose(torch.ones(1, 4, 4))
        True
    """
    not_negative(sigma=sigma)
    if sigma == 0:
        return heat
    rows, columns = (_weights(side, sigma).to(heat) for side in heat.shape[1:])
    return rows @ heat @ columns.T


def _weights(side: int, sigma: float) -> Tensor:
    """Weight of pixel j in the mean around pixel i, `[side, side]`."""
    place = torch.arange(side, dtype=torch.float64)
    return ((place - place[:, None]).square() / (-2 * sigma**2)).softmax(dim=1)


def overlay(x: Tensor, heat: Tensor, top: float, *, opacity: float = 0.75) -> Tensor:
    """Images in grey with the heat map in colours over them, `[N, 3, H, W]` in [0, 1], on the CPU.

    The hotter, the less transparent, from nothing at 0 to `opacity` from `top` on. Only heat has a colour, and with the
    same `top` a colour means the same heat in all images.

    Arguments:
        x: images `[N, C, H, W]` in [0, 1], with one or three channels.
        heat: `[N, H, W]`, not below 0.
        top: the heat that has the last colour, such as a high quantile of normal images' maps or of all maps.
        opacity: share of the colour there, in (0, 1].

    Raises:
        ConfigError: top or opacity out of range.
        DataError: the images have another number of channels, or the maps another shape.

    Example:
        >>> overlay(torch.rand(2, 1, 8, 8), torch.rand(2, 8, 8), top=1.0).shape
        torch.Size([2, 3, 8, 8])
    """
    from matplotlib import colormaps

    positive(top=top, opacity=opacity)
    if opacity > 1:
        raise ConfigError(f"opacity is {opacity}: give a share of at most 1")
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise DataError(f"data of shape {tuple(x.shape)} are no images: give [N, C, H, W] with 1 or 3 channels")
    if heat.shape != (len(x), *x.shape[2:]):
        raise DataError(f"the maps have shape {tuple(heat.shape)}, the images {tuple(x.shape)}: give a map of each")
    x = x.detach().cpu().float().clamp(0, 1)
    grey = x if x.shape[1] == 1 else torch.einsum("nchw,c->nhw", x, torch.tensor(LUMA))[:, None]
    share = (heat.detach().cpu().float() / top).clamp(0, 1)
    colours = torch.from_numpy(colormaps[COLOURS](share.numpy())[..., :3]).float().permute(0, 3, 1, 2)
    return torch.lerp(grey.expand(-1, 3, -1, -1), colours, opacity * share[:, None])
