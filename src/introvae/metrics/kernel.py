"""Kernel distance (KID): how far two sets of features are apart, without the assumption that they are Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor

from introvae.errors import ConfigError
from introvae.metrics.exact import exact, same_space

SUBSET, SUBSETS = 1000, 50
BLOCK = 1024
"""Rows of the kernel that are in memory at a time."""


def polynomial_mmd(x: Tensor, y: Tensor) -> float:
    """Squared maximum mean discrepancy of two sets of features `[N, F]` and `[M, F]`, kernel (x·y / F + 1)^3; unbiased,
    so it may be below 0.

    Raises:
        ConfigError: a set with fewer than two points; other numbers of features.

    Source: Binkowski et al. 2018, Sec. 4; the estimate is that of Gretton et al. 2012, Eq. 3.

    Example:
        >>> polynomial_mmd(torch.zeros(4, 2), torch.ones(4, 2))  # kernels 1, 8 and, between the sets, 1
        7.0
    """
    x, y = exact(x), exact(y)
    return _distances(x, y, x.new_ones(1, len(x)), y.new_ones(1, len(y)))[0]


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

    Returns:
        The distance of each pair of subsets, unbiased, so it may be below 0; in no unit.

    Raises:
        ConfigError: a set with fewer than two points; other numbers of features.

    Source: Binkowski et al. 2018, Sec. 4: 100 subsets of 1,000.

    Example:
        >>> x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
        >>> len(kernel_distances(x, x, torch.Generator(), subset=20, subsets=5)), len(kernel_distances(x, x, None))
        (5, 1)
    """
    if max(len(x), len(y)) <= subset:
        return [polynomial_mmd(x, y)]
    x, y = exact(x), exact(y)
    drawn = [[torch.randperm(len(points), generator=generator)[:subset] for points in (x, y)] for _ in range(subsets)]
    if max(len(x), len(y)) ** 2 > subsets * subset**2:  # subsets of large sets share few pairs
        return [polynomial_mmd(x[ours], y[theirs]) for ours, theirs in drawn]
    chosen = [points.new_zeros(subsets, len(points)) for points in (x, y)]
    for row, both in enumerate(drawn):
        for marks, rows in zip(chosen, both, strict=True):
            marks[row, rows] = 1
    return _distances(x, y, *chosen)


def _distances(x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor) -> list[float]:
    """The distance of each pair of subsets, whose points have a 1 in a row of `of_x` `[S, N]` and `of_y` `[S, M]`."""
    same_space(x.shape[1], y.shape[1])
    sums = []
    for points, marks in ((x, of_x), (y, of_y)):
        count = marks.sum(dim=1)
        if count.min() < 2:
            raise ConfigError(f"{int(count.min())} samples have no kernel distance: give at least two")
        sums.append((_sums(points, points, marks, marks) - marks @ _kernel_of_self(points)) / (count * (count - 1)))
    between = _sums(x, y, of_x, of_y) / (of_x.sum(dim=1) * of_y.sum(dim=1))
    return (sums[0] + sums[1] - 2 * between).tolist()


def _sums(x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor) -> Tensor:
    """`[S]`: the kernel summed over the pairs of each two subsets. No pair is computed twice, whoever shares it."""
    sums = x.new_zeros(len(of_x))
    for rows, marks in zip(x.split(BLOCK), of_x.split(BLOCK, dim=1), strict=True):
        sums += ((marks @ _kernel(rows, y)) * of_y).sum(dim=1)
    return sums


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return _cubed(x @ y.T, x.shape[1])


def _kernel_of_self(x: Tensor) -> Tensor:
    return _cubed(x.square().sum(dim=1), x.shape[1])


def _cubed(product: Tensor, features: int) -> Tensor:
    return (product / features + 1) ** 3
