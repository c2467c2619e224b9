"""Which training samples are nearest to a sample: whether a model makes new images or copies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from introvae.errors import ConfigError, one_of, positive
from introvae.metrics.exact import same_space

DISTANCES = ("euclidean", "cosine")
PAIRS = 2**22
"""So many values are subtracted at a time where distances are computed exactly."""


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

    Of equally near rows the first one is the nearest, and a copy is at distance 0.

    Arguments:
        query: features `[N, ...]`, flattened here; pixels are features too.
        batches: the set's features, `[M, ...]` each, in order.
        k: how many neighbours.
        distance: "euclidean" or "cosine".

    Raises:
        ConfigError: an unknown distance, no k, a set with fewer than k rows, or other numbers of features.

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
        same_space(query.shape[1], features.shape[1])
        found = _distances(query, features, k, best[:, -1])
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


def _distances(query: Tensor, features: Tensor, k: int, best: Tensor) -> Tensor:
    """Distances `[N, M]` of those that can be among the k nearest, infinity for all others.

    A matrix product tells which those are, and no more: it rounds distances of 0 to others.

    Arguments:
        k: how many are looked for.
        best: each query's k-th nearest so far, `[N]`.
    """
    lengths = [points.square().sum(dim=1) for points in (query, features)]
    squares = lengths[0][:, None] + lengths[1] - 2 * query @ features.T
    unsure = 4 * query.shape[1] * torch.finfo(squares.dtype).eps * (lengths[0] + lengths[1].max())
    limit = best.square()
    if k <= len(features):
        limit = limit.minimum(squares.kthvalue(k, dim=1).values + unsure)
    places, rows = (~(squares > (limit + unsure)[:, None])).nonzero(as_tuple=True)
    found = torch.full_like(squares, torch.inf)
    at_once = max(1, PAIRS // query.shape[1])
    for place, row in zip(places.split(at_once), rows.split(at_once), strict=True):
        found[place, row] = (query[place] - features[row]).square().sum(dim=1).sqrt()
    return found


def _features(x: Tensor, distance: str) -> Tensor:
    x = x.detach().flatten(1).double().cpu()
    return torch.nn.functional.normalize(x, dim=1) if distance == "cosine" else x
