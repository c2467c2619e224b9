"""Data in memory: a training part, a held-out part, and shuffled batches of the first."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from introvae.errors import ConfigError, DataError

HELDOUT_SHARE, HELDOUT_MAX = 0.1, 10_000


@dataclass(frozen=True)
class Part:
    """Some of the data: `x` uint8 `[N, C, H, W]` or float32 `[N, D]`, and class indices `[N]` where there are any."""

    x: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor | slice) -> Part:
        return Part(self.x[rows], None if self.labels is None else self.labels[rows])

    def tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """All of it as the model takes it: float32, images in [0, 1]."""
        return to_float(self.x.to(device))


@dataclass(frozen=True)
class ArrayData:
    """A finite set of images or vectors.

    Arguments:
        name: what `--data` was.
        train: the part that batches come from.
        heldout: the part that is only looked at.
        class_names: names of the labels, empty where unknown.
    """

    name: str
    train: Part
    heldout: Part
    class_names: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample, (C, H, W) or (D,)."""
        return tuple(self.train.x.shape[1:])

    def steps_per_epoch(self, batch_size: int) -> int:
        """Number of full batches in the training part.

        Raises:
            ConfigError: there is not one.
        """
        if batch_size > len(self.train):
            raise ConfigError(
                f"batch_size {batch_size} exceeds the {len(self.train)} training samples of {self.name}: lower it"
            )
        return len(self.train) // batch_size

    def batches(self, batch_size: int, seed: int) -> ArrayBatches:
        """An endless stream of shuffled batches."""
        self.steps_per_epoch(batch_size)
        return ArrayBatches(self.train.x, batch_size, seed)


class ArrayBatches:
    """Endless shuffled full batches; every epoch's order depends on nothing but the seed and its number."""

    def __init__(self, x: Tensor, batch_size: int, seed: int) -> None:
        self.x, self.batch_size, self.seed = x, batch_size, seed
        self._start(epoch=0)

    def next(self, device: torch.device | str) -> Tensor:
        """The next batch as float32 on `device`."""
        if self.position + self.batch_size > len(self.x):
            self._start(self.epoch + 1)
        rows = self.order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        return to_float(self.x[rows].to(device))

    def _start(self, epoch: int, position: int = 0) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        self.epoch, self.position = epoch, position
        self.order = torch.randperm(len(self.x), generator=generator)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, and of which data."""
        return {"epoch": self.epoch, "position": self.position, "data": self.fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            DataError: the data are not the ones the state is of.
        """
        if state["data"] != self.fingerprint():
            raise DataError("the data are not the ones that the run was started with: give those, or start a new run")
        self._start(state["epoch"], state["position"])

    def fingerprint(self) -> list[int]:
        """Number of samples and a checksum over a thousand of them."""
        some = self.x[:: max(1, len(self.x) // 1000)].contiguous()
        return [len(self.x), zlib.crc32(some.numpy().tobytes())]


def to_float(x: Tensor) -> Tensor:
    """Images uint8 to float32 in [0, 1]; vectors unchanged."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def from_array(
    x: Tensor | np.ndarray, labels: Tensor | np.ndarray | None = None, name: str = "array", seed: int = 0
) -> ArrayData:
    """Data from an array in memory; a tenth (at most 10,000) is held out by seed.

    Arguments:
        x: images `[N, C, H, W]` or grey `[N, H, W]`, uint8 or float in [0, 1] (kept as uint8, rounded); or vectors
            `[N, D]`, finite floats. Copied.
        labels: class indices `[N]`.
        name: what the run's config calls the data.
        seed: of the held-out part.

    Raises:
        DataError: NaN, infinite or out-of-range values, a wrong shape or type, fewer than two samples.

    Example:
        >>> data = from_array(torch.rand(100, 1, 8, 8))
        >>> data.shape, len(data.train), len(data.heldout)
        ((1, 8, 8), 90, 10)
    """
    x = _as_tensor(x, name)
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim not in (2, 4) or len(x) < 2 or 0 in x.shape:
        raise DataError(f"{name} has shape {tuple(x.shape)}: give at least two images [N, C, H, W] or vectors [N, D]")
    if x.dtype == torch.uint8 and x.ndim == 4:
        values = x
    elif x.is_floating_point():
        values = _checked(x, name)
    else:
        raise DataError(f"{name} holds {x.dtype} values: give images as uint8 or float in [0, 1], vectors as float")
    if labels is not None:
        labels = torch.as_tensor(labels)
        if labels.is_floating_point() or labels.shape != (len(x),):
            raise DataError(f"the labels of {name} must be {len(x)} integers, one for each sample")
        labels = labels.long()
    train, heldout = split(Part(values, labels), seed)
    return ArrayData(name, train, heldout)


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


def split(part: Part, seed: int) -> tuple[Part, Part]:
    """Training part and held-out part (a tenth, at most 10,000 samples, at least one), chosen by seed."""
    n = min(HELDOUT_MAX, max(1, round(len(part) * HELDOUT_SHARE)))
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))
    return part[order[n:]], part[order[:n]]
