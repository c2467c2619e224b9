"""Strided convolutions around fully connected layers: the pair for small images that a processor trains in minutes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from introvae.errors import ConfigError, not_negative, one_of, positive, whole
from introvae.networks.blocks import GAIN, SLOPE, Stages, make_norm, sized
from introvae.networks.conv import halvings, in_channels_last, possible_sides, powers_of_two, widths_for
from introvae.precision import unrounded, wide

NARROW = 16
"""Channels at half the image's side, where `channels` is not given; each halving doubles them."""

MOST = 512
"""Most channels that the doubling comes to, as in the other networks."""

NORMS = ("none", "layer", "pixel", "group", "batch")
"""Normalisers of activations; "weight" and "equalized" are of the other networks."""


class DCGANEncoder(Stages):
    """`x: [N, C, S, S]` to mean and log-variance, each `[N, Z]`: 4x4 convolutions of stride 2, then `depth` layers."""

    def __init__(
        self, shape: tuple[int, int, int], latent_dim: int, channels: Sequence[int], norm: str, hidden: int, depth: int
    ) -> None:
        super().__init__()
        self.convs = halving_convs((shape[0], *channels))
        self.norms = nn.ModuleList(make_norm(norm, width) for width in channels)
        side = shape[1] >> len(channels)
        widths = [channels[-1] * side * side, *[hidden] * depth]
        self.layers = nn.ModuleList(sized(nn.Linear(a, b), GAIN) for a, b in pairwise(widths))
        self.head = sized(nn.Linear(widths[-1], 2 * latent_dim), 1.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = self.stage(lambda h, conv=conv, norm=norm: F.leaky_relu(norm(conv(h)), SLOPE), h)
        h = h.flatten(1)
        for layer in self.layers:
            h = F.leaky_relu(layer(h), SLOPE)
        mean, logvar = unrounded(self.head, h).chunk(2, dim=1)
        return mean, logvar


class DCGANDecoder(Stages):
    """`z: [N, Z]` to `x: [N, C, S, S]` in [0, 1]: `depth` layers, then 4x4 transposed convolutions of stride 2."""

    def __init__(
        self, shape: tuple[int, int, int], latent_dim: int, channels: Sequence[int], norm: str, hidden: int, depth: int
    ) -> None:
        super().__init__()
        self.side, self.width = shape[1] >> len(channels), channels[-1]
        widths = [latent_dim, *[hidden] * depth, self.width * self.side**2]
        self.layers = nn.ModuleList(sized(nn.Linear(a, b), math.sqrt(2)) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(make_norm(norm, width) for width in reversed(channels))
        self.convs = doubling_convs((*reversed(channels), shape[0]), math.sqrt(2))

    def forward(self, z: Tensor) -> Tensor:
        h = z
        for layer in self.layers[:-1]:
            h = F.relu(layer(h))
        h = self.layers[-1](h).unflatten(1, (self.width, self.side, self.side))
        h = h.contiguous(memory_format=torch.channels_last)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = self.stage(lambda h, conv=conv, norm=norm: conv(F.relu(norm(h))), h)
        return torch.sigmoid(wide(h))


def halving_convs(widths: Sequence[int]) -> nn.ModuleList:
    """4x4 convolutions of stride 2 from each width to the next, for LeakyReLU."""
    return nn.ModuleList(sized(nn.Conv2d(a, b, 4, stride=2, padding=1), GAIN) for a, b in pairwise(widths))


def doubling_convs(widths: Sequence[int], gain: float) -> nn.ModuleList:
    """4x4 transposed convolutions of stride 2 from each width to the next, all but the last with this gain."""
    # Of a 4x4 kernel of stride 2, each output pixel sees 2x2. The small last gain makes the first images grey.
    gains = [*[gain] * (len(widths) - 2), 0.5]
    return nn.ModuleList(
        sized(nn.ConvTranspose2d(a, b, 4, stride=2, padding=1), gain, inputs=4 * a)
        for (a, b), gain in zip(pairwise(widths), gains, strict=True)
    )


def strided_widths(
    network: str, shape: tuple[int, ...], channels: Sequence[int] | None
) -> tuple[tuple[int, int, int], Sequence[int]]:
    """The shape (C, S, S) and a channel width for each halving, the usual ones where none are given.

    Raises:
        ConfigError: a shape or width that `network` cannot take.
    """
    sides = possible_sides()
    if len(shape) != 3 or shape[0] not in (1, 3) or shape[1] != shape[2] or shape[1] not in sides:
        raise ConfigError(
            f"network {network!r} cannot take data of shape {tuple(shape)}: it takes 1 or 3 channels and a square side "
            f"of {', '.join(map(str, sides))} pixels; resize with --size"
        )
    usual = [min(NARROW << k, MOST) for k in range(halvings(shape[1]))]
    channels = usual if channels is None else widths_for(shape[1], channels, width=1.0)
    if shape[1] % (1 << len(channels)):
        raise ConfigError(
            f"{len(channels)} channel widths halve the side that often, which {shape[1]} pixels do not allow: give 1 "
            f"to {powers_of_two(shape[1])} of them"
        )
    return (shape[0], shape[1], shape[2]), channels


def build_dcgan(
    shape: tuple[int, ...],
    latent_dim: int,
    *,
    channels: Sequence[int] | None = None,
    hidden: int = 512,
    depth: int = 3,
    norm: str = "none",
) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder for square images of `shape` (C, S, S) with 1 or 3 channels.

    A step costs a fraction of one with `conv`: one layer alone touches the full size, and half of the multiplications
    are in the fully connected layers. They also sharpen the borders between the classes of samples: digits were better
    with them, at the same cost, than with wider convolutions and a single linear layer.

    Arguments:
        channels: widths from half the image's side to the smallest, one for each halving; the default doubles from 16
            to at most 512 and goes down to 4 ... 7 pixels.
        hidden: width of the fully connected layers.
        depth: their number in each network, besides those that lead to and from latents and feature maps; 0 is DCGAN.
        norm: "none" (the default), "layer", "pixel", "group" or "batch", as for `conv`.

    Raises:
        ConfigError: a shape, width or norm that is not possible; the message says which are.

    Source: Radford et al. 2016 (DCGAN), Sec. 3, for the convolutions. The fully connected layers between them and the
    latent, in the place of its normalisation, are this package's own.

    Example:
        >>> import torch
        >>> encoder, decoder = build_dcgan((1, 28, 28), latent_dim=16, hidden=32)
        >>> decoder(encoder(torch.rand(2, 1, 28, 28))[0]).shape
        torch.Size([2, 1, 28, 28])
    """
    one_of(NORMS, norm=norm)
    positive(hidden=hidden)
    not_negative(depth=depth)
    whole(hidden=hidden, depth=depth)
    square, channels = strided_widths("dcgan", shape, channels)
    return in_channels_last(
        DCGANEncoder(square, latent_dim, channels, norm, hidden, depth),
        DCGANDecoder(square, latent_dim, channels, norm, hidden, depth),
    )
