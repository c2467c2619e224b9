"""Several processes that train one model, each on its share of every batch."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from introvae.errors import ConfigError, IntrovaeError
from introvae.machine import launched

T = TypeVar("T")


class Alone:
    """One process: nothing to share. Also the contract of `Peers`."""

    index, count = 0, 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and speaks."""
        return self.index == 0

    def rows(self, n: int) -> slice:
        """This process' share of n samples.

        Raises:
            ConfigError: n is no multiple of the number of processes.
        """
        if n % self.count:
            above = self.count * (n // self.count + 1)
            nearest = f"{above - self.count} or {above}" if n > self.count else f"{above}"
            raise ConfigError(f"batch_size {n} is no multiple of the {self.count} processes: take {nearest}")
        share = n // self.count
        return slice(self.index * share, (self.index + 1) * share)

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over the processes."""

    def gather(self, x: Tensor) -> Tensor:
        """The rows `[N, ...]` of all processes, `[count * N, ...]`; gradients find their way back."""
        return x

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is up in one of the processes."""
        return flag

    def tell(self, value: T) -> T:
        """The first process' value (anything that can be pickled), for all."""
        return value

    def first_does(self, work: Callable[[], T]) -> T | None:
        """Let the first process do what the others then rely on; its result there, None in the others.

        Raises:
            IntrovaeError: the first process met it; all raise it, so that none is left waiting.
        """
        result, problem = None, None
        if self.first:
            try:
                result = work()
            except IntrovaeError as error:
                problem = error
        if (problem := self.tell(problem)) is not None:
            raise problem
        return result

    def wait(self) -> None:
        """Go on when all processes have come here."""

    def copy_first(self, module: nn.Module) -> None:
        """Give all processes the weights and buffers of the first."""


class Peers(Alone):
    """The processes that `accelerate launch` or `torchrun` started.

    Losses are means over a process' own samples (or, with `gather`, over those of all), so the mean over the processes
    of their gradients is the gradient of the mean over the whole batch.

    Arguments:
        cpu: stay on the CPU even where there are GPUs.
    """

    def __init__(self, cpu: bool = False) -> None:
        from accelerate import PartialState

        # The others wait while the first reads data that are not cached yet.
        self.state = PartialState(cpu=cpu, timeout=timedelta(hours=12))
        self.index, self.count = self.state.process_index, self.state.num_processes
        atexit.register(self.state.destroy_process_group)

    @property
    def device(self) -> torch.device:
        """The device that belongs to this process."""
        device = torch.device(self.state.device or "cpu")
        return torch.device("cpu") if device.type == "cpu" else device  # torch.load knows no "cpu:0"

    def average(self, tensors: Iterable[Tensor]) -> None:
        import torch.distributed as dist

        tensors = list(tensors)
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.count
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(part.view(tensor.shape))

    def gather(self, x: Tensor) -> Tensor:
        found: Tensor = _Gather.apply(x, self.index, self.count)  # pyright: ignore[reportAssignmentType]
        return found

    def any(self, flag: bool, device: torch.device) -> bool:
        flags = torch.tensor([float(flag)], device=device)
        self.average([flags])
        return bool(flags.item() > 0)

    def tell(self, value: T) -> T:
        import torch.distributed as dist

        told: list[Any] = [value]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    def wait(self) -> None:
        self.state.wait_for_everyone()

    def copy_first(self, module: nn.Module) -> None:
        import torch.distributed as dist

        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


class _Gather(torch.autograd.Function):
    """Rows of all processes; backwards, the sum of what all processes' losses say of this one's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: int, count: int) -> Tensor:
        import torch.distributed as dist

        ctx.rows = slice(index * len(x), (index + 1) * len(x))
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(count)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        import torch.distributed as dist

        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[ctx.rows], None, None


@cache
def _peers(cpu: bool) -> Peers:
    return Peers(cpu)


def processes(device: str = "auto") -> Alone:
    """The processes that train together: those of the launcher, or this one alone.

    Arguments:
        device: the setting; "cpu" keeps them off the GPUs.

    Raises:
        ConfigError: several processes were launched where each would train alone.

    Example:
        >>> processes().count
        1
    """
    if not launched():
        return Alone()
    peers = _peers(device == "cpu" or not torch.accelerator.is_available())
    if peers.count != (wanted := int(os.environ["WORLD_SIZE"])):  # Apple's GPU, say, which has no collectives
        raise ConfigError(
            f"{wanted} processes were launched and each would train alone on device {device}: "
            "take --device cpu, or launch one"
        )
    return peers
