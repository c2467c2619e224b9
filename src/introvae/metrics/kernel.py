"""Kernel distance (KID): how far two sets of features are apart, without the assumption that they are Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor

from introvae.errors import ConfigError
from introvae.metrics.exact import exact

SUBSET, SUBSETS = 1000, 50


def polynomial_mmd(x: Tensor, y: Tensor) -> float:
    """Squared maximum mean discrepancy of two sets of features `[N, F]` and `[M, F]`, kernel (x·y / F + 1)^3; unbiased,
    so it may be below 0.

    Raises:
        ConfigError: a set with fewer than two points.

    Source: Binkowski et al. 2018, Sec. 4; the estimate is that of Gretton et al. 2012, Eq. 3.

    Example:
        >>> polynomial_mmd(torch.zeros(4, 2), torch.ones(4, 2))  # kernels 1, 8 and, between the sets, 1
        7.0
    """
    for points in (x, y):
        if len(points) < 2:
            raise ConfigError(f"{len(points)} samples have no kernel distance: give at least two")
    x, y = exact(x), exact(y)
    within = [(_kernel(a, a).sum() - _kernel_of_self(a).sum()) / (len(a) * (len(a) - 1)) for a in (x, y)]
    return float(within[0] + within[1] - 2 * _kernel(x, y).mean())


def kernel_distances(
    x: Tensor, y: Tensor, generator: torch.Generator, subset: int = SUBSET, subsets: int = SUBSETS
) -> list[float]:
    """The kernel distance of random subsets of two sets of features: their mean is the KID, their spread its error.

    A set that is no larger than a subset is taken whole; where both are, there is one distance.

    Arguments:
        x, y: features `[N, F]` and `[M, F]`.
        generator: of the subsets, which are drawn without replacement; on the CPU.
        subset: points of each subset.
        subsets: how many.

    Raises:
        ConfigError: a set with fewer than two points.

    Source: Binkowski et al. 2018, Sec. 4: 100 subsets of 1,000.

    Example:
        >>> x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
        >>> len(kernel_distances(x, x, torch.Generator(), subset=20, subsets=5)), len(kernel_distances(x, x, None))
        (5, 1)
    """
    if max(len(x), len(y)) <= subset:
        return [polynomial_mmd(x, y)]
    return [
        polynomial_mmd(*(points[torch.randperm(len(points), generator=generator)[:subset]] for points in (x, y)))
        for _ in range(subsets)
    ]


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return _cubed(x @ y.T, x.shape[1])


def _kernel_of_self(x: Tensor) -> Tensor:
    return _cubed(x.square().sum(dim=1), x.shape[1])


def _cubed(product: Tensor, features: int) -> Tensor:
    return (product / features + 1) ** 3
