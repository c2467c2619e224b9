"""What each player wants: one paper, one file."""

from introvae.errors import unknown
from introvae.objectives.as_introvae import ASIntroVAE, as_distance
from introvae.objectives.base import Judged, Objective, Values, Warmup
from introvae.objectives.introvae import IntroVAE
from introvae.objectives.soft_introvae import SoftIntroVAE
from introvae.objectives.vae import VAE

__all__ = [
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

_OBJECTIVES: dict[str, type[Objective]] = {cls.__name__: cls for cls in (VAE, IntroVAE, SoftIntroVAE, ASIntroVAE)}


def list_objectives() -> list[str]:
    """Names of all objectives, as `--objective` takes them."""
    return list(_OBJECTIVES)


def get_objective(name: str) -> type[Objective]:
    """The class of an objective.

    Raises:
        ConfigError: the name is unknown.
    """
    if name not in _OBJECTIVES:
        raise unknown("objective", name, list_objectives())
    return _OBJECTIVES[name]
