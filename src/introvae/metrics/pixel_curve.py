"""How well heat maps find marked pixels, over any number of images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from introvae.errors import ConfigError, DataError
from introvae.metrics.detection import auroc_of_counts

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
