"""What can go wrong through no fault of the code: each message is one line that names the thing and the remedy."""

from __future__ import annotations

import math
from numbers import Real

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DivergedError",
    "InterruptedRunError",
    "IntrovaeError",
    "MissingExtraError",
    "RunError",
]


class IntrovaeError(Exception):
    """Base of all errors that a user can mend; the commands print it as one line and exit with code 2."""


class ConfigError(IntrovaeError, ValueError):
    """A setting is unknown, out of its range or does not fit the others."""


class DataError(IntrovaeError, ValueError):
    """The data cannot be read or are not what a model takes."""


class MissingExtraError(IntrovaeError, ImportError):
    """A library that only an extra brings is not installed."""


class RunError(IntrovaeError, RuntimeError):
    """A run folder is missing, already in use or does not belong to the given settings."""


class InterruptedRunError(RunError):
    """The run was stopped by Ctrl-C or a termination signal; its state was saved."""


class DivergedError(RunError):
    """Training went wrong and the guard, where it may act, could not help: the message names the cause and a remedy."""


class CheckpointError(IntrovaeError, RuntimeError):
    """A checkpoint or model file is cut, from elsewhere, or has wrong keys or shapes."""


def unknown(kind: str, name: object, choices: list[str]) -> ConfigError:
    """The error for a name that is in no registry; it lists the names that are."""
    return ConfigError(f"unknown {kind} {name!r}: choose one of {', '.join(choices)}")


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def positive(**settings: float) -> None:
    """Raise `ConfigError` unless every given setting is a finite number above zero."""
    for name, value in settings.items():
        if not (_is_number(value) and 0 < value < math.inf):
            raise ConfigError(f"{name} is {value}: it must be a number above 0")


def not_negative(**settings: float) -> None:
    """Raise `ConfigError` unless every given setting is a finite number of at least zero."""
    for name, value in settings.items():
        if not (_is_number(value) and 0 <= value < math.inf):
            raise ConfigError(f"{name} is {value}: it must be a number and not be negative")


def whole(**settings: object) -> None:
    """Raise `ConfigError` unless every given setting is a whole number."""
    for name, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{name} is {value}: it must be a whole number")


def checked_seed(seed: int) -> int:
    """The seed itself; raises `ConfigError` unless it is a whole number from 0 to 2^32 - 1."""
    whole(seed=seed)
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed is {seed}: give a whole number from 0 to 4294967295")
    return seed


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def one_of(choices: tuple[str, ...], **settings: str) -> None:
    """Raise `ConfigError` unless every given setting is one of `choices`."""
    for name, value in settings.items():
        if value not in choices:
            raise unknown(name, value, list(choices))
