"""Pictures of a comparison: samples side by side, how steady training was, the decoder's gradients."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from introvae.data import get_density
from introvae.model import IntrospectiveVAE
from introvae.pictures import density_estimate, grid_points, image_grid
from introvae.training.preview import negative_elbo

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS, GRID, IMAGES = 2000, 100, 36
WIDE = 8
"""Panels beside one another at most; the rest goes below."""
DRAWN = 100
"""About so many points a curve are drawn: there are many curves, and the files are shared."""
MOMENTS, WIDTH_OF_MOMENT = (0.2, 0.4, 1.0), 3.1
"""Shares of the training after the warm-up at which pictures are shown, epochs 10, 20 and 50 of the AS-IntroVAE poster;
inches of each.
"""
LEAST = 1e-12
"""Where a gradient that vanished is drawn."""
COLOURS = ("#1f4e79", "#c8553d", "#2a9d8f", "#e9a23b", "#7b5ea7", "#5c6875", "#b0447a", "#4a8f3c")
KLS = (("kl_real", "#1f4e79", "real"), ("kl_reconstruction", "#2a9d8f", "rec."), ("kl_sample", "#c8553d", "sample"))


@torch.no_grad()
def samples(models: Mapping[str, IntrospectiveVAE], data: str, critics: Collection[str] = ()) -> Figure:
    """Draws of each model by label, in the plane with its density estimate below; nothing is selected.

    Arguments:
        models: by label; the first seed's of each row.
        data: as `--data` takes it.
        critics: labels of models whose encoder infers no latents and estimates no density.
    """
    if data.startswith("density:"):
        return _plane_samples(models, data, critics)
    figure, (axes,) = _panels(len(models), 1, 2.0, 2.05)
    for axis, (label, model) in zip(axes, models.items(), strict=True):
        drawn = model.sample(IMAGES, torch.Generator().manual_seed(0))
        if drawn.dim() == 4:
            axis.imshow(np.asarray(image_grid(drawn, columns=math.isqrt(IMAGES))), cmap="gray", vmin=0, vmax=255)
            axis.set_title(label, fontsize=8)
            axis.set_axis_off()
        else:
            axis.hist(drawn.flatten().tolist(), bins=40, color=COLOURS[0])
            axis.set_title(f"{label}, all values", fontsize=8)
    return figure


def _plane_samples(models: Mapping[str, IntrospectiveVAE], data: str, critics: Collection[str]) -> Figure:
    figure, (above, below) = _panels(len(models) + 1, 2, 2.0, 2.05)
    density = get_density(data.removeprefix("density:"))
    real = density.sample(POINTS, torch.Generator().manual_seed(0))
    grid = grid_points(density.extent, GRID)
    _scatter(above[0], real, density.extent, "data")
    if density.log_prob is None:
        below[0].set_axis_off()
    else:
        _map(below[0], density.log_prob(grid.double()).exp().view(GRID, GRID), density.extent)
    for column, (label, model) in enumerate(models.items(), start=1):
        _scatter(above[column], model.sample(POINTS, torch.Generator().manual_seed(0)).cpu(), density.extent, label)
        if label in critics:
            below[column].set_axis_off()
        else:
            _map(below[column], density_estimate(negative_elbo(model, grid).view(GRID, GRID)), density.extent)
    return figure


def stability(logs: Mapping[str, Sequence[Sequence[dict[str, Any]]]]) -> Figure:
    """KL of real data, reconstructions and samples, and the reconstruction error, over training; a line for each seed.

    Arguments:
        logs: of the runs, by label.
    """
    figure, (upper, lower) = _panels(len(logs), 2, 2.3, 1.9)
    for above, below, (label, runs) in zip(upper, lower, logs.items(), strict=True):
        for index, every in enumerate(runs):
            rows = every[:: max(1, len(every) // DRAWN)]
            for name, colour, title in KLS:
                found = [(row["step"], row[name]) for row in rows if name in row]
                if found:
                    above.plot(
                        *zip(*found, strict=True), color=colour, lw=0.7, alpha=0.7, label=title if not index else None
                    )
            errors = [(row["step"], row["rec"]) for row in rows if "rec" in row]  # a critic reconstructs nothing
            if errors:
                below.plot(*zip(*errors, strict=True), color=COLOURS[0], lw=0.7, alpha=0.7)
            warm = [row["step"] for row in rows if row["phase"] == "warmup"]
            for axis in (above, below):
                if warm and not index:
                    axis.axvspan(0, max(warm), color="#eeeeee", zorder=0)
        above.set_title(label, fontsize=8)
        below.set_xlabel("step", fontsize=7)
    kls = [row[name] for runs in logs.values() for rows in runs for row in rows for name, _, _ in KLS if name in row]
    recs = [row["rec"] for runs in logs.values() for rows in runs for row in rows[1:] if "rec" in row]
    for axes, values, title in ((upper, kls, "KL, nats"), (lower, recs, "squared error")):
        for column, axis in enumerate(axes):
            if values:
                axis.set_ylim(0, 1.3 * float(np.quantile(values, 0.99)))
            if column % WIDE:
                axis.tick_params(labelleft=False)
            else:
                axis.set_ylabel(title, fontsize=7)
    if kls:
        next(axis for axis in upper if axis.lines).legend(fontsize=6, frameon=False)
    return figure


def gradients(logs: Mapping[str, Sequence[Sequence[dict[str, Any]]]]) -> Figure | None:
    """Norm of the decoder's adversarial gradient over training, alone and as a share of that of the reconstruction;
    None where no run noted it.
    """
    noted = {
        label: [[row for row in rows if "gradient_adversarial" in row] for rows in runs] for label, runs in logs.items()
    }
    noted = {label: runs for label, runs in noted.items() if any(runs)}
    if not noted:
        return None
    figure = _figure(2, 1, 4.4, 2.9)
    left, right = figure.axes
    for colour, (label, runs) in zip(COLOURS, noted.items(), strict=False):
        for index, rows in enumerate(runs):
            steps = [row["step"] for row in rows]
            norms = [max(row["gradient_adversarial"], LEAST) for row in rows]
            shares = [norm / max(row["gradient_reconstruction"], LEAST) for norm, row in zip(norms, rows, strict=True)]
            for axis, values in ((left, norms), (right, shares)):
                axis.plot(steps, values, color=colour, lw=0.8, alpha=0.8, label=label if not index else None)
    left.set_title("Norm of the decoder's adversarial gradient", fontsize=9)
    right.set_title("The same over the norm of the reconstruction's", fontsize=9)
    for axis in (left, right):
        axis.set_yscale("log")
        axis.set_xlabel("step", fontsize=8)
    left.legend(fontsize=7, frameon=False)
    return figure


def moments(pictures: Mapping[str, Sequence[tuple[int, Path]]], warm: int = 0) -> Figure | None:
    """What each row's first run made of the same held-out images and latents at the moments `MOMENTS` of its training,
    each picture shown once: of a run that kept fewer, all, the last one below the others' last; None where no run kept
    any.

    Arguments:
        pictures: step and file of a run's pictures, in order, the last one of its end; by label.
        warm: steps of the longest warm-up before a game: in it all rows are VAEs.
    """
    shown = {label: _at_moments(its, warm) for label, its in pictures.items() if its}
    if not shown:
        return None
    columns = max(map(len, shown.values()))
    first = _picture(next(iter(shown.values()))[0][1])
    figure = _figure(columns, len(shown), WIDTH_OF_MOMENT, WIDTH_OF_MOMENT * first.shape[0] / first.shape[1] + 0.2)
    axes = iter(figure.axes)
    for label, its in shown.items():
        for _ in range(columns - len(its)):
            next(axes).set_axis_off()
        for step, path in its:
            axis = next(axes)
            axis.imshow(_picture(path), interpolation="antialiased")
            axis.set_title(f"{label}, step {step:,}", fontsize=7)
            axis.set_axis_off()
    return figure


def _at_moments(pictures: Sequence[tuple[int, Path]], warm: int) -> list[tuple[int, Path]]:
    """Those of a run's pictures that lie nearest to the moments; all where there are no more than moments."""
    if len(pictures) <= len(MOMENTS):
        return list(pictures)
    found, begin = [], 0
    for index, moment in enumerate(MOMENTS):
        meant = warm + moment * (pictures[-1][0] - warm)
        end = len(pictures) - (len(MOMENTS) - index - 1)  # one is left for each of the others
        chosen = min(range(begin, end), key=lambda at, meant=meant: abs(pictures[at][0] - meant))
        found.append(pictures[chosen])
        begin = chosen + 1
    return found


def _picture(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _panels(count: int, high: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """So many panels, each of `high` axes below one another: the first axes of all, then the second of all. More than
    `WIDE` panels go on below.
    """
    columns = min(count, WIDE)
    bands = -(-count // columns)
    figure = _figure(columns, high * bands, width, height)
    grid = np.array(figure.axes).reshape(bands, high, columns).swapaxes(0, 1).reshape(high, -1)
    for axis in grid[:, count:].flat:
        axis.set_axis_off()
    return figure, [list(axes[:count]) for axes in grid]


def _figure(columns: int, rows: int, width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    for axis in np.atleast_1d(figure.subplots(rows, columns)).flat:  # pyright: ignore
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=6)
    return figure


def _scatter(axis: Axes, x: torch.Tensor, extent: float, title: str) -> None:
    points = x.numpy()
    axis.scatter(points[:, 0], points[:, 1], s=1.0, alpha=0.4, linewidths=0, color=COLOURS[0], rasterized=True)
    axis.set(xlim=(-extent, extent), ylim=(-extent, extent), xticks=[], yticks=[], aspect="equal")
    axis.set_title(title, fontsize=8)
    axis.spines[:].set_visible(True)


def _map(axis: Axes, values: torch.Tensor, extent: float) -> None:
    square = (-extent, extent)
    axis.imshow(values.numpy().T, origin="lower", extent=square + square, cmap="viridis")
    axis.set(xticks=[], yticks=[])
