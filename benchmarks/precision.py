"""Whether bf16 costs quality: `python benchmarks/precision.py --data FOLDER --json precision.json`.

Trains every seed in float32 and in bf16 with one recipe, measures each run as `introvae evaluate` does, and compares
the difference of the means with the spread of the float32 seeds. Resumable: what is in --out is not done again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import mean
from typing import Any

from introvae import Run, evaluate, fit
from introvae.machine import hardware, versions

KINDS = ("float32", "bf16")


def measured(data: str, steps: int, seed: int, precision: str, out: Path) -> dict[str, float]:
    folder = out / f"{precision}-{seed}"
    if not (folder / "model" / "config.json").exists():
        if (folder / "config.yaml").exists():
            fit(resume=folder)
        else:
            fit(data=data, steps=steps, seed=seed, precision=precision, out=str(folder))
    run = Run.open(folder)
    if not run.report_path.exists():
        evaluate(folder)
    found = {name: entry["value"] for name, entry in run.report()["metrics"].items()}
    return {**found, "seconds": run.log()[-1]["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="as introvae fit takes it (default: digits)")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/precision"))
    parser.add_argument("--json", type=Path, help="where to write the results")
    own = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for seed in range(own.seeds):
        for kind in KINDS:
            runs[kind].append(measured(own.data, own.steps, seed, kind, own.out))
            print(kind, seed, runs[kind][-1], flush=True)
    cases: list[dict[str, Any]] = []
    for name in runs["float32"][0]:
        values = {kind: [run[name] for run in runs[kind]] for kind in KINDS}
        spread = max(values["float32"]) - min(values["float32"])
        difference = mean(values["bf16"]) - mean(values["float32"])
        case = {"case": name, "device": "cpu", **values, "difference": difference, "spread_float32": spread}
        cases.append(case if name == "seconds" else {**case, "inside": abs(difference) <= spread})
        print(cases[-1], flush=True)
    result = {
        "machine": dict(hardware()),
        "versions": dict(versions()),
        "date": time.strftime("%Y-%m-%d"),
        "setting": {"data": Path(own.data).name, "steps": own.steps, "seeds": own.seeds},
        "cases": cases,
    }
    if own.json:
        own.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
