"""The picture of a run: real, reconstruction, sample; in the plane a scatter and the density estimate."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from introvae.data import ArrayData, Data, DensityData
from introvae.model import IntrospectiveVAE
from introvae.pictures import density_estimate, grid_points, labelled_rows, plane_figure, save_picture

IMAGES, POINTS, GRID = 32, 2000, 128
AT_ONCE = 8


@torch.no_grad()
def preview(model: IntrospectiveVAE, data: Data, path: Path) -> Path | None:
    """Draw what the model does with the held-out data and with fixed latents; the same seed for every picture.

    Returns:
        The path, or None for data that are neither images nor points in the plane.
    """
    generator = torch.Generator().manual_seed(0)
    if isinstance(data, DensityData):
        density = data.density
        real = density.sample(POINTS, generator)
        grid = grid_points(density.extent, GRID)
        estimate = density_estimate(negative_elbo(model, grid).view(GRID, GRID))
        maps = {"density estimate": estimate}
        if density.log_prob is not None:
            maps = {"density": density.log_prob(grid.double()).exp().view(GRID, GRID), **maps}
        points = {
            "real": real,
            "reconstruction": model.reconstruct(real.to(model.device)),
            "sample": model.sample(POINTS, generator),
        }
        return save_picture(plane_figure(points, maps, density.extent), path)
    if not isinstance(data, ArrayData) or len(data.shape) != 3:
        return None
    real = data.heldout[slice(IMAGES)].tensor(model.device)
    # A few at a time: a picture must not take more memory than a step.
    reconstructions = torch.cat([model.reconstruct(some) for some in real.split(AT_ONCE)])
    samples = torch.cat([model.sample(AT_ONCE, generator) for _ in range(2 * IMAGES // AT_ONCE)])
    rows = {"real": real, "reconstruction": reconstructions, "sample": samples}
    return save_picture(labelled_rows(rows), path)


@torch.no_grad()
def negative_elbo(model: IntrospectiveVAE, x: Tensor) -> Tensor:
    """Squared error plus KL of points `[N, 2]` with z the posterior's mean, `[N]`, on the CPU."""
    x = x.to(model.device)
    return -model.elbo(x, noise=x.new_zeros(len(x), model.latent_dim)).cpu()
