"""A run in, a report out."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from introvae.data import DATA_OPTIONS, ArrayData, Data, DataOptions, TablePreparation, load_data, preparation_from
from introvae.errors import ConfigError, DataError, RunError, checked_seed, unknown
from introvae.files import write_atomically
from introvae.machine import hardware, versions
from introvae.measures import METRICS, Heldout, look_at_heldout, measure
from introvae.metrics import reconstruction
from introvae.model import IntrospectiveVAE
from introvae.pictures import save_picture
from introvae.report import figures
from introvae.report.page import render
from introvae.training.config import FitConfig
from introvae.training.preview import preview
from introvae.training.run import Run

WORST = 10
"""How many of the worst reconstructions the report names."""


def evaluate(
    run: Run | str | Path, *, data: str | Path | Data | None = None, metrics: str | Sequence[str] = (), seed: int = 0
) -> dict[str, Any]:
    """Measure a finished run's model; write `report.json`, `report.html` and pictures into its folder.

    With other data, the files are `report-DATA.json`, `report-DATA.html` and `images/evaluation-DATA.png`.

    Arguments:
        run: the run or its folder.
        data: other data than the run was trained on, by name or path; they are prepared as those were, and all of
            them are measured, or their own test part.
        metrics: names of the ones to report; all that apply by default. The others of an earlier report stay in it.
        seed: of all draws.

    Returns:
        What stands in report.json: `{"run": folder, "data": name, "metrics": {name: {"value", "std", "n", "protocol",
        "floor"}}, "pictures": {name: file}, "intake": what became of each file, ...}`; keys that do not apply are left
        out. "floor" is what a perfect sampler, or held-out real images in the samples' place, score.

    Raises:
        RunError: no finished run there.
        DataError: data of another shape.
        ConfigError: an unknown metric, or one that does not apply to the data.

    Example:
        >>> evaluate("runs/digits")["metrics"]["psnr_db"]["value"]  # doctest: +SKIP
        18.1
    """
    run = run if isinstance(run, Run) else Run.open(run)
    metrics = [metrics] if isinstance(metrics, str) else list(metrics)
    for name in metrics:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
    checked_seed(seed)
    config, model = run.config(), run.model()
    loaded = _load(config, model, data)
    heldout = look_at_heldout(model, loaded) if isinstance(loaded, ArrayData) else None
    found = measure(model, loaded, seed, heldout)
    for name in metrics:
        if name not in found:
            raise ConfigError(f"{name} does not apply to {loaded.name}: choose from {', '.join(found)}")
    stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(loaded.name).stem).strip("-") or "data"
    suffix = "" if _same(loaded.name, config.data) else f"-{stem}"
    path = run.report_path.with_stem(run.report_path.stem + suffix)
    before = json.loads(path.read_text(encoding="utf-8"))["metrics"] if metrics and path.is_file() else {}
    rows, starts = run.log(), run.events("start")
    report: dict[str, Any] = {
        "run": str(run.folder),
        "data": loaded.name,
        "objective": type(config.objective).__name__,
        "seed": config.seed,
        "steps": config.steps,
        "training_seconds": rows[-1]["seconds"] if rows else None,
        "machine": {name: fact for name, fact in starts[-1].items() if name not in ("event", "step")} if starts else {},
        "page": path.with_suffix(".html").name,
        "metrics": {**before, **{name: found[name] for name in metrics or found}},
    }
    if guard := run.events("guard"):
        report["guard"] = [{name: fact for name, fact in event.items() if name != "event"} for event in guard]
    if isinstance(loaded, ArrayData):
        report |= {"train": len(loaded.train), "heldout": len(loaded.heldout)}
    if isinstance(loaded, ArrayData) and loaded.intake is not None:
        report["intake"] = loaded.intake.to_dict()
    try:
        report |= _draw(run, model, loaded, heldout, f"images/evaluation{suffix}.png", rows if not suffix else [])
        write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())
        settings = run.config_path.read_text(encoding="utf-8")
        environment = [*versions(), *hardware(), ("date", date.today().isoformat())]
        page = render({"worst": [], "intake": None, "guard": [], **report}, run.folder, settings, environment)
        write_atomically(run.folder / report["page"], page.encode(errors="replace"))  # names may be no UTF-8
    except OSError as error:
        raise RunError(f"the report of {run.folder} cannot be written ({error}): give it room or rights") from error
    return report


def _same(one: str, other: str) -> bool:
    """Whether two values of `--data` are one name, or lead to one path."""
    try:
        return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()
    except (OSError, RuntimeError):  # no such home, a circle of links
        return False


def _load(config: FitConfig, model: IntrospectiveVAE, data: str | Path | Data | None) -> Data:
    """The run's data or others, prepared as the model's were."""
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
    run: Run, model: IntrospectiveVAE, data: Data, heldout: Heldout | None, overview: str, log: list[dict[str, Any]]
) -> dict[str, Any]:
    """The report's pictures, drawn into the run's folder; their places, and what else only they were computed for."""
    folder = run.folder
    place = Path(overview)
    drawn: dict[str, str] = {}
    more: dict[str, Any] = {}

    def draw(name: str, picture: Any) -> None:
        relative = place.with_stem(f"{place.stem}-{name}")
        save_picture(picture, folder / relative)
        drawn[name] = relative.as_posix()

    if preview(model, data, folder / place) is not None:
        drawn["overview"] = overview
    if isinstance(data, ArrayData) and heldout is not None:
        x, y, images = heldout.x, heldout.reconstruction, len(data.shape) == 3
        errors = reconstruction.mse(x, y)
        order = errors.argsort().tolist()
        names = data.heldout.names or [f"held-out {row}" for row in range(len(x))]
        more["worst"] = [{"name": names[row], "mse": errors[row].item()} for row in reversed(order[-WORST:])]
        if images:
            draw("samples", figures.samples(model))
            draw("ranked", figures.ranked(x, y, order))
            if len(x) >= 2:
                ends = x[: 2 * min(figures.PAIRS, len(x) // 2)]
                draw("interpolation", figures.interpolations(model, ends.to(model.device)).convert("RGB"))
            draw("errors", figures.error_histogram(reconstruction.psnr_db(x, y), "PSNR of held-out images, dB"))
        else:
            draw(
                "columns", figures.columns_figure(data, y, model.sample(len(x), torch.Generator().manual_seed(0)).cpu())
            )
            draw("errors", figures.error_histogram(errors, "Squared error of held-out rows, mean over columns"))
        kl = heldout.posterior.kl_per_dimension().mean(dim=0)
        more["kl_nats_per_dimension"] = [round(value, 6) for value in kl.tolist()]
        draw("latent", figures.latent_use(kl))
    if log:
        draw("curves", figures.curves(log, images=len(data.shape) == 3))
    if "overview" in drawn:
        more["picture"] = overview
    return {"pictures": drawn, **more}


def table(report: dict[str, Any], names: Sequence[str] = ()) -> str:
    """The report's numbers, all or those of the given names, as lines of text: name, value, std, floor."""
    lines = [f"{'metric':<22}{'value':>11}{'std':>11}{'floor':>11}"]
    for name in names or report["metrics"]:
        entry = report["metrics"][name]
        cells = [f"{entry[key]:>11.4g}" if key in entry else f"{'':>11}" for key in ("value", "std", "floor")]
        lines.append(f"{name:<22}{''.join(cells)}".rstrip())
    return "\n".join(lines)
