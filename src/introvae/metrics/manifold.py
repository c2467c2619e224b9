"""Precision, recall, density and coverage: two sets of points compared by the neighbourhoods of their points."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from introvae.errors import ConfigError
from introvae.metrics.exact import exact, same_space

NEIGHBOUR, DENSITY_NEIGHBOUR = 3, 5
"""The neighbours that give the radii, as in the papers: for precision and recall, for density and coverage."""
BLOCK = 1024
"""So many points at a time are compared with all others, which bounds the memory."""


class Manifold:
    """A set of points and the distance of each to its k-th neighbour in the set: `radii[k]`, `[N]`, Euclidean.

    Arguments:
        points: features `[N, ...]`, flattened here; pixels are features too. Distances are computed on their device.
        neighbours: the values of k.
        name: of the set, for messages.

    Raises:
        ConfigError: no more than k points.

    Source: Kynkaanniemi et al. 2019, Eq. 1.

    Example:
        >>> Manifold(torch.tensor([[0.0], [1.0], [3.0]]), [1]).radii[1]
        tensor([1., 1., 2.], dtype=torch.float64)
    """

    def __init__(self, points: Tensor, neighbours: list[int], name: str = "given") -> None:
        self.points = exact(points.flatten(1))
        if len(points) <= (k := max(neighbours)):
            raise ConfigError(f"{len(points)} {name} samples have no {k}-th neighbour: give more than {k}")
        # The point itself is its own nearest; its copies are neighbours like others.
        nearest = [distances.topk(k + 1, largest=False).values for _, distances in self.distances_from(self.points)]
        self.radii: dict[int, Tensor] = {k: torch.cat(nearest)[:, k] for k in neighbours}

    def distances_from(self, points: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Distances `[B, N]` of some rows of `points` to all points of the set, rows after rows."""
        for start in range(0, len(points), BLOCK):
            rows = slice(start, min(start + BLOCK, len(points)))
            # The faster form by a matrix product would round distances of 0 to others, and move points over borders.
            yield rows, torch.cdist(points[rows], self.points, compute_mode="donot_use_mm_for_euclid_dist")


class Neighbourhoods(NamedTuple):
    """How two sets lie to each other, by `neighbourhoods`.

    Arguments:
        precision: share of fakes near real points, in [0, 1].
        recall: share of real points near fakes, in [0, 1].
        density: how densely real points surround fakes; may be above 1. None where only the first two were asked for.
        coverage: share of real points with a fake beside, in [0, 1]; None likewise.
    """

    precision: float
    recall: float
    density: float | None = None
    coverage: float | None = None


def neighbourhoods(
    real: Manifold, fake: Manifold, k: int = NEIGHBOUR, density_k: int | None = DENSITY_NEIGHBOUR
) -> Neighbourhoods:
    """Precision, recall, density and coverage of fakes, each distance computed once.

    Precision is the share of fakes inside a ball around a real point that reaches to that point's k-th real neighbour;
    recall the share of real points inside such a ball around a fake. Density is the mean number of real balls around a
    fake, divided by k: 1 where both follow one law, and above 1 where fakes crowd in the densest places. Coverage is
    the share of real balls with a fake in them. An odd real point has a large ball: it raises precision, and neither
    density nor coverage.

    Arguments:
        real, fake: with radii of neighbour `k`; the real one of `density_k` too. On one device.
        density_k: the neighbour for density and coverage, or None for neither.

    Raises:
        ConfigError: a set without radii of its neighbour; other numbers of features.

    Source: precision and recall Kynkaanniemi et al. 2019, Eqs. 1-3; density and coverage Naeem et al. 2020, Eqs. 3-4.

    Example:
        >>> points = torch.arange(10.0)[:, None]
        >>> neighbourhoods(Manifold(points, [1, 2]), Manifold(points[:5], [1]), k=1, density_k=2)
        Neighbourhoods(precision=1.0, recall=0.6, density=1.5, coverage=0.6)
    """
    same_space(real.points.shape[1], fake.points.shape[1])
    for points, needed in ((real, k), (fake, k), (real, density_k)):
        if needed is not None and needed not in points.radii:
            raise ConfigError(
                f"a set has radii of the neighbours {list(points.radii)}, where {needed} is needed: make it as "
                f"Manifold(points, [{needed}])"
            )
    device = real.points.device
    inside = torch.zeros(len(fake.points), dtype=torch.bool, device=device)
    reached, covered = (torch.zeros(len(real.points), dtype=torch.bool, device=device) for _ in range(2))
    balls = 0
    for rows, distances in real.distances_from(fake.points):
        inside[rows] = (distances <= real.radii[k]).any(dim=1)
        reached |= (distances <= fake.radii[k][rows, None]).any(dim=0)
        if density_k is not None:
            within = distances <= real.radii[density_k]
            covered |= within.any(dim=0)
            balls += int(within.sum())
    precision, recall, coverage = (hits.double().mean().item() for hits in (inside, reached, covered))
    if density_k is None:
        return Neighbourhoods(precision, recall)
    return Neighbourhoods(precision, recall, balls / (density_k * len(fake.points)), coverage)


def precision_recall(real: Tensor, fake: Tensor, k: int = NEIGHBOUR) -> tuple[float, float]:
    """Share of fakes inside the real manifold (precision) and of real images inside the fakes' (recall).

    Arguments:
        real, fake: features `[N, ...]` and `[M, ...]`, flattened here; pixels are features too.
        k: which neighbour gives the radius.

    Raises:
        ConfigError: a set with no more than k points; other numbers of features.

    Source: Kynkaanniemi et al. 2019, Eqs. 1-3.

    Example:
        >>> points = torch.arange(10.0)[:, None]
        >>> precision_recall(points, points[:5], k=1)
        (1.0, 0.6)
    """
    found = neighbourhoods(Manifold(real, [k], "real"), Manifold(fake, [k], "fake"), k, None)
    return found.precision, found.recall


def expected_coverage(real: int, fake: int, k: int = DENSITY_NEIGHBOUR) -> float:
    """Mean coverage of `fake` points of the same (continuous) law as `real` ones: below 1.

    Source: Naeem et al. 2020, Lemma 2.

    Example:
        >>> round(expected_coverage(10_000, 10_000), 4)
        0.9688
    """
    missed = 1.0
    for i in range(1, k + 1):
        missed *= (real - i) / (real + fake - i)
    return 1 - missed
