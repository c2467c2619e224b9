"""What the loop costs around its steps, and how fast inputs come: `python benchmarks/loop.py --json loop.json`.

The loop: the default settings at CIFAR-10's size (conv at the published widths, batch 32) on made-up images. The parts
are timed in a run that logs, saves and draws far more often, then added up at the default intervals.
Input: images of 32 px from a memory-mapped file, as the cache keeps them, through the loop's own `Feed`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from introvae import FitConfig, from_array
from introvae.data.arrays import ArrayBatches
from introvae.machine import hardware, versions
from introvae.training.feed import Feed
from introvae.training.loop import Trainer
from introvae.training.run import Run


def timed(owner: Any, name: str, seconds: dict[str, list[float]]) -> None:
    """Let `owner.name` note how long each call takes."""
    call: Callable[..., Any] = getattr(owner, name)

    def wrapped(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*args, **options)
        finally:
            seconds.setdefault(name, []).append(time.perf_counter() - start)

    setattr(owner, name, wrapped)


class TimedStep:
    """A step that notes how long each call takes."""

    def __init__(self, step: Any, seconds: list[float]) -> None:
        self.__dict__.update(step=step, seconds=seconds)

    def __call__(self, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        found = self.step(*args, **options)
        self.seconds.append(time.perf_counter() - start)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.step, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.step, name, value)


def loop(folder: Path, steps: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    data = from_array(torch.randint(0, 256, (4000, 3, 32, 32), dtype=torch.uint8))
    default = FitConfig()
    config = FitConfig(batch_size=32, steps=steps, log_every=5, checkpoint_every=10, image_every=10)
    trainer = Trainer(config, data)
    seconds: dict[str, list[float]] = {"step": []}
    trainer.step = TimedStep(trainer.step, seconds["step"])  # pyright: ignore
    for owner, name in (
        (trainer.average, "update"),
        (trainer.feed, "next"),
        (trainer, "_log"),
        (trainer, "_save"),
        (trainer, "_picture"),
        (trainer, "_one_step"),
    ):
        timed(owner, name, seconds)
    moments: list[float] = []
    one_step = trainer._one_step
    trainer._one_step = lambda: (moments.append(time.perf_counter()), one_step())[1]  # pyright: ignore
    trainer.train(Run.create(folder / "run", trainer.config), progress=True)
    # From the start of one step to that of the next, where nothing was logged, saved or drawn in between.
    between = [after - before for index, (before, after) in enumerate(pairwise(moments), 1) if index % config.log_every]
    each = {name: 1000 * median(times) for name, times in seconds.items()}
    around = {
        "EMA": each["update"],
        "waiting for input": each["next"],
        "log": each["_log"] / default.log_every,
        "checkpoint": each["_save"] / default.checkpoint_every,
        "picture": each["_picture"] / default.image_every,
        "rest of the step's call": max(0.0, each["_one_step"] - each["step"] - each["update"] - each["next"]),
        "rest of the loop": max(0.0, 1000 * median(between) - each["_one_step"]),
    }
    row = {
        "case": "loop at CIFAR-10's size, batch 32, default settings",
        "device": str(trainer.device),
        "precision": trainer.precision,
        "step_ms": round(each["step"], 2),
        **{f"{name}_ms": round(value, 3) for name, value in around.items()},
        "around_share": round(sum(around.values()) / (each["step"] + sum(around.values())), 4),
        "waiting_share": round(each["next"] / each["_one_step"], 5),
        "one_checkpoint_ms": round(each["_save"], 1),
        "one_picture_ms": round(each["_picture"], 1),
    }
    print(row, flush=True)
    return [row]


def anonymous_bytes() -> int | None:
    """Memory that is not a mapped file's, where the system tells."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return None


def feed(folder: Path, count: int, batch: int) -> list[dict[str, Any]]:
    path = folder / "pixels.bin"
    shape = (count, 3, 32, 32)
    written = np.memmap(path, np.uint8, mode="w+", shape=shape)
    written[:] = np.random.default_rng(0).integers(0, 256, (1000, 3, 32, 32), dtype=np.uint8).repeat(count // 1000, 0)
    written.flush()
    del written
    before = anonymous_bytes()
    x = torch.from_numpy(np.memmap(path, np.uint8, mode="c", shape=shape))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = Feed(ArrayBatches(x, batch, 0), 128, 0, device, slice(0, batch), flip=True)
    with inputs:
        for _ in range(20):
            inputs.next()
        start = time.perf_counter()
        rounds = 40_000 // batch
        for _ in range(rounds):
            inputs.next()
        seconds = time.perf_counter() - start
    after = anonymous_bytes()
    row = {
        "case": f"inputs of 32 px from a mapped file of {x.numel() / 1e6:.0f} MB, flipped, batch {batch}",
        "device": str(device),
        "precision": "float32",
        "images_per_second": round(rounds * batch / seconds),
        "memory_mb": None if before is None or after is None else round((after - before) / 1e6, 1),
    }
    print(row, flush=True)
    return [row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--steps", type=int, default=40, help="length of the timed run (default: 40)")
    own = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        cases = loop(Path(temporary), own.steps)
        for batch in (32, 256):
            cases += feed(Path(temporary), 400_000, batch)
    result = {
        "machine": dict(hardware()),
        "versions": dict(versions()),
        "date": time.strftime("%Y-%m-%d"),
        "cases": cases,
    }
    if own.json:
        own.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
