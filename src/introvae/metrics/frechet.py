"""Fréchet distance between Gaussians fitted to features."""

from __future__ import annotations

import torch
from torch import Tensor

from introvae.errors import ConfigError, DataError


class GaussianStatistics:
    """Mean and covariance of features, from sums in float64: batch by batch, in any order.

    Arguments:
        dim: number of features.

    Example:
        >>> statistics = GaussianStatistics(2)
        >>> statistics.update(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
        >>> statistics.mean, statistics.covariance
        (tensor([1., 2.], dtype=torch.float64), tensor([[2., 4.],
                [4., 8.]], dtype=torch.float64))
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.shift: Tensor | None = None  # subtracted before squaring, or a large mean would eat the digits
        self.total = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Take features `[N, F]` into account.

        Raises:
            DataError: NaN or infinite values.
        """
        x = features.detach().cpu().double()
        if not bool(x.isfinite().all()):
            raise DataError("the features hold NaN or infinite values: the model that made the images has diverged")
        if self.shift is None:
            self.shift = x.mean(dim=0)
        x = x - self.shift
        self.count += len(x)
        self.total += x.sum(dim=0)
        outer = x.T @ x
        self.outer += (outer + outer.T) / 2  # some libraries round the two halves differently

    @property
    def mean(self) -> Tensor:
        """`[F]`."""
        return self.total / self.count + (0 if self.shift is None else self.shift)

    @property
    def covariance(self) -> Tensor:
        """`[F, F]`, unbiased.

        Raises:
            ConfigError: fewer than two samples.
        """
        if self.count < 2:
            raise ConfigError(f"{self.count} samples have no covariance: give at least two")
        mean = self.total / self.count
        return (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """Squared Fréchet distance |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) between two Gaussians.

    The trace of the root comes from the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric, so that no complex
    numbers appear. A covariance of fewer samples than features is singular, which does no harm.

    Source: Dowson & Landau 1982, Eq. 4; with Inception features it is the FID of Heusel et al. 2017.

    Example:
        >>> sets = [GaussianStatistics(1), GaussianStatistics(1)]
        >>> sets[0].update(torch.tensor([[0.0], [2.0]])); sets[1].update(torch.tensor([[3.0], [5.0]]))
        >>> frechet_distance(*sets)
        9.0
    """
    first, second = a.covariance, b.covariance
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    inner = root @ second @ root
    shared = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + first.trace() + second.trace() - 2 * shared
    return max(0.0, float(distance))
