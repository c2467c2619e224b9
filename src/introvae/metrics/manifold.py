"""Precision and recall by k-nearest-neighbour manifolds."""

from __future__ import annotations

import torch
from torch import Tensor

from introvae.errors import ConfigError


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of fakes inside the real manifold (precision) and of real images inside the fakes' (recall).

    The manifold of a set is the union of balls around its points, each reaching to the point's k-th neighbour in the
    set.

    Arguments:
        real, fake: features `[N, ...]` and `[M, ...]`, flattened here; pixels are features too.
        k: which neighbour gives the radius.

    Raises:
        ConfigError: a set with no more than k points.

    Source: Kynkaanniemi et al. 2019, Eqs. 1-3.

    Example:
        >>> points = torch.arange(10.0)[:, None]
        >>> precision_recall(points, points[:5], k=1)
        (1.0, 0.6)
    """
    real, fake = real.flatten(1).double(), fake.flatten(1).double()
    for name, x in (("real", real), ("fake", fake)):
        if len(x) <= k:
            raise ConfigError(f"{len(x)} {name} samples have no {k}-th neighbour: give more than {k}")
    distances = torch.cdist(fake, real, compute_mode="donot_use_mm_for_euclid_dist")
    precision = (distances <= radii(real, k)).any(dim=1).double().mean().item()
    recall = (radii(fake, k) >= distances.T).any(dim=1).double().mean().item()
    return precision, recall


def radii(x: Tensor, k: int) -> Tensor:
    """Distance `[N]` of each point of `x: [N, D]` to its k-th neighbour in the set."""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").kthvalue(k + 1).values
