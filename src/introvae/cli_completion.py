"""The command that writes the shell's completion."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from introvae.commands import parser_for, parser_of
from introvae.extras import import_extra

SHELLS = ("bash", "zsh", "tcsh")


def completion(words: list[str], commands: Mapping[str, Callable[[list[str]], None]]) -> None:
    """`introvae completion SHELL`: a script of all commands and their options."""
    parser = parser_for(
        "completion",
        "Write the script with which a shell completes commands, options and files.",
        "example:\n"
        "  introvae completion bash > ~/.local/share/bash-completion/completions/introvae\n"
        "  introvae completion zsh > ~/.zfunc/_introvae    (extra: pip install 'introvae[completion]')",
    )
    parser.add_argument("shell", choices=SHELLS, help="whose script")
    own = parser.parse_args(words)
    shtab = import_extra("shtab")
    print(shtab.complete(whole_parser(commands), shell=own.shell), end="")


def whole_parser(commands: Mapping[str, Callable[[list[str]], None]]) -> argparse.ArgumentParser:
    """One parser of all commands; those of a run's settings (`fit`, `compare`) take their options too."""
    from introvae.training.config import config_parser, list_recipes

    shtab = import_extra("shtab")
    whole = argparse.ArgumentParser("introvae")
    whole.add_argument("--version", action="store_true", help="print the version")
    below = whole.add_subparsers()
    for name, command in commands.items():
        own = parser_of(command)
        its = below.add_parser(name, parents=[own], add_help=False, help=own.description, conflict_handler="resolve")
        taken = {option for action in its._actions for option in action.option_strings}
        if name in ("fit", "compare"):
            for action in config_parser()._actions:
                options = [option for option in action.option_strings if option not in taken]
                # --objective.help and the like are of a value that must stand before them
                if options and not options[0].endswith(".help"):
                    its.add_argument(*options, help=(action.help or "").split("\n")[0].replace("%", "%%"))
        for action in its._actions:
            if action.dest == "recipe" and name == "fit":
                action.choices = list_recipes()
            elif action.choices is None and action.nargs != 0:
                action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
    return whole
