"""Data in memory: a training part, a held-out part, and shuffled batches of the first."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from introvae.errors import ConfigError, DataError

HELDOUT_SHARE, HELDOUT_MAX = 0.1, 10_000


@dataclass(frozen=True)
class Part:
    """Some of the data: `x` uint8 `[N, C, H, W]` or float32 `[N, D]`, and class indices `[N]` (-1: unknown) and the
    names of the files or rows where there are any.
    """

    x: Tensor
    labels: Tensor | None = None
    names: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor | slice) -> Part:
        labels = None if self.labels is None else self.labels[rows]
        if not self.names:
            return Part(self.x[rows], labels)
        indices = range(len(self.names))[rows] if isinstance(rows, slice) else rows.tolist()
        return Part(self.x[rows], labels, [self.names[index] for index in indices])

    def some(self, n: int, generator: torch.Generator | None = None) -> Part:
        """n random rows, or all."""
        return self[torch.randperm(len(self), generator=generator)[:n]]

    def tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """All of it as the model takes it: float32, images in [0, 1]."""
        return to_float(self.x.to(device))


class Prepared(Protocol):
    """What was done to every sample, to be saved with the model."""

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Intake:
    """What became of each file or row.

    Arguments:
        found: how many there were.
        used: how many became samples (of a scan, each slice does).
        skipped: name and reason of each that did not.
        remarks: what a user should know, one sentence each.
        duplicates: held-out samples that are in the training part too, as pairs of names.
        converted: name of each picture that is used and differs from most others, and what is done to it.
    """

    found: int
    used: int
    skipped: tuple[tuple[str, str], ...] = ()
    remarks: tuple[str, ...] = ()
    duplicates: tuple[tuple[str, str], ...] = ()
    converted: tuple[tuple[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the log and the report."""
        return {
            "found": self.found,
            "used": self.used,
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
            "converted": [{"name": name, "what": what} for name, what in self.converted],
            "remarks": list(self.remarks),
            "duplicates": [{"heldout": heldout, "train": train} for heldout, train in self.duplicates],
        }


@dataclass(frozen=True)
class ArrayData:
    """A finite set of images or vectors.

    Arguments:
        name: what `--data` was.
        train: the part that batches come from.
        heldout: the part that is only looked at.
        class_names: names of the labels, empty where unknown.
        preparation: what was done to every sample, None for data that came as they are.
        intake: what became of each file, None for data that were in memory.
        column_names: of vectors from a table.
        own_parts: whether the data themselves say what is held out.
    """

    name: str
    train: Part
    heldout: Part
    class_names: tuple[str, ...] = ()
    preparation: Prepared | None = None
    intake: Intake | None = None
    column_names: tuple[str, ...] = field(default=())
    own_parts: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample, (C, H, W) or (D,)."""
        return tuple(self.train.x.shape[1:])

    def whole(self) -> Part:
        """Both parts as one; copied."""
        parts = (self.train, self.heldout)
        labels = [part.labels for part in parts if part.labels is not None]
        names = [name for part in parts for name in part.names]
        return Part(torch.cat([part.x for part in parts]), torch.cat(labels) if len(labels) == 2 else None, names)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Number of full batches in the training part.

        Raises:
            ConfigError: there is not one.
        """
        if batch_size > len(self.train):
            raise ConfigError(
                f"batch_size {batch_size} exceeds the {len(self.train)} training samples of {self.name}: lower it "
                f"with --batch-size {max(1, len(self.train) // 2)}"
            )
        return len(self.train) // batch_size

    def batches(self, batch_size: int, seed: int) -> Batches:
        """An endless stream of shuffled batches."""
        self.steps_per_epoch(batch_size)
        return ArrayBatches(self.train.x, batch_size, seed, self.train.labels)

    def fingerprint(self) -> list[int]:
        """Of the training part."""
        return fingerprint(self.train.x)


class Batches(Protocol):
    """An endless stream of batches."""

    batch_size: int

    def next(self, device: torch.device | str) -> Tensor: ...

    def stored(self, share: slice = ...) -> Tensor: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class ArrayBatches:
    """Endless shuffled full batches; every epoch's order depends on nothing but the seed and its number."""

    def __init__(self, x: Tensor, batch_size: int, seed: int, labels: Tensor | None = None) -> None:
        self.x, self.batch_size, self.seed, self.labels = x, batch_size, seed, labels
        self._fingerprint = fingerprint(x)
        self._start(epoch=0)

    def next(self, device: torch.device | str) -> Tensor:
        """The next batch as float32 on `device`."""
        return to_float(self.stored().to(device))

    def stored(self, share: slice = slice(None)) -> Tensor:
        """The next batch, or some rows of it, as it is kept: on the CPU, images as uint8."""
        return self.x[self._next()[share]]

    def labelled(self, share: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The same with the class indices `[N]`, -1 where unknown."""
        rows = self._next()[share]
        return self.x[rows], torch.full((len(rows),), -1) if self.labels is None else self.labels[rows]

    def _next(self) -> Tensor:
        if self.position + self.batch_size > len(self.x):
            self._start(self.epoch + 1)
        rows = self.order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        return rows

    def _start(self, epoch: int, position: int = 0) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        self.epoch, self.position = epoch, position
        self.order = torch.randperm(len(self.x), generator=generator)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, and of which data."""
        return {"epoch": self.epoch, "position": self.position, "data": self._fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            DataError: the data are not the ones the state is of.
        """
        if state["data"] != self._fingerprint:
            raise DataError("the data are not the ones that the run was started with: give those, or start a new run")
        self._start(state["epoch"], state["position"])


def fingerprint(x: Tensor) -> list[int]:
    """Number of samples and a checksum over a thousand of them."""
    some = x[:: max(1, len(x) // 1000)].contiguous()
    return [len(x), zlib.crc32(some.numpy().tobytes())]


def to_float(x: Tensor) -> Tensor:
    """Images uint8 to float32 in [0, 1]; vectors unchanged."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def from_array(
    x: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | None = None,
    name: str = "array",
    seed: int = 0,
    share: float = HELDOUT_SHARE,
) -> ArrayData:
    """Data from an array in memory; a tenth (at most 10,000) is held out by seed.

    Arguments:
        x: images `[N, C, H, W]`, `[N, H, W, C]` with 1 or 3 channels, or grey `[N, H, W]`, uint8 or float in [0, 1]
            (kept as uint8, rounded); or vectors `[N, D]`, finite floats. Copied.
        labels: class indices `[N]`.
        name: what the run's config calls the data.
        seed: of the held-out part.
        share: of the held-out part.

    Raises:
        DataError: NaN, infinite or out-of-range values, a wrong shape or type, fewer than two samples.

    Example:
        >>> data = from_array(torch.rand(100, 1, 8, 8))
        >>> data.shape, len(data.train), len(data.heldout)
        ((1, 8, 8), 90, 10)
    """
    x = _as_tensor(x, name)
    x = channels_first(x)
    if x.ndim not in (2, 4) or len(x) < 2 or 0 in x.shape:
        raise DataError(f"{name} has shape {tuple(x.shape)}: give at least two images [N, C, H, W] or vectors [N, D]")
    if x.dtype == torch.uint8 and x.ndim == 4:
        values = x
    elif x.is_floating_point():
        values = _checked(x, name)
    else:
        raise DataError(f"{name} holds {x.dtype} values: give images as uint8 or float in [0, 1], vectors as float")
    train, heldout = split(Part(values, checked_labels(labels, len(x), name)), seed, share)
    return ArrayData(name, train, heldout)


def as_vectors(x: np.ndarray, name: str) -> Tensor:
    """Finite vectors `[N, D]` as float32.

    Raises:
        DataError: another shape or type, or values that are not finite.
    """
    found = _as_tensor(x, name)
    if found.ndim != 2 or not found.is_floating_point():
        raise DataError(f"{name} has vectors of shape {tuple(found.shape)} and {found.dtype}: give floats [N, D]")
    return _checked(found, name)


def channels_first(x: Tensor) -> Tensor:
    """Images `[N, H, W]` and `[N, H, W, C]` as `[N, C, H, W]`; others, and vectors, as they are."""
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        return x.permute(0, 3, 1, 2).contiguous()
    return x


def checked_labels(labels: Any, count: int, name: str) -> Tensor | None:
    """Labels as int64 `[N]`.

    Raises:
        DataError: they are no integers, or not as many as samples.
    """
    if labels is None:
        return None
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError) as error:
        raise DataError(f"the labels of {name} are no numbers ({error}): give class indices") from error
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.is_floating_point() or labels.shape != (count,):
        raise DataError(f"the labels of {name} must be {count} integers, one for each sample")
    return labels.long()


def _as_tensor(x: Tensor | np.ndarray, name: str) -> Tensor:
    if isinstance(x, Tensor):
        return x.detach().cpu().clone()
    x = np.asarray(x)
    try:  # torch takes no flipped, read-only or foreign-endian arrays
        return torch.from_numpy(np.array(x, dtype=x.dtype.newbyteorder("="), order="C"))
    except TypeError as error:
        raise DataError(f"{name} holds {x.dtype} values: give images as uint8 or float in [0, 1]") from error


def _checked(x: Tensor, name: str) -> Tensor:
    bad = int((~x.float().isfinite()).sum())  # as float32, in which the model takes them
    if bad:
        raise DataError(f"{name} holds {bad} NaN or infinite values: remove or fill them")
    if x.ndim == 2:
        return x.float().contiguous()
    low, high = x.min().item(), x.max().item()
    if low < 0 or high > 1:
        raise DataError(f"{name} holds values from {low:.4g} to {high:.4g}: scale images to [0, 1], or give uint8")
    return (x * 255).round().to(torch.uint8).contiguous()


def split(part: Part, seed: int, share: float = HELDOUT_SHARE) -> tuple[Part, Part]:
    """Training part and held-out part (a tenth, at most 10,000 samples, at least one), chosen by seed."""
    n = heldout_count(len(part), share)
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))
    return part[order[n:]], part[order[:n]]


def heldout_count(count: int, share: float) -> int:
    """Size of the held-out part of `count` samples: the share, at least 1, at most 10,000, never all."""
    return min(HELDOUT_MAX, max(1, round(count * share)), count - 1)


def heldout_rows(count: int, share: float, seed: int, groups: Sequence[str | None] = ()) -> list[int]:
    """Rows of the held-out part, in random order; samples of one group are all in it or none.

    Raises:
        DataError: all samples belong to one group.
    """
    n = heldout_count(count, share)
    generator = torch.Generator().manual_seed(seed)
    if not any(group is not None for group in groups):
        return torch.randperm(count, generator=generator)[:n].tolist()
    members: dict[str | int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(row if group is None else group, []).append(row)
    if len(members) < 2:
        raise DataError(f"all {count} samples belong to {next(iter(members))!r}: give data of two groups at least")
    keys, held = list(members), []
    for index in torch.randperm(len(keys), generator=generator).tolist()[: len(keys) - 1]:
        if len(held) >= n:
            break
        held += members[keys[index]]
    return [held[i] for i in torch.randperm(len(held), generator=generator).tolist()]


def set_apart(part: Part, rows: Sequence[int]) -> tuple[Part, Part]:
    """The part without `rows`, and `rows`; changes the part's tensor instead of copying it.

    The held-out rows are copied (they are few) and their places filled from the end, so that even data that fill half
    of the memory can be split.
    """
    heldout = part[torch.tensor(rows)]
    count = len(part) - len(rows)
    out = set(rows)
    holes = [row for row in rows if row < count]
    movers = [row for row in range(count, len(part)) if row not in out]
    for hole, mover in zip(holes, movers, strict=True):
        part.x[hole] = part.x[mover]
    order = list(range(count))
    for hole, mover in zip(holes, movers, strict=True):
        order[hole] = mover
    labels = None if part.labels is None else part.labels[torch.tensor(order)]
    names = [part.names[row] for row in order] if part.names else ()
    return Part(part.x[:count], labels, names), heldout
