"""The pictures of a report, from a model and data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from introvae.classes import parts_of
from introvae.data import ArrayData
from introvae.measures.entries import BATCH, at_once
from introvae.measures.sets import decoded
from introvae.model import IntrospectiveVAE
from introvae.pictures import image_grid, labelled_rows, stack_columns
from introvae.training.curves import REAL, RECONSTRUCTION, SAMPLE, axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

SAMPLES, COLUMNS, PAIRS, STEPS = 64, 8, 6, 9
BARS = 256
"""At most so many latent dimensions get a bar of their own."""


def samples(model: IntrospectiveVAE, seed: int = 1) -> Image:
    """A sheet of draws from the prior; the overview has those of seed 0."""
    return image_grid(draw(model, SAMPLES, seed), columns=16)


@torch.no_grad()
def draw(model: IntrospectiveVAE, n: int, seed: int) -> Tensor:
    """What `model.sample` gives for that seed, on the CPU; of large images not all are decoded at once."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(n, model.latent_dim, generator=generator)
    read = decoded(model, latents, model.draw_condition(n, generator))
    size = BATCH if model.shape is None else at_once(model.shape)
    return torch.cat([read(start, start + size).cpu() for start in range(0, n, size)])


def ranked(x: Tensor, y: Tensor, order: Sequence[int], columns: int = COLUMNS) -> Image:
    """Images and their reconstructions side by side: the best, middle and worst ones.

    Arguments:
        x, y: images and reconstructions `[N, C, H, W]`.
        order: rows from the best reconstruction to the worst.
    """
    count = min(columns, max(1, len(order) // 3))
    middle = (len(order) - count) // 2
    rows = {"best": order[:count], "middle": order[middle : middle + count], "worst": order[-count:]}
    blocks = {f"{name}: image, reconstruction": stack_columns([x[list(r)], y[list(r)]]) for name, r in rows.items()}
    return labelled_rows(blocks, columns=2 * count)


def interpolations(model: IntrospectiveVAE, x: Tensor, condition: Tensor | None = None) -> Image:
    """Ways through the latent space between neighbouring images of `x: [2 N, C, H, W]`, a row each, ends included.

    Arguments:
        condition: the class of each image, where the model takes one.
    """
    of_ends = (None, None) if condition is None else (condition[0::2], condition[1::2])
    pairs = zip(x[0::2].split(1), x[1::2].split(1), *(parts_of(c, len(x) // 2, 1) for c in of_ends), strict=True)
    ways = torch.cat([model.interpolate(a, b, STEPS, False, *given) for a, b, *given in pairs])  # a row at a time
    rows = torch.cat([x[0::2, None].to(ways), ways, x[1::2, None].to(ways)], dim=1)
    return image_grid(rows.flatten(0, 1), columns=STEPS + 2)


def latent_use(kl_per_dimension: Tensor) -> Figure:
    """Mean KL of each latent dimension `[Z]`, sorted."""
    figure, (axis,) = axes(1)
    kl = kl_per_dimension.sort(descending=True).values[:BARS]
    axis.bar(range(len(kl)), kl.tolist(), width=1.0, color=REAL)
    axis.set(title="KL of each latent dimension, nats, sorted", xlabel="dimension (rank)", xlim=(-0.5, len(kl) - 0.5))
    return figure


def latent_bars(latent: Tensor) -> Figure:
    """One latent `[Z]`, a bar for each dimension, in standard deviations of the prior."""
    figure, (axis,) = axes(1)
    shown = latent[:BARS].tolist()
    axis.bar(range(len(shown)), shown, width=1.0, color=REAL)
    axis.axhline(0, color="#888888", lw=0.6)
    axis.set(title="Latent, standard deviations of the prior", xlabel="dimension", xlim=(-0.5, len(shown) - 0.5))
    return figure


def error_histogram(values: Tensor, title: str) -> Figure:
    """How a measure of the reconstructions `[N]` is spread over the held-out samples."""
    figure, (axis,) = axes(1)
    axis.hist(values.tolist(), bins=min(40, max(5, len(values) // 10)), color=RECONSTRUCTION)
    axis.set(title=title, ylabel="held-out samples")
    return figure


def columns_figure(data: ArrayData, reconstruction: Tensor, sample: Tensor) -> Figure:
    """For a table: the held-out rows on the first two principal axes of the training rows, and the share of each
    column's variance that the reconstructions keep.
    """
    figure, (left, right) = axes(2)
    real = data.heldout.x
    known = data.train.x if len(data.train) else real  # rows of a file of their own, where the run's are gone
    centre = known.mean(dim=0)
    principal = torch.linalg.svd(known - centre, full_matrices=False).Vh[:2]
    parts = (("real", real, REAL), ("reconstruction", reconstruction, RECONSTRUCTION), ("sample", sample, SAMPLE))
    for name, x, colour in parts:
        points = (x - centre) @ principal.T
        second = points[:, 1] if points.shape[1] > 1 else torch.zeros(len(points))
        left.scatter(points[:, 0], second, s=9, alpha=0.6, linewidths=0, color=colour, label=name)
    left.set(title="First two principal axes", xticks=[], yticks=[])
    left.legend(fontsize=8, frameon=False)
    kept = explained(real, reconstruction, centre)
    names = list(data.column_names or [str(i) for i in range(real.shape[1])])
    order = kept.argsort()[-20:]
    places = range(len(order))
    right.barh(places, kept[order].clamp(min=0).tolist(), color=RECONSTRUCTION)
    right.set_yticks(places, [names[i][:24] for i in order], parse_math=False)
    right.set(title="Variance kept by the reconstruction", xlim=(0, 1))
    right.tick_params(axis="y", labelsize=6)
    return figure


def explained(real: Tensor, reconstruction: Tensor, centre: Tensor) -> Tensor:
    """1 - (squared error) / (squared distance from the training mean) of each column, `[D]`."""
    spread = (real - centre).square().sum(dim=0).clamp(min=1e-12)
    return 1 - (real - reconstruction).square().sum(dim=0) / spread
