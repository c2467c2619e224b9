"""Starting and resuming a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from introvae.data import DATA_OPTIONS, ArrayData, Data, DensityData, load_data
from introvae.errors import ConfigError, RunError
from introvae.parallel import processes
from introvae.training.checkpoint import list_checkpoints, load_checkpoint
from introvae.training.config import FitConfig, load_config, recipe_path, recommended_recipe
from introvae.training.loop import Trainer
from introvae.training.resolve import load_once, resolve
from introvae.training.run import Run, default_folder

MACHINES = ("device", "cache", "precision", "compile", "gradient_checkpointing", "accumulation")
"""Settings in which a resumed run may differ: they say how it is computed, not what."""


def fit(
    config: FitConfig | None = None,
    *,
    data: str | Path | Data | Tensor | np.ndarray | None = None,
    resume: str | Path | None = None,
    recipe: str = "auto",
    progress: bool = True,
    **settings: Any,
) -> Run:
    """Train a model and leave everything in a run folder.

    Arguments:
        config: all settings at once; or give single ones as `settings`.
        data: the setting `data`, or an array or data in memory.
        resume: a run folder to go on with; settings given besides must equal the run's.
        recipe: settings that the given ones override: a recipe's name or file, "auto" (the recommended one for the data
            and the objective, where there is one) or "none". Not used with `config`.
        progress: show a progress bar.
        settings: fields of `FitConfig`.

    Returns:
        The run; `run.model()` is the trained model.

    Raises:
        IntrovaeError: a setting, the data or the run folder will not do.
        InterruptedRunError: Ctrl-C or a termination signal; the state is saved.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = fit(data="density:rings", network="tiny-mlp", steps=3, out=folder + "/run", progress=False)
        ...     run.model().sample(2).shape
        torch.Size([2, 2])
    """
    if isinstance(data, str | Path):
        settings["data"], data = str(data), None
    if data is not None:
        settings["data"] = data.name if isinstance(data, ArrayData | DensityData) else "array"
    if resume is not None:
        if data is not None:  # it is read and divided as the run did
            found = Run.open(resume).config()
            given = {name: settings[name] for name in DATA_OPTIONS if name in settings}
            data = load_data(data, config or dataclasses.replace(found, **given))
        return resume_fit(resume, config, settings, data, progress)
    if config is None:
        if recipe == "auto" and data is not None and _are_vectors(data):
            recipe = "none"
        config = config_for(recipe, settings)
    elif settings.keys() <= {"data"}:
        config = dataclasses.replace(config, **settings)
    else:
        raise ConfigError("give either a config or single settings, not both")
    if data is not None:
        data = load_data(data, config)
    trainer = Trainer(config, data)
    peers = trainer.peers
    folder = peers.tell(Path(config.out) if config.out else default_folder(config))
    peers.first_does(lambda: Run.create(folder, trainer.config))
    return trainer.train(Run(folder), progress)


def _are_vectors(data: Any) -> bool:
    """Whether data in memory are vectors: `shape` is a sample's of data, and of all samples of an array."""
    return len(getattr(data, "shape", ())) == (1 if isinstance(data, ArrayData | DensityData) else 2)


def config_for(recipe: str, settings: dict[str, Any]) -> FitConfig:
    """The settings of a recipe ("auto", "none", a name or a file) with `settings` over them.

    Raises:
        ConfigError: an unknown recipe or setting.
    """
    _refuse_unknown(settings)
    if recipe == "auto":
        bare = FitConfig(**settings)
        name = recommended_recipe(bare.data, type(bare.objective).__name__)
        recipe = name or "none"
    base = FitConfig() if recipe == "none" else load_config(recipe_path(recipe))
    if settings.get("objective") == type(base.objective).__name__:
        settings = {name: value for name, value in settings.items() if name != "objective"}  # a name keeps its settings
    if "steps" in settings or "epochs" in settings:
        base = dataclasses.replace(base, steps=None, epochs=None)
    if settings.get("network", base.network) != base.network:
        base = dataclasses.replace(base, network_options={})
    return dataclasses.replace(base, **settings)


def _refuse_unknown(settings: dict[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(FitConfig)]
    for name in settings:
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}: choose from {', '.join(known)}")


def resume_fit(
    folder: str | Path,
    config: FitConfig | None = None,
    settings: dict[str, Any] | None = None,
    data: Data | None = None,
    progress: bool = True,
) -> Run:
    """Go on with a run from its newest checkpoint.

    Arguments:
        folder: the run folder.
        config: all settings, or None for the run's own.
        settings: single ones over them; all must equal the run's.
        data: an array or data in memory, where the run had some.
        progress: show a progress bar.

    Raises:
        RunError: no run or no checkpoint there, or a setting differs from the run's (each is listed).
        CheckpointError: the checkpoint is damaged.
    """
    run = Run.open(folder)
    trainer = resumable(run, config, settings, data)
    checkpoints = list_checkpoints(run.checkpoints)
    if not checkpoints:
        raise RunError(f"{folder} has no checkpoint to resume from: remove it or choose another --out, and start anew")
    trainer.load_state_dict(load_checkpoint(checkpoints[-1], trainer.device), checkpoints[-1])
    if trainer.peers.first:
        run.rewind_log(trainer.step_index)
    return trainer.train(run, progress)


def resumable(
    run: Run, config: FitConfig | None = None, settings: dict[str, Any] | None = None, data: Data | None = None
) -> Trainer:
    """A trainer with the run's settings, still at its start.

    Raises:
        RunError: a given setting differs from the run's; each is listed.
    """
    found = run.config()
    _refuse_unknown(settings or {})
    data = load_once(found, processes(found.device)) if data is None else data
    base = config or found
    if {"steps", "epochs"} & (settings or {}).keys():
        base = dataclasses.replace(base, steps=None, epochs=None)
    wanted = dataclasses.replace(base, **(settings or {}))
    if wanted.out is not None and Path(wanted.out).resolve() != run.folder.resolve():
        raise RunError(f"a resumed run stays in its folder {run.folder}: resume without --out, or start a new run")
    refuse_differences(run, found, resolve(wanted, data))
    return Trainer(dataclasses.replace(found, **{name: getattr(wanted, name) for name in MACHINES}), data)


def refuse_differences(run: Run, found: FitConfig, wanted: FitConfig) -> None:
    """Raise `RunError` with every setting in which `wanted` differs from the run's; those of `MACHINES` may."""
    ours, theirs = flat(wanted.to_dict()), flat(found.to_dict())
    differences = [
        f"{name} is {theirs.get(name)} in the run, {ours.get(name)} here"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name) and name not in MACHINES
    ]
    if differences:
        raise RunError(
            f"{run.folder} was started with other settings ({'; '.join(differences)}): resume without them, "
            "or start a new run"
        )


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings of settings as one level, "warmup.steps" for the steps of the warm-up."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
