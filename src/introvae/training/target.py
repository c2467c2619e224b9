"""When a target decoder, which lags behind the decoder, becomes equal to it again."""

from __future__ import annotations

from typing import Any

from introvae.data import ArrayData, Data
from introvae.errors import ConfigError
from introvae.objectives import Objective
from introvae.objectives.base import EPOCH


class Renewal:
    """Renews a step's target decoder.

    Arguments:
        step: has the target decoder, and `renew_target()`, where the objective wants one.
        objective: says how often.
        data: say how many steps an epoch has.
        batch_size: over all processes.
        growing: whether the networks grow.

    Raises:
        ConfigError: epochs of endless data, or a target decoder of networks that grow.
    """

    def __init__(self, step: Any, objective: Objective, data: Data, batch_size: int, growing: bool = False) -> None:
        self.step, self.every = step, 0
        if objective.target_lag and growing:
            raise ConfigError("a target decoder does not grow with the decoder: leave target_every or growing out")
        if not isinstance(objective.target_lag, str):
            self.every = objective.target_lag
        elif objective.target_lag == EPOCH and isinstance(data, ArrayData):
            self.every = data.steps_per_epoch(batch_size)
        else:
            raise ConfigError(f"{data.name} is endless and has no epochs: give target_every a number of steps")

    def before(self, index: int) -> None:
        """Renew the target before step number `index` (from 0), where it is time; at 0 it is new."""
        if self.every and index and index % self.every == 0:
            self.step.renew_target()
