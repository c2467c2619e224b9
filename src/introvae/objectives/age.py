"""AGE: encoder and generator play about how far a batch of encodings, as a whole, is from the prior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from introvae.errors import ConfigError, DataError, not_negative, positive
from introvae.objectives.base import Judged, Objective, Values

VARIANCE_FLOOR = 1e-6
"""Added to a batch's variance inside the logarithm, so that a batch of equal encodings has a finite divergence."""


@dataclass(frozen=True)
class AGE(Objective):
    """L_E = Delta(e(X)) - Delta(e(g(Z))) + mu mean|x - g(e(x))|;  L_G = Delta(e(g(Z))) + lam mean (z - e(g(z)))^2.

    Delta is the KL to the prior of the Gaussian that is fitted to a whole batch of encodings (see `divergence`). All
    three terms are means over latent dimensions or pixel values, so that the weights depend on neither number.

    The encoder is deterministic: e(x) is the posterior's mean, with no noise. The log-variance is in no loss; it
    stays whatever the shared layers make of it and says nothing about the data, so a posterior's samples and KL have no
    meaning, while its mode, and with it `reconstruct` and `interpolate`, has. The prior is N(0, I); the authors' prior,
    uniform on a sphere, is nearly the same in many dimensions and is not offered. Their code updates the generator two
    or three times for each update of the encoder; here both are updated once on each batch.

    Arguments:
        mu: weight of the reconstruction's absolute error, for pixels in [0, 1] (the authors' 10 is for [-1, 1]).
        lam: weight of the latents' squared error (the authors' 1000 on a unit sphere of 128 dimensions, whose squared
            distances are 128 times smaller, is 8 here).

    Raises:
        ConfigError: a setting is out of range; a batch of one.

    Source: Ulyanov et al. 2018, It Takes (Only) Two: Adversarial Generator-Encoder Networks, with Delta from its Eq. 7;
    weights from the authors' code for CIFAR-10.

    Example:
        >>> AGE().values()
        {'mu': 20.0, 'lam': 8.0}
    """

    mu: float = 20.0
    lam: float = 8.0

    batch_coupled: ClassVar[bool] = True
    tunable: ClassVar[tuple[str, ...]] = ("mu", "lam")
    judges_reconstruction: ClassVar[bool] = False
    encodes: ClassVar[str] = "mode"

    def __post_init__(self) -> None:
        positive(mu=self.mu)
        not_negative(lam=self.lam)

    def check(self, latent_dim: int, batch_size: int) -> None:
        if batch_size < 2:
            raise ConfigError("AGE fits a Gaussian to the encodings of a batch: batch_size must be above 1")

    def recorded(self, real: Judged, fakes: tuple[Judged, ...]) -> dict[str, Tensor]:
        """The divergences, in nats for each dimension; the KLs in a step of the warm-up, which is a VAE's."""
        if not fakes:
            return super().recorded(real, fakes)
        (sample,) = fakes
        return {
            "divergence_real": divergence(real.posterior.mode),
            "divergence_sample": divergence(sample.posterior.mode),
            "latent_error": _latent_error(sample),
        }

    def encoder_loss(self, real: Judged, fakes: tuple[Judged, ...], values: Values) -> Tensor:
        (sample,) = fakes
        if real.reconstruction is None:
            raise RuntimeError("this loss reads real.reconstruction, which the step does not give")
        error = (real.x - real.reconstruction).abs().mean()
        return divergence(real.posterior.mode) - divergence(sample.posterior.mode) + values["mu"] * error

    def decoder_loss(self, real: Judged, fakes: tuple[Judged, ...], values: Values) -> Tensor:
        (sample,) = fakes
        return divergence(sample.posterior.mode) + values["lam"] * _latent_error(sample)


def divergence(encodings: Tensor) -> Tensor:
    """KL(N(m, s^2) || N(0, 1)) with the mean m and standard deviation s of each dimension of the batch `[N, Z]`.

    Returns:
        A scalar: the mean over the dimensions, in nats.

    Raises:
        DataError: a batch of one.

    Source: Ulyanov et al. 2018, Eq. 7, divided by the number of dimensions.

    Example:
        >>> import torch
        >>> divergence(torch.tensor([[-1.0], [3.0]])).item()  # m = 1, s = 2
        1.306...
    """
    if len(encodings) < 2:
        raise DataError("AGE fits a Gaussian to the encodings of a batch, which needs at least 2: raise batch_size")
    mean, variance = encodings.mean(dim=0), encodings.var(dim=0, correction=0)
    return 0.5 * (mean.square() + variance - 1 - (variance + VARIANCE_FLOOR).log()).mean()


def _latent_error(sample: Judged) -> Tensor:
    return (sample.z - sample.posterior.mode).square().mean()
