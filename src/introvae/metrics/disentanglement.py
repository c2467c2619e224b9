"""Whether single latent dimensions stand for single factors of the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from introvae.errors import DataError, positive, whole

BINS = 20
"""Into so many equal parts of its range a latent dimension is cut."""


class Gap(NamedTuple):
    """The score, the mean over the factors, and what it is made of."""

    value: float
    gaps: dict[str, float]
    """Of each factor."""
    information: dict[str, Tensor]
    """Mutual information of each latent dimension with each factor, `[Z]`, as a share of the factor's entropy."""


def mutual_information_gap(latents: Tensor, factors: Mapping[str, Tensor], bins: int = BINS) -> Gap:
    """How much more the most telling latent dimension tells of a factor than the second one, as a share of the
    factor's entropy, averaged over the factors: 1 where each has a dimension of its own, 0 where none has.

    Few samples raise the mutual information of dimensions that tell nothing: about (bins - 1)(values - 1) / 2 N nats.

    Arguments:
        latents: `[N, Z]`, posterior means.
        factors: by name, the value of each sample as an integer, int64 `[N]`.
        bins: equal parts of each dimension's range.

    Raises:
        ConfigError: bins is no whole number above 0.
        DataError: fewer than two samples or dimensions, latents that are not finite, a factor of another length or of
            a single value.

    Source: Chen et al. 2018 (Isolating Sources of Disentanglement in VAEs), Eq. 6; the histogram of 20 bins: Locatello
    et al. 2019 (Challenging Common Assumptions), App. C.

    Example:
        >>> shape, colour = torch.arange(64) % 2, torch.arange(64) // 2 % 4
        >>> latents = torch.stack([shape, colour], dim=1).float()
        >>> mutual_information_gap(latents, {"shape": shape, "colour": colour}).value
        1.0
    """
    whole(bins=bins)
    positive(bins=bins)
    if latents.ndim != 2 or len(latents) < 2 or latents.shape[1] < 2:
        raise DataError(f"latents of shape {tuple(latents.shape)} have no gap: give two samples and dimensions")
    if not bool(latents.isfinite().all()):
        raise DataError("latents hold NaN or infinite values: leave those samples out")
    if not factors:
        raise DataError("there are no factors: give at least one")
    binned = _binned(latents.double(), bins)
    gaps, information = {}, {}
    for name, values in factors.items():
        if values.shape != (len(latents),):
            raise DataError(f"factor {name!r} has shape {tuple(values.shape)}: give a value for each of {len(latents)}")
        index = values.unique(return_inverse=True)[1]
        entropy = _entropy(index.bincount())
        if entropy == 0:
            raise DataError(f"factor {name!r} has a single value: leave it out")
        shares = torch.stack([_mutual_information(column, index) for column in binned.T]) / entropy
        first, second = shares.topk(2).values
        gaps[name], information[name] = float(first - second), shares
    return Gap(sum(gaps.values()) / len(gaps), gaps, information)


def _binned(latents: Tensor, bins: int) -> Tensor:
    low, high = latents.amin(dim=0), latents.amax(dim=0)
    width = (high - low).clamp(min=torch.finfo(latents.dtype).tiny)
    return ((latents - low) / width * bins).long().clamp(max=bins - 1)


def _entropy(counts: Tensor) -> Tensor:
    p = counts[counts > 0].double() / counts.sum()
    return -(p * p.log()).sum()


def _mutual_information(a: Tensor, b: Tensor) -> Tensor:
    joint = (a * (int(b.max()) + 1) + b).bincount()
    return (_entropy(a.bincount()) + _entropy(b.bincount()) - _entropy(joint)).clamp(min=0)
