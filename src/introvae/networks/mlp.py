"""Fully connected pair for 2D data and vectors."""

from __future__ import annotations

from torch import Tensor, nn

from introvae.errors import ConfigError, positive


class MLPEncoder(nn.Module):
    """`x: [N, D]` to mean and log-variance, each `[N, Z]`, through `depth` hidden layers with ReLU."""

    def __init__(self, dim: int, latent_dim: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.layers = _mlp(dim, hidden, depth, 2 * latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.layers(x).chunk(2, dim=1)
        return mean, logvar


class MLPDecoder(nn.Module):
    """`z: [N, Z]` to `x: [N, D]`; the output is linear."""

    def __init__(self, dim: int, latent_dim: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.layers = _mlp(latent_dim, hidden, depth, dim)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


def build_mlp(
    shape: tuple[int, ...], latent_dim: int, *, hidden: int = 256, depth: int = 3
) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder for vectors of `shape` (D,).

    Arguments:
        hidden: width of the hidden layers.
        depth: number of hidden layers.

    Raises:
        ConfigError: the data are no vectors, or a number is not above 0.

    Source: Soft-IntroVAE (2021), 2D experiments: 3 hidden layers of 256.
    """
    if len(shape) != 1:
        raise ConfigError(f"network 'mlp' takes vectors, not images of shape {shape}: use network 'conv'")
    positive(hidden=hidden, depth=depth)
    return MLPEncoder(shape[0], latent_dim, hidden, depth), MLPDecoder(shape[0], latent_dim, hidden, depth)


def _mlp(inputs: int, hidden: int, depth: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in [inputs] + [hidden] * (depth - 1):
        layers += [nn.Linear(width, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))
