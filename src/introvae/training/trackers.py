"""The log of a run in TensorBoard, Weights & Biases or MLflow besides, through accelerate's trackers."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from introvae.errors import ConfigError, first_line
from introvae.training.config import FitConfig
from introvae.training.run import Run

PROJECT = "introvae"
"""The project (W&B) or experiment (MLflow) that runs are put in, unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME say
another one; each tracker's other variables, such as its address, hold as well."""

log = logging.getLogger("introvae")


class Trackers:
    """What `config.tracker` names, told what a run logs; in the first process only.

    Arguments:
        run: whose name they get.
        config: whose settings they are told.

    Raises:
        ConfigError: one cannot be started: it wants a login, say, or a server that is not there.
    """

    def __init__(self, run: Run, config: FitConfig) -> None:
        self._each: dict[str, Any] = {}
        for name in config.trackers:
            try:
                self._each[name] = _started(name, run, plain(config.to_dict()))
            except Exception as error:  # of three libraries and their servers
                self.finish()
                raise ConfigError(
                    f"tracker {name} does not start ({first_line(error)}): give it what it wants, or leave it out"
                ) from error

    def log(self, row: Mapping[str, Any]) -> None:
        """A line of the log: its numbers, at its step."""
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
        self._tell(lambda name, tracker: tracker.log(numbers, step=row["step"]))

    def picture(self, path: Path, step: int) -> None:
        """A picture that was made during training."""
        from PIL import Image

        with Image.open(path) as opened:
            image = opened.convert("RGB")

        def show(name: str, tracker: Any) -> None:
            if name == "tensorboard":
                tracker.log_images({"images": np.asarray(image)[None]}, step=step, dataformats="NHWC")
            elif name == "wandb":
                tracker.log_images({"images": [image]}, step=step)
            else:
                tracker.log_artifact(str(path), "images")

        self._tell(show)

    def finish(self) -> None:
        """End them: what they hold is written."""
        self._tell(lambda name, tracker: tracker.finish())
        self._each = {}

    def _tell(self, what: Callable[[str, Any], Any]) -> None:
        """Do it with each tracker; one that fails, such as one whose server went away, is told no more: a training
        does not end for it.
        """
        for name, tracker in list(self._each.items()):
            try:
                what(name, tracker)
            except Exception as error:  # of three libraries and their servers
                log.warning("tracker %s fails and is told no more: %s", name, first_line(error))
                del self._each[name]


def _started(name: str, run: Run, settings: dict[str, Any]) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # what the trackers ask which process they are in
    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        tracker = kind("tensorboard", str(run.folder))
    elif name == "wandb":
        tracker = kind(os.environ.get("WANDB_PROJECT", PROJECT), name=run.folder.name, dir=str(run.folder))
    else:
        tracker = kind(PROJECT, run_name=run.folder.name)
    tracker.start()
    if name == "tensorboard":  # its table of settings would be a run of its own, beside this one
        tracker.writer.add_text("settings", "\n".join(f"    {key}: {value}" for key, value in settings.items()))
    else:
        tracker.store_init_configuration(settings)
    return tracker


def plain(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of plain values, as trackers take them.

    Example:
        >>> plain({"lr": 0.1, "warmup": {"steps": 5}, "adam_betas": [0.5, 0.9], "group": None})
        {'lr': 0.1, 'warmup.steps': 5, 'adam_betas': '[0.5, 0.9]', 'group': 'none'}
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= plain(value, f"{prefix}{name}.")
        elif value is None:
            found[prefix + name] = "none"
        else:
            found[prefix + name] = value if isinstance(value, bool | int | float | str) else str(value)
    return found
