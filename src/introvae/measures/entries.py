"""A metric's entry in a report, and what all metrics are computed with."""

from __future__ import annotations

import statistics
from typing import Any

Metrics = dict[str, dict[str, Any]]
"""{name: {"value", "std", "n", "protocol", "floor"}}, keys that do not apply left out."""

BATCH = 256


def entry(values: list[float], n: int, protocol: str, floor: float | None = None) -> dict[str, Any]:
    """The mean of the values, their standard deviation where there are several, and how they came about."""
    found: dict[str, Any] = {"value": statistics.fmean(values), "n": n, "protocol": protocol}
    if len(values) > 1:
        found["std"] = statistics.stdev(values)
    if floor is not None:
        found["floor"] = floor
    return found
