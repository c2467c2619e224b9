"""Building blocks of the convolutional networks."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from introvae.errors import one_of

NORMS = ("layer", "group", "batch", "none")


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each position: no statistics over the batch or over space, cheap on the CPU."""

    def forward(self, input: Tensor) -> Tensor:  # [N, C, H, W]
        channels_last = input.permute(0, 2, 3, 1)
        return F.layer_norm(channels_last, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


def make_norm(norm: str, channels: int) -> nn.Module:
    """The normalisation named `norm` (one of `NORMS`) for `channels` channels.

    Raises:
        ConfigError: the name is unknown.
    """
    one_of(NORMS, norm=norm)
    if norm == "layer":
        return ChannelNorm(channels)
    if norm == "group":
        return nn.GroupNorm(math.gcd(8, channels), channels)
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.Identity()


class ResidualBlock(nn.Module):
    """3x3, norm, LeakyReLU, 3x3, norm, plus the input (through 1x1 where the width changes), LeakyReLU.

    Source: IntroVAE (2018), App. B; the normalisation comes before the addition, as in Soft-IntroVAE.
    """

    def __init__(self, inputs: int, outputs: int, norm: str) -> None:
        super().__init__()
        bias = norm == "none"  # a normalisation's own shift makes it needless
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)
        self.norm1 = make_norm(norm, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=bias)
        self.norm2 = make_norm(norm, outputs)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.leaky_relu(self.norm1(self.conv1(x)), 0.2)
        return F.leaky_relu(self.norm2(self.conv2(inner)) + self.skip(x), 0.2)
