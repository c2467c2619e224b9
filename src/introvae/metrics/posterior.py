"""What the posteriors of real data tell of the latent space: which dimensions are used, and how far from the prior."""

from __future__ import annotations

import torch
from torch import Tensor

from introvae.errors import ConfigError

ACTIVE_VARIANCE = 0.01
"""A latent dimension is in use where its posterior's mean varies by more than this."""


def active_units(mean: Tensor) -> int:
    """Number of latent dimensions whose posterior mean `[N, Z]` varies by more than `ACTIVE_VARIANCE` over the data.

    Source: Burda et al. 2016, Sec. 2.

    Example:
        >>> active_units(torch.tensor([[0.0, 1.0], [0.1, -1.0]]))
        1
    """
    return int((mean.var(dim=0) > ACTIVE_VARIANCE).sum())


def aggregate_kl_nats(mean: Tensor, logvar: Tensor) -> float:
    """KL to the prior N(0, I) of the Gaussian with the moments of the aggregate posterior, in nats.

    The aggregate posterior q(z) is the mean of the posteriors of all data: latents that the decoder was trained on,
    where latents of the prior are what it is asked for. With m the mean of the means and C = (covariance of the means)
    + diag(mean of the variances), KL = (tr C + |m|^2 - Z - ln det C) / 2. It sees shifts, scales and correlations, no
    finer shape, and is at most the mean KL of the single posteriors.

    Arguments:
        mean, logvar: `[N, Z]`.

    Raises:
        ConfigError: C is singular: fewer samples than dimensions, and no variances.

    Source: Hoffman & Johnson 2016, Sec. 2, for the aggregate posterior's part of the ELBO's KL.

    Example:
        >>> round(aggregate_kl_nats(torch.ones(5, 2), torch.zeros(5, 2)), 6)  # N((1, 1), I)
        1.0
    """
    mean, variance = mean.double(), logvar.double().exp()
    centre = mean.mean(dim=0)
    spread = (mean - centre).T @ (mean - centre) / len(mean) + torch.diag(variance.mean(dim=0))
    factor, failed = torch.linalg.cholesky_ex(spread)
    if int(failed):
        raise ConfigError(
            f"the aggregate posterior of {len(mean)} samples has a singular covariance: give more than {mean.shape[1]}"
        )
    log_det = 2 * factor.diagonal().log().sum()
    return ((spread.trace() + centre.square().sum() - mean.shape[1] - log_det) / 2).item()
