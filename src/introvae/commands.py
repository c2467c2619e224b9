"""What all commands share: how their words are read, and how a run is opened."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from introvae.errors import ConfigError

if TYPE_CHECKING:
    from introvae.training.run import Run


def parser_for(command: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A command's parser, whose errors are `ConfigError`s; the epilog shows examples."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise ConfigError(f"{message} (see introvae {command} --help)")

    return Parser(
        prog=f"introvae {command}",
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def with_latents(run: Run) -> Run:
    """The run itself; raises `ConfigError` where its encoder gives no latents."""
    objective = run.config().objective
    if objective.encodes == "nothing":
        raise ConfigError(
            f"{run.folder} is a {type(objective).__name__}'s, whose encoder gives no latents: take introvae sample, or "
            "a run of another objective"
        )
    return run
