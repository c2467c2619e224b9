"""How well samples in the plane follow a density: histogram distances, modes, energy distance, gnELBO."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from introvae.errors import DataError

BINS = 100


def histogram(x: Tensor, extent: float, bins: int = BINS) -> Tensor:
    """Counts `[bins, bins]` (float64) of the points `x: [N, 2]` in the square [-extent, extent]^2; others are left out.

    Raises:
        DataError: x is not `[N, 2]` or holds NaN.
    """
    _check_points(x)
    x = x.double().cpu()
    x = x[((x >= -extent) & (x <= extent)).all(dim=1)]
    cell = ((x + extent) * (bins / (2 * extent))).long().clamp(max=bins - 1)
    return torch.bincount(cell[:, 0] * bins + cell[:, 1], minlength=bins * bins).view(bins, bins).double()


def _check_points(*sets: Tensor) -> None:
    for x in sets:
        if x.ndim != 2 or x.shape[1] != 2:
            raise DataError(f"points have shape [N, 2], not {tuple(x.shape)}")
        if x.isnan().any():
            raise DataError("the points hold NaN: the model that made them has diverged")


def soft_introvae_kl_jsd(real: Tensor, fake: Tensor, extent: float) -> tuple[float, float]:
    """KL and JSD of two sets of points as Soft-IntroVAE's authors compute them (protocol "soft_introvae").

    Density histograms with 100 x 100 bins; KL = sum real (log real - log(fake + 1e-14)) / 100 and
    JSD = (KL(M || real) + KL(M || fake)) / 2 with M their mean: arguments swapped, in no unit, not bounded by ln 2.
    Comparable only with numbers of the same protocol and number of points (the authors' 5,000).

    Arguments:
        real, fake: `[N, 2]`.
        extent: half the side of the square.

    Raises:
        DataError: points that are not `[N, 2]` or hold NaN.

    Source: Soft-IntroVAE (2021), 2D experiments.

    Example:
        >>> x = torch.rand(100, 2, generator=torch.Generator().manual_seed(0))
        >>> max(soft_introvae_kl_jsd(x, x, extent=1.0)) < 1e-9
        True
    """
    densities = []
    for points in (real, fake):
        counts = histogram(points, extent)
        cell_area = (2 * extent / BINS) ** 2
        densities.append(counts / (counts.sum().clamp(min=1) * cell_area))
    p, q = densities
    mean = (p + q) / 2
    return _authors_kl(p, q), (_authors_kl(mean, p) + _authors_kl(mean, q)) / 2


def _authors_kl(p: Tensor, q: Tensor) -> float:
    return ((torch.special.xlogy(p, p) - p * (q + 1e-14).log()).sum() / 100).item()


def kl_jsd_nats(real: Tensor, fake: Tensor, extent: float) -> tuple[float, float]:
    """KL(real || fake) and Jensen-Shannon divergence of two sets of points, both in nats.

    Normalised histograms of 100 x 100 bins and one bin for everything outside; for the KL every bin of `fake` has half
    a point more, so that an empty bin costs a finite amount. The JSD needs no such help and is at most ln 2.

    Raises:
        DataError: points that are not `[N, 2]` or hold NaN.

    Example:
        >>> round(kl_jsd_nats(torch.zeros(9, 2), torch.ones(9, 2) / 2, extent=1.0)[1], 4)
        0.6931
    """
    p, q = (_with_outside(points, extent) for points in (real, fake))
    smoothed = (q + 0.5) / (q + 0.5).sum()
    p, q = p / p.sum(), q / q.sum()
    mean = (p + q) / 2
    return _kl(p, smoothed), (_kl(p, mean) + _kl(q, mean)) / 2


def _with_outside(points: Tensor, extent: float) -> Tensor:
    counts = histogram(points, extent).flatten()
    return torch.cat([counts, counts.new_tensor([len(points) - counts.sum()])])


def _kl(p: Tensor, q: Tensor) -> float:
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum().item()


def mode_coverage(x: Tensor, modes: Tensor, sigma: float) -> tuple[int, float]:
    """Number of modes found and share of points within 3 sigma of a mode.

    A mode counts as found when at least a tenth of its fair share of the points lies within 3 sigma of its centre.

    Arguments:
        x: points `[N, 2]`.
        modes: centres `[K, 2]`.
        sigma: standard deviation per axis. A perfect sampler has 1 - exp(-9/2) = 98.9 % within 3 sigma.

    Raises:
        DataError: points that are not `[N, 2]` or hold NaN.

    Example:
        >>> mode_coverage(torch.zeros(10, 2), torch.tensor([[0.0, 0.0], [1.0, 1.0]]), sigma=0.1)
        (1, 1.0)
    """
    _check_points(x)
    distance, nearest = torch.cdist(x.double().cpu(), modes.double()).min(dim=1)
    near = distance < 3 * sigma
    counts = torch.bincount(nearest[near], minlength=len(modes))
    found = int((counts >= 0.1 * len(x) / len(modes)).sum())
    return found, near.double().mean().item()


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Two-sample energy distance 2 E|x - y| - E|x - x'| - E|y - y'|, in the points' unit; unbiased, so may be below 0.

    Raises:
        DataError: points that are not `[N, 2]` or hold NaN.

    Source: Szekely & Rizzo 2013, Eq. 2.1 as a U-statistic.

    Example:
        >>> round(energy_distance(torch.zeros(5, 2), torch.tensor([[3.0, 4.0]] * 5)), 4)
        10.0
    """
    _check_points(x, y)
    x, y = x.double().cpu(), y.double().cpu()
    within = [torch.cdist(a, a).sum() / (len(a) * (len(a) - 1)) for a in (x, y)]
    return (2 * torch.cdist(x, y).mean() - within[0] - within[1]).item()


@torch.no_grad()
def gnelbo(
    negative_elbo: Callable[[Tensor], Tensor],
    data: Tensor,
    extent: float,
    grid: int = 1024,
    batch: int = 65536,
) -> float:
    """Grid-normalised negative ELBO of the data, as Soft-IntroVAE's authors compute it.

    -ELBO (betas 1, z the posterior's mean) on a grid over the square and on the data; each data value divided by the
    sum of all values; the mean over the data. Smaller is better; only numbers of one grid and data size compare.

    Arguments:
        negative_elbo: `[N, 2] -> [N]`.
        data: `[N, 2]`; the authors take 100 batches.
    """
    axis = torch.linspace(-extent, extent, grid)
    points = torch.cat([torch.cartesian_prod(axis, axis), data])
    values = torch.cat([negative_elbo(part).double().cpu() for part in points.split(batch)])
    return (values[-len(data) :] / values.sum()).mean().item()
