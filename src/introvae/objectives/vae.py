"""The variational autoencoder: the introspective models' ancestor, baseline and warm-up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from introvae.errors import not_negative, positive
from introvae.objectives.base import Judged, Objective, Values


@dataclass(frozen=True)
class VAE(Objective):
    """L = beta_rec * rec(x) + beta_kl * KL(x), minimised by both networks together.

    Arguments:
        beta_rec: weight of the squared error summed over pixels.
        beta_kl: weight of the KL in nats.

    Raises:
        ConfigError: a weight is negative, or beta_rec is 0.

    Source: Kingma & Welling 2014, Eq. 10; betas as in Soft-IntroVAE (2021), Sec. 5.

    Example:
        >>> VAE(beta_kl=0.5)
        VAE(beta_rec=1.0, beta_kl=0.5)
    """

    beta_rec: float = 1.0
    beta_kl: float = 1.0

    adversarial: ClassVar[bool] = False
    tunable: ClassVar[tuple[str, ...]] = ("beta_rec", "beta_kl")

    def __post_init__(self) -> None:
        positive(beta_rec=self.beta_rec)
        not_negative(beta_kl=self.beta_kl)

    def encoder_loss(self, real: Judged, fakes: tuple[Judged, ...], values: Values) -> Tensor:
        return (values["beta_rec"] * real.rec + values["beta_kl"] * real.kl).mean()

    def decoder_loss(self, real: Judged, fakes: tuple[Judged, ...], values: Values) -> Tensor:
        return self.encoder_loss(real, fakes, values)
