"""The shells' completion knows every command and its options; bash is asked."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from commands import Command, Refused
from introvae import MissingExtraError
from introvae.cli import COMMANDS
from introvae.cli_completion import completion, whole_parser
from introvae.commands import parser_of

ASK = """
source "$1"
shift
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
function=$(complete -p introvae | sed 's/.*-F \\([^ ]*\\).*/\\1/')
$function introvae "${COMP_WORDS[$COMP_CWORD]}" "${COMP_WORDS[$COMP_CWORD-1]}"
echo "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = [sys.executable, "-m", "introvae", "completion", "bash"]
    path = tmp_path_factory.mktemp("completion") / "introvae"
    path.write_text(subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout)
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is missing")
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["st"], {"studio"}),
        ([""], set(COMMANDS)),
        (["fit", "--batch"], {"--batch_size"}),
        (["fit", "--recipe", "mnist-soft"], {"mnist-softintrovae", "mnist-softintrovae-published"}),
        (["fit", "--re"], {"--recipe", "--resume"}),
        (["compare", "--wor"], {"--workers"}),
        (["compare", "--ste"], {"--steps"}),
        (["detect", "--norm"], {"--normal"}),
        (["completion", "z"], {"zsh"}),
    ],
)
def test_bash_completes(script: Path, typed: list[str], expected: set[str]) -> None:
    words = ["bash", "-c", ASK, "bash", str(script), "introvae", *typed]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    assert set(done.stdout.split()) == expected


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_a_script(command: Command, shell: str) -> None:
    said = command("completion", shell)
    assert said.code == 0
    assert all(name in said.out for name in COMMANDS)


def test_every_command_has_a_parser_that_runs_nothing() -> None:
    whole_parser(COMMANDS)
    for name, function in COMMANDS.items():
        if name != "completion":
            assert parser_of(function).prog == f"introvae {name}"


def test_an_unknown_shell(refused: Refused) -> None:
    assert "bash" in refused("completion", "fish")


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(MissingExtraError, match=r"introvae\[completion\]"):
        completion(["bash"], COMMANDS)
