"""The diagonal Gaussian posterior q(z|x) that an encoder's two outputs describe."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from introvae.precision import wide

LOGVAR_RANGE = (-20.0, 10.0)
"""Bounds of every posterior's log-variance: sigma stays in [4.5e-5, 148], so that no log-variance makes an exp()
overflow, and latents and KL of finite means (below 1e18, the root of float32's range) are never NaN. Outside the
bounds the log-variance gets no gradient."""


@dataclass(frozen=True)
class DiagonalGaussian:
    """Diagonal normal distribution over a latent space.

    Arguments:
        mean: `[N, Z]`, without unit.
        logvar: `[N, Z]`, natural logarithm of the variance.

    Source: Kingma & Welling 2014, Sec. 3; IntroVAE (2018), Eq. 9.

    Example:
        >>> posterior = DiagonalGaussian(torch.zeros(3, 2), torch.zeros(3, 2))
        >>> posterior.kl()
        tensor([0., 0., 0.])
    """

    mean: Tensor
    logvar: Tensor

    @classmethod
    def bounded(cls, mean: Tensor, logvar: Tensor) -> DiagonalGaussian:
        """The posterior of an encoder's raw outputs: float32 or wider, log-variance inside `LOGVAR_RANGE`."""
        return cls(wide(mean), wide(logvar).clamp(*LOGVAR_RANGE))

    @property
    def mode(self) -> Tensor:
        """The most likely latent, `[N, Z]`: the mean."""
        return self.mean

    @property
    def variance(self) -> Tensor:
        """Variance of each dimension, `[N, Z]`."""
        return self.logvar.exp()

    def sample(self, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """A latent of each distribution, `[N, Z]`, differentiable in mean and log-variance.

        Arguments:
            noise: standard normal draws `[N, Z]`; drawn here when not given.
            generator: source of those draws.
        """
        if noise is None:
            noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + noise * (0.5 * self.logvar).exp()

    def kl(self) -> Tensor:
        """KL(q || N(0, I)) of each distribution, `[N]`, in nats, summed over the latent dimensions.

        Source: IntroVAE (2018), Eq. 9, with the sign repaired.
        """
        return self.kl_per_dimension().sum(dim=-1)

    def kl_per_dimension(self) -> Tensor:
        """What each latent dimension adds to the KL, `[N, Z]`, in nats."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of `z: [N, Z]`, `[N]`, in nats."""
        squares = (z - self.mean).square() * (-self.logvar).exp()
        return -0.5 * (squares + self.logvar + math.log(2 * math.pi)).sum(dim=-1)

    def detach(self) -> DiagonalGaussian:
        """The same distribution without its graph."""
        return DiagonalGaussian(self.mean.detach(), self.logvar.detach())

    def __getitem__(self, rows: slice) -> DiagonalGaussian:
        return DiagonalGaussian(self.mean[rows], self.logvar[rows])
