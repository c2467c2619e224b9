"""A metric's entry in a report, and what all metrics are computed with."""

from __future__ import annotations

import math
import statistics
from typing import Any

Metrics = dict[str, dict[str, Any]]
"""{name: {"value", "std", "n", "protocol", "floor"}}, keys that do not apply left out."""

BATCH, PIXELS = 256, 2**22
"""So many samples at a time, and so many pixels of them: large images would fill the memory."""


def at_once(shape: tuple[int, ...]) -> int:
    """How many samples of that shape, (C, H, W) or (D,), are given to the model at a time; an even number.

    Example:
        >>> [at_once((3, side, side)) for side in (28, 128, 256, 1024)]
        [256, 256, 64, 4]
    """
    return max(2, min(BATCH, PIXELS // math.prod(shape[1:]) // 2 * 2))


def entry(values: list[float], n: int, protocol: str, floor: float | None = None) -> dict[str, Any]:
    """The mean of the values, their standard deviation where there are several, and how they came about."""
    found: dict[str, Any] = {"value": statistics.fmean(values), "n": n, "protocol": protocol}
    if len(values) > 1:
        found["std"] = statistics.stdev(values)
    if floor is not None:
        found["floor"] = floor
    return found
