"""Pictures of a stream's source, decoded one by one by threads."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from introvae.data.arrays import Part
from introvae.data.images import read_item
from introvae.data.options import DataOptions
from introvae.data.preparation import Preparation
from introvae.data.shards import Shards
from introvae.data.sources import Item
from introvae.errors import DataError

PATIENCE = 10_000
"""So many pictures one after the other that cannot be read end the run."""
NAMED, SAID = 1000, 10
"""So many skipped pictures are named, and so many of them on the terminal."""

Find = Callable[[int], Item]
Decoded = tuple[np.ndarray, int, str]
"""A picture as uint8 `[C, H, W]`, its class (-1: unknown) and its name."""

log = logging.getLogger("introvae")


class Pictures:
    """Decoded pictures of a source, by row.

    Arguments:
        shards: the source.
        options: how to read it.
        prepare: what is done to each picture.
    """

    def __init__(self, shards: Shards, options: DataOptions, prepare: Preparation) -> None:
        self.shards, self.options, self.prepare = shards, options, prepare
        self.shape = (prepare.channels, *prepare.size)
        self.pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "introvae-decode")
        self.skipped: dict[str, str] = {}
        self._classes = {name: index for index, name in enumerate(shards.class_names)}
        self._unreadable: set[int] = set()
        self._lock = threading.Lock()
        # Threads share the filters of warnings, so they cannot be set around each picture.
        warnings.filterwarnings("ignore", module=r"PIL\.")

    def decode(self, row: int, find: Find) -> Decoded | None:
        """A picture; None, with the reason noted, where it cannot be read."""
        if row in self._unreadable:
            return None
        try:
            item = find(row)
        except KeyError:  # not of the blocks, or rows of them, that are in memory
            item = self.shards.fetch([int(self._block_of(row))], np.array([row]))(row)
        ((name, image),) = read_item(item, self.options, self.prepare)
        if isinstance(image, str):
            self._skip(row, name, image)
            return None
        label = self._classes.get(item.label, -1) if isinstance(item.label, str) else item.label
        return image, -1 if label is None else label, name

    def _skip(self, row: int, name: str, reason: str) -> None:
        with self._lock:
            if row in self._unreadable:
                return
            self._unreadable.add(row)
            if len(self._unreadable) <= NAMED:
                self.skipped[name] = reason
            if len(self._unreadable) <= SAID:
                log.info("skipped  %s: %s", name, reason)

    @property
    def unreadable(self) -> int:
        """How many could not be read so far."""
        return len(self._unreadable)

    def first_readable(self, rows: Iterable[int], find: Find) -> Decoded:
        """The first of some rows that can be read.

        Raises:
            DataError: none, or not one of the first 10,000.
        """
        row = None
        for tried, row in enumerate(rows):
            if (found := self.decode(row, find)) is not None:
                return found
            if tried == PATIENCE:
                break
        reason = next(reversed(self.skipped.items()), ("", ""))
        raise DataError(
            f"{self.shards.name}: no picture can be read any more ({': '.join(reason)}): restore the files and resume"
        )

    def part(self, rows: np.ndarray, read: Callable[[int, Find], Decoded | None] | None = None) -> Part:
        """The pictures of some rows, in their order; each block is read once.

        Arguments:
            read: `decode` or another way to come to a picture; rows where it gives None are left out.
        """
        read = read or self.decode
        x = np.empty((len(rows), *self.shape), np.uint8)
        labels, names = np.full(len(rows), -1), [""] * len(rows)
        order = np.argsort(rows, kind="stable")
        blocks = self._block_of(rows[order])
        cuts = np.flatnonzero(np.diff(blocks)) + 1 if self.shards.block_bytes is not None else []
        kept = np.zeros(len(rows), bool)

        def fill(index: int, find: Find) -> None:
            if (found := read(int(rows[index]), find)) is not None:
                (x[index], labels[index], names[index]), kept[index] = found, True

        for some in np.split(order, cuts):
            find = self.shards.fetch([int(self._block_of(rows[index])) for index in some[:1]])
            for _ in self.pool.map(lambda index, find=find: fill(index, find), some.tolist()):
                pass
        if not kept.all():
            x, labels, names = x[kept], labels[kept], [name for name, good in zip(names, kept, strict=True) if good]
        return Part(torch.from_numpy(x), torch.from_numpy(labels) if self.shards.labelled else None, names)

    def _block_of(self, row: np.ndarray | int) -> np.ndarray:
        return np.searchsorted(self.shards.starts, row, side="right") - 1
