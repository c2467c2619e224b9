"""Runs the cells of a comparison in processes of their own: any of them may fail, all can be gone on with."""

from __future__ import annotations

import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from introvae.comparison.plan import Cell, Comparison, same_settings
from introvae.data import Data
from introvae.errors import ConfigError, DataError, InterruptedRunError
from introvae.files import write_atomically
from introvae.training.checkpoint import list_checkpoints
from introvae.training.config import FitConfig
from introvae.training.devices import pick_device
from introvae.training.fit import MACHINES
from introvae.training.loop import Trainer
from introvae.training.resolve import resolve
from introvae.training.run import Run
from introvae.training.signals import stop_on_signal

log = logging.getLogger("introvae")

FAILURE, CRASH, ASKED = "failure.txt", "crash.txt", "asked.yaml"
"""In a run folder: why the run ended without a result (it is not tried again until the folder is removed); how its
process died (it is); and the settings that were asked for, before the data filled in the rest."""
WARM, TIMED = 3, 12
"""Steps before and in the measurement of a step's time."""
EVALUATION_SECONDS, IMAGES_SECONDS = 12.0, 50.0
"""What starting a process and measuring a model take besides the steps: for points in the plane, and for images (MNIST,
one thread).
"""
PICTURES, MOST_PICTURES = 5, 50
"""So many pictures of the game, so that `figures.moments` finds some near the moments that it means; fewer where the
game is so short that the whole run would have more than about the second number.
"""


@dataclass(eq=False)
class Job:
    """One run of a comparison.

    Arguments:
        cell: its row on its data.
        seed: of this run.
        folder: of this run.
        config: the settings that were asked for.
        image_every: steps between two pictures that `estimate` chose; None: those of `config`. It decides nothing
            but the pictures, so a run that was made without it is still this one.
    """

    cell: Cell
    seed: int
    folder: Path
    config: FitConfig
    image_every: int | None = field(default=None, init=False)

    @property
    def status(self) -> str:
        """done, failed, begun or new."""
        run = Run(self.folder)
        if run.report_path.is_file():
            return "done"
        if (self.folder / FAILURE).is_file():
            return "failed"
        return "begun" if list_checkpoints(run.checkpoints) else "new"

    def check(self) -> None:
        """Raise `ConfigError` where the folder holds a run that was begun with other settings."""
        try:
            asked = yaml.safe_load((self.folder / ASKED).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            asked = None
        if self.status != "new" and not (isinstance(asked, dict) and same_settings(asked, self._asked())):
            raise ConfigError(f"{self.folder} holds a run with other settings: choose another --out, or remove it")

    def _asked(self) -> dict[str, Any]:
        """The settings that decide the result."""
        return {name: value for name, value in self.config.to_dict().items() if name not in MACHINES}

    def prepare(self) -> None:
        """Make the folder ready: what a run left that was ended before its first checkpoint is of no use."""
        if self.status == "new":
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            write_atomically(self.folder / ASKED, yaml.safe_dump(self._asked(), sort_keys=False).encode())
        (self.folder / CRASH).unlink(missing_ok=True)

    def command(self) -> list[str]:
        """The words after the interpreter that bring the job to its end."""
        introvae = ["-m", "introvae"]
        if (self.folder / "model" / "config.json").is_file():
            return [*introvae, "evaluate", str(self.folder)]
        if self.status == "begun":
            return [*introvae, "fit", "--resume", str(self.folder), "--evaluate", "--quiet"]
        words = self.cell.command(self.seed)
        words += [] if self.image_every is None else ["--image_every", str(self.image_every)]
        return [*introvae, "fit", *words, "--out", str(self.folder), "--evaluate", "--quiet"]


def jobs(plan: Comparison, out: Path) -> list[Job]:
    """All runs of a comparison, in the order in which they are to be made: every section's first seeds first.

    Raises:
        ConfigError: a setting is wrong, or a folder holds another run.
    """
    found = []
    for section in plan.sections:
        for index in range(max((len(cell.seeds) for cell in section.cells), default=0)):
            for cell in section.cells:
                if index < len(cell.seeds):
                    seed = cell.seeds[index]
                    found.append(Job(cell, seed, cell.folder(out, seed), cell.config(seed)))
                    found[-1].check()
    return found


def default_workers() -> int:
    """Processes at a time: one for each GPU, or one for each processor core."""
    kind = pick_device("auto").type
    if kind == "cuda":
        return torch.cuda.device_count()
    if kind != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def estimate(todo: Sequence[Job], threads: int) -> dict[Job, float]:
    """Seconds that each job will take alone in its process, from a few steps of every different kind. Jobs whose data
    are not there are told and left out. Now that their length is known, those on images get their `image_every`.

    Raises:
        IntrovaeError: a job's settings will not do, or no job's data are there.
    """
    known: dict[str, tuple[float, float, Data] | DataError] = {}
    found = {}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for job in todo:
            config = job.config
            if (key := _kind(config)) not in known:
                try:
                    trainer = Trainer(config)
                except DataError as error:
                    log.warning("left out: %s on %s: %s", job.cell.label, job.cell.data, error)
                    known[key] = error
                else:
                    known[key] = (*_step_seconds(trainer), trainer.data)
            kind = known[key]
            if isinstance(kind, DataError):
                continue
            warm, full, data = kind
            config = resolve(config, data)
            steps = config.steps or 0
            warming = config.warmup.steps if config.objective.adversarial else 0
            share = 1 - _share_done(job, steps)
            rest = IMAGES_SECONDS if len(data.shape) == 3 else EVALUATION_SECONDS
            found[job] = rest + share * (warming * warm + (steps - warming) * full)
            if len(data.shape) == 3 and not job.cell.gives_image_every:
                job.image_every = picture_every(steps, warming)
    finally:
        torch.set_num_threads(before)
    if not found:
        for kind in known.values():
            if isinstance(kind, DataError):
                raise kind
    return found


def picture_every(steps: int, warmup: int) -> int:
    """Steps between two pictures of a run of so many steps, of which so many are its warm-up (0: there is no game), so
    that `figures.moments` has three to show; never more than the default.

    Example:
        >>> picture_every(1500, 500), picture_every(20_000, 4000), picture_every(1500, 1490), picture_every(3, 0)
        (200, 1000, 30, 1)
    """
    apart = max((steps - warmup) // PICTURES, steps // MOST_PICTURES, 1)
    return min(apart, FitConfig.image_every)


def _kind(config: FitConfig) -> str:
    """Settings of which the time of a step depends, as text: all but its length, rates, weights and pictures."""
    free = {"steps", "epochs", "seed", "warmup", "ema", "guard", "gradient_every", "objective"}
    free |= {"lr", "lr_schedule", "lr_milestones", "lr_warmup", "log_every", "image_every", "checkpoint_every"}
    kind = {name: value for name, value in config.to_dict().items() if name not in free}
    settings = config.to_dict()["objective"]["init_args"]
    fixed = {name: value for name, value in settings.items() if name not in config.objective.tunable}
    return str((kind, type(config.objective).__name__, fixed))


def _share_done(job: Job, steps: int) -> float:
    checkpoints = list_checkpoints(Run(job.folder).checkpoints)
    return int(checkpoints[-1].stem.removeprefix("step_")) / steps if checkpoints and steps else 0.0


def _step_seconds(trainer: Trainer) -> tuple[float, float]:
    """Of a warm-up step and of a step after it; the shortest of three looks, since others use the machine too."""
    adversarial = trainer.config.objective.adversarial

    def look(first: int) -> float:
        times = []
        for repeat in range(4):
            trainer.step_index = first
            started = time.perf_counter()
            for _ in range(WARM if repeat == 0 else TIMED // 3):
                trainer._one_step()
            if trainer.device.type == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - started) / (WARM if repeat == 0 else TIMED // 3))
        return min(times[1:])

    warmup = trainer.config.warmup.steps
    full = look(warmup if adversarial else 0)
    return (look(0) if adversarial and warmup > WARM + TIMED else full), full


def within(times: Mapping[Job, float], hours: float | None, workers: int) -> list[Job]:
    """The first jobs that together fit into so many hours; all where there is no such bound."""
    left = math.inf if hours is None else hours * 3600 * workers
    chosen = []
    for job, seconds in times.items():
        left -= seconds
        if left < 0:
            break
        chosen.append(job)
    return chosen


def run_all(
    todo: Sequence[Job], workers: int, threads: int, after: Callable[[], None], held_open: tuple[int, ...] = ()
) -> None:
    """Run the jobs, `workers` at a time, each with `threads` threads; `after` is called whenever one has ended.

    `held_open` are file descriptors that the processes keep open as long as they live.

    Raises:
        InterruptedRunError: Ctrl-C or a termination signal; the runs' states are saved.
    """
    waiting, running = list(todo), dict[subprocess.Popen[bytes], Job]()
    said = dict[subprocess.Popen[bytes], IO[bytes]]()  # files, since a full pipe would hold a run
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    places = _places(workers)
    held = dict[subprocess.Popen[bytes], str]()
    with ExitStack() as files, stop_on_signal() as stop, _ended_with_us(running):
        while waiting or running:
            if stop.is_set():
                raise InterruptedRunError(
                    f"interrupted, {len(running)} runs saved their state: give the same command again to go on"
                )
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                job.prepare()
                words = [sys.executable, *job.command()]
                errors = files.enter_context(tempfile.TemporaryFile())
                # In a session of its own: a terminal's Ctrl-C reaches this process only, which tells the runs once.
                process = subprocess.Popen(
                    words,
                    env={**environment, **({"CUDA_VISIBLE_DEVICES": place} if (place := places.pop(0)) else {})},
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    start_new_session=True,
                    pass_fds=held_open,
                )
                held[process] = place
                running[process], said[process] = job, errors
            time.sleep(0.2)
            for process in [process for process in running if process.poll() is not None]:
                job = running.pop(process)
                places.append(held.pop(process))
                with said.pop(process) as errors:
                    errors.seek(0)
                    lines = errors.read().decode(errors="replace").strip().splitlines()
                reason = lines[-1].removeprefix("introvae: ") if lines else f"exit code {process.returncode}"
                _note(job, process.returncode, reason, len(waiting) + len(running))
                after()


def _places(workers: int) -> list[str]:
    """The GPU of each worker, as CUDA_VISIBLE_DEVICES; nothing where there is none."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return [""] * workers
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = given.split(",") if given else [str(index) for index in range(count)]
    return [names[worker % len(names)] for worker in range(workers)]


def _note(job: Job, code: int, reason: str, left: int) -> None:
    name = f"{job.cell.section}: {job.cell.label} on {job.cell.data}, seed {job.seed}"
    if code == 0:
        log.info("done     %s (%d left)", name, left)
        return
    log.info("FAILED   %s: %s (%d left)", name, reason, left)
    job.folder.mkdir(parents=True, exist_ok=True)
    # What the package itself says (but that it was stopped) it will say again; another death may be the machine's.
    told = code == 2 and "--resume" not in reason
    write_atomically(job.folder / (FAILURE if told else CRASH), (reason + "\n").encode())


@contextmanager
def _ended_with_us(running: Mapping[subprocess.Popen[bytes], Job]) -> Iterator[None]:
    """Whatever ends this loop early ends the runs too; they are told, and save their state."""
    try:
        yield
    except BaseException:
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
        raise


def reason_of(folder: Path) -> str:
    """Why a run failed or crashed; nothing where it did not."""
    for name in (FAILURE, CRASH):
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8").strip()
    return ""
