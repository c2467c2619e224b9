"""The latent space of a data set in two dimensions, and its picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from introvae.apps.explore import Batch, Condition, latents
from introvae.errors import DataError, one_of
from introvae.model import IntrospectiveVAE
from introvae.pictures import to_uint8

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("pca", "tsne")
NAMED = 20
"""With more classes than these, the picture has no legend."""
CELLS = 24
"""Thumbnails lie at most one in each of so many cells a side: they would hide each other."""
THUMBNAIL = 16
"""Their longer side, in points (1/72 inch)."""


class LatentMap(NamedTuple):
    """Points `[N, 2]`, and the shares of all variance that their axes have, where they are principal axes."""

    points: Tensor
    shares: tuple[float, float] | None


def latent_map(
    model: IntrospectiveVAE,
    x: Tensor | Iterable[Batch],
    method: str = "pca",
    seed: int = 0,
    condition: Condition = None,
) -> LatentMap:
    """Posterior means in two dimensions.

    Arguments:
        x, condition: at least three samples, as in `latents`.
        method: "pca", their first two principal axes, on which distances mean what they mean in the latent space; or
            "tsne" (scikit-learn's), which keeps neighbours together and no more.
        seed: of t-SNE.

    Raises:
        ConfigError: an unknown method.
        DataError: fewer than three samples.

    Source: van der Maaten & Hinton 2008, for t-SNE.

    Example:
        >>> model = IntrospectiveVAE.build((2,), "tiny-mlp", latent_dim=3)
        >>> latent_map(model, torch.randn(20, 2)).points.shape
        torch.Size([20, 2])
    """
    one_of(METHODS, method=method)
    mean = latents(model, x, condition).double()
    if len(mean) < 3:
        raise DataError(f"{len(mean)} samples make no map: give at least three")
    mean = mean - mean.mean(dim=0)
    variances, axes = torch.linalg.eigh(mean.T @ mean / len(mean))
    variances, axes = variances.flip(0)[:2], axes.flip(1)[:, :2]
    # An axis has no sign of its own: its largest coordinate is positive, so that a map is the same everywhere.
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    points = torch.zeros(len(mean), 2, dtype=mean.dtype)
    points[:, : axes.shape[1]] = mean @ axes
    if method == "pca":
        total = max(float(mean.square().sum() / len(mean)), torch.finfo(mean.dtype).tiny)
        first, second = [*(variances.clamp(min=0) / total).tolist(), 0.0][:2]
        return LatentMap(points.float(), (first, second))
    from sklearn.manifold import TSNE

    start = 1e-4 * points / points[:, 0].std().clamp(min=1e-12)
    init: Any = start.float().numpy()  # scikit-learn's annotation leaves arrays out
    tsne = TSNE(perplexity=min(30.0, (len(mean) - 1) / 3), init=init, random_state=seed)
    return LatentMap(torch.from_numpy(tsne.fit_transform(mean.float().numpy())), None)


def draw_map(
    points: Tensor,
    labels: Tensor | None = None,
    names: Sequence[str] = (),
    images: Tensor | None = None,
    axes: tuple[str, str] = ("", ""),
) -> Figure:
    """A scatter picture of points, coloured by their classes; or small images where the points are.

    Arguments:
        points: `[N, 2]`.
        labels: class indices `[N]`, -1 for unknown.
        names: of the classes, for the legend.
        images: `[N, C, H, W]` in [0, 1], drawn instead of points, one in each cell of a grid; framed by class.
        axes: what the two axes are.

    Raises:
        DataError: unequal numbers of points, labels and images.

    Example:
        >>> draw_map(torch.randn(20, 2), torch.arange(20) % 2, ["cat", "dog"]).axes[0].get_legend() is not None
        True
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    for what, given in (("labels", labels), ("images", images)):
        if given is not None and len(given) != len(points):
            raise DataError(f"there are {len(points)} points and {len(given)} {what}: give one for each")
    figure = Figure(figsize=(8, 7), layout="constrained")
    axis = figure.add_subplot()
    place = points.detach().cpu().numpy()
    classes = torch.full((len(points),), -1) if labels is None else labels.cpu()
    found = [index for index in classes.unique().tolist() if index >= 0]
    palette = colormaps["tab10" if len(found) <= 10 else "tab20" if len(found) <= NAMED else "turbo"]
    of = {index: palette(i if len(found) <= NAMED else i / (len(found) - 1)) for i, index in enumerate(found)}
    of[-1] = (0.12, 0.31, 0.47, 1.0) if not found else (0.6, 0.6, 0.6, 1.0)
    for index in of:
        rows = (classes == index).numpy()
        label = "unknown" if index < 0 else names[index] if index < len(names) else str(index)
        if rows.any():
            # Under images the points are there for the legend and the limits of the axes.
            size = 9 if images is None else 1
            axis.scatter(*place[rows].T, s=size, alpha=0.7, linewidths=0, color=of[index], label=label)
    if images is not None:
        _thumbnails(axis, place, images, [of[index] for index in classes.tolist()])
    axis.set(xlabel=axes[0], ylabel=axes[1], title=f"{len(points):,} posterior means")
    axis.set_aspect("equal", adjustable="datalim")
    if 0 < len(found) <= NAMED:
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, markerscale=2 if images is None else 6)
    return figure


def _thumbnails(axis: Any, place: np.ndarray, images: Tensor, colours: Sequence[tuple[float, ...]]) -> None:
    """The image nearest to the middle of each cell."""
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    low, high = place.min(axis=0), place.max(axis=0)
    cells = (place - low) / max(float((high - low).max()), 1e-12) * CELLS
    key = np.minimum(cells.astype(int), CELLS - 1)
    order = np.square(cells - key - 0.5).sum(axis=1).argsort(kind="stable")
    _, first = np.unique(key[order] @ [CELLS, 1], return_index=True)
    for row in order[first].tolist():
        pixels = to_uint8(images[row : row + 1])[0]
        side = max(pixels.shape[:2])
        box = OffsetImage(pixels.repeat(3 // pixels.shape[2], axis=2), zoom=THUMBNAIL / side, interpolation="auto")
        frame = {"edgecolor": colours[row], "linewidth": 1.0}
        axis.add_artist(AnnotationBbox(box, tuple(place[row]), pad=0.05, bboxprops=frame))
