"""What can go wrong through no fault of the code: each message is one line that names the thing and the remedy."""

from __future__ import annotations

__all__ = ["CheckpointError", "ConfigError", "DataError", "IntrovaeError", "RunError"]


class IntrovaeError(Exception):
    """Base of all errors that a user can mend; the commands print it as one line and exit with code 2."""


class ConfigError(IntrovaeError, ValueError):
    """A setting is unknown, out of its range or does not fit the others."""


class DataError(IntrovaeError, ValueError):
    """The data cannot be read or are not what a model takes."""


class RunError(IntrovaeError, RuntimeError):
    """A run folder is missing, already in use or does not belong to the given settings."""


class CheckpointError(IntrovaeError, RuntimeError):
    """A checkpoint or model file is cut, from elsewhere, or has wrong keys or shapes."""


def unknown(kind: str, name: object, choices: list[str]) -> ConfigError:
    """The error for a name that is in no registry; it lists the names that are."""
    return ConfigError(f"unknown {kind} {name!r}: choose one of {', '.join(choices)}")


def positive(**settings: float) -> None:
    """Raise `ConfigError` unless every given setting is a finite number above zero."""
    for name, value in settings.items():
        if not 0 < value < float("inf"):
            raise ConfigError(f"{name} is {value}: it must be above 0")


def not_negative(**settings: float) -> None:
    """Raise `ConfigError` unless every given setting is a finite number of at least zero."""
    for name, value in settings.items():
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{name} is {value}: it must not be negative")


def one_of(choices: tuple[str, ...], **settings: str) -> None:
    """Raise `ConfigError` unless every given setting is one of `choices`."""
    for name, value in settings.items():
        if value not in choices:
            raise unknown(name, value, list(choices))
