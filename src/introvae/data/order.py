"""The order of a stream: which row comes at which position is a function of the seed and the epoch, with no state."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch

KEPT = 3
"""Epochs and windows whose order is remembered; what is looked up is the current one or a next."""


class Piece(NamedTuple):
    """Rows that follow one another in an epoch's order and are of one window."""

    window: int
    rows: np.ndarray


class Epoch(NamedTuple):
    """The order of an epoch's blocks and where the windows are in it.

    Arguments:
        blocks: `[B]`, in this epoch's order.
        first_block: `[W + 1]`, of each window, as an index into `blocks`.
        first_position: `[W + 1]`, of each window.
    """

    blocks: np.ndarray
    first_block: np.ndarray
    first_position: np.ndarray


class Order:
    """Rows in random order, found without a list of all of them.

    Every epoch the blocks come in another random order. Blocks that follow one another make a window of about `buffer`
    rows, and the rows of a window are permuted among each other. Blocks of one row each are permuted as a whole.

    Arguments:
        starts: each block's first row, and the end of the last: `[B + 1]`.
        rows: those to give out; whole blocks.
        left_out: rows among them that never come, sorted.
        seed: of all permutations.
        buffer: rows of a window, but for the last block in it.

    Example:
        >>> order = Order(np.array([0, 4, 8, 12]), range(12), np.array([5]), seed=0, buffer=4)
        >>> sorted(row for piece in order.pieces(epoch=0, start=0, stop=11) for row in piece.rows.tolist())
        [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    """

    def __init__(self, starts: np.ndarray, rows: range, left_out: np.ndarray, seed: int, buffer: int) -> None:
        first, last = np.searchsorted(starts, (rows.start, rows.stop))
        self.first_block, self.starts = int(first), starts[first : last + 1]
        self.left_out, self.seed, self.buffer = left_out, seed, buffer
        # How many rows of each block are given out.
        self.counts = np.diff(self.starts) - np.diff(np.searchsorted(left_out, self.starts))
        self._epochs: dict[int, Epoch] = {}
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return int(self.counts.sum())

    def epoch(self, number: int) -> Epoch:
        """The order of the blocks in an epoch."""
        if number not in self._epochs:
            self._forget(self._epochs)
            blocks = torch.randperm(len(self.counts), generator=self._generator(number)).numpy()
            ends = np.cumsum(self.counts[blocks])
            starts = ends - self.counts[blocks]
            first_block = np.flatnonzero(np.diff(starts // self.buffer, prepend=-1))
            first_position = np.append(starts[first_block], ends[-1:])
            self._epochs[number] = Epoch(blocks, np.append(first_block, len(blocks)), first_position)
        return self._epochs[number]

    def windows(self, epoch: int) -> int:
        """How many windows an epoch has."""
        return len(self.epoch(epoch).first_position) - 1

    def blocks(self, epoch: int, window: int) -> np.ndarray:
        """The blocks of a window."""
        order = self.epoch(epoch)
        return order.blocks[order.first_block[window] : order.first_block[window + 1]] + self.first_block

    def pieces(self, epoch: int, start: int, stop: int) -> list[Piece]:
        """The rows at positions `start` to `stop` of an epoch."""
        found, first = [], self.epoch(epoch).first_position
        while start < stop:
            window = int(np.searchsorted(first, start, side="right")) - 1
            end = min(stop, int(first[window + 1]))
            offset = int(first[window])
            found.append(Piece(window, self.rows(epoch, window)[start - offset : end - offset]))
            start = end
        return found

    def rows(self, epoch: int, window: int) -> np.ndarray:
        """The rows of a window in their order."""
        if (epoch, window) not in self._windows:
            self._forget(self._windows)
            blocks = self.blocks(epoch, window) - self.first_block
            starts, sizes = self.starts[blocks], np.diff(self.starts)[blocks]
            before = np.cumsum(sizes) - sizes
            rows = np.repeat(starts - before, sizes) + np.arange(sizes.sum())
            rows = rows[~np.isin(rows, self.left_out)]
            self._windows[epoch, window] = rows[torch.randperm(len(rows), generator=self._generator(epoch, window))]
        return self._windows[epoch, window]

    def _generator(self, *place: int) -> torch.Generator:
        key = blake2b(repr((self.seed, *place)).encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1)

    @staticmethod
    def _forget(remembered: dict[Any, Any]) -> None:
        while len(remembered) >= KEPT:
            del remembered[next(iter(remembered))]
