"""How close reconstructions are to their images: MSE, PSNR, SSIM, one value for each image."""

from __future__ import annotations

import torch
from torch import Tensor

from introvae.errors import DataError

MIN_MSE = 1e-10
"""A perfect reconstruction counts as this mean squared error: 100 dB."""


def mse(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of each image over pixels and channels, `[N]`; values in [0, 1].

    Raises:
        DataError: the shapes differ, or a value is not finite.

    Example:
        >>> mse(torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 0.5))
        tensor([0.2500, 0.2500])
    """
    _same_shape(x, y)
    return (x - y).square().flatten(1).mean(dim=1)


def psnr_db(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, `[N]`, in dB, for values in [0, 1]: at most 100.

    Raises:
        DataError: the shapes differ, or a value is not finite.

    Example:
        >>> psnr_db(torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 0.1))
        tensor([20.])
    """
    return -10 * mse(x, y).clamp(min=MIN_MSE).log10()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of each image `[N, C, H, W]`, `[N]`, at most 1.

    The Gaussian window has the usual sigma of 1.5 (11 pixels wide); images under 16 pixels get `ssim_sigma`'s. The mean
    is over all pixels, with a mirrored border (the original leaves the border out; small images would vanish).

    Source: Wang et al. 2004, as computed by torchmetrics.

    Raises:
        DataError: the shapes differ.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _same_shape(x, y)
    values = structural_similarity_index_measure(
        x.float(), y.float(), sigma=ssim_sigma(min(x.shape[2:])), reduction="none", data_range=1.0
    )
    assert isinstance(values, Tensor)
    return values


def ssim_sigma(side: int) -> float:
    """Width of SSIM's Gaussian window in pixels: 1.5, or 0.5 where the image is too small for that."""
    return 1.5 if side >= 16 else 0.5


def _same_shape(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape:
        raise DataError(f"images of shape {tuple(x.shape)} cannot be compared with {tuple(y.shape)}")
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise DataError("the images hold NaN or infinite values: the model that made them has diverged")
