"""Fréchet distance between Gaussians fitted to features."""

from __future__ import annotations

import torch
from torch import Tensor

from introvae.errors import ConfigError, DataError
from introvae.metrics.exact import same_space


class GaussianStatistics:
    """Mean and covariance of features, from sums in float64: batch by batch, in any order, on any number of processes.

    The sums are kept on the CPU, and their size does not grow with the number of samples, which is `count`.

    Arguments:
        dim: number of features.

    Source: the sums are of features less a shift, as Chan, Golub & LeVeque 1983 recommend; the covariance is unbiased.

    Example:
        >>> statistics = GaussianStatistics(2)
        >>> statistics.update(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
        >>> statistics.mean, statistics.covariance
        (tensor([1., 2.], dtype=torch.float64), tensor([[2., 4.],
                [4., 8.]], dtype=torch.float64))
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.shift: Tensor | None = None  # subtracted before squaring, or a large mean would eat the digits
        self.total = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Take features `[N, F]` into account.

        Raises:
            DataError: another shape; NaN or infinite values.
        """
        if features.ndim != 2 or features.shape[1] != len(self.total):
            shape = list(features.shape)
            raise DataError(f"the features have the shape {shape}, where [N, {len(self.total)}] is needed")
        x = features.detach().cpu().double()
        if not bool(x.isfinite().all()):
            raise DataError("the features hold NaN or infinite values: the model that made the images has diverged")
        if len(x) == 0:
            return
        if self.shift is None:
            self.shift = x.mean(dim=0)
        x = x - self.shift
        self.count += len(x)
        self.total += x.sum(dim=0)
        outer = x.T @ x
        self.outer += (outer + outer.T) / 2  # some libraries round the two halves differently

    def merge(self, other: GaussianStatistics) -> None:
        """Take into account all that `other` was given, as if it had been given here.

        Raises:
            ConfigError: they are of different numbers of features.

        Example:
            >>> halves = [GaussianStatistics(1), GaussianStatistics(1)]
            >>> halves[0].update(torch.tensor([[0.0], [1.0]])); halves[1].update(torch.tensor([[5.0]]))
            >>> halves[0].merge(halves[1])
            >>> halves[0].count, halves[0].mean
            (3, tensor([2.], dtype=torch.float64))
        """
        if len(self.total) != len(other.total):
            raise ConfigError(
                f"statistics of {len(self.total)} and of {len(other.total)} features cannot be merged: take those of "
                "one feature space"
            )
        if other.shift is None:
            return
        if self.shift is None:
            self.shift = other.shift.clone()
        total, outer = other._moved(self.shift)
        self.count += other.count
        self.total += total
        self.outer += outer

    def all_reduce(self) -> None:
        """Take into account what every process of the default group was given; the same sums are then in each.

        Call it once, in all processes, after the last `update`. With a process group that works on GPUs alone (NCCL),
        the sums travel through this process' current GPU.

        Raises:
            ValueError: there is no process group (`torch.distributed.init_process_group`).

        Example:
            >>> from torch import distributed
            >>> store = distributed.HashStore()
            >>> distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
            >>> statistics = GaussianStatistics(1)
            >>> statistics.update(torch.tensor([[1.0], [3.0]]))
            >>> statistics.all_reduce()
            >>> statistics.count, statistics.mean
            (2, tensor([2.], dtype=torch.float64))
            >>> distributed.destroy_process_group()
        """
        from torch import distributed

        device = torch.device("cuda") if distributed.get_backend() == "nccl" else torch.device("cpu")
        seen = self.shift is not None
        shift = self.shift if self.shift is not None else torch.zeros_like(self.total)
        first = torch.cat([shift, torch.tensor([float(seen), float(self.count)], dtype=torch.float64)]).to(device)
        distributed.all_reduce(first)
        holders, count = first[-2].item(), round(first[-1].item())
        if not holders:
            return
        shift = first[:-2].cpu() / holders  # one that all share: sums about different points do not add up
        total, outer = self._moved(shift)
        sums = torch.cat([total[None], outer]).to(device)
        distributed.all_reduce(sums)
        self.count, self.shift, self.total, self.outer = count, shift, sums[0].cpu(), sums[1:].cpu()

    def _moved(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        """The sums as they would be about another point."""
        if self.shift is None:
            return self.total, self.outer
        by = self.shift - shift
        cross = torch.outer(by, self.total)
        return self.total + self.count * by, self.outer + cross + cross.T + self.count * torch.outer(by, by)

    @property
    def mean(self) -> Tensor:
        """`[F]`; NaN before the first sample."""
        return self.total / self.count + (0 if self.shift is None else self.shift)

    @property
    def covariance(self) -> Tensor:
        """`[F, F]`, unbiased.

        Raises:
            ConfigError: fewer than two samples.
        """
        if self.count < 2:
            raise ConfigError(f"{self.count} samples have no covariance: give at least two")
        mean = self.total / self.count
        return (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """Squared Fréchet distance |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) between two Gaussians.

    The trace of the root comes from the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric, so that no complex
    numbers appear. A covariance of fewer samples than features is singular, which does no harm.

    Arguments:
        a, b: of features of one space, F of them in both; the distance is in their unit, squared.

    Raises:
        ConfigError: fewer than two samples in one of them; other numbers of features.

    Source: Dowson & Landau 1982, Eq. 4; with Inception features it is the FID of Heusel et al. 2017.

    Example:
        >>> sets = [GaussianStatistics(1), GaussianStatistics(1)]
        >>> sets[0].update(torch.tensor([[0.0], [2.0]])); sets[1].update(torch.tensor([[3.0], [5.0]]))
        >>> frechet_distance(*sets)
        9.0
    """
    same_space(len(a.total), len(b.total))
    first, second = a.covariance, b.covariance
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    inner = root @ second @ root
    shared = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + first.trace() + second.trace() - 2 * shared
    return max(0.0, float(distance))
