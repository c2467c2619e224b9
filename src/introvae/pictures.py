"""Pictures of images and of points in the plane."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from introvae.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

MIN_CELL = 48
"""Images with a smaller side are enlarged by a whole factor, so that a picture of 8-pixel digits can be looked at."""


def to_uint8(images: Tensor) -> np.ndarray:
    """Float images `[N, C, H, W]` in [0, 1] as uint8 `[N, H, W, C]`, rounded (not cut off)."""
    return (images.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def to_pil(image: Tensor) -> Image:
    """One image `[C, H, W]` in [0, 1], at its own size."""
    from PIL import Image as PILImage

    array = to_uint8(image[None])[0]
    return PILImage.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def image_grid(images: Tensor, columns: int | None = None, gap: int = 2) -> Image:
    """All images `[N, C, H, W]` in [0, 1] on one white sheet, row by row.

    Arguments:
        columns: images in a row; by default nearly as many as rows.
        gap: white pixels around each image.
    """
    from PIL import Image as PILImage

    columns = columns or math.ceil(math.sqrt(len(images)))
    array = to_uint8(images)
    zoom = max(1, math.ceil(MIN_CELL / array.shape[2]))
    array = array.repeat(zoom, axis=1).repeat(zoom, axis=2)
    _, height, width, channels = array.shape
    rows = math.ceil(len(array) / columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8)
    for index, image in enumerate(array):
        row, column = divmod(index, columns)
        top, left = gap + row * (height + gap), gap + column * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return PILImage.fromarray(sheet[..., 0] if channels == 1 else sheet)


def labelled_rows(rows: Mapping[str, Tensor], columns: int = 16) -> Image:
    """One block of images for each name, with the name above it: real, reconstruction, sample.

    Arguments:
        rows: images `[N, C, H, W]` in [0, 1] by name.
        columns: images in a row.
    """
    from PIL import Image as PILImage
    from PIL import ImageDraw, ImageFont

    grids = {name: image_grid(images, columns).convert("RGB") for name, images in rows.items()}
    title = 18
    width = max(grid.width for grid in grids.values())
    sheet = PILImage.new("RGB", (width, sum(grid.height + title for grid in grids.values())), "white")
    draw, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(12), 0
    for name, grid in grids.items():
        draw.text((4, top + 2), name, fill="black", font=font)
        sheet.paste(grid, (0, top + title))
        top += title + grid.height
    return sheet


def plane_figure(points: Mapping[str, Tensor], densities: Mapping[str, Tensor], extent: float) -> Figure:
    """Scatter plots of points `[N, 2]` and maps of densities `[G, G]` (first axis x), side by side, one for each name.

    Arguments:
        points: point sets by title.
        densities: values on a grid over the square by title.
        extent: half the side of the square.
    """
    from matplotlib.figure import Figure

    count = len(points) + len(densities)
    figure = Figure(figsize=(2.6 * count, 2.8), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, count))  # pyright: ignore[reportArgumentType]
    square = (-extent, extent)
    for axis, (title, x) in zip(axes, points.items(), strict=False):
        array = x.detach().cpu().numpy()
        axis.scatter(array[:, 0], array[:, 1], s=1.5, alpha=0.5, linewidths=0, color="#1f4e79", rasterized=True)
        axis.set_title(f"{title} ({len(array):,})", fontsize=9)
    for axis, (title, values) in zip(axes[len(points) :], densities.items(), strict=True):
        axis.imshow(values.detach().cpu().numpy().T, origin="lower", extent=square + square, cmap="viridis")
        axis.set_title(title, fontsize=9)
    for axis in axes:
        axis.set(xlim=square, ylim=square, xticks=[], yticks=[], aspect="equal")
    return figure


def density_estimate(negative_elbo: Tensor) -> Tensor:
    """exp(ELBO) on a grid `[G, G]`, scaled to a maximum of 1: the density estimate that the papers draw."""
    return (negative_elbo.min() - negative_elbo).exp()


def grid_points(extent: float, size: int) -> Tensor:
    """Centres of the size x size cells of [-extent, extent]^2, `[size * size, 2]`, the second coordinate fastest."""
    axis = (torch.arange(size) + 0.5) * (2 * extent / size) - extent
    return torch.cartesian_prod(axis, axis)


def save_picture(picture: Image | Figure, path: str | Path) -> Path:
    """Write a picture as PNG, whole or not at all; returns the path."""
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # of a name in a script the font lacks
            picture.savefig(buffer, format="png", dpi=110)
        _without_waste(buffer).save(buffer := io.BytesIO(), format="PNG", optimize=True)
    else:
        picture.save(buffer, format="PNG", optimize=True)
    write_atomically(path, buffer.getvalue())
    return Path(path)


def _without_waste(png: io.BytesIO) -> Image:
    """A figure's picture without its opaque alpha, and in one channel where it has no colour: a third of the bytes."""
    from PIL import Image as PILImage

    picture = PILImage.open(png).convert("RGB")
    array = np.asarray(picture)
    return picture.convert("L") if (array == array[..., :1]).all() else picture


def stack_columns(rows: Sequence[Tensor]) -> Tensor:
    """Images of several batches `[N, ...]` side by side: first of each, second of each, and so on."""
    return torch.stack(list(rows), dim=1).flatten(0, 1)
