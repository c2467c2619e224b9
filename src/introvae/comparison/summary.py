"""What came of a comparison: means, spreads and failures of every cell; as text, Markdown and JSON."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from introvae.comparison.execute import Job, reason_of
from introvae.comparison.plan import Cell, Comparison, same_settings
from introvae.data import get_density
from introvae.errors import ConfigError
from introvae.machine import hardware, versions
from introvae.training.config import FitConfig
from introvae.training.fit import MACHINES, flat
from introvae.training.run import Run

PLANE = ("kl_soft_introvae", "jsd_soft_introvae", "modes", "share_within_3_sigma")
OTHERS = (
    *("psnr_db", "mse", "frechet_mnist", "frechet_cifar10", "frechet_randconv", "frechet_thumb", "frechet_values"),
    *("precision_randconv", "recall_mnist", "recall_cifar10", "recall_randconv", "recall_pixels"),
    *("confident_share_mnist", "confident_share"),
    *("adversary_awake", "gap_training_mode"),
)
TITLES = {
    "kl_soft_introvae": "KL",
    "jsd_soft_introvae": "JSD",
    "modes": "modes",
    "share_within_3_sigma": "within 3 sigma",
    "psnr_db": "PSNR, dB",
    "mse": "MSE",
    "frechet_mnist": "Fréchet (mnist)",
    "frechet_cifar10": "Fréchet (cifar10)",
    "frechet_randconv": "Fréchet (randconv)",
    "frechet_thumb": "Fréchet (thumb)",
    "frechet_values": "Fréchet (values)",
    "precision_randconv": "precision (randconv)",
    "recall_mnist": "recall (mnist)",
    "recall_cifar10": "recall (cifar10)",
    "recall_randconv": "recall (randconv)",
    "recall_pixels": "recall (pixels)",
    "confident_share_mnist": "sure (mnist)",
    "confident_share": "sure (pixels)",
    "adversary_awake": "KL(fake) ≥ KL(real)",
    "gap_training_mode": "training mode differs by",
}
"""Columns of the tables; all other metrics are in the JSON."""


def run_result(run: Run, config: FitConfig, seed: int) -> dict[str, Any]:
    """What is kept of one finished run: seed, seconds, metrics, what the guard did.

    Two metrics are not in its report: `adversary_awake`, the share of the log's lines of the last half of the steps in
    which the mean KL of both fakes is at least that of real data; and `gap_training_mode`, how far the metric that
    differs most between training mode and evaluation mode does, as a share of its value.
    """
    report = run.report()
    guard = run.events("guard")
    found: dict[str, Any] = {
        "seed": seed,
        "status": "done",
        "seconds": report["training_seconds"],
        "threads": report["machine"].get("threads"),
        "device": report["machine"].get("device"),
        "machine": dict(hardware()).get("processor"),
        "date": date.fromtimestamp(run.report_path.stat().st_mtime).isoformat(),
        "version": dict(versions())["introvae"],
        "metrics": {name: entry["value"] for name, entry in report["metrics"].items()},
        "floors": {name: entry["floor"] for name, entry in report["metrics"].items() if "floor" in entry},
        "protocols": {name: entry["protocol"] for name, entry in report["metrics"].items()},
    }
    rows = run.log()
    if (awake := _awake(rows)) is not None and config.objective.adversarial:
        found["metrics"]["adversary_awake"] = awake
    gaps = [abs(entry["gap"]) for entry in _training_mode(report).values() if "gap" in entry]
    if gaps:
        found["metrics"]["gap_training_mode"] = max(gaps)
    if rows:
        names = ("rec", "kl_real", "kl_reconstruction", "kl_sample", "beta_neg", "margin")
        names += ("wasserstein", "gradient_penalty", "divergence_real", "divergence_sample")
        found["last"] = {name: rows[-1][name] for name in names if name in rows[-1]}
    noted = [row for row in rows if "gradient_adversarial" in row]
    if noted:
        kept = ("step", "gradient_adversarial", "gradient_reconstruction")
        found["gradients"] = [{name: row[name] for name in kept} for row in noted]
    if guard:
        kept = ("step", "cause", "change", "attempt")
        found["guard"] = [{key: event[key] for key in kept if key in event} for event in guard]
    if config.data.startswith("density:") and "modes" in found["metrics"]:
        modes = get_density(config.data.removeprefix("density:")).modes
        found["lost_modes"] = modes is not None and found["metrics"]["modes"] < len(modes)
    return found


def _awake(rows: Sequence[Mapping[str, Any]]) -> float | None:
    late = [row for row in rows if 2 * row["step"] > rows[-1]["step"] and row["phase"] == "train"]
    fakes = [row for row in late if {"kl_real", "kl_reconstruction", "kl_sample"} <= row.keys()]
    if not fakes:
        return None
    return statistics.fmean((row["kl_reconstruction"] + row["kl_sample"]) / 2 >= row["kl_real"] for row in fakes)


def _training_mode(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the report says of the model in training mode; nothing where it has only a reason why not."""
    found = report.get("variants", {}).get("training mode", {})
    return found if isinstance(found, Mapping) else {}


def settings_of(config: FitConfig, data: str) -> dict[str, Any]:
    """The settings that decide a run's result, without the seed and how it was computed; with this name of the data."""
    settings = {**config.to_dict(), "data": data}
    return {name: value for name, value in settings.items() if name not in (*MACHINES, "seed")}


def collect(
    plan: Comparison,
    found_jobs: Sequence[Job],
    costs: Mapping[Job, float] | None = None,
    known: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The whole comparison as plain values.

    Arguments:
        plan: its sections.
        found_jobs: its runs, finished or not.
        costs: estimated seconds of those that are not finished.
        known: an earlier result, whose runs stand in for those that are missing here where the settings are the same.
    """
    before = _known_runs(known)
    sections = []
    for section in plan.sections:
        cells = []
        for cell in section.cells:
            its = [job for job in found_jobs if job.cell == cell]
            cells.append(_cell(cell, its, costs or {}, before))
        told = {"key": section.key, "title": section.title, "note": section.note, "order": list(section.order)}
        sections.append({**told, "cells": cells})
    return {
        "title": plan.title,
        "date": date.today().isoformat(),
        "machine": dict(hardware()),
        "versions": dict(versions()),
        "sections": sections,
    }


def _known_runs(known: Mapping[str, Any] | None) -> dict[tuple[str, int], tuple[dict[str, Any], dict[str, Any]]]:
    """Finished runs of an earlier result by (data and label) and seed, with their cell."""
    if known is None:
        return {}
    try:
        return {
            (f"{section['key']}|{cell['data']}|{cell['label']}", run["seed"]): (cell, run)
            for section in known["sections"]
            for cell in section["cells"]
            for run in cell["runs"]
            if run["status"] in ("done", "failed")
        }
    except (KeyError, TypeError) as error:
        raise ConfigError(f"the known results lack {error}: give a comparison.json") from error


def known_result(job: Job, known: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The earlier result of a job with the same settings, or None."""
    found = _known_runs(known).get((f"{job.cell.section}|{job.cell.data}|{job.cell.label}", job.seed))
    if found is None or not same_settings(found[0]["settings"], settings_of(job.config, job.cell.data)):
        return None
    return found[1]


def _cell(
    cell: Cell, its: Sequence[Job], costs: Mapping[Job, float], known: Mapping[tuple[str, int], Any]
) -> dict[str, Any]:
    settings = settings_of(its[0].config, cell.data)
    runs = []
    for job in its:
        earlier = known.get((f"{cell.section}|{cell.data}|{cell.label}", job.seed))
        if job.status == "done":
            runs.append(run_result(Run(job.folder), job.config, job.seed))
        elif job.status == "failed":
            runs.append({"seed": job.seed, "status": "failed", "reason": reason_of(job.folder)})
        elif earlier is not None and same_settings(earlier[0]["settings"], settings):
            runs.append(earlier[1])
        else:
            crash = {"crashed": reason} if (reason := reason_of(job.folder)) else {}
            runs.append({"seed": job.seed, "status": "not run", "cost_seconds": round(costs.get(job, 0.0)), **crash})
    done = [run for run in runs if run["status"] == "done"]
    return {
        "data": cell.data,
        "label": cell.label,
        "command": shlex.join(["introvae", "fit", *cell.words]),
        "settings": settings,
        "runs": runs,
        "done": len(done),
        "failed": sum(run["status"] == "failed" for run in runs),
        "changed": sum(any(event.get("attempt") for event in run.get("guard", ())) for run in runs),
        "lost_modes": sum(bool(run.get("lost_modes")) for run in done),
        "not_run": sum(run["status"] == "not run" for run in runs),
        "cost_seconds": sum(run.get("cost_seconds", 0) for run in runs),
        "seconds": _spread([run["seconds"] for run in done if run["seconds"] is not None]),
        "metrics": {
            name: _spread([run["metrics"][name] for run in done if name in run["metrics"]])
            for name in (done[0]["metrics"] if done else ())
        },
        "floors": {
            name: statistics.fmean(run["floors"][name] for run in done if name in run["floors"])
            for name in (done[0]["floors"] if done else ())
        },
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation (of a sample; left out for a single value)."""
    if not values:
        return {}
    found = {"mean": statistics.fmean(values), "n": len(values)}
    if len(values) == 1:
        return found
    finite = all(math.isfinite(value) for value in values)
    return {**found, "std": statistics.stdev(values) if finite else math.nan}


def columns_of(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics that a table of these cells shows."""
    present = {name for cell in cells for name in cell["metrics"]}
    wanted = PLANE if present & set(PLANE) else OTHERS
    return [name for name in wanted if name in present]


def tables(result: Mapping[str, Any]) -> list[tuple[str, str, list[list[str]]]]:
    """Every section's tables: title, notes and rows of text; the first row has the names of the columns."""
    found = []
    for section in result["sections"]:
        for name in dict.fromkeys(cell["data"] for cell in section["cells"]):
            cells = [cell for cell in section["cells"] if cell["data"] == name]
            columns = columns_of(cells)
            rows = [["", "runs", *(TITLES[c] for c in columns), "failed", "lost modes", "guard", "seconds"]]
            rows += [_row(cell, columns) for cell in cells]
            floors = {c: [cell["floors"][c] for cell in cells if c in cell["floors"]] for c in columns}
            if any(floors.values()):
                shown = [f"{statistics.fmean(values):.3g}" if values else "" for values in floors.values()]
                rows.append(["floor", "", *shown, "", "", "", ""])
            title = section["title"] if section["title"] == name else f"{section['title']}: {name}"
            notes = [section["note"], verdict(cells, section.get("order", ()))]
            found.append((title, " ".join(note for note in notes if note), rows))
    return found


def _row(cell: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    total = len(cell["runs"])
    if cell["not_run"] == total:
        cost = f"not run, about {cell['cost_seconds'] / 60:.0f} min" if cell["cost_seconds"] else "not run"
        return [cell["label"], cost, *([""] * (len(columns) + 4))]
    with_modes = any("lost_modes" in run for run in cell["runs"])
    runs = f"{cell['done']}" if not cell["not_run"] else f"{cell['done']} of {total}"
    ran = total - cell["not_run"]
    shown = [_number(cell["metrics"].get(name, {})) for name in columns]
    seconds = f"{cell['seconds']['mean']:.0f}" if cell["seconds"] else ""
    lost = f"{cell['lost_modes']} of {cell['done']}" if with_modes else ""
    return [cell["label"], runs, *shown, f"{cell['failed']} of {ran}", lost, f"{cell['changed']} of {ran}", seconds]


def _number(spread: Mapping[str, float]) -> str:
    if not spread:
        return ""
    if "std" not in spread:
        return f"{spread['mean']:.3g}"
    return f"{spread['mean']:.3g} ± {spread['std']:.2g}"


def verdict(cells: Sequence[Mapping[str, Any]], order: Sequence[str]) -> str:
    """Whether the published order of the Fréchet distances is that of the means here; empty where nothing was published
    or fewer than two of its rows were run.

    Arguments:
        cells: of one data set.
        order: labels, the one with the smallest published distance first.
    """
    name = next((name for name in columns_of(cells) if name.startswith("frechet_")), None)
    found = {cell["label"]: cell["metrics"].get(name, {}) for cell in cells}
    ran = [label for label in order if found.get(label)]
    if name is None or len(ran) < 2:
        return ""
    here = sorted(ran, key=lambda label: found[label]["mean"])
    numbers = ", ".join(f"{label} {_number(found[label])}" for label in here)
    holds = "holds" if here == ran else "does not hold"
    return f"The published order of {TITLES[name]}, {', '.join(ran)}, {holds}: {numbers}."


def to_text(result: Mapping[str, Any]) -> str:
    """The tables for a terminal."""
    blocks = []
    for title, note, rows in tables(result):
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        blocks.append("\n".join([title, *([note] if note else []), *lines]))
    return "\n\n".join(blocks)


def to_markdown(result: Mapping[str, Any], pictures: Sequence[str] = ()) -> str:
    """The tables, failures and pictures as Markdown."""
    machine = ", ".join(str(value) for value in list(result["machine"].values())[:2]).partition(", torch uses")[0]
    threads = {run.get("threads") for s in result["sections"] for cell in s["cells"] for run in cell["runs"]} - {None}
    if threads:
        machine += f", {' or '.join(map(str, sorted(threads)))} thread{'s' * (threads != {1})} a run"
    lines = [f"# {result['title']}", "", f"{result['date']}; {machine}. Mean ± standard deviation over seeds.", ""]
    for title, note, rows in tables(result):
        lines += [f"## {title}", ""]
        if note:
            lines += [note, ""]
        head, *body = rows
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(row) + " |" for row in body]
        lines.append("")
    lines += [
        'Metrics are those of "introvae evaluate" (docs/metrics.md). "floor": what real data, or a perfect sampler, '
        'score; "failed": runs that ended without a model; "lost modes": runs that found fewer than there are; '
        '"guard": runs in which the guard changed a setting; "seconds": of training, often beside another run.',
        "",
    ]
    failed = [
        f"- {cell['label']} on {cell['data']}, seed {run['seed']}: {run.get('reason') or run['crashed']}"
        for section in result["sections"]
        for cell in section["cells"]
        for run in cell["runs"]
        if run["status"] == "failed" or "crashed" in run
    ]
    if failed:
        lines += ["## Runs that failed", "", *failed, ""]
    changes = [
        f"- {section['title']}, {cell['label']} on {cell['data']}, seed {run['seed']}, step {event['step']:,}: "
        f"{event['cause']}; {event['change'] or 'the run ended'}"
        for section in result["sections"]
        for cell in section["cells"]
        for run in cell["runs"]
        for event in run.get("guard", ())
    ]
    if changes:
        lines += ["## What the guard recognised", "", *changes, ""]
    lines += [f"![{Path(name).stem}]({name})\n" for name in pictures]
    return "\n".join(lines)


def labels_of(configs: Sequence[FitConfig]) -> list[str]:
    """A label for each run: its objective, and the settings in which it differs from others of that objective; when
    pictures were drawn is of no account.
    """
    flats = [flat(settings_of(config, config.data)) for config in configs]
    for settings in flats:
        settings.pop("image_every", None)
    labels = []
    for config, mine in zip(configs, flats, strict=True):
        name = type(config.objective).__name__
        peers = [
            other
            for other, its in zip(flats, configs, strict=True)
            if type(its.objective).__name__ == name and its.data == config.data
        ]
        differing = [key for key in mine if any(other.get(key) != mine[key] for other in peers)]
        labels.append(", ".join([name, *(f"{key.rpartition('.')[2]} {mine[key]}" for key in differing)]))
    return labels
