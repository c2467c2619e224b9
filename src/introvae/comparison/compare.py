"""A comparison in, tables and pictures out."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from introvae.comparison import figures
from introvae.comparison.execute import Job, default_workers, estimate, jobs, run_all, within
from introvae.comparison.plan import Cell, Comparison, Section, from_file, from_words, slug
from introvae.comparison.summary import collect, known_result, labels_of, to_markdown, to_text
from introvae.errors import ConfigError, RunError, positive, whole
from introvae.evaluation import evaluate
from introvae.files import write_atomically
from introvae.pictures import save_picture
from introvae.training.devices import pick_device
from introvae.training.run import Run

log = logging.getLogger("introvae")

RESULT, TABLE, LOCK = "comparison.json", "comparison.md", ".running"


def compare(
    objectives: Sequence[str] = (),
    data: Sequence[str] | None = None,
    *,
    recipe: str | None = None,
    runs: Sequence[str | Path] = (),
    seeds: int | None = None,
    settings: Sequence[str] = (),
    out: str | Path = "runs/comparison",
    workers: int | None = None,
    hours: float | None = None,
    known: str | Path | None = None,
    local: str | Path | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train objectives on data with several seeds, or take finished runs, and lay the results side by side.

    What is finished in `out` is not run again, what was interrupted goes on, what failed is told and stays failed until
    its folder is removed. Runs on images draw enough pictures to be shown at three moments, unless the row, its recipe
    or `settings` give `image_every`.

    Arguments:
        objectives: names, each with its recommended recipe for the data.
        data: as `--data` takes them; by default digits.
        recipe: the name of a comparison that comes with the package, or a YAML file of one, instead of these two.
        runs: folders of finished runs instead; those without a report are measured.
        seeds: how many runs of each, by default 3: seeds 0, 1, 2 ...
        settings: further words of `introvae fit`, for all runs.
        out: folder for the runs, `comparison.json`, `comparison.md` and pictures.
        workers: runs at a time; by default one for each GPU or processor core.
        hours: start only the first runs that fit into so many; the others' estimated cost is told.
        known: an earlier comparison.json, whose runs with equal settings are taken over.
        local: a folder that holds a recipe's data sets under their short names, to be taken from there.
        dry_run: only say what would be run, and for how long.

    Returns:
        What stands in comparison.json.

    Raises:
        ConfigError: a setting is wrong.
        RunError: a given folder holds no finished run, or `out` cannot be written.
        InterruptedRunError: Ctrl-C or a termination signal; the runs' states are saved.

    Example:
        >>> compare(["VAE", "SoftIntroVAE"], ["density:rings"], seeds=5)  # doctest: +SKIP
    """
    folder = Path(out)
    if runs:
        if objectives or recipe or settings or data or seeds or known or hours or local or dry_run:
            raise ConfigError("finished runs are compared as they are: give either RUNS (and --out) or what to train")
        return _write(folder, *_of_runs([Path(run) for run in runs]))
    if recipe is not None and (objectives or settings or data is not None or seeds is not None):
        raise ConfigError("a comparison's file says what is run: give either --recipe or objectives, data and settings")
    if local is not None and recipe is None:
        raise ConfigError("--local is where a recipe's data sets are: name your own by --data")
    count = 3 if seeds is None else seeds
    whole(seeds=count)
    positive(seeds=count)
    if workers is not None:
        whole(workers=workers)
        positive(workers=workers)
    if hours is not None:
        positive(hours=hours)
    plan = (
        from_file(recipe, local)
        if recipe is not None
        else from_words(objectives, ["digits"] if data is None else data, count, settings)
    )
    before = _read(known)
    every = jobs(plan, folder)
    todo = [job for job in every if job.status in ("new", "begun") and known_result(job, before) is None]
    count = min(workers or default_workers(), max(1, len(todo)))
    threads = max(1, default_workers() // count) if pick_device("auto").type == "cpu" else 4
    costs = estimate(todo, threads)
    chosen = within(costs, hours, count)
    _say(every, todo, chosen, costs, count, threads)
    if dry_run:
        return collect(plan, every, costs, before)

    def keep() -> None:
        write_atomically(folder / RESULT, _dumped(collect(plan, every, costs, before)))

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder) as lock:
            keep()
            run_all(chosen, count, threads, keep, lock)
    except OSError as error:
        raise RunError(f"{folder} cannot be written ({error}): give it room or rights, or choose --out") from error
    return _write(folder, plan, every, collect(plan, every, costs, before))


@contextmanager
def _alone(folder: Path) -> Iterator[tuple[int, ...]]:
    """Hold a lock on the folder; the file is for the runs' processes to hold open too, should this one be killed.

    Raises:
        RunError: another comparison is running there.
    """
    try:
        import fcntl
    except ImportError:  # a system without such locks
        yield ()
        return
    with open(folder / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"{folder} is in use by another comparison: wait for it, or choose another --out") from error
        yield (file.fileno(),)


def _say(
    every: Sequence[Job],
    todo: Sequence[Job],
    chosen: Sequence[Job],
    costs: Mapping[Job, float],
    workers: int,
    threads: int,
) -> None:
    total = sum(costs[job] for job in chosen) / workers
    log.info(
        "%d runs: %d are there, %d to do now, about %s, %d at a time with %d threads each",
        len(every),
        len(every) - len(todo),
        len(chosen),
        _duration(total),
        workers,
        threads,
    )
    for section in dict.fromkeys(job.cell.section for job in todo):
        its = [job for job in costs if job.cell.section == section]
        now = [job for job in chosen if job.cell.section == section]
        cost = _duration(sum(costs[job] for job in its) / workers)
        log.info("  %-24s %3d runs, %3d now, about %s", section, len(its), len(now), cost)


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min"


def _read(known: str | Path | None) -> dict[str, Any] | None:
    if known is None:
        return None
    try:
        return json.loads(Path(known).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{known} cannot be read ({error}): give a comparison.json") from error


def _dumped(result: Mapping[str, Any]) -> bytes:
    return (json.dumps(result, indent=1) + "\n").encode()


def _of_runs(folders: Sequence[Path]) -> tuple[Comparison, list[Job], dict[str, Any]]:
    """Finished runs as a comparison: runs that differ in nothing but their seed make one row."""
    found = [Run.open(folder) for folder in folders]
    configs = [run.config() for run in found]
    for run in found:
        run.model()  # a run that is not finished says so
        if not run.report_path.is_file():
            log.info("measuring %s", run.folder)
            evaluate(run)
    labels = labels_of(configs)
    rows: dict[tuple[str, str], list[int]] = {}
    for index, (config, label) in enumerate(zip(configs, labels, strict=True)):
        rows.setdefault((config.data, label), []).append(index)
    cells, its = [], []
    for (data, label), indices in sorted(rows.items()):
        seeds = tuple(configs[i].seed for i in indices)
        cell = Cell("runs", data, label, ("--recipe", str(found[indices[0]].config_path)), seeds)
        cells.append(cell)
        its += [Job(cell, configs[i].seed, folders[i], configs[i]) for i in indices]
    plan = Comparison("Comparison of runs", (Section("runs", "Runs", tuple(cells)),))
    return plan, its, collect(plan, its)


def _write(folder: Path, plan: Comparison, every: Sequence[Job], result: dict[str, Any]) -> dict[str, Any]:
    """Tables and pictures into the folder, and the table to the terminal."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pictures = _draw(folder, plan, every)
        result = {**result, "pictures": pictures}
        write_atomically(folder / RESULT, _dumped(result))
        write_atomically(folder / TABLE, to_markdown(result, pictures).encode())
    except OSError as error:
        raise RunError(f"{folder} cannot be written ({error}): give it room or rights, or choose --out") from error
    log.info("%s", to_text(result))
    return result


def _draw(folder: Path, plan: Comparison, every: Sequence[Job]) -> list[str]:
    drawn = []
    for section in plan.sections:
        for data in dict.fromkeys(cell.data for cell in section.cells):
            done: dict[str, list[Job]] = {}
            for job in every:
                if job.cell in section.cells and job.cell.data == data and job.status == "done":
                    done.setdefault(job.cell.label, []).append(job)
            if not done:
                continue
            order = [cell.label for cell in section.cells if cell.label in done and cell.data == data]
            models = {label: Run(done[label][0].folder).model() for label in order}
            logs = {label: [Run(job.folder).log() for job in done[label]] for label in order}
            critics = [label for label in order if done[label][0].config.objective.encodes == "nothing"]
            pictures = {label: Run(done[label][0].folder).pictures() for label in order}
            games = [logs[label][0] for label in order if done[label][0].config.objective.adversarial]
            firsts = [row["step"] for rows in games for row in rows if row["phase"] == "warmup"]
            made = {
                "samples": figures.samples(models, data, critics),
                "stability": figures.stability(logs),
                "gradients": figures.gradients(logs),
                "moments": None if data.startswith("density:") else figures.moments(pictures, max(firsts, default=0)),
            }
            for name, figure in made.items():
                if figure is not None:
                    stem = "-".join(dict.fromkeys([slug(section.key), slug(Path(data).stem), name]))
                    drawn.append(save_picture(figure, folder / f"{stem}.png").name)
    return drawn
