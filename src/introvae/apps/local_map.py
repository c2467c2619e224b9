"""A heat map that knows what is usual at each place: it finds what is too plain as well as what is too strange."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from introvae.apps.heatmaps import SMOOTH, smoothed
from introvae.apps.scores import evaluating, parts
from introvae.errors import DataError, not_negative
from introvae.measures.entries import at_once
from introvae.model import IntrospectiveVAE
from introvae.precision import wide

SCALES = (64, 21)
"""The neighbourhoods are Gaussians with standard deviations of the image's shorter side over these."""
FLOOR = 1 / 255**2 / 12
"""The energy of rounding to 8 bits, added before the logarithm: nothing below it means anything."""
RIDGE = 1e-3
"""Share of each feature's variance over all places that is added to its variance at one place."""
FINEST = 256
"""A larger image's shorter side has so many places (to twice as many): the smallest neighbourhood is wider than one."""
SMOOTHED = 3 * SMOOTH / 2
"""The default smoothing is a Gaussian with a standard deviation of the shorter side over this."""


class LocalMap:
    """How unusual for its place is what lies around each pixel, in standard deviations of normal images.

    With y = D(E(x)), and means over Gaussian neighbourhoods of two sizes, each pixel has as features the mean of x - y
    in each channel, the logarithm of the mean of (x - y)^2, and that of the mean of (x - its mean)^2, the image's own
    detail. The heat is their Mahalanobis distance from those of normal images at the same place. A residual alone
    (`heatmaps.residual_map`) misses what the model draws well, such as a plain patch or one out of focus, and is high
    at every sharp edge, where a normal image's is, too.

    A place is a pixel; in images of 512 pixels and more it is a square of pixels, such that at least 256 lie along a
    side. For each place 16 F^2 bytes are kept with F = 2 (C + 2) features: 105 MB for colour images of 256 or 1024
    pixels.

    Arguments:
        model: a trained one of images; it works in evaluation mode and is left as it was.

    Raises:
        DataError: the model is not one of images of a known shape.

    Source: the Gaussian of normal features at each place is that of PaDiM (Defard et al. 2021); its features are of a
    network for classification, these are our own.

    Example:
        >>> model = IntrospectiveVAE.build(shape=(1, 16, 16), network="mlp", latent_dim=4)
        >>> heat = LocalMap(model)
        >>> heat.update(torch.rand(50, 1, 16, 16))
        >>> heat(torch.rand(5, 1, 16, 16)).shape
        torch.Size([5, 16, 16])
    """

    def __init__(self, model: IntrospectiveVAE) -> None:
        if model.shape is None or len(model.shape) != 3:
            raise DataError(f"data of shape {model.shape} have no heat map: give a model of images")
        self.model, (_, height, width) = model, model.shape
        square = max(1, min(height, width) // FINEST)
        self.places = (height // square, width // square)
        self.count = 0
        self._shift: Tensor | None = None  # the first batch's mean: sums of small numbers lose nothing
        self._known: tuple[Tensor, Tensor] | None = None

    def update(self, x: Tensor, condition: Tensor | int | str | None = None) -> None:
        """See more normal images.

        Arguments:
            x: `[N, C, H, W]` in [0, 1], prepared as the training data were.
            condition: their classes, where the model has classes.

        Raises:
            DataError: x has another shape than the model takes.
        """
        for features in self._features(x, condition):
            if self._shift is None:
                self._shift = features.mean(dim=0)
                self._sum = torch.zeros_like(self._shift)
                self._products = self._shift.new_zeros(*self._shift.shape, features.shape[-1])
            off = features - self._shift
            self._sum += off.sum(dim=0)
            self._products += torch.einsum("nhwi,nhwj->hwij", off, off)
            self.count += len(features)
        self._known = None

    def __call__(
        self, x: Tensor, *, smooth: float | None = None, condition: Tensor | int | str | None = None
    ) -> Tensor:
        """The heat of images, `[N, H, W]` on the CPU, smoothed; an image alone has the heat that it has in a batch.

        Arguments:
            x, condition: as in `update`.
            smooth: standard deviation of the Gaussian, in pixels; 0 for none, by default a 24th of the shorter side.

        Raises:
            DataError: fewer than two normal images were seen, or x has another shape than the model takes.
            ConfigError: smooth is negative.
        """
        smooth = min(x.shape[2:]) / SMOOTHED if smooth is None else smooth
        not_negative(smooth=smooth)
        mean, root = self._law()
        heat = []
        for features in self._features(x, condition):
            off = torch.einsum("hwij,nhwj->nhwi", root, features - mean)
            heat.append(smoothed(_resized(off.square().sum(dim=-1).sqrt().float(), x.shape[2:]), smooth))
        return torch.cat(heat)

    def _law(self) -> tuple[Tensor, Tensor]:
        """Mean `[H, W, F]` of normal features, and for each place a root `[F, F]` of the inverse covariance."""
        if self._known is None:
            if self.count < 2 or self._shift is None:
                raise DataError(f"{self.count} normal images tell nothing of what is usual: give at least two")
            off = self._sum / self.count
            mean, root = self._shift + off, torch.empty_like(self._products)
            variance = self._products.diagonal(dim1=-2, dim2=-1) / self.count - off.square()
            everywhere = variance.mean(dim=(0, 1)) + mean.flatten(0, 1).var(dim=0)
            ridge = torch.diag(RIDGE * everywhere + torch.finfo(torch.float32).tiny)
            for row in range(len(root)):  # one at a time: a large image's places fill gigabytes
                covariance = self._products[row] / self.count - off[row, :, :, None] * off[row, :, None, :] + ridge
                lower = torch.linalg.cholesky(covariance)
                eye = torch.eye(lower.shape[-1], dtype=lower.dtype).expand_as(lower)
                root[row] = torch.linalg.solve_triangular(lower, eye, upper=False)
            self._known = mean, root
        return self._known

    def _features(self, x: Tensor, condition: Tensor | int | str | None) -> Iterator[Tensor]:
        """Features `[n, H, W, F]`, float64, on the CPU, of some images at a time."""
        if x.ndim != 4 or not len(x):
            raise DataError(f"data of shape {tuple(x.shape)} have no heat map: give images [N, C, H, W]")
        with evaluating(self.model):
            for part, of in parts(self.model, x, condition, at_once(tuple(x.shape[1:]))):
                y = wide(self.model.reconstruct(part, of)).cpu()
                features = local_features(wide(part).cpu(), y).permute(0, 3, 1, 2)
                yield functional.adaptive_avg_pool2d(features, self.places).permute(0, 2, 3, 1).double()


def _resized(heat: Tensor, size: tuple[int, ...]) -> Tensor:
    """Heat `[N, h, w]` at `[N, *size]`, linear in between; of that size already, it is what it is."""
    if tuple(heat.shape[1:]) == tuple(size):
        return heat
    return functional.interpolate(heat[:, None], size=tuple(size), mode="bilinear")[:, 0]


def local_features(x: Tensor, y: Tensor) -> Tensor:
    """The features of `LocalMap` of images x and their reconstructions y, both `[N, C, H, W]`: `[N, H, W, F]`, for each
    scale first the C mean residuals, then the logarithms of the residual's and of the detail's energy.

    Example:
        >>> local_features(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)).shape
        torch.Size([2, 16, 16, 10])
    """
    columns = []
    for sigma in (min(x.shape[2:]) / scale for scale in SCALES):

        def mean(images: Tensor, sigma: float = sigma) -> Tensor:
            return smoothed(images.flatten(0, 1), sigma).unflatten(0, images.shape[:2])

        off, detail = x - y, x - mean(x)
        energies = [(mean(part.square()).mean(dim=1, keepdim=True) + FLOOR).log() for part in (off, detail)]
        columns += [mean(off), *energies]
    return torch.cat(columns, dim=1).permute(0, 2, 3, 1)
