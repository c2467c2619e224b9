"""Building blocks of the convolutional networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from introvae.errors import ConfigError, one_of

NORMS = ("layer", "group", "batch", "none")


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each position: no statistics over the batch or over space, cheap on the CPU."""

    def forward(self, input: Tensor) -> Tensor:  # [N, C, H, W]
        return self.channels_last(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def channels_last(self, input: Tensor) -> Tensor:
        """The same for `[N, H, W, C]`."""
        weight, bias = self.weight, self.bias
        if not input.is_cuda or input.dtype == weight.dtype:
            return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
        # CUDA's autocast would hand on float32, at twice the memory; the kernel's sums are float32 either way.
        with torch.autocast("cuda", enabled=False):
            return F.layer_norm(input, self.normalized_shape, weight.to(input.dtype), bias.to(input.dtype), self.eps)


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


def activated(norm: nn.Module, x: Tensor, skip: Tensor | None = None) -> Tensor:
    """LeakyReLU(norm(x) + skip), `[N, C, H, W]`, computed in place of the normalisation's output; x may be overwritten.

    No backward pass reads that output, so it need not be kept: less memory, and up to a fifth less time on the CPU.
    """
    if not isinstance(norm, ChannelNorm):
        h = norm(x)
        return F.leaky_relu_(h if skip is None else h.add_(skip), 0.2)
    # In place of a view, autograd would copy: so not of the permuted result, but before it is permuted back.
    h = norm.channels_last(x.permute(0, 2, 3, 1))
    return F.leaky_relu_(h if skip is None else h.add_(skip.permute(0, 2, 3, 1)), 0.2).permute(0, 3, 1, 2)


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
        inner = activated(self.norm1, self.conv1(x))
        return activated(self.norm2, self.conv2(inner), self.skip(x))


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
