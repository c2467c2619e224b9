"""What the benchmarks share: processes that take turns, rates, FLOPs, memory, the table and the JSON file."""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from introvae.machine import hardware, versions
from introvae.parallel import Alone
from introvae.precision import float32_multiplications

FOLDER = Path(__file__).parent
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# --- command line, table, file


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--json", type=Path, help="where to write the results")
    found.add_argument("--short", action="store_true", help="fewer cases and rounds, a minute or less")
    found.add_argument("--contestant", type=json.loads, help=argparse.SUPPRESS)
    return found


def device_option(options: argparse.ArgumentParser) -> None:
    """Let the networks be put on any device."""
    options.add_argument("--device", type=pick_device, default="auto", help="default: the accelerator if there is one")


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the accelerator if there is one."""
    if name != "auto":
        return torch.device(name)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def progress(text: str) -> None:
    """Say on standard error what was measured: the table comes at the end."""
    print(text, file=sys.stderr, flush=True)


def report(cases: Sequence[Mapping[str, Any]], json_path: Path | None, **more: Any) -> None:
    """Print the cases as tables and write them, with the machine, the versions and the commit, as JSON."""
    result = {
        "machine": dict(hardware()),
        "versions": dict(versions()),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        **more,
        "cases": cases,
    }
    print(f"commit {result['commit']}, {result['date']}, {result['machine']['processor']}")
    for _, group in groupby(cases, key=lambda case: tuple(case)):
        print("\n" + table(list(group)), flush=True)
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=2) + "\n")


def table(cases: Sequence[Mapping[str, Any]]) -> str:
    """Cases of equal keys, one a line; numbers to the right."""
    rows = [list(cases[0]), *([cell(value) for value in case.values()] for case in cases)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = [any(isinstance(case[name], str) for case in cases) for name in cases[0]]
    lines = []
    for row in rows:
        parts = zip(row, widths, left, strict=True)
        lines.append("  ".join(f"{text:<{width}}" if first else f"{text:>{width}}" for text, width, first in parts))
    return "\n".join(line.rstrip() for line in lines)


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return " ".join(map(cell, value))
    if isinstance(value, bool) or not isinstance(value, float | int):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def commit() -> str | None:
    """The short hash of what is measured, "+changes" behind it where files differ; None outside of a repository."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=FOLDER.parent, capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD").strip() + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# --- rates and memory


def finish(device: torch.device) -> None:
    """Wait until the device has done all it was told to."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def clock(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run."""
    finish(device)
    start = time.perf_counter()
    run()
    finish(device)
    return time.perf_counter() - start


def alternate(
    runs: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device | None = None, warm: int = 1
) -> dict[str, float]:
    """Median seconds of each; they take turns, so that what else the machine does hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warm + rounds):
        for name, run in runs.items():
            taken = clock(run, device or torch.device("cpu"))
            if turn >= warm:
                seconds[name].append(taken)
    return {name: median(times) for name, times in seconds.items()}


def matrix_rate(
    device: torch.device, precision: str, side: int | None = None, *, repeats: int = 3, threads: int | None = None
) -> float:
    """FLOP/s of a plain product of two large square matrices in float32, tf32 or bf16; threads: on the CPU."""
    side = side or (2048 if device.type == "cpu" else 8192)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b, c = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with float32_multiplications(tf32=precision == "tf32"):
            found = alternate({"product": lambda: torch.matmul(a, b, out=c)}, repeats, device)
    finally:
        torch.set_num_threads(before)
    return 2 * side**3 / found["product"]


def counted_flops(run: Callable[[], Any]) -> int:
    """FLOPs of the matrix products and convolutions in one run, two for each multiply-add."""
    with FlopCounter() as counter:
        run()
    return counter.flops


class FlopCounter(TorchDispatchMode):
    """torch's FlopCounterMode without its hooks for modules, which `torch.autograd.grad` into a leaf does not bear."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=found)
        return found


def peak_bytes() -> int:
    """The largest memory of this process so far."""
    try:  # unlike ru_maxrss, this does not begin with what the process was started from
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- processes that take turns


class Contestant:
    """This script in a process of its own (or in several that share the work), idle until it is told to run.

    Arguments:
        setting: for the script's `--contestant`, which calls `compete`.
        processes: as a launcher starts them, with one thread each; None for one with all threads.
    """

    def __init__(self, setting: Mapping[str, Any], processes: int | None = None) -> None:
        words = [sys.executable, sys.argv[0], "--contestant", json.dumps(setting)]
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
        if processes is not None:
            environment["OMP_NUM_THREADS"] = "1"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = []
        for rank in range(processes or 1):
            values = map(str, (rank, rank, processes, processes, "127.0.0.1", port))
            own = dict(zip(LAUNCHER, values, strict=True)) if (processes or 1) > 1 else {}
            first = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            self.processes.append(
                subprocess.Popen(words, env={**environment, **own}, stdin=first, stdout=first, text=True)
            )
        self.rounds: list[float] = []
        """Seconds of a run, the median of each turn."""
        self._facts: dict[str, Any] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What it said of itself when it was ready."""
        if self._facts is None:
            self._facts = self._heard()
        return self._facts

    def _heard(self) -> Any:
        stdout = self.processes[0].stdout
        assert stdout is not None
        if not (line := stdout.readline()):
            for process in self.processes:
                process.kill()
            raise SystemExit("a contestant failed")
        return json.loads(line)

    def go(self, runs: int = 1, *, timed: bool = True) -> None:
        """Run so often."""
        _ = self.facts
        stdin = self.processes[0].stdin
        assert stdin is not None
        stdin.write(f"{runs}\n")
        stdin.flush()
        taken = median(self._heard())
        if timed:
            self.rounds.append(taken)

    def end(self) -> dict[str, Any]:
        """Let it go; what it says at its end."""
        stdin = self.processes[0].stdin
        assert stdin is not None
        stdin.close()
        found = self._heard()
        for process in self.processes:
            process.wait()
        return found

    @property
    def seconds(self) -> float:
        """Of a run, the median of all turns."""
        return median(self.rounds)


def compete(
    run: Callable[[], Any],
    device: torch.device,
    facts: Mapping[str, Any],
    end: Callable[[], dict[str, Any]] = dict,
    peers: Alone | None = None,
) -> None:
    """A contestant's side: say the facts, answer each number of runs with their seconds, say the end."""
    peers = peers or Alone()
    if peers.first:
        print(json.dumps(facts), flush=True)
    while runs := peers.tell(int(sys.stdin.readline() or 0) if peers.first else 0):
        seconds = [clock(run, device) for _ in range(runs)]
        if peers.first:
            print(json.dumps(seconds), flush=True)
    if peers.first:
        print(json.dumps(end()), flush=True)


def take_turns(
    contestants: Sequence[Contestant], rounds: int, runs: int = 1, between: Callable[[], None] | None = None
) -> None:
    """Some rounds in which each runs; before them some that do not count, after each what is to be done between."""
    for one in contestants:
        one.go(runs, timed=False)
    for _ in range(rounds):
        for one in contestants:
            one.go(runs)
        if between is not None:
            between()


def paired(one: Contestant, other: Contestant) -> float:
    """How many times as long one takes as the other: the median of the rounds' ratios."""
    return median(a / b for a, b in zip(one.rounds, other.rounds, strict=True))
