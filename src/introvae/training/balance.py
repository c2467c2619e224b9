"""Settings that find their own values while the players play: beta_neg, and IntroVAE's margin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from introvae.errors import ConfigError
from introvae.objectives import Objective, Warmup

EVERY = 10
"""Steps between two looks: what a look costs is then lost in the step."""
KEEP = 0.8
"""Decay of the averages from look to look: they remember about 50 steps."""
BAND = (0.0, 0.5)
"""Where (KL(fake) - KL(real)) / KL(real) may be. Above 0 the encoder tells fakes from real, so the decoder learns; far
above it the encoder sees more than the decoder can follow."""
GAIN, MOST_CHANGE = 0.5, 0.04
"""Change of ln(exponent) at a look: gain times the distance from the band, at most 4 %."""
SLOW_CHANGE = 0.01
"""The same where fakes settle above real data: KLs of images take hundreds of steps to answer."""
RETURN = 0.005
"""Share of ln(exponent / home) that a look inside the band takes back: half the way in about 1,400 steps."""
START, HOME = 2.5, 1.5
"""The exponent alpha s beta_neg KL(real) of the first adversarial step, and where it goes from there: about those of
the published settings on 8 Gaussians, whose KL(real) falls when the players begin.
"""
SURPLUS = 1.4
"""How far above the KL(real) of the warm-up a fake's KL settles, where settings can have that: see `surplus_exponent`.
Measured on MNIST: 1.0 is the published setting or less, with an adversary that sleeps; 2 begins with KLs that run away.
"""
LEAST, MOST = 1.0, 10.0
"""Bounds of the exponent. The encoder's push on a fake with the KL of real data, s beta_neg exp(-exponent), is largest
at 1; at 10, about what the published MNIST settings have, it is a thousandth of that."""
RAMP = 0.1
"""Share of the adversarial steps over which, where a setting is "auto", the weights of error and KL come from the
warm-up's to their own. Without it KL(real) and the game change at once, and some runs lost modes within 300 steps.
"""
MARGIN_OVER_KL = 1.2
"""IntroVAE's margin over the KL that the warm-up ends with: "a little larger", App. D."""
LED = 0.99
"""Share of AS-IntroVAE's last c below which its distance leads; an annealing by tanh comes near it and never there."""
LEAST_KL = 0.1
"""In nats; a smaller KL(real) is a posterior that collapsed, and no measure for anything."""


def surplus_exponent(objective: Any, scale: float, kl_nats: Tensor) -> Tensor:
    """The exponent with which the two players' pushes on a fake's KL cancel at `SURPLUS` times that of real data.

    The encoder pushes with s beta_neg exp(-e) for an exponent e = alpha s beta_neg KL, the decoder with s b, where b is
    decoder_kl beta_kl: they cancel at e = ln(beta_neg / b). The larger solution of e = ln(e / q), q = SURPLUS alpha s b
    KL(real), has that KL where it is wanted. Images have one, with an exponent of about 5 (MNIST; published: 5.5).
    Where q is above 1 / e, as in the plane, no beta_neg brings fakes that high, and the result is 1, where they come
    highest.

    Example:
        >>> from introvae import SoftIntroVAE
        >>> surplus_exponent(SoftIntroVAE(beta_kl=0.5), 1 / 784, torch.tensor(17.0))
        tensor(5.1298)
        >>> surplus_exponent(SoftIntroVAE(beta_kl=0.3), 1 / 2, torch.tensor(2.1))
        tensor(1.)
    """
    pull = objective.beta_kl * getattr(objective, "decoder_kl", 1.0)
    q = SURPLUS * _sharpness(objective) * scale * pull * kl_nats.clamp(min=LEAST_KL)
    exponent = torch.full_like(q, MOST)
    for _ in range(50):  # each step comes nearer by a factor of the solution; at 1 / e it stops where it is wanted
        exponent = (exponent / q).log().clamp(1.0, MOST)
    return exponent


def balancing_beta_neg(objective: Any, scale: float, kl_nats: float, exponent: float | None = None) -> float:
    """The beta_neg with which a fake of this KL, that of real data, has this exponent alpha s beta_neg KL.

    Arguments:
        objective: `SoftIntroVAE` or `ASIntroVAE`.
        scale: its s.
        kl_nats: of real data.
        exponent: by default the one that an automatic beta_neg makes its home.

    Example:
        >>> from introvae import SoftIntroVAE
        >>> balancing_beta_neg(SoftIntroVAE(), scale=0.5, kl_nats=2.0)
        0.75
    """
    if exponent is None:
        exponent = max(HOME, surplus_exponent(objective, scale, torch.tensor(kl_nats)).item())
    return exponent / (_sharpness(objective) * scale * max(kl_nats, LEAST_KL))


def _sharpness(objective: Any) -> float:
    """alpha, times the part of a fake's KL that is in the exponential when AS-IntroVAE's annealing is over."""
    return getattr(objective, "alpha", 2.0) * getattr(objective, "annealed_to", 1.0)


def led(objective: Any, values: Mapping[str, float]) -> bool:
    """Whether AS-IntroVAE's distance leads at these values: then nobody wants anything of the fakes' KL yet.

    Example:
        >>> from introvae import ASIntroVAE
        >>> led(ASIntroVAE(), {"c": 0.8}), led(ASIntroVAE(annealed_to=0.8), {"c": 0.8})
        (True, False)
    """
    return values.get("c", 1.0) < LED * getattr(objective, "annealed_to", 1.0)


class Rule(Protocol):
    """How one setting follows the game, on the device and without waiting for it."""

    def begin(self, value: Tensor) -> None:
        """Set the value with which the adversarial steps begin."""

    def look(self, kl_real: Tensor, kl_fake: Tensor | None, value: Tensor) -> None:
        """See the KLs of a step and move the value; there are no fakes during the warm-up."""

    def multiply(self, factor: float) -> None:
        """Aim at so many times the value from now on; the value itself is the controller's to change."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Averages:
    """Running averages of 0-d tensors; at first the plain means of what was seen.

    Arguments:
        names: of the averages.
        device: where they are.

    Example:
        >>> averages = Averages(("kl",), "cpu")
        >>> averages.follow(kl=torch.tensor(2.0))
        >>> averages["kl"].item()
        2.0
    """

    def __init__(self, names: tuple[str, ...], device: torch.device | str) -> None:
        self.seen = {name: torch.zeros((), device=device) for name in names}
        self._means = {name: torch.zeros((), device=device) for name in names}

    def __getitem__(self, name: str) -> Tensor:
        return self._means[name]

    def follow(self, **values: Tensor) -> None:
        """Take one more value into each of these averages; one that is not finite changes nothing."""
        for name, value in values.items():
            seen, mean, value = self.seen[name], self._means[name], value.to(torch.float32)
            finite = value.isfinite()
            mean.lerp_(torch.where(finite, value, mean), 1 - (seen / (seen + 1)).clamp(max=KEEP))
            seen.add_(finite)

    def state_dict(self) -> dict[str, Any]:
        """The averages and how many values they have seen."""
        return {
            "seen": {name: seen.clone() for name, seen in self.seen.items()},
            "means": {name: mean.clone() for name, mean in self._means.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        for name, mean in self._means.items():
            self.seen[name].copy_(state["seen"][name])
            mean.copy_(state["means"][name])


class Gap:
    """beta_neg that holds KL(fake) - KL(real), as a share of KL(real), in `BAND`.

    What the encoder's push depends on is the exponent alpha s beta_neg KL, with the KL of real data. It begins at
    `START` and goes to `HOME`, and beta_neg follows KL(real). Where `surplus_exponent` of the warm-up's KL is larger,
    as on images, it begins and stays there, and the KL is the one where fakes settle, `SURPLUS` times the warm-up's:
    KL(real) follows the fakes, and a beta_neg that followed it in turn would make a high KL of the first steps last.
    When KL(fake) falls under KL(real), the adversary sleeps, and the exponent falls towards `LEAST`, where the push is
    strongest; when KL(fake) is far above, it rises, at most to `MOST`. Inside the band it goes home: what a moment
    needed, such as the first steps against a decoder that knows no adversary, must not last, since with a large
    exponent the encoder has no push left and KL(real) decays.

    Arguments:
        objective: `SoftIntroVAE` or `ASIntroVAE`.
        scale: its s.
        device: of the averages.
    """

    def __init__(self, objective: Any, scale: float, device: torch.device | str) -> None:
        self._averages = Averages(("kl", "gap"), device)
        self._objective, self._scale = objective, scale
        self._exponent, self._home = torch.tensor(START, device=device), torch.tensor(HOME, device=device)
        self._settled = torch.zeros((), device=device)  # the KL where fakes settle; 0 where KL(real) is followed
        self._factor = 1.0
        self._at_one = 1 / (_sharpness(objective) * scale)

    def begin(self, value: Tensor) -> None:
        before, seen = value.clone(), self._averages.seen["kl"] > 0
        surplus = torch.where(seen, surplus_exponent(self._objective, self._scale, self._averages["kl"]), 0.0)
        self._exponent.copy_((surplus.clamp(min=START) * self._factor).clamp(LEAST, MOST))
        self._home.copy_(surplus.clamp(min=HOME))
        self._settled.copy_(torch.where(surplus > START, SURPLUS * self._averages["kl"], 0.0))
        self._follow(value)
        value.copy_(torch.where(self._averages.seen["kl"] > 0, value, before))

    def look(self, kl_real: Tensor, kl_fake: Tensor | None, value: Tensor) -> None:
        averages = self._averages
        averages.follow(kl=kl_real)
        if kl_fake is None:
            return
        averages.follow(gap=kl_fake - kl_real)
        relative = averages["gap"] / averages["kl"].clamp(min=LEAST_KL)
        outside = relative - relative.clamp(*BAND)
        back = RETURN * ((self._home * self._factor).clamp(LEAST, MOST) / self._exponent).log()
        most = torch.where(self._settled > 0, SLOW_CHANGE, MOST_CHANGE)
        change = torch.where(outside == 0, back, (GAIN * outside).clamp(-most, most))
        change = torch.where((kl_fake - kl_real).isfinite(), change, 0.0)
        self._exponent.mul_(change.exp()).clamp_(LEAST, MOST)
        self._follow(value)

    def multiply(self, factor: float) -> None:
        self._exponent.mul_(factor).clamp_(LEAST, MOST)
        self._factor *= factor

    def _follow(self, value: Tensor) -> None:
        kl = torch.where(self._settled > 0, self._settled, self._averages["kl"])
        value.copy_(self._exponent * self._at_one / kl.clamp(min=LEAST_KL))

    def state_dict(self) -> dict[str, Any]:
        return {
            "averages": self._averages.state_dict(),
            "exponent": self._exponent.clone(),
            "home": self._home.clone(),
            "settled": self._settled.clone(),
            "factor": self._factor,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._averages.load_state_dict(state["averages"])
        self._exponent.copy_(state["exponent"])
        for name, kept in (("home", self._home), ("settled", self._settled)):
            kept.copy_(state.get(name, kept))  # checkpoints of before they were found have the usual ones
        self._factor = state["factor"]


class Margin:
    """IntroVAE's margin: `MARGIN_OVER_KL` times the KL of real data at the end of the warm-up; fixed from then on.

    Arguments:
        objective: `IntroVAE`.
        scale: unused, its losses have none.
        device: of the average.

    Source: IntroVAE (2018), App. D.
    """

    def __init__(self, objective: Objective, scale: float, device: torch.device | str) -> None:
        self._averages = Averages(("kl",), device)
        self._factor = 1.0

    def begin(self, value: Tensor) -> None:
        value.copy_(self._factor * MARGIN_OVER_KL * self._averages["kl"].clamp(min=LEAST_KL))

    def look(self, kl_real: Tensor, kl_fake: Tensor | None, value: Tensor) -> None:
        if kl_fake is None:
            self._averages.follow(kl=kl_real)

    def multiply(self, factor: float) -> None:
        self._factor *= factor

    def state_dict(self) -> dict[str, Any]:
        return {"averages": self._averages.state_dict(), "factor": self._factor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._averages.load_state_dict(state["averages"])
        self._factor = state["factor"]


def ramp_from(objective: Objective, warmup: Warmup) -> dict[str, float]:
    """The values from which settings come to the objective's own over the first `RAMP` of the adversarial steps: those
    that weigh error and KL as the warm-up does, where a rule rests on its KL(real).

    Example:
        >>> from introvae import SoftIntroVAE, Warmup
        >>> ramp_from(SoftIntroVAE(beta_neg="auto"), Warmup(100, beta_rec=0.8, beta_kl=0.05))
        {'beta_rec': 0.8, 'beta_kl': 0.05}
    """
    return objective.as_in_warmup(warmup) if warmup.steps and objective.automatic else {}


def rules_for(objective: Objective, scale: float, warmup_steps: int, device: torch.device | str) -> dict[str, Rule]:
    """A rule for each setting of the objective that is "auto".

    Raises:
        ConfigError: a setting has no rule, or its rule needs a warm-up and there is none.
    """
    rules: dict[str, Rule] = {}
    for name in objective.automatic:
        if name == "margin" and warmup_steps < 2 * EVERY:
            raise ConfigError(
                "margin 'auto' reads the KL that the warm-up ends with: give --warmup.share 0.1, or a number"
            )
        if name not in _RULES:
            raise ConfigError(f"{name} has no rule to be 'auto': give a number")
        rules[name] = _RULES[name](objective, scale, device)
    return rules


_RULES = {"beta_neg": Gap, "margin": Margin}
