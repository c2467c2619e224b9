"""What all commands share: how their words are read, and how a run is opened."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from introvae.errors import ConfigError

if TYPE_CHECKING:
    from introvae.training.run import Run


_ONLY_PARSERS = ContextVar("only parsers", default=False)


class BuiltParser(Exception):  # noqa: N818 - it is no error
    """A command came to its parser, which is all that was wanted of it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parser_of(command: Callable[[list[str]], None]) -> argparse.ArgumentParser:
    """The parser of a command, which is not run."""
    token = _ONLY_PARSERS.set(True)
    try:
        command([])
    except BuiltParser as built:
        return built.parser
    finally:
        _ONLY_PARSERS.reset(token)
    raise RuntimeError(f"{command} has no parser")


def parser_for(command: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A command's parser, whose errors are `ConfigError`s; the epilog shows examples."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise ConfigError(f"{message} (see introvae {command} --help)")

        def parse_known_args(self, *words: Any, **settings: Any) -> Any:  # parse_args goes through it too
            if _ONLY_PARSERS.get():
                raise BuiltParser(self)
            return super().parse_known_args(*words, **settings)

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
