"""Feature spaces for Fréchet distances that need no download."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

THUMB = 8
"""Side to which `thumb` brings images, in pixels."""
WIDTHS = (32, 64, 96)
"""Channels of the layers of `randconv`."""


def values(x: Tensor) -> Tensor:
    """Vectors `[N, D]` as they are."""
    return x.flatten(1)


def thumb(x: Tensor) -> Tensor:
    """Images `[N, C, H, W]` averaged to 8 x 8 pixels, `[N, 64 C]`: layout, light and colour, no detail.

    Example:
        >>> thumb(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 192])
    """
    return F.adaptive_avg_pool2d(x.float(), (min(THUMB, x.shape[2]), min(THUMB, x.shape[3]))).flatten(1)


@torch.no_grad()
def randconv(x: Tensor) -> Tensor:
    """Mean and deviation over space of each channel of an untrained convolutional network, `[N, 384]`.

    Three layers of 4x4 convolutions with stride 2 and LeakyReLU; the weights are draws of numpy's RandomState(0), whose
    stream is promised to stay, with unit gain. Grey images count as three equal channels. It sees edges, texture and
    blur up to 22 pixels wide, not meaning: untrained features rank sets of one kind of image, no more.

    Source: for untrained features as a space to compare in, Naeem et al. 2020, Sec. 4.

    Example:
        >>> randconv(torch.rand(2, 1, 32, 32)).shape
        torch.Size([2, 384])
    """
    h = x.float().expand(-1, 3, -1, -1) * 2 - 1
    found = []
    for weight in _weights():
        h = F.leaky_relu(F.conv2d(F.pad(h, (1, 1, 1, 1), mode="replicate"), weight.to(h.device), stride=2), 0.2)
        found += [h.mean(dim=(2, 3)), h.flatten(2).std(dim=2, correction=0)]
    return torch.cat(found, dim=1)


def _weights() -> list[Tensor]:
    generator = np.random.RandomState(0)
    weights, inputs = [], 3
    for outputs in WIDTHS:
        draw = generator.standard_normal((outputs, inputs, 4, 4)) * (2 / (inputs * 16)) ** 0.5
        weights.append(torch.from_numpy(draw.astype(np.float32)))
        inputs = outputs
    return weights


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {"thumb": thumb, "randconv": randconv}
"""Feature spaces of images by the name that a metric ends in."""
