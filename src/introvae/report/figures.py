"""The pictures of a report, from a model and data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from introvae.classes import parts_of
from introvae.data import ArrayData
from introvae.measures.entries import BATCH, at_once
from introvae.measures.sets import decoded
from introvae.model import IntrospectiveVAE
from introvae.pictures import image_grid, labelled_rows, stack_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

SAMPLES, COLUMNS, PAIRS, STEPS = 64, 8, 6, 9
REAL, RECONSTRUCTION, SAMPLE = "#1f4e79", "#2a9d8f", "#c8553d"
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


PANELS = (
    (
        "KL to the prior, nats",
        (
            ("kl_real", REAL, "real"),
            ("kl_reconstruction", RECONSTRUCTION, "reconstruction"),
            ("kl_sample", SAMPLE, "sample"),
        ),
    ),
    ("Divergence from the prior, nats", (("divergence_real", REAL, "real"), ("divergence_sample", SAMPLE, "sample"))),
    ("Critic", (("wasserstein", REAL, "Wasserstein estimate"), ("gradient_penalty", SAMPLE, "gradient penalty"))),
)
"""What the first panels of the curves show: those of which the log has a line."""


def curves(log: Sequence[dict[str, Any]], images: bool) -> Figure:
    """KL of real samples, reconstructions and draws (or what the objective has instead), the reconstruction error, and
    settings that found their own value, over the steps of a run.
    """
    found_itself = [name for name in ("beta_neg", "margin") if len({row[name] for row in log if name in row}) > 2]
    panels: list[tuple[str, Sequence[tuple[str, str, str]]]]
    panels = [(title, series) for title, series in PANELS if any(name in row for row in log for name, _, _ in series)]
    if any("rec" in row for row in log):
        unit = "squared error, sum over pixels" if images else "squared error, sum over values"
        panels.append((f"Reconstruction: {unit}", (("rec", REAL, ""),)))
    panels += [(f"{name}, found by itself", ((name, SAMPLE, ""),)) for name in found_itself]
    figure, axes = _axes(len(panels))
    warm = [row["step"] for row in log if row["phase"] == "warmup"]
    for axis, (title, series) in zip(axes, panels, strict=True):
        for name, colour, label in series:
            found = [(row["step"], row[name]) for row in log if row.get(name) is not None]
            if found:
                style = "--" if label == "reconstruction" else "-"  # it may lie exactly under another
                axis.plot(*zip(*found, strict=True), color=colour, lw=1.2, ls=style, label=label, zorder=3)
        axis.set(title=title, xlabel="step", ylim=None if title == "Critic" else (0, None))
        if len(series) > 1:
            axis.legend(fontsize=8, frameon=False)
        if warm:
            axis.axvspan(0, max(warm), color="#eeeeee", zorder=0)
            axis.text(
                max(warm) / 2, axis.get_ylim()[1] * 0.97, "warm-up", ha="center", va="top", fontsize=7, color="#777777"
            )
    return figure


def latent_use(kl_per_dimension: Tensor) -> Figure:
    """Mean KL of each latent dimension `[Z]`, sorted."""
    figure, (axis,) = _axes(1)
    kl = kl_per_dimension.sort(descending=True).values[:BARS]
    axis.bar(range(len(kl)), kl.tolist(), width=1.0, color=REAL)
    axis.set(title="KL of each latent dimension, nats, sorted", xlabel="dimension (rank)", xlim=(-0.5, len(kl) - 0.5))
    return figure


def latent_bars(latent: Tensor) -> Figure:
    """One latent `[Z]`, a bar for each dimension, in standard deviations of the prior."""
    figure, (axis,) = _axes(1)
    shown = latent[:BARS].tolist()
    axis.bar(range(len(shown)), shown, width=1.0, color=REAL)
    axis.axhline(0, color="#888888", lw=0.6)
    axis.set(title="Latent, standard deviations of the prior", xlabel="dimension", xlim=(-0.5, len(shown) - 0.5))
    return figure


def error_histogram(values: Tensor, title: str) -> Figure:
    """How a measure of the reconstructions `[N]` is spread over the held-out samples."""
    figure, (axis,) = _axes(1)
    axis.hist(values.tolist(), bins=min(40, max(5, len(values) // 10)), color=RECONSTRUCTION)
    axis.set(title=title, ylabel="held-out samples")
    return figure


def columns_figure(data: ArrayData, reconstruction: Tensor, sample: Tensor) -> Figure:
    """For a table: the first two principal axes of the held-out rows, and the share of each column's variance that the
    reconstructions keep.
    """
    figure, (left, right) = _axes(2)
    real = data.heldout.x
    centre = data.train.x.mean(dim=0)
    axes = torch.linalg.svd(data.train.x - centre, full_matrices=False).Vh[:2]
    parts = (("real", real, REAL), ("reconstruction", reconstruction, RECONSTRUCTION), ("sample", sample, SAMPLE))
    for name, x, colour in parts:
        points = (x - centre) @ axes.T
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


def _axes(count: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * count, 2.9), layout="constrained")
    axes = [figure.add_subplot(1, count, i + 1) for i in range(count)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.title.set_fontsize(9)
        axis.xaxis.label.set_fontsize(8)
    return figure, axes
