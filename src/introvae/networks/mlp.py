"""Fully connected pair for 2D data, vectors and small images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from introvae.errors import positive
from introvae.precision import unrounded, wide


class MLPEncoder(nn.Module):
    """`x: [N, ...]`, flattened, to mean and log-variance, each `[N, Z]`, through `depth` hidden layers with ReLU."""

    def __init__(self, shape: tuple[int, ...], latent_dim: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.layers = _mlp(math.prod(shape), hidden, depth, 2 * latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x.flatten(1)
        *body, head = self.layers
        for layer in body:
            h = layer(h)
        mean, logvar = unrounded(head, h).chunk(2, dim=1)
        return mean, logvar


class MLPDecoder(nn.Module):
    """`z: [N, Z]` to `x: [N, ...]`: linear output for vectors, a sigmoid's for images."""

    def __init__(self, shape: tuple[int, ...], latent_dim: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.shape = shape
        self.layers = _mlp(latent_dim, hidden, depth, math.prod(shape))

    def forward(self, z: Tensor) -> Tensor:
        x = wide(self.layers(z))
        return x if len(self.shape) == 1 else torch.sigmoid(x).unflatten(1, self.shape)


def build_mlp(
    shape: tuple[int, ...], latent_dim: int, *, hidden: int = 256, depth: int = 3
) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder for vectors of `shape` (D,), or for small images (C, H, W), whose pixels they flatten.

    Arguments:
        hidden: width of the hidden layers.
        depth: number of hidden layers.

    Raises:
        ConfigError: a number is not above 0.

    Source: Soft-IntroVAE (2021), 2D experiments: 3 hidden layers of 256.
    """
    positive(hidden=hidden, depth=depth)
    return MLPEncoder(shape, latent_dim, hidden, depth), MLPDecoder(shape, latent_dim, hidden, depth)


def _mlp(inputs: int, hidden: int, depth: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in [inputs] + [hidden] * (depth - 1):
        layers += [nn.Linear(width, hidden), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))
