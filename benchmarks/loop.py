"""What the loop costs around its steps: `python benchmarks/loop.py --json loop.json`.

The loop: the default settings at CIFAR-10's size (conv at the published widths, batch 32) on made-up images. The parts
are timed in a run that logs, saves and draws far more often, then added up at the default intervals. The share is that
of the step's FLOPs per second in the rate of a plain product of matrices in the same precision, before and after.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from common import counted_flops, finish, matrix_rate, parser, report

from introvae import FitConfig, from_array
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
    """A step that notes how long each call takes, until the device is done; in the first call its FLOPs."""

    def __init__(self, step: Any, device: torch.device, seconds: list[float]) -> None:
        self.__dict__.update(step=step, device=device, seconds=seconds, flops=0)

    def __call__(self, *args: Any, **options: Any) -> Any:
        if not self.flops:
            found: list[Any] = []
            self.__dict__["flops"] = counted_flops(lambda: found.append(self.step(*args, **options)))
            return found[0]
        finish(self.device)
        start = time.perf_counter()
        found = self.step(*args, **options)
        finish(self.device)
        self.seconds.append(time.perf_counter() - start)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.step, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.step, name, value)


def loop(folder: Path, steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    data = from_array(torch.randint(0, 256, (4000, 3, 32, 32), dtype=torch.uint8))
    default = FitConfig()
    config = FitConfig(batch_size=32, steps=steps, log_every=5, checkpoint_every=10, image_every=10)
    trainer = Trainer(config, data)
    seconds: dict[str, list[float]] = {"step": []}
    step = TimedStep(trainer.step, trainer.device, seconds["step"])
    trainer.step = step  # pyright: ignore
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
    rates = [matrix_rate(trainer.device, trainer.precision)]
    trainer.train(Run.create(folder / "run", trainer.config), progress=True)
    rates.append(matrix_rate(trainer.device, trainer.precision))
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
    return {
        "case": "loop at CIFAR-10's size, batch 32, default settings",
        "device": str(trainer.device),
        "precision": trainer.precision,
        "step_ms": round(each["step"], 2),
        **{f"{name}_ms": round(value, 3) for name, value in around.items()},
        "around_share": round(sum(around.values()) / (each["step"] + sum(around.values())), 4),
        "waiting_share": round(each["next"] / each["_one_step"], 5),
        "one_checkpoint_ms": round(each["_save"], 1),
        "one_picture_ms": round(each["_picture"], 1),
        "gflops_share": round(1000 * step.flops / each["step"] / mean(rates), 3),
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, help="length of the timed run (default: 40; short: 20)")
    own = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        case = loop(Path(temporary), own.steps or (20 if own.short else 40))
    report([case], own.json)


if __name__ == "__main__":
    main()
