"""Fully connected pair for 2D data, vectors and small images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from introvae.errors import not_negative, positive
from introvae.precision import unrounded, wide


class MLPEncoder(nn.Module):
    """`x: [N, ...]`, flattened, to mean and log-variance, each `[N, Z]`, through `depth` hidden layers with ReLU."""

    def __init__(
        self, shape: tuple[int, ...], latent_dim: int, hidden: int, depth: int, waves: int = 0, frequency: float = 0.0
    ) -> None:
        super().__init__()
        inputs = math.prod(shape)
        self.features = Waves(inputs, waves, frequency) if waves else nn.Identity()
        self.layers = _mlp(inputs + 2 * waves, hidden, depth, 2 * latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.features(x.flatten(1))
        *body, head = self.layers
        for layer in body:
            h = layer(h)
        mean, logvar = unrounded(head, h).chunk(2, dim=1)
        return mean, logvar


class MLPDecoder(nn.Module):
    """`z: [N, Z]` to `x: [N, ...]`: linear output for vectors, a sigmoid's for images."""

    def __init__(
        self, shape: tuple[int, ...], latent_dim: int, hidden: int, depth: int, waves: int = 0, frequency: float = 0.0
    ) -> None:
        super().__init__()
        self.shape = shape
        self.features = Waves(latent_dim, waves, frequency) if waves else nn.Identity()
        self.layers = _mlp(latent_dim + 2 * waves, hidden, depth, math.prod(shape))

    def forward(self, z: Tensor) -> Tensor:
        x = wide(self.layers(self.features(z)))
        return x if len(self.shape) == 1 else torch.sigmoid(x).unflatten(1, self.shape)


class Waves(nn.Module):
    """Random Fourier features: `x: [N, D]` to `[N, D + 2 waves]`, x beside the sines and cosines of random projections.

    A network with ReLU learns what is smooth first; on a few coordinates it takes long to bend as sharply as the edges
    of a narrow mode. The projections are fixed and saved with the weights.

    Arguments:
        inputs: D.
        waves: number of projections.
        frequency: their standard deviation, in cycles for each unit of x.

    Source: Tancik et al. 2020, Fourier Features Let Networks Learn High Frequency Functions in Low Dimensional Domains.
    """

    def __init__(self, inputs: int, waves: int, frequency: float) -> None:
        super().__init__()
        self.projection: Tensor
        self.register_buffer("projection", 2 * math.pi * frequency * torch.randn(inputs, waves))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # rounded angles would be noise
            angles = wide(x) @ self.projection
        return torch.cat([x, angles.sin(), angles.cos()], dim=1)


def build_mlp(
    shape: tuple[int, ...],
    latent_dim: int,
    *,
    hidden: int = 256,
    depth: int = 3,
    waves: int = 0,
    encoder_frequency: float = 0.3,
    decoder_frequency: float = 0.5,
) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder for vectors of `shape` (D,), or for small images (C, H, W), whose pixels they flatten.

    Arguments:
        hidden: width of the hidden layers.
        depth: number of hidden layers.
        waves: random Fourier features of either network's input, which let a small network draw sharp edges in the
            plane; 0 for none, as published.
        encoder_frequency: of the encoder's, in cycles for each unit of x.
        decoder_frequency: of the decoder's, in cycles for each unit of z.

    Raises:
        ConfigError: a number is not above 0.

    Source: Soft-IntroVAE (2021), 2D experiments: 3 hidden layers of 256.
    """
    positive(hidden=hidden, depth=depth, encoder_frequency=encoder_frequency, decoder_frequency=decoder_frequency)
    not_negative(waves=waves)
    return (
        MLPEncoder(shape, latent_dim, hidden, depth, waves, encoder_frequency),
        MLPDecoder(shape, latent_dim, hidden, depth, waves, decoder_frequency),
    )


def _mlp(inputs: int, hidden: int, depth: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in [inputs] + [hidden] * (depth - 1):
        layers += [nn.Linear(width, hidden), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))
