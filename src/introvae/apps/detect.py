"""What does not belong: scores of every image, where in the image, and how sure one can be."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from introvae.apps.judge import FOUND, HEATMAPS, LOCAL, PICTURE, Found, Judge, Normal, Usual
from introvae.apps.scores import SCORES
from introvae.apps.truth import Truth
from introvae.data.sources import holds_parquet
from introvae.errors import ConfigError, DataError, checked_seed, not_negative, one_of, positive, unknown, whole
from introvae.files import write_atomically
from introvae.metrics.detection import Interval, Threshold, detection_metrics
from introvae.metrics.pixel_curve import DRAWS, PixelCurve
from introvae.training.devices import pick_device
from introvae.training.run import Run

log = logging.getLogger("introvae")

DEFAULT = ("error", "kl", "neg_elbo", "latent")
"""Scores that cost one pass of the networks together; the others are named where they are wanted."""
DECIDING = "neg_elbo"
"""The score whose threshold decides, where nobody says which."""
MAPS = "maps"
"""Where the heat maps are, in the folder of the results."""


def detect(
    run: Run | str | Path,
    images: str | Path,
    *,
    normal: str | Path | None = None,
    labels: str | Path | None = None,
    masks: str | Path | None = None,
    scores: Sequence[str] | None = None,
    deciding: str | None = None,
    false_positive_rate: float = 0.05,
    maps: int = 24,
    features: str = "randconv",
    heatmap: str | None = None,
    draws: int = 64,
    batch_size: int | None = None,
    seed: int = 0,
    device: str = "auto",
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Score images with a trained run; write `scores.csv`, heat maps, `report.json` and `report.html`.

    Every score is higher for what does not belong. Thresholds are set on normal images that were not trained on. Images
    are read and scored a batch at a time, so a folder may have any size; one image gets the same scores alone as in a
    batch. What cannot be read is a row of the table, too, with its reason. Labels and masks are matched with the names
    of the images, and masks are read, before anything is scored.

    Arguments:
        run: the run or its folder.
        images: what is searched: a folder, file or any other source that `--data` takes, also a table.
        normal: what is normal, like `images`; by default what the run held out (at most `NORMAL`).
        labels: a CSV of file names and 0 (normal) or 1 (anomalous); see `read_labels`.
        masks: a folder with masks of the anomalous pixels; see `Masks`. Without labels, an image with a mask is
            anomalous and any other normal. With labels, an image without a mask counts in the pixels' metrics if its
            label says that it is normal. What lies in this folder is not searched.
        scores: names from `SCORES`; by default `DEFAULT`, without `latent` where the run's data are not there any more,
            and without those that need a posterior where the objective trains none (AGE).
        deciding: the score whose threshold makes the column `anomalous`; by default `neg_elbo`, or the first of them.
        false_positive_rate: share of normal images that may be called anomalous.
        maps: heat maps are drawn for so many images with the highest deciding scores.
        features: the space of the score `perceptual`.
        heatmap: "local" (what is unusual at its place, from training images), "residual" (what the model cannot draw),
            "latent" (what its latents do not keep) or "combined" (of the last two). By default local, or residual where
            what is normal is given and the run's own data are gone.
        draws: latents of each image in the scores that estimate a likelihood.
        batch_size: images at a time; by default what fits a fraction of a GiB.
        seed: of those latents.
        device: as for `evaluate`.
        out: folder of the results, by default `detect/NAME` in the run's, after the images' folder. What lies in it is
            not searched, and the results of an earlier search there are replaced.

    Returns:
        What stands in report.json: "run", "images", "normal": what was compared; "model": training steps, and the
        checksum of the weights; "settings": draws, features, seed; "counts"; "scores": for each its
        meaning, threshold and the interval of that one's false alarms; "metrics": with labels or masks `auroc_SCORE`,
        `aupr_SCORE`, `fpr_at_95_tpr_SCORE`, `pixel_auroc`, `dice`, `best_dice`, each with value, interval ("low",
        "high" and what was "resampled", "images" or "scans"; or "no_interval": why there is none), n and protocol;
        "folder".

    Raises:
        ConfigError: an unknown score, or one that does not suit the data or the objective; a model of classes; numbers
            that will not do; results that would lie among the images or cannot be written.
        DataError: a source that cannot be read, labels or masks that fit no image, a mask that cannot be used, no image
            that can be scored.

    Example:
        >>> detect("runs/mine", "inbox")["folder"]  # doctest: +SKIP
        'runs/mine/detect/inbox'
    """
    run = run if isinstance(run, Run) else Run.open(run)
    asked, encodes = scores is not None, run.config().objective.encodes
    if scores is None:
        scores = [name for name in DEFAULT if encodes == "posterior" or "posterior" not in SCORES[name].needs]
    scores = list(scores)
    kind = LOCAL if heatmap is None else heatmap
    mapped = bool(maps) or masks is not None
    deciding = deciding or (DECIDING if DECIDING in scores else next(iter(scores), DECIDING))
    one_of(HEATMAPS, heatmap=kind)
    _check(scores, deciding, false_positive_rate, maps, draws, batch_size, seed)
    place, folder = pick_device(device), _folder(run, Path(images).expanduser(), out)
    if masks is not None and Path(masks).resolve() == Path(images).expanduser().resolve():
        raise ConfigError(f"{masks} holds the images, too: give the masks a folder of their own")
    without = [folder, *([] if masks is None else [Path(masks)])]
    judge = Judge(run, scores, features, kind if mapped else "residual", draws, seed, batch_size, place, without)
    started = time.perf_counter()
    readings = judge.open(images)
    opening = time.perf_counter() - started
    truth = Truth.read(labels, masks, judge.model, Path(images).expanduser())
    if labels is not None or masks is not None:
        truth.check(readings.names())
    _make(folder)
    # What takes minutes begins here; what can be refused was.
    try:
        judge.fit()
    except DataError as error:
        # What nobody asked for and needs the run's data is left out where these are gone.
        if normal is None or (asked and "latent" in scores) or heatmap == LOCAL:
            raise
        log.info("without the score latent and the heat map local: %s", error)
        scores = [name for name in scores if name != "latent"]
        kind = "residual" if heatmap is None else heatmap
        judge = Judge(run, scores, features, kind, draws, seed, batch_size, place, without)
    thresholds, normals = judge.calibrated(normal, false_positive_rate)
    usual = judge.usual(normals) if mapped else None
    pixels = PixelCurve(DRAWS) if truth.masks is not None else None
    started = time.perf_counter()
    found = judge.search(judge.read(readings), truth, pixels)
    seconds = opening + time.perf_counter() - started
    scored = sum(not reason for reason in found.reasons)
    if not scored:
        raise DataError(f"{images} has nothing that can be scored ({found.reasons[0] if found.reasons else 'empty'})")
    del readings  # rows of a table or an array are in memory, and the maps read them again
    report: dict[str, Any] = {
        "run": str(run.folder),
        "images": str(images),
        "normal": "held out by the run" if normal is None else str(normal),
        "folder": str(folder),
        "model": {"steps": judge.config.steps, "sha256": run.checksum()},
        "settings": {"draws": draws, "features": features, "seed": seed},
        "deciding": deciding,
        "counts": {
            "found": len(found.names),
            "scored": scored,
            "called_anomalous": int((found.of(deciding) > thresholds[deciding].value).sum()),
        },
        "seconds": seconds,
        "images_per_second": scored / max(seconds, 1e-9),
        "scores": {name: _about(name, thresholds[name]) for name in scores},
        "metrics": _metrics(found, scores, pixels, usual),
    }
    write_table(folder / "scores.csv", found, thresholds, normals, deciding)
    for old in (folder / MAPS).glob("*.png"):  # of an earlier search into this folder
        if PICTURE.fullmatch(old.name):
            old.unlink()
    if usual is not None and maps:
        report["heatmap"] = kind
        report["maps"] = judge.draw(images, found, deciding, maps, usual.full, folder / MAPS)
    from introvae.apps.detection_page import write_page

    write_atomically(folder / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    write_page(folder / "report.html", report, found, normals, thresholds)
    return report


def table(report: Mapping[str, Any]) -> str:
    """The main numbers as text, for the command line."""
    counts = report["counts"]
    lost = counts["found"] - counts["scored"]
    lines = [
        f"scored {counts['scored']:,} of {counts['found']:,}"
        + (f" ({lost:,} could not be; scores.csv says why)" if lost else "")
        + f", {report['images_per_second']:,.0f} a second",
        f"called anomalous: {counts['called_anomalous']:,}, by {report['deciding']} above "
        f"{report['scores'][report['deciding']]['threshold']:.5g}",
    ]
    for name, entry in report["metrics"].items():
        bounds = (
            f"{entry['low']:.4f} to {entry['high']:.4f}" if "low" in entry else f"no interval: {entry['no_interval']}"
        )
        lines.append(f"  {name:<32} {entry['value']:.4f}  ({bounds})")
    return "\n".join(lines)


def _check(
    scores: Sequence[str], deciding: str, rate: float, maps: int, draws: int, batch_size: int | None, seed: int
) -> None:
    for name in scores:
        if name not in SCORES:
            raise unknown("score", name, list(SCORES))
    if not scores or deciding not in scores:
        raise ConfigError(
            f"the score that decides ({deciding}) is not among {', '.join(scores) or 'none'}: add it, or choose one of "
            "them"
        )
    if not 0 < rate < 1:
        raise ConfigError(f"false_positive_rate is {rate}: give a number between 0 and 1, such as 0.05")
    not_negative(maps=maps)
    positive(draws=draws, **({} if batch_size is None else {"batch_size": batch_size}))
    whole(maps=maps, draws=draws, **({} if batch_size is None else {"batch_size": batch_size}))
    checked_seed(seed)


def _folder(run: Run, images: Path, out: str | Path | None) -> Path:
    """Where the results go."""
    # The resolved path has a name where `.` and `..` have none: those would lead to the run's own report.
    source = images.resolve()
    folder = run.folder / "detect" / (source.name or "images") if out is None else Path(out)
    place = folder.resolve()
    # A folder in the images' folder is left out when these are read; pictures beside Parquet files hide them.
    if source in (place, place / MAPS) or (source in place.parents and holds_parquet(source)):
        raise ConfigError(f"the results cannot go to {folder}, among the images of {images}: give another folder")
    return folder


def _make(folder: Path) -> None:
    """Make the folder of the results, which nothing must keep from being written hours later."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("no right to write")
    except OSError as error:
        raise ConfigError(f"the results cannot be written to {folder} ({error}): give another folder") from error


def _about(name: str, threshold: Threshold) -> dict[str, Any]:
    if math.isnan(threshold.low):
        bounds: dict[str, Any] = {"no_interval": "fewer than two scans of normal images"}
    else:
        bounds = {"false_positive_rate_low": threshold.low, "false_positive_rate_high": threshold.high}
    return {
        "meaning": SCORES[name].meaning,
        "unit": SCORES[name].unit,
        "threshold": threshold.value,
        "false_positive_rate": threshold.false_positive_rate,
        **bounds,
        "normal_images": threshold.n,
        **({} if threshold.groups is None else {"normal_scans": threshold.groups}),
    }


def _metrics(found: Found, scores: Iterable[str], pixels: PixelCurve | None, usual: Usual | None) -> dict[str, Any]:
    """How well what is anomalous is told from what is not, where somebody said what is."""
    told: dict[str, Any] = {}
    units = "scans" if found.sliced else "images"
    for name in scores:
        normal, anomalous = found.of(name, False), found.of(name, True)
        if not len(normal) or not len(anomalous):
            continue
        what, few, groups = f"{len(anomalous)} anomalous against {len(normal)} normal images", "", None
        if found.sliced:  # slices of a scan are alike: the intervals draw scans
            groups = found.groups(False), found.groups(True)
            scans = [len(set(kind)) for kind in groups]
            what = what.replace("images", f"slices of {len({*groups[0], *groups[1]})} scans")
            few = f"fewer than two scans with {'anomalous' if scans[1] < 2 else 'normal'} slices"
        for metric, interval in detection_metrics(normal, anomalous, groups=groups).items():
            its = None if math.isnan(interval.low) else interval
            told[f"{metric}_{name}"] = {
                "value": interval.value,
                **_bounds(its, few, units),
                "n": len(normal) + len(anomalous),
                "protocol": what + ("" if its is None else f"; 95 % interval of 1,000 bootstraps of whole {units}"),
            }
    if any(known is not None for known in found.truth) and not told:
        log.info("without AUROC and the like: they need images of both kinds, normal and anomalous, that were scored")
    n = found.masked
    if pixels is not None and (untold := sum(not reason for reason in found.reasons) - n) > 0:
        log.info("%d images are not in the pixels' metrics: they have no mask, and no label says normal", untold)
    if pixels is not None and not pixels.both:
        log.info("without the pixels' metrics: the masks need both, marked pixels and others")
    elif pixels is not None:
        best = pixels.best_dice
        how = f"heat above {best.threshold:.4g}, the best threshold for these very images"
        measured = {
            "pixel_auroc": (pixels.auroc, pixels.auroc_interval(), f"heat of all pixels of {n} images"),
            "best_dice": (best.value, pixels.best_dice_interval(), how),
        }
        if usual is not None:
            how = f"heat above {usual.found:.4g}, which {1 - FOUND:.0%} of normal images' pixels exceed"
            measured["dice"] = (pixels.dice(usual.found), pixels.dice_interval(usual.found), how)
        few = f"fewer than two {units} with {'marked' if pixels.groups[1] < 2 else 'unmarked'} pixels"
        for metric, (value, interval, how) in measured.items():
            how += "" if interval is None else f"; 95 % interval of {DRAWS} bootstraps of whole {units}"
            told[metric] = {"value": value, **_bounds(interval, few, units), "n": n, "protocol": how}
    return told


def _bounds(interval: Interval | None, few: str, units: str) -> dict[str, Any]:
    """The entries of an interval whose bootstrap drew these units; `few` says why there is none."""
    if interval is None:
        return {"no_interval": few}
    return {"low": interval.low, "high": interval.high, "resampled": units}


def write_table(path: Path, found: Found, thresholds: Mapping[str, Threshold], normals: Normal, deciding: str) -> Path:
    """`scores.csv`: a row for each file, in the order of their names.

    Columns: file; anomalous (1 where the deciding score is above its threshold); p_value (share of normal images, this
    one counted in, that score as high); each score; label, where known; reason, why it was not scored.
    """
    reference = normals.scores[deciding].sort().values
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "anomalous", "p_value", *found.scores, "label", "reason"])
    for i, (name, reason, truth) in enumerate(zip(found.names, found.reasons, found.truth, strict=True)):
        label = "" if truth is None else int(truth)
        if reason:
            writer.writerow([name, "", "", *[""] * len(found.scores), label, reason])
            continue
        value = found.scores[deciding][i]
        above = len(reference) - int(torch.searchsorted(reference, torch.tensor(value, dtype=torch.float64)))
        p = (above + 1) / (len(reference) + 1)
        called = int(value > thresholds[deciding].value)
        columns = [f"{column[i]:.8g}" for column in found.scores.values()]
        writer.writerow([name, called, f"{p:.4g}", *columns, label, ""])
    write_atomically(path, text.getvalue().encode())
    return path
