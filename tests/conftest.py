from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import pytest
import torch

from commands import REMEDY, Command, Refused, Said, call, one_line

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]

mpl.use("Agg")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a script: then a process ignores Ctrl-C, which the tests press.
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decoded images of tests do not mix with a user's."""
    before = os.environ.get("INTROVAE_CACHE")
    os.environ["INTROVAE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("INTROVAE_CACHE")
    if before is not None:
        os.environ["INTROVAE_CACHE"] = before


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process."""

    def run(*words: object) -> Said:
        capsys.readouterr()
        code = call(*words)
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(command: Command) -> Refused:
    """Run a command that must fail with exit code 2 and one line that says what to do; returns the line."""

    def run(*words: object) -> str:
        said = command(*words)
        assert said.code == 2, said
        assert one_line(said.err), said.err
        assert REMEDY.search(said.err), f"no remedy in: {said.err}"
        return said.err

    return run


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, driven by playwright; where one of them is missing, the test is skipped and says so."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing")
    if CHROMIUM is None:
        pytest.skip("chromium is missing")
    with playwright.sync_playwright() as api:
        chromium = api.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()
