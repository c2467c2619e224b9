"""CUDA graphs: a step's kernels are recorded once and launched together afterwards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from introvae.errors import ConfigError, first_line
from introvae.objectives import Objective, Values
from introvae.step import IntrospectiveStep, Noise

EAGER_STEPS = 3
"""Ordinary steps of each kind before it is recorded: libraries choose and set up their kernels in them."""
MAX_GRAPHS = 16
"""Kinds of step (phase, objective, batch size) that are recorded; each keeps its own memory."""

NORMAL = ("real", "prior", "fakes", "again")
"""The noise that steps without augmentation read."""

Record = dict[str, Tensor]

log = logging.getLogger("introvae")


class CapturedStep:
    """An `IntrospectiveStep` whose updates are CUDA graphs: for networks that take less time than their launching.

    Every kind of step (phase, objective, batch size) has a graph of its own; steps of a new kind run as they come for a
    while and are then recorded. Where recording fails, that is said once and all goes on as it came. What a step
    returns is overwritten by the next step of its kind.

    Arguments:
        step: made with `capturable=True`, on a CUDA device, in a single process.
        capture: records the kernels of a call and returns what plays them; for tests.

    Raises:
        ConfigError: the model is not on a CUDA device, several processes train it, or the step has augmentation.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(
        self,
        step: IntrospectiveStep,
        capture: Callable[[Callable[[], Record]], tuple[Callable[[], None], Record]] | None = None,
    ) -> None:
        self.step, self._capture = step, capture or _capture
        self._side: Callable[[], AbstractContextManager[Any]] = _SideStream if capture is None else nullcontext
        if capture is None and step.model.device.type != "cuda":
            raise ConfigError(f"CUDA graphs need an NVIDIA GPU, the model is on {step.model.device}: take compile none")
        if step.peers.count > 1:
            raise ConfigError("CUDA graphs are recorded in a single process: take compile none for several")
        if step.augment is not None:
            raise ConfigError("CUDA graphs are recorded without augmentation: take compile none for it")
        self._kinds: dict[Any, _Kind] = {}
        self._failed = False

    @property
    def objective(self) -> Objective:
        """What each player wants."""
        return self.step.objective

    @objective.setter
    def objective(self, objective: Objective) -> None:
        self.step.objective = objective

    def __call__(
        self,
        x: Tensor,
        noise: Noise | None = None,
        values: Values | None = None,
        *,
        warming: bool = False,
        gradients: bool = False,
        condition: Tensor | None = None,
    ) -> Record:
        """As `IntrospectiveStep.__call__`; a step that reports gradients is rare and runs as it comes."""
        step = self.step
        if gradients:
            return step(x, noise, values, warming=warming, gradients=True, condition=condition)
        noise, values = step.filled(x, noise, values)
        draws = {name: getattr(noise, name) for name in NORMAL}
        inputs = {"x": x, **draws, **{f"values.{name}": value for name, value in values.items()}}
        if condition is not None:
            inputs["condition"] = condition
        key = (warming, repr(step.objective), x.shape, x.dtype, condition is None)
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = _Kind({}) if len(self._kinds) < MAX_GRAPHS else _Kind({}, seen=-1)
        play = kind.play
        if play is None:
            if self._failed or kind.seen < 0:
                return step(x, noise, values, warming=warming, condition=condition)
            if kind.seen < EAGER_STEPS:
                kind.seen += 1
                with self._side():
                    return step(x, noise, values, warming=warming, condition=condition)
            kind.inputs = {name: tensor.clone() for name, tensor in inputs.items()}
            play = self._recorded(kind, warming)
            if play is None:
                return step(x, noise, values, warming=warming, condition=condition)
        for name, tensor in inputs.items():
            if kind.inputs[name] is not tensor:
                kind.inputs[name].copy_(tensor, non_blocking=True)
        play()
        return kind.record

    def _recorded(self, kind: _Kind, warming: bool) -> Callable[[], None] | None:
        values = {name.removeprefix("values."): t for name, t in kind.inputs.items() if name.startswith("values.")}
        noise = Noise(*(kind.inputs[name] for name in NORMAL))
        x, condition = kind.inputs["x"], kind.inputs.get("condition")
        try:
            kind.play, kind.record = self._capture(
                lambda: self.step(x, noise, values, warming=warming, condition=condition)
            )
        except RuntimeError as error:
            log.info("CUDA graphs cannot record this step (%s): it goes on without", first_line(error))
            self._failed = True
            for optimizer in (self.step.encoder_optimizer, self.step.decoder_optimizer):
                optimizer.zero_grad(set_to_none=True)
        return kind.play

    def set_lr(self, lr: float) -> None:
        """Set the rate of both players."""
        self.step.set_lr(lr)

    def state_dict(self) -> dict[str, Any]:
        """As `IntrospectiveStep.state_dict`."""
        return self.step.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As `IntrospectiveStep.load_state_dict`; what was recorded is forgotten, it would move the old tensors."""
        self._kinds.clear()
        self.step.load_state_dict(state)


class _Kind:
    """One kind of step: how often it ran, its graph, and the tensors that the graph reads and writes."""

    def __init__(self, inputs: dict[str, Tensor], seen: int = 0) -> None:
        self.inputs, self.seen = inputs, seen
        self.play: Callable[[], None] | None = None
        self.record: Record = {}


class _SideStream:
    """A stream beside the current one, as recording asks of the steps before it."""

    def __enter__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        self.context = torch.cuda.stream(self.stream)
        self.context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)
        torch.cuda.current_stream().wait_stream(self.stream)


def _capture(run: Callable[[], Record]) -> tuple[Callable[[], None], Record]:
    graph = torch.cuda.CUDAGraph()
    # Only this thread's calls count: another one pins the memory of the next inputs meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        record = run()
    return graph.replay, record
