"""The picture of a run: real, reconstruction, sample; in the plane a scatter and the density estimate."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from introvae.classes import parts_of
from introvae.data import ArrayData, Data, DensityData
from introvae.model import IntrospectiveVAE
from introvae.pictures import density_estimate, grid_points, labelled_rows, plane_figure, save_picture

IMAGES, COLUMNS, POINTS, GRID = 32, 16, 2000, 128
AT_ONCE = 8


@torch.no_grad()
def preview(model: IntrospectiveVAE, data: Data, path: Path, encodes: str = "posterior") -> Path | None:
    """Draw what the model does with the held-out data and with fixed latents; the same seed for every picture.

    Arguments:
        model: in evaluation mode.
        data: real samples stand beside the model's. Of a model with classes, every column of samples is of one, in
            their order.
        path: of the picture.
        encodes: what the encoder gives (`Objective.encodes`): of one that gives no posterior no density estimate is
            drawn, of one that gives nothing no reconstructions.

    Returns:
        The path, or None for data that are neither images nor points in the plane.
    """
    generator = torch.Generator().manual_seed(0)
    if isinstance(data, DensityData):
        density = data.density
        real = density.sample(POINTS, generator)
        grid = grid_points(density.extent, GRID)
        maps: dict[str, Tensor] = {}
        if density.log_prob is not None:
            maps["density"] = density.log_prob(grid.double()).exp().view(GRID, GRID)
        if encodes == "posterior":
            maps["density estimate"] = density_estimate(negative_elbo(model, grid).view(GRID, GRID))
        points = {"real": real}
        if encodes != "nothing":
            points["reconstruction"] = model.reconstruct(real.to(model.device))
        points["sample"] = model.sample(POINTS, generator)
        return save_picture(plane_figure(points, maps, density.extent), path)
    if not isinstance(data, ArrayData) or len(data.shape) != 3:
        return None
    columns = COLUMNS if model.classes is None else model.classes.columns(COLUMNS)
    part = data.heldout[slice(IMAGES - IMAGES % columns)]
    real = part.tensor(model.device)
    # A few at a time: a picture must not take more memory than a step.
    rows = {"real": real}
    if encodes != "nothing":
        condition = model.condition_for(part.labels, data.class_names)
        pairs = zip(real.split(AT_ONCE), parts_of(condition, len(real), AT_ONCE), strict=True)
        rows["reconstruction"] = torch.cat([model.reconstruct(x, of) for x, of in pairs])
    count = 2 * (IMAGES - IMAGES % columns)
    given = parts_of(None if model.classes is None else model.classes.in_turn(count), count, AT_ONCE)
    sizes = [min(AT_ONCE, count - start) for start in range(0, count, AT_ONCE)]
    rows["sample"] = torch.cat([model.sample(n, generator, of) for n, of in zip(sizes, given, strict=True)])
    return save_picture(labelled_rows(rows, columns), path)


@torch.no_grad()
def negative_elbo(model: IntrospectiveVAE, x: Tensor) -> Tensor:
    """Squared error plus KL of points `[N, 2]` with z the posterior's mean, `[N]`, on the CPU."""
    x = x.to(model.device)
    return -model.elbo(x, noise=x.new_zeros(len(x), model.latent_dim)).cpu()
