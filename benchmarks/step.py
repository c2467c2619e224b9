"""How long one training step takes, against the papers' pseudo-code: `python benchmarks/step.py --json step.json`.

Textbook: Algorithm 1 of Soft-IntroVAE as tests/textbook.py writes it (the code that the tests hold our gradients
against), with the published gamma_r of 1e-8: everything computed anew in each phase, float32, torch's Adam and the
process' memory as they come. Ours: `IntrospectiveStep` on the same networks, data and noise. Each is a process of its
own; they take turns, so that what else the machine does hits all; times are medians of single steps.
On a GPU the cases of the published CIFAR-10 settings and the share of the matrix rate are added.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch

from introvae import IntrospectiveStep, IntrospectiveVAE, IntroVAE, Noise, SoftIntroVAE
from introvae.capture import CapturedStep
from introvae.machine import hardware, keep_freed_memory, versions
from introvae.precision import float32_multiplications, pick_precision

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import textbook

SOFT = {"beta_rec": 1.0, "beta_kl": 1.0, "beta_neg": 256.0}
HINGE = {"beta": 0.1, "alpha": 0.25, "margin": 20.0}
# gamma_r as published: its terms change the gradients by 5e-9, so that ours leave them out and are still called equal.
PSEUDO_CODE = {
    "SoftIntroVAE": textbook.soft_introvae(**SOFT, gamma_r=1e-8, variant="official_code"),
    "IntroVAE": textbook.introvae(**HINGE),
}
GPU = torch.device("cuda") if torch.cuda.is_available() else None

LARGE = """
import json, resource, sys, time
import torch
from introvae import IntrospectiveStep, IntrospectiveVAE, SoftIntroVAE
from introvae.networks import use_gradient_checkpointing
precision, forget = sys.argv[1], sys.argv[2] == "True"
torch.manual_seed(0)
model = IntrospectiveVAE.build((3, 1024, 1024), "conv", 512)
if forget:
    use_gradient_checkpointing(model.encoder)
    use_gradient_checkpointing(model.decoder)
step = IntrospectiveStep(model, SoftIntroVAE(), precision=precision)
x = torch.rand(1, 3, 1024, 1024)
step(x)
start = time.perf_counter()
step(x)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"seconds": round(seconds, 2), "peak_gib": round(peak, 2)}))
"""


def finish() -> None:
    if GPU is not None:
        torch.cuda.synchronize()


class Contestant:
    """A process of its own that takes one step whenever it is told to: with its own memory, and idle in between."""

    def __init__(self, **setting: Any) -> None:
        words = [sys.executable, __file__, "--contestant", json.dumps(setting)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seconds: list[float] = []

    def go(self, count: int) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            raise SystemExit("a contestant failed")
        self.seconds += json.loads(line)

    def milliseconds(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        return round(1000 * median(self.seconds), 2)


def contestant(setting: dict[str, Any]) -> None:
    """Answer each number of steps on standard input with their times."""
    with keep_freed_memory() if setting.pop("keep") else nullcontext():
        run = runner(**setting)
        for line in sys.stdin:
            seconds = []
            for _ in range(int(line)):
                finish()
                start = time.perf_counter()
                run()
                finish()
                seconds.append(time.perf_counter() - start)
            print(json.dumps(seconds), flush=True)


def runner(
    shape: list[int],
    batch: int,
    kind: str,
    *,
    device: str = "cpu",
    network: str = "conv",
    latent_dim: int = 128,
    objective: str = "SoftIntroVAE",
    options: dict[str, Any] | None = None,
    precision: str = "float32",
    compile: str = "none",
) -> Callable[[], Any]:
    """One step of the textbook or of ours, on the same networks, data and noise."""
    torch.manual_seed(0)
    model = IntrospectiveVAE.build(tuple(shape), network, latent_dim, **(options or {})).to(device)
    x, noise = torch.rand(batch, *shape, device=device), Noise.draw(batch, latent_dim, device=device)
    if kind == "textbook":
        players = (model.encoder, model.decoder)
        optimizers = (
            torch.optim.Adam(players[0].parameters(), lr=2e-4),
            torch.optim.Adam(players[1].parameters(), lr=2e-4),
        )
        losses = PSEUDO_CODE[objective]

        def plain() -> None:
            with float32_multiplications(tf32=False):
                textbook.update(*players, optimizers, x, noise, losses, official=True, real_again=False)

        return plain
    chosen = SoftIntroVAE(**SOFT) if objective == "SoftIntroVAE" else IntroVAE(**HINGE)
    captured = compile == "cudagraph"
    step: Any = IntrospectiveStep(model, chosen, lr=2e-4, precision=precision, capturable=captured)
    step = CapturedStep(step) if captured else step
    values = {name: x.new_tensor(value) for name, value in chosen.values().items()}

    def ours() -> None:
        with float32_multiplications(tf32=precision != "float32"):
            step(x, noise, values)

    return ours


def case(
    name: str, kinds: dict[str, dict[str, Any]], *, rounds: int, steps: int = 1, **setting: Any
) -> list[dict[str, Any]]:
    """Textbook against `kinds` (precision, compilation, memory), in turns of some steps."""
    textbooks = Contestant(kind="textbook", keep=False, **setting)
    contestants = {kind: Contestant(kind="ours", **{"keep": True, **own}, **setting) for kind, own in kinds.items()}
    everybody = [textbooks, *contestants.values()]
    for turn in range(rounds + 1):
        for one in everybody:
            one.go(max(2, steps) if turn == 0 else steps)
            if turn == 0:
                one.seconds.clear()
    plain = textbooks.milliseconds()
    rows = []
    for kind, one in contestants.items():
        milliseconds = one.milliseconds()
        row = {
            "case": f"{name}, {kind}",
            "device": setting.get("device", "cpu"),
            "precision": kinds[kind].get("precision", "float32"),
            "compile": kinds[kind].get("compile", "none"),
            "textbook_ms": plain,
            "ours_ms": milliseconds,
            "ratio": round(plain / milliseconds, 2),
        }
        print(row, flush=True)
        rows.append(row)
    return rows


def against_textbook(rounds: int) -> list[dict[str, Any]]:
    precision = pick_precision("auto", torch.device("cpu"), (3, 32, 32))
    kinds: dict[str, dict[str, Any]] = {"equal gradients": {}, "equal gradients, memory as it comes": {"keep": False}}
    both = {**kinds, "default": {"precision": precision}} if precision != "float32" else kinds
    digits = {"shape": [1, 8, 8], "batch": 64, "network": "mlp", "latent_dim": 32, "options": {"hidden": 512}}
    mnist, cifar = {"shape": [1, 28, 28], "batch": 64}, {"shape": [3, 32, 32], "batch": 32}
    points = {"shape": [2], "batch": 512, "network": "mlp", "latent_dim": 2}
    return [
        *case("MLP 3 x 256, 2D, batch 512", kinds, rounds=rounds, steps=30, **points),
        *case("MLP 3 x 512, digits, batch 64", both, rounds=rounds, steps=30, **digits),
        *case("conv MNIST, batch 64", both, rounds=rounds, **mnist),
        *case("conv CIFAR-10, batch 32", both, rounds=rounds, **cifar),
        *case("conv CIFAR-10, batch 32, batch norm", both, rounds=rounds, **cifar, options={"norm": "batch"}),
        *case("conv CIFAR-10, batch 32, IntroVAE", both, rounds=rounds, **cifar, objective="IntroVAE"),
    ]


def alternate(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, run in runs.items():
            finish()
            start = time.perf_counter()
            run()
            finish()
            if turn > 1:
                seconds[name].append(time.perf_counter() - start)
    return {name: round(1000 * median(times), 2) for name, times in seconds.items()}


def per_pixel(rounds: int) -> list[dict[str, Any]]:
    """The same channels at 64 px and at 256 px, as many pixels in a batch, blocks down to the same 4 px."""
    runs, sizes = {}, {64: (16, 4), 256: (1, 6)}
    precision = pick_precision("auto", torch.device("cpu"), (3, 64, 64))
    for side, (batch, halvings) in sizes.items():
        options = {"channels": [64] * halvings}
        runs[str(side)] = runner([3, side, side], batch, "ours", options=options, precision=precision)
    with keep_freed_memory():
        found = alternate(runs, rounds)
    row = {
        "case": "conv, 64 channels at all resolutions, 65,536 pixels: 256 px against 64 px",
        "device": "cpu",
        "precision": precision,
        "ms_64": found["64"],
        "ms_256": found["256"],
        "ratio": round(found["256"] / found["64"], 3),
    }
    print(row, flush=True)
    return [row]


def large() -> list[dict[str, Any]]:
    """A step at 1024 px, batch 1, in a process of its own, and its largest memory."""
    rows = []
    precision = pick_precision("auto", torch.device("cpu"), (3, 64, 64))
    for forget in (True, False):
        words = [sys.executable, "-c", LARGE, precision, str(forget)]
        found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        kept = "gradient checkpointing" if forget else "everything kept"
        row = {"case": f"conv 1024 px, batch 1, {kept}", "device": "cpu", "precision": precision, **found}
        print(row, flush=True)
        rows.append(row)
    return rows


def matrix_rate(side: int = 8192) -> float:
    """bf16 multiply-adds of large matrices, in FLOP/s."""
    a = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
    found = alternate({"matmul": lambda: a @ a}, 20)
    return 2 * side**3 / (found["matmul"] / 1000)


def on_gpu() -> list[dict[str, Any]]:
    from torch.utils.flop_counter import FlopCounterMode

    kinds = {
        "eager": {"precision": "bf16"},
        "captured": {"precision": "bf16", "compile": "cudagraph"},
        "captured, TF32": {"precision": "tf32", "compile": "cudagraph"},
    }
    rows = []
    for batch in (32, 256):
        setting = {"shape": [3, 32, 32], "batch": batch, "device": "cuda"}
        rows += case(f"conv CIFAR-10, batch {batch}", kinds, rounds=10, steps=10, **setting)
    flat = {"eager": {}, "captured": {"compile": "cudagraph"}}
    points = {"shape": [2], "batch": 512, "network": "mlp", "latent_dim": 2, "device": "cuda"}
    rows += case("MLP 3 x 256, 2D, batch 512", flat, rounds=10, steps=30, **points)
    run = runner([3, 128, 128], 64, "ours", device="cuda", latent_dim=256, precision="bf16")
    with FlopCounterMode(display=False) as counted:
        run()
    milliseconds, rate = alternate({"step": run}, 10)["step"], matrix_rate()
    share = counted.get_total_flops() / (milliseconds / 1000) / rate
    row = {
        "case": "conv 128 px, batch 64: share of the measured bf16 matrix rate",
        "device": "cuda",
        "precision": "bf16",
        "ours_ms": milliseconds,
        "matrix_tflops": round(rate / 1e12, 1),
        "share": round(share, 3),
    }
    print(row, flush=True)
    return [*rows, row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of the slow cases (default: 9)")
    parser.add_argument("--contestant", type=json.loads, help=argparse.SUPPRESS)
    own = parser.parse_args()
    if own.contestant:
        return contestant(own.contestant)
    cases = against_textbook(own.rounds) + per_pixel(own.rounds) + large()
    if GPU is not None:
        cases += on_gpu()
    result = {
        "machine": dict(hardware()),
        "versions": dict(versions()),
        "date": time.strftime("%Y-%m-%d"),
        "cases": cases,
    }
    if own.json:
        own.json.write_text(json.dumps(result, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
