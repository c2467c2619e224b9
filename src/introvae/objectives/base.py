"""The contract of an objective: what each of the two players wants, given per-sample terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from introvae.errors import ConfigError, not_negative, positive
from introvae.gaussian import DiagonalGaussian

AUTO = "auto"
"""A setting that finds its own value during training."""

EPOCH = "epoch"
"""A lag of the target decoder: one pass over the training part."""

Values = Mapping[str, Tensor]
"""What may change during a run (betas, margin, annealing), as 0-d tensors by name."""


@dataclass(frozen=True)
class Judged:
    """A batch of images (or vectors) and what the two networks make of it.

    Arguments:
        x: `[N, C, H, W]` or `[N, D]`, the real or fake images.
        z: `[N, Z]`. For real images a draw from their posterior; for fakes the latent they were decoded from.
        posterior: q(z|x) of these images.
        reconstruction_error: `[N]`, squared error summed over pixels, or None where no objective asked for it.
        reconstruction: as x, what the decoder makes of z; of real images only.
        kl_weight: `[N, Z]`, the part of each latent's KL that counts here, where a group shares it; else all of it.
    """

    x: Tensor
    z: Tensor
    posterior: DiagonalGaussian
    reconstruction_error: Tensor | None = None
    reconstruction: Tensor | None = None
    kl_weight: Tensor | None = None

    @cached_property
    def kl(self) -> Tensor:
        """KL(q(z|x) || N(0, I)), `[N]`, in nats."""
        if self.kl_weight is None:
            return self.posterior.kl()
        return (self.kl_weight * self.posterior.kl_per_dimension()).sum(dim=-1)

    @property
    def kl_nats(self) -> Tensor:
        """All of the KL, `[N]`, in nats, whatever part of it counts in a loss: what is logged and compared."""
        return self.kl if self.kl_weight is None else self.posterior.kl()

    @property
    def rec(self) -> Tensor:
        """Squared error of the reconstruction, `[N]`, summed over pixels."""
        if self.reconstruction_error is None:
            raise RuntimeError("this loss reads fake.rec, which its objective's `reads_*` do not declare")
        return self.reconstruction_error


class Objective:
    """Base of all objectives: a frozen dataclass of settings with one loss for each player.

    A new objective is a new file beside this one. It overrides `encoder_loss` and `decoder_loss`, names in
    `reads_*` the terms beyond `real.rec`, `real.kl` and the fakes' `kl` that a loss reads (the step computes no
    other), and in `tunable` the settings that may change during a run and reach the losses through `values`.

    Example:
        >>> class Plain(Objective):
        ...     adversarial = False
        ...
        ...     def encoder_loss(self, real, fakes, values):
        ...         return (real.rec + real.kl).mean()
        >>> Plain().values()
        {}
    """

    # The parser reads these types in the module of each child: only builtins and ClassVar are known there for sure.
    adversarial: ClassVar[bool] = True
    """False for objectives whose players want the same: one joint update, no fakes."""
    batch_coupled: ClassVar[bool] = False
    """True where a sample's loss depends on the others of its batch, which then cannot be split."""
    tunable: ClassVar[tuple[str, ...]] = ()
    reads_fake_rec_in_encoder: ClassVar[bool] = False
    judges_reconstruction: ClassVar[bool] = True
    """False where no loss reads what the encoder says of the reconstruction: `fakes` is then the sample alone."""
    encodes: ClassVar[str] = "posterior"
    """What the trained encoder gives of x: a "posterior"; its "mode" alone, the log-variance being untrained; or
    "nothing", where it is only a critic and the model only samples."""
    step_class: ClassVar[type | None] = None
    """The update that trains it, where that is not the one all others share (`introvae.step.IntrospectiveStep`): a
    child of `introvae.players.Players`."""

    @property
    def reads_fake_rec_in_decoder(self) -> str:
        """What the gradient of the fakes' `rec` reaches in the decoder's phase.

        "" (not read), "fake" (the fake itself, through ||f - sg(D(E(f)))||^2), "redecode" (the second decode,
        through ||sg(f) - D(sg(z_f))||^2) or "target" (the fake, on all ways through ||f - D'(E(f))||^2, where D' is
        the target decoder).
        """
        return ""

    @property
    def target_lag(self) -> int | str:
        """Steps (or "epoch") after which the target decoder D', which decodes what the encoder makes of fakes, becomes
        equal to the decoder again; 0 where there is none.
        """
        return 0

    @property
    def reads_real_in_decoder(self) -> bool:
        """Whether the decoder's loss reads `real.posterior` and `real.kl` (judged anew by the updated encoder)."""
        return False

    def check(self, latent_dim: int, batch_size: int) -> None:
        """Raise `ConfigError` where the objective cannot work with these; called before a run begins."""

    def fitted(self, pixels: int) -> Objective:
        """The objective with settings that depend on the size of a sample (its number of values) filled in."""
        return self

    def scale_of(self, x: Tensor) -> float:
        """The factor s in front of the losses; 1 unless an objective has one."""
        return 1.0

    @property
    def automatic(self) -> tuple[str, ...]:
        """The changeable settings that are "auto": training finds their values (`introvae.training.balance`)."""
        return tuple(name for name in self.tunable if getattr(self, name) == AUTO)

    def started(self, pixels: int) -> Objective:
        """The same with a number for each "auto", to start from, for samples of this many values."""
        if self.automatic:
            raise ConfigError(f"{type(self).__name__} has no rule for {self.automatic[0]} 'auto': give a number")
        return self

    def values(self, progress: float = 1.0) -> dict[str, float]:
        """The changeable settings after the share `progress` in [0, 1] of the adversarial steps.

        Raises:
            ConfigError: a setting has no number yet.
        """
        for name in self.tunable:
            if getattr(self, name) is None:
                raise ConfigError(f"{name} is not chosen yet: give a number, or use objective.fitted(pixels)")
            if getattr(self, name) == AUTO:
                raise ConfigError(f"{name} 'auto' is found by the training loop: give a number, or train with fit")
        return {name: float(getattr(self, name)) for name in self.tunable}

    def as_in_warmup(self, warmup: Warmup) -> dict[str, float]:
        """The settings that weigh error and KL of real data as the warm-up does."""
        return {name: getattr(warmup, name) for name in ("beta_rec", "beta_kl") if name in self.tunable}

    def at(self, progress: float) -> Objective:
        """The objective to use after the share `progress`: itself, or a cheaper one with equal gradients."""
        return self

    def recorded(self, real: Judged, fakes: tuple[Judged, ...]) -> dict[str, Tensor]:
        """What the log tells of the encoder, as scalars: the mean KLs, without the fakes' in a step that has none."""
        names = ("kl_real", "kl_reconstruction", "kl_sample")
        return {name: judged.kl_nats.mean() for name, judged in zip(names, (real, *fakes), strict=False)}

    def encoder_loss(self, real: Judged, fakes: tuple[Judged, ...], values: Values) -> Tensor:
        """What the encoder minimises; a scalar. `fakes` are (reconstruction, sample), cut off from the decoder."""
        raise NotImplementedError

    def decoder_loss(self, real: Judged, fakes: tuple[Judged, ...], values: Values) -> Tensor:
        """What the decoder minimises; a scalar. `fakes` are (reconstruction, sample), judged by the new encoder."""
        raise NotImplementedError


@dataclass(frozen=True)
class Warmup:
    """The first steps of a run, in which both networks minimise an ordinary VAE's loss with betas of its own.

    The loss has the objective's scale s, so that Adam's second moments fit the phase that follows.

    Arguments:
        steps: number of steps, 0 for none.
        beta_rec: weight of the squared error, without unit.
        beta_kl: weight of the KL, without unit.
        share: number of steps as a share of the run's, in [0, 1), instead of `steps`.

    Raises:
        ConfigError: a setting is out of range, or steps and share are both given.

    Source: `num_vae` in Soft-IntroVAE's code; IntroVAE (2018), Sec. 4.1 and App. D.

    Example:
        >>> Warmup(share=0.1, beta_kl=0.05).resolved(steps=2000).steps
        200
    """

    steps: int = 0
    beta_rec: float = 1.0
    beta_kl: float = 1.0
    share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ConfigError(f"warmup.share is {self.share}: it must be at least 0 and below 1")
        if self.steps and self.share:
            raise ConfigError("warmup.steps and warmup.share are both given: give one of them")
        not_negative(**{"warmup.steps": self.steps, "warmup.beta_kl": self.beta_kl})
        positive(**{"warmup.beta_rec": self.beta_rec})

    def resolved(self, steps: int) -> Warmup:
        """The same with its number of steps in a run of `steps`; a share leaves at least one step of the rest."""
        return replace(self, steps=min(round(self.share * steps), steps - 1), share=0.0) if self.share else self

    def loss(self, real: Judged, scale: float) -> Tensor:
        """Mean over the batch of scale * (beta_rec * rec + beta_kl * KL); a scalar."""
        return scale * (self.beta_rec * real.rec + self.beta_kl * real.kl).mean()


def mean_over_fakes(terms: list[Tensor]) -> Tensor:
    """Mean over the kinds of fake and over the batch; a scalar."""
    return torch.stack([term.mean() for term in terms]).mean()
