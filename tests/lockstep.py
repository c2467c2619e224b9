"""Several processes played by threads of one: they meet at each exchange, as real ones do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from introvae.parallel import Alone

T = TypeVar("T")


class Meeting:
    """Where `count` threads exchange what each of them brings."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier, self.brought = count, threading.Barrier(count, timeout=30), [None] * count

    def exchange(self, index: int, value: Any) -> list[Any]:
        """What all brought, in their order."""
        self.brought[index] = value
        self.barrier.wait()
        found = list(self.brought)
        self.barrier.wait()
        return found


class Thread(Alone):
    """One of the processes."""

    def __init__(self, index: int, meeting: Meeting) -> None:
        self.index, self.count, self.meeting = index, meeting.count, meeting

    def average(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            found = self.meeting.exchange(self.index, tensor.detach().clone())
            tensor.detach().copy_(torch.stack(found).mean(dim=0))

    def gather(self, x: Tensor) -> Tensor:
        return _Gather.apply(x, self)  # pyright: ignore[reportReturnType]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peer: Thread) -> Tensor:
        ctx.peer, ctx.n = peer, len(x)
        return torch.cat(peer.meeting.exchange(peer.index, x.detach()))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        peer: Thread = ctx.peer
        total = torch.stack(peer.meeting.exchange(peer.index, gradients[0])).sum(dim=0)
        return total[peer.index * ctx.n : (peer.index + 1) * ctx.n], None


def in_lockstep(work: Callable[[Thread], T], count: int = 2) -> list[T]:
    """`work(process)` of each process, by index."""
    meeting, found, problems = Meeting(count), [None] * count, []

    def run(index: int) -> None:
        try:
            found[index] = work(Thread(index, meeting))  # pyright: ignore[reportArgumentType, reportCallIssue]
        except BaseException as error:
            problems.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    return found  # pyright: ignore[reportReturnType]
