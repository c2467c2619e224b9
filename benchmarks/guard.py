"""What the guard makes of faults put into a training: `python benchmarks/guard.py --json guard.json`.

8 Gaussians, Soft-IntroVAE, a small network. Every fault is put into ten runs (seeds), half-way: a NaN in one gradient;
the rate times 1000 for 50 steps; beta_neg set to 0.01, and to 1e5, for good. A run "recovered" when it came to its end
with as many of the 8 modes as the run of that seed without a fault (less half a mode, since the number is a mean of
five draws), "stopped" when it ended with a message that names the cause, "lost" when neither. Files on disk are looked
at for numbers that are not finite. Last, what guard and controller cost in a step. Resumable: what is in --out is not
done again.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import commit, parser, progress, report
from safetensors.torch import load_file

from introvae import DivergedError, FitConfig, Run, SoftIntroVAE, Warmup
from introvae.measures import measure
from introvae.training.checkpoint import list_checkpoints
from introvae.training.loop import Trainer

FAULTS = ("none", "gradient NaN", "rate x 1000 for 50 steps", "beta_neg 0.01", "beta_neg 1e5")


def config(steps: int, seed: int, guard: str = "act", beta_neg: Any = 0.9) -> FitConfig:
    """The run that faults are put into."""
    return FitConfig(
        data="density:8gaussians",
        objective=SoftIntroVAE(beta_rec=0.2, beta_kl=0.3, beta_neg=beta_neg),
        network="mlp",
        network_options={"hidden": 64, "waves": 32, "encoder_frequency": 0.2, "decoder_frequency": 0.5},
        batch_size=256,
        steps=steps,
        lr=1e-3,
        lr_schedule="cosine",
        lr_warmup=100,
        ema=0.998,
        warmup=Warmup(share=0.1, beta_rec=0.8, beta_kl=0.05),
        seed=seed,
        image_every=0,
        checkpoint_every=500,
        guard=guard,
        device="cpu",
    )


def put_in(fault: str, trainer: Trainer, at: int) -> None:
    """Let the fault happen at step `at`."""
    if fault == "gradient NaN":
        weight = next(trainer.model.decoder.parameters())
        weight.register_hook(lambda gradient: gradient * float("nan") if trainer.step_index == at else gradient)
    elif fault.startswith("rate"):
        usual = trainer.step.set_lr
        trainer.step.set_lr = lambda lr: usual(lr * 1000 if at <= trainer.step_index < at + 50 else lr)
    elif fault.startswith("beta_neg"):
        wanted, usual_update = float(fault.split()[1]), trainer.controller.update

        def update(step: int) -> dict[str, torch.Tensor]:
            if step == at:
                trainer.controller.multiply("beta_neg", wanted / 0.9)
            return usual_update(step)

        trainer.controller.update = update


def all_finite(run: Run) -> bool:
    """Whether every weight in the run's folder is finite."""
    states = [torch.load(path, weights_only=True) for path in list_checkpoints(run.checkpoints)]
    tensors = [t for state in states for part in (state["players"]["model"], state["average"]) for t in part.values()]
    if run.model_folder.exists():
        tensors += load_file(run.model_folder / "model.safetensors").values()
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def faulty(fault: str, steps: int, seed: int, guard: str) -> dict[str, Any]:
    """One run with the fault; what became of it."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config(steps, seed, guard))
        run = Run.create(Path(folder) / "run", trainer.config)
        put_in(fault, trainer, steps // 2)
        found: dict[str, Any] = {"modes": None, "within_3_sigma": None}
        try:
            trainer.train(run, progress=False)
            metrics = measure(trainer.averaged_model(), trainer.data)
            found = {"modes": metrics["modes"]["value"], "within_3_sigma": metrics["share_within_3_sigma"]["value"]}
            said = ""
        except DivergedError as error:
            said = str(error)
        events = [{name: event[name] for name in ("step", "cause", "change")} for event in run.events("guard")]
        return {"seed": seed, **found, "said": said, "guard": events, "finite": all_finite(run), "commit": commit()}


def end_of(run: dict[str, Any], without: dict[str, Any]) -> str:
    """What became of a run, beside the one without a fault."""
    if run["modes"] is None:
        return "stopped"
    return "recovered" if run["modes"] >= without["modes"] - 0.5 else "lost"


def summed_up(fault: str, guard: str, runs: list[dict[str, Any]], without: list[dict[str, Any]]) -> dict[str, Any]:
    """A line of the table."""
    ends = [end_of(run, other) for run, other in zip(runs, without, strict=True)]
    alive = [run["within_3_sigma"] for run, end in zip(runs, ends, strict=True) if end == "recovered"]
    return {
        "case": fault,
        "guard": guard,
        "runs": len(runs),
        **{end: ends.count(end) for end in ("recovered", "stopped", "lost")},
        "changes": sum(len([e for e in run["guard"] if e["change"]]) for run in runs) / len(runs),
        "within_3_sigma": sum(alive) / len(alive) if alive else None,
        "finite_on_disk": sum(run["finite"] for run in runs),
        "details": runs,
    }


def cost(steps: int) -> list[dict[str, Any]]:
    """Processor time of guard and controller as a share of a step's; an MLP in the plane has the shortest steps.

    The processor time of their own calls is added up, since what other processes do hardly touches that.
    """
    cases = []
    for beta_neg in (0.9, "auto"):
        trainer = Trainer(config(10_000, 0, "act", beta_neg))
        spent = dict.fromkeys(("guard", "controller"), 0)
        trainer.guard.see = timed(trainer.guard.see, spent, "guard")
        for name in ("update", "observe"):
            setattr(trainer.controller, name, timed(getattr(trainer.controller, name), spent, "controller"))
        trainer.step_index = trainer.config.warmup.steps
        for step in range(steps + 100):
            if step == 100:
                spent.update(guard=0, controller=0)
                started = time.process_time_ns()
            trainer._one_step()
            trainer.guard.see(trainer.step_index, trainer._record)
        whole = time.process_time_ns() - started
        cases.append(
            {
                "case": f"cost, beta_neg {beta_neg}",
                "steps": steps,
                "step_ms": whole / steps / 1e6,
                "guard_share": spent["guard"] / whole,
                "controller_share": spent["controller"] / whole,
                "both_share": sum(spent.values()) / whole,
            }
        )
    return cases


def timed(call: Callable[..., Any], spent: dict[str, int], name: str) -> Callable[..., Any]:
    """The same call, whose processor time is added to `spent`."""

    def wrapped(*args: Any) -> Any:
        started = time.process_time_ns()
        found = call(*args)
        spent[name] += time.process_time_ns() - started
        return found

    return wrapped


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, help="of each run; default: 4000; short: 1200")
    options.add_argument("--seeds", type=int, help="default: 10; short: 1")
    options.add_argument("--guard", default="act", help="act, or off to see what the faults do alone")
    options.add_argument("--out", type=Path, help="where single runs are kept (default: runs/guard-...)")
    options.add_argument("--only-cost", action="store_true", help="no faults")
    own = options.parse_args()
    steps, seeds = own.steps or (1200 if own.short else 4000), own.seeds or (1 if own.short else 10)
    out = own.out or Path(f"runs/guard-{own.guard}-{steps}")
    out.mkdir(parents=True, exist_ok=True)
    cases: list[dict[str, Any]] = []
    without: list[dict[str, Any]] = []
    for fault in () if own.only_cost else FAULTS:
        runs = []
        for seed in range(seeds):
            path = out / f"{fault.replace(' ', '-')}-{seed}.json"
            if not path.exists():
                path.write_text(json.dumps(faulty(fault, steps, seed, own.guard)))
            runs.append(json.loads(path.read_text()))
            progress(f"{fault}, seed {seed}: {runs[-1]}")
        without = without or runs
        cases.append(summed_up(fault, own.guard, runs, without))
    cases += cost(400 if own.short else 4000)
    details = {case["case"]: case.pop("details") for case in cases if "details" in case}
    report(cases, own.json, setting={"steps": steps, "seeds": seeds}, runs=details)


if __name__ == "__main__":
    main()
