"""How long data take to load, first and again, and how much memory: `python benchmarks/loading.py --json loading.json`.

Made-up photographs (10,000 JPEG files of 128 pixels, brought to 64) and, with --parquet, the images of a Parquet file.
A second start is a whole `introvae fit`, from the call to its first step. Each case is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from introvae.machine import hardware, versions

LOAD = """
import json, resource, sys, time
import introvae
start = time.perf_counter()
data = introvae.load_data(sys.argv[1], introvae.DataOptions(size=int(sys.argv[2]) or None))
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
size = sum(part.x.numel() for part in (data.train, data.heldout))
print(json.dumps({"images": len(data.train) + len(data.heldout), "seconds": round(seconds, 2), "data_bytes": size,
    "peak_bytes": peak, "within_1.5_data_plus_1_GiB": peak < 1.5 * size + 2**30}))
"""


def load(source: Path, size: int) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(source), str(size)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--parquet", type=Path, help="a Parquet file of images")
    parser.add_argument("--count", type=int, default=10_000, help="how many JPEG files (default: 10000)")
    own = parser.parse_args()
    cases = []

    def case(name: str, **found: object) -> None:
        cases.append({"case": name, "device": "cpu", **found})
        print(name, found, flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        os.environ["INTROVAE_CACHE"] = f"{temporary}/cache"
        folder = photographs(Path(temporary, "photographs"), own.count)
        case("folder of JPEG files, first load", **load(folder, 64))
        case("folder of JPEG files, second load", **load(folder, 64))
        case("folder of JPEG files, second start of fit", **start(folder, Path(temporary, "run")))
        if own.parquet:
            case(f"{own.parquet.parent.name}/{own.parquet.name}, first load", **load(own.parquet, 0))
            case(f"{own.parquet.parent.name}/{own.parquet.name}, second load", **load(own.parquet, 0))
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
