"""The residual pair as IntroVAE published it, for images of up to 1024 pixels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from introvae.errors import ConfigError, one_of
from introvae.networks.blocks import NORM_PLACES, NORMS
from introvae.networks.conv import LARGE_WIDTHS, WIDTHS, ConvDecoder, ConvEncoder, in_channels_last, widths_for

SIDES = tuple(4 << k for k in range(1, len(LARGE_WIDTHS) + len(WIDTHS) + 1))
"""Sides that halve down to 4 pixels; published are 64 ... 1024, and 32 by Soft-IntroVAE."""


def build_residual(
    shape: tuple[int, ...],
    latent_dim: int,
    *,
    channels: Sequence[int] | None = None,
    width: float = 1.0,
    norm: str = "pixel",
    norm_place: str = "after",
) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder for square images of `shape` (C, S, S) with 1 or 3 channels, S = 8, 16, 32, ... 1024.

    The encoder: 5x5 conv, norm, LeakyReLU, then [average pool, residual block] until 4x4 pixels are left, then one
    linear layer to mean and log-variance. The decoder: linear layer and ReLU to 4x4, then [residual block, nearest x2]
    back to S, a last residual block at full size and a 5x5 conv. So the encoder has one block less, none at full size.

    `conv` has these very layers in this order, and with `norm_place="before"` the two are one network. `conv` adds what
    was never published (`stride`, `coarse`, `upsample`, sides that end at 5, 6 or 7 pixels or stop earlier);
    `residual` holds to the table and adds the place of the normalisation.

    The papers' last convolution is linear; here a sigmoid follows, so that images are in [0, 1].

    Arguments:
        channels: widths from the largest resolution to the smallest, as many as the side halves down to 4 pixels; by
            default the published ones: 64, 128, 256, 512, 512, 512 at 256 px and the first of them below; 512 px put 32
            in front, 1024 px 16 and 32.
        width: factor on the published widths, where `channels` is not given.
        norm: as for `conv`: "pixel" (the default, independent of the batch), "layer", "group", "batch" (as published),
            "none", "weight" or "equalized".
        norm_place: "after" the addition, as IntroVAE, or "before", as Soft-IntroVAE. "after" keeps the size of signals
            the same through any depth; "before" leaves the way past the blocks free. Without effect for "none",
            "weight" and "equalized", which normalise no activations.

    Raises:
        ConfigError: a shape, width, norm or place that is not possible; the message says which are.

    Source: IntroVAE (2018), App. B, Tab. 1 (1024 px; "we reduce the number" of blocks for others); Soft-IntroVAE (2021)
    for "before" and the widths at 32 and 128 px.

    Example:
        >>> import torch
        >>> encoder, decoder = build_residual((3, 64, 64), latent_dim=8, width=1 / 16)
        >>> decoder(encoder(torch.rand(2, 3, 64, 64))[0]).shape
        torch.Size([2, 3, 64, 64])
    """
    one_of(NORMS, norm=norm)
    one_of(NORM_PLACES, norm_place=norm_place)
    if len(shape) != 3 or shape[0] not in (1, 3) or shape[1] != shape[2] or shape[1] not in SIDES:
        raise ConfigError(
            f"network 'residual' cannot take data of shape {tuple(shape)}: it takes 1 or 3 channels and a square side "
            f"of {', '.join(map(str, SIDES))} pixels; resize with --size or take conv"
        )
    square, halvings = (shape[0], shape[1], shape[2]), SIDES.index(shape[1]) + 1
    channels = widths_for(shape[1], channels, width)
    if len(channels) != halvings:
        raise ConfigError(
            f"network 'residual' halves {shape[1]} pixels {halvings} times, down to 4: give {halvings} channels, not "
            f"{len(channels)}"
        )
    encoder = ConvEncoder(square, latent_dim, channels, norm, norm_place)
    decoder = ConvDecoder(square, latent_dim, channels, norm, norm_place)
    return in_channels_last(encoder, decoder)
