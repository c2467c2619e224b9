"""A trained model as a judge: it scores what it is shown, and says where in a picture."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from introvae.apps.heatmaps import MAPS, OF_POSTERIOR, overlay
from introvae.apps.local_map import LocalMap
from introvae.apps.scores import SCORES, score_images
from introvae.apps.truth import Truth
from introvae.data import ArrayData, Data, preparation_from
from introvae.data.each import Reading, Readings, open_readings
from introvae.data.scans import scan_of
from introvae.errors import ConfigError, DataError
from introvae.evaluation import load_for
from introvae.measures.entries import at_once
from introvae.metrics.detection import Threshold, calibrate
from introvae.metrics.features import feature_space
from introvae.metrics.mahalanobis import Mahalanobis
from introvae.metrics.pixel_curve import PixelCurve
from introvae.objectives import IntroVAE, Objective
from introvae.pictures import save_picture, to_pil
from introvae.training.run import Run

NORMAL = 5_000
"""At most so many held-out images calibrate the thresholds, and so many training images the latents' covariance."""
FOUND, FULL = 0.99, 0.999
"""Quantiles of the heat of normal images' pixels: above the first a pixel counts as found, at the second it has full
colour.
"""
LOCAL = "local"
"""The heat map that knows what is usual at each place, from training images."""
HEATMAPS = (LOCAL, *MAPS)
PLACES = 2_000
"""At most so many training images tell it."""
PICTURE = re.compile(r"\d{4,}_[\w-]{0,60}\.png")
"""Names of the pictures that `Judge.draw` writes: the rank, and what is left of the image's name."""
MAPPED = 256
"""Normal images whose heat those quantiles are of."""


@dataclass
class Found:
    """What became of each image, in order.

    Arguments:
        names, reasons: of all; the reason is empty where it was scored.
        scores: of all, by name; NaN where it was not scored.
        truth: whether it is anomalous, None where nobody knows.
        masked: how many have a mask, or are known to need none.
    """

    names: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)
    truth: list[bool | None] = field(default_factory=list)
    masked: int = 0

    def add(self, reading: Reading, scores: Mapping[str, float], truth: bool | None, reason: str = "") -> None:
        """One more image."""
        self.names.append(reading.name)
        self.reasons.append(reason or reading.reason)
        self.truth.append(truth)
        for name, column in self.scores.items():
            column.append(scores.get(name, float("nan")))

    def of(self, score: str, anomalous: bool | None = None) -> Tensor:
        """A score of all images that have one, or of those that are known to be (ab)normal, float64."""
        return torch.tensor([self.scores[score][row] for row in self._rows(anomalous)], dtype=torch.float64)

    def groups(self, anomalous: bool | None = None) -> list[Hashable]:
        """What each image that `of` gives the score of belongs to."""
        groups = groups_of(self.names)
        return [groups[row] for row in self._rows(anomalous)]

    def _rows(self, anomalous: bool | None) -> list[int]:
        return [
            row
            for row, (reason, truth) in enumerate(zip(self.reasons, self.truth, strict=True))
            if not reason and (anomalous is None or truth is anomalous)
        ]

    @property
    def sliced(self) -> bool:
        """Whether there are slices of scans among the images."""
        return any(scan_of(name) is not None for name in self.names)


def groups_of(names: Sequence[str]) -> list[Hashable]:
    """What images are drawn together with: slices with those of their scan, any other image with none.

    Example:
        >>> groups_of(["t1.nii slice 4", "t1.nii slice 5", "a.png"])
        ['t1.nii', 't1.nii', 2]
    """
    return [scan_of(name) or row for row, name in enumerate(names)]


class Usual(NamedTuple):
    """Heat that few pixels of normal images have.

    Arguments:
        found: that one in a hundred exceeds; a pixel above it is found.
        full: that one in a thousand exceeds; full colour.
    """

    found: float
    full: float


@dataclass(frozen=True)
class Normal:
    """What normal images score.

    Arguments:
        scores: by name, float64 `[N]`.
        images: some of them, `[M, C, H, W]`; None of vectors.
    """

    scores: dict[str, Tensor]
    images: Tensor | None


class Judge:
    """A run's model, and all that its scores need; what lies in the folders `without` is never read."""

    def __init__(
        self,
        run: Run,
        scores: Sequence[str],
        features: str,
        heatmap: str,
        draws: int,
        seed: int,
        batch_size: int | None,
        device: torch.device,
        without: Sequence[Path] = (),
    ) -> None:
        self.config, self.model = run.config(), run.model().to(device).eval()
        kind, encodes = type(self.config.objective).__name__, self.config.objective.encodes
        if encodes == "nothing":
            raise ConfigError(f"{run.folder} is a {kind}'s, without posteriors: give a VAE's")
        if self.model.classes is not None:
            raise ConfigError(f"{run.folder} is a model of classes, which would have to be known: give one without")
        if self.model.shape is None:
            raise ConfigError("the model was not built from a registered network: its shape is not known")
        if encodes == "mode":
            meaningless = [name for name in scores if "posterior" in SCORES[name].needs]
            meaningless += [f"the heat map {heatmap}"] if heatmap in OF_POSTERIOR else []
            if meaningless:
                raise ConfigError(
                    f"{run.folder} is of the objective {kind}, which leaves the log-variance untrained, so that "
                    f"{', '.join(meaningless)} would mean nothing: leave them out"
                )
        self.scores, self.map, self.seed, self.device = scores, heatmap, seed, device
        self.without = without
        self.pictures = len(self.model.shape) == 3
        self.batch_size = batch_size or at_once(self.model.shape)
        self.preparation = preparation_from(self.model.config["data"]) if self.model.config else None
        beta_rec, beta_kl = betas_of(self.config.objective)
        self.settings: dict[str, Any] = {
            "beta_rec": beta_rec,
            "beta_kl": beta_kl,
            "draws": draws,
            "seed": seed,
            "features": feature_space(features) if "perceptual" in scores else None,
        }

    def fit(self) -> None:
        """Learn from the training images what the scores and the heat map need; else the first of them does it.

        Raises:
            ConfigError: the run's data are a density.
            DataError: they are not there any more.
        """
        _ = self._latents, self._local

    @cached_property
    def _own(self) -> Data:
        """What the run was trained on and held out, read once."""
        return load_for(self.config, self.model, None)

    @cached_property
    def _latents(self) -> Mahalanobis | None:
        """The law of the latents of what the run was trained on, where it is a score's."""
        if "latent" not in self.scores:
            return None
        fitted = Mahalanobis(self.model.latent_dim)
        with torch.no_grad():
            for x in self._trained_on("the score latent", NORMAL):
                fitted.update(self.model.encode(x).mode)
        return fitted

    @cached_property
    def _local(self) -> LocalMap | None:
        """What is usual at each place of what the run was trained on, where it is the heat map's."""
        if self.map != LOCAL or not self.pictures:
            return None
        fitted = LocalMap(self.model)
        for x in self._trained_on(f"the heat map {LOCAL}", PLACES):
            fitted.update(x)
        return fitted

    def _trained_on(self, what: str, number: int) -> Iterator[Tensor]:
        """Some of what the run was trained on, for what needs it."""
        data = self._own
        if not isinstance(data, ArrayData):
            raise ConfigError(f"{what} needs data of files or rows, not of a density: leave it out")
        some = data.train.some(number, torch.Generator().manual_seed(self.seed))
        for start in range(0, len(some), self.batch_size):
            yield some[slice(start, start + self.batch_size)].tensor(self.device)

    def score(self, x: Tensor) -> dict[str, Tensor]:
        """All scores of `x: [N, ...]`, float64 `[N]`."""
        return score_images(self.model, x.to(self.device), self.scores, latents=self._latents, **self.settings)

    def open(self, source: str | Path) -> Readings:
        """A source of images, which `read` takes."""
        return open_readings(source, self.preparation, self.without)

    def read(self, source: str | Path | Readings) -> Iterator[list[Reading]]:
        """Everything of a source, a batch at a time; what has another shape than the model's is without an image."""
        batch: list[Reading] = []
        for reading in self.open(source) if isinstance(source, str | Path) else source:
            if reading.x is not None and tuple(reading.x.shape) != self.model.shape:
                reason = f"has shape {tuple(reading.x.shape)}, the model takes {self.model.shape}"
                reading = Reading(reading.name, None, reason, reading.label)
            batch.append(reading)
            if len(batch) == self.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _normal(self, source: str | Path | None) -> Iterator[tuple[Tensor, Sequence[str]]]:
        """Normal images and their names, if they have any."""
        if source is not None:
            for batch in self.read(source):
                images = [(reading.name, reading.x) for reading in batch if reading.x is not None]
                if images:
                    yield torch.stack([x for _, x in images]), [name for name, _ in images]
            return
        data = self._own
        if not isinstance(data, ArrayData):
            raise ConfigError("a density has no held-out points: say what is normal with --normal FILE")
        some = data.heldout.some(NORMAL, torch.Generator().manual_seed(self.seed))
        for start in range(0, len(some), self.batch_size):
            batch = some[slice(start, start + self.batch_size)]
            yield batch.tensor(), batch.names

    def calibrated(self, source: str | Path | None, rate: float) -> tuple[dict[str, Threshold], Normal]:
        """The threshold of each score, and the scores and some images that it comes from."""
        columns: dict[str, list[Tensor]] = {name: [] for name in self.scores}
        kept: list[Tensor] = []
        names: list[str] = []
        for x, its in self._normal(source):
            names += its
            for name, values in self.score(x).items():
                columns[name].append(values.cpu())
            if self.pictures and sum(map(len, kept)) < MAPPED:
                kept.append(x)
        if not columns[self.scores[0]]:
            raise DataError(f"{source} has no normal image that can be read: give a folder of images that belong")
        scores = {name: torch.cat(values) for name, values in columns.items()}
        groups = groups_of(names) if any(scan_of(name) is not None for name in names) else None
        thresholds = {name: calibrate(values, rate, groups=groups) for name, values in scores.items()}
        return thresholds, Normal(scores, torch.cat(kept)[:MAPPED] if kept else None)

    def heat(self, x: Tensor) -> Tensor:
        """Heat maps `[N, H, W]`."""
        if self._local is not None:
            return self._local(x.to(self.device))
        return MAPS[self.map](self.model, x.to(self.device)).cpu()

    def usual(self, normals: Normal) -> Usual | None:
        """The heat of normal images; None of vectors."""
        if normals.images is None:
            return None
        maps = torch.cat([self.heat(x) for x in normals.images.split(self.batch_size)]).flatten()
        ranks = (max(1, round(q * len(maps))) for q in (FOUND, FULL))
        found, full = (float(maps.kthvalue(rank).values) for rank in ranks)
        return Usual(found, max(full, 1e-12))

    def search(self, batches: Iterable[list[Reading]], truth: Truth, pixels: PixelCurve | None) -> Found:
        """Score everything that `read` gives, in order."""
        found = Found(scores={name: [] for name in self.scores})
        for batch in batches:
            able = [reading for reading in batch if reading.x is not None]
            x = torch.stack([reading.x for reading in able if reading.x is not None]) if able else None
            scores = {} if x is None else {name: values.tolist() for name, values in self.score(x).items()}
            masks = None if truth.masks is None else [truth.masks.of(reading.name) for reading in able]
            known = [i for i, reading in enumerate(able) if truth.tells_pixels(reading.name)]
            if pixels is not None and x is not None and masks is not None and known:
                # Slices of a scan are alike: the intervals draw scans.
                groups = [scan_of(able[i].name) or able[i].name for i in known]
                pixels.update(self.heat(x[known]), torch.stack([masks[i] for i in known]), groups)
                found.masked += len(known)
            row = 0
            for reading in batch:
                if reading.x is None:
                    found.add(reading, {}, None)
                    continue
                its = {name: values[row] for name, values in scores.items()}
                finite = all(abs(value) < float("inf") for value in its.values())
                anomalous = truth.of(reading.name, None if masks is None else masks[row])
                found.add(reading, its, anomalous, "" if finite else "a score is not finite")
                row += 1
        return found

    def draw(
        self, images: str | Path, found: Found, deciding: str, number: int, top: float, folder: Path
    ) -> list[dict[str, Any]]:
        """Pictures of the images with the highest scores: image, reconstruction, heat."""
        able = [row for row, reason in enumerate(found.reasons) if not reason]
        highest = sorted(able, key=lambda i: -found.scores[deciding][i])[:number]
        # By name: files may have come or gone since the images were scored.
        ranks = {found.names[row]: rank for rank, row in enumerate(highest)}
        told: dict[int, dict[str, Any]] = {}
        for reading in (reading for batch in self.read(images) for reading in batch):
            if reading.name not in ranks or reading.x is None:
                continue
            rank = ranks[reading.name]
            x = reading.x[None].to(self.device)
            heat = overlay(x.cpu(), self.heat(x), top)[0]
            three = [part.expand(3, -1, -1) for part in (x[0].cpu(), self.model.reconstruct(x)[0].cpu(), heat)]
            path = folder / f"{rank:04d}_{_plain(reading.name)}.png"
            save_picture(to_pil(torch.cat(three, dim=2)), path)
            told[rank] = {
                "name": reading.name,
                "score": found.scores[deciding][highest[rank]],
                "picture": f"{folder.name}/{path.name}",
            }
        return [told[rank] for rank in sorted(told)]


def betas_of(objective: Objective) -> tuple[float, float]:
    """The weights of squared error and KL in what an objective asks of real data; 1 and 1 where it has none.

    Example:
        >>> from introvae import IntroVAE, SoftIntroVAE
        >>> betas_of(SoftIntroVAE(beta_kl=0.5)), betas_of(IntroVAE(beta=0.1))
        ((1.0, 0.5), (0.05, 1.0))
    """
    if isinstance(objective, IntroVAE):
        return objective.beta / 2, 1.0
    return float(getattr(objective, "beta_rec", 1.0)), float(getattr(objective, "beta_kl", 1.0))


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(name).stem)[:60]
