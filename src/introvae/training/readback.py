"""Numbers of a step for the log, read back without making the device wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from introvae.parallel import Alone


class Readback:
    """Lines of the log whose numbers are on their way from the device, oldest first.

    Arguments:
        peers: the numbers are means over their samples.
    """

    def __init__(self, peers: Alone) -> None:
        self.peers = peers
        self._waiting: deque[tuple[dict[str, Any], list[str], Tensor, torch.cuda.Event | None, dict[str, Any]]] = (
            deque()
        )

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, before: dict[str, Any], record: Mapping[str, Tensor], after: dict[str, Any]) -> None:
        """Start to read 0-d tensors; the line will hold `before`, their values and `after`."""
        tensors = [value.detach() for value in record.values()]
        dtype = torch.float64 if tensors[0].device.type == "cpu" else torch.float32
        numbers = torch.stack([tensor.to(dtype) for tensor in tensors])
        self.peers.average([numbers])
        event = None
        if numbers.device.type == "cuda":
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            numbers, event = host.copy_(numbers, non_blocking=True), torch.cuda.Event()
            event.record()
        self._waiting.append((before, list(record), numbers, event, after))

    def rows(self, wait: bool = False) -> Iterator[dict[str, Any]]:
        """The lines that have arrived; with `wait` all."""
        while self._waiting:
            before, names, numbers, event, after = self._waiting[0]
            if event is not None and not event.query():
                if not wait:
                    return
                event.synchronize()
            self._waiting.popleft()
            yield {**before, **dict(zip(names, numbers.tolist(), strict=True)), **after}
