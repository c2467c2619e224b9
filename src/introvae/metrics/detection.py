"""How well scores tell what belongs to the data from what does not; a score is higher for what does not belong."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from introvae.errors import CheckpointError, ConfigError, DataError, checked_seed, positive, whole
from introvae.metrics.frechet import GaussianStatistics

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


class Mahalanobis:
    """Distance of latents to those of normal images, in units of their spread in each direction.

    Mean and covariance come from sums in float64 that are updated batch by batch, for any number of images. The
    covariance is (1 - s) C + s (tr C / Z) I with C the unbiased one, so that it can be inverted where the images are
    few for the dimensions; the weight s is the one of least expected error, which vanishes with many images.

    Arguments:
        dim: number Z of latent dimensions.
        shrinkage: the weight s from 0 to 1, or None for that of Ledoit and Wolf.

    Raises:
        ConfigError: a shrinkage outside [0, 1].

    Source: Ledoit & Wolf 2004, Sec. 3; distances of features as scores Lee et al. 2018, Eq. 2 (for one class).

    Example:
        >>> normal = Mahalanobis(2)
        >>> normal.update(torch.randn(10_000, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 3.0]))
        >>> normal.distances(torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 6.0]])).round(decimals=1)
        tensor([0., 2., 2.], dtype=torch.float64)
    """

    def __init__(self, dim: int, shrinkage: float | None = None) -> None:
        whole(dim=dim)
        positive(dim=dim)
        if shrinkage is not None and not 0 <= shrinkage <= 1:
            raise ConfigError(f"shrinkage is {shrinkage}: give a number from 0 to 1, or None for Ledoit and Wolf's")
        self.dim, self._given = dim, shrinkage
        self._sums = GaussianStatistics(dim)
        # Sums of |y|^2 y and |y|^4, y a latent less the sums' shift: how far products of latents scatter.
        self._third, self._fourth = torch.zeros(dim, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        self._whitening: Tensor | None = None

    @property
    def count(self) -> int:
        """Latents seen."""
        return self._sums.count

    @property
    def mean(self) -> Tensor:
        """`[Z]`."""
        return self._sums.mean

    @property
    def shrinkage(self) -> float:
        """The weight of the multiple of I in the covariance."""
        return self._ledoit_wolf() if self._given is None else self._given

    @property
    def covariance(self) -> Tensor:
        """`[Z, Z]`, after shrinkage.

        Raises:
            ConfigError: fewer than two latents were seen.
        """
        covariance, s = self._sums.covariance, self.shrinkage
        return (1 - s) * covariance + s * covariance.trace() / self.dim * torch.eye(self.dim, dtype=torch.float64)

    def update(self, latents: Tensor) -> None:
        """Take latents `[N, Z]` of normal images into account.

        Raises:
            DataError: they are of another shape, or NaN or infinite.
        """
        x = self._checked(latents)
        if len(x) == 0:
            return
        self._sums.update(x)
        self._whitening = None
        assert self._sums.shift is not None
        y = x - self._sums.shift
        squares = y.square().sum(dim=1)
        self._third += squares @ y
        self._fourth += squares.square().sum()

    def distances(self, latents: Tensor) -> Tensor:
        """Distances `[N]` of latents `[N, Z]`, float64. Squared, those of Gaussian latents follow chi^2 with Z degrees.

        Raises:
            ConfigError: fewer than two latents of normal images were seen.
            DataError: the normal latents do not vary in all directions, or these have another shape or are not finite.
        """
        x = self._checked(latents)
        if (whitening := self._whitening) is None:
            values, vectors = torch.linalg.eigh(self.covariance)
            if float(values[0]) <= self.dim * torch.finfo(values.dtype).eps * float(values[-1]):
                raise DataError(
                    f"{self.count} latents do not vary in all {self.dim} dimensions: give more normal images, or a "
                    "shrinkage above 0"
                )
            whitening = self._whitening = vectors / values.sqrt()
        return ((x - self.mean) @ whitening).square().sum(dim=1).sqrt()

    def state_dict(self) -> dict[str, Tensor]:
        """All that was seen, as tensors; `load_state_dict` of one with the same settings goes on from there."""
        s = self._sums
        state = {"shift": torch.zeros_like(s.total) if s.shift is None else s.shift, "total": s.total, "outer": s.outer}
        state |= {"third": self._third, "fourth": self._fourth, "count": torch.tensor(s.count)}
        return {name: x.clone() for name, x in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace what was seen by what `state_dict` gave.

        Raises:
            CheckpointError: keys or shapes are not those of this number of dimensions.
        """
        wanted = {name: tuple(x.shape) for name, x in self.state_dict().items()}
        if {name: tuple(x.shape) for name, x in state.items()} != wanted:
            raise CheckpointError(
                f"these are not the sums of a Mahalanobis distance in {self.dim} dimensions: fit anew"
            )
        s = self._sums
        s.count = int(state["count"])
        s.shift = state["shift"].clone() if s.count else None
        s.total, s.outer = state["total"].clone(), state["outer"].clone()
        self._third, self._fourth = state["third"].clone(), state["fourth"].clone()
        self._whitening = None

    def _checked(self, latents: Tensor) -> Tensor:
        if latents.ndim != 2 or latents.shape[1] != self.dim:
            raise DataError(f"latents have shape [N, {self.dim}], not {tuple(latents.shape)}")
        x = latents.detach().cpu().double()
        if not bool(x.isfinite().all()):
            raise DataError("the latents hold NaN or infinite values: the model that made them has diverged")
        return x

    def _ledoit_wolf(self) -> float:
        n, d = self.count, self._sums.total / max(1, self.count)  # d is the mean less the shift
        s = self._sums.covariance * (n - 1) / n
        # The sum of |y - d|^4, multiplied out.
        outer, square = self._sums.outer, d.square().sum()
        fourth = self._fourth - 4 * self._third @ d + 4 * d @ outer @ d + 2 * square * outer.trace() - 3 * n * square**2
        scatter = s.square().sum() - s.trace().square() / self.dim
        error = (fourth / n - s.square().sum()) / n
        return float((error / scatter).clamp(0, 1)) if error > 0 and scatter > 0 else 0.0


MANTISSA = 12
"""Bits of a float32's mantissa that a bin keeps: a bin is at most 2^-12 of its score wide."""
_STEP = 23 - MANTISSA
_BINS = (0x7F800000 >> _STEP) + 1  # the bit pattern of infinity ends the last one


class BestDice(NamedTuple):
    """The largest Dice coefficient of all thresholds.

    Arguments:
        value: the coefficient.
        threshold: pixels that score above it are flagged.
        error: by at most so much a threshold between the bins' borders could be better.
    """

    value: float
    threshold: float
    error: float


class PixelCurve:
    """How well maps of scores find marked pixels, over all pixels of any number of images in 17 MB.

    Scores are counted in about a million bins, whose borders are the float32 numbers with 12 bits of mantissa: a bin
    is at most 2^-12 of its score wide (above 1e-38), and 0 has one of its own. What is measured at a border is exact.
    Pairs of a marked and an unmarked pixel in one bin count half in the AUROC, which is therefore off by at most half
    their share: `auroc_error`, for the given maps. It is small unless scores differ by less than their 4,000th part.
    Scores in float64 are rounded to float32 first.

    Source: AUROC as in `detection_metrics`; Dice 1945.

    Example:
        >>> curve = PixelCurve()
        >>> curve.update(torch.tensor([[[0.1, 0.2], [0.3, 0.4]]]), torch.tensor([[[False, True], [False, True]]]))
        >>> curve.auroc, curve.auroc_error, curve.dice(0.35)
        (0.75, 0.0, 0.6666666666666666)
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2, _BINS, dtype=torch.int64)  # of unmarked and of marked pixels

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Take the scores of some images into account.

        Arguments:
            maps: scores `[N, H, W]`, not negative, higher for what does not belong.
            masks: `[N, H, W]`, bool, True where something does not belong.

        Raises:
            DataError: shapes that differ, masks that are not bool, scores that are negative, NaN or too large.
        """
        if maps.ndim != 3 or maps.shape != masks.shape:
            raise DataError(f"maps {tuple(maps.shape)} and masks {tuple(masks.shape)} must both have shape [N, H, W]")
        if masks.dtype != torch.bool:
            raise DataError(f"masks are bool, not {masks.dtype}: compare them with a number first")
        x = maps.detach().cpu().float().flatten()
        if not bool(((x >= 0) & x.isfinite()).all()):
            raise DataError("maps hold scores that are negative, NaN or above 3e38: give errors or distances")
        places = _bins(x).long() + _BINS * masks.detach().cpu().flatten()
        self.counts.view(-1).index_add_(0, places, torch.ones_like(places))

    @property
    def auroc(self) -> float:
        """Probability that a marked pixel scores higher than an unmarked one.

        Raises:
            DataError: no pixel is marked, or all are.
        """
        return float(_auroc(*self._both().flip(1)))

    @property
    def auroc_error(self) -> float:
        """By so much at most `auroc` differs from that of the scores themselves.

        Raises:
            DataError: no pixel is marked, or all are.
        """
        unmarked, marked = self._both()
        shared = unmarked[1:] @ marked[1:]  # in 0's bin all are equal, and count half by right
        return float(shared / (unmarked.sum() * marked.sum()) / 2)

    def dice(self, threshold: float) -> float:
        """Dice coefficient 2 TP / (2 TP + FP + FN) of the pixels that score above a threshold, over all images at once.

        The threshold is first rounded up to a bin's border, by no more than its 4,000th part.

        Raises:
            ConfigError: a negative threshold.
            DataError: no pixel is marked.
        """
        if not threshold >= 0:
            raise ConfigError(f"threshold is {threshold}: scores of pixels are not negative, give at least 0")
        place = int(_bins(torch.tensor([min(threshold, torch.finfo(torch.float32).max)])))
        false, true = self.counts[:, place + 1 :].sum(dim=1).tolist()
        return 2 * true / (self._marked() + true + false)

    @property
    def best_dice(self) -> BestDice:
        """The best Dice coefficient of all thresholds from 0, the lowest of them, and what it may have missed.

        Raises:
            DataError: no pixel is marked.
        """
        marked = self._marked()
        below = self.counts.cumsum(dim=1)
        false, true = (below[:, -1:] - below).double()  # above each bin's upper border
        dice = 2 * true / (marked + true + false)
        place = int(dice.argmax())
        # At best a threshold inside a bin flags all its marked pixels and none of the others. None is inside 0's.
        most = true[1:] + self.counts[1, 1:]
        bound, value = float((2 * most / (marked + most + false[1:])).max()), float(dice[place])
        border = torch.tensor([place << _STEP], dtype=torch.int32).view(torch.float32)
        return BestDice(value, float(border), max(0.0, bound - value))

    def _marked(self) -> int:
        """Marked pixels, if there are."""
        if not (marked := int(self.counts[1].sum())):
            raise DataError("all masks are empty: give images with marked pixels")
        return marked

    def _both(self) -> Tensor:
        """The counts in float64, if both kinds of pixels are there."""
        unmarked, marked = self.counts.sum(dim=1).tolist()
        if not marked or not unmarked:
            kind = "empty" if not marked else "full"
            raise DataError(f"all masks are {kind}: give images with marked and with unmarked pixels")
        return self.counts.double()


def _bins(x: Tensor) -> Tensor:
    """Bins of float32 scores: read as integers, the bits of numbers that are not negative keep their order."""
    return (x.abs().view(torch.int32) + ((1 << _STEP) - 1)) >> _STEP  # abs: -0 is 0; a bin ends with its border


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
    return torch.stack([_auroc(negatives, positives), positives.double() @ precision / m, false[reached].double() / n])


def _auroc(negatives: Tensor, positives: Tensor) -> Tensor:
    """From counts of each score, the highest first; exact up to the division, where there are below 2^53 pairs."""
    negatives, positives = negatives.double(), positives.double()
    lower = negatives.sum() - negatives.cumsum(0)
    return positives @ (lower + negatives / 2) / (negatives.sum() * positives.sum())
