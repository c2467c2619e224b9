"""Images that are decoded when they are needed: sets of any size in bounded memory."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor

from introvae.data.arrays import HELDOUT_MAX, ArrayData, Batches, Intake, Part, heldout_count, to_float
from introvae.data.cache import affordable_bytes, cost_of
from introvae.data.options import DataOptions
from introvae.data.order import Order
from introvae.data.pictures import Pictures
from introvae.data.preparation import KEPT_SIDE, Preparation
from introvae.data.shards import FolderShards, Shards, largest_block, mean_bytes
from introvae.data.sources import HELDOUT_SPLITS, Item
from introvae.data.survey import Survey, look_at
from introvae.errors import DataError

WINDOW_BYTES = 128 * 2**20
"""What a window's encoded images take in memory at most, unless one block takes more; up to three are kept."""
BLOCK_SHARE = 0.1
"""A block that takes more of the machine's memory is refused."""
HELDOUT_BYTES = 256 * 2**20
"""What the held-out part takes at most: it is kept decoded."""
LOOKED_AT, LOOKED_INTO = 512, 32
"""Pictures from which size, colour and window are chosen, and row groups that they are taken from."""
AHEAD = 4
"""Batches that are decoded ahead."""
PIECE = 32
"""Pictures that a thread decodes at a time."""

log = logging.getLogger("introvae")


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

    def fingerprint(self) -> list[int]:
        """Number of pictures, and a checksum over the names and sizes of what they are read from."""
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
    that take their rows of each batch decode these alone, but each reads all row groups.

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
                kept[place] = self._reader.submit(shards.fetch, self.order.blocks(*place).tolist())
        finds = [kept[place] for place in near]

        def find(row: int) -> Item:
            try:
                return finds[0].result()(row)
            except KeyError:
                return finds[1].result()(row)

        finds[0].result()
        return find

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


def load_stream(
    open_shards: Callable[[], Shards], options: DataOptions, preparation: Preparation | None = None
) -> StreamData | None:
    """The data as a stream; None where decoding all of them at the start is the better choice, or was asked for.

    Raises:
        DataError: files that cannot be read or that cannot be streamed.
        ConfigError: a column or pattern that is not there.
    """
    if options.stream == "never":
        return None
    always = options.stream == "always"
    try:
        shards = open_shards()
    except DataError:
        if always:
            raise
        return None  # who reads them will say what is wrong
    count = int(shards.starts[-1])
    if isinstance(shards, FolderShards) and shards.scans:
        if always:
            raise DataError(f"{shards.name} holds scans, which cannot be streamed: take --stream never")
        return None
    survey = None
    if not always:
        limit = affordable_bytes()
        likely = (preparation.channels, *preparation.size) if preparation else _largest(options)
        if count * math.prod(likely) <= limit:
            return None
        survey = None if preparation else _look(shards, options)
        shape = survey.preparation(options) if survey and survey.pictures else preparation
        cost = (count, shape.channels, *shape.size) if shape else (0, 0)
        if math.prod(cost) <= limit:
            return None
        most = f"{limit / 1e6:,.0f} MB"
        log.info("stream   %s if they were kept decoded; more than %s is not kept unasked", cost_of(cost), most)
    return _stream(shards, options, preparation, survey or _look(shards, options))


def _largest(options: DataOptions) -> tuple[int, int, int]:
    """The largest shape that the images may get."""
    side = options.size or KEPT_SIDE
    return options.channels or 3, side, side


def _look(shards: Shards, options: DataOptions) -> Survey:
    """A survey of pictures from all over the source."""
    blocks = len(shards.starts) - 1
    wanted = min(blocks, LOOKED_AT if shards.block_bytes is None else LOOKED_INTO)
    each = -(-LOOKED_AT // max(1, wanted))

    def items() -> Iterator[Item]:
        for block in np.unique(np.linspace(0, max(0, blocks - 1), wanted).astype(np.int64)).tolist():
            first, last = int(shards.starts[block]), int(shards.starts[block + 1]) - 1
            find = shards.fetch([block])
            spread = np.linspace(first, last, min(each, last - first + 1)).astype(np.int64)
            yield from (find(row) for row in spread.tolist())

    return look_at(items(), min(LOOKED_AT, int(shards.starts[-1])), options)


def _stream(shards: Shards, options: DataOptions, preparation: Preparation | None, survey: Survey) -> StreamData:
    total = int(shards.starts[-1])
    if not survey.pictures or total < 2:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(survey.skipped.items())[:3])
        named = f" among those looked at ({reasons})" if reasons else ""
        raise DataError(f"{shards.name} has no two readable images{named}: give PNG, JPEG or other image files")
    if (block := largest_block(shards)) > BLOCK_SHARE * psutil.virtual_memory().total:
        raise DataError(
            f"{shards.name} has a row group of {block / 1e6:,.0f} MB, which must be read at once: write the files with "
            "smaller ones, as Dataset.to_parquet(batch_size=1000) does"
        )
    prepare = preparation or survey.preparation(options)
    pictures = Pictures(shards, options, prepare)
    rows, own = shards.parts.get("train"), next((part for part in HELDOUT_SPLITS if part in shards.parts), None)
    if rows is None:
        rows, own = range(total), None
    most = min(HELDOUT_MAX, max(1, HELDOUT_BYTES // math.prod(pictures.shape)))
    if own is None:
        n = min(most, heldout_count(len(rows), options.heldout))
        left_out, held = _held(shards, rows, options.heldout_seed, n)
        if len(left_out) == len(rows):
            raise DataError(f"all {total:,} samples belong to one group: give data of two groups at least")
    else:
        n = min(most, len(shards.parts[own]))
        left_out, (_, held) = np.empty(0, np.int64), _held(shards, shards.parts[own], options.heldout_seed, n)
    heldout = pictures.part(held)
    if not len(heldout):
        raise DataError(f"{shards.name}: none of the {n:,} held-out pictures can be read: restore them")
    buffer = min(options.stream_buffer, int(WINDOW_BYTES / max(1.0, mean_bytes(shards))))
    train = StreamedPart(
        torch.empty((len(rows) - len(left_out), *pictures.shape), dtype=torch.uint8, device="meta"),
        pictures=pictures,
        rows=rows,
        left_out=left_out,
        buffer=max(1, buffer),
    )
    remarks = _remarks(shards, train, survey, options, prepare)
    skipped = tuple({**survey.skipped, **pictures.skipped}.items())
    intake = Intake(total, len(train) + len(heldout), skipped, tuple(remarks))
    return StreamData(shards.name, train, heldout, shards.class_names, prepare, intake, own_parts=own is not None)


def _held(shards: Shards, rows: range, seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to be left out, sorted (groups are whole), and n of them in random order."""
    if n == len(rows):
        left_out = np.arange(rows.start, rows.stop)
    else:
        keys = shards.keys(rows, seed, n)
        left_out = np.flatnonzero(keys <= np.partition(keys, n - 1)[n - 1]) + rows.start
    order = torch.randperm(len(left_out), generator=torch.Generator().manual_seed(seed)).numpy()
    return left_out, left_out[order[:n]]


def _remarks(
    shards: Shards, train: StreamedPart, survey: Survey, options: DataOptions, prepare: Preparation
) -> list[str]:
    if shards.block_bytes is None:
        how = "in random order"
    else:
        how = f"row groups in random order, then among {train.buffer:,} images"
    said = [
        f"decoded anew in every epoch, {how}",
        "what cannot be read is named when it is met; another takes its place",
    ]
    found = survey.remarks(options, prepare)
    return [*said, *(f"of {survey.pictures:,} that were looked at: {text}" for text in found), *shards.remarks()]
