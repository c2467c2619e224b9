"""The values that change during a run: betas, margin, annealing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from introvae.errors import ConfigError
from introvae.objectives import Objective
from introvae.parallel import Alone
from introvae.training.balance import EVERY, RAMP, led, rules_for


def _between(first: float, last: float, share: float) -> float:
    """The number that share of the way from one to another, in equal ratios; in equal steps where one is 0."""
    if first <= 0 or last <= 0:
        return first + share * (last - first)
    return first ** (1 - share) * last**share


LOGGED = frozenset({"step", "samples_seen", "seconds", "seconds_waited", "phase", "lr", "side", "faded_in", "rec"})
"""What a line of the log tells besides the objective's settings and its losses."""


class Controller:
    """Owns the 0-d tensors that an objective's losses read as `values`.

    Those of fixed settings come from the objective, those of "auto" ones from a rule that sees every few steps' KLs
    (`introvae.training.balance`).

    Arguments:
        objective: whose settings they are, fitted to the data.
        warmup_steps: progress counts from there.
        steps: length of the run.
        device: of the tensors.
        pixels: number of values in a sample.
        peers: the processes whose samples the rules see.
        given: fixed values of a step, from its number, that take the place of the objective's.
        ramp_from: values from which settings come to their own, in equal ratios from step to step, over the first
            `RAMP` of the adversarial steps.

    Raises:
        ConfigError: a setting cannot be "auto" here, or has the name of something else in the log.
    """

    def __init__(
        self,
        objective: Objective,
        warmup_steps: int,
        steps: int,
        device: torch.device | str,
        pixels: int,
        peers: Alone | None = None,
        given: Callable[[int], Mapping[str, float]] | None = None,
        ramp_from: Mapping[str, float] | None = None,
    ) -> None:
        self.given, self._ramp_from = given or (lambda step: {}), dict(ramp_from or {})
        self.objective, self.warmup_steps, self.steps, self.peers = objective, warmup_steps, steps, peers or Alone()
        self.scale = objective.scale_of(torch.empty(1, pixels))
        self._rules = rules_for(objective, self.scale, warmup_steps, device)
        self._started = objective.started(pixels)
        self._factors: dict[str, float] = {}
        self._begun = False
        self._last = self._started.values(0.0)
        if taken := sorted(LOGGED & set(self._last)):
            raise ConfigError(
                f"{type(objective).__name__} has a setting {taken[0]!r}, which in a run's log is something else: give "
                "it another name"
            )
        self.values: dict[str, Tensor] = {
            name: torch.tensor(value, device=device) for name, value in self._last.items()
        }

    def progress(self, step: int) -> float:
        """Share of the adversarial steps done before step `step`, in [0, 1]."""
        return max(0, step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)

    def update(self, step: int) -> dict[str, Tensor]:
        """The values of step `step`; only those that changed are written to the device."""
        progress = self.progress(step)
        for name, value in {**self._started.values(progress), **self.given(step)}.items():
            if name in self._rules:
                continue
            if name in self._ramp_from and progress < RAMP:
                value = _between(self._ramp_from[name], value, progress / RAMP)
            value *= self._factors.get(name, 1.0)
            if value != self._last[name]:
                self.values[name].fill_(value)
                self._last[name] = value
        if step >= self.warmup_steps and not self._begun:
            self._begun = True
            for name, rule in self._rules.items():
                rule.begin(self.values[name])
        return self.values

    def observe(self, step: int, record: Mapping[str, Tensor]) -> None:
        """Let the rules see what step `step` recorded; nothing waits for the device."""
        if not self._rules or step % EVERY:
            return
        warming = step < self.warmup_steps
        if not warming and led(self.objective, self._last):
            return  # while AS-IntroVAE's distance leads, nobody wants anything of the fakes' KL
        names = ("kl_real",) if warming else ("kl_real", "kl_reconstruction", "kl_sample")
        kls = torch.stack([record[name].float() for name in names])
        self.peers.average([kls])
        fake = None if warming else (kls[1] + kls[2]) / 2
        for name, rule in self._rules.items():
            rule.look(kls[0], fake, self.values[name])

    def multiply(self, name: str, factor: float) -> None:
        """Change a setting for the rest of the run."""
        self._factors[name] = self._factors.get(name, 1.0) * factor
        if name in self._rules:
            self.values[name].mul_(factor)
            self._rules[name].multiply(factor)

    def go_back(self, state: Mapping[str, Any]) -> None:
        """Take the rules back to where they were; what was changed by `multiply` since then stays changed."""
        then, self._begun = state["factors"], state["begun"]
        for name, rule in self._rules.items():
            rule.load_state_dict(state["rules"][name])
            self.values[name].copy_(state["found"][name])
            factor = self._factors.get(name, 1.0) / then.get(name, 1.0)
            self.values[name].mul_(factor)
            rule.multiply(factor)

    def plain(self) -> dict[str, float]:
        """The fixed values as numbers, for the log."""
        return {name: value for name, value in self._last.items() if name not in self._rules}

    def found(self) -> dict[str, Tensor]:
        """The values that rules move, as they are now."""
        return {name: self.values[name].clone() for name in self._rules}

    def state_dict(self) -> dict[str, Any]:
        """The values as numbers and the state of the rules."""
        return {
            "values": self.plain(),
            "factors": dict(self._factors),
            "begun": self._begun,
            "found": self.found(),
            "rules": {name: rule.state_dict() for name, rule in self._rules.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self._factors, self._begun = dict(state.get("factors", {})), state.get("begun", True)
        for name, value in state["values"].items():
            self.values[name].fill_(value)
            self._last[name] = value
        for name, rule in self._rules.items():
            self.values[name].copy_(state["found"][name])
            rule.load_state_dict(state["rules"][name])
