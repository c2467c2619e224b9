"""Layers whose learning rate is equalised: weights are drawn with unit variance and scaled at every use."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F


class EqualizedLinear(nn.Linear):
    """`nn.Linear` with an equalised learning rate: `[..., inputs]` to `[..., outputs]`.

    The weight in use is `weight * scale`, so that Adam, whose steps know no scale, moves all layers alike.

    Arguments:
        inputs, outputs: widths.
        bias: whether there is one.
        gain: standard deviation of outputs for inputs of unit variance; sqrt(2) before a ReLU.
        lr_multiplier: how much faster (or, below 1, slower) than other layers this one learns.

    Source: Karras et al. 2018 (Progressive Growing of GANs), Sec. 4.1; the multiplier: Karras et al. 2019 (StyleGAN).

    Example:
        >>> import torch
        >>> y = EqualizedLinear(256, 256)(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)))
        >>> bool(0.9 < y.std() < 1.1)
        True
    """

    def __init__(
        self, inputs: int, outputs: int, bias: bool = True, gain: float = 1.0, lr_multiplier: float = 1.0
    ) -> None:
        super().__init__(inputs, outputs, bias)
        self.scale, self.lr_multiplier = gain / math.sqrt(inputs) * lr_multiplier, lr_multiplier
        _draw(self, lr_multiplier)

    def forward(self, input: Tensor) -> Tensor:
        bias = self.bias * self.lr_multiplier if self.bias is not None else None
        return F.linear(input, self.weight * self.scale, bias)


class EqualizedConv2d(nn.Conv2d):
    """`nn.Conv2d` (stride 1, zeros around) with an equalised learning rate.

    Arguments:
        inputs, outputs: channels.
        kernel: side of the kernel, odd; the size of the image is kept.
        bias, gain, lr_multiplier: as in `EqualizedLinear`.

    Source: Karras et al. 2018 (Progressive Growing of GANs), Sec. 4.1.

    Example:
        >>> import torch
        >>> EqualizedConv2d(3, 8, 3)(torch.zeros(1, 3, 4, 4)).shape
        torch.Size([1, 8, 4, 4])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        bias: bool = True,
        gain: float = math.sqrt(2),
        lr_multiplier: float = 1.0,
    ) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
        self.scale, self.lr_multiplier = gain / math.sqrt(inputs * kernel**2) * lr_multiplier, lr_multiplier
        _draw(self, lr_multiplier)

    def forward(self, input: Tensor) -> Tensor:
        bias = self.bias * self.lr_multiplier if self.bias is not None else None
        return F.conv2d(input, self.weight * self.scale, bias, padding=self.kernel_size[0] // 2)


def _draw(layer: nn.Linear | nn.Conv2d, lr_multiplier: float) -> None:
    nn.init.normal_(layer.weight, std=1 / lr_multiplier)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
