"""Recognises a training that goes wrong, goes back to a good state in memory and changes one thing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from introvae.objectives import Objective
from introvae.parallel import Alone
from introvae.training.balance import LEAST_KL, balancing_beta_neg, led
from introvae.training.controller import Controller
from introvae.training.readback import Readback

LOOK = 10
"""Steps between two looks. A look judges what the one before it recorded, so that no step waits for its numbers:
what is not finite is recognised within 2 * LOOK steps."""
COPY_EVERY = 200
"""Steps between two copies of the state."""
PROBATION = 200
"""A copy counts as good when so many steps have followed it without an alarm."""
GRACE = 50
"""Steps after a change in which only numbers that are not finite are seen, at their end."""
ATTEMPTS = 5
"""Changes in a run; the next alarm stops it."""
KEEP = 0.8
"""Decay of the averages from look to look: they remember about 50 steps."""

EXPLODED, JUMPED = 10.0, 100.0
"""An averaged KL above this many times its reference explodes; above the second it did not grow but jump."""
ASLEEP, ASLEEP_STEPS = 0.9, 500
"""KL(fake) below this share of KL(real) for so long: the encoder does not tell fakes from real."""
FELT, FELT_STEPS = (0.05, 20.0), 100
"""Outside of this range of the exponent alpha s beta_neg KL(real), for so long, the encoder hardly pushes fakes away:
below it the push has too little weight, above it the exponential is 0. The published settings have 0.6 to 10."""
POSTERIOR_STEPS = 500
"""KL(real) below `LEAST_KL` for so long: the posterior is the prior, latents say nothing."""
ALIKE, ALIKE_STEPS, DIVERSE = 0.01, 100, 0.1
"""Samples and reconstructions whose squared distance is below this share of that of samples and real ones, for so long,
after it was above the third number: the decoder collapsed. Many a run begins collapsed, and climbs out of it."""

SEEN = (
    *("rec", "kl_real", "kl_reconstruction", "kl_sample", "apart_fakes", "apart_real", "loss_encoder", "loss_decoder"),
    *("loss_critic", "loss_generator"),
)


@dataclass(frozen=True)
class Alarm:
    """What the guard recognised.

    Arguments:
        cause: in words, with the numbers.
        setting: what to change, "lr" or one of the objective's settings.
        factor: by which.
        back: whether the state has to be undone, or is only to be led elsewhere.
        lost: whether nothing can be made of the state: its numbers are not finite.
    """

    cause: str
    setting: str
    factor: float
    back: bool = True
    lost: bool = False

    @property
    def change(self) -> str:
        """What is done about it, in words."""
        verb = "raised" if self.factor > 1 else "lowered"
        return f"{self.setting} {verb} to {self.factor:.3g} times what it was"

    @property
    def remedy(self) -> str:
        """What a user may do, in words."""
        if self.setting == "lr":
            better = "a lower lr, a longer warm-up or, where the objective has one, a higher beta_neg"
        elif self.setting in ("beta_kl", "beta"):
            better = f"a {'higher' if self.factor > 1 else 'lower'} {self.setting} or a longer warm-up"
        else:
            better = f"a {'higher' if self.factor > 1 else 'lower'} {self.setting}, or {self.setting} auto"
        return f"start a new run with {better}"


class Watch:
    """Judges the numbers of one step every `LOOK` steps; knows nothing of networks.

    Arguments:
        objective: its settings say what can be changed.
        scale: its s.
        latent_dim: Z.

    Example:
        >>> from introvae import SoftIntroVAE
        >>> watch = Watch(SoftIntroVAE(beta_neg=1.0), scale=0.5, latent_dim=2)
        >>> watch.judge(0, {"rec": float("nan"), "kl_real": 1.0}, {}).cause
        'the losses are not finite (rec)'
    """

    def __init__(self, objective: Objective, scale: float, latent_dim: int) -> None:
        self.objective, self.scale, self.latent_dim = objective, scale, latent_dim
        self.reference: float | None = None
        self.usual: float | None = None
        self.averages: dict[str, float] = {}
        self.since: dict[str, int] = {}
        self.blind_until, self.was_diverse, self.was_felt = 0, False, False

    def judge(self, step: int, row: Mapping[str, float], values: Mapping[str, float]) -> Alarm | None:
        """What is wrong with step `step`, whose numbers `row` has and whose settings `values`; None for nothing."""
        if step < self.blind_until:
            return None
        for name, value in row.items():
            if not math.isfinite(value):
                return Alarm(f"the losses are not finite ({name})", "lr", 0.5, lost=True)
        for name, value in row.items():
            self.averages[name] = KEEP * self.averages.get(name, value) + (1 - KEEP) * value
        if "kl_sample" not in row:  # a VAE's step: its KL is what the adversarial phase is measured against
            self.reference = self.averages.get("kl_real")  # None where nothing infers a posterior
            return None
        if self.reference is None:
            self.reference = self.averages["kl_real"]
        # Ten times slower than the averages: hardly touched by what is recognised soon.
        real = self.averages["kl_real"]
        self.usual = real if self.usual is None else self.usual + 0.1 * (1 - KEEP) * (real - self.usual)
        return self._exploded(values) or self._unfelt(step, values) or self._lasting(step, values)

    def _unfelt(self, step: int, values: Mapping[str, float]) -> Alarm | None:
        """beta_neg is so far off that the encoder does not feel the fakes."""
        if values.get("beta_neg", 0) <= 0 or led(self.objective, values):
            return None
        # A fake is not felt when its own exponent is too big; the smallest KL has the smallest.
        least = min(self.averages[name] for name in ("kl_real", "kl_reconstruction", "kl_sample"))
        low, high = (
            values["beta_neg"] / balancing_beta_neg(self.objective, self.scale, kl, exponent=1)
            for kl in (least, self.averages["kl_real"])
        )
        exponent = low if low > FELT[1] else high
        felt = high >= FELT[0] and low <= FELT[1]
        self.was_felt = self.was_felt or felt
        if not self._lasts(step, "unfelt", not felt, FELT_STEPS):
            return None
        size = "small" if exponent < 1 else "big"
        cause = f"the adversarial signal is dead: beta_neg {values['beta_neg']:.3g} is far too {size}"
        wanted = balancing_beta_neg(self.objective, self.scale, self.usual or 1.0)
        return Alarm(cause, "beta_neg", wanted / values["beta_neg"], back=self.was_felt)

    def _exploded(self, values: Mapping[str, float]) -> Alarm | None:
        usual = max(self.reference or 0.0, self.latent_dim / 2, values.get("margin", 0.0))
        fakes = () if led(self.objective, values) else ("kl_reconstruction", "kl_sample")
        for name in ("kl_real", *fakes):
            kl = self.averages[name]
            if kl <= EXPLODED * usual:
                continue
            cause = f"{name} explodes: {kl:.3g} nats, where {usual:.3g} are usual"
            if kl > JUMPED * usual or "beta_neg" not in values:
                return Alarm(cause, "lr", 0.5)
            wanted = balancing_beta_neg(self.objective, self.scale, usual)
            return Alarm(cause, "beta_neg", max(2.0, wanted / max(values["beta_neg"], 1e-12)))
        return None

    def _lasting(self, step: int, values: Mapping[str, float]) -> Alarm | None:
        """States that are wrong only when they last."""
        real = self.averages["kl_real"]
        fake = (self.averages["kl_reconstruction"] + self.averages["kl_sample"]) / 2
        asleep = fake < ASLEEP * real and real >= LEAST_KL and not led(self.objective, values)
        share = self.averages["apart_fakes"] / max(self.averages["apart_real"], 1e-30)
        self.was_diverse = self.was_diverse or share > DIVERSE
        if self._lasts(step, "alike", self.was_diverse and share < ALIKE, ALIKE_STEPS):
            return Alarm(f"fakes are all alike: {share:.2g} as far apart as from real ones", "lr", 0.5)
        if self._lasts(step, "posterior", real < LEAST_KL, POSTERIOR_STEPS):
            setting, factor = ("beta_kl", 0.5) if "beta_kl" in values else ("beta", 2.0)
            return Alarm(f"the posterior collapsed: kl_real is {real:.2g} nats", setting, factor, back=False)
        if self._lasts(step, "asleep", asleep, ASLEEP_STEPS):
            cause = f"the adversarial signal is dead: KL(fake) {fake:.3g} nats under KL(real) {real:.3g}"
            if "beta_neg" in values and values["beta_neg"] > 0:
                factor = balancing_beta_neg(self.objective, self.scale, real) / values["beta_neg"]
                return Alarm(cause, "beta_neg", factor if factor > 2 or factor < 0.5 else 0.5, back=False)
            if "margin" in values:
                return Alarm(cause, "margin", 1.5, back=False)
        return None

    def _lasts(self, step: int, name: str, now: bool, steps: int) -> bool:
        if not now:
            self.since.pop(name, None)
            return False
        return step - self.since.setdefault(name, step) >= steps

    def begin_again(self, step: int) -> None:
        """After a change: forget the bad numbers, and give it time."""
        self.averages, self.since, self.blind_until = {}, {}, step + GRACE

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "reference": self.reference,
            "usual": self.usual,
            "averages": dict(self.averages),
            "since": dict(self.since),
            "blind_until": self.blind_until,
            "was_diverse": self.was_diverse,
            "was_felt": self.was_felt,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.reference, self.blind_until = state["reference"], state["blind_until"]
        self.was_diverse, self.was_felt, self.usual = state["was_diverse"], state["was_felt"], state["usual"]
        self.averages, self.since = dict(state["averages"]), dict(state["since"])


class Copies:
    """Two copies of the training's tensors in main memory: one that is good, and one that may become so.

    Arguments:
        live: gives the tensors, always the same ones in the same order; they are read and written in place, since a
            CUDA graph knows them by their address.
    """

    def __init__(self, live: Callable[[], list[Tensor]]) -> None:
        self.live = live
        self.good_step: int | None = None
        self.candidate_step: int | None = None
        self._good: list[Tensor] = []
        self._candidate: list[Tensor] = []
        self._good_more: Any = None
        self._candidate_more: Any = None

    @torch.no_grad()
    def take(self, step: int, more: Any) -> None:
        """Copy the state after `step` steps; `more` is kept with it."""
        live = self.live()
        if len(self._candidate) != len(live):
            self._candidate = [torch.empty(t.shape, dtype=t.dtype, pin_memory=t.device.type == "cuda") for t in live]
        for kept, tensor in zip(self._candidate, live, strict=True):
            kept.copy_(tensor, non_blocking=True)
        self.candidate_step, self._candidate_more = step, more

    def finite(self) -> bool:
        """Whether the live state is all finite; the host waits for it."""
        return bool(torch.stack([tensor.isfinite().all() for tensor in self.live()]).all())

    def promote(self) -> None:
        """The candidate has proved to be good."""
        self._good, self._candidate = self._candidate, self._good
        self._good_more, self.good_step, self.candidate_step = self._candidate_more, self.candidate_step, None

    @torch.no_grad()
    def restore(self) -> Any:
        """Make the good copy the live state again; returns what was kept with it."""
        for kept, tensor in zip(self._good, self.live(), strict=True):
            tensor.copy_(kept)
        self.candidate_step = None
        return self._good_more


class Guard:
    """Watches a run and keeps it from being lost.

    Every `LOOK` steps it judges the numbers of the step. When something is wrong (see `Watch`) it restores the newest
    state that is known to be good, changes one setting for the rest of the run, and goes on; batches and noise are new
    ones, and the count of steps goes on. After `ATTEMPTS` changes the next alarm ends the run.

    Arguments:
        mode: "act", "warn" (say what is recognised, change nothing) or "off".
        objective: the run's, fitted to the data.
        latent_dim: Z.
        controller: owns the objective's settings.
        live: the tensors of networks, averages and optimisers.
        peers: processes that train together; all see the same numbers and do the same.
    """

    def __init__(
        self,
        mode: str,
        objective: Objective,
        latent_dim: int,
        controller: Controller,
        live: Callable[[], list[Tensor]],
        peers: Alone,
    ) -> None:
        self.mode, self.controller = mode, controller
        self.watch, self.copies, self.readback = (
            Watch(objective, controller.scale, latent_dim),
            Copies(live),
            Readback(peers),
        )
        self.attempts, self.rate = 0, 1.0
        self.warned: list[str] = []
        self._judged = False  # whether numbers were found to be good since the last look

    def see(self, step: int, record: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """After step number `step` (from 1): note its numbers and judge the ones noted before.

        Returns:
            What was recognised and done, for the log; None where nothing was.
        """
        if self.mode == "off" or step % LOOK:
            return None
        event = self.judge(step)
        judged, self._judged = self._judged, False
        found = {name: record[name] for name in SEEN if name in record}
        self.readback.put({"step": step}, {**found, **self.controller.found()}, self.controller.plain())
        if event is None and judged:
            self._copy(step)
        return event

    def judge(self, step: int) -> dict[str, Any] | None:
        """Judge what was noted and not judged yet."""
        rows = list(self.readback.rows(wait=True))
        for row in rows:
            numbers = {name: row[name] for name in SEEN if name in row}
            alarm = self.watch.judge(row["step"], numbers, {name: row[name] for name in self.controller.values})
            if alarm is not None:
                return self.answer(step, alarm)
            self._judged = True
        return None

    def answer(self, step: int, alarm: Alarm) -> dict[str, Any] | None:
        """Do something about an alarm, or only tell of it."""
        self.copies.candidate_step, self._judged = None, False
        event: dict[str, Any] = {"step": step, "cause": alarm.cause, "change": alarm.change}
        if self.mode == "warn" and not alarm.lost:
            kind = re.sub(r"[\d.]+(e[+-]?\d+)?", "", alarm.cause)
            if kind in self.warned:
                return None
            self.warned.append(kind)
            return {**event, "change": "nothing is changed, the guard only warns"}
        hopeless = alarm.lost and self.copies.good_step is None
        if self.mode != "act" or self.attempts >= ATTEMPTS or hopeless:
            return {**event, "change": None, "attempt": self.attempts, "remedy": alarm.remedy}
        self.attempts += 1
        event["attempt"] = self.attempts
        if alarm.back and self.copies.good_step is not None:
            event["back_to"] = self.copies.good_step
            self.controller.go_back(self.copies.restore())
        if alarm.setting == "lr":
            self.rate *= alarm.factor
        else:
            self.controller.multiply(alarm.setting, alarm.factor)
        self.watch.begin_again(step)
        self.readback = Readback(self.readback.peers)
        return event

    def lost(self, step: int, cause: str) -> dict[str, Any] | None:
        """Somebody else found numbers that are not finite."""
        return self.answer(step, Alarm(cause, "lr", 0.5, lost=True))

    def _copy(self, step: int) -> None:
        if self.mode != "act" or step < self.watch.blind_until:
            return
        copies = self.copies
        if copies.good_step is None and copies.finite():  # nothing better is there yet
            copies.take(step, self.controller.state_dict())
            copies.promote()
        if copies.candidate_step is not None and step - copies.candidate_step >= PROBATION:
            copies.promote()
        if step % COPY_EVERY == 0:
            copies.take(step, self.controller.state_dict())

    def begin(self, step: int) -> None:
        """At the start of training: a state that was saved and loaded is good."""
        if self.mode == "act" and step:
            self.copies.take(step, self.controller.state_dict())
            self.copies.promote()

    def state_dict(self) -> dict[str, Any]:
        """Plain values; the copies are not among them, since the state that is saved is good itself."""
        return {
            "attempts": self.attempts,
            "rate": self.rate,
            "warned": list(self.warned),
            "watch": self.watch.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.attempts, self.rate, self.warned = state["attempts"], state["rate"], list(state["warned"])
        self.watch.load_state_dict(state["watch"])
