"""The page of a search for what does not belong: one HTML file that needs nothing from outside."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from introvae.apps.judge import Found, Normal
from introvae.files import write_atomically
from introvae.metrics.detection import Threshold, roc_curve
from introvae.report.page import MOST, embedded, rendered

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("detection.html")
NORMAL, SEARCHED, ANOMALOUS = "#1f4e79", "#7f8c99", "#c8553d"
BINS = (8, 60)
"""Fewest and most bars of a histogram; between them the root of the number of images."""
SHOWN = 60
"""Most heat maps that the page shows; the folder may have more."""


def write_page(
    path: Path, report: Mapping[str, Any], found: Found, normals: Normal, thresholds: Mapping[str, Threshold]
) -> Path:
    """Write the page; pictures of the heat maps are read from beside it.

    Arguments:
        path: of the page.
        report: as in report.json.
        found: scores of what was searched.
        normals: scores of normal images.
        thresholds: by score.
    """
    pictures = [
        {
            "name": "histograms",
            "caption": "Scores of normal images and of what was searched; the dashed line is the threshold.",
            "source": _embedded(histograms(found, normals, thresholds)),
        }
    ]
    if any(name.startswith("auroc_") for name in report["metrics"]):
        caption = (
            "Share of anomalous images found against the share of normal ones called anomalous, for every threshold."
        )
        pictures.append({"name": "roc", "caption": caption, "source": _embedded(roc_figure(found))})
    maps = [
        {**entry, "source": embedded((path.parent / entry["picture"]).read_bytes())}
        for entry in report.get("maps", [])[:SHOWN]
    ]
    failed = [(name, reason) for name, reason in zip(found.names, found.reasons, strict=True) if reason][:MOST]
    page = rendered(TEMPLATE, report=report, pictures=pictures, maps=maps, failed=failed)
    write_atomically(path, page.encode())
    return path


def histograms(found: Found, normals: Normal, thresholds: Mapping[str, Threshold]) -> Figure:
    """A panel for each score: normal images, and what was searched, by its labels where there are any."""
    from matplotlib.figure import Figure

    names = list(found.scores)
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.5 * rows), layout="constrained")
    for axes, name in zip(figure.subplots(rows, columns, squeeze=False).flat, names, strict=False):
        kinds = [("normal", normals.scores[name], NORMAL)]
        if any(truth is not None for truth in found.truth):
            kinds += [
                ("searched, normal", found.of(name, False), SEARCHED),
                ("searched, anomalous", found.of(name, True), ANOMALOUS),
            ]
        else:
            kinds.append(("searched", found.of(name), ANOMALOUS))
        low = min(float(values.quantile(0.001)) for _, values, _ in kinds if len(values))
        high = max(float(values.quantile(0.99)) for _, values, _ in kinds if len(values))
        high = max(high, thresholds[name].value, low + 1e-9)
        for label, values, colour in kinds:
            if len(values):
                inside = values.clamp(low, high).numpy()
                bars = min(max(round(len(values) ** 0.5), BINS[0]), BINS[1])
                axes.hist(inside, bars, range=(low, high), density=True, color=colour, alpha=0.55, label=label)
        axes.axvline(thresholds[name].value, color="black", linestyle="--", linewidth=1)
        axes.set_title(name, fontsize=10)
        axes.set_yticks([])
    for axes in list(figure.axes)[len(names) :]:
        axes.set_visible(False)
    figure.axes[0].legend(fontsize=7)
    return figure


def roc_figure(found: Found) -> Figure:
    """One curve for each score."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 4), layout="constrained")
    axes = figure.subplots()
    for name in found.scores:
        normal, anomalous = found.of(name, False), found.of(name, True)
        if len(normal) and len(anomalous):
            false, true = roc_curve(normal, anomalous)
            axes.plot(false, true, label=name)
    axes.plot([0, 1], [0, 1], color="#b0b8c0", linestyle=":", linewidth=1)
    axes.set(xlabel="normal images called anomalous", ylabel="anomalous images found", xlim=(0, 1), ylim=(0, 1))
    axes.legend(fontsize=8, loc="lower right")
    return figure


def _embedded(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return embedded(buffer.getvalue())
