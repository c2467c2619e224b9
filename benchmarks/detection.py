"""How well runs tell what does not belong, and where. Five measurements, each with `--json FILE`:

- `python benchmarks/detection.py sets RUN… --local DATA`: each score's AUROC for the run's held-out images against
  other sets of images (the folders of DATA, uniform noise, images of a single colour), all brought to the run's size
  and channels;
- `python benchmarks/detection.py one-class DATA/mnist`: each digit in turn is normal: trains a model on its training
  images alone, and tells its test images from all others';
- `python benchmarks/detection.py places RUN`: squares pasted into held-out images, patches blurred, patches swapped:
  the pixels' AUROC of each heat map;
- `python benchmarks/detection.py speed RUN`: images a second for each score, over 10,000 made-up images, and the
  process' memory;
- `python benchmarks/detection.py folder RUN`: the whole command over a folder of 10,000 made-up PNG files, from its
  call to its end: files read, thresholds set, `scores.csv` and the page written; by default, and with each score alone.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Contestant, compete, peak_bytes, progress, report
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from introvae import IntrospectiveVAE, Run, fit
from introvae.apps.detect import DEFAULT
from introvae.apps.explore import latents
from introvae.apps.heatmaps import MAPS, overlay
from introvae.apps.judge import betas_of
from introvae.apps.local_map import SCALES, LocalMap
from introvae.apps.scores import score_images, scores_for
from introvae.cli import main as command
from introvae.data import ArrayData, DataOptions, load_data, preparation_from
from introvae.evaluation import load_for
from introvae.metrics.detection import detection_metrics
from introvae.metrics.features import feature_space
from introvae.metrics.mahalanobis import Mahalanobis
from introvae.metrics.pixel_curve import PixelCurve
from introvae.pictures import image_grid, save_picture
from introvae.training.config import parse_config, recipe_files

FITTED = 5000
"""Training images whose latents the Mahalanobis distance knows."""


def opened(folder: Path) -> tuple[IntrospectiveVAE, ArrayData, Any]:
    """A run's model, its data and its objective."""
    run = Run.open(folder)
    config, model = run.config(), run.model()
    data = load_for(config, model, None)
    assert isinstance(data, ArrayData)
    return model, data, config.objective


def some(data: ArrayData, n: int, heldout: bool = True) -> Tensor:
    part = data.heldout if heldout else data.train
    return part.some(n, torch.Generator().manual_seed(0)).tensor()


class Scorer:
    """All scores of a model."""

    def __init__(self, model: IntrospectiveVAE, train: Tensor, objective: Any, draws: int) -> None:
        self.model, self.draws = model, draws
        self.beta_rec, self.beta_kl = betas_of(objective)
        self.known = Mahalanobis(model.latent_dim)
        self.known.update(latents(model, train))
        self.names = scores_for(tuple(train.shape[1:]), objective.encodes)

    def __call__(self, x: Tensor, names: list[str] | None = None) -> dict[str, Tensor]:
        return score_images(
            self.model,
            x,
            names or self.names,
            beta_rec=self.beta_rec,
            beta_kl=self.beta_kl,
            draws=self.draws,
            features=feature_space("randconv"),
            latents=self.known,
        )


# --- other sets


def others(model: IntrospectiveVAE, own: str, local: Path, n: int) -> Iterator[tuple[str, Tensor]]:
    """Sets of images as the model takes them."""
    assert model.config is not None
    assert model.shape is not None
    preparation = preparation_from(model.config["data"])
    for folder in sorted(path for path in local.iterdir() if path.is_dir() and path.name != Path(own).name):
        data = load_data(folder, DataOptions(), preparation)
        assert isinstance(data, ArrayData)
        yield folder.name, some(data, n, heldout=len(data.heldout) >= n)
    generator = torch.Generator().manual_seed(0)
    yield "uniform noise", torch.rand(n, *model.shape, generator=generator)
    yield (
        "single colour",
        torch.rand(n, model.shape[0], 1, 1, generator=generator).expand(-1, *model.shape).contiguous(),
    )


def sets(words: argparse.Namespace) -> list[dict[str, Any]]:
    cases = []
    for folder in words.runs:
        model, data, objective = opened(folder)
        scorer = Scorer(model, some(data, FITTED, heldout=False), objective, words.draws)
        normal = scorer(some(data, words.number))
        for name, x in others(model, data.name, words.local, words.number):
            found = scorer(x)
            case: dict[str, Any] = {"case": f"{folder.name} against {name}", "objective": type(objective).__name__}
            for score in scorer.names:
                told = detection_metrics(normal[score], found[score])["auroc"]
                case |= {score: told.value, f"{score}_low": told.low, f"{score}_high": told.high}
            best = max(scorer.names, key=lambda score: case[score])
            cases.append({**case, "best": best, "n": len(x)})
            progress(f"{case['case']}: " + ", ".join(f"{score} {case[score]:.3f}" for score in scorer.names))
    return cases


# --- one class


def one_class(words: argparse.Namespace) -> list[dict[str, Any]]:
    data = load_data(words.data, DataOptions())
    assert isinstance(data, ArrayData)
    assert data.train.labels is not None
    assert data.heldout.labels is not None
    cases = []
    settings = ["--objective", words.objective, "--steps", str(words.steps), "--image_every", "0"]
    for digit in words.classes or range(len(data.class_names)):
        normal = data.train.tensor()[data.train.labels == digit]
        own = parse_config(settings, recipe_files(words.recipe, settings))
        with tempfile.TemporaryDirectory() as folder:
            run = fit(dataclasses.replace(own, out=str(Path(folder) / "run")), data=normal, progress=False)
            model = run.model()
        scorer = Scorer(model, normal[:FITTED], own.objective, words.draws)
        found = scorer(data.heldout.tensor())
        belongs = data.heldout.labels == digit
        case: dict[str, Any] = {"case": f"{data.class_names[digit]} is normal", "trained_on": len(normal)}
        for score in scorer.names:
            case[score] = detection_metrics(found[score][belongs], found[score][~belongs], draws=1)["auroc"].value
        progress(f"{case['case']}: " + ", ".join(f"{score} {case[score]:.3f}" for score in scorer.names))
        cases.append(case)
    mean = {name: sum(case[name] for case in cases) / len(cases) for name in cases[0] if name != "case"}
    return [*cases, {"case": "mean", **mean}]


# --- places


def pasted(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A square of one random colour."""
    where = squares(x, generator)
    colour = torch.rand(len(x), x.shape[1], 1, 1, generator=generator)
    return torch.where(where[:, None], colour, x), where


def blurred(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A square out of focus."""
    where, reach = squares(x, generator), x.shape[-1] // 8
    kernel = torch.full((x.shape[1], 1, 2 * reach + 1, 2 * reach + 1), 1 / (2 * reach + 1) ** 2)
    soft = F.conv2d(F.pad(x, (reach,) * 4, mode="reflect"), kernel, groups=x.shape[1])
    return torch.where(where[:, None], soft, x), where


def swapped(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A square of the next image, from another place."""
    where, shift = squares(x, generator), x.shape[-1] // 3
    return torch.where(where[:, None], x.roll(1, dims=0).roll((shift, shift), dims=(2, 3)), x), where


def squares(x: Tensor, generator: torch.Generator) -> Tensor:
    """A square of a sixth to a third of the side in each image, `[N, H, W]`."""
    n, side = len(x), x.shape[-1]
    size = torch.randint(side // 6, side // 3 + 1, (n, 1), generator=generator)
    corner = (torch.rand(n, 2, generator=generator) * (side - size)).long()
    place = torch.arange(side)[None]
    rows, columns = (((place >= corner[:, i : i + 1]) & (place < corner[:, i : i + 1] + size)) for i in (0, 1))
    return rows[:, :, None] & columns[:, None, :]


CHANGES = {"pasted": pasted, "blurred": blurred, "swapped": swapped}


class Some(LocalMap):
    """The map of some of its features alone."""

    def __init__(self, model: IntrospectiveVAE, features: list[int]) -> None:
        super().__init__(model)
        self.features = features

    def _features(self, x: Tensor, condition: Any) -> Iterator[Tensor]:
        for found in super()._features(x, condition):
            yield found[..., self.features]


def local_maps(model: IntrospectiveVAE, train: Tensor) -> dict[str, LocalMap]:
    """The whole map, that of the images' detail alone, which has nothing of the model, and that without it."""
    count = train.shape[1] + 2  # features of a scale, the detail's energy last
    every = range(len(SCALES) * count)
    detail = [i for i in every if i % count == count - 1]
    found = {
        "local": LocalMap(model),
        "detail": Some(model, detail),
        "residuals": Some(model, [i for i in every if i not in detail]),
    }
    for one in found.values():
        for part in train.split(250):
            one.update(part)
    return found


def places(words: argparse.Namespace) -> list[dict[str, Any]]:
    cases, shown = [], []
    for folder in words.runs:
        model, data, objective = opened(folder)
        x = some(data, words.number)
        known = local_maps(model, some(data, 2000, heldout=False))
        local = known["local"]
        maps = {**{name: lambda model, part, one=one: one(part) for name, one in known.items()}, **MAPS}
        normal = torch.cat([local(part) for part in x.split(250)])
        top = float(normal.flatten()[torch.randperm(normal.numel())[:1_000_000]].quantile(0.999))
        for name, change in CHANGES.items():
            changed, where = change(x, torch.Generator().manual_seed(0))
            case: dict[str, Any] = {
                "case": f"{folder.name}, {name}",
                "objective": type(objective).__name__,
                "n": len(x),
            }
            for kind, heat in maps.items():
                curve = PixelCurve()
                for part, marked in zip(changed.split(250), where.split(250), strict=True):
                    curve.update(heat(model, part), marked)
                case |= {f"pixel_auroc_{kind}": curve.auroc, f"best_dice_{kind}": curve.best_dice.value}
            cases.append(case)
            progress(", ".join(f"{key} {value}" for key, value in case.items()))
            eight = changed[:8]
            heat = overlay(eight, local(eight), top)
            rows = (eight, model.reconstruct(eight), where[:8, None].float(), heat)
            shown += [row.expand(-1, 3, -1, -1) for row in rows]
    if words.sheet is not None:
        save_picture(image_grid(torch.cat(shown), 8), words.sheet)
    return cases


# --- speed


def speed(words: argparse.Namespace) -> list[dict[str, Any]]:
    cases = []
    for folder in words.runs:
        model, data, objective = opened(folder)
        assert model.shape is not None
        scorer = Scorer(model, some(data, FITTED, heldout=False), objective, words.draws)
        for names in [[name] for name in scorer.names] + [["error", "kl", "neg_elbo", "latent"]]:
            n = words.number if not {"neg_log_likelihood", "complexity"} & set(names) else words.number // 10
            generator, started = torch.Generator().manual_seed(0), time.perf_counter()
            drawing = 0.0
            for start in range(0, n, 250):
                before = time.perf_counter()
                x = torch.rand(min(250, n - start), *model.shape, generator=generator)
                drawing += time.perf_counter() - before
                scorer(x, names)
            seconds = time.perf_counter() - started - drawing
            cases.append(
                {
                    "case": f"{folder.name}, {'+'.join(names)}",
                    "shape": "x".join(map(str, model.shape)),
                    "threads": torch.get_num_threads(),
                    "n": n,
                    "images_per_second": n / seconds,
                    "peak_mib": peak_bytes() / 2**20,
                }
            )
            progress(str(cases[-1]))
    return cases


# --- a folder


def pictures(folder: Path, count: int, side: int, channels: int) -> Path:
    """PNG files of squares and discs on noise, grey or in colour."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    rows, columns = np.mgrid[:side, :side]
    for index in range(count):
        picture = rng.normal(100, 15, (side, side, channels))
        for round_ in (False, True):
            row, column, reach = rng.uniform((0, 0, side / 16), (side, side, side / 4))
            off = np.stack([rows - row, columns - column])
            inside = (off**2).sum(0) < reach**2 if round_ else abs(off).max(0) < reach
            picture[inside] = rng.uniform(0, 255, channels)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8).squeeze()).save(folder / f"{index:05d}.png")
    return folder


def contestant(setting: dict[str, Any]) -> None:
    """Run the command once, and say what it took."""
    before, begun = peak_bytes(), time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # what is said to the other side goes there
        code = command(["detect", *setting["words"]])
    seconds = time.perf_counter() - begun
    if code:
        raise SystemExit(code)
    found = json.loads(Path(setting["out"], "report.json").read_text())
    facts = {
        "n": found["counts"]["scored"],
        "seconds": seconds,
        "images_per_second": found["counts"]["scored"] / seconds,
        "images_per_second_of_the_search": found["images_per_second"],
        "peak_mib_over_start": (peak_bytes() - before) / 2**20,
    }
    compete(lambda: None, torch.device("cpu"), facts)


def folder(words: argparse.Namespace) -> list[dict[str, Any]]:
    cases = []
    with tempfile.TemporaryDirectory() as temporary:
        for run in words.runs:
            model, data, objective = opened(run)  # what the run was trained on is in the cache from now on
            assert model.shape is not None
            count = words.number or (200 if words.short else 10_000)
            images = pictures(Path(temporary, run.name), count, words.side, model.shape[0])
            names = scores_for(data.shape, objective.encodes)
            every = [["--scores", name, "--maps", "0"] for name in (names[:1] if words.short else names)]
            scores = ",".join(name for name in DEFAULT if name in names)
            for options in ([], ["--scores", scores, "--maps", "0"], *every):
                out = Path(temporary, "found")
                given = [str(run), "--images", str(images), "--out", str(out), "--draws", str(words.draws), *options]
                one = Contestant({"words": given, "out": str(out)})
                case = {"case": f"{run.name}, {' '.join(options) or 'by default'}", "side": words.side}
                cases.append({**case, "threads": torch.get_num_threads(), **one.facts})
                one.end()
                progress(str(cases[-1]))
    return cases


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--json", type=Path, help="where to write the results")
    words.add_argument("--draws", type=int, default=64, help="latents an image for a likelihood (default: 64)")
    words.add_argument("--contestant", type=json.loads, help=argparse.SUPPRESS)
    kinds = words.add_subparsers(dest="what")
    of_sets = kinds.add_parser("sets", help="against other sets of images")
    of_sets.add_argument("runs", nargs="+", type=Path)
    of_sets.add_argument("--local", type=Path, required=True, help="the folder that holds the sets' folders")
    of_sets.add_argument("--number", type=int, default=2000, help="images of each set (default: 2,000)")
    of_classes = kinds.add_parser("one-class", help="each class in turn is normal")
    of_classes.add_argument("data", help="labelled images")
    of_classes.add_argument("--objective", default="SoftIntroVAE")
    of_classes.add_argument("--recipe", default="mnist-softintrovae")
    of_classes.add_argument("--steps", type=int, default=3000)
    of_classes.add_argument("--classes", type=int, nargs="+", help="only these")
    of_places = kinds.add_parser("places", help="where in the image")
    of_places.add_argument("runs", nargs="+", type=Path)
    of_places.add_argument("--number", type=int, default=500, help="images (default: 500)")
    of_places.add_argument("--sheet", type=Path, help="where to draw the first ones and their heat maps")
    of_speed = kinds.add_parser("speed", help="images a second")
    of_speed.add_argument("runs", nargs="+", type=Path)
    of_speed.add_argument(
        "--number", type=int, default=10_000, help="images (default: 10,000; a tenth for likelihoods)"
    )
    of_folder = kinds.add_parser("folder", help="the whole command over a folder of files")
    of_folder.add_argument("runs", nargs="+", type=Path)
    of_folder.add_argument("--number", type=int, help="PNG files (default: 10,000; short: 200)")
    of_folder.add_argument("--side", type=int, default=64, help="their side in pixels (default: 64)")
    of_folder.add_argument("--short", action="store_true", help="fewer files and scores, a minute or less")
    own = words.parse_args()
    if own.contestant:
        return contestant(own.contestant)
    if own.what is None:
        words.error("say what is measured: sets, one-class, places, speed or folder")
    measured = {"sets": sets, "one-class": one_class, "places": places, "speed": speed, "folder": folder}[own.what]
    # What the scores' draws, all of seed 0, and the runs' training were; one-class trains its own.
    configs = {folder.name: Run.open(folder).config() for folder in getattr(own, "runs", [])}
    trained = {name: {**config.to_dict(), "data": Path(config.data).name} for name, config in configs.items()}
    trained |= {key: getattr(own, key) for key in ("objective", "recipe", "steps") if hasattr(own, key)}
    return report(measured(own), own.json, draws=own.draws, seed=0, trained=trained)


if __name__ == "__main__":
    main()
