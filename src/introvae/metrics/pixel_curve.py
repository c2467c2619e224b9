"""How well heat maps find marked pixels, over any number of images, and how sure that is."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from introvae.errors import ConfigError, DataError, checked_seed, not_negative, whole
from introvae.metrics.detection import TAILS, Interval, auroc_of_counts

MANTISSA = 12
"""Bits of a float32's mantissa that a bin keeps: a bin is at most 2^-12 of its score wide."""
_STEP = 23 - MANTISSA
_BINS = (0x7F800000 >> _STEP) + 1  # the bit pattern of infinity ends the last one
WIDE = 6
"""Bits that a bin of the bootstrap's draws keeps: it is at most 2^-6 of its score wide."""
_MERGED = MANTISSA - WIDE
_WIDE_BINS = (0x7F800000 >> (_STEP + _MERGED)) + 1
DRAWS = 500
"""Draws of the bootstrap that are enough for a 95 % interval: its ends scatter by a 16th of its half width."""
AT_ONCE = 50
"""Draws whose metrics are computed together."""


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

    The intervals are those of a bootstrap that draws whole images, since pixels of one image are alike. An image is in
    a draw as often as a Poisson variable of mean 1 says, so that all draws are counted while the images pass by, and
    none is kept: in bins that are 2^-6 of their score wide, at most 131 MB for 500 draws, and mostly a few, for bins
    without scores take none. The draws' percentiles are moved by what the wider bins change in the value itself.
    Scores that differ by less than their 64th part are equal there. Draws without marked pixels, or with nothing else,
    do not count. With a few marked images the intervals are too narrow, as in `detection_metrics`; with fewer than two
    marked ones, or two that have unmarked pixels, there are none.

    Arguments:
        draws: of the bootstrap, 0 for none, such as `DRAWS`.
        seed: of the draws, which depend on the order of the images, but not on how they come in batches.

    Raises:
        ConfigError: draws or a seed that will not do.

    Source: AUROC as in `detection_metrics`; Dice 1945; draws of clusters Field & Welsh 2007, by Poisson variables
    Hanley & MacGibbon 2006.

    Example:
        >>> curve = PixelCurve()
        >>> curve.update(torch.tensor([[[0.1, 0.2], [0.3, 0.4]]]), torch.tensor([[[False, True], [False, True]]]))
        >>> curve.auroc, curve.auroc_error, curve.dice(0.35)
        (0.75, 0.0, 0.6666666666666666)
    """

    def __init__(self, draws: int = 0, seed: int = 0) -> None:
        whole(draws=draws)
        not_negative(draws=draws)
        self.counts = torch.zeros(2, _BINS, dtype=torch.int64)  # of unmarked and of marked pixels
        self.groups = [0, 0]
        """How many images, or groups of them, have unmarked and marked pixels."""
        self._seen, self._group = torch.zeros(2, dtype=torch.bool), None
        self._generator = torch.Generator().manual_seed(checked_seed(seed))
        self._ones = self._weights = torch.ones(draws, dtype=torch.float64)
        # Unlike torch's, numpy's zeros take memory only where something is written.
        self._drawn = torch.from_numpy(np.zeros((2, _WIDE_BINS, draws)))

    def update(self, maps: Tensor, masks: Tensor, groups: Sequence[Hashable] | None = None) -> None:
        """Take the scores of some images into account.

        Arguments:
            maps: scores `[N, H, W]`, not negative, higher for what does not belong.
            masks: `[N, H, W]`, bool, True where something does not belong.
            groups: what each image is of, where images that follow each other are drawn together, such as slices of a
                scan; by default each is drawn by itself.

        Raises:
            DataError: shapes or numbers that differ, masks that are not bool, scores that are negative, NaN or too
                large.
        """
        if maps.ndim != 3 or maps.shape != masks.shape:
            raise DataError(f"maps {tuple(maps.shape)} and masks {tuple(masks.shape)} must both have shape [N, H, W]")
        if masks.dtype != torch.bool:
            raise DataError(f"masks are bool, not {masks.dtype}: compare them with a number first")
        x = maps.detach().cpu().float().flatten()
        if not bool(((x >= 0) & x.isfinite()).all()):
            raise DataError("maps hold scores that are negative, NaN or above 3e38: give errors or distances")
        if groups is not None and len(groups) != len(maps):
            raise DataError(f"{len(groups)} groups for {len(maps)} maps: give one for each")
        bins, marked = _bins(x).long(), masks.detach().cpu().flatten()
        self.counts.view(-1).index_add_(0, bins + _BINS * marked, torch.ones_like(bins))
        if len(self._ones):
            for i, places in enumerate((_wide(bins) + _WIDE_BINS * marked).view(len(maps), -1)):
                self._draw(places, None if groups is None else groups[i])

    def _draw(self, places: Tensor, group: Hashable | None) -> None:
        """Count an image's pixels as often as it is in each draw."""
        if group is None or group != self._group:
            self._group, self._seen = group, torch.zeros(2, dtype=torch.bool)
            self._weights = torch.poisson(self._ones, generator=self._generator)
        counts = places.bincount(minlength=2 * _WIDE_BINS)
        kinds = counts.view(2, -1).sum(dim=1) > 0
        for kind in (kinds & ~self._seen).nonzero().flatten().tolist():
            self.groups[kind] += 1
        self._seen = self._seen | kinds
        rows = counts.nonzero().flatten()
        self._drawn.view(2 * _WIDE_BINS, -1)[rows] += counts[rows, None] * self._weights

    @property
    def both(self) -> bool:
        """Whether there are marked and unmarked pixels, as the metrics need."""
        return bool((self.counts.sum(dim=1) > 0).all())

    @property
    def auroc(self) -> float:
        """Probability that a marked pixel scores higher than an unmarked one.

        Raises:
            DataError: no pixel is marked, or all are.
        """
        return float(auroc_of_counts(*self._both().flip(1)))

    @property
    def auroc_error(self) -> float:
        """By so much at most `auroc` differs from that of the scores themselves.

        Raises:
            DataError: no pixel is marked, or all are.
        """
        unmarked, marked = self._both()
        shared = unmarked[1:] @ marked[1:]  # in 0's bin all are equal, and count half by right
        return float(shared / (unmarked.sum() * marked.sum()) / 2)

    def auroc_interval(self) -> Interval | None:
        """`auroc` with its 95 % interval; None where there are too few images for one.

        Raises:
            ConfigError: without draws.
            DataError: no pixel is marked, or all are.
        """

        def auroc(counts: Tensor, _: Tensor) -> Tensor:
            unmarked, marked = counts.unbind(dim=-2)
            pairs = marked * (unmarked.cumsum(dim=-1) - unmarked / 2)
            return pairs.sum(dim=-1) / (unmarked.sum(dim=-1) * marked.sum(dim=-1))

        return self._interval(self.auroc, auroc)

    def dice(self, threshold: float) -> float:
        """Dice coefficient 2 TP / (2 TP + FP + FN) of the pixels that score above a threshold, over all images at once.

        The threshold is first rounded up to a bin's border, by no more than its 4,000th part.

        Raises:
            ConfigError: a negative threshold.
            DataError: no pixel is marked.
        """
        false, true = self.counts[:, _place(threshold) + 1 :].sum(dim=1).tolist()
        return 2 * true / (self._marked() + true + false)

    def dice_interval(self, threshold: float) -> Interval | None:
        """`dice` with its 95 % interval; None where there are too few images for one.

        Raises:
            ConfigError: a negative threshold; without draws.
            DataError: no pixel is marked.
        """
        place = int(_wide(torch.tensor(_place(threshold))))

        def dice(counts: Tensor, bins: Tensor) -> Tensor:
            false, true = counts[..., bins > place].sum(dim=-1).unbind(dim=-1)
            return 2 * true / (counts[..., 1, :].sum(dim=-1) + true + false)

        return self._interval(self.dice(threshold), dice)

    @property
    def best_dice(self) -> BestDice:
        """The best Dice coefficient of all thresholds from 0, the lowest of them, and what it may have missed.

        Raises:
            DataError: no pixel is marked.
        """
        marked = self._marked()
        false, true, dice = _dices(self.counts)
        place = int(dice.argmax())
        # At best a threshold inside a bin flags all its marked pixels and none of the others. None is inside 0's.
        most = true[1:] + self.counts[1, 1:]
        bound, value = float((2 * most / (marked + most + false[1:])).max()), float(dice[place])
        border = torch.tensor([place << _STEP], dtype=torch.int32).view(torch.float32)
        return BestDice(value, float(border), max(0.0, bound - value))

    def best_dice_interval(self) -> Interval | None:
        """`best_dice` with its 95 % interval, each draw's at its own best threshold; None where there are too few
        images for one.

        Raises:
            ConfigError: without draws.
            DataError: no pixel is marked.
        """
        return self._interval(self.best_dice.value, lambda counts, _: _dices(counts)[2].amax(dim=-1))

    def _interval(self, value: float, function: Callable[[Tensor, Tensor], Tensor]) -> Interval | None:
        """A value with the interval of what a function of draws' counts `[..., 2, K]` and their bins `[K]` gives."""
        if not len(self._ones):
            raise ConfigError("an interval needs draws: make the curve with draws=DRAWS")
        if min(self.groups) < 2:
            return None
        first, others = self.counts.split([1, _BINS - 1], dim=1)
        counts = torch.cat([first, others.unflatten(1, (-1, 1 << _MERGED)).sum(dim=2)], dim=1)
        filled = counts.sum(dim=0) > 0
        filled[0] = True  # its border is the lowest threshold
        bins = filled.nonzero().flatten()
        found = []
        for some in self._drawn.split(AT_ONCE, dim=2):
            draws = some[:, bins].permute(2, 0, 1)
            found.append(function(draws[(draws.sum(dim=2) > 0).all(dim=1)], bins))
        values = torch.cat(found)
        if not len(values):
            return None
        tails = values.quantile(torch.tensor(TAILS, dtype=values.dtype))
        low, high = (tails + value - function(counts[:, bins].double(), bins)).clamp(0, 1).tolist()
        return Interval(value, low, high)

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


def _dices(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unmarked and marked pixels above each bin's upper border, and the Dice coefficient there, each `[..., K]`, of
    counts `[..., 2, K]`.
    """
    below = counts.cumsum(dim=-1)
    false, true = (below[..., -1:] - below).double().unbind(dim=-2)
    return false, true, 2 * true / (below[..., 1, -1:] + true + false)


def _place(threshold: float) -> int:
    """The bin whose upper border a threshold is rounded up to."""
    if not threshold >= 0:
        raise ConfigError(f"threshold is {threshold}: scores of pixels are not negative, give at least 0")
    return int(_bins(torch.tensor([min(threshold, torch.finfo(torch.float32).max)])))


def _wide(bins: Tensor) -> Tensor:
    """The draws' bins of bins; 0 keeps its own."""
    return (bins + ((1 << _MERGED) - 1)) >> _MERGED


def _bins(x: Tensor) -> Tensor:
    """Bins of float32 scores: read as integers, the bits of numbers that are not negative keep their order."""
    return (x.abs().view(torch.int32) + ((1 << _STEP) - 1)) >> _STEP  # abs: -0 is 0; a bin ends with its border
