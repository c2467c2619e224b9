"""Runs: killed and resumed ones equal uninterrupted ones bit by bit, seeds decide everything, nothing bad is kept."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from introvae import (
    VAE,
    ASIntroVAE,
    ConfigError,
    DataError,
    FitConfig,
    IntroVAE,
    IntrovaeError,
    Objective,
    Report,
    Run,
    RunError,
    SoftIntroVAE,
    Warmup,
    evaluate,
    fit,
    from_array,
    load_data,
    open_run,
)
from introvae.cli import main
from introvae.errors import DivergedError
from introvae.objectives import get_objective, list_objectives
from introvae.training.checkpoint import KEEP, list_checkpoints
from introvae.training.config import list_recipes, load_config, parse_config, recipe_path
from introvae.training.fit import config_for
from introvae.training.loop import Trainer
from introvae.training.run import default_folder

SCRIPT = Path(sys.executable).parent / "introvae"
Row = dict[str, Any]

STEPS = 240
PLANE = f"""
    --recipe none --quiet --data density:8gaussians --network tiny-mlp --objective ASIntroVAE --steps {STEPS}
    --warmup.steps 60 --batch-size 32 --lr 1e-3 --lr-schedule cosine --lr-warmup 20 --ema 0.99 --log-every 5
    --checkpoint-every 20 --image-every 0 --seed 3
""".split()
"""Annealing ends at step 96: from there on the objective is another object."""


def vectors(n: int = 40) -> np.ndarray:
    """Small data without a picture at the end of a run."""
    return np.random.default_rng(0).normal(size=(n, 5)).astype(np.float32)


def small(out: Path, **settings: Any) -> Run:
    """A run of a few steps on `vectors`."""
    base: dict[str, Any] = {"data": vectors(), "network": "tiny-mlp", "batch_size": 10, "steps": 6, "log_every": 1}
    return fit(**{**base, "out": str(out), "recipe": "none", "progress": False, **settings})


def weights(run: Run) -> bytes:
    return (run.model_folder / "model.safetensors").read_bytes()


def last_state(run: Run) -> dict[str, Any]:
    return torch.load(list_checkpoints(run.checkpoints)[-1], weights_only=True)


def assert_same(a: Any, b: Any, where: str = "state") -> None:
    """Bit-equal, tensors and plain values, except for the time that it took."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a.keys() - {"seconds", "seconds_waited"}:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert a == b, where


def assert_same_run(found: Run, expected: Run) -> None:
    """The model's bytes, the last checkpoint and the whole log are those of the uninterrupted run."""
    assert weights(found) == weights(expected)
    assert_same(last_state(found), last_state(expected))
    assert_same(found.log(), expected.log())
    seconds = [row["seconds"] for row in found.log()]
    assert seconds == sorted(seconds)


# --- killed and resumed


def rows(folder: Path) -> list[Row]:
    """The complete lines about steps of a log that another process writes."""
    path = folder / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n") and '"event"' not in line]


def stop(words: Sequence[str], folder: Path, when: Callable[[Row], bool], number: signal.Signals) -> tuple[int, str]:
    """Run `introvae fit` until a line of the log says so, send a signal; exit status and standard error."""
    with subprocess.Popen([SCRIPT, "fit", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        try:
            deadline = time.monotonic() + 60
            while not any(when(row) for row in rows(folder)[-1:]):
                assert run.poll() is None, f"the run ended before it was stopped: {run.communicate()[1]}"
                assert time.monotonic() < deadline, "the moment never came"
                time.sleep(0.002)
            run.send_signal(number)
            _, err = run.communicate(timeout=60)
        finally:
            run.kill()
    return run.returncode, err


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run in the plane from its first step to its last."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert main(["fit", *PLANE, "--out", str(folder)]) == 0
    return Run(folder)


def test_a_run_that_is_killed_three_times_equals_one_that_was_not(uninterrupted: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    resume = ["--resume", str(folder), "--quiet"]
    moments: list[tuple[list[str], Callable[[Row], bool], Callable[[Row], bool]]] = [
        ([*PLANE, "--out", str(folder)], lambda row: row["step"] >= 30, lambda row: row["phase"] == "warmup"),
        (resume, lambda row: row["phase"] == "train", lambda row: row["c"] < 1),
        (resume, lambda row: row["step"] >= STEPS - 55, lambda row: row["c"] == 1),
    ]
    for words, when, then in moments:
        status, err = stop(words, folder, when, signal.SIGKILL)
        assert (status, err) == (-signal.SIGKILL, "")
        last = rows(folder)[-1]
        assert then(last), last
        assert last["step"] < STEPS
        assert list_checkpoints(folder / "checkpoints")
        assert not (folder / "model").exists()
    done = subprocess.run([SCRIPT, "fit", *resume], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert [row["step"] for row in rows(folder)] == list(range(5, STEPS + 1, 5))
    assert_same_run(Run(folder), uninterrupted)


def test_an_image_run_that_is_killed_in_its_second_epoch_equals_one_that_was_not(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    data, folder = tmp_path / "digits.npy", tmp_path / "killed"
    np.save(data, (load_digits().images[:300] / 16).astype(np.float32))  # 270 to train on: 8 batches of 32
    words = ["--recipe", "none", "--quiet", "--data", str(data), "--network", "tiny-conv", "--steps", "50"]
    words += ["--warmup.steps", "5", "--batch-size", "32", "--log-every", "1", "--checkpoint-every", "7"]
    status, _ = stop([*words, "--out", str(folder)], folder, lambda row: row["step"] >= 15, signal.SIGKILL)
    assert status == -signal.SIGKILL
    state = last_state(Run(folder))
    assert state["step"] >= 14
    assert {name: state["batches"][name] for name in ("epoch", "position")} == {
        "epoch": (state["step"] - 1) // 8,
        "position": 32 * ((state["step"] - 1) % 8 + 1),
    }
    assert main(["fit", "--resume", str(folder), "--quiet"]) == 0
    assert main(["fit", *words, "--out", str(tmp_path / "whole")]) == 0
    assert_same_run(Run(folder), Run(tmp_path / "whole"))


def test_ctrl_c_saves_the_state_and_says_how_to_go_on(uninterrupted: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    status, err = stop([*PLANE, "--out", str(folder)], folder, lambda row: row["step"] >= 100, signal.SIGINT)
    assert status == 2
    assert err.count("\n") == 1
    assert err.startswith("introvae: ")
    assert f"introvae fit --resume {folder}" in err
    stopped = last_state(Run(folder))["step"]
    assert 100 <= stopped < STEPS
    assert f"step {stopped} " in err
    assert not (folder / "model").exists()
    assert main(["fit", "--resume", str(folder), "--quiet"]) == 0
    assert_same_run(Run(folder), uninterrupted)


def rewound(run: Run, folder: Path, checkpoint: int) -> Run:
    """A copy as a crash just after a checkpoint's successor began would leave it."""
    copy = Run(Path(shutil.copytree(run.folder, folder)))
    shutil.rmtree(copy.model_folder)
    for path in list_checkpoints(copy.checkpoints)[checkpoint + 1 :]:
        path.unlink()
    return copy


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": VAE(beta_kl=0.1), "lr_schedule": "milestones", "lr_milestones": (0.5, 0.75)},
        {"objective": IntroVAE(margin=4.0), "ema": 0.0, "adam_betas": (0.5, 0.9)},
        {"objective": SoftIntroVAE(gamma_r=1e-2), "lr_schedule": "cosine", "warmup": Warmup(5, beta_kl=0.1)},
        {"objective": ASIntroVAE(kernel="joint", annealing="tanh"), "warmup": Warmup(3), "lr_warmup": 6},
        {"objective": ASIntroVAE(contrast="real-sample"), "epochs": 4, "steps": None},
        {
            "data": np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8),
            "network": "tiny-conv",
            "network_options": {"norm": "batch"},
            "seed": 5,
        },
        {"data": "density:rings", "image_every": 5, "latent_dim": 4},
    ],
    ids=["vae", "introvae", "softintrovae", "asintrovae", "asintrovae-epochs", "batchnorm", "rings"],
)
def test_resuming_equals_going_on(tmp_path: Path, settings: dict[str, Any]) -> None:
    """On data whose epochs have 3 full batches of 10 in 36."""
    settings = {"steps": 12, "checkpoint_every": 8, **settings}
    whole = small(tmp_path / "whole", **settings)
    resumed = rewound(whole, tmp_path / "resumed", checkpoint=-2)
    assert last_state(resumed)["step"] == 8
    data = settings.get("data", vectors())
    fit(resume=resumed.folder, data=None if isinstance(data, str) else data, progress=False)
    assert_same_run(resumed, whole)


OWN_OPTIONS: dict[str, Any] = {"size": 8, "channels": 3, "heldout": 0.3, "heldout_seed": 2}


def test_an_array_is_read_again_as_the_run_read_it(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (40, 16, 16), dtype=np.uint8)
    settings: dict[str, Any] = {"data": x, "network": "tiny-conv", "steps": 12, "checkpoint_every": 8, **OWN_OPTIONS}
    whole = small(tmp_path / "whole", **settings)
    resumed = rewound(whole, tmp_path / "resumed", checkpoint=-2)
    fit(resume=resumed.folder, data=x, progress=False)
    assert_same_run(resumed, whole)
    with pytest.raises(RunError, match=r"heldout is 0\.3 in the run, 0\.2 here"):
        fit(resume=resumed.folder, data=x, heldout=0.2, progress=False)
    with pytest.raises(DataError, match="give the same array again as data="):
        fit(resume=resumed.folder, progress=False)


def test_a_recipe_s_options_are_for_arrays_too(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (40, 16, 16), dtype=np.uint8)
    recipe = tmp_path / "own.yaml"
    recipe.write_text("size: 8\nchannels: 3\nheldout: 0.3\nnetwork: tiny-conv\nsteps: 2\nbatch_size: 4\n")
    run = fit(data=x, recipe=str(recipe), out=str(tmp_path / "run"), progress=False)
    assert run.model().shape == (3, 8, 8)
    assert run.config().size == 8
    known = run.model().config
    assert known is not None
    assert known["data"]["fingerprint"] == load_data(x, run.config()).fingerprint()  # what was held out is known again


@pytest.mark.parametrize("line", [b"\xff\xfe\x00\n", b"3\n", b"null\n", b"[1]\n"])
def test_a_damaged_log_is_read_as_far_as_it_is_whole(tmp_path: Path, line: bytes) -> None:
    run = small(tmp_path / "run", data="density:rings", steps=3)
    with open(run.log_path, "ab") as log:
        log.write(line)
    assert [row["step"] for row in run.log()] == [1, 2, 3]
    run.rewind_log(2)
    assert [row["step"] for row in run.log()] == [1, 2]


def test_leftovers_of_a_crash_do_no_harm(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data": "density:rings", "steps": 9, "checkpoint_every": 4}
    whole = small(tmp_path / "whole", **settings)
    resumed = rewound(whole, tmp_path / "resumed", checkpoint=-2)
    for name in ("checkpoints/.step_00000009.pt.123.tmp", ".config.yaml.123.tmp", "model/.model.safetensors.123.tmp"):
        (resumed.folder / name).parent.mkdir(exist_ok=True)
        (resumed.folder / name).write_bytes(b"cut")
    with open(resumed.log_path, "a") as log:
        log.write('{"step": 10, "rec": 0.')
    assert [row["step"] for row in resumed.log()] == list(range(1, 10))
    fit(resume=resumed.folder, progress=False)
    assert_same_run(resumed, whole)


def test_a_finished_run_whose_log_lost_its_end_can_be_evaluated(tmp_path: Path) -> None:
    run = small(tmp_path / "run")
    run.log_path.write_text(run.log_path.read_text()[:-20])
    report = evaluate(run, data=from_array(vectors()))
    assert report["metrics"]["mse"]["n"] == 4


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_serves(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data": "density:rings", "steps": 9, "checkpoint_every": 4}
    whole = small(tmp_path / "whole", **settings)
    resumed = Run(Path(shutil.copytree(whole.folder, tmp_path / "resumed")))
    newest = list_checkpoints(resumed.checkpoints)[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(IntrovaeError, match=r"step_00000009\.pt is cut.*go on from step_00000008\.pt"):
        fit(resume=resumed.folder, progress=False)
    newest.unlink()
    fit(resume=resumed.folder, progress=False)
    assert_same_run(resumed, whole)


# --- seeds


@pytest.mark.parametrize("data", ["density:checkerboard", None])
def test_the_seed_decides_the_weights(tmp_path: Path, data: str | None) -> None:
    settings: dict[str, Any] = {} if data is None else {"data": data}
    runs = [small(tmp_path / name, seed=seed, **settings) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert weights(runs[0]) == weights(runs[1])
    assert_same(runs[0].log(), runs[1].log())
    assert weights(runs[0]) != weights(runs[2])


def test_pictures_logs_and_checkpoints_change_nothing(tmp_path: Path) -> None:
    plain = small(tmp_path / "a", data="density:rings", steps=8, log_every=8, checkpoint_every=0, image_every=0)
    busy = small(tmp_path / "b", data="density:rings", steps=8, log_every=1, checkpoint_every=1, image_every=4)
    assert weights(plain) == weights(busy)
    assert (busy.images / "step_00000004.png").is_file()


def test_training_leaves_the_global_generators_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    Trainer(FitConfig(data="digits", network="tiny-conv", steps=2))
    assert torch.equal(torch.get_rng_state(), before[0])
    small(tmp_path / "run", data="density:8gaussians")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_loading_and_measuring_a_model_leave_the_global_generator_alone(tmp_path: Path) -> None:
    run = small(tmp_path / "run")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run.model()
    assert torch.equal(torch.get_rng_state(), before)
    evaluate(run, data=from_array(vectors()))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_global_seed_does_not_matter(tmp_path: Path) -> None:
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        runs.append(small(tmp_path / str(seed)))
    assert weights(runs[0]) == weights(runs[1])


# --- what a run keeps


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run = small(tmp_path / "run", steps=20, checkpoint_every=3)
    assert KEEP == 2
    assert [path.name for path in list_checkpoints(run.checkpoints)] == ["step_00000018.pt", "step_00000020.pt"]
    assert not list(run.folder.rglob("*.tmp"))


def test_the_saved_model_has_the_averaged_weights(tmp_path: Path) -> None:
    run = small(tmp_path / "run", ema=0.9)
    state = last_state(run)
    averaged = {name.removeprefix("module."): value for name, value in state["average"].items() if "module." in name}
    assert_same(dict(run.model().state_dict()), averaged)
    assert not torch.equal(averaged["encoder.layers.0.weight"], state["players"]["model"]["encoder.layers.0.weight"])
    newest = small(tmp_path / "newest", ema=0.0)
    assert_same(dict(newest.model().state_dict()), dict(last_state(newest)["players"]["model"]))


def test_the_phases_and_the_rate_are_logged(tmp_path: Path) -> None:
    objective = ASIntroVAE(annealing_rate=1.0)
    run = small(tmp_path / "run", objective=objective, warmup=Warmup(2), lr=0.1, lr_schedule="cosine", steps=6)
    log = run.log()
    assert [row["phase"] for row in log] == ["warmup"] * 2 + ["train"] * 4
    assert [row["c"] for row in log] == pytest.approx([0, 0, 0, 0.25, 0.5, 0.75])
    assert [row["lr"] for row in log] == pytest.approx([0.05 * (1 + np.cos(np.pi * i / 6)) for i in range(6)])


DIVERGING = [
    {"objective": SoftIntroVAE(), "log_every": 1},
    {"objective": SoftIntroVAE(), "log_every": 10},
    {"objective": SoftIntroVAE(), "log_every": 50},
    {"objective": SoftIntroVAE(), "log_every": 50, "lr": 1e12},
    {"objective": IntroVAE(), "lr": 1e20},
    {"objective": VAE(), "lr": 1e20, "ema": 0.0},
    {"objective": ASIntroVAE(), "warmup": Warmup(3), "lr": 1e12},
]


@pytest.mark.parametrize("settings", DIVERGING, ids=range(len(DIVERGING)))
def test_a_run_that_diverges_says_so_and_keeps_nothing_of_it(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {"lr": 1e6, "steps": 200, "checkpoint_every": 3, "log_every": 20, "data": "density:rings", **settings}
    with pytest.raises(DivergedError, match=r"step \d+ .*lr") as caught:
        small(tmp_path / "run", **settings)
    run = Run(tmp_path / "run")
    assert not run.model_folder.exists()
    kept = list_checkpoints(run.checkpoints)
    assert kept
    for path in kept:
        state = torch.load(path, weights_only=True)
        for tensors in (state["players"]["model"], state["average"]):
            assert all(torch.isfinite(tensor).all() for tensor in tensors.values()), path.name
    assert str(kept[-1]) in str(caught.value)  # "the last good state is ..."
    assert all(np.isfinite(v) for row in run.log() for v in row.values() if isinstance(v, float))


def test_weights_that_the_last_step_spoils_are_not_saved(tmp_path: Path) -> None:
    """The losses of a step are from before its update, so only the weights show it."""
    with pytest.raises(DivergedError):
        small(tmp_path / "run", data="density:rings", objective=VAE(), steps=1, lr=1e39, ema=0.0)
    assert not (tmp_path / "run" / "model").exists()


# --- from Python


def test_fit_takes_an_array(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((40, 8, 8), np.float32)
    run = small(tmp_path / "run", data=images, network="tiny-conv")
    assert run.config().data == "array"
    assert run.model().shape == (1, 8, 8)
    assert (run.images / "final.png").is_file()
    report = evaluate(run, data=from_array(images))
    assert report["metrics"]["psnr_db"]["n"] == 4
    assert run.report() == json.loads(json.dumps(report))


def test_fit_takes_data_in_memory_with_a_name(tmp_path: Path) -> None:
    run = small(tmp_path / "run", data=from_array(torch.randn(40, 3), name="mine"))
    assert run.config().data == "mine"
    assert run.model().shape == (3,)


def test_fit_takes_a_config(tmp_path: Path) -> None:
    config = FitConfig(data="density:rings", network="tiny-mlp", steps=2, out=str(tmp_path / "run"))
    run = fit(config, progress=False)
    assert run.folder == tmp_path / "run"
    assert dataclasses.replace(run.config(), latent_dim=None, out=config.out) == config
    with pytest.raises(ConfigError, match="config"):
        fit(config, steps=3, progress=False)


def test_a_config_with_data_in_memory_records_what_it_was_trained_on(tmp_path: Path) -> None:
    config = FitConfig(data="digits", network="tiny-mlp", steps=2, batch_size=10, out=str(tmp_path / "run"))
    run = fit(config, data=vectors(), progress=False)
    assert run.model().shape == (5,)
    assert run.config().data == "array"


def test_a_config_and_the_name_of_other_data_are_not_mixed_silently(tmp_path: Path) -> None:
    config = FitConfig(data="density:rings", network="tiny-mlp", steps=2, out=str(tmp_path / "run"))
    try:
        run = fit(config, data="density:2spirals", progress=False)
    except ConfigError:
        return
    assert run.config().data == "density:2spirals"


def test_an_unknown_setting_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'stepz'.*steps, epochs"):
        fit(data="density:rings", stepz=3, out=str(tmp_path / "run"), progress=False)
    assert not (tmp_path / "run").exists()
    run = small(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"'stepz'"):
        fit(resume=run.folder, stepz=3, progress=False)


@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"steps": -1}, {"batch_size": 0}, {"ema": 1.0}, {"seed": -1}])
def test_settings_out_of_range(tmp_path: Path, settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        fit(data="density:rings", recipe="none", out=str(tmp_path / "run"), progress=False, **settings)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_can_be_resumed_with_its_data_its_settings_or_its_config(tmp_path: Path) -> None:
    config = FitConfig(data="density:rings", network="tiny-mlp", steps=2, out=str(tmp_path / "run"))
    run = fit(config, progress=False)
    before = weights(run)
    for same in ({}, {"data": "density:rings"}, {"steps": 2, "batch_size": 64}, {"config": run.config()}):
        fit(resume=run.folder, progress=False, **same)
        assert weights(run) == before


def test_the_config_that_started_a_run_resumes_it(tmp_path: Path) -> None:
    data = from_array(vectors())
    config = FitConfig(data="array", network="auto", network_options={"hidden": 8}, epochs=2, batch_size=10)
    config = dataclasses.replace(config, out=str(tmp_path / "run"))
    run = fit(config, data=data, progress=False)
    assert fit(config, data=data, resume=run.folder, progress=False).folder == run.folder


def test_a_run_on_an_array_is_resumed_with_the_array(tmp_path: Path) -> None:
    run = small(tmp_path / "run", steps=6)
    before = weights(run)
    fit(resume=run.folder, data=vectors(), progress=False)
    assert weights(run) == before
    with pytest.raises(DataError, match="array"):
        fit(resume=run.folder, progress=False)
    with pytest.raises(IntrovaeError):
        fit(resume=run.folder, data=vectors()[:, :3], progress=False)


def test_resuming_lists_every_difference(tmp_path: Path) -> None:
    run = small(tmp_path / "run", objective=SoftIntroVAE(beta_neg=8.0))
    other: dict[str, Any] = {"lr": 0.5, "objective": SoftIntroVAE(beta_neg=9.0), "warmup": Warmup(3), "device": "cpu"}
    with pytest.raises(RunError) as caught:
        fit(resume=run.folder, data=vectors(), progress=False, **other)
    listed = re.findall(r"[\w.]+(?= is )", str(caught.value))
    assert sorted(name.removeprefix("init_args.") for name in listed) == [
        "lr",
        "objective.init_args.beta_neg",
        "warmup.steps",
    ]


def test_there_is_nothing_to_resume_in_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run at"):
        fit(resume=tmp_path, progress=False)


def test_fit_works_outside_the_main_thread_and_restores_signals(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    here = small(tmp_path / "here")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    found: list[Run] = []
    thread = threading.Thread(target=lambda: found.append(small(tmp_path / "there")))
    thread.start()
    thread.join()
    assert weights(found[0]) == weights(here)


def test_report_and_model_of_a_run_that_has_none(tmp_path: Path) -> None:
    run = small(tmp_path / "run")
    with pytest.raises(RunError, match="introvae evaluate"):
        run.report()
    shutil.rmtree(run.model_folder)
    with pytest.raises(RunError, match="--resume"):
        run.model()


# --- names and settings


@pytest.mark.parametrize(
    ("data", "objective", "name"),
    [
        ("density:rings", VAE(), "rings-vae"),
        ("digits", SoftIntroVAE(), "digits-softintrovae"),
        ("/data/My images (v2).npy", ASIntroVAE(), "My-images-v2-asintrovae"),
        ("pictures/", IntroVAE(), "pictures-introvae"),
        ("???", VAE(), "data-vae"),
    ],
)
def test_a_run_is_named_by_date_data_and_objective(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, objective: Objective, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    config = FitConfig(data=data, objective=objective)
    assert re.fullmatch(rf"runs/\d{{8}}-{re.escape(name)}", default_folder(config).as_posix())


def test_a_second_run_of_a_day_gets_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [fit(data=vectors(), recipe="none", batch_size=10, steps=1, progress=False) for _ in range(3)]
    assert [run.folder.name[8:] for run in runs] == [
        "-array-softintrovae",
        "-array-softintrovae-2",
        "-array-softintrovae-3",
    ]
    assert all((tmp_path / run.folder / "model" / "config.json").is_file() for run in runs)


@pytest.mark.parametrize(
    "objective",
    [
        VAE(beta_rec=0.3, beta_kl=1e-5),
        IntroVAE(margin=3.0, variant="official_code"),
        SoftIntroVAE(scale=0.5, gamma_r=1e-8),
        ASIntroVAE(kernel="joint", contrast="real-sample", annealing="tanh", distance_weight=0.0),
    ],
)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"steps": 10, "latent_dim": 3, "lr": 1e-5, "adam_betas": (0.0, 0.9), "device": "cpu", "out": "runs/a b: c"},
        {"epochs": 1.5, "lr_schedule": "milestones", "lr_milestones": (0.25, 0.5), "data": "density:rings"},
        {"network": "conv", "network_options": {"channels": [4, 8], "norm": "none"}, "warmup": Warmup(3, 0.5, 2.0)},
        {"warmup": Warmup(share=0.125), "epochs": 2.0},
    ],
)
def test_settings_survive_the_config_file(tmp_path: Path, objective: Objective, settings: dict[str, Any]) -> None:
    config = FitConfig(objective=objective, **settings)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == dataclasses.replace(config, out=None)


# --- recipes


def test_the_recommended_recipe_suits_vectors_too(tmp_path: Path) -> None:
    run = fit(data=vectors(), batch_size=10, steps=2, out=str(tmp_path / "run"), progress=False)
    assert run.model().shape == (5,)


def test_given_settings_replace_those_of_a_recipe_that_exclude_them(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("network: conv\nnetwork_options: {norm: none}\nsteps: 500\nwarmup: {share: 0.25}\n")
    settings: dict[str, Any] = {"data": "digits", "recipe": str(recipe), "batch_size": 100, "progress": False}
    run = fit(**settings, network="tiny-mlp", epochs=0.1, warmup=Warmup(), out=str(tmp_path / "run"))
    found = run.config()
    assert (found.network, found.steps, found.warmup, found.network_options) == ("tiny-mlp", 1, Warmup(), {})
    same = fit(**settings, network="conv", epochs=0.1, warmup=Warmup(), latent_dim=2, out=str(tmp_path / "same"))
    assert same.config().network_options == {"norm": "none"}


def stand_in(config: FitConfig) -> Any:
    """Data of the kind that a recipe names, without its files."""
    if config.data == "digits" or config.data.startswith("density:"):
        return None
    shape = (64, 3, 32, 32)
    return from_array(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), name=config.data)


HERE = [name for name in list_recipes() if "/" not in load_config(recipe_path(name)).data]
"""Recipes without a hub name; tests/test_recipes.py takes a step with each of all."""


@pytest.mark.parametrize("name", HERE)
def test_a_recipe_trains(tmp_path: Path, name: str) -> None:
    config = load_config(recipe_path(name))
    data = stand_in(config)
    assert Trainer(config, data).steps >= 1000  # as it stands
    warm = 20 if "margin" in config.objective.automatic else 1  # which reads two looks, ten steps apart
    warmup = Warmup(warm, config.warmup.beta_rec, config.warmup.beta_kl)
    quick = dataclasses.replace(config, steps=warm + 1, epochs=None, batch_size=8, log_every=1, warmup=warmup)
    run = Trainer(quick, data).train(Run.create(tmp_path / "run", quick), progress=False)
    assert [row["phase"] for row in run.log()] == ["warmup"] * warm + ["train"]
    assert run.model().sample(2).isfinite().all()


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_says_first_what_it_is(name: str) -> None:
    head = recipe_path(name).read_text().splitlines()[0]
    assert re.match(r"# \w.{20,}", head), head


def test_a_resumed_run_keeps_its_folder_and_its_data(tmp_path: Path) -> None:
    run = small(tmp_path / "run", data=vectors())
    with pytest.raises(RunError, match="stays in its folder"):
        fit(resume=run.folder, data=vectors(), out=str(tmp_path / "elsewhere"), progress=False)
    with pytest.raises(DataError, match="not the ones that the run was started with"):
        fit(resume=run.folder, data=vectors() + 1, progress=False)


@pytest.mark.parametrize("left", ["checkpoints/step_00005000.pt", "model/config.json", "report.json", "log.jsonl"])
def test_a_folder_with_remains_of_a_run_is_refused(tmp_path: Path, left: str) -> None:
    (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / left).touch()
    with pytest.raises(RunError, match="holds a run already"):
        small(tmp_path)
    assert (tmp_path / left).is_file()


@pytest.mark.parametrize("asked", list_objectives())
@pytest.mark.parametrize("before", list_objectives())
def test_an_objective_inherits_nothing_of_another_one(tmp_path: Path, before: str, asked: str) -> None:
    """Both IntroVAE and Soft-IntroVAE have an alpha, and they mean different things."""
    odd = {f.name: f.default / 2 for f in dataclasses.fields(get_objective(before)) if isinstance(f.default, float)}  # pyright: ignore
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"objective": {"class_path": before, "init_args": odd}}))
    found = parse_config(["--objective", asked], [recipe]).objective
    assert found == (get_objective(asked)() if asked != before else get_objective(before)(**odd))
    recipe.write_text(json.dumps({"objective": asked}))
    assert load_config(recipe).objective == get_objective(asked)()
    assert parse_config([f"--objective={asked}"]).objective == get_objective(asked)()


def test_an_objective_of_one_s_own_inherits_nothing_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_alpha.py").write_text(
        "from dataclasses import dataclass\nfrom introvae import VAE\n\n\n"
        "@dataclass(frozen=True)\nclass Own(VAE):\n    alpha: float = 0.5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = parse_config(["--objective", "own_alpha.Own", "--objective.beta_kl", "3"]).objective
    assert repr(found) == "Own(beta_rec=1.0, beta_kl=3.0, alpha=0.5)"  # Soft-IntroVAE's alpha is 2
    (tmp_path / "recipe.yaml").write_text("objective: {class_path: own_alpha.Own}")
    assert repr(load_config(tmp_path / "recipe.yaml").objective) == "Own(beta_rec=1.0, beta_kl=1.0, alpha=0.5)"


def test_looking_at_a_run_does_not_change_it(tmp_path: Path) -> None:
    states = []
    for log_every in (1, 100):
        run = small(tmp_path / f"{log_every}", data="digits", objective="VAE", network="tiny-conv", steps=4,
                    network_options={"norm": "batch"}, log_every=log_every)  # fmt: skip
        states.append((run.model_folder / "model.safetensors").read_bytes())
    assert states[0] == states[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "GAN"}, "choose one of VAE, IntroVAE"),
        ({"objective": 3}, "or its name"),
        ({"steps": "2"}, "steps is 2: it must be a number"),
        ({"batch_size": 2.5}, "batch_size is 2.5: it must be a whole number"),
        ({"adam_betas": (0.9,)}, "give two numbers"),
        ({"seed": 2**32}, "seed is"),
        ({"warmup": {"steps": -1}}, "warmup.steps is -1"),
    ],
)
def test_settings_of_a_wrong_kind_are_refused_from_python(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FitConfig(**settings)
    assert FitConfig(objective="VAE", warmup={"share": 0.1}).objective == VAE()  # pyright: ignore


def test_the_name_of_the_recipe_s_objective_keeps_its_settings_from_python_too() -> None:
    recommended = config_for("auto", {"data": "digits"}).objective
    assert recommended != SoftIntroVAE()
    assert config_for("auto", {"data": "digits", "objective": "SoftIntroVAE"}).objective == recommended
    assert config_for("auto", {"data": "digits", "objective": SoftIntroVAE()}).objective == SoftIntroVAE()
    assert config_for("digits-softintrovae", {"objective": "IntroVAE"}).objective == get_objective("IntroVAE")()


def test_a_run_is_shown_and_read_as_a_table(tmp_path: Path) -> None:
    run = fit(data="digits", recipe="none", steps=4, log_every=2, image_every=0, network="tiny-conv", out=str(tmp_path))
    opened = open_run(tmp_path)
    assert opened == run
    curves = opened.curves()
    assert curves.index.tolist() == [2, 4]
    assert curves["rec"].tolist() == [row["rec"] for row in run.log()]
    shown = opened._repr_html_()
    assert "<td>4 of 4</td>" in shown
    assert "SoftIntroVAE" in shown
    assert shown.count("data:image/png;base64,") == 1
    run.report_path.write_text(json.dumps({"metrics": {"psnr_db": {"value": 12.3456}, "odd": {"value": [1]}}}))
    assert "<th>psnr_db</th><td>12.35</td>" in opened._repr_html_()
    left, right = opened.figure().axes[:2]
    assert [line.get_label() for line in left.lines] == ["real", "reconstruction", "sample"]
    assert "pixels" in right.get_title()
    assert opened.figure()._repr_png_().startswith(b"\x89PNG")  # pyright: ignore
    (tmp_path / "new").mkdir()
    bare = Run.create(tmp_path / "new" / "<b>", run.config())
    assert bare.curves().empty
    assert "&lt;b&gt;" in bare._repr_html_()
    with pytest.raises(RunError, match="logged no step"):
        bare.figure()
    with pytest.raises(RunError, match="no run at"):
        open_run(tmp_path / "nothing")


def test_a_report_is_a_dictionary_that_is_shown_as_a_table(tmp_path: Path) -> None:
    run = fit(data="digits", recipe="none", steps=2, image_every=0, network="tiny-conv", out=str(tmp_path))
    measured = evaluate(run, metrics=["psnr_db", "frechet_thumb"])
    stored = run.report()
    assert isinstance(measured, Report)
    assert isinstance(stored, Report)
    assert json.loads(json.dumps(measured)) == dict(measured) == stored == json.loads(run.report_path.read_text())
    its = measured["metrics"]["frechet_thumb"]
    shown = measured._repr_html_()
    assert "<tr><th>metric</th><th>value</th><th>spread</th><th>floor</th><th>n</th></tr>" in shown
    assert f"<th>frechet_thumb</th><td>{its['value']:.4g}</td><td></td><td>{its['floor']:.4g}</td>" in shown
    assert f"<td>{measured['metrics']['psnr_db']['n']}</td></tr>" in shown
    assert shown.count("<tr") == 3
    bad = Report(run="<b>", metrics={"<i>": {"value": 1.0, "n": 12345, "protocol": 'a "b"'}, "odd": {"value": [1]}})
    assert "&lt;b&gt;" in bad._repr_html_()
    assert '<tr title="a &quot;b&quot;"><th>&lt;i&gt;</th><td>1</td>' in bad._repr_html_()
    assert "<td>12,345</td>" in bad._repr_html_()
    assert "odd" not in bad._repr_html_()
    assert "<table>" in Report()._repr_html_()
