"""Commands in this process, for the tests: what they return and print."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from introvae.cli import main

REMEDY = re.compile(
    r"\b(choose|give|take|lower|raise|resume|remove|resize|convert|use|start|finish|train|restore|update|scale|fill|must|"
    r"leave|see introvae|made by|go on|takes)\b"
)
"""Words with which a message says what to do, or what is possible."""


@dataclass(frozen=True)
class Said:
    """What a command returned and printed."""

    code: int | str | None
    out: str
    err: str


Command = Callable[..., Said]
Refused = Callable[..., str]


def call(*words: object) -> int | str | None:
    """The exit code of a command, which argparse's own --help gives by `SystemExit`."""
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code


def one_line(err: str) -> bool:
    """Whether this is how an error is said."""
    return err.startswith("introvae: ") and err.count("\n") == 1 and err.endswith("\n") and "Traceback" not in err
