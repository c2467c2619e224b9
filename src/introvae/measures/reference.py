"""Real images that samples are compared with, read a batch at a time."""

from __future__ import annotations

import math

import numpy as np
import torch

from introvae.data import Part
from introvae.data.stream import StreamedPart

AHEAD_BYTES = 2**28
"""Of a stream so much is decoded at a time: a block of files is read again for each such piece."""


class Reference:
    """Random rows of a part, in random order; no copy of them is made, and those of a stream are decoded when
    they are read.

    Arguments:
        part: the training or held-out part.
        n: how many rows; of a part with fewer, all.
        generator: of the choice, on the CPU.

    Example:
        >>> part = Part(torch.arange(8).to(torch.uint8).view(4, 1, 1, 2))
        >>> reference = Reference(part, 3, torch.Generator().manual_seed(0))
        >>> len(reference), reference[1:3].x.shape
        (3, torch.Size([2, 1, 1, 2]))
    """

    def __init__(self, part: Part, n: int, generator: torch.Generator) -> None:
        self.part = part
        if isinstance(part, StreamedPart):
            # Whole windows after one another, as in an epoch of that seed: few blocks are read.
            order = part.order(int(torch.randint(2**31, (), generator=generator)))
            pieces = order.pieces(0, 0, min(n, len(part)))
            self.rows = torch.from_numpy(np.concatenate([piece.rows for piece in pieces]))
        else:
            self.rows = torch.randperm(len(part), generator=generator)[:n]
        self._decoded, self._first = Part(part.x[:0]), 0  # of a stream, the rows that were decoded last

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice) -> Part:
        """Rows that follow one another."""
        first, last, _ = rows.indices(len(self))
        if not isinstance(self.part, StreamedPart):
            return self.part[self.rows[first:last]]
        if not self._first <= first <= last <= self._first + len(self._decoded):
            ahead = max(last, first + max(1, AHEAD_BYTES // math.prod(self.part.x.shape[1:])))
            self._decoded = self.part.pictures.part(self.rows[first:ahead].numpy(), self.part.readable)
            self._first = first
        return self._decoded[slice(first - self._first, last - self._first)]
