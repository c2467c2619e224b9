"""What each player wants: one paper, one file."""

from importlib import import_module

from introvae.errors import unknown
from introvae.objectives.age import AGE
from introvae.objectives.as_introvae import ASIntroVAE, as_distance
from introvae.objectives.base import Judged, Objective, Values, Warmup
from introvae.objectives.introvae import IntroVAE
from introvae.objectives.soft_introvae import SoftIntroVAE
from introvae.objectives.vae import VAE

__all__ = [
    "AGE",
    "VAE",
    "ASIntroVAE",
    "IntroVAE",
    "Judged",
    "Objective",
    "SoftIntroVAE",
    "Values",
    "Warmup",
    "as_distance",
    "get_objective",
    "list_objectives",
]

_OBJECTIVES: dict[str, type[Objective]] = {cls.__name__: cls for cls in (VAE, IntroVAE, SoftIntroVAE, ASIntroVAE, AGE)}
_BASELINES = {"WGANGP": "introvae.baselines"}
"""Where the objectives are that bring an update of their own, which is built on this package."""


def list_objectives() -> list[str]:
    """Names of all objectives, as `--objective` takes them."""
    return [*_OBJECTIVES, *_BASELINES]


def get_objective(name: str) -> type[Objective]:
    """The class of an objective.

    Raises:
        ConfigError: the name is unknown.
    """
    if name in _BASELINES:
        return getattr(import_module(_BASELINES[name]), name)
    if name not in _OBJECTIVES:
        raise unknown("objective", name, list_objectives())
    return _OBJECTIVES[name]
