"""How much memory a run will take, found without taking it."""

from __future__ import annotations

import copy
import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from introvae.machine import free_bytes, resident_bytes
from introvae.model import IntrospectiveVAE
from introvae.objectives import Objective
from introvae.step import Noise, step_class
from introvae.training.config import FitConfig
from introvae.training.guard import COPY_EVERY

ROOM = 0.8
"""Share of the free memory that a proposed batch may fill."""


LIBRARIES = 100 * 2**20
"""What the libraries' kernels and the drawing of pictures take in main memory once they are used; measured."""


SCRATCH = 1.12
"""What convolutions' scratch memory and gaps between blocks add to the tensors; measured."""


GAPS = 1.35
"""What gaps add besides where stages are computed again: their blocks come and go between those that are kept, in main
memory, where freed blocks are not given back. Measured: 1.1 to 1.3 with layer normalisation, 1.3 to 1.8 with pixel."""


class Plan:
    """What a run's memory holds at its peak, and how large a batch could be.

    Arguments:
        config: resolved settings.
        shape: of one sample.
        model: as it will be trained, on its device.
        precision: of the networks.
        processes: that share each batch.

    Example:
        >>> config = FitConfig(network="tiny-conv", latent_dim=4, batch_size=8)
        >>> model = IntrospectiveVAE.build((1, 8, 8), "tiny-conv", latent_dim=4)
        >>> plan = Plan(config, (1, 8, 8), model, "float32")
        >>> plan.step_bytes(16) > plan.step_bytes(8)
        True
    """

    def __init__(
        self, config: FitConfig, shape: tuple[int, ...], model: IntrospectiveVAE, precision: str, processes: int = 1
    ) -> None:
        self.config, self.shape, self.model, self.precision = config, shape, model, precision
        self.device, self.processes = model.device, processes
        held = sum(tensor.nbytes for tensor in model.state_dict().values())
        # This process' libraries and data; the model and its average are counted with the step. The guard keeps two
        # copies of both and of Adam's two moments, in main memory.
        copies = 2 * 4 * held if config.guard == "act" and (config.steps or 0) > COPY_EVERY else 0
        cpu = self.device.type == "cpu"
        self.before = max(0, resident_bytes() - 2 * held) + LIBRARIES + copies if cpu else 0

    def step_bytes(self, batch: int) -> int:
        """Largest number of bytes that tensors hold during the steps with `batch` samples in this process.

        Both kinds of step (warm-up and adversarial) are run with tensors that have shapes but no content.
        """
        from torch._subclasses.fake_tensor import FakeTensorMode

        config = self.config
        objectives: list[tuple[Objective, bool]] = [(config.objective.at(p), False) for p in (0.0, 1.0)]
        model, fake = copy.deepcopy(self.model), FakeTensorMode()
        give_no_content(model, fake)
        with fake, _Live() as live:
            for tensor in model.state_dict().values():
                live.count(tensor)
            step = step_class(config.objective)(
                model,
                config.objective,
                warmup=config.warmup,
                precision=self.precision,
                accumulation=config.accumulation,
                augment=config.augmentation,
            )
            average = [parameter.detach().clone() for parameter in model.parameters()]
            x = torch.empty(batch, *self.shape, device=model.device)
            augment = config.augmentation is not None
            noise = Noise.draw(batch, model.latent_dim, device=model.device, augment=augment)
            condition = None
            if model.classes is not None:
                condition = torch.empty(batch, dtype=torch.int64, device=model.device)
            if config.warmup.steps:
                objectives.append((config.objective, True))
            for objective, warming in objectives:
                step.objective = objective
                values = {name: x.new_empty(()) for name in config.objective.started(math.prod(self.shape)).values(0.0)}
                step(x, noise, values, warming=warming, condition=condition)
            del average
        gaps = GAPS if config.gradient_checkpointing and self.device.type == "cpu" else 1.0
        return int(SCRATCH * gaps * live.peak)

    def peak_bytes(self, batch: int | None = None) -> int:
        """What the process will hold at its peak with this batch over all processes, the run's by default."""
        share = (batch or self.config.batch_size) // self.processes
        return self.before + self.step_bytes(max(1, share))

    def largest_batch(self) -> int | None:
        """The largest batch (over all processes) that fits the free memory, None where the system does not say.

        It may be larger than the data.
        """
        free = free_bytes(self.device)
        if free is None:
            return None
        unit = self.config.accumulation * (2 if self.config.objective.batch_coupled else 1)
        small, large = self.step_bytes(2 * unit), self.step_bytes(8 * unit)
        each = max(1.0, (large - small) / (6 * unit))
        fits = int((ROOM * free - (small - 2 * unit * each)) / each) * self.processes
        return max(0, fits - fits % (unit * self.processes))

    def sentences(self) -> list[str]:
        """The prediction and, where it does not fit, what to do."""
        peak, fits = self.peak_bytes(), self.largest_batch()
        where = "of this process" if self.device.type == "cpu" else f"on {self.device}"
        said = [f"memory: about {peak / 2**30:.2f} GiB {where} at the peak, with batches of {self.config.batch_size}"]
        if fits is not None:
            said.append(f"the largest batch that fits what is free: about {fits:,}")
        if fits is not None and fits < self.config.batch_size:
            others = "--gradient_checkpointing true"
            if not (self.config.objective.batch_coupled or self.config.paired):
                others = f"--accumulation {-(-self.config.batch_size // max(1, fits))} or {others}"
            said.append(f"it does not fit: take --batch_size {max(1, fits)}, {others}")
        return said


def give_no_content(model: IntrospectiveVAE, fake: Any) -> None:
    """Replace all weights and buffers by tensors of a `FakeTensorMode`, which have shapes and no content, in place."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(fake.from_tensor(parameter.detach())))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, fake.from_tensor(buffer))


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and their largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.peak = 0, 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return found

    def count(self, tensor: Tensor) -> None:
        """Count its memory, once and as long as it is alive."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.bytes -= size
