"""Several processes that train one model, each on its share of every batch."""

from __future__ import annotations

import atexit
from collections.abc import Iterable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from introvae.errors import ConfigError
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
            raise ConfigError(
                f"batch_size {n} is no multiple of the {self.count} processes: take {max(1, n // self.count)} or "
                f"{n // self.count + 1} samples for each, {self.count * (n // self.count + 1)} in all"
            )
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

        self.state = PartialState(cpu=cpu)
        self.index, self.count = self.state.process_index, self.state.num_processes
        atexit.register(self.state.destroy_process_group)

    @property
    def device(self) -> torch.device:
        """The device that belongs to this process."""
        return torch.device(self.state.device or "cpu")

    def average(self, tensors: Iterable[Tensor]) -> None:
        import torch.distributed as dist

        tensors = list(tensors)
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.count
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(part.view(tensor.shape))

    def gather(self, x: Tensor) -> Tensor:
        from torch.distributed.nn.functional import all_gather

        return torch.cat(all_gather(x.contiguous()))

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


@cache
def _peers(cpu: bool) -> Peers:
    return Peers(cpu)


def processes(device: str = "auto") -> Alone:
    """The processes that train together: those of the launcher, or this one alone.

    Arguments:
        device: the setting; "cpu" keeps them off the GPUs.

    Example:
        >>> processes().count
        1
    """
    return _peers(device == "cpu") if launched() else Alone()
