"""Which training samples are nearest to a sample: whether a model makes new images or copies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from introvae.errors import ConfigError, one_of, positive

DISTANCES = ("euclidean", "cosine")


class Neighbours(NamedTuple):
    """The nearest rows of a set to each query.

    Arguments:
        rows: `[N, k]`, places in the set, the nearest first.
        distance: `[N, k]`: Euclidean, or 1 - cosine of the angle between the two feature vectors, in [0, 2].
    """

    rows: Tensor
    distance: Tensor


def nearest(query: Tensor, batches: Iterable[Tensor], k: int = 1, distance: str = "euclidean") -> Neighbours:
    """The k nearest rows to each query, in one pass over a set that need not fit in memory.

    Arguments:
        query: features `[N, ...]`, flattened here; pixels are features too.
        batches: the set's features, `[M, ...]` each, in order.
        k: how many neighbours.
        distance: "euclidean" or "cosine".

    Raises:
        ConfigError: an unknown distance, or a set with fewer than k rows.

    Source: IntroVAE (2018), Sec. 4.3, which looks for training images by pixel distance and by cosine similarity.

    Example:
        >>> set_of_points = torch.arange(10.0)[:, None]
        >>> nearest(torch.tensor([[3.2]]), set_of_points.split(4), k=2).rows
        tensor([[3, 4]])
    """
    positive(k=k)
    one_of(DISTANCES, distance=distance)
    query = _features(query, distance)
    best = torch.full((len(query), k), torch.inf, dtype=torch.float64)
    index = torch.full((len(query), k), -1)
    seen = 0
    for batch in batches:
        features = _features(batch, distance)
        found = torch.cdist(query, features, compute_mode="donot_use_mm_for_euclid_dist")
        rows = torch.arange(seen, seen + len(features)).expand(len(query), -1)
        seen += len(features)
        together = torch.cat([best, found], dim=1)
        best, order = together.sort(dim=1, stable=True)  # of equals the first one in the set
        index = torch.cat([index, rows], dim=1).gather(1, order)[:, :k]
        best = best[:, :k]
    if seen < k:
        raise ConfigError(f"a set of {seen} has no {k} nearest: take a smaller number, or more data")
    # Between unit vectors, |a - b|^2 = 2 (1 - cos).
    return Neighbours(index, best.square() / 2 if distance == "cosine" else best)


def _features(x: Tensor, distance: str) -> Tensor:
    x = x.detach().flatten(1).double().cpu()
    return torch.nn.functional.normalize(x, dim=1) if distance == "cosine" else x
