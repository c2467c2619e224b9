"""Whether bf16 costs quality: `python benchmarks/precision.py --data FOLDER --json precision.json`.

Trains every seed in float32 and in bf16 with one recipe, measures each run as `introvae evaluate` does, and compares
the difference of the means with the spread of the float32 seeds. Resumable: what is in --out is not done again.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from common import parser, progress, report

from introvae import Run, evaluate, fit

KINDS = ("float32", "bf16")


def measured(data: str, steps: int, seed: int, precision: str, out: Path) -> dict[str, Any]:
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
    return {**found, "seconds": run.log()[-1]["seconds"], "device": run.events("start")[-1]["device"]}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", default="digits", help="as introvae fit takes it (default: digits)")
    options.add_argument("--steps", type=int, help="default: 2000; short: 20")
    options.add_argument("--seeds", type=int, help="default: 3; short: 2")
    options.add_argument("--out", type=Path, help="default: runs/precision; short: runs/precision-short")
    own = options.parse_args()
    steps, seeds = own.steps or (20 if own.short else 2000), own.seeds or (2 if own.short else 3)
    out = own.out or Path("runs/precision-short" if own.short else "runs/precision")
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for seed in range(seeds):
        for kind in KINDS:
            runs[kind].append(measured(own.data, steps, seed, kind, out))
            progress(f"{kind}, seed {seed}: {runs[kind][-1]}")
    cases: list[dict[str, Any]] = []
    devices = sorted({run.pop("device") for kind in KINDS for run in runs[kind]})
    for name in runs["float32"][0]:
        values = {kind: [run[name] for run in runs[kind]] for kind in KINDS}
        spread = max(values["float32"]) - min(values["float32"])
        difference = mean(values["bf16"]) - mean(values["float32"])
        case = {"case": name, "device": " and ".join(devices), **values}
        case |= {"difference": difference, "spread_float32": spread}
        cases.append(case if name == "seconds" else {**case, "inside": abs(difference) <= spread})
    report(cases, own.json, setting={"data": Path(own.data).name, "steps": steps, "seeds": seeds})


if __name__ == "__main__":
    main()
