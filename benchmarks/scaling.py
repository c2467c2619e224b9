"""What large images and a second process cost and bring: `python benchmarks/scaling.py --json scaling.json`.

Sides: conv with 32 channels at every resolution, blocks down to 4 px, 65,536 pixels in a batch up to 256 px and one
image above, gradient checkpointing from 512 px on. Each size is a process of its own that keeps freed memory, as
training does; they take turns, so that the cost per pixel can be compared with that at 64 px (median of the rounds'
ratios). Memory is the process' largest (on a GPU: torch's), libraries included; base is that before the first step.
Published widths at 1024 px: with and without checkpointing.
Processes: conv at MNIST's size, a batch of 64 shared by one or two processes of one thread each, on the CPU.
The share is that of all FLOPs (those that checkpointing does twice too) per second in the rate of a plain product of
matrices in the same precision on as many threads, measured between the rounds.
"""

from __future__ import annotations

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
    peak_bytes,
    progress,
    report,
    take_turns,
)

from introvae import IntrospectiveStep, IntrospectiveVAE, SoftIntroVAE
from introvae.machine import keep_freed_memory
from introvae.networks import use_gradient_checkpointing
from introvae.parallel import processes
from introvae.precision import float32_multiplications, pick_precision

CHANNELS = 32
PIXELS = 65_536
CHECKPOINTING = 512
"""From this side on."""


def contestant(setting: dict[str, Any]) -> None:
    device, peers = torch.device(setting["device"]), processes("cpu")
    precision, rows = setting["precision"], peers.rows(setting["batch"])
    base = peak_bytes()
    torch.manual_seed(0)
    model = IntrospectiveVAE.build(tuple(setting["shape"]), "conv", setting["latent_dim"], **setting["options"])
    model.to(device)
    if setting["checkpointing"]:
        use_gradient_checkpointing(model.encoder)
        use_gradient_checkpointing(model.decoder)
    step = IntrospectiveStep(model, SoftIntroVAE(), precision=precision, peers=peers)
    x = torch.rand(setting["batch"], *setting["shape"])[rows].to(device)

    def peak() -> dict[str, Any]:
        return {"peak": torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_bytes()}

    with keep_freed_memory(), float32_multiplications(tf32=precision == "tf32"):
        flops = peers.count * counted_flops(lambda: step(x))
        compete(lambda: step(x), device, {"flops": flops, "base": base}, peak, peers)


def conv(side: int, device: torch.device) -> dict[str, Any]:
    """The setting of one side."""
    return {
        "shape": [3, side, side],
        "batch": max(1, PIXELS // side**2),
        "latent_dim": 128,
        "options": {"channels": [CHANNELS] * (side.bit_length() - 3)},
        "checkpointing": side >= CHECKPOINTING,
        "device": str(device),
        "precision": pick_precision("auto", device, (3, side, side)),
    }


def measured(settings: list[dict[str, Any]], rounds: int) -> tuple[list[Contestant], list[dict[str, Any]]]:
    """The contestants after their turns, and what is common to all rows."""
    device = torch.device(settings[0]["device"])
    contestants = [Contestant(setting, setting.get("processes")) for setting in settings]
    kinds = [(setting["precision"], setting.get("processes")) for setting in settings]
    rates: dict[tuple[str, int | None], list[float]] = {kind: [] for kind in kinds}

    def measure() -> None:
        for (precision, threads), found in rates.items():
            found.append(matrix_rate(device, precision, threads=threads))

    take_turns(contestants, rounds, between=measure)
    rows = []
    for setting, one, kind in zip(settings, contestants, kinds, strict=True):
        peak, rate = one.end()["peak"], median(rates[kind])
        pixels = setting["batch"] * setting["shape"][1] * setting["shape"][2]
        row = {
            "device": setting["device"],
            "precision": setting["precision"],
            "batch": setting["batch"],
            "seconds_per_image": round(one.seconds / setting["batch"], 5),
            "ns_per_pixel": round(1e9 * one.seconds / pixels),
            "base_mb": round(one.facts["base"] / 1e6),
            "peak_mb": round(peak / 1e6),
            "matrix_gflops": round(rate / 1e9),
            "gflops_share": round(one.facts["flops"] / one.seconds / rate, 3),
        }
        progress(f"{setting['shape']}, {setting.get('processes') or 1} process(es): {row['seconds_per_image']} s")
        rows.append(row)
    return contestants, rows


def sides(device: torch.device, wanted: list[int], rounds: int) -> list[dict[str, Any]]:
    """From small to large images."""
    contestants, rows = measured([conv(side, device) for side in wanted], rounds)
    reference = contestants[wanted.index(64)]
    found = []
    for side, one, row in zip(wanted, contestants, rows, strict=True):
        pixels = row["batch"] * side**2 / PIXELS
        name = f"conv, {CHANNELS} channels, {side} px{', checkpointing' if side >= CHECKPOINTING else ''}"
        found.append({"case": name, **row, "per_pixel_of_64": round(paired(one, reference) / pixels, 3)})
    return found


def published(device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """The published widths at 1024 px, one after the other: together they might not fit."""
    found = []
    for checkpointing in (True, False):
        setting = {**conv(1024, device), "latent_dim": 512, "options": {}, "checkpointing": checkpointing}
        _, (row,) = measured([setting], rounds)
        found.append({"case": f"conv 1024 px{', checkpointing' if checkpointing else ', all kept'}", **row})
    return found


def shared(rounds: int) -> list[dict[str, Any]]:
    """The same batch by one and by two processes."""
    cpu, counts = torch.device("cpu"), (1, 2)
    mnist = {"shape": [1, 28, 28], "batch": 64, "options": {}, "precision": pick_precision("auto", cpu, (1, 28, 28))}
    contestants, rows = measured([{**conv(32, cpu), **mnist, "processes": count} for count in counts], rounds)
    return [
        {"case": f"conv MNIST, {count} process(es)", **row, "speedup": round(paired(contestants[0], one), 2)}
        for count, one, row in zip(counts, contestants, rows, strict=True)
    ]


def main() -> None:
    options = parser(__doc__)
    device_option(options)
    own = options.parse_args()
    if own.contestant:
        return contestant(own.contestant)
    cases = sides(own.device, [64, 256] if own.short else [32, 64, 128, 256, 512, 1024], 3 if own.short else 5)
    if not own.short:
        cases += published(own.device, 3)
    cases += shared(3 if own.short else 9)
    return report(cases, own.json)


if __name__ == "__main__":
    main()
