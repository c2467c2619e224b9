"""Introspective variational autoencoders: VAEs whose encoder also judges what the decoder makes.

The names below are the whole public interface. They are imported when first used, so that `introvae --help` needs no
torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from introvae.augment import Augmentation
    from introvae.baselines import WGANGP, WGANGPStep
    from introvae.classes import Classes
    from introvae.comparison.compare import compare
    from introvae.data import ArrayData, DataOptions, DensityData, from_array, load_data
    from introvae.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        DivergedError,
        InterruptedRunError,
        IntrovaeError,
        MissingExtraError,
        RunError,
    )
    from introvae.evaluation import evaluate
    from introvae.gaussian import DiagonalGaussian
    from introvae.metrics.features import FeatureSpace
    from introvae.model import IntrospectiveVAE
    from introvae.networks import list_networks, register_network
    from introvae.objectives import AGE, VAE, ASIntroVAE, IntroVAE, Objective, SoftIntroVAE, Warmup
    from introvae.step import IntrospectiveStep, Noise
    from introvae.training.config import FitConfig
    from introvae.training.fit import fit
    from introvae.training.run import Report, Run, open_run

__version__ = "0.1.0"

__all__ = [
    "AGE",
    "VAE",
    "WGANGP",
    "ASIntroVAE",
    "ArrayData",
    "Augmentation",
    "CheckpointError",
    "Classes",
    "ConfigError",
    "DataError",
    "DataOptions",
    "DensityData",
    "DiagonalGaussian",
    "DivergedError",
    "FeatureSpace",
    "FitConfig",
    "InterruptedRunError",
    "IntroVAE",
    "IntrospectiveStep",
    "IntrospectiveVAE",
    "IntrovaeError",
    "MissingExtraError",
    "Noise",
    "Objective",
    "Report",
    "Run",
    "RunError",
    "SoftIntroVAE",
    "WGANGPStep",
    "Warmup",
    "__version__",
    "compare",
    "evaluate",
    "fit",
    "from_array",
    "list_networks",
    "load_data",
    "open_run",
    "register_network",
]

_HOMES = {
    "introvae.augment": ("Augmentation",),
    "introvae.baselines": ("WGANGP", "WGANGPStep"),
    "introvae.classes": ("Classes",),
    "introvae.comparison.compare": ("compare",),
    "introvae.data": ("ArrayData", "DataOptions", "DensityData", "from_array", "load_data"),
    "introvae.errors": (
        "CheckpointError",
        "ConfigError",
        "DataError",
        "DivergedError",
        "InterruptedRunError",
        "IntrovaeError",
        "MissingExtraError",
        "RunError",
    ),
    "introvae.evaluation": ("evaluate",),
    "introvae.gaussian": ("DiagonalGaussian",),
    "introvae.metrics.features": ("FeatureSpace",),
    "introvae.model": ("IntrospectiveVAE",),
    "introvae.networks": ("list_networks", "register_network"),
    "introvae.objectives": ("AGE", "VAE", "ASIntroVAE", "IntroVAE", "Objective", "SoftIntroVAE", "Warmup"),
    "introvae.step": ("IntrospectiveStep", "Noise"),
    "introvae.training.config": ("FitConfig",),
    "introvae.training.fit": ("fit",),
    "introvae.training.run": ("Report", "Run", "open_run"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'introvae' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
