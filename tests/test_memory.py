"""Accumulation gives the gradients of the whole batch; the planner says how much memory a run will take."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from commands import Command, Refused
from introvae import ConfigError, FitConfig, IntrospectiveStep, Run, fit, from_array
from introvae.objectives import Objective
from introvae.training.loop import Trainer
from test_step import CASES, batch, build, capture, count_calls

SPLIT = [name for name, (cls, _, settings) in CASES.items() if not cls(**settings).batch_coupled]
COUPLED = [name for name in CASES if name not in SPLIT]
PEAK = """
import json, resource, sys, tempfile
from pathlib import Path
import torch
from introvae import FitConfig, from_array
from introvae.training.loop import Trainer
from introvae.training.run import Run

settings = json.loads(sys.argv[1])
shape = settings.pop("shape")
data = from_array(torch.randint(0, 256, (200, *shape), dtype=torch.uint8))
trainer = Trainer(FitConfig(steps=2, log_every=1, **settings), data)
predicted = trainer.plan().peak_bytes()
with tempfile.TemporaryDirectory() as folder:
    trainer.train(Run.create(Path(folder) / "run", trainer.config), progress=False)
status = Path("/proc/self/status")  # a child's ru_maxrss may start from its parent's
if status.exists():
    peak = next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
else:
    peak = (1 if sys.platform == "darwin" else 1024) * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([predicted, peak]))
"""


def objective_of(case: str) -> Objective:
    cls, _, settings = CASES[case]
    return cls(**settings)


# --- accumulation


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("network", ["mlp", "conv", "conv-group"])
@pytest.mark.parametrize("case", [*SPLIT, "warm-up"])
def test_parts_have_the_gradients_of_the_whole(case: str, network: str, parts: int) -> None:
    objective = objective_of("soft" if case == "warm-up" else case)
    found = []
    for accumulation in (1, parts):
        model = build(network)
        x, noise = batch(model, 6)
        step = IntrospectiveStep(model, objective, accumulation=accumulation)
        seen = capture(step)
        record = step(x, noise, warming=case == "warm-up")
        found.append((record, seen["encoder"] + seen["decoder"], seen["foreign to encoder"]))
    (whole, gradients, foreign), (record, ours, ours_foreign) = found
    assert record.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.allclose(record[name], value, rtol=1e-12, atol=1e-14), name
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    for gradient, own in zip(gradients, ours, strict=True):
        assert (gradient - own).abs().max() <= 1e-12 * largest
    assert len(foreign) == len(ours_foreign)


def test_all_parts_are_judged_by_the_updated_encoder_and_none_is_kept_for_it() -> None:
    model = build("mlp")
    x, noise = batch(model, 6)
    sizes = count_calls(model.decoder)
    IntrospectiveStep(model, objective_of("introvae"), accumulation=3)(x, noise)
    assert sizes == [4, 4, 4, 4, 4, 4]  # each part's fakes, in the encoder's phase and anew in the decoder's


@pytest.mark.parametrize("case", COUPLED)
def test_objectives_that_compare_the_batch_refuse_it(case: str) -> None:
    with pytest.raises(ConfigError, match="compares the samples of a batch"):
        IntrospectiveStep(build("mlp"), objective_of(case), accumulation=2)


def test_an_objective_that_is_put_in_later_is_refused_too() -> None:
    model = build("mlp")
    step = IntrospectiveStep(model, objective_of("soft"), accumulation=2)
    step.objective = objective_of("as")
    with pytest.raises(ConfigError, match="compares the samples of a batch"):
        step(*batch(model, 6))


@pytest.mark.parametrize("accumulation", [0, -1, 1.5])
def test_parts_are_a_whole_number(accumulation: float) -> None:
    with pytest.raises(ConfigError, match="accumulation"):
        FitConfig(accumulation=accumulation)  # pyright: ignore[reportArgumentType]


def test_the_command_refuses_what_does_not_divide(refused: Refused, tmp_path: Path) -> None:
    words = ["fit", "--recipe", "none", "--network", "tiny-conv", "--steps", "2", "--out", str(tmp_path / "run")]
    assert "does not divide" in refused(*words, "--batch_size", "16", "--accumulation", "3")
    assert "ASIntroVAE" in refused(*words, "--objective", "ASIntroVAE", "--accumulation", "2")


def test_a_run_in_parts_equals_one_that_is_not(tmp_path: Path) -> None:
    weights = []
    for parts in (1, 4):
        run = fit(
            data="digits",
            recipe="none",
            network="tiny-conv",
            network_options={"norm": "none"},
            batch_size=16,
            steps=5,
            precision="float32",
            accumulation=parts,
            out=str(tmp_path / str(parts)),
            progress=False,
        )
        weights.append(torch.cat([p.flatten() for p in run.model().parameters()]))
    assert not torch.equal(*weights)
    assert torch.allclose(*weights, atol=1e-5)


# --- the planner


@pytest.mark.parametrize(
    "settings",
    [
        {"shape": [3, 32, 32], "batch_size": 32, "network_options": {"width": 0.5}},
        {"shape": [1, 64, 64], "batch_size": 16, "network_options": {"channels": [32, 32, 32]}, "precision": "float32"},
        {
            "shape": [1, 64, 64],
            "batch_size": 32,
            "network_options": {"channels": [32, 32, 32]},
            "gradient_checkpointing": True,
        },
        {
            "shape": [1, 64, 64],
            "batch_size": 32,
            "network_options": {"channels": [32, 32, 32], "norm": "layer"},
            "gradient_checkpointing": True,
        },
    ],
    ids=["default", "float32", "checkpointing", "checkpointing-layer"],
)
def test_the_predicted_peak_is_within_a_fifth(settings: dict[str, object]) -> None:
    words = [sys.executable, "-c", PEAK, json.dumps({**settings, "device": "cpu"})]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    predicted, measured = json.loads(done.stdout.splitlines()[-1])
    assert 0.8 <= predicted / measured <= 1.2, (predicted / 2**30, measured / 2**30)


def trainer(**settings: object) -> Trainer:
    data = from_array(torch.randint(0, 256, (80, 1, 16, 16), dtype=torch.uint8))
    known = {"network": "conv", "network_options": {"channels": [8, 8]}, "device": "cpu", "batch_size": 32, "steps": 9}
    return Trainer(FitConfig(**{**known, **settings}), data)  # pyright: ignore[reportArgumentType]


def test_what_saves_memory_is_seen_by_the_plan() -> None:
    plain = trainer().plan().step_bytes(32)
    assert trainer(gradient_checkpointing=True).plan().step_bytes(32) < 0.8 * plain
    assert trainer(accumulation=8).plan().step_bytes(32) < 0.6 * plain
    assert trainer(objective="VAE").plan().step_bytes(32) < 0.9 * plain
    assert trainer().plan().step_bytes(64) > 1.6 * plain


def test_planning_changes_nothing() -> None:
    one = trainer()
    before = copy.deepcopy(one.state_dict())
    one.plan().sentences()
    after = one.state_dict()
    for name, tensor in before["players"]["model"].items():
        assert torch.equal(tensor, after["players"]["model"][name])
    assert all(type(p) is torch.nn.Parameter for p in one.model.parameters())
    assert torch.equal(before["noise"], after["noise"])


def test_the_largest_batch_fits_and_a_larger_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 64 * 2**20
    monkeypatch.setattr("introvae.training.planner.free_bytes", lambda device: free)
    plan = trainer().plan()
    fits = plan.largest_batch()
    assert fits is not None
    assert 0.7 * free < plan.step_bytes(fits) <= free
    assert plan.step_bytes(2 * fits) > free


def test_a_batch_that_does_not_fit_comes_with_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("introvae.training.planner.free_bytes", lambda device: 2**20)
    said = " ".join(trainer().plan().sentences())
    assert "it does not fit" in said
    for way in ("--batch_size", "--accumulation", "--gradient_checkpointing"):
        assert way in said
    assert "--accumulation" not in " ".join(trainer(objective="ASIntroVAE").plan().sentences())
    monkeypatch.setattr("introvae.training.planner.free_bytes", lambda device: None)
    assert len(trainer().plan().sentences()) == 1


@pytest.mark.parametrize("data", ["digits", "density:rings"])
def test_a_dry_run_says_it(command: Command, data: str) -> None:
    said = command("fit", "--data", data, "--dry-run", "--recipe", "none")
    assert "memory: about" in said.out
    assert "the largest batch that fits" in said.out


def test_the_dry_run_of_a_resumed_run_says_it_too(command: Command, tmp_path: Path) -> None:
    words = ["--data", "digits", "--recipe", "none", "--network", "tiny-conv", "--steps", "2"]
    command("fit", *words, "--out", str(tmp_path / "run"))
    assert Run.open(tmp_path / "run").events("start")
    assert "memory: about" in command("fit", "--resume", str(tmp_path / "run"), "--dry-run").out
