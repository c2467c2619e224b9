"""What each step is given, made ready one step ahead."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from introvae.data.arrays import to_float
from introvae.errors import DataError
from introvae.step import Noise

AHEAD = 2
"""How many steps' inputs wait at most."""


class Batches(Protocol):
    """An endless stream of batches; their size may be set between two of them."""

    batch_size: int

    def stored(self, share: slice = ...) -> Tensor: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class LabelledBatches(Batches, Protocol):
    """Batches that tell classes too."""

    def labelled(self, share: slice = ...) -> tuple[Tensor, Tensor]: ...


class Inputs(NamedTuple):
    """A batch `x: [N, ...]` as float32, the step's noise and, where they are asked for, the classes `[N]` of x, on the
    device.
    """

    x: Tensor
    noise: Noise
    condition: Tensor | None = None


class Feed:
    """Batches and noise for the steps, read and drawn by a thread of its own while the device computes.

    Every process draws the noise of the whole batch and keeps its rows: what a sample gets depends neither on the
    number of processes nor on the device. The state is that of the last batch that was given out.

    Arguments:
        batches: where whole batches come from, on the CPU; images as uint8.
        latent_dim: Z.
        seed: of the noise.
        device: where the steps compute.
        rows: this process' share of every batch.
        flip: mirror every image with probability 1/2.
        sizes: the size of a batch and this process' share, from the batch's number (from 0), where they change.
        classes: how many classes there are, where the steps are to know each sample's.
        augment: draw for augmentation too.
    """

    def __init__(
        self,
        batches: Batches,
        latent_dim: int,
        seed: int,
        device: torch.device,
        rows: slice,
        flip: bool = False,
        sizes: Callable[[int], tuple[int, slice]] | None = None,
        classes: int = 0,
        augment: bool = False,
    ) -> None:
        self.batches, self.latent_dim, self.device, self.rows, self.flip = batches, latent_dim, device, rows, flip
        self.noise = torch.Generator().manual_seed(seed)  # on the CPU: any device can go on
        self.seconds_waited = 0.0
        self.sizes, self.classes, self.augment, self._made = sizes, classes, augment, 0
        self._state = self._now()
        self._ready: queue.Queue[tuple[Any, ...]] | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Feed:
        self._ready, self._stop, self._error = queue.Queue(AHEAD), threading.Event(), None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(self._ready, self._stop), daemon=True)
        threads = torch.get_num_threads()
        self._thread.start()
        self._started.wait()
        torch.set_num_threads(threads)  # the worker's choice would be that of all later threads
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        while self._thread.is_alive():
            if self._ready is not None and not self._ready.empty():
                self._ready.get()
            self._thread.join(0.01)
        self._ready = self._error = None
        self.load_state_dict(self._state)  # what was read ahead is read again, should it go on

    def next(self) -> Inputs:
        """The next step's inputs."""
        if self._error is not None:
            raise self._error
        started = time.perf_counter()
        found = self._make() if self._ready is None else self._ready.get()
        self.seconds_waited += time.perf_counter() - started
        if isinstance(found[0], BaseException):
            self._error = found[0]
            raise found[0]
        (x, noise, flipped, condition), self._state = found
        # From pinned memory the copies to a GPU run beside the host's work.
        x = x.to(self.device, non_blocking=True)
        if flipped is not None:
            flipped = flipped.to(self.device, non_blocking=True)[:, None, None, None]
            x = torch.where(flipped, x.flip(3), x)
        if condition is not None:
            condition = condition.to(self.device, non_blocking=True)
        return Inputs(to_float(x), noise.map(lambda draws: draws.to(self.device, non_blocking=True)), condition)

    def _make(self) -> tuple[Any, ...]:
        if self.sizes is not None:
            self.batches.batch_size, self.rows = self.sizes(self._made)
            self._made += 1
        n = self.batches.batch_size
        x, condition = self._read()
        noise = Noise.draw(n, self.latent_dim, self.noise, augment=self.augment)
        if len(x) < n:
            noise = noise.rows(self.rows)
        flipped = (torch.rand(n, generator=self.noise) < 0.5)[self.rows] if self.flip else None
        if self.device.type == "cuda":
            x, noise = x.pin_memory(), noise.map(Tensor.pin_memory)
            condition = None if condition is None else condition.pin_memory()
        return (x, noise, flipped, condition), self._now()

    def _read(self) -> tuple[Tensor, Tensor | None]:
        """This process' rows of the next batch, and their classes where they are asked for.

        Raises:
            DataError: one has none, or one that is not known: the data changed since their classes were counted.
        """
        if not self.classes:
            return self.batches.stored(self.rows), None
        assert isinstance(self.batches, LabelledBatches)
        x, labels = self.batches.labelled(self.rows)
        strange = labels[(labels < 0) | (labels >= self.classes)]
        if len(strange):
            number = int(strange[0])
            told = "no class" if number < 0 else f"class {number}, and the model knows 0 to {self.classes - 1}"
            raise DataError(f"a training sample has {told}: mend the labels, or train without conditional (or paired)")
        return x, labels

    def _work(self, ready: queue.Queue[tuple[Any, ...]], stop: threading.Event) -> None:
        torch.set_num_threads(1)  # it must not take the cores from the step
        self._started.set()
        while not stop.is_set():
            try:
                found = self._make()
            except BaseException as error:
                found = (error,)
            ready.put(found)
            if len(found) == 1:
                return

    def _now(self) -> dict[str, Any]:
        made = {} if self.sizes is None else {"made": self._made}
        return {"batches": self.batches.state_dict(), "noise": self.noise.get_state(), **made}

    def state_dict(self) -> dict[str, Any]:
        """Where batches and noise are."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; not while the thread runs.

        Raises:
            DataError: the data are not the ones the state is of.
        """
        self.batches.load_state_dict(state["batches"])
        self.noise.set_state(state["noise"].cpu())
        self._made = 0 if self.sizes is None else state["made"]
        self._state = self._now()
