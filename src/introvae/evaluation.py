"""A run in, a report out."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Collection, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from introvae.data import DATA_OPTIONS, ArrayData, Data, DataOptions, TablePreparation, load_data, preparation_from
from introvae.data.arrays import Part, fingerprint
from introvae.data.stream import StreamedPart
from introvae.errors import CheckpointError, ConfigError, DataError, RunError, checked_seed, unknown
from introvae.files import write_atomically
from introvae.machine import hardware, versions
from introvae.measures import (
    METRICS,
    Heldout,
    check_numbers,
    class_metrics_in,
    class_posteriors,
    examine,
    look_at_heldout,
    measure_variants,
    metrics_in,
)
from introvae.metrics.classifier import CLASSIFIERS
from introvae.metrics.features import FeatureSpace, feature_space
from introvae.metrics.perceptual import lpips_distance
from introvae.model import IntrospectiveVAE, check_state
from introvae.pictures import save_picture
from introvae.report import figures
from introvae.report.neighbours import neighbours
from introvae.report.page import render
from introvae.training.checkpoint import list_checkpoints, load_checkpoint
from introvae.training.config import FitConfig
from introvae.training.curves import curves
from introvae.training.devices import pick_device
from introvae.training.ema import averaged_weights
from introvae.training.preview import preview
from introvae.training.run import Report, Run

WORST = 10
"""How many of the worst reconstructions the report names."""
IDENTITY = {
    "version": "version of introvae",
    "model": "model",
    "train": "training data",
    "heldout": "held-out data",
    "seed": "seed",
    "samples": "number of samples",
    "reference": "number of training images",
    "pairs": "number of pairs",
}
"""What must agree for the numbers of two evaluations to stand in one report."""

log = logging.getLogger("introvae")


def evaluate(
    run: Run | str | Path,
    *,
    data: str | Path | Data | None = None,
    metrics: str | Sequence[str] = (),
    features: str | Sequence[str | Path | nn.Module | FeatureSpace] = (),
    seed: int = 0,
    samples: int | None = None,
    reference: int | None = None,
    pairs: int | None = None,
    device: str = "auto",
) -> Report:
    """Measure a finished run's model; write `report.json`, `report.html` and pictures into its folder.

    With other data, the files are `report-DATA.json`, `report-DATA.html` and `images/evaluation-DATA.png`.

    Arguments:
        run: the run or its folder.
        data: other data than the run was trained on, by name or path; they are prepared as those were, and all of
            them are measured, or their own test part.
        metrics: names of the ones to report; all that apply by default, but `lpips`. The others of an earlier report
            stay in it where they are of the same model, data, seed and numbers of images, and are dropped where not.
        features: spaces to compare samples in besides the usual ones: names (`pixels`, `mnist`, `cifar10`,
            `inception`, ...), files of exported networks, modules; see `metrics.features.feature_space`. In the last of
            them samples are shown beside their nearest training images, too.
        seed: of all draws, which are made on the CPU: they are the same on every device.
        samples: how many are compared with training images, by Fréchet distances and shares of classes; more take no
            more memory. By default 5,000 (2,000 in `thumb` and `randconv`), but no more than there are held-out images.
            Published FIDs take 50,000.
        reference: with how many training images, at most all; 10,000 by default.
        pairs: how many pairs of samples are compared with one another by MS-SSIM, and of held-out images as far as
            there are so many; 1,000 by default, but no more than samples have. If `samples` is not given, as many as
            the pairs take are drawn for them alone. IntroVAE's table takes 10,000.
        device: what the model and the features run on: "auto", "cpu", "cuda", "cuda:1", "mps". Sums in float64 are
            kept on the CPU.

    Returns:
        What stands in report.json, as a dictionary that a notebook shows as a table: `{"run": folder, "data": name,
        "metrics": {name: {"value", "std", "n", "protocol", "floor"}}, "variants": {"training mode" or "raw weights":
        {name: {"value", "saved", "gap", "n", "protocol"}} or why there are none}, "evaluation": {"model", "train",
        "heldout": checksums, "seed", "samples", "reference", "pairs", "device"}, "pictures": {name: file},
        "class_posteriors": of each class of labelled data, "class_shares": by classifier, "neighbours": how near
        samples are to training images, "intake": what became of each file, ...}`; keys that do not apply are left out.
        "floor" is what real data score in the samples' place (held-out ones; for precision to coverage and class
        distance training ones), or a perfect sampler; "gap" is how far a variant is from the saved model (in evaluation
        mode), as a share of that one's value.

    Raises:
        RunError: no finished run there.
        DataError: data of another shape.
        ConfigError: an unknown metric or feature space, or one that does not apply to the data; no such device; a
            number that will not do.
        MissingExtraError: a metric or feature space of an extra that is not installed.

    Example:
        >>> evaluate("runs/digits")["metrics"]["psnr_db"]["value"]  # doctest: +SKIP
        18.1
    """
    run = run if isinstance(run, Run) else Run.open(run)
    metrics = [metrics] if isinstance(metrics, str) else list(metrics)
    asked = [features] if isinstance(features, str | Path | nn.Module | FeatureSpace) else features
    spaces = _spaces(metrics, asked)
    checked_seed(seed)
    lpips = lpips_distance() if "lpips" in metrics else None
    config, model = run.config(), run.model().to(pick_device(device))
    loaded, encodes = load_for(config, model, data), config.objective.encodes
    check_numbers(loaded, samples=samples, reference=reference, pairs=pairs)
    heldout = None
    if isinstance(loaded, ArrayData) and encodes != "nothing":
        heldout = look_at_heldout(model, loaded, lpips=lpips)
    found = examine(model, loaded, seed, heldout, spaces, encodes, samples, reference, pairs)
    for name in metrics:
        if name not in found.metrics:
            raise _does_not_apply(name, loaded, found.metrics)
    stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(loaded.name).stem).strip("-") or "data"
    suffix = "" if _same(loaded.name, config.data) else f"-{stem}"
    path = run.report_path.with_stem(run.report_path.stem + suffix)
    its = {
        "version": dict(versions())["introvae"],
        **_identity(run, loaded),
        "seed": seed,
        "samples": samples,
        "reference": reference,
        "pairs": pairs,
    }
    before = _earlier(path, metrics, its) if metrics else {}
    rows = run.log()
    report = Report(
        **_facts(run, config, loaded, rows),
        evaluation={**its, "device": str(model.device)},
        page=path.with_suffix(".html").name,
        metrics={**before.get("metrics", {}), **{name: found.metrics[name] for name in metrics or found.metrics}},
    )
    if found.yardstick is not None:
        variants = measure_variants(model, found.yardstick, _raw_weights(run, model), config.batch_size, seed)
        report["variants"] = _joined(before.get("variants", {}), variants, metrics)
    if found.class_shares:
        report["class_shares"] = found.class_shares
    told = class_posteriors(heldout, loaded.class_names) if heldout and isinstance(loaded, ArrayData) else []
    if told and encodes == "posterior":
        report["class_posteriors"] = told
    overview, lines = f"images/evaluation{suffix}.png", rows if not suffix else []
    try:
        report |= _draw(run, model, loaded, heldout, overview, lines, encodes, spaces[-1] if spaces else None)
        _write(run, path, report)
    except OSError as error:
        raise RunError(f"the report of {run.folder} cannot be written ({error}): give it room or rights") from error
    return report


def _write(run: Run, path: Path, report: dict[str, Any]) -> None:
    """The report and its page."""
    write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())
    settings = run.config_path.read_text(encoding="utf-8")
    environment = [*versions(), *hardware(), *_how(report["evaluation"]), ("date", date.today().isoformat())]
    nothing = {"worst": [], "intake": None, "guard": [], "variants": {}, "class_shares": {}, "class_posteriors": []}
    page = render({**nothing, **report}, run.folder, settings, environment)
    write_atomically(run.folder / report["page"], page.encode(errors="replace"))  # names may be no UTF-8


def _spaces(metrics: Sequence[str], asked: Sequence[str | Path | nn.Module | FeatureSpace]) -> list[FeatureSpace]:
    """The feature spaces asked for; raises `ConfigError` for a metric that is known in none."""
    spaces = [feature_space(source) for source in asked]
    known = list(dict.fromkeys([*METRICS, *(name for space in spaces for name in metrics_in(space.name))]))
    for name in metrics:
        if name not in known:
            raise unknown("metric", name, known)
    return spaces


def _does_not_apply(name: str, data: Data, applying: Collection[str]) -> ConfigError:
    """The error for a metric that these data have not, with the remedy for one of a classifier's that is silent."""
    text, choose = f"{name} does not apply to {data.name}", f"choose from {', '.join(applying)}"
    for space in CLASSIFIERS:
        if name in class_metrics_in(space) and f"frechet_{space}" in applying and isinstance(data, ArrayData):
            labels = data.heldout.labels
            if labels is not None and bool((labels >= 0).any()):
                return ConfigError(f"{text}, whose labels are not the {space} classes: {choose}")
            return ConfigError(
                f"{text}, whose classes are not known: label the images or, if they are of the {space} classes, give "
                f"--features {space}"
            )
    return ConfigError(f"{text}: {choose}")


def _identity(run: Run, data: Data) -> dict[str, Any]:
    """Checksums of what is measured: the model's weights and both parts of the data."""
    weights = run.checksum()
    if not isinstance(data, ArrayData):
        return {"model": weights, "train": None, "heldout": None}
    return {"model": weights, "train": _checksum(data.train), "heldout": _checksum(data.heldout)}


def _checksum(part: Part) -> list[int]:
    return part.fingerprint() if isinstance(part, StreamedPart) else fingerprint(part.x)


def _earlier(path: Path, names: Sequence[str], its: dict[str, Any]) -> dict[str, Any]:
    """An earlier report whose other numbers may stand beside new ones of those names: nothing, where they are of
    another model, data or protocol.
    """
    if not path.is_file():
        return {}
    before = json.loads(path.read_text(encoding="utf-8"))
    known = before.get("evaluation", {})
    named = {"pairs": None, **known}  # reports that do not name it have the default
    differs = [IDENTITY[name] for name, fact in its.items() if name not in named or named[name] != fact]
    if not differs:
        return before
    if dropped := before["metrics"].keys() - set(names):
        what = f"of another {' and '.join(differs)}" if known else "of a model that it does not name"
        log.warning("%s: its %d other numbers are %s and go; without --metrics all are made", path, len(dropped), what)
    return {}


def _how(evaluation: dict[str, Any]) -> list[tuple[str, str]]:
    """What the page tells of the evaluation itself."""
    facts = [("measured on", evaluation["device"]), ("seed of the draws", str(evaluation["seed"]))]
    numbers = [(f"{name} asked for", evaluation[name]) for name in ("samples", "reference", "pairs")]
    facts += [(name, f"{number:,}") for name, number in numbers if number is not None]
    return [*facts, ("model.safetensors", f"SHA-256 {evaluation['model']}")]


def _facts(run: Run, config: FitConfig, data: Data, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the report tells of the run and the data."""
    starts = run.events("start")
    facts: dict[str, Any] = {
        "run": str(run.folder),
        "data": data.name,
        "objective": type(config.objective).__name__,
        "seed": config.seed,
        "steps": config.steps,
        "training_seconds": rows[-1]["seconds"] if rows else None,
        "machine": {name: fact for name, fact in starts[-1].items() if name not in ("event", "step")} if starts else {},
    }
    if guard := run.events("guard"):
        facts["guard"] = [{name: fact for name, fact in event.items() if name != "event"} for event in guard]
    if isinstance(data, ArrayData):
        facts |= {"train": len(data.train), "heldout": len(data.heldout)}
        if data.intake is not None:
            facts["intake"] = data.intake.to_dict()
    return facts


def _same(one: str, other: str) -> bool:
    """Whether two values of `--data` are one name, or lead to one path."""
    try:
        return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()
    except (OSError, RuntimeError):  # no such home, a circle of links
        return False


def load_for(config: FitConfig, model: IntrospectiveVAE, data: str | Path | Data | None) -> Data:
    """The run's data or others, prepared as the model's were; of others all are held out, or their own test part."""
    prepared = preparation_from(model.config["data"]) if model.config else None
    if isinstance(data, str | Path) and _same(str(data), config.data):
        data = None
    loaded = load_data(config.data, config) if data is None else None
    if loaded is None or (isinstance(loaded, ArrayData) and loaded.preparation != prepared):
        options = DataOptions(**{name: getattr(config, name) for name in DATA_OPTIONS})
        if data is not None:  # a pattern or column of the run's data need not be there
            options = dataclasses.replace(options, group=None, label=None, columns=(), drop=())
        loaded = load_data(config.data if data is None else data, options, prepared)
    if isinstance(data, str | Path) and isinstance(loaded, ArrayData) and loaded.shape == model.shape:
        loaded = _all_unseen(config, loaded)
    known = model.config["data"].get("fingerprint") if model.config else None
    if data is None and known is not None and isinstance(loaded, ArrayData) and loaded.fingerprint() != known:
        raise DataError(
            f"{loaded.name} is not what the run was trained on (files were added, changed or removed), so what was "
            "held out is not known: restore it, or copy it elsewhere and give that as --data"
        )
    if isinstance(prepared, TablePreparation) and not isinstance(loaded, ArrayData):
        raise DataError(f"{loaded.name} are points and the model takes rows of a table: give a table with its columns")
    if loaded.shape != model.shape:
        raise DataError(
            f"{loaded.name} has samples of shape {loaded.shape}, the model takes {model.shape}: give data of that shape"
        )
    return loaded


def _all_unseen(config: FitConfig, data: ArrayData) -> ArrayData:
    """Other data than the run's: all of them are measured, unless they say themselves what is held out; samples are
    compared with what the run was trained on, where that is still there.
    """
    heldout = data.heldout if data.own_parts else data.whole()
    try:
        own = load_data(config.data, config)
        train = own.train if isinstance(own, ArrayData) and own.shape == data.shape else data.train[:0]
    except (ConfigError, DataError):
        train = data.train[:0]
    return dataclasses.replace(data, train=train, heldout=heldout)


@torch.no_grad()
def _draw(
    run: Run,
    model: IntrospectiveVAE,
    data: Data,
    heldout: Heldout | None,
    overview: str,
    log: list[dict[str, Any]],
    encodes: str = "posterior",
    space: FeatureSpace | None = None,
) -> dict[str, Any]:
    """The report's pictures, drawn into the run's folder; their places, and what else only they were computed for."""
    folder = run.folder
    place = Path(overview)
    drawn: dict[str, str] = {}
    more: dict[str, Any] = {}
    images = len(data.shape) == 3

    def draw(name: str, picture: Any) -> None:
        relative = place.with_stem(f"{place.stem}-{name}")
        save_picture(picture, folder / relative)
        drawn[name] = relative.as_posix()

    if preview(model, data, folder / place, encodes) is not None:
        drawn["overview"] = overview
    if images:
        draw("samples", figures.samples(model))
    if images and isinstance(data, ArrayData) and min(len(data.train), len(data.heldout)) > 0:
        picture, more["neighbours"] = neighbours(model, data, space=space)
        draw("neighbours", picture)
    if isinstance(data, ArrayData) and heldout is not None:
        more["worst"] = _draw_reconstructions(model, data, heldout, draw)
        if encodes == "posterior":
            kl = heldout.posterior.kl_per_dimension().mean(dim=0)
            more["kl_nats_per_dimension"] = [round(value, 6) for value in kl.tolist()]
            draw("latent", figures.latent_use(kl))
    if log:
        draw("curves", curves(log, images=images))
    if "overview" in drawn:
        more["picture"] = overview
    return {"pictures": drawn, **more}


def _draw_reconstructions(
    model: IntrospectiveVAE, data: ArrayData, heldout: Heldout, draw: Callable[[str, Any], None]
) -> list[dict[str, Any]]:
    """What the encoder and the decoder make of held-out samples; the worst of them by name."""
    part, errors, n = heldout.part, heldout.mse, len(heldout.part)
    order = errors.argsort().tolist()
    if len(data.shape) == 3:
        rows = _best_middle_worst(order)
        shown = part[torch.tensor(rows)].tensor()
        draw("ranked", figures.ranked(shown, heldout.reconstruct(model, rows), range(len(rows))))
        if n >= 2:
            ends = slice(2 * min(figures.PAIRS, n // 2))
            condition = None if heldout.condition is None else heldout.condition[ends]
            ways = figures.interpolations(model, part[ends].tensor(model.device), condition)
            draw("interpolation", ways.convert("RGB"))
        draw("errors", figures.error_histogram(heldout.errors["psnr_db"], "PSNR of held-out images, dB"))
    else:
        samples = model.sample(n, torch.Generator().manual_seed(0)).cpu()
        draw("columns", figures.columns_figure(data, heldout.reconstruct(model), samples))
        draw("errors", figures.error_histogram(errors, "Squared error of held-out rows, mean over columns"))
    names = part.names or [f"held-out {row}" for row in range(n)]
    return [{"name": names[row], "mse": errors[row].item()} for row in reversed(order[-WORST:])]


def _best_middle_worst(order: Sequence[int]) -> list[int]:
    """The rows that the picture of ranked reconstructions shows, as many of each kind as it has columns."""
    count = min(figures.COLUMNS, max(1, len(order) // 3))
    middle = (len(order) - count) // 2
    return [*order[:count], *order[middle : middle + count], *order[-count:]]


def _raw_weights(run: Run, model: IntrospectiveVAE) -> dict[str, torch.Tensor] | None:
    """The weights that the saved model is the average of, where the run's newest checkpoint is there and whole."""
    found = list_checkpoints(run.checkpoints)
    if not found:
        return None
    try:
        state = load_checkpoint(found[-1], model.device)
        averaged = averaged_weights(state["average"])
        raw, saved = state["players"]["model"], model.state_dict()
        check_state(averaged, saved, str(found[-1]))
        check_state(raw, saved, str(found[-1]))
    except (CheckpointError, KeyError, TypeError, AttributeError):
        return None  # without it, everything else can be measured
    return raw if all(torch.equal(averaged[name], x) for name, x in saved.items()) else None


def _joined(old: dict[str, Any], variants: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """What was found of variants, the metrics of those names or all, beside what an earlier report says of others."""
    joined: dict[str, Any] = {}
    for variant, found in variants.items():
        if isinstance(found, str):
            joined[variant] = found
            continue
        before = old.get(variant, {})
        kept = {} if isinstance(before, str) else before
        joined[variant] = {**kept, **{name: entry for name, entry in found.items() if not names or name in names}}
    return joined


def table(report: dict[str, Any], names: Sequence[str] = ()) -> str:
    """The report's numbers, all or those of the given names, as lines of text: name, value, std, floor."""
    lines = [f"{'metric':<22}{'value':>11}{'std':>11}{'floor':>11}"]
    for name in names or report["metrics"]:
        entry = report["metrics"][name]
        cells = [f"{entry[key]:>11.4g}" if key in entry else f"{'':>11}" for key in ("value", "std", "floor")]
        lines.append(f"{name:<22}{''.join(cells)}".rstrip())
    return "\n".join(lines)
