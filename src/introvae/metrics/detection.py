"""How well scores tell what belongs to the data from what does not; a score is higher for what does not belong."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from introvae.errors import ConfigError, DataError, checked_seed, positive, whole

TAILS = (0.025, 0.975)
"""The quantiles between which 95 % lie: all intervals here are of that kind."""
METRICS = ("auroc", "aupr", "fpr_at_95_tpr")
ROC_POINTS = 500
"""A curve for drawing has no more points than this."""


class Interval(NamedTuple):
    """A measured value and its 95 % interval."""

    value: float
    low: float
    high: float


def detection_metrics(normal: Tensor, anomalous: Tensor, *, draws: int = 1000, seed: int = 0) -> dict[str, Interval]:
    """AUROC, AUPR and false-positive rate at 95 % true positives, each with its 95 % interval.

    "auroc" is the probability that an anomaly scores higher than a normal image (a tie counts half); "aupr" the
    average precision with anomalies as the positive class, whose chance level is the share of anomalies, so that only
    sets of one ratio compare; "fpr_at_95_tpr" the share of normal images that are flagged by the highest threshold
    that flags at least 95 % of the anomalies. The intervals are percentiles of a bootstrap that draws each class with
    replacement: of 100 images each they hold the true AUROC in 93 cases of 100. Where the classes do not overlap, or
    one is a few images, they are too narrow, for draws of these images say nothing of those that were never seen.

    Arguments:
        normal, anomalous: scores `[N]` and `[M]`, higher for what does not belong.
        draws: of the bootstrap.
        seed: of the draws.

    Raises:
        DataError: a set that is empty or holds NaN or infinite scores.

    Source: AUROC Hanley & McNeil 1982; false positives at 95 % true positives Liang et al. 2018; percentile intervals
    Efron & Tibshirani 1993, Ch. 13.

    Example:
        >>> found = detection_metrics(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.35, 0.8]))
        >>> {name: round(interval.value, 4) for name, interval in found.items()}
        {'auroc': 0.875, 'aupr': 0.8333, 'fpr_at_95_tpr': 0.25}
    """
    whole(draws=draws)
    positive(draws=draws)
    ranks = _ranks(_scores(normal, "normal"), _scores(anomalous, "anomalous"))
    generator = torch.Generator().manual_seed(checked_seed(seed))
    drawn = torch.stack([_summary(*_resampled(*ranks, generator)) for _ in range(draws)])
    low, high = drawn.quantile(torch.tensor(TAILS, dtype=drawn.dtype), dim=0).tolist()
    return dict(zip(METRICS, map(Interval, _summary(*ranks).tolist(), low, high), strict=True))


def roc_curve(normal: Tensor, anomalous: Tensor) -> tuple[Tensor, Tensor]:
    """False-positive and true-positive rates from (0, 0) to (1, 1), for drawing.

    Of more than `ROC_POINTS` points so many are kept that the line through them passes every other one within 0.003.

    Arguments:
        normal, anomalous: scores `[N]` and `[M]`, higher for what does not belong.

    Raises:
        DataError: a set that is empty or holds NaN or infinite scores.

    Example:
        >>> roc_curve(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0]))
        (tensor([0.0000, 0.0000, 0.5000, 1.0000], dtype=torch.float64),
         tensor([0.0000, 0.5000, 1.0000, 1.0000], dtype=torch.float64))
    """
    ranks = _ranks(_scores(normal, "normal"), _scores(anomalous, "anomalous"))
    fpr, tpr = (torch.cat([x.new_zeros(1), x.cumsum(0)]).double() / x.sum() for x in _counted(*ranks))
    if len(fpr) > ROC_POINTS:
        # Points at equal steps along the curve, and both ends of a straight piece that is longer than a step.
        along = fpr + tpr
        steps = torch.linspace(0, 2, ROC_POINTS // 2, dtype=along.dtype)
        before, after = torch.searchsorted(along, steps, right=True) - 1, torch.searchsorted(along, steps)
        kept = torch.cat([before, after]).unique()
        fpr, tpr = fpr[kept], tpr[kept]
    return fpr, tpr


@dataclass(frozen=True)
class Threshold:
    """A threshold that was set on scores of normal images: what scores above it is flagged.

    Arguments:
        value: the threshold, one of the scores.
        false_positive_rate: the one that was asked for, and is not exceeded on average over sets of normal images.
        low, high: 95 % interval of this threshold's own false-positive rate on new normal images.
        n: normal images that it was set on.
    """

    value: float
    false_positive_rate: float
    low: float
    high: float
    n: int

    def flags(self, scores: Tensor) -> Tensor:
        """Which scores lie above the threshold, bool of their shape."""
        return scores.double() > self.value


def calibrate(normal: Tensor, false_positive_rate: float = 0.05) -> Threshold:
    """The threshold that flags new normal images at a chosen rate, from scores of normal images.

    It is the j-th largest score with j = floor(rate * (n + 1)): one more image of the same law then lies above it with
    probability j / (n + 1), whatever the law. The rate of the threshold that this very set gave is unknown; it follows
    Beta(j, n + 1 - j), whose quantiles are the interval. Where other scores equal the threshold the rate is smaller,
    and the interval begins lower: at the quantile for as many scores as lie above it.

    The images must not be those that the model was trained on: they score lower than new ones.

    Arguments:
        normal: scores `[N]`, higher for what does not belong.
        false_positive_rate: share of normal images that may be flagged, above 0 and below 1.

    Raises:
        DataError: no scores, or NaN or infinite ones.
        ConfigError: a rate that is not between 0 and 1, or below 1 / (n + 1): no score of so few images is exceeded so
            rarely.

    Source: Wilks 1941, for the Beta law of the share beyond an order statistic; Vovk 2012, for the same as the
    conditional validity of a conformal predictor.

    Example:
        >>> found = calibrate(torch.arange(99.0), 0.05)
        >>> found.value, round(found.low, 3), round(found.high, 3)
        (94.0, 0.017, 0.1)
        >>> found.flags(torch.tensor([94.0, 95.0]))
        tensor([False,  True])
    """
    from scipy.special import betaincinv

    scores = _scores(normal, "normal").sort().values
    n, rate = len(scores), false_positive_rate
    if not 0 < rate < 1:
        raise ConfigError(f"false_positive_rate is {rate}: give a number above 0 and below 1")
    j = min(n, math.floor(rate * (n + 1) + 1e-9))  # 0.29 * 100 is a little less than 29
    if j == 0:
        raise ConfigError(
            f"a false-positive rate of {rate:g} cannot be set on {n} normal images: give at least "
            f"{math.ceil(1 / rate - 1e-9) - 1} of them, or a rate of at least {math.ceil(1e4 / (n + 1)) / 1e4:g}"
        )
    value = float(scores[n - j])
    above, equal = int((scores > value).sum()), int((scores == value).sum())
    lowest = j if equal == 1 else above
    low = float(betaincinv(lowest, n + 1 - lowest, TAILS[0])) if lowest else 0.0
    return Threshold(value, rate, low, float(betaincinv(j, n + 1 - j, TAILS[1])), n)


def _scores(scores: Tensor, kind: str) -> Tensor:
    if scores.ndim != 1:
        raise DataError(f"{kind} scores have shape [N], not {tuple(scores.shape)}")
    if len(scores) == 0:
        raise DataError(f"there are no {kind} scores: give at least one {kind} image")
    x = scores.detach().cpu().double()
    if bad := int((~x.isfinite()).sum()):
        raise DataError(f"{bad} of {len(x)} {kind} scores are NaN or infinite: leave these images out")
    return x


def _ranks(normal: Tensor, anomalous: Tensor) -> tuple[Tensor, Tensor]:
    """For each score the number of distinct scores above it."""
    values, places = torch.cat([normal, anomalous]).unique(return_inverse=True)
    return (len(values) - 1 - places).split([len(normal), len(anomalous)])


def _resampled(normal: Tensor, anomalous: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """As many of each, drawn with replacement."""
    first = normal[torch.randint(len(normal), (len(normal),), generator=generator)]
    return first, anomalous[torch.randint(len(anomalous), (len(anomalous),), generator=generator)]


def _counted(normal: Tensor, anomalous: Tensor) -> tuple[Tensor, Tensor]:
    """Normal and anomalous images of each rank, the highest score first."""
    size = 1 + max(int(normal.max()), int(anomalous.max()))
    return torch.bincount(normal, minlength=size), torch.bincount(anomalous, minlength=size)


def _summary(normal: Tensor, anomalous: Tensor) -> Tensor:
    """The `METRICS` of ranks; no score is sorted here, so that a thousand draws take seconds."""
    n, m = len(normal), len(anomalous)
    negatives, positives = _counted(normal, anomalous)
    false, true = negatives.cumsum(0), positives.cumsum(0)
    precision = true.double() / (true + false).clamp(min=1)
    reached = torch.searchsorted(true, (19 * m + 19) // 20)  # the first with 95 % of m, in whole numbers
    return torch.stack(
        [auroc_of_counts(negatives, positives), positives.double() @ precision / m, false[reached].double() / n]
    )


def auroc_of_counts(negatives: Tensor, positives: Tensor) -> Tensor:
    """AUROC from counts of each score, the highest first; exact up to the division, if there are below 2^53 pairs."""
    negatives, positives = negatives.double(), positives.double()
    lower = negatives.sum() - negatives.cumsum(0)
    return positives @ (lower + negatives / 2) / (negatives.sum() * positives.sum())
