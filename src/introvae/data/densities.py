"""2D densities of the normalising-flow literature, as the introspective papers use them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from introvae.errors import unknown

Sampler = Callable[[int, torch.Generator | None], Tensor]


@dataclass(frozen=True)
class Density:
    """A distribution in the plane.

    Arguments:
        name: as in `density:NAME`.
        sample: `sample(n, generator) -> [n, 2]`.
        extent: half the side of the square around the origin that is drawn and binned (2 times the authors' scale).
        log_prob: `log_prob(x: [N, 2]) -> [N]`, exact, in nats; None where there is no closed form.
        modes: `[K, 2]`, centres of separate modes, or None.
        sigma: standard deviation of each mode per axis, or None.

    Source: 8 Gaussians, 2 spirals, checkerboard and rings of FFJORD (2019), with the constants of Soft-IntroVAE (2021).
    """

    name: str
    sample: Sampler
    extent: float
    log_prob: Callable[[Tensor], Tensor] | None = None
    modes: Tensor | None = None
    sigma: float | None = None


_EIGHT_SIGMA = 0.02 / 1.414
_EIGHT_ANGLES = torch.arange(8) * (math.pi / 4)
_EIGHT_CENTRES = (2 / 1.414) * torch.stack([_EIGHT_ANGLES.cos(), _EIGHT_ANGLES.sin()], dim=1)
_RING_RADII = 0.75 * torch.arange(1, 5)
_RING_SIGMA = 0.08


def _eight_gaussians(n: int, generator: torch.Generator | None = None) -> Tensor:
    mode = torch.randint(8, (n,), generator=generator)
    return _EIGHT_CENTRES[mode] + _EIGHT_SIGMA * torch.randn(n, 2, generator=generator)


def _eight_gaussians_log_prob(x: Tensor) -> Tensor:
    squares = (x[:, None] - _EIGHT_CENTRES.to(x)).square().sum(dim=2)
    log_peak = -math.log(8 * 2 * math.pi * _EIGHT_SIGMA**2)
    return torch.logsumexp(log_peak - squares / (2 * _EIGHT_SIGMA**2), dim=1)


def _two_spirals(n: int, generator: torch.Generator | None = None) -> Tensor:
    angle = torch.rand(n, generator=generator).sqrt() * (3 * math.pi)
    arm = torch.stack([-angle.cos() * angle, angle.sin() * angle], dim=1)
    arm = arm + 0.5 * torch.rand(n, 2, generator=generator)
    sign = 1 - 2 * torch.randint(2, (n, 1), generator=generator)
    return sign * arm / 3 + 0.1 * torch.randn(n, 2, generator=generator)


def _checkerboard(n: int, generator: torch.Generator | None = None) -> Tensor:
    column = 4 * torch.rand(n, generator=generator) - 2
    row = torch.rand(n, generator=generator) - 2 * torch.randint(2, (n,), generator=generator)
    return 2 * torch.stack([column, row + column.floor() % 2], dim=1)


def _checkerboard_log_prob(x: Tensor) -> Tensor:
    # Eight squares of side 2 in [-4, 4]^2: the ones whose column and row have the same parity.
    cell = (x / 2).floor()
    inside = ((x >= -4) & (x < 4)).all(dim=1) & (cell.sum(dim=1) % 2 == 0)
    return torch.where(inside, x.new_tensor(-math.log(32.0)), x.new_tensor(-math.inf))


def _rings(n: int, generator: torch.Generator | None = None) -> Tensor:
    radius = _RING_RADII[torch.randint(4, (n,), generator=generator)]
    angle = 2 * math.pi * torch.rand(n, generator=generator)
    circle = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    return circle + _RING_SIGMA * torch.randn(n, 2, generator=generator)


def _rings_log_prob(x: Tensor) -> Tensor:
    # A circle of radius R blurred by a Gaussian: the angle integrates to a Bessel function of order 0.
    r, radii = x.norm(dim=1)[:, None], _RING_RADII.to(x)
    variance = _RING_SIGMA**2
    log_ring = torch.special.i0e(r * radii / variance).log() - (r - radii).square() / (2 * variance)
    return torch.logsumexp(log_ring - math.log(4 * 2 * math.pi * variance), dim=1)


_DENSITIES = {
    density.name: density
    for density in (
        Density("8gaussians", _eight_gaussians, 2.0, _eight_gaussians_log_prob, _EIGHT_CENTRES, _EIGHT_SIGMA),
        Density("2spirals", _two_spirals, 4.0),
        Density("checkerboard", _checkerboard, 4.0, _checkerboard_log_prob),
        Density("rings", _rings, 4.0, _rings_log_prob),
    )
}


def list_densities() -> list[str]:
    """Names of all densities."""
    return list(_DENSITIES)


def get_density(name: str) -> Density:
    """The density of that name.

    Raises:
        ConfigError: the name is unknown.

    Example:
        >>> get_density("rings").sample(5, torch.Generator().manual_seed(0)).shape
        torch.Size([5, 2])
    """
    if name not in _DENSITIES:
        raise unknown("density", name, list_densities())
    return _DENSITIES[name]
