"""Progressive growing: which level of the networks a step trains, on what batches and with which beta_neg."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from introvae.data import ArrayData, Data
from introvae.data.arrays import Part
from introvae.errors import ConfigError, not_negative, positive, whole
from introvae.model import IntrospectiveVAE
from introvae.networks.style import levels_of
from introvae.objectives import Objective
from introvae.training.preview import IMAGES


@dataclass(frozen=True)
class Growth:
    """Training that begins with small images and adds level by level, each with twice the side; for network style.

    A level is faded in: its layers' share in what the networks make grows from 0 to 1. Then it is trained alone, the
    last one to the end of the run.

    Arguments:
        samples: training samples that a level sees once it is there; 0 for a run without growing.
        fade: samples that it sees while it is faded in; by default as many as `samples`, 0 for a jump.
        start: side of the first level in pixels; by default the network's smallest.
        batch: batch size by side, such as {4: 128, 8: 128, 16: 64}, where it is not the run's.
        beta_neg: by side, where it is not the objective's.

    Raises:
        ConfigError: a number is out of range, or the others are given while `samples` is 0.

    Source: Karras et al. 2018 (Progressive Growing of GANs), Sec. 2 and App. A.

    Example:
        >>> Growth(samples=600_000, batch={4: 128, 8: 128, 16: 64}, beta_neg={4: 2048, 8: 2048, 16: 1024}).on
        True
    """

    samples: int = 0
    fade: int | None = None
    start: int | None = None
    batch: dict[int, int] = field(default_factory=dict)
    beta_neg: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        whole(**{"growing.samples": self.samples})
        not_negative(**{"growing.samples": self.samples})
        if self.fade is not None:
            whole(**{"growing.fade": self.fade})
            not_negative(**{"growing.fade": self.fade})
        for side, size in self.batch.items():
            whole(**{f"growing.batch[{side}]": size})
            positive(**{f"growing.batch[{side}]": size})
        not_negative(**{f"growing.beta_neg[{side}]": value for side, value in self.beta_neg.items()})
        if not self.on and (self.batch or self.beta_neg or (self.fade, self.start) != (None, None)):
            raise ConfigError("growing has settings, but growing.samples is 0: give the samples of a level")

    @property
    def on(self) -> bool:
        """Whether there is any growing."""
        return self.samples > 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values; sides as words, as all names of settings are."""
        by_side = {name: {str(side): v for side, v in getattr(self, name).items()} for name in ("batch", "beta_neg")}
        return {**dataclasses.asdict(self), **by_side}

    def fitted(self, objective: Objective, pixels: int) -> Objective:
        """The objective with one scale s for all levels, that of the largest images, as published: so beta_neg and
        s beta_neg KL mean the same at each of them.

        Raises:
            ConfigError: its beta_neg cannot be set by level.
        """
        if self.beta_neg and ("beta_neg" not in objective.tunable or "beta_neg" in objective.automatic):
            does = "finds its own" if "beta_neg" in objective.automatic else "has no"
            raise ConfigError(f"growing.beta_neg is given, {type(objective).__name__} {does} beta_neg: leave it out")
        if self.on and objective.target_lag:
            raise ConfigError("a target decoder does not grow with the decoder: take target_every 0, or no growing")
        if self.on and getattr(objective, "scale", 1.0) is None:
            return dataclasses.replace(objective, scale=1 / pixels)  # pyright: ignore
        return objective


class Level(NamedTuple):
    """Some steps with images of one side: number `first` (from 0) and the ones after it, at first `fading` it in."""

    side: int
    batch: int
    first: int
    fading: int
    samples_before: int


class Schedule:
    """The levels of a run: all is a function of a step's number, so that any step can be the first after a resume.

    A run without growing has one level.

    Arguments:
        growth: the settings.
        shape: of one sample.
        batch_size: where `growth` names none.

    Raises:
        ConfigError: data that are no images, or sides that the images do not have on their way.

    Example:
        >>> schedule = Schedule(Growth(samples=100, fade=40, batch={4: 20}), shape=(1, 8, 8), batch_size=10)
        >>> [(level.side, level.first, level.fading) for level in schedule.levels]
        [(4, 0, 0), (8, 5, 4)]
        >>> [schedule.alpha(step) for step in (4, 5, 6, 8, 9)]
        [None, 0.0, 0.25, 0.75, None]
    """

    def __init__(self, growth: Growth, shape: tuple[int, ...], batch_size: int) -> None:
        self.growth = growth
        self.fade = growth.samples if growth.fade is None else growth.fade
        self.levels: list[Level] = []
        first = seen = 0
        for side in self._sides(shape):
            batch = growth.batch.get(side, batch_size)
            fading = math.ceil(self.fade / batch) if self.levels else 0
            self.levels.append(Level(side, batch, first, fading, seen))
            steps = fading + math.ceil(growth.samples / batch)
            first, seen = first + steps, seen + steps * batch
        self.steps = first
        """When the last level has seen its samples."""

    def _sides(self, shape: tuple[int, ...]) -> Sequence[int]:
        growth = self.growth
        if not growth.on:
            return shape[-1:]
        sides = levels_of(shape[1]) if len(shape) == 3 else ()
        if not sides:
            raise ConfigError(f"growing is for images whose side halves down to 4 ... 7 pixels, not for {shape}")
        listed = ", ".join(map(str, sides))
        if growth.start not in (None, *sides):
            raise ConfigError(
                f"growing.start {growth.start} does not double to {sides[-1]} pixels: choose from {listed}"
            )
        for name, by_side in (("batch", growth.batch), ("beta_neg", growth.beta_neg)):
            for side in by_side.keys() - set(sides):
                raise ConfigError(f"growing.{name} names {side} pixels, which is no level: choose from {listed}")
        return sides if growth.start is None else sides[sides.index(growth.start) :]

    @property
    def full(self) -> int:
        """Number of the first step that trains the whole network without a blend."""
        return self.levels[-1].first + self.levels[-1].fading

    @property
    def batches(self) -> list[int]:
        """All batch sizes."""
        return [level.batch for level in self.levels]

    def at(self, step: int) -> Level:
        """The level of a step."""
        return next(level for level in reversed(self.levels) if level.first <= step)

    def alpha(self, step: int) -> float | None:
        """The level's share at a step, by the samples that it has seen before; None when it is there."""
        level = self.at(step)
        done = step - level.first
        return done * level.batch / self.fade if done < level.fading else None

    def samples(self, step: int) -> int:
        """How many samples the steps before this one see."""
        level = self.at(step)
        return level.samples_before + (step - level.first) * level.batch

    def steps_for(self, samples: float) -> int:
        """About how many steps see so many samples, at least one."""
        level = next((level for level in reversed(self.levels) if level.samples_before <= samples), self.levels[0])
        return max(1, level.first + round((samples - level.samples_before) / level.batch))

    def values(self, step: int) -> dict[str, float]:
        """What the level of a step sets of the objective's settings."""
        beta_neg = self.growth.beta_neg.get(self.at(step).side)
        return {} if beta_neg is None else {"beta_neg": float(beta_neg)}

    def told(self, step: int) -> dict[str, float]:
        """Side and share of a step's level, for the log; nothing without growing."""
        alpha = self.alpha(step)
        return {"side": self.at(step).side, "faded_in": 1.0 if alpha is None else alpha} if self.growth.on else {}

    def checked(self, steps: int) -> int:
        """The steps of a run.

        Raises:
            ConfigError: the whole network would not be trained.
        """
        if self.growth.on and steps <= self.full:
            raise ConfigError(
                f"growing takes {self.full} steps before the whole network is trained, the run has {steps}: give "
                f"--steps {self.steps}, or lower growing.samples"
            )
        return steps


class Grower:
    """Brings networks, images and Adam's moments to the level of a step.

    All of Adam's moments are there from the start, so that the state of a run has the same tensors at every level; a
    weight without a gradient is not moved. They start anew with each level, as Progressive GAN's do: with four times as
    many pixels, gradients are other ones.

    Arguments:
        schedule: what to do at which step.
        models: whose networks grow: the trained one and its average.
        optimizers: of the trained one.

    Raises:
        ConfigError: the networks cannot grow.
    """

    def __init__(
        self, schedule: Schedule, models: Sequence[IntrospectiveVAE], optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        self.schedule, self.models, self.optimizers = schedule, models, optimizers
        self.alpha = torch.ones((), device=models[0].device)
        self._now: tuple[int, bool] | None = None
        for level in schedule.levels:  # up to the full one
            for model in models:
                model.grow(level.side)
        self._forget()

    def begin(self, step: int) -> bool:
        """Prepare for a step; whether a level begins with it that is not the first."""
        level, alpha = self.schedule.at(step), self.schedule.alpha(step)
        if alpha is not None:
            self.alpha.fill_(alpha)
        if self._now != (level.side, alpha is not None):
            self._now = (level.side, alpha is not None)
            for model in self.models:
                model.grow(level.side, None if alpha is None else self.alpha)
        if step != level.first:
            return False
        self._forget()
        return step > 0

    def ends_with(self, step: int) -> bool:
        """Whether a level begins when so many steps are done."""
        return any(step == level.first for level in self.schedule.levels[1:])

    def fit(self, x: Tensor) -> Tensor:
        """Images `[N, C, S, S]` as the level takes them: the means over areas; those that a level is faded in with are
        blended with the ones of the level below.
        """
        side, fading = self._now or (x.shape[2], False)
        x = F.avg_pool2d(x, x.shape[2] // side)
        return torch.lerp(F.interpolate(F.avg_pool2d(x, 2), scale_factor=2), x, self.alpha) if fading else x

    def shown(self, data: Data) -> Data:
        """The data with the first held-out images as the level takes them, for a picture."""
        if not isinstance(data, ArrayData):
            return data
        heldout = data.heldout[slice(IMAGES)]
        images = self.fit(heldout.tensor(self.alpha.device))
        return dataclasses.replace(data, heldout=Part(images, heldout.labels, heldout.names))

    @torch.no_grad()
    def _forget(self) -> None:
        for optimizer in self.optimizers:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                state = optimizer.state[parameter]
                if state:
                    for tensor in state.values():
                        tensor.zero_()
                else:
                    state["step"] = torch.zeros((), device=parameter.device)
                    state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
