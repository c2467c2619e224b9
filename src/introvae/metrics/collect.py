"""One pass over a set of images: what all metrics of all feature spaces need of it, each feature computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from introvae.errors import ConfigError
from introvae.metrics.diversity import ms_ssim
from introvae.metrics.features import FeatureSpace
from introvae.metrics.frechet import GaussianStatistics

MAX_FEATURES = 4096
"""A covariance of more would take gigabytes, and its root minutes."""


@dataclass(frozen=True)
class Wanted:
    """What is looked at in one space.

    Arguments:
        space: where.
        images: how many of the set, from its start, go into the mean and covariance.
        kept: of how many, from its start, the features themselves are kept.
    """

    space: FeatureSpace
    images: int
    kept: int = 0


@dataclass
class Found:
    """What is known of a set in one space.

    Arguments:
        sums: mean and covariance, None where no image was to go into them.
        kept: features `[K, F]`, float32.
        classes: likeliest class of each image, `[N]`, where the features are a classifier's.
        sure: its probability, `[N]`.
    """

    sums: GaussianStatistics | None = None
    kept: list[Tensor] = field(default_factory=list)
    classes: list[Tensor] = field(default_factory=list)
    sure: list[Tensor] = field(default_factory=list)

    @property
    def features(self) -> Tensor:
        """The features that were kept, in order."""
        return torch.cat(self.kept)

    def shares(self, classes: int, first: int | None = None) -> Tensor:
        """Share of the images, or of so many from the set's start, in each class, `[K]`."""
        counts = torch.bincount(torch.cat(self.classes)[:first], minlength=classes).double()
        return counts / counts.sum()

    def confident(self, threshold: float) -> float:
        """Share of the images whose likeliest class has at least that probability."""
        return (torch.cat(self.sure) >= threshold).double().mean().item()

    def merge(self, later: Found) -> None:
        """Go on with what was found of the images that come next in the set."""
        if later.sums is not None:
            self.sums = self.sums or GaussianStatistics(len(later.sums.total))
            self.sums.merge(later.sums)
        for mine, others in ((self.kept, later.kept), (self.classes, later.classes), (self.sure, later.sure)):
            mine += others


@dataclass
class Collected:
    """What is known of a set.

    Arguments:
        spaces: what was found in each, by name.
        alike: MS-SSIM of pairs of its images, `[P]`.
        waiting: the last image of an odd number, whose neighbour is the next of the set.
    """

    spaces: dict[str, Found] = field(default_factory=dict)
    alike: list[Tensor] = field(default_factory=list)
    waiting: list[Tensor] = field(default_factory=list)

    def merge(self, later: Collected) -> None:
        """Go on with what was found of the images that come next in the set."""
        for name, found in later.spaces.items():
            self.spaces.setdefault(name, Found()).merge(found)
        self.alike += later.alike
        self.waiting = later.waiting


@torch.no_grad()
def collect(
    read: Callable[[int, int], Tensor],
    wanted: Sequence[Wanted],
    stop: int,
    *,
    start: int = 0,
    batch: int = 256,
    pairs: int = 0,
    waiting: Sequence[Tensor] = (),
) -> Collected:
    """Read a set a batch at a time and keep what is wanted of it.

    Arguments:
        read: gives the images `[N, C, H, W]` (or vectors `[N, D]`) from a first to before a last row.
        wanted: in each space.
        stop: rows from `start` to before this one are read, no more than anybody wants.
        batch: rows at a time.
        pairs: MS-SSIM of so many pairs of neighbours, from the set's start.
        waiting: what was found of the rows before `start` has there.

    Raises:
        ConfigError: a space with too many features for a covariance.
        DataError: features that are not finite, or cannot be computed.

    Example:
        >>> space = FeatureSpace("rows", lambda x: x.mean(dim=(1, 3)))
        >>> images = torch.rand(10, 1, 4, 4)
        >>> found = collect(lambda a, b: images[a:b], [Wanted(space, images=10, kept=6)], 10, batch=4)
        >>> found.spaces["rows"].sums.count, found.spaces["rows"].features.shape
        (10, torch.Size([6, 4]))
    """
    collected = Collected(waiting=list(waiting))
    stop = min(stop, max([2 * pairs, *(max(w.images, w.kept) for w in wanted)]))
    for first in range(start, stop, batch):
        x = read(first, min(first + batch, stop))
        for want in wanted:
            rows = max(want.images, want.kept) - first
            if rows > 0:
                found = collected.spaces.setdefault(want.space.name, Found())
                _look(want, x[:rows], first, found)
        if (rows := min(2 * pairs - first, len(x))) > 0:
            # The last of an odd batch waits for its neighbour: the pairs are the same ones whatever the batch is.
            paired = torch.cat([*collected.waiting, x[:rows]])
            even = len(paired) // 2 * 2
            collected.waiting = [paired[even:]]
            if even:
                collected.alike.append(ms_ssim(paired[0:even:2], paired[1:even:2]).cpu())
    return collected


def _look(want: Wanted, x: Tensor, first: int, found: Found) -> None:
    features = want.space(x)
    if want.images > first:
        if features.shape[1] > MAX_FEATURES:
            raise ConfigError(
                f"{want.space.name} has {features.shape[1]:,} features, a covariance takes at most {MAX_FEATURES:,}: "
                "choose another feature space"
            )
        found.sums = found.sums or GaussianStatistics(features.shape[1])
        found.sums.update(features[: want.images - first])
    if want.kept > first:
        found.kept.append(features[: want.kept - first].float().cpu())
    if want.space.judge is not None:
        sure, classes = want.space.judge.network.probabilities(features).max(dim=1)
        found.classes.append(classes.cpu())
        found.sure.append(sure.cpu())
