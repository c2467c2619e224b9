"""IntroVAE: the encoder pushes the KL of fakes up to a margin, the decoder pulls it down."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from introvae.errors import not_negative, one_of, positive
from introvae.objectives.base import AUTO, Judged, Objective, Values, Warmup


@dataclass(frozen=True)
class IntroVAE(Objective):
    """L_E = KL(x) + alpha * sum_f [margin - KL(f)]^+ + beta * AE(x);  L_D = alpha * sum_f KL(f) + beta * AE(x).

    f runs over reconstruction and sample, AE = rec / 2. The hinge acts on each sample (Eq. 5).

    Arguments:
        beta: weight of AE, half the squared error summed over pixels.
        alpha: weight of the adversarial terms.
        margin: m, in nats; a little above the KL of a VAE with the same beta (App. D). "auto" takes the KL that the
            warm-up ends with, times `introvae.training.balance.MARGIN_OVER_KL`.
        variant: "paper", or "official_code": the hinge acts on the batch mean of the KL, as in Eq. 11 with Eq. 9's
            sum over N and in the authors' code.

    Raises:
        ConfigError: a setting is out of range.

    Source: IntroVAE (2018), Eqs. 5, 9-12; defaults: its 256-pixel setting (weight_rec 0.05 = beta / 2).

    Example:
        >>> IntroVAE(margin=20.0).values()
        {'beta': 0.1, 'alpha': 0.25, 'margin': 20.0}
    """

    beta: float = 0.1
    alpha: float = 0.25
    margin: float | Literal["auto"] = 120.0
    variant: str = "paper"

    tunable: ClassVar[tuple[str, ...]] = ("beta", "alpha", "margin")

    def __post_init__(self) -> None:
        positive(beta=self.beta)
        not_negative(alpha=self.alpha)
        if self.margin != AUTO:
            not_negative(margin=self.margin)
        one_of(("paper", "official_code"), variant=self.variant)

    @property
    def batch_coupled(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.variant == "official_code"

    def started(self, pixels: int) -> IntroVAE:
        return replace(self, margin=type(self).margin) if self.margin == AUTO else self

    def as_in_warmup(self, warmup: Warmup) -> dict[str, float]:
        # The KL's weight is 1, and beta weighs half the squared error.
        return {"beta": 2 * warmup.beta_rec / warmup.beta_kl} if warmup.beta_kl > 0 else {}

    def encoder_loss(self, real: Judged, fakes: tuple[Judged, ...], values: Values) -> Tensor:
        loss = real.kl.mean() + values["beta"] * 0.5 * real.rec.mean()
        for fake in fakes:
            kl = fake.kl.mean() if self.variant == "official_code" else fake.kl
            loss = loss + values["alpha"] * (values["margin"] - kl).relu().mean()
        return loss

    def decoder_loss(self, real: Judged, fakes: tuple[Judged, ...], values: Values) -> Tensor:
        loss = values["beta"] * 0.5 * real.rec.mean()
        for fake in fakes:
            loss = loss + values["alpha"] * fake.kl.mean()
        return loss
