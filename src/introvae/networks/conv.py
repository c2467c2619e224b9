"""The papers' standard convolutional pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from introvae.errors import ConfigError, not_negative, one_of, positive, unknown, whole
from introvae.networks.blocks import (
    GAIN,
    NORMS,
    ResidualBlock,
    Stages,
    activated,
    make_conv,
    make_linear,
    make_norm,
)
from introvae.precision import unrounded, wide

WIDTHS = (64, 128, 256, 512, 512, 512)
"""Published channels from the largest resolution to the smallest (28 px: the first two, 32 px: three, 256 px: all)."""

LARGE_WIDTHS = (16, 32)
"""Channels of resolutions above those of `WIDTHS`: 512 px starts with 32, 1024 px with 16, as IntroVAE (2018) does."""

AUTO_SIDE = 32
"""`stride="auto"` leaves the blocks at most this many pixels."""


class ConvEncoder(Stages):
    """`x: [N, C, S, S]` to mean and log-variance, each `[N, Z]`: 5x5 conv, then [pool, residual block] per halving."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        latent_dim: int,
        channels: Sequence[int],
        norm: str,
        norm_place: str = "before",
        stride: int = 1,
        coarse: int = 0,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.stem = make_conv(norm, shape[0], channels[0], 5, gain=GAIN, edge=True)
        self.norm = make_norm(norm, channels[0])
        widths = [*channels, channels[-1]]
        self.blocks = nn.ModuleList(ResidualBlock(a, b, norm, norm_place) for a, b in pairwise(widths))
        side = shape[1] // stride >> len(channels)
        self.head = make_linear(norm, channels[-1] * side * side, 2 * latent_dim)
        self.side = coarse
        self.coarse = make_linear(norm, shape[0] * coarse**2, latent_dim) if coarse else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.stage(self._first, x)
        for block in self.blocks:
            h = self.stage(lambda h, block=block: block(F.avg_pool2d(h, 2)), h)
        mean, logvar = unrounded(self.head, h.flatten(1)).chunk(2, dim=1)
        if self.coarse is not None:
            mean = mean + unrounded(self.coarse, F.adaptive_avg_pool2d(x, self.side).flatten(1) - 0.5)
        return mean, logvar

    def _first(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return activated(self.norm, F.avg_pool2d(h, self.stride) if self.stride > 1 else h)


class ConvDecoder(Stages):
    """`z: [N, Z]` to `x: [N, C, S, S]` in [0, 1]: linear, [residual block, x2] per doubling, 5x5 conv, sigmoid."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        latent_dim: int,
        channels: Sequence[int],
        norm: str,
        norm_place: str = "before",
        stride: int = 1,
        coarse: int = 0,
        upsample: str = "nearest",
    ) -> None:
        super().__init__()
        self.upsample = upsample
        self.side, self.width, self.stride = shape[1] // stride >> len(channels), channels[-1], stride
        self.stem = make_linear(norm, latent_dim, self.width * self.side**2, gain=math.sqrt(2))
        widths = [channels[-1], *reversed(channels), channels[0]]
        self.blocks = nn.ModuleList(ResidualBlock(a, b, norm, norm_place) for a, b in pairwise(widths))
        # Without normalisation, a small gain makes the first images grey and not black and white.
        self.head = make_conv(norm, channels[0], shape[0], 5, bias=True, gain=0.5, edge=True)
        self.small = (shape[0], coarse, coarse)
        self.coarse = make_linear(norm, latent_dim, shape[0] * coarse**2) if coarse else None
        if self.coarse is not None:
            nn.init.zeros_(self.coarse.weight)  # a latent that the data do not use adds no noise to samples

    def forward(self, z: Tensor) -> Tensor:
        h = F.relu(self.stem(z)).unflatten(1, (self.width, self.side, self.side))
        h = self.stage(self.blocks[0], h.contiguous(memory_format=torch.channels_last))
        for block in self.blocks[1:]:
            h = self.stage(lambda h, block=block: block(F.interpolate(h, scale_factor=2, mode=self.upsample)), h)
        logits = wide(self.stage(self._last, h))
        if self.coarse is not None:
            small = wide(self.coarse(z)).unflatten(1, self.small)
            logits = logits + F.interpolate(small, size=logits.shape[2:], mode="bilinear", align_corners=False)
        return torch.sigmoid(logits)

    def _last(self, h: Tensor) -> Tensor:
        return self.head(F.interpolate(h, scale_factor=self.stride, mode=self.upsample) if self.stride > 1 else h)


def build_conv(
    shape: tuple[int, ...],
    latent_dim: int,
    *,
    channels: Sequence[int] | None = None,
    width: float = 1.0,
    norm: str = "pixel",
    stride: int | str = 1,
    coarse: int = 0,
    upsample: str = "nearest",
) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder for square images of `shape` (C, S, S) with 1 or 3 channels.

    Arguments:
        channels: widths from the largest resolution to the smallest, one for each halving of the side; the default
            takes the published widths down to 4 ... 7 pixels.
        width: factor on the published widths, where `channels` is not given; 0.5 costs a quarter of the time.
        norm: "pixel" (by the root mean square over the channels of each position; the default, independent of the
            batch), "layer" (their mean is taken away, too), "group", "batch" (as published; its evaluation mode differs
            from its training mode) or "none"; of the weights instead of the activations: "weight" (standardised
            filters) or "equalized" (no normalisation, but an equalised learning rate in every layer; the rate is then
            in units of the weights' own size, Progressive GAN takes 1e-3).
        stride: how often smaller than the image the blocks work; only the first and last layer see all pixels. 2 costs
            a quarter of the time, for coarser detail. "auto" is the power of two that leaves them at most 32 pixels.
        coarse: side of a small copy of the image (at most the image's own) that has a linear way of its own into the
            latent and back out, 0 for none. Light, pose and outline, most of the squared error, are then learned in a
            few hundred steps.
        upsample: "nearest" (as published) or "bilinear", which leaves no grid in the images.

    Raises:
        ConfigError: a shape, width or norm that is not possible; the message says which are.

    Source: Soft-IntroVAE (2021), standard architecture; IntroVAE (2018), App. B. `stride` and `coarse` are this
    package's own.
    """
    one_of(NORMS, norm=norm)
    one_of(("nearest", "bilinear"), upsample=upsample)
    if stride == "auto":
        stride = 1
        while len(shape) == 3 and shape[1] // stride > AUTO_SIDE:
            stride *= 2
    if isinstance(stride, str):
        raise unknown("stride", stride, ["auto", "a whole number"])
    positive(stride=stride)
    not_negative(coarse=coarse)
    whole(stride=stride, coarse=coarse)
    sides = [stride * side for side in possible_sides()]
    if len(shape) != 3 or shape[0] not in (1, 3) or shape[1] != shape[2] or shape[1] not in sides:
        raise ConfigError(
            f"network 'conv'{f' with stride {stride}' if stride > 1 else ''} cannot take data of shape {tuple(shape)}: "
            f"it takes 1 or 3 channels and a square side of {', '.join(map(str, sides))} pixels; resize with --size"
        )
    square = (shape[0], shape[1], shape[2])
    side = shape[1] // stride
    channels = widths_for(side, channels, width)
    if side % (1 << len(channels)):
        raise ConfigError(
            f"{len(channels)} channel widths halve the side that often, which {side} pixels do not allow: give 1 "
            f"to {powers_of_two(side)} of them"
        )
    coarse = min(coarse, shape[1])
    encoder = ConvEncoder(square, latent_dim, channels, norm, stride=stride, coarse=coarse)
    decoder = ConvDecoder(square, latent_dim, channels, norm, stride=stride, coarse=coarse, upsample=upsample)
    return in_channels_last(encoder, decoder)


def in_channels_last(*networks: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A pair whose convolutions keep their weights, and so make their images, with the channels last in memory."""
    encoder, decoder = (network.to(memory_format=torch.channels_last) for network in networks)  # pyright: ignore
    return encoder, decoder


def widths_for(side: int, channels: Sequence[int] | None, width: float) -> Sequence[int]:
    """`channels` as given, or the published widths for feature maps of `side` pixels, times `width`.

    Raises:
        ConfigError: both are given, or a width is not above 0.
    """
    positive(width=width)
    if channels is None:
        more = max(0, halvings(side) - len(WIDTHS))
        published = [*LARGE_WIDTHS[len(LARGE_WIDTHS) - more :], *WIDTHS[: halvings(side)]]
        return [max(1, round(width * channel)) for channel in published]
    if width != 1:
        raise ConfigError("channels and width are both given: give one of them")
    if not channels:
        raise ConfigError(f"channels is empty: give 1 to {powers_of_two(side)} of them")
    for index, channel in enumerate(channels):
        positive(**{f"channels[{index}]": channel})
    return channels


def possible_sides() -> list[int]:
    """Sides that halve, at least once and as often as there are widths, down to 4 ... 7 pixels."""
    return sorted(base << k for base in (4, 5, 6, 7) for k in range(1, len(LARGE_WIDTHS) + len(WIDTHS) + 1))


def halvings(side: int) -> int:
    """How often a side halves until 4 ... 7 pixels are left."""
    return next(k for k in range(1, len(LARGE_WIDTHS) + len(WIDTHS) + 1) if side >> k < 8)


def powers_of_two(side: int) -> int:
    """How often a side can be halved."""
    return (side & -side).bit_length() - 1
