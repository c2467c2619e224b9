"""What the data decide of a run's settings."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from introvae.classes import Classes
from introvae.data import ArrayData, Data, Part, load_data
from introvae.data.row_groups import MOST_CLASSES
from introvae.data.stream import StreamData, StreamedPart
from introvae.errors import ConfigError, DataError
from introvae.networks import network_for
from introvae.parallel import Alone
from introvae.training.config import DEFAULT_STEPS, FitConfig
from introvae.training.growing import Schedule


def preparation_of(data: Data) -> dict[str, Any]:
    """What later commands must do to their data, and how to know the run's own again, for the model's config."""
    if not isinstance(data, ArrayData):
        return {}
    found: dict[str, Any] = {"fingerprint": data.fingerprint()}
    if data.preparation is not None:
        found["preparation"] = data.preparation.to_dict()
    return found


def classes_of(config: FitConfig, data: Data) -> Classes | None:
    """The classes of a run that needs each sample's, and how often each occurs in the training part (of data that
    stream, pictures that cannot be read count too); None for other runs.

    Raises:
        DataError: data without classes, or samples without one.
        ConfigError: there is but one class.
    """
    if not (config.conditional or config.paired):
        return None
    option = "conditional" if config.conditional else "paired"
    if not isinstance(data, ArrayData):
        raise DataError(f"{data.name} has no classes: leave {option} out")
    heldout, train = _occurrences(data.heldout), _occurrences(data.train)
    if heldout is None or train is None:
        raise DataError(
            f"the samples of {data.name} have no classes: put images into a sub-folder for each class, name the column "
            f"of a table with --label, or leave {option} out"
        )
    missing = sum(count for found in (heldout, train) for label, count in found.items() if label < 0)
    if missing:
        raise DataError(
            f"{missing} samples of {data.name} have no class: label them, remove them, or leave {option} out"
        )
    highest = max((*heldout, *train))
    count = len(data.class_names) or highest + 1
    if highest >= min(count, MOST_CLASSES):
        raise DataError(
            f"the labels of {data.name} go up to {highest}, with {len(data.class_names)} class names: number the "
            f"classes from 0, {MOST_CLASSES} at most, or leave {option} out"
        )
    names = data.class_names or tuple(map(str, range(count)))
    if len(names) < 2:
        raise ConfigError(f"{data.name} has one class: label two at least, or leave {option} out")
    return Classes(names, tuple(train.get(label, 0) for label in range(count)))


def _occurrences(part: Part) -> dict[int, int] | None:
    """How often each class index occurs in a part, -1: unknown; None where it has no classes."""
    if isinstance(part, StreamedPart):
        return part.occurrences()
    if part.labels is None:
        return None
    values, counts = part.labels.unique(return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def resolve(config: FitConfig, data: Data) -> FitConfig:
    """Fill in what was left to be chosen: steps, latent_dim.

    Raises:
        ConfigError: a batch larger than the data, epochs of endless data, a kernel that does not fit the latents, fewer
            steps than growing takes.
    """
    schedule = Schedule(config.growing, data.shape, config.batch_size)
    steps = schedule.checked(_steps(config, data, schedule))
    warmup = config.warmup.resolved(steps)
    if warmup.steps >= steps and config.objective.adversarial:
        raise ConfigError(f"warmup.steps {warmup.steps} leaves nothing of the {steps} steps: lower it")
    latent_dim = config.latent_dim
    if latent_dim is None:
        small = len(data.shape) == 3 and data.shape[0] == 1 and data.shape[1] <= 32
        latent_dim = data.shape[0] if len(data.shape) == 1 else 32 if small else 128
    pixels = math.prod(data.shape)
    objective = config.growing.fitted(config.objective.fitted(pixels), pixels)
    objective.check(latent_dim, min(schedule.batches))
    network = network_for(data.shape) if config.network == "auto" else config.network
    return dataclasses.replace(
        config,
        objective=objective,
        steps=steps,
        epochs=None,
        warmup=warmup,
        latent_dim=latent_dim,
        network=network,
        stream=_chosen(config.stream, data),
    )


def _chosen(stream: str, data: Data) -> str:
    """What "auto" came to: a resumed run must not choose anew."""
    if isinstance(data, StreamData):
        return "always"
    return "never" if stream == "auto" and isinstance(data, ArrayData) else stream


def _steps(config: FitConfig, data: Data, schedule: Schedule) -> int:
    if isinstance(data, ArrayData):
        each = data.steps_per_epoch(max(schedule.batches))
    elif config.epochs is not None:
        raise ConfigError(f"{data.name} is endless and has no epochs: give steps")
    else:
        each = 0
    if config.epochs is None:
        return config.steps or (schedule.steps if config.growing.on else DEFAULT_STEPS)
    if config.growing.on and isinstance(data, ArrayData):
        return schedule.steps_for(config.epochs * len(data.train))
    return max(1, round(config.epochs * each))


def load_once(config: FitConfig, peers: Alone) -> Data:
    """The data; the first process reads them, the others then find them in the cache."""
    data = peers.first_does(lambda: load_data(config.data, config))
    return load_data(config.data, config) if data is None else data
