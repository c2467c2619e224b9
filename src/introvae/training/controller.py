"""The values that change during a run: betas, margin, annealing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from introvae.objectives import Objective


class Controller:
    """Owns the 0-d tensors that an objective's losses read as `values`.

    Arguments:
        objective: whose settings they are.
        warmup_steps: progress counts from there.
        steps: length of the run.
        device: of the tensors.
    """

    def __init__(self, objective: Objective, warmup_steps: int, steps: int, device: torch.device | str) -> None:
        self.objective, self.warmup_steps, self.steps = objective, warmup_steps, steps
        self._last = objective.values(0.0)
        self.values: dict[str, Tensor] = {
            name: torch.tensor(value, device=device) for name, value in self._last.items()
        }

    def progress(self, step: int) -> float:
        """Share of the adversarial steps done before step `step`, in [0, 1]."""
        return max(0, step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)

    def update(self, step: int) -> dict[str, Tensor]:
        """The values of step `step`; only those that changed are written to the device."""
        for name, value in self.objective.values(self.progress(step)).items():
            if value != self._last[name]:
                self.values[name].fill_(value)
                self._last[name] = value
        return self.values

    def plain(self) -> dict[str, float]:
        """The values as numbers, for the log."""
        return dict(self._last)

    def state_dict(self) -> dict[str, Any]:
        """The values as numbers."""
        return {"values": self.plain()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        for name, value in state["values"].items():
            self.values[name].fill_(value)
            self._last[name] = value
