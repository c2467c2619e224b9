"""Images that are decoded when they are needed: sets of any size in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from introvae.data.arrays import ArrayData, Batches, Part, to_float
from introvae.data.order import Order
from introvae.data.pictures import Pictures
from introvae.data.sources import Item
from introvae.errors import DataError

AHEAD = 4
"""Batches that are decoded ahead."""
PIECE = 32
"""Pictures that a thread decodes at a time."""


@dataclass(frozen=True)
class StreamedPart(Part):
    """A training part whose pictures are decoded when rows of it are asked for; `x` has their shape and no content.

    Arguments:
        pictures: decodes them.
        rows: of the source.
        left_out: rows among them that are held out, sorted.
        buffer: rows that a shuffle is among, for blocks that are read at once.
    """

    pictures: Pictures = field(kw_only=True)
    rows: range = field(kw_only=True)
    left_out: np.ndarray = field(kw_only=True)
    buffer: int = field(kw_only=True)

    def __getitem__(self, rows: Tensor | slice) -> Part:
        """Some rows, in the order of the files; each block is read once."""
        indices = np.arange(len(self))[rows] if isinstance(rows, slice) else rows.numpy()
        # The i-th row that is not held out: i, and those held out before it.
        gaps = self.left_out - self.rows.start - np.arange(len(self.left_out))
        found = indices + self.rows.start + np.searchsorted(gaps, indices, side="right")
        return self.pictures.part(found, self.readable)

    def tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """Refused: it would be all of it.

        Raises:
            DataError: always.
        """
        raise DataError("these images stream, and all at once do not fit the memory: take some rows, or --stream never")

    def some(self, n: int, generator: torch.Generator | None = None) -> Part:
        """Random rows, of few blocks."""
        seed = int(torch.randint(2**31, (), generator=generator))
        pieces = self.order(seed).pieces(0, 0, min(n, len(self)))
        return self.pictures.part(np.concatenate([piece.rows for piece in pieces]), self.readable)

    def order(self, seed: int) -> Order:
        """The order of its rows in every epoch."""
        return Order(self.pictures.shards.starts, self.rows, self.left_out, seed, self.buffer)

    def readable(self, row: int, find: Callable[[int], Item]) -> tuple[np.ndarray, int, str]:
        """The picture of a row, or the next one in the order of the files where it cannot be read.

        Raises:
            DataError: none of the next ones can be read either.
        """
        return self.pictures.first_readable(self._from(row), find)

    def _from(self, row: int) -> Iterator[int]:
        for step in range(len(self.rows)):
            following = self.rows[(row - self.rows.start + step) % len(self.rows)]
            place = int(np.searchsorted(self.left_out, following))
            if place == len(self.left_out) or self.left_out[place] != following:
                yield following

    def occurrences(self) -> dict[int, int] | None:
        """How often each class index occurs (-1: unknown), without opening a picture; None where there are no classes.

        Pictures that cannot be read count too.
        """
        shards = self.pictures.shards
        return shards.occurrences(self.rows, self.left_out) if shards.labelled else None

    def fingerprint(self) -> list[int]:
        """Number of pictures, and a checksum over the names of what they are read from and over sizes: of all row
        groups, or of at most 1,000 files. A file that was changed is not always noticed.
        """
        return [len(self), self.pictures.shards.checksum()]


@dataclass(frozen=True)
class StreamData(ArrayData):
    """Images whose training part is decoded anew in every epoch; the held-out part is kept.

    Pictures that cannot be read are met on the way: another takes the place of each, and `skipped` names it.
    """

    @property
    def skipped(self) -> dict[str, str]:
        """Name and reason of the pictures that could not be read so far; at most 1,000."""
        return self.train.pictures.skipped if isinstance(self.train, StreamedPart) else {}

    def whole(self) -> Part:
        """The held-out part: a random share of all that fits the memory."""
        return self.heldout if isinstance(self.train, StreamedPart) else super().whole()

    def batches(self, batch_size: int, seed: int) -> Batches:
        """An endless stream of shuffled batches."""
        if not isinstance(self.train, StreamedPart):
            return super().batches(batch_size, seed)
        self.steps_per_epoch(batch_size)
        return StreamBatches(self.train, batch_size, seed)

    def fingerprint(self) -> list[int]:
        """Of the training part."""
        return self.train.fingerprint() if isinstance(self.train, StreamedPart) else super().fingerprint()


class _Ahead(NamedTuple):
    """A batch that is being decoded, and where the stream is after it."""

    epoch: int
    position: int
    x: Tensor
    labels: Tensor
    work: list[Future[None]]


class StreamBatches:
    """Endless shuffled full batches, decoded a few ahead by threads.

    Where the stream is tells all: every epoch's order depends on nothing but the seed and its number. Several processes
    that take their rows of each batch decode and keep these alone. A window's rows are in random order, so each process
    has some in nearly every row group, and a row group can only be read as a whole: each reads all of them. With JPEG
    files of 218 pixels that took 4 % of the time of one process and 11 % of that of each of eight; those of one machine
    have the disk read once. What another process keeps is read again where it takes the place of a broken picture.

    Arguments:
        part: what they are of.
        batch_size: images in a batch, of all processes.
        seed: of the order.
    """

    def __init__(self, part: StreamedPart, batch_size: int, seed: int) -> None:
        self.part, self.batch_size = part, batch_size
        self.order = part.order(seed)
        self.epoch, self.position = 0, 0
        self._fingerprint = [*part.fingerprint(), part.buffer]
        self._asked: tuple[slice, int] = slice(None), batch_size
        self._since = 0, 0  # epoch and position from which on the batches have that size
        self._ahead: deque[_Ahead] = deque()
        self._reader = ThreadPoolExecutor(1, "introvae-read")
        self._windows: dict[tuple[int, int], Future[Callable[[int], Item]]] = {}

    def next(self, device: torch.device | str) -> Tensor:
        """The next batch as float32 on `device`."""
        return to_float(self.stored().to(device))

    def stored(self, share: slice = slice(None)) -> Tensor:
        """The next batch, or some rows of it, on the CPU as uint8."""
        return self.labelled(share)[0]

    def labelled(self, share: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The same with the class indices `[N]`, -1 where unknown.

        Raises:
            DataError: the files cannot be read any more.
        """
        if (share, self.batch_size) != self._asked:  # the loop may change both
            self._drop()
            self._asked = share, self.batch_size
            self._begin_here()
        try:
            while len(self._ahead) < AHEAD:
                self._ahead.append(self._begin())
            batch = self._ahead.popleft()
            for work in batch.work:
                work.result()
        except BaseException:
            self._drop()
            raise
        self.epoch, self.position = batch.epoch, batch.position
        return batch.x, batch.labels

    def _begin(self) -> _Ahead:
        """Have the batch after those that are being decoded decoded too."""
        last = self._ahead[-1] if self._ahead else self
        epoch, start = last.epoch, last.position
        if start + self.batch_size > len(self.part):
            epoch, start = epoch + 1, 0
        own = range(start, start + self.batch_size)[self._asked[0]]
        x = torch.empty((len(own), *self.part.x.shape[1:]), dtype=torch.uint8)
        labels, work, done = torch.empty(len(own), dtype=torch.int64), [], 0
        for window, rows in self.order.pieces(epoch, own.start, own.stop):
            find = self._window(epoch, window)
            all_rows = np.concatenate([self.order.rows(*place) for place in self._near(epoch, window)])
            for some in np.split(rows, range(PIECE, len(rows), PIECE)):
                to = slice(done, done + len(some))
                arguments = (some, all_rows, find, x[to].numpy(), labels[to].numpy())
                work.append(self.part.pictures.pool.submit(self._decode, *arguments))
                done += len(some)
        return _Ahead(epoch, start + self.batch_size, x, labels, work)

    def _decode(
        self, rows: np.ndarray, near: np.ndarray, find: Callable[[int], Item], x: np.ndarray, labels: np.ndarray
    ) -> None:
        """Decode some rows; one of those `near` takes the place of each that cannot be read.

        The next one in the order of the files would take the places of a whole broken row group.
        """
        pictures = self.part.pictures
        for index, row in enumerate(rows.tolist()):
            found = pictures.decode(row, find)
            if found is None:
                others = np.random.default_rng(row).permutation(near).tolist()
                found = next((other for other in (pictures.decode(o, find) for o in others) if other), None)
            x[index], labels[index], _ = found or self.part.readable(row, find)

    def _window(self, epoch: int, window: int) -> Callable[[int], Item]:
        """What finds the rows of a window; the one after it is read meanwhile."""
        shards = self.part.pictures.shards
        if shards.block_bytes is None:
            return shards.fetch(())
        near = self._near(epoch, window)
        kept = {place: self._windows[place] for place in near if place in self._windows}
        self._windows = kept
        for place in near:
            if place not in kept:
                kept[place] = self._reader.submit(
                    shards.fetch, self.order.blocks(*place).tolist(), self._own_rows(*place)
                )
        finds = [kept[place] for place in near]

        def find(row: int) -> Item:
            try:
                return finds[0].result()(row)
            except KeyError:
                return finds[1].result()(row)

        finds[0].result()
        return find

    def _own_rows(self, epoch: int, window: int) -> np.ndarray | None:
        """The rows of a window that come in this process' share of the batches, sorted; None for all."""
        share, size = self._asked
        own = np.zeros(size, bool)
        own[share] = True
        if own.all():
            return None
        first = self._since[1] if epoch == self._since[0] else 0
        begin, end = self.order.epoch(epoch).first_position[window : window + 2]
        places = np.arange(begin, end) - first
        whole = (len(self.part) - first) // size * size  # an unfinished batch never comes
        return np.sort(self.order.rows(epoch, window)[(places >= 0) & (places < whole) & own[places % size]])

    def _begin_here(self) -> None:
        """Forget which rows were kept: from here on they are others."""
        self._windows, self._since = {}, (self.epoch, self.position)

    def _near(self, epoch: int, window: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """A window and the one after it, each by epoch and number."""
        return (epoch, window), ((epoch, window + 1) if window + 1 < self.order.windows(epoch) else (epoch + 1, 0))

    def _drop(self) -> None:
        """Forget what was decoded ahead."""
        for batch in self._ahead:
            for work in batch.work:
                work.cancel()
        self._ahead.clear()

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, and of which data."""
        return {"epoch": self.epoch, "position": self.position, "data": list(self._fingerprint)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            DataError: the data are not the ones the state is of.
        """
        if state["data"] != self._fingerprint:
            raise DataError("the data are not the ones that the run was started with: give those, or start a new run")
        self._drop()
        self.epoch, self.position = state["epoch"], state["position"]
        self._begin_here()
