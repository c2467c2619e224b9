"""AS-IntroVAE: a distance between the posteriors of two whole batches leads, the fakes' KL takes over."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from introvae.errors import ConfigError, DataError, not_negative, one_of, positive
from introvae.gaussian import DiagonalGaussian
from introvae.objectives.base import AUTO, Judged, Objective, Values, mean_over_fakes
from introvae.objectives.soft_introvae import SoftIntroVAE, with_beta_neg

VARIANCE_FLOOR = 1e-4
"""Smallest posterior variance inside the kernel: without it the encoder could raise D just by shrinking variances."""

JOINT_MAX_DIM = 8
"""Largest latent dimension for the joint kernel, which vanishes or overflows above (1e-72 ... inf at 128)."""


@dataclass(frozen=True)
class ASIntroVAE(Objective):
    """Soft-IntroVAE with KL(f) replaced by c KL(f) + (1 - c) D in both players' adversarial terms.

    D is the squared maximum mean discrepancy between two batches of posteriors under the Gaussian-overlap kernel
    (see `as_distance`); the encoder maximises it, the decoder minimises it. c grows from 0 at the end of the warm-up
    to 1 after a fifth of the adversarial steps; from then on the objective is Soft-IntroVAE. With `annealed_to` below 1
    the distance stays in the game.

    Arguments:
        beta_rec, beta_kl, beta_neg: as in `SoftIntroVAE`.
        distance_weight: factor on D, which is small next to a KL.
        kernel: "marginal" (mean over the latent dimensions) or "joint" (product; at most 8 dimensions).
        contrast: which two batches D compares: "reconstruction-sample" (the authors' code) or "real-sample" (their
            poster).
        annealing: "linear", c = min(annealing_rate * i / T, 1), or "tanh", c = tanh(annealing_rate * i / T); i and T
            count adversarial steps. None is "linear" for the variant "paper", "tanh" for "official_code".
        annealing_rate: the 5 of the paper.
        annealed_to: largest c, above 0 and at most 1 (the paper's): c is at most that with "linear", times that with
            "tanh".
        decoder_kl: the decoder's weight of c KL(f) + (1 - c) D as a multiple of beta_kl, as in `SoftIntroVAE`.
        scale: as in `SoftIntroVAE`.
        variant: "paper", or "official_code": tanh on mean and log-variance before D (in the decoder's step before
            the KL too), D as a sum in the encoder's step and at half its weight in the decoder's, pairs i = j kept,
            no 1 / sqrt(2 pi) in the kernel, "tanh" annealing; all read off the authors' public code.

    Raises:
        ConfigError: a setting is out of range; the joint kernel meets more than 8 latent dimensions.
        DataError: the unbiased distance meets a batch of one.

    Source: AS-IntroVAE (2022), Eqs. 4-6, with the kernel's exp() and the KL's sign repaired.

    Example:
        >>> ASIntroVAE().values(progress=0.1)["c"]
        0.5
    """

    beta_rec: float = 1.0
    beta_kl: float = 1.0
    beta_neg: float | Literal["auto"] | None = 256.0
    distance_weight: float = 1.0
    kernel: str = "marginal"
    contrast: str = "reconstruction-sample"
    annealing: str | None = None
    annealing_rate: float = 5.0
    annealed_to: float = 1.0
    decoder_kl: float = 1.0
    scale: float | None = None
    variant: str = "paper"

    batch_coupled: ClassVar[bool] = True
    tunable: ClassVar[tuple[str, ...]] = ("beta_rec", "beta_kl", "beta_neg", "distance_weight")
    reads_fake_rec_in_encoder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive(beta_rec=self.beta_rec, annealing_rate=self.annealing_rate, annealed_to=self.annealed_to)
        positive(decoder_kl=self.decoder_kl)
        if self.annealed_to > 1:
            raise ConfigError(f"annealed_to is {self.annealed_to}: it must be at most 1")
        not_negative(beta_kl=self.beta_kl, distance_weight=self.distance_weight)
        if self.beta_neg not in (None, AUTO):
            not_negative(beta_neg=self.beta_neg)
        if self.scale is not None:
            positive(scale=self.scale)
        one_of(("marginal", "joint"), kernel=self.kernel)
        one_of(("reconstruction-sample", "real-sample"), contrast=self.contrast)
        if self.annealing is not None:
            one_of(("linear", "tanh"), annealing=self.annealing)
        one_of(("paper", "official_code"), variant=self.variant)

    @property
    def reads_real_in_decoder(self) -> bool:
        return self.contrast == "real-sample"

    def check(self, latent_dim: int, batch_size: int) -> None:
        _check_joint(self.kernel, latent_dim)
        if batch_size < 2:
            raise ConfigError("ASIntroVAE compares the samples of a batch: batch_size must be above 1")

    def scale_of(self, x: Tensor) -> float:
        return self.scale if self.scale is not None else 1.0 / x[0].numel()

    def fitted(self, pixels: int) -> ASIntroVAE:
        return with_beta_neg(self, pixels, None)

    def started(self, pixels: int) -> ASIntroVAE:
        return with_beta_neg(self, pixels, AUTO)

    def values(self, progress: float = 1.0) -> dict[str, float]:
        return {**super().values(progress), "c": self._annealed(progress)}

    def _annealed(self, progress: float) -> float:
        annealing = self.annealing or ("tanh" if self.variant == "official_code" else "linear")
        linear = self.annealing_rate * progress
        return min(linear, self.annealed_to) if annealing == "linear" else self.annealed_to * math.tanh(linear)

    def at(self, progress: float) -> Objective:
        if self._annealed(progress) < 1 or self.variant == "official_code" or type(self) is not ASIntroVAE:
            return self
        return SoftIntroVAE(self.beta_rec, self.beta_kl, self.beta_neg, scale=self.scale, decoder_kl=self.decoder_kl)

    def encoder_loss(self, real: Judged, fakes: tuple[Judged, ...], values: Values) -> Tensor:
        s, c = self.scale_of(real.x), values["c"]
        posteriors = self._contrasted(real, fakes)
        if self.variant == "official_code":
            distance = self._distance(_squashed(posteriors[0]), _squashed(posteriors[1]), reduction="sum")
        else:
            distance = self._distance(*posteriors)
        distance = values["distance_weight"] * distance
        negative_elbo = s * (values["beta_rec"] * real.rec + values["beta_kl"] * real.kl).mean()
        exp_elbo = [
            (-2 * s * (values["beta_rec"] * f.rec + values["beta_neg"] * (c * f.kl + (1 - c) * distance))).exp()
            for f in fakes
        ]
        return negative_elbo + 0.5 * mean_over_fakes(exp_elbo)

    def decoder_loss(self, real: Judged, fakes: tuple[Judged, ...], values: Values) -> Tensor:
        s, c = self.scale_of(real.x), values["c"]
        posteriors = self._contrasted(real, fakes)
        judged = [fake.posterior for fake in fakes]
        half = 1.0
        if self.variant == "official_code":
            posteriors, judged, half = (
                (_squashed(posteriors[0]), _squashed(posteriors[1])),
                [_squashed(q) for q in judged],
                0.5,
            )
        distance = half * values["distance_weight"] * self._distance(*posteriors)
        adversarial = c * mean_over_fakes([q.kl() for q in judged]) + (1 - c) * distance
        return s * (values["beta_rec"] * real.rec.mean() + self.decoder_kl * values["beta_kl"] * adversarial)

    def _contrasted(self, real: Judged, fakes: tuple[Judged, ...]) -> tuple[DiagonalGaussian, DiagonalGaussian]:
        reconstruction, sample = fakes
        first = real if self.contrast == "real-sample" else reconstruction
        return first.posterior, sample.posterior

    def _distance(self, a: DiagonalGaussian, b: DiagonalGaussian, reduction: str = "mean") -> Tensor:
        official = self.variant == "official_code"
        distance = as_distance(a, b, kernel=self.kernel, unbiased=not official, reduction=reduction)
        return distance * _kernel_peak(a, self.kernel) if official else distance


def as_distance(
    a: DiagonalGaussian,
    b: DiagonalGaussian,
    *,
    kernel: str = "marginal",
    unbiased: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Adversarial similarity distance D = E k(a, a') + E k(b, b') - 2 E k(a, b) between two batches of posteriors.

    Arguments:
        a, b: posteriors `[N, Z]` and `[M, Z]`.
        kernel: "marginal", the mean over dimensions of N(mu_a; mu_b, var_a + var_b), or "joint", their product.
        unbiased: leave the pairs of a posterior with itself out of the first two means. Kept, they reward small
            variances: D is 194 instead of 0.15 for two samples of one distribution of log-variance -20.
        reduction: "mean" over the pairs, or "sum" over pairs and dimensions (the authors' code, encoder's step).

    Returns:
        A scalar; with `unbiased` it may be slightly negative.

    Raises:
        ConfigError: the joint kernel with more than 8 latent dimensions.
        DataError: `unbiased` with a batch of one.

    Source: AS-IntroVAE (2022), Eqs. 4 and 5 (its exp() repaired); variances are floored at `VARIANCE_FLOOR`.

    Example:
        >>> near = DiagonalGaussian(torch.zeros(4, 2), torch.zeros(4, 2))
        >>> far = DiagonalGaussian(torch.full((4, 2), 3.0), torch.zeros(4, 2))
        >>> round(as_distance(near, far).item(), 4)
        0.5047
    """
    _check_joint(kernel, a.mean.shape[1])
    if unbiased and min(len(a.mean), len(b.mean)) < 2:
        raise DataError("the distance between posteriors needs a batch of at least 2: raise batch_size")

    def expectation(p: DiagonalGaussian, q: DiagonalGaussian, same: bool) -> Tensor:
        pairs = _overlap(p, q, kernel, reduction)
        count = pairs.numel()
        if same and unbiased:
            # Left out before the sum: taken from it, they would leave their rounding, which can be all that is there.
            pairs, count = pairs - torch.diag(pairs.diagonal()), count - len(pairs)
        total = pairs.sum()
        return total if reduction == "sum" else total / count

    return expectation(a, a, True) + expectation(b, b, True) - 2 * expectation(a, b, False)


def _check_joint(kernel: str, latent_dim: int) -> None:
    if kernel == "joint" and latent_dim > JOINT_MAX_DIM:
        raise ConfigError(
            f"the joint kernel vanishes in {latent_dim} latent dimensions (at most {JOINT_MAX_DIM}): "
            "use kernel='marginal'"
        )


def _overlap(p: DiagonalGaussian, q: DiagonalGaussian, kernel: str, reduction: str) -> Tensor:
    """Integral of the product of each pair of posteriors, `[N, M]`."""
    p_variance, q_variance = p.variance.clamp(min=VARIANCE_FLOOR), q.variance.clamp(min=VARIANCE_FLOOR)
    variance = p_variance[:, None] + q_variance[None]
    squares = (p.mean[:, None] - q.mean[None]).square()
    log_density = -0.5 * (squares / variance + variance.log() + math.log(2 * math.pi))
    if kernel == "joint":
        return log_density.sum(dim=-1).exp()
    density = log_density.exp()
    return density.sum(dim=-1) if reduction == "sum" else density.mean(dim=-1)


def _kernel_peak(posterior: DiagonalGaussian, kernel: str) -> float:
    """The (2 pi)^(d/2) that the authors' code leaves out of its kernel."""
    return (2 * math.pi) ** (posterior.mean.shape[1] / 2 if kernel == "joint" else 0.5)


def _squashed(posterior: DiagonalGaussian) -> DiagonalGaussian:
    return DiagonalGaussian(torch.tanh(posterior.mean), torch.tanh(posterior.logvar))
