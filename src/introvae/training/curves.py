"""The curves of a training."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

REAL, RECONSTRUCTION, SAMPLE = "#1f4e79", "#2a9d8f", "#c8553d"


class ShownFigure(Figure):
    """A figure that a notebook shows; one that pyplot has not made would be a line of text there."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


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


def curves(log: Sequence[dict[str, Any]], images: bool, kind: type[Figure] = Figure) -> Figure:
    """KL of real samples, reconstructions and draws (or what the objective has instead), the reconstruction error, and
    settings that found their own value, over the steps of a run.

    Arguments:
        log: its lines.
        images: whether the samples are images, for the error's unit.
        kind: of figure; gradio knows matplotlib's own only.
    """
    found_itself = [name for name in ("beta_neg", "margin") if len({row[name] for row in log if name in row}) > 2]
    panels: list[tuple[str, Sequence[tuple[str, str, str]]]]
    panels = [(title, series) for title, series in PANELS if any(name in row for row in log for name, _, _ in series)]
    if any("rec" in row for row in log):
        unit = "squared error, sum over pixels" if images else "squared error, sum over values"
        panels.append((f"Reconstruction: {unit}", (("rec", REAL, ""),)))
    panels += [(f"{name}, found by itself", ((name, SAMPLE, ""),)) for name in found_itself]
    figure, each = axes(len(panels), kind)
    warm = [row["step"] for row in log if row["phase"] == "warmup"]
    for axis, (title, series) in zip(each, panels, strict=True):
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


def axes(count: int, kind: type[Figure] = Figure) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels side by side, in the style of the reports."""
    figure = kind(figsize=(4.6 * count, 2.9), layout="constrained")
    each = [figure.add_subplot(1, count, i + 1) for i in range(count)]
    for axis in each:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.title.set_fontsize(9)
        axis.xaxis.label.set_fontsize(8)
    return figure, each
