"""The diagonal Gaussian posterior q(z|x) that an encoder's two outputs describe, what a group of them shares, and what
latents tell of the groups.
"""

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


def lent_within(posterior: DiagonalGaussian, groups: Tensor, count: int) -> tuple[DiagonalGaussian, Tensor]:
    """Posteriors whose first `count` latents are those of the next sample of the same group, around the end of the
    batch to its start (a sample that is alone in its group keeps its own); and what each latent's KL then counts.

    An image can be reconstructed from such latents only where they hold what its group has in common. That the others,
    which are its own, do not hold it too is the KL's doing: the KL of latents that are lent is the group's, so each of
    its n samples pays the n-th part, and what all have in common is n times cheaper there.

    Arguments:
        posterior: of the samples of a batch, `[N, Z]`.
        groups: `[N]`, equal numbers for samples of a group (such as a class).
        count: how many latents are lent.

    Returns:
        The posterior, and the weights of its KL, `[N, Z]`.

    Source: Bouchacourt et al. 2018 (Multi-Level VAE), Eq. 4, for a group's latents and their KL; there and in Hosoya
    2019 (Group-based Learning of Disentangled Representations) the group's posterior is a mean, here it is exchanged.

    Example:
        >>> own = DiagonalGaussian(torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]), torch.zeros(3, 2))
        >>> posterior, weight = lent_within(own, torch.tensor([0, 1, 0]), 1)
        >>> posterior.mean.tolist(), weight.tolist()
        ([[3.0, 10.0], [2.0, 20.0], [1.0, 30.0]], [[0.5, 1.0], [1.0, 1.0], [0.5, 1.0]])
    """
    n = len(groups)
    place = torch.arange(n, device=groups.device)
    same = groups[:, None] == groups[None]
    away = (place[None] - place[:, None] - 1) % n  # 0 for the next sample, n - 1 for the sample itself
    lender = away.masked_fill(~same, n).argmin(dim=1)
    mean, logvar = (
        torch.cat([part[lender, :count], part[:, count:]], dim=1) for part in (posterior.mean, posterior.logvar)
    )
    weight = torch.ones_like(mean)
    weight[:, :count] = 1 / same.sum(dim=1, keepdim=True).to(mean.dtype)
    return DiagonalGaussian(mean, logvar), weight


def dependence(z: Tensor, groups: Tensor) -> Tensor:
    """How much latents tell of the groups that they belong to: how much more alike they are within a group than between
    groups; a scalar without unit.

    Likeness of two samples is the mean of C / (C + ||z - z'||^2) over C = 0.3 Z and C = Z. The result is the slope of
    its regression on whether the groups are equal, with what is peculiar to a sample taken out of both. On average over
    batches it is 0 where latents and groups are independent, else above; in a batch it may be below. It is 0 where
    nothing can be compared: in batches under four, of one group, or with no two samples of a group.

    Arguments:
        z: latents of the samples of a batch, `[N, Z]`.
        groups: `[N]`, equal numbers for samples of a group (such as a class).

    Source: Gretton et al. 2005 (Measuring Statistical Dependence with Hilbert-Schmidt Norms), in the unbiased form of
    Song et al. 2012, divided by that of the groups with themselves; the kernel is that of Tolstikhin et al. 2018.

    Example:
        >>> z, groups = torch.tensor([[0.0], [0.0], [3.0], [3.0]]), torch.tensor([0, 0, 1, 1])
        >>> dependence(z, groups), dependence(z[[0, 2, 1, 3]], groups)  # told apart by the latents, and not
        (tensor(0.9339), tensor(-0.4669))
    """
    n, dims = z.shape
    if n < 4:
        return 0 * z.sum()
    squared = (z[:, None] - z[None]).square().sum(dim=-1)
    alike = torch.stack([c / (c + squared) for c in (0.3 * dims, float(dims))]).mean(dim=0)
    others = 1 - torch.eye(n, dtype=z.dtype, device=z.device)
    same = (groups[:, None] == groups[None]).to(z.dtype) * others
    rows = same.sum(dim=1) / (n - 2)
    centred = others * (same - rows[:, None] - rows[None] + same.sum() / ((n - 1) * (n - 2)))
    return (centred * alike).sum() / centred.square().sum().clamp(min=0.5)  # groups to tell apart make 2/3 or more
