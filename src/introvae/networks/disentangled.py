"""The two-encoder pair: what an image is of (its class) and how it is shown (its content) in latents of their own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from introvae.errors import ConfigError, not_negative, positive, whole
from introvae.networks.blocks import GAIN, SLOPE, Stages, sized
from introvae.networks.conv import in_channels_last
from introvae.networks.dcgan import doubling_convs, halving_convs, strided_widths
from introvae.networks.style import adain, instance_norm
from introvae.precision import unrounded, wide


class DisentangledEncoder(Stages):
    """`x: [N, C, S, S]` to mean and log-variance, each `[N, Z]`: two towers of strided convolutions.

    The first `class_dim` latents come from features that are averaged over the image, which says nothing of places; the
    others from features that keep their places and lose, after every convolution, each channel's mean and deviation.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        latent_dim: int,
        class_dim: int,
        channels: Sequence[int],
        hidden: int,
        depth: int,
    ) -> None:
        super().__init__()
        self.class_dim = class_dim
        side = shape[1] >> len(channels)
        self.class_convs, self.content_convs = (halving_convs((shape[0], *channels)) for _ in range(2))
        self.class_head = _layers([channels[-1], *[hidden] * depth, 2 * class_dim])
        self.content_head = _layers([channels[-1] * side * side, *[hidden] * depth, 2 * (latent_dim - class_dim)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x
        for conv in self.class_convs:
            h = self.stage(lambda h, conv=conv: F.leaky_relu(conv(h), SLOPE), h)
        of_class = unrounded(self.class_head, h.mean(dim=(2, 3)))
        h = x
        for conv in self.content_convs:
            h = self.stage(lambda h, conv=conv: F.leaky_relu(instance_norm(conv(h))[0], SLOPE), h)
        parts = zip(of_class.chunk(2, dim=1), unrounded(self.content_head, h.flatten(1)).chunk(2, dim=1), strict=True)
        mean, logvar = (torch.cat(both, dim=1) for both in parts)
        return mean, logvar


class DisentangledDecoder(Stages):
    """`z: [N, Z]` to `x: [N, C, S, S]` in [0, 1]: the content is laid out in the smallest feature map, and in front of
    every transposed convolution the class scales and shifts the channels (adaptive instance normalisation).
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        latent_dim: int,
        class_dim: int,
        channels: Sequence[int],
        hidden: int,
        depth: int,
    ) -> None:
        super().__init__()
        self.class_dim = class_dim
        self.side, self.width = shape[1] >> len(channels), channels[-1]
        self.content = _layers([latent_dim - class_dim, *[hidden] * depth, self.width * self.side**2])
        self.mapping = _layers([class_dim, *[hidden] * max(1, depth)])
        self.styles = nn.ModuleList(sized(nn.Linear(hidden, 2 * width), 1.0) for width in reversed(channels))
        self.convs = doubling_convs((*reversed(channels), shape[0]), GAIN)

    def forward(self, z: Tensor) -> Tensor:
        of_class, content = z[:, : self.class_dim], z[:, self.class_dim :]
        w = F.leaky_relu(self.mapping(of_class), SLOPE)
        h = self.content(content).unflatten(1, (self.width, self.side, self.side))
        h = h.contiguous(memory_format=torch.channels_last)
        for style, conv in zip(self.styles, self.convs, strict=True):
            scales = unrounded(style, w)
            h = self.stage(lambda h, conv=conv, s=scales: conv(F.leaky_relu(adain(h, s), SLOPE)), h)
        return torch.sigmoid(wide(h))


def _layers(widths: Sequence[int]) -> nn.Sequential:
    """Fully connected layers, LeakyReLU between them."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [sized(nn.Linear(a, b), GAIN), nn.LeakyReLU(SLOPE)]
    last = layers[-2]
    assert isinstance(last, nn.Linear)
    sized(last, 1.0)
    return nn.Sequential(*layers[:-1])


def class_dim(encoder: nn.Module) -> int:
    """How many of an encoder's latents, the first ones, are for the class.

    Raises:
        ConfigError: it does not tell class from content.

    Example:
        >>> class_dim(build_disentangled((3, 32, 32), latent_dim=16)[0])
        8
    """
    found = getattr(encoder, "class_dim", None)
    if found is None:
        raise ConfigError(
            f"{type(encoder).__name__} does not tell class from content: train with --network disentangled, and "
            "without conditional"
        )
    return found


def build_disentangled(
    shape: tuple[int, ...],
    latent_dim: int,
    *,
    class_dim: int | None = None,
    channels: Sequence[int] | None = None,
    hidden: int = 256,
    depth: int = 1,
) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder for square images of `shape` (C, S, S) with 1 or 3 channels, for image translation.

    Of the Z latents the first `class_dim` are for what an image is of, the others for how it is shown. Nothing but the
    networks' shapes tells them so (places are for the content, what holds for the whole image is for the class), unless
    `--paired` does: then the images of a batch lend each other the class latents of their classes.

    Arguments:
        class_dim: how many of the latents, by default half of them; give it with `--conditional`, whose decoder has
            more latents than the encoder.
        channels: widths from half the image's side to the smallest, one for each halving; the default doubles from 16
            to at most 512 and goes down to 4 ... 7 pixels.
        hidden: width of the fully connected layers.
        depth: their number in each head, besides those that lead to and from latents and feature maps.

    Raises:
        ConfigError: a shape, width or number that is not possible; the message says which are.

    Source: Soft-IntroVAE (2021), Sec. 6 (image translation), whose class and content encoders and adaptive instance
    normalisation follow Gabbay and Hoshen 2020 (Demystifying Inter-Class Disentanglement); layers and widths are this
    package's own.

    Example:
        >>> import torch
        >>> encoder, decoder = build_disentangled((3, 32, 32), latent_dim=16, class_dim=6, hidden=32)
        >>> encoder.class_dim, decoder(encoder(torch.rand(2, 3, 32, 32))[0]).shape
        (6, torch.Size([2, 3, 32, 32]))
    """
    positive(hidden=hidden)
    not_negative(depth=depth)
    whole(hidden=hidden, depth=depth)
    square, channels = strided_widths("disentangled", shape, channels)
    if square[1] >> len(channels) < 2:
        raise ConfigError(
            f"{len(channels)} channel widths leave a single pixel of {square[1]}, which has no places: give "
            f"{len(channels) - 1}"
        )
    first = latent_dim // 2 if class_dim is None else class_dim
    whole(class_dim=first)
    if not 0 < first < latent_dim:
        raise ConfigError(
            f"class_dim {first} of {latent_dim} latents leaves nothing for one of the two: let it be above 0 and "
            "below latent_dim"
        )
    return in_channels_last(
        DisentangledEncoder(square, latent_dim, first, channels, hidden, depth),
        DisentangledDecoder(square, latent_dim, first, channels, hidden, depth),
    )
