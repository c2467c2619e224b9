"""How long data take to load, first and again, and how much memory: `python benchmarks/loading.py --json loading.json`.

Made-up photographs (10,000 JPEG files of 128 pixels, brought to 64) and, with --parquet, the images of a Parquet file.
A second start is a whole `introvae fit`, from the call to its first step. Each case is a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Contestant, compete, parser, peak_bytes, progress, report
from PIL import Image

import introvae


def contestant(setting: dict[str, Any]) -> None:
    """Load once, and say what it took."""
    begun = time.perf_counter()
    data: Any = introvae.load_data(setting["source"], introvae.DataOptions(size=setting["size"]))
    seconds, peak = time.perf_counter() - begun, peak_bytes()
    size = sum(part.x.numel() for part in (data.train, data.heldout))
    facts = {
        "images": len(data.train) + len(data.heldout),
        "seconds": round(seconds, 2),
        "data_bytes": size,
        "peak_bytes": peak,
        "within_1.5_data_plus_1_GiB": peak < 1.5 * size + 2**30,
    }
    compete(lambda: None, torch.device("cpu"), facts)


def load(source: Path, size: int | None) -> dict[str, Any]:
    one = Contestant({"source": str(source), "size": size})
    found = one.facts
    one.end()
    return found


def start(source: Path, folder: Path) -> dict[str, object]:
    """Seconds from the call of `introvae fit` to its first step."""
    words = ["fit", "--data", str(source), "--size", "64", "--steps", "1", "--log_every", "1", "--out", str(folder)]
    begun = time.perf_counter()
    process = subprocess.Popen([Path(sys.executable).parent / "introvae", *words], stdout=subprocess.DEVNULL)
    log = folder / "log.jsonl"
    while not (log.is_file() and '"phase"' in log.read_text()):
        time.sleep(0.005)
        if process.poll() not in (None, 0):
            raise SystemExit("introvae fit failed")
    seen = time.perf_counter() - begun
    process.wait()
    step = next(json.loads(line)["seconds"] for line in log.read_text().splitlines() if '"phase"' in line)
    return {"seconds_to_first_step": round(seen - step, 2), "seconds_of_first_step": step}


def photographs(folder: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for index in range(count):
        small = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))
        small.resize((128, 128), Image.Resampling.BICUBIC).save(folder / f"{index:05d}.jpg", quality=90)
    return folder


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--parquet", type=Path, help="a Parquet file of images")
    options.add_argument("--count", type=int, help="how many JPEG files (default: 10000; short: 1000)")
    own = options.parse_args()
    if own.contestant:
        return contestant(own.contestant)
    cases = []

    def case(name: str, **found: object) -> None:
        cases.append({"case": name, "device": "cpu", **found})
        progress(f"{name}: {found}")

    with tempfile.TemporaryDirectory() as temporary:
        os.environ["INTROVAE_CACHE"] = f"{temporary}/cache"
        folder = photographs(Path(temporary, "photographs"), own.count or (1000 if own.short else 10_000))
        case("folder of JPEG files, first load", **load(folder, 64))
        case("folder of JPEG files, second load", **load(folder, 64))
        case("folder of JPEG files, second start of fit", **start(folder, Path(temporary, "run")))
        if own.parquet:
            case(f"{own.parquet.parent.name}/{own.parquet.name}, first load", **load(own.parquet, None))
            case(f"{own.parquet.parent.name}/{own.parquet.name}, second load", **load(own.parquet, None))
    return report(cases, own.json)


if __name__ == "__main__":
    main()
