"""Class-conditional pairs: any encoder and decoder, told the class of each sample."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from introvae.errors import DataError
from introvae.networks import build_network

SIDE = 16
"""Largest side of a class's learned image: what is coarse tells a class, and the table of many classes stays small."""
WIDTH = 16
"""Most numbers that tell the decoder a class."""


class Conditional(nn.Module):
    """Base of both: a network, and a learned row of numbers for each class.

    Arguments:
        network: the encoder or decoder.
        labels: `[K, D]`, the rows at the start.
    """

    def __init__(self, network: nn.Module, labels: Tensor) -> None:
        super().__init__()
        self.network, self.labels = network, nn.Embedding.from_pretrained(labels, freeze=False)

    def rows(self, condition: Tensor) -> Tensor:
        """The rows `[N, D]` of class indices `[N]`, or the mixtures of rows with the shares `[N, K]`.

        Raises:
            DataError: an index that is no class (on a GPU, CUDA says so).
        """
        if condition.is_floating_point():
            with torch.autocast(condition.device.type, enabled=False):  # a label must not be rounded
                return condition.to(self.labels.weight.dtype) @ self.labels.weight
        try:
            return self.labels(condition)
        except IndexError as error:
            raise DataError(f"condition names a class outside of 0 to {self.labels.num_embeddings - 1}") from error


class ConditionalEncoder(Conditional):
    """`x: [N, ...]` and the class of each to mean and log-variance: encoder(x + the class's learned image).

    The image is small (at most 16 pixels a side) and is enlarged to the size of x; a vector has a vector. All of them
    are zero at the start. So the encoder itself need not know of classes, and judges whether x fits its class.

    Arguments:
        encoder: takes `[N, *shape]`, or, where it grows, images of other sides.
        classes: their number K.
        shape: of one sample.

    Example:
        >>> encoder, _ = build_network("tiny-conv", (1, 8, 8), latent_dim=4)
        >>> mean, logvar = ConditionalEncoder(encoder, 10, (1, 8, 8))(torch.rand(2, 1, 8, 8), torch.tensor([3, 7]))
        >>> mean.shape
        torch.Size([2, 4])
    """

    def __init__(self, encoder: nn.Module, classes: int, shape: tuple[int, ...]) -> None:
        self.small = (shape[0], *(min(side, SIDE) for side in shape[1:])) if len(shape) == 3 else tuple(shape)
        super().__init__(encoder, torch.zeros(classes, math.prod(self.small)))

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(x + self._image(condition, x.shape[2:]))

    def _image(self, condition: Tensor, size: torch.Size) -> Tensor:
        image = self.rows(condition).unflatten(1, self.small)
        if image.ndim != 4 or image.shape[2:] == size:
            return image
        # A growing network begins with images that may be smaller still: antialiased, every value is seen in them.
        return F.interpolate(image, size=size, mode="bilinear", antialias=size[0] < image.shape[2])


class ConditionalDecoder(Conditional):
    """`z: [N, Z]` and the class of each to `x: [N, ...]`: decoder([z, the class's learned numbers]).

    The numbers begin as draws from N(0, I), as the latents beside them are.

    Arguments:
        decoder: takes `[N, Z + width]`.
        classes: their number K.
        width: how many numbers.

    Source: Mirza and Osindero 2014, Conditional Generative Adversarial Nets, whose one-hot labels a first layer maps to
    such numbers; Sohn et al. 2015, Learning Structured Output Representation using Deep Conditional Generative Models,
    for a VAE whose two networks both get the condition.

    Example:
        >>> _, decoder = build_network("tiny-conv", (1, 8, 8), latent_dim=4 + 10)
        >>> ConditionalDecoder(decoder, 10, width=10)(torch.randn(2, 4), torch.tensor([3, 7])).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, decoder: nn.Module, classes: int, width: int) -> None:
        super().__init__(decoder, torch.randn(classes, width))

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        return self.network(torch.cat([z, self.rows(condition)], dim=1))


def build_conditional(
    name: str, shape: tuple[int, ...], latent_dim: int, classes: int, options: dict[str, Any] | None = None
) -> tuple[ConditionalEncoder, ConditionalDecoder]:
    """The class-conditional pair of any registered network; see `build_network`.

    Example:
        >>> encoder, decoder = build_conditional("mlp", (2,), latent_dim=2, classes=3)
        >>> decoder(torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])).shape
        torch.Size([5, 2])
    """
    width = min(classes, WIDTH)
    encoder, _ = build_network(name, shape, latent_dim, options)
    _, decoder = build_network(name, shape, latent_dim + width, options)
    return ConditionalEncoder(encoder, classes, shape), ConditionalDecoder(decoder, classes, width)
