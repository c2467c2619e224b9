"""How long one training step takes, against the papers' pseudo-code: `python benchmarks/step.py --json step.json`.

Textbook: Algorithm 1 of Soft-IntroVAE as tests/textbook.py writes it (the code that the tests hold our gradients
against), with the published gamma_r of 1e-8: everything computed anew in each phase, in float32, with torch's Adam,
torch's defaults (on a GPU also those about TF32) and the process' memory as they come. Ours: `IntrospectiveStep` on
the same networks, data and noise. Each is a process of its own, since the setting of the memory is the process'; they
take turns, so that what else the machine does hits all. Times are medians of the rounds, the ratio is the median of
the rounds' ratios. The share is that of our step's own FLOPs (the textbook's extra passes are none of them) per
second in the rate of a plain product of matrices in the same precision, measured between the rounds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import (
    Contestant,
    compete,
    counted_flops,
    device_option,
    matrix_rate,
    paired,
    parser,
    progress,
    report,
    take_turns,
)

from introvae import IntrospectiveStep, IntrospectiveVAE, IntroVAE, Noise, SoftIntroVAE
from introvae.capture import CapturedStep
from introvae.machine import keep_freed_memory
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
POINTS = {"shape": [2], "batch": 512, "network": "mlp", "latent_dim": 2}
DIGITS = {"shape": [1, 8, 8], "batch": 64, "network": "mlp", "latent_dim": 32, "options": {"hidden": 512}}
MNIST = {"shape": [1, 28, 28], "batch": 64}
CIFAR = {"shape": [3, 32, 32], "batch": 32}
LARGER = {"shape": [3, 128, 128], "batch": 64, "latent_dim": 256}


def contestant(setting: dict[str, Any]) -> None:
    with keep_freed_memory() if setting.pop("keep") else nullcontext():
        run = runner(**setting)
        flops = counted_flops(run) if setting["kind"] == "ours" else None
        compete(run, torch.device(setting["device"]), {"flops": flops})


def runner(
    shape: list[int],
    batch: int,
    kind: str,
    *,
    device: str,
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
        return lambda: textbook.update(*players, optimizers, x, noise, losses, official=True, real_again=False)
    chosen = SoftIntroVAE(**SOFT) if objective == "SoftIntroVAE" else IntroVAE(**HINGE)
    captured = compile == "cudagraph"
    step: Any = IntrospectiveStep(model, chosen, lr=2e-4, precision=precision, capturable=captured)
    step = CapturedStep(step) if captured else step
    values = {name: x.new_tensor(value) for name, value in chosen.values().items()}

    def ours() -> None:
        with float32_multiplications(tf32=precision == "tf32"):
            step(x, noise, values)

    return ours


def kinds(device: torch.device, shape: list[int], short: bool) -> dict[str, dict[str, Any]]:
    """The ways to take our step that are compared (precision, compilation, memory)."""
    precision = pick_precision("auto", device, tuple(shape))
    if device.type != "cuda":
        found: dict[str, dict[str, Any]] = {"equal gradients": {}}
        if device.type == "cpu" and not short:
            found["equal gradients, memory as it comes"] = {"keep": False}
        return found if precision == "float32" else {**found, "default": {"precision": precision}}
    found = {
        "eager": {"precision": precision},
        "captured": {"precision": precision, "compile": "cudagraph"},
    }
    if len(shape) == 3 and not short:
        found["captured, TF32"] = {"precision": "tf32", "compile": "cudagraph"}
    return found


def case(
    name: str, device: torch.device, ways: dict[str, dict[str, Any]], *, rounds: int, runs: int = 1, **setting: Any
) -> list[dict[str, Any]]:
    """Textbook against ours, in turns of some steps."""
    shared = {"device": str(device), **setting}
    plain = Contestant({"kind": "textbook", "keep": False, **shared})
    ours = {way: Contestant({"kind": "ours", "keep": True, **own, **shared}) for way, own in ways.items()}
    rates: dict[str, list[float]] = {own.get("precision", "float32"): [] for own in ways.values()}

    def measure() -> None:
        for precision, found in rates.items():
            found.append(matrix_rate(device, precision))

    take_turns([plain, *ours.values()], rounds, runs, measure)
    plain.end()
    rows = []
    for way, one in ours.items():
        one.end()
        precision = ways[way].get("precision", "float32")
        rate = median(rates[precision])
        row = {
            "case": f"{name}, {way}",
            "device": str(device),
            "precision": precision,
            "compile": ways[way].get("compile", "none"),
            "textbook_ms": round(1000 * plain.seconds, 2),
            "ours_ms": round(1000 * one.seconds, 2),
            "ratio": round(paired(plain, one), 2),
            "matrix_gflops": round(rate / 1e9),
            "gflops_share": round(one.facts["flops"] / one.seconds / rate, 3),
        }
        progress(f"{row['case']}: {row['ratio']}")
        rows.append(row)
    return rows


def all_cases(device: torch.device, rounds: int, short: bool) -> list[dict[str, Any]]:
    runs, few = 1 if device.type == "cpu" else 10, max(3, rounds // 3)
    rows = []

    def add(name: str, rounds: int, runs: int, **setting: Any) -> None:
        rows.extend(case(name, device, kinds(device, setting["shape"], short), rounds=rounds, runs=runs, **setting))

    add("MLP 3 x 256, 2D, batch 512", rounds, 30, **POINTS)
    if not short:
        add("MLP 3 x 512, digits, batch 64", rounds, 30, **DIGITS)
    add("conv MNIST, batch 64", rounds, runs, **MNIST)
    add("conv CIFAR-10, batch 32", rounds, runs, **CIFAR)
    if not short:
        add("conv CIFAR-10, batch 256", few, runs, **{**CIFAR, "batch": 256})
        add("conv CIFAR-10, batch 32, batch norm", rounds, runs, **CIFAR, options={"norm": "batch"})
        add("conv CIFAR-10, batch 32, IntroVAE", rounds, runs, **CIFAR, objective="IntroVAE")
    if device.type == "cuda" and not short:
        way = {"eager": {"precision": pick_precision("auto", device, (3, 128, 128))}}
        rows.extend(case("conv 128 px, batch 64", device, way, rounds=few, runs=runs, **LARGER))
    return rows


def main() -> None:
    options = parser(__doc__)
    device_option(options)
    options.add_argument("--rounds", type=int, help="timed rounds (default: 9; short: 3)")
    own = options.parse_args()
    if own.contestant:
        return contestant(own.contestant)
    rounds = own.rounds or (3 if own.short else 9)
    return report(all_cases(own.device, rounds, own.short), own.json)


if __name__ == "__main__":
    main()
