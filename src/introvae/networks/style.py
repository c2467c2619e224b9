"""The style-based pair: styles steer the decoder layer by layer, the encoder reads them off; both can grow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from introvae.errors import ConfigError, positive, whole
from introvae.networks.blocks import Stages
from introvae.networks.equalized import EqualizedConv2d, EqualizedLinear
from introvae.precision import unrounded, wide

MOST_CHANNELS, CHANNELS_TIMES_SIDE = 512, 16384
"""Published channels at a side: 512 up to 32 px, then half as many with each doubling, 64 at 256 px, 16 at 1024."""

ENCODER_MAPPING, ENCODER_MAPPING_LR = 3, 0.1
"""Layers from the encoder's style to mean and log-variance, and how fast they learn beside the others."""

EPS = 1e-5
"""Added to variances: the root of a constant channel's would have no gradient."""


class Growing(Stages):
    """Base of networks that work at several sizes of image, and whose weights are there for all of them.

    Arguments:
        sides: of the levels in pixels, each twice the one before. A network is made at the last one, its full level.

    Source: Karras et al. 2018 (Progressive Growing of GANs), Sec. 2.

    Example:
        >>> encoder, decoder = build_style((1, 16, 16), latent_dim=4, width=1 / 64, style_dim=8)
        >>> encoder.grow(8), decoder.grow(8, alpha=torch.tensor(0.5))
        (None, None)
        >>> decoder(torch.randn(2, 4)).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, sides: Sequence[int]) -> None:
        super().__init__()
        self.sides, self.level = tuple(sides), len(sides) - 1
        self.alpha: Tensor | None = None

    def grow(self, side: int, alpha: Tensor | None = None) -> None:
        """Work on images of `side` pixels from now on; neither is part of the state dict.

        Arguments:
            side: one of `sides`.
            alpha: share of the level in [0, 1], 0-d, that may change in place: at 0 the level below does all, at 1 this
                one. None leaves the level below out.

        Raises:
            ConfigError: no such level, or none below it to be blended with.
        """
        if side not in self.sides:
            raise ConfigError(
                f"the network has no level of {side} pixels: take one of {', '.join(map(str, self.sides))}"
            )
        if alpha is not None and side == self.sides[0]:
            raise ConfigError(f"there is no level below {side} pixels to be blended with: leave alpha out")
        self.level, self.alpha = self.sides.index(side), alpha

    def _blend(self, below: Tensor, this: Tensor) -> Tensor:
        return this if self.alpha is None else torch.lerp(below.to(this.dtype), this, self.alpha.to(this.dtype))


class StyleEncoder(Growing):
    """`x: [N, C, S, S]` to mean and log-variance, each `[N, Z]`.

    Every block halves the side. What its instance norms take away, each channel's mean and deviation, is its style; the
    sum of all blocks' styles, each through a linear map, is mapped to the posterior.
    """

    def __init__(self, shape: tuple[int, int, int], latent_dim: int, channels: Sequence[int], style_dim: int) -> None:
        super().__init__(levels_of(shape[1]))
        widths = channels[::-1]  # the smallest level first
        gain = 1 / math.sqrt(2 * len(widths))  # of each style, so that their sum has unit variance
        self.from_rgb = nn.ModuleList(EqualizedConv2d(shape[0], width, 1) for width in widths)
        last = _LastEncoderBlock(widths[0], self.sides[0], style_dim, gain)
        self.blocks = nn.ModuleList([last, *(_EncoderBlock(b, a, style_dim, gain) for a, b in pairwise(widths))])
        self.mapping = _mapping([style_dim] * ENCODER_MAPPING, ENCODER_MAPPING_LR)
        self.mapping.append(EqualizedLinear(style_dim, 2 * latent_dim, lr_multiplier=ENCODER_MAPPING_LR))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, styles = self._features(self.level, x), []
        for level in range(self.level, -1, -1):
            h, style = self.stage(self.blocks[level], h)
            if level == self.level and self.alpha is not None:
                h = self._blend(self._features(level - 1, F.avg_pool2d(x, 2)), h)
                style = self.alpha.to(style.dtype) * style
            styles.append(style)
        mean, logvar = unrounded(self.mapping, torch.stack(styles).sum(dim=0)).chunk(2, dim=1)
        return mean, logvar

    def _features(self, level: int, x: Tensor) -> Tensor:
        return _activated(self.from_rgb[level](2 * x - 1))


class StyleDecoder(Growing):
    """`z: [N, Z]` to `x: [N, C, S, S]` in [0, 1]: a mapping network turns z into the style w, whose linear maps scale
    and shift the channels of every layer, from a learned constant up; sigmoid.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        latent_dim: int,
        channels: Sequence[int],
        style_dim: int,
        mapping: int,
        mapping_lr: float,
    ) -> None:
        super().__init__(levels_of(shape[1]))
        widths = channels[::-1]
        self.mapping = _mapping([latent_dim] + [style_dim] * mapping, mapping_lr)
        # Random, not ones as published: without noise, an instance norm would leave nothing of a constant channel.
        self.constant = nn.Parameter(torch.randn(1, widths[0], self.sides[0], self.sides[0]))
        first = _DecoderBlock(None, widths[0], style_dim)
        self.blocks = nn.ModuleList([first, *(_DecoderBlock(a, b, style_dim) for a, b in pairwise(widths))])
        self.to_rgb = nn.ModuleList(EqualizedConv2d(width, shape[0], 1, gain=1) for width in widths)

    def forward(self, z: Tensor, fine: Tensor | None = None, coarse: int = 0) -> Tensor:
        """The images of `z`. With latents `fine: [N, Z]`, the styles of `z` steer the first `coarse` levels only, and
        those of `fine` the others.
        """
        w = unrounded(self.mapping, pixel_norm(z))
        other = w if fine is None else unrounded(self.mapping, pixel_norm(fine))
        h, below = self.constant.expand(z.shape[0], -1, -1, -1), None  # an exporter would take len(z) for a constant
        for level in range(self.level + 1):
            if level == self.level and self.alpha is not None:
                below = F.interpolate(self._image(level - 1, h), scale_factor=2)
            style = w if level < coarse else other
            h = self.stage(lambda h, block=self.blocks[level], style=style: block(h, style), h)
        image = self._image(self.level, h)
        return image if below is None else self._blend(below, image)

    def _image(self, level: int, h: Tensor) -> Tensor:
        return torch.sigmoid(wide(self.to_rgb[level](h)))


class _EncoderBlock(nn.Module):
    """`h: [N, inputs, S, S]` to `[N, outputs, S / 2, S / 2]` and the block's style `[N, style_dim]`."""

    def __init__(self, inputs: int, outputs: int, style_dim: int, gain: float) -> None:
        super().__init__()
        self.conv1 = EqualizedConv2d(inputs, inputs, 3)
        self.conv2 = HalvingConv2d(inputs, outputs)
        self.style1 = EqualizedLinear(2 * inputs, style_dim, gain=gain)
        self.style2 = EqualizedLinear(2 * outputs, style_dim, gain=gain)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        h, first = instance_norm(_activated(self.conv1(h)))
        h, second = instance_norm(_activated(self.conv2(blurred(h))))
        return h, unrounded(self.style1, first) + unrounded(self.style2, second)


class _LastEncoderBlock(nn.Module):
    """`h: [N, width, S, S]` of the smallest side to `[N, width]` and the block's style, by a dense layer."""

    def __init__(self, width: int, side: int, style_dim: int, gain: float) -> None:
        super().__init__()
        self.conv = EqualizedConv2d(width, width, 3)
        self.dense = EqualizedLinear(width * side**2, width, gain=math.sqrt(2))
        self.style1 = EqualizedLinear(2 * width, style_dim, gain=gain)
        self.style2 = EqualizedLinear(width, style_dim, gain=gain)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        h, first = instance_norm(_activated(self.conv(h)))
        h = _activated(self.dense(h.flatten(1)))
        return h, unrounded(self.style1, first) + unrounded(self.style2, h)


class _DecoderBlock(nn.Module):
    """`h: [N, inputs, S, S]` and the style `w: [N, style_dim]` to `[N, outputs, 2 S, 2 S]`; the first block, which has
    no `inputs`, takes the constant as it is.
    """

    def __init__(self, inputs: int | None, outputs: int, style_dim: int) -> None:
        super().__init__()
        self.conv1 = None if inputs is None else DoublingConv2d(inputs, outputs)
        self.conv2 = EqualizedConv2d(outputs, outputs, 3)
        self.style1 = EqualizedLinear(style_dim, 2 * outputs)
        self.style2 = EqualizedLinear(style_dim, 2 * outputs)

    def forward(self, h: Tensor, w: Tensor) -> Tensor:
        h = F.leaky_relu(h, 0.2) if self.conv1 is None else _activated(blurred(self.conv1(h)))
        h = adain(h, unrounded(self.style1, w))
        return adain(_activated(self.conv2(h)), unrounded(self.style2, w))


class _Resampling(EqualizedConv2d):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3)

    def _of_pairs(self) -> Tensor:
        """The 4x4 kernel that is the mean of the 3x3 kernel at four neighbouring places."""
        return F.avg_pool2d(F.pad(self.weight * self.scale, (1, 1, 1, 1)), 2, stride=1)


class HalvingConv2d(_Resampling):
    """A 3x3 convolution, then the mean of each 2x2 pixels: as one 4x4 convolution of stride 2, less than half the work.

    Source: StyleGAN's code does so too, from 128 pixels up.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self._of_pairs(), self.bias, stride=2, padding=1)


class DoublingConv2d(_Resampling):
    """Every pixel four times, then a 3x3 convolution: as one transposed 4x4 convolution of stride 2."""

    def forward(self, input: Tensor) -> Tensor:
        kernel = 4 * self._of_pairs().flip(2, 3).transpose(0, 1)
        return F.conv_transpose2d(input, kernel, self.bias, stride=2, padding=1)


def blurred(x: Tensor) -> Tensor:
    """`x: [N, C, S, S]` filtered by (1, 2, 1) / 4 both ways, its edge pixels going on outside.

    After a doubling and before a halving, it makes of both what bilinear interpolation does.

    Source: Karras et al. 2019 (StyleGAN), App. C.
    """
    line = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype, device=x.device)
    kernel = (line[:, None] * line).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=x.shape[1])


def instance_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x: [N, C, S, S]` with mean 0 and deviation 1 in each channel of each sample, and what that took away: the means
    and deviations `[N, 2 C]`.

    Source: Pidhorskyi et al. 2020 (Adversarial Latent Autoencoders), Sec. 5.

    Example:
        >>> h, style = instance_norm(torch.tensor([[[[1.0, 3.0], [1.0, 3.0]]]]))
        >>> h.flatten().round(decimals=3), style.round(decimals=3)
        (tensor([-1.,  1., -1.,  1.]), tensor([[2., 1.]]))
    """
    mean, centred, deviation = _centred(x)
    return (centred / deviation).to(x.dtype), torch.cat([mean, deviation], dim=1).flatten(1)


def adain(x: Tensor, style: Tensor) -> Tensor:
    """Adaptive instance normalisation: `x: [N, C, S, S]` with mean 0 and deviation 1 in each channel of each sample,
    times 1 + the first half of `style: [N, 2 C]`, plus the second.

    Source: Karras et al. 2019 (StyleGAN), Eq. 1; the 1 keeps a new style network from silencing its channels.

    Example:
        >>> adain(torch.tensor([[[[1.0, 3.0], [1.0, 3.0]]]]), torch.tensor([[1.0, 5.0]])).flatten().round(decimals=3)
        tensor([3., 7., 3., 7.])
    """
    _, centred, deviation = _centred(x)
    scale, shift = style[:, :, None, None].chunk(2, dim=1)
    return torch.addcmul(shift, centred, (1 + scale) / deviation).to(x.dtype)


def pixel_norm(z: Tensor) -> Tensor:
    """`z: [N, Z]` divided by the root mean square over its dimensions.

    Source: Karras et al. 2018 (Progressive Growing of GANs), Sec. 4.2.
    """
    return z * (z.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


def _centred(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of each channel of each sample, what is left without it, and the deviation of that, in full width."""
    x = wide(x)
    mean = x.mean(dim=(2, 3), keepdim=True)
    centred = x - mean
    return mean, centred, (centred.square().mean(dim=(2, 3), keepdim=True) + EPS).sqrt()


def _activated(h: Tensor) -> Tensor:
    return F.leaky_relu_(h, 0.2)


def _mapping(widths: Sequence[int], lr_multiplier: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [EqualizedLinear(inputs, outputs, gain=math.sqrt(2), lr_multiplier=lr_multiplier), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers)


def levels_of(side: int) -> tuple[int, ...]:
    """The sides of the levels of images of `side` pixels, from 4 ... 7 up; empty where it does not halve to those.

    Example:
        >>> levels_of(64), levels_of(28), levels_of(30)
        ((4, 8, 16, 32, 64), (7, 14, 28), ())
    """
    sides = [side]
    while sides[0] > 7 and sides[0] % 2 == 0:
        sides.insert(0, sides[0] // 2)
    return tuple(sides) if 4 <= sides[0] <= 7 else ()


def build_style(
    shape: tuple[int, ...],
    latent_dim: int,
    *,
    channels: Sequence[int] | None = None,
    width: float = 1.0,
    style_dim: int = 512,
    mapping: int = 8,
    mapping_lr: float = 0.1,
) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder for square images of `shape` (C, S, S) with 1 or 3 channels; both are `Growing`.

    There is no noise inside the decoder: one latent makes one image.

    Arguments:
        channels: widths from the largest side to the smallest, one for each level (`levels_of`); the default takes the
            published ones.
        width: factor on the published widths, where `channels` is not given; 0.5 costs a quarter of the time.
        style_dim: W, width of the styles and of both mapping networks.
        mapping: layers from z to the style.
        mapping_lr: how fast these learn beside the others (Soft-IntroVAE's 0.1; StyleGAN has 0.01).

    Raises:
        ConfigError: a shape, width or number that is not possible; the message says which are.

    Source: Soft-IntroVAE (2021), style-based architecture, after Pidhorskyi et al. 2020 (Adversarial Latent
    Autoencoders) and Karras et al. 2019 (StyleGAN); docs/style.md tells where it differs.
    """
    positive(width=width, style_dim=style_dim, mapping=mapping, mapping_lr=mapping_lr)
    whole(style_dim=style_dim, mapping=mapping)
    sides = levels_of(shape[1]) if len(shape) == 3 else ()
    if len(shape) != 3 or shape[0] not in (1, 3) or shape[1] != shape[2] or not sides:
        raise ConfigError(
            f"network 'style' cannot take data of shape {tuple(shape)}: it takes 1 or 3 channels and a square side "
            "that halves down to 4, 5, 6 or 7 pixels; resize with --size"
        )
    if channels is None:
        published = [min(MOST_CHANNELS, CHANNELS_TIMES_SIDE // side) for side in reversed(sides)]
        channels = [max(1, round(width * channel)) for channel in published]
    elif width != 1:
        raise ConfigError("channels and width are both given: give one of them")
    if len(channels) != len(sides):
        raise ConfigError(
            f"{len(channels)} channel widths for {len(sides)} levels: give one for each of "
            f"{', '.join(map(str, reversed(sides)))} pixels"
        )
    for index, channel in enumerate(channels):
        positive(**{f"channels[{index}]": channel})
        whole(**{f"channels[{index}]": channel})
    square, channels = (shape[0], shape[1], shape[2]), list(channels)
    encoder = StyleEncoder(square, latent_dim, channels, style_dim)
    decoder = StyleDecoder(square, latent_dim, channels, style_dim, mapping, mapping_lr)
    return (
        encoder.to(memory_format=torch.channels_last),  # pyright: ignore[reportCallIssue]
        decoder.to(memory_format=torch.channels_last),  # pyright: ignore[reportCallIssue]
    )
