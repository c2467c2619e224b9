"""Building blocks of the convolutional networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from introvae.errors import ConfigError, one_of
from introvae.networks.equalized import EqualizedConv2d, EqualizedLinear

NORMS = ("layer", "group", "batch", "none", "pixel", "weight", "equalized")
"""Normalisers: of the activations (the first three and "pixel"), of the weights ("weight", "equalized"), or none."""

NORM_PLACES = ("before", "after")
"""Where a residual block normalises its second convolution: before the input is added, or the sum."""

SLOPE = 0.2
"""Of LeakyReLU below 0, as in all the papers."""

GAIN = math.sqrt(2 / (1 + SLOPE**2))
"""Keeps the size of signals from layer to layer through LeakyReLU (He et al. 2015, Delving Deep into Rectifiers)."""

EPS = 1e-8
"""Of pixel normalisation, as in Progressive GAN: beside the mean square."""

_SHIFTING = ("layer", "group", "batch")
_BARE = ("none", "weight")
_Layer = TypeVar("_Layer", nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


class OverChannels(nn.Module):
    """Base of normalisations over the channels of each position: no statistics over the batch or over space."""

    def forward(self, input: Tensor) -> Tensor:  # [N, C, H, W]
        return self.channels_last(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def channels_last(self, input: Tensor) -> Tensor:
        """The same for `[N, H, W, C]`."""
        raise NotImplementedError


class ChannelNorm(OverChannels, nn.LayerNorm):
    """Layer norm over the channels of each position, cheap on the CPU."""

    def channels_last(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if not input.is_cuda or input.dtype == weight.dtype:
            return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
        # CUDA's autocast would hand on float32, at twice the memory; the kernel's sums are float32 either way.
        with torch.autocast("cuda", enabled=False):
            return F.layer_norm(input, self.normalized_shape, weight.to(input.dtype), bias.to(input.dtype), self.eps)


class PixelNorm(OverChannels, nn.RMSNorm):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Divides by the root mean square over the channels of each position, times a learned gain for each channel.

    Progressive GAN has no gain: there a convolution follows that can take it over. Here the input of a residual block
    is added, and only the gain can weigh the one against the other. It needs no shift: the convolution before has one,
    and no mean is taken away.

    Source: Karras et al. 2018 (Progressive Growing of GANs), Sec. 4.2; the gain: Zhang and Sennrich 2019, Root Mean
    Square Layer Normalization.

    Example:
        >>> PixelNorm(2)(torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1)).flatten()
        tensor([0.8485, 1.1314], grad_fn=...)
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=EPS)

    def channels_last(self, input: Tensor) -> Tensor:
        if input.dtype == self.weight.dtype:
            return F.rms_norm(input, self.normalized_shape, self.weight, EPS)
        with torch.autocast(input.device.type, enabled=False):
            weight = self.weight.to(input.dtype)
            if input.device.type != "cpu":
                # The kernel's sums are float32 either way; a wide gain would make a wide result, at twice the memory.
                return F.rms_norm(input, self.normalized_shape, weight, EPS)
            # PyTorch has no kernel for it there, and its single operations keep wide images for the backward pass.
            size = torch.linalg.vector_norm(input, dim=-1, keepdim=True, dtype=torch.float32)
            scale = math.sqrt(input.shape[-1]) / size.clamp(min=math.sqrt(input.shape[-1] * EPS))
            return input * scale.to(input.dtype) * weight


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm`, quick on the CPU in bf16 too."""

    def forward(self, input: Tensor) -> Tensor:  # [N, C, H, W]
        rounded = input.dtype == torch.bfloat16 and input.device.type == "cpu"
        if rounded and self.num_channels < 16 * self.num_groups:
            # PyTorch's kernel takes three times as long here: a group's channels are fewer than a vector holds.
            return super().forward(input.float()).to(input.dtype)
        return super().forward(input)


class StandardizedConv2d(nn.Conv2d):
    """`nn.Conv2d` (stride 1, zeros around) whose filters have mean 0 and a learned size: no activation is touched.

    The weight of an output channel in use is gain * (w - mean(w)) / sqrt(n var(w)), over its n = inputs * kernel^2
    values: for inputs of unit variance, outputs have standard deviation gain.

    Arguments:
        inputs, outputs: channels.
        kernel: side of the kernel, odd; the size of the image is kept.
        bias: whether there is one.
        gain: each output channel's at the start.

    Raises:
        ConfigError: filters of a single value, of which nothing would be left.

    Source: Qiao et al. 2019, Micro-Batch Training with Batch-Channel Normalization and Weight Standardization; the
    scale by sqrt(n), the gain and doing without group norm: Brock et al. 2021, Characterizing Signal Propagation to
    Close the Performance Gap in Unnormalized ResNets.

    Example:
        >>> y = StandardizedConv2d(64, 8, 3)(torch.randn(4, 64, 16, 16, generator=torch.Generator().manual_seed(0)))
        >>> bool(0.9 < y.std() < 1.1)
        True
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, bias: bool = True, gain: float = 1.0) -> None:
        if inputs * kernel**2 < 2:
            raise ConfigError("norm 'weight' leaves nothing of a 1x1 filter of 1 channel: give 2 channels or more")
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
        self.gain = nn.Parameter(torch.full((outputs,), gain))

    def forward(self, input: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        scale = self.gain[:, None, None, None] * (var * self.weight[0].numel() + 1e-8).rsqrt()
        return F.conv2d(input, (self.weight - mean) * scale, self.bias, padding=self.padding)


def make_norm(norm: str, channels: int) -> nn.Module:
    """The normalisation of `channels` channels that `norm` (one of `NORMS`) stands for, nothing where weights have it.

    Raises:
        ConfigError: the name is unknown.
    """
    one_of(NORMS, norm=norm)
    if norm == "layer":
        return ChannelNorm(channels)
    if norm == "pixel":
        return PixelNorm(channels)
    if norm == "group":
        return GroupNorm(math.gcd(8, channels), channels)
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.Identity()


def make_conv(
    norm: str,
    inputs: int,
    outputs: int,
    kernel: int,
    *,
    bias: bool | None = None,
    gain: float = 1.0,
    edge: bool = False,
) -> nn.Conv2d:
    """The convolution (stride 1, same size) of a network with the normaliser `norm`, one of `NORMS`.

    Arguments:
        inputs, outputs: channels.
        kernel: side of the kernel, odd.
        bias: whether there is one; by default where no normalisation with a shift of its own follows.
        gain: standard deviation of outputs for inputs of unit variance at the start, where nothing normalises them;
            elsewhere PyTorch's own start does.
        edge: it reads or makes images. It is not standardised: filters of mean 0 do not see how bright an image is.

    Raises:
        ConfigError: the name is unknown.
    """
    one_of(NORMS, norm=norm)
    bias = norm not in _SHIFTING if bias is None else bias
    if norm == "equalized":
        return EqualizedConv2d(inputs, outputs, kernel, bias, gain)
    if norm == "weight" and not edge:
        return StandardizedConv2d(inputs, outputs, kernel, bias, gain)
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
    return sized(layer, gain) if norm in _BARE else layer


def make_linear(norm: str, inputs: int, outputs: int, gain: float = 1.0) -> nn.Linear:
    """The fully connected layer of a network with the normaliser `norm`; `gain` as in `make_conv`."""
    if norm == "equalized":
        return EqualizedLinear(inputs, outputs, gain=gain)
    layer = nn.Linear(inputs, outputs)
    return sized(layer, gain) if norm in _BARE else layer


def sized(layer: _Layer, gain: float, inputs: int | None = None) -> _Layer:
    """The layer with weights of variance gain^2 / n, as He et al. 2015: PyTorch's third of it would fade with depth.

    Arguments:
        layer: changed in place; its bias becomes 0.
        gain: standard deviation of outputs for inputs of unit variance.
        inputs: n, the values that an output sees; by default those of a filter, which a transposed convolution has not.
    """
    nn.init.normal_(layer.weight, std=gain / math.sqrt(inputs or layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def activated(norm: nn.Module, x: Tensor, skip: Tensor | None = None) -> Tensor:
    """LeakyReLU(norm(x) + skip), `[N, C, H, W]`, computed in place of the normalisation's output; x may be overwritten.

    No backward pass reads that output, so it need not be kept: less memory, and up to a fifth less time on the CPU.
    """
    if not isinstance(norm, OverChannels):
        h = norm(x)
        return F.leaky_relu_(h if skip is None else h.add_(skip), SLOPE)
    # In place of a view, autograd would copy: so not of the permuted result, but before it is permuted back.
    h = norm.channels_last(x.permute(0, 2, 3, 1))
    return F.leaky_relu_(h if skip is None else h.add_(skip.permute(0, 2, 3, 1)), SLOPE).permute(0, 3, 1, 2)


class _Still:
    """Leaves the running statistics of batch normalisations alone: what is computed again has been counted.

    A class, since a backward pass that keeps its graph enters it once more.
    """

    def __init__(self, network: nn.Module) -> None:
        self.norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    def __enter__(self) -> None:
        self.before = [(norm.momentum, norm.num_batches_tracked) for norm in self.norms]
        for norm in self.norms:
            norm.momentum = 0.0
            norm.num_batches_tracked = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()

    def __exit__(self, *error: object) -> None:
        for norm, (momentum, count) in zip(self.norms, self.before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


class Stages(nn.Module):
    """Base of networks that can forget what is inside their stages and compute it again in the backward pass.

    Source: Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost.
    """

    gradient_checkpointing = False
    """Whether only the inputs of stages are kept: about a third more time for a fraction of the memory."""

    def stage(self, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`compute(x)`, kept or forgotten."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            again = lambda: (nullcontext(), _Still(self))  # noqa: E731
            return checkpoint(  # pyright: ignore[reportReturnType]
                compute, x, use_reentrant=False, preserve_rng_state=False, context_fn=again
            )
        return compute(x)


class ResidualBlock(nn.Module):
    """3x3, norm, LeakyReLU, 3x3, norm, plus the input (through 1x1 where the width changes), LeakyReLU.

    Arguments:
        inputs, outputs: channels.
        norm: one of `NORMS`.
        norm_place: one of `NORM_PLACES`; without a normalisation of activations both are the same.

    Source: IntroVAE (2018), App. B, normalises the sum ("after"); Soft-IntroVAE (2021) normalises before the addition.
    """

    def __init__(self, inputs: int, outputs: int, norm: str, norm_place: str = "before") -> None:
        super().__init__()
        one_of(NORM_PLACES, norm_place=norm_place)
        self.norm_place = norm_place
        # Where nothing normalises, the two summands start alike, and half of their sum's energy passes LeakyReLU.
        self.skip = make_conv(norm, inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()
        self.conv1 = make_conv(norm, inputs, outputs, 3, gain=GAIN)
        self.norm1 = make_norm(norm, outputs)
        self.conv2 = make_conv(norm, outputs, outputs, 3)
        self.norm2 = make_norm(norm, outputs)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv2(activated(self.norm1, self.conv1(x)))
        if self.norm_place == "after":
            return activated(self.norm2, inner.add_(self.skip(x)))
        return activated(self.norm2, inner, self.skip(x))


def use_gradient_checkpointing(network: nn.Module) -> None:
    """Let a network keep only its stages' inputs for the backward pass (see `Stages`).

    Raises:
        ConfigError: the network has no stages.
    """
    stages = [module for module in network.modules() if isinstance(module, Stages)]
    if not stages:
        raise ConfigError(f"{type(network).__name__} has no stages to forget: take gradient_checkpointing false")
    for module in stages:
        module.gradient_checkpointing = True
