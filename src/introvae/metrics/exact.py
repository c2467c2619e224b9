"""Features as metrics compare them: in float64 where they are computed, of one feature space."""

from __future__ import annotations

from torch import Tensor

from introvae.errors import ConfigError


def exact(x: Tensor) -> Tensor:
    """The values in float64: on their own device, or on the CPU where that device has no such numbers (MPS).

    Example:
        >>> import torch
        >>> exact(torch.ones(1))
        tensor([1.], dtype=torch.float64)
    """
    return (x.cpu() if x.device.type == "mps" else x).double()


def same_space(a: int, b: int) -> None:
    """Raise `ConfigError` unless two sets have equally many features, as those of one feature space do.

    Example:
        >>> same_space(96, 96)
    """
    if a != b:
        raise ConfigError(f"sets of {a} and of {b} features cannot be compared: take those of one feature space")
