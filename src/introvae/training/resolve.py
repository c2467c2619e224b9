"""What the data decide of a run's settings."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from introvae.data import ArrayData, Data, load_data
from introvae.errors import ConfigError
from introvae.networks import network_for
from introvae.parallel import Alone
from introvae.training.config import DEFAULT_STEPS, FitConfig


def preparation_of(data: Data) -> dict[str, Any]:
    """What later commands must do to their data, and how to know the run's own again, for the model's config."""
    if not isinstance(data, ArrayData):
        return {}
    found: dict[str, Any] = {"fingerprint": data.fingerprint()}
    if data.preparation is not None:
        found["preparation"] = data.preparation.to_dict()
    return found


def resolve(config: FitConfig, data: Data) -> FitConfig:
    """Fill in what was left to be chosen: steps, latent_dim.

    Raises:
        ConfigError: a batch larger than the data, epochs of endless data, a kernel that does not fit the latents.
    """
    steps = config.steps
    if config.epochs is not None:
        if not isinstance(data, ArrayData):
            raise ConfigError(f"{data.name} is endless and has no epochs: give steps")
        steps = max(1, round(config.epochs * data.steps_per_epoch(config.batch_size)))
    elif isinstance(data, ArrayData):
        data.steps_per_epoch(config.batch_size)
    steps = steps or DEFAULT_STEPS
    warmup = config.warmup.resolved(steps)
    if warmup.steps >= steps and config.objective.adversarial:
        raise ConfigError(f"warmup.steps {warmup.steps} leaves nothing of the {steps} steps: lower it")
    latent_dim = config.latent_dim
    if latent_dim is None:
        small = len(data.shape) == 3 and data.shape[0] == 1 and data.shape[1] <= 32
        latent_dim = data.shape[0] if len(data.shape) == 1 else 32 if small else 128
    objective = config.objective.fitted(math.prod(data.shape))
    objective.check(latent_dim, config.batch_size)
    network = network_for(data.shape) if config.network == "auto" else config.network
    return dataclasses.replace(
        config, objective=objective, steps=steps, epochs=None, warmup=warmup, latent_dim=latent_dim, network=network
    )


def load_once(config: FitConfig, peers: Alone) -> Data:
    """The data; the first process reads them, the others then find them in the cache."""
    data = peers.first_does(lambda: load_data(config.data, config))
    return load_data(config.data, config) if data is None else data
