"""How far latents are from those of normal images."""

from __future__ import annotations

import torch
from torch import Tensor

from introvae.errors import CheckpointError, ConfigError, DataError, positive, whole
from introvae.metrics.frechet import GaussianStatistics


class Mahalanobis:
    """Distance of latents to those of normal images, in units of their spread in each direction.

    Mean and covariance come from sums in float64 that are updated batch by batch, for any number of images. The
    covariance is (1 - s) C + s (tr C / Z) I with C the unbiased one, so that it can be inverted where the images are
    few for the dimensions; the weight s is the one of least expected error, which vanishes with many images.

    Arguments:
        dim: number Z of latent dimensions.
        shrinkage: the weight s from 0 to 1, or None for that of Ledoit and Wolf.

    Raises:
        ConfigError: a shrinkage outside [0, 1].

    Source: Ledoit & Wolf 2004, Sec. 3; distances of features as scores Lee et al. 2018, Eq. 2 (for one class).

    Example:
        >>> normal = Mahalanobis(2)
        >>> normal.update(torch.randn(10_000, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 3.0]))
        >>> normal.distances(torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 6.0]])).round(decimals=1)
        tensor([0., 2., 2.], dtype=torch.float64)
    """

    def __init__(self, dim: int, shrinkage: float | None = None) -> None:
        whole(dim=dim)
        positive(dim=dim)
        if shrinkage is not None and not 0 <= shrinkage <= 1:
            raise ConfigError(f"shrinkage is {shrinkage}: give a number from 0 to 1, or None for Ledoit and Wolf's")
        self.dim, self._given = dim, shrinkage
        self._sums = GaussianStatistics(dim)
        # Sums of |y|^2 y and |y|^4, y a latent less the sums' shift: how far products of latents scatter.
        self._third, self._fourth = torch.zeros(dim, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        self._whitening: Tensor | None = None

    @property
    def count(self) -> int:
        """Latents seen."""
        return self._sums.count

    @property
    def mean(self) -> Tensor:
        """`[Z]`."""
        return self._sums.mean

    @property
    def shrinkage(self) -> float:
        """The weight of the multiple of I in the covariance."""
        return self._ledoit_wolf() if self._given is None else self._given

    @property
    def covariance(self) -> Tensor:
        """`[Z, Z]`, after shrinkage.

        Raises:
            ConfigError: fewer than two latents were seen.
        """
        covariance, s = self._sums.covariance, self.shrinkage
        return (1 - s) * covariance + s * covariance.trace() / self.dim * torch.eye(self.dim, dtype=torch.float64)

    def update(self, latents: Tensor) -> None:
        """Take latents `[N, Z]` of normal images into account.

        Raises:
            DataError: they are of another shape, or NaN or infinite.
        """
        x = self._checked(latents)
        if len(x) == 0:
            return
        self._sums.update(x)
        self._whitening = None
        assert self._sums.shift is not None
        y = x - self._sums.shift
        squares = y.square().sum(dim=1)
        self._third += squares @ y
        self._fourth += squares.square().sum()

    def distances(self, latents: Tensor) -> Tensor:
        """Distances `[N]` of latents `[N, Z]`, float64. Squared, those of Gaussian latents follow chi^2 with Z degrees.

        Raises:
            ConfigError: fewer than two latents of normal images were seen.
            DataError: the normal latents do not vary in all directions, or these have another shape or are not finite.
        """
        x = self._checked(latents)
        if (whitening := self._whitening) is None:
            values, vectors = torch.linalg.eigh(self.covariance)
            if float(values[0]) <= self.dim * torch.finfo(values.dtype).eps * float(values[-1]):
                raise DataError(
                    f"{self.count} latents do not vary in all {self.dim} dimensions: give more normal images, or a "
                    "shrinkage above 0"
                )
            whitening = self._whitening = vectors / values.sqrt()
        return ((x - self.mean) @ whitening).square().sum(dim=1).sqrt()

    def state_dict(self) -> dict[str, Tensor]:
        """All that was seen, as tensors; `load_state_dict` of one with the same settings goes on from there."""
        s = self._sums
        state = {"shift": torch.zeros_like(s.total) if s.shift is None else s.shift, "total": s.total, "outer": s.outer}
        state |= {"third": self._third, "fourth": self._fourth, "count": torch.tensor(s.count)}
        return {name: x.clone() for name, x in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace what was seen by what `state_dict` gave.

        Raises:
            CheckpointError: keys or shapes are not those of this number of dimensions.
        """
        wanted = {name: tuple(x.shape) for name, x in self.state_dict().items()}
        if {name: tuple(x.shape) for name, x in state.items()} != wanted:
            raise CheckpointError(
                f"these are not the sums of a Mahalanobis distance in {self.dim} dimensions: fit anew"
            )
        s = self._sums
        s.count = int(state["count"])
        s.shift = state["shift"].clone() if s.count else None
        s.total, s.outer = state["total"].clone(), state["outer"].clone()
        self._third, self._fourth = state["third"].clone(), state["fourth"].clone()
        self._whitening = None

    def _checked(self, latents: Tensor) -> Tensor:
        if latents.ndim != 2 or latents.shape[1] != self.dim:
            raise DataError(f"latents have shape [N, {self.dim}], not {tuple(latents.shape)}")
        x = latents.detach().cpu().double()
        if not bool(x.isfinite().all()):
            raise DataError("the latents hold NaN or infinite values: the model that made them has diverged")
        return x

    def _ledoit_wolf(self) -> float:
        n, d = self.count, self._sums.total / max(1, self.count)  # d is the mean less the shift
        s = self._sums.covariance * (n - 1) / n
        # The sum of |y - d|^4, multiplied out.
        outer, square = self._sums.outer, d.square().sum()
        fourth = self._fourth - 4 * self._third @ d + 4 * d @ outer @ d + 2 * square * outer.trace() - 3 * n * square**2
        scatter = s.square().sum() - s.trace().square() / self.dim
        error = (fourth / n - s.square().sum()) / n
        return float((error / scatter).clamp(0, 1)) if error > 0 and scatter > 0 else 0.0
