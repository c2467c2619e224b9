"""A run is a folder that tells everything."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from introvae.errors import ConfigError, RunError
from introvae.files import write_atomically
from introvae.model import IntrospectiveVAE, check_state
from introvae.training.checkpoint import list_checkpoints, load_checkpoint
from introvae.training.config import FitConfig, load_config
from introvae.training.ema import averaged_weights
from introvae.training.growing import Schedule

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Report(dict[str, Any]):
    """What `evaluate` measured, as it stands in report.json; a notebook shows the metrics as a table.

    Example:
        >>> Report(metrics={"psnr_db": {"value": 18.1}})["metrics"]["psnr_db"]["value"]
        18.1
    """

    def _repr_html_(self) -> str:
        from introvae.training.notebook import html_of_report

        return html_of_report(self)


@dataclass(frozen=True)
class Run:
    """`config.yaml`, `log.jsonl`, `images/`, `checkpoints/`, `model/`, `report.json` and `report.html` of one training.

    Arguments:
        folder: where they are.

    Example:
        >>> Run(Path("runs/a")).model_folder.as_posix()
        'runs/a/model'
    """

    folder: Path

    @property
    def config_path(self) -> Path:
        """The settings, as `introvae fit --recipe` takes them too."""
        return self.folder / "config.yaml"

    @property
    def log_path(self) -> Path:
        """One JSON object a line."""
        return self.folder / "log.jsonl"

    @property
    def images(self) -> Path:
        """Pictures made during training and evaluation."""
        return self.folder / "images"

    @property
    def checkpoints(self) -> Path:
        """Resumable state."""
        return self.folder / "checkpoints"

    @property
    def model_folder(self) -> Path:
        """The averaged weights, for `IntrospectiveVAE.from_pretrained`."""
        return self.folder / "model"

    @property
    def report_path(self) -> Path:
        """What `evaluate` measured."""
        return self.folder / "report.json"

    @classmethod
    def create(cls, folder: Path, config: FitConfig) -> Run:
        """Start a new run folder.

        Raises:
            RunError: the folder holds a run already, or cannot be made.
        """
        run = cls(folder)
        remains = (run.config_path, run.log_path, run.model_folder, run.report_path)
        if any(path.exists() for path in remains) or any(run.checkpoints.glob("step_*.pt")):
            raise RunError(f"{folder} holds a run already: go on with --resume {folder}, or choose another --out")
        try:
            run.images.mkdir(parents=True, exist_ok=True)
            run.checkpoints.mkdir(exist_ok=True)
            write_atomically(run.config_path, config.to_yaml().encode())
        except OSError as error:
            raise RunError(f"the run folder {folder} cannot be written ({error}): choose another --out") from error
        return run

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """An existing run.

        Raises:
            RunError: there is none in the folder.
        """
        run = cls(Path(folder))
        if not run.config_path.is_file():
            raise RunError(f"no run at {folder}: it has no config.yaml (runs are made by introvae fit)")
        return run

    def config(self) -> FitConfig:
        """The run's settings."""
        return load_config(self.config_path)

    def model(self) -> IntrospectiveVAE:
        """The trained model: averaged weights, evaluation mode.

        Raises:
            RunError: the training has not ended.
            CheckpointError: the model's files are damaged.
        """
        if not (self.model_folder / "config.json").is_file():
            raise RunError(f"{self.folder} has no model yet: finish it with introvae fit --resume {self.folder}")
        self.config()  # reading it imports a network of one's own
        return IntrospectiveVAE.from_pretrained(self.model_folder)

    def checksum(self) -> str:
        """SHA-256 of the trained model's weights, in hexadecimal digits."""
        with open(self.model_folder / "model.safetensors", "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def latest(self) -> tuple[IntrospectiveVAE, int]:
        """The model of the newest checkpoint, while the training goes on or after it: averaged weights, evaluation
        mode; and the step that it is of.

        Raises:
            RunError: there is no checkpoint yet, an older version made it, which did not write what model it is of, or
                the networks still grow.
            CheckpointError: it is damaged.
        """
        found = list_checkpoints(self.checkpoints)
        state = load_checkpoint(found[-1], "cpu") if found else {}
        if not state.get("model"):
            raise RunError(
                f"{self.folder} has no checkpoint that tells its model yet: wait for the next one, or finish it with "
                f"introvae fit --resume {self.folder}"
            )
        config, path = self.config(), str(found[-1])
        full = Schedule(config.growing, tuple(state["model"]["shape"]), config.batch_size).full
        if config.growing.on and state["step"] < full:
            raise RunError(f"{self.folder} still grows, and its levels above are not trained: wait for step {full:,}")
        model, weights = IntrospectiveVAE.from_config(state["model"], path), averaged_weights(state["average"])
        check_state(weights, model.state_dict(), path)
        model.load_state_dict(weights)
        return model.eval(), state["step"]

    def log(self) -> list[dict[str, Any]]:
        """The lines of log.jsonl about training steps, up to one that a crash cut."""
        return [row for row in self._lines() if "event" not in row]

    def curves(self) -> pd.DataFrame:
        """The lines of `log`, a row for each step that was logged, indexed by it; NaN where a line does not have a
        number.

        Example:
            >>> open_run("runs/mine").curves()[["kl_real", "kl_sample"]].plot()  # doctest: +SKIP
        """
        import pandas as pd

        return pd.DataFrame(self.log() or {"step": []}).set_index("step")

    def figure(self) -> Figure:
        """The curves that the log has so far, as in the report: what each objective watches, the reconstruction error,
        and settings that found their own value.

        Raises:
            RunError: nothing is logged yet.

        Example:
            >>> open_run("runs/mine").figure().savefig("curves.pdf")  # doctest: +SKIP
        """
        from introvae.training.curves import ShownFigure, curves

        rows = self.log()
        if not rows:
            raise RunError(f"{self.folder} has logged no step yet: wait for the first, or train on with --resume")
        path = self.model_folder / "config.json"  # there once the training has ended
        shape = json.loads(path.read_text())["shape"] if path.is_file() else ()
        return curves(rows, len(shape) == 3, ShownFigure)

    def _repr_html_(self) -> str:
        from introvae.training.notebook import html_of

        return html_of(self)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The lines of log.jsonl about something else: "data" is what became of each file."""
        return [row for row in self._lines() if row.get("event") == name]

    def log_event(self, name: str, *, step: int, **facts: Any) -> None:
        """Add a line that is not about a training step."""
        with open(self.log_path, "a") as log:
            log.write(json.dumps({"event": name, "step": step, **facts}) + "\n")

    def _lines(self) -> list[dict[str, Any]]:
        rows = []
        text = self.log_path.read_text(errors="replace") if self.log_path.is_file() else ""
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not isinstance(row, dict):
                break
            rows.append(row)
        return rows

    def pictures(self) -> list[tuple[int, Path]]:
        """Step and file of the pictures made during training, the last one that of its end."""
        found = [(int(path.stem.removeprefix("step_")), path) for path in sorted(self.images.glob("step_*.png"))]
        if (final := self.images / "final.png").is_file() and (rows := self.log()):
            found.append((rows[-1]["step"], final))
        return found

    def rewind_log(self, step: int) -> None:
        """Forget what was logged after `step`, and a line that a crash cut."""
        kept = [json.dumps(row) + "\n" for row in self._lines() if row["step"] <= step]
        write_atomically(self.log_path, "".join(kept).encode())

    def report(self) -> Report:
        """What `evaluate` measured; a notebook shows it as a table.

        Raises:
            RunError: the run was not evaluated.
        """
        if not self.report_path.is_file():
            raise RunError(f"{self.folder} has no report yet: make it with introvae evaluate {self.folder}")
        return Report(json.loads(self.report_path.read_text()))


def open_run(folder: str | Path) -> Run:
    """The run in a folder: its curves, model, report and pictures; a notebook shows it as a table with a picture.

    Raises:
        RunError: there is none in the folder.

    Example:
        >>> run = open_run("runs/mine")  # doctest: +SKIP
        >>> run.model().sample(4), run.curves()["rec"], run.report()["metrics"]  # doctest: +SKIP
    """
    return Run.open(folder)


def default_folder(config: FitConfig) -> Path:
    """runs/DATE-DATA-OBJECTIVE, with a number behind it where that name is taken."""
    data = re.sub(r"[^A-Za-z0-9]+", "-", Path(config.data).stem.removeprefix("density:")).strip("-") or "data"
    name = f"{date.today():%Y%m%d}-{data}-{type(config.objective).__name__.lower()}"
    for number in range(1, 10_000):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if not folder.exists():
            return folder
    raise ConfigError(f"runs/{name} and all numbered names after it are taken: give --out")
