"""Soft-IntroVAE: the hinge becomes an exponential of the fakes' whole ELBO."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from torch import Tensor
from torch.nn import functional as F

from introvae.errors import ConfigError, not_negative, one_of, positive, whole
from introvae.gaussian import DiagonalGaussian
from introvae.objectives.base import AUTO, EPOCH, Judged, Objective, Values, mean_over_fakes

if TYPE_CHECKING:
    from introvae.objectives.as_introvae import ASIntroVAE

RELATIVE_BETA_NEG = 0.05
"""s beta_neg. The encoder's push on a fake's KL, s beta_neg exp(-alpha s beta_neg KL), balances the decoder's push,
s beta_kl, at KL = ln(beta_neg / beta_kl) / (alpha s beta_neg): 55 to 90 nats for images of 28 to 128 pixels and a
beta_kl near 0.15, a little above what real images have.
"""


@dataclass(frozen=True)
class SoftIntroVAE(Objective):
    """L_E = s (beta_rec rec(x) + beta_kl KL(x)) + 1/alpha mean_f exp(-alpha s (beta_rec rec(f) + beta_neg KL(f)));
    L_D = s (beta_rec rec(x) + decoder_kl beta_kl mean_f KL(f) + gamma_r beta_rec mean_f rec(f)).

    f runs over reconstruction and sample. The exponential is taken of each sample, then averaged.

    Arguments:
        beta_rec: weight of the squared error summed over pixels.
        beta_kl: weight of the KL of real images (encoder) and of fakes (decoder), in nats.
        beta_neg: weight of the fakes' KL inside the encoder's exponential. Too small: training diverges. Too big:
            KL(fake) falls under KL(real) and the adversary sleeps. None is `RELATIVE_BETA_NEG` / s, chosen when the
            data are known; "auto" is found during training, so that KL(fake) stays a little above KL(real).
        gamma_r: weight of the fakes' reconstruction in the decoder's loss. The authors' 1e-8 changes gradients by
            5e-9 relative, so the default is 0, which saves the second decode.
        alpha: sharpness of the exponential (the paper's 2).
        scale: s; None is 1 / number of pixel values, as published (1/2 for 2D data).
        variant: with gamma_r > 0, "paper" lets the gradient of rec(f) = ||f - sg(D(E(f)))||^2 reach the fake,
            "official_code" that of ||sg(f) - D(sg(z_f))||^2 the second decode.
        target_every: "epoch", or a number of steps, for the bootstrap variant; 0 for none. What the encoder makes of
            fakes is then decoded, for both players, by a target decoder D': a copy of the decoder that lags behind and
            becomes equal to it again that often. The gradient of gamma_r's term, now ||f - D'(E(f))||^2, reaches the
            fake on all ways, in either variant; gamma_r may be 0.5 to 1.
        decoder_kl: the decoder's weight of the fakes' KL as a multiple of beta_kl; 1 (the default) as published. The
            theorem's gamma, the weight of the entropy in the p that minimises KL(p_data || p) + gamma H(p), grows with
            it: at 1 dense modes of the data win shares of the samples that are not theirs, less so at 0.1.
        consistency: weight of `embedding_distance` of image and reconstruction, which the encoder minimises besides:
            the reversed autoencoder for anomaly detection, whose authors take 0.005. 0 (the default) is Soft-IntroVAE.

    Raises:
        ConfigError: a setting is out of range.

    Source: Soft-IntroVAE (2021), Eq. 4 and Algorithm 1; default betas: its MNIST and CIFAR-10 settings. The bootstrap
    variant is in the authors' code only (`soft_intro_vae_bootstrap`, a copy each epoch). The reversed autoencoder:
    Bercea et al. (MIDL 2023), whose authors compare the feature maps of every resolution; here it is the latents alone,
    which every encoder has.

    Example:
        >>> SoftIntroVAE(beta_neg=64).values()
        {'beta_rec': 1.0, 'beta_kl': 1.0, 'beta_neg': 64.0}
    """

    beta_rec: float = 1.0
    beta_kl: float = 1.0
    beta_neg: float | Literal["auto"] | None = 256.0
    gamma_r: float = 0.0
    alpha: float = 2.0
    scale: float | None = None
    variant: str = "paper"
    target_every: int | Literal["epoch"] = 0
    consistency: float = 0.0
    decoder_kl: float = 1.0

    tunable: ClassVar[tuple[str, ...]] = ("beta_rec", "beta_kl", "beta_neg")
    reads_fake_rec_in_encoder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive(beta_rec=self.beta_rec, alpha=self.alpha, decoder_kl=self.decoder_kl)
        not_negative(beta_kl=self.beta_kl, gamma_r=self.gamma_r, consistency=self.consistency)
        if self.beta_neg not in (None, AUTO):
            not_negative(beta_neg=self.beta_neg)
        if self.scale is not None:
            positive(scale=self.scale)
        one_of(("paper", "official_code"), variant=self.variant)
        if isinstance(self.target_every, str) and self.target_every != EPOCH:
            raise ConfigError(f"target_every is {self.target_every!r}: give a number of steps, or epoch")
        if self.target_every != EPOCH:
            whole(target_every=self.target_every)
            not_negative(target_every=self.target_every)

    @property
    def target_lag(self) -> int | str:
        return self.target_every

    @property
    def reads_fake_rec_in_decoder(self) -> str:
        if self.gamma_r == 0:
            return ""
        if self.target_every:
            return "target"
        return "redecode" if self.variant == "official_code" else "fake"

    def fitted(self, pixels: int) -> SoftIntroVAE:
        """With beta_neg chosen for samples of this many values, where it is None.

        Example:
            >>> SoftIntroVAE(beta_neg=None).fitted(pixels=64 * 64).beta_neg
            204.8
        """
        return with_beta_neg(self, pixels, None)

    def started(self, pixels: int) -> SoftIntroVAE:
        return with_beta_neg(self, pixels, AUTO)

    def scale_of(self, x: Tensor) -> float:
        return self.scale if self.scale is not None else 1.0 / x[0].numel()

    def encoder_loss(self, real: Judged, fakes: tuple[Judged, ...], values: Values) -> Tensor:
        s, beta_rec, beta_kl, beta_neg = self._weights(real, values)
        negative_elbo = s * (beta_rec * real.rec + beta_kl * real.kl).mean()
        exp_elbo = [(-self.alpha * s * (beta_rec * fake.rec + beta_neg * fake.kl)).exp() for fake in fakes]
        loss = negative_elbo + mean_over_fakes(exp_elbo) / self.alpha
        if self.consistency > 0:
            loss = loss + self.consistency * embedding_distance(real.posterior, fakes[0].posterior).mean()
        return loss

    def decoder_loss(self, real: Judged, fakes: tuple[Judged, ...], values: Values) -> Tensor:
        s, beta_rec, beta_kl, _ = self._weights(real, values)
        loss = beta_rec * real.rec.mean() + self.decoder_kl * beta_kl * mean_over_fakes([fake.kl for fake in fakes])
        if self.gamma_r > 0:
            loss = loss + self.gamma_r * beta_rec * mean_over_fakes([fake.rec for fake in fakes])
        return s * loss

    def _weights(self, real: Judged, values: Values) -> tuple[float, Tensor, Tensor, Tensor]:
        return self.scale_of(real.x), values["beta_rec"], values["beta_kl"], values["beta_neg"]


def embedding_distance(a: DiagonalGaussian, b: DiagonalGaussian) -> Tensor:
    """How far apart two batches of embeddings, the means `[N, Z]` of their posteriors, lie pair by pair, `[N]`: half
    the mean squared difference over dimensions, plus one minus the cosine.

    Arguments:
        a, b: posteriors `[N, Z]`; their variances do not count.

    Source: Bercea et al. (MIDL 2023), the terms of their embedding loss for one layer.

    Example:
        >>> import torch
        >>> east, north = (DiagonalGaussian(torch.tensor([mean]), torch.zeros(1, 2)) for mean in ([1.0, 0], [0, 1.0]))
        >>> embedding_distance(east, north), embedding_distance(east, east)
        (tensor([1.5000]), tensor([0.]))
    """
    squared = (a.mean - b.mean).square().mean(dim=1)
    return 0.5 * squared + 1 - F.cosine_similarity(a.mean, b.mean, dim=1)


Balanced = TypeVar("Balanced", "SoftIntroVAE", "ASIntroVAE")


def with_beta_neg(objective: Balanced, pixels: int, unset: str | None) -> Balanced:
    """The objective with `RELATIVE_BETA_NEG` / s as its beta_neg, for samples of this many values, where that is
    `unset` (None, or "auto", which starts there).
    """
    if objective.beta_neg != unset:
        return objective
    scale = objective.scale if objective.scale is not None else 1 / pixels
    return replace(objective, beta_neg=RELATIVE_BETA_NEG / scale)
