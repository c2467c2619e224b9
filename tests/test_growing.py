"""Growing runs: every step's level is what its number says, and a run equals the same steps written out by hand."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from introvae import (
    VAE,
    ASIntroVAE,
    ConfigError,
    FitConfig,
    IntrospectiveStep,
    IntrospectiveVAE,
    IntroVAE,
    Run,
    SoftIntroVAE,
    Warmup,
    fit,
    from_array,
)
from introvae.cli import main
from introvae.step import Noise
from introvae.training.checkpoint import list_checkpoints
from introvae.training.config import config_from_words, load_config, parse_config
from introvae.training.feed import Feed
from introvae.training.growing import Grower, Growth, Schedule
from introvae.training.loop import Trainer
from introvae.training.resolve import resolve

NAME = "style"

SIDE, Z = 16, 3
OPTIONS: dict[str, Any] = {"channels": [2, 3, 4], "style_dim": 5, "mapping": 2}
GROWTH = Growth(samples=16, fade=12, batch={4: 8, 16: 5}, beta_neg={4: 16.0, 8: 12.0})
"""Two steps of 8 at 4 px; 3 + 4 of 4 at 8 px; 3 + 4 of 5 at 16 px."""
LEVELS = [(4, 8, None, 16.0)] * 2
LEVELS += [(8, 4, alpha, 12.0) for alpha in (0, 4 / 12, 8 / 12, None, None, None, None)]
LEVELS += [(16, 5, alpha, 9.0) for alpha in (0, 5 / 12, 10 / 12, None, None, None, None)]
"""Side, batch, share and beta_neg of each step."""
STEPS = len(LEVELS)


def pixels(n: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 1, SIDE, SIDE), dtype=np.uint8)


def settings(**changed: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"network": NAME, "network_options": OPTIONS, "latent_dim": Z, "batch_size": 4, "lr": 1e-2}
    base |= {"objective": SoftIntroVAE(beta_neg=9.0), "growing": GROWTH, "log_every": 1, "precision": "float32"}
    return {**base, "seed": 3, "image_every": 0, **changed}


def grow(out: Path, **changed: Any) -> Run:
    return fit(data=pixels(), out=str(out), recipe="none", progress=False, **settings(**changed))


def trainer(**changed: Any) -> Trainer:
    return Trainer(FitConfig(**settings(**changed)), from_array(pixels()))


# --- the schedule


def test_the_levels_of_the_steps() -> None:
    schedule = Schedule(GROWTH, (1, SIDE, SIDE), batch_size=4)
    seen = 0
    for step, (side, batch, alpha, beta_neg) in enumerate(LEVELS):
        level = schedule.at(step)
        assert (level.side, level.batch) == (side, batch)
        assert schedule.alpha(step) == alpha
        assert schedule.values(step) == ({} if side == 16 else {"beta_neg": beta_neg})
        assert schedule.samples(step) == seen
        assert schedule.told(step) == {"side": side, "faded_in": 1.0 if alpha is None else alpha}
        seen += batch
    assert schedule.steps == STEPS
    assert schedule.full == 12
    assert schedule.at(10**6).side == 16
    assert schedule.samples(STEPS + 10) == seen + 50
    for step in range(1, STEPS + 10):
        assert schedule.steps_for(schedule.samples(step)) == step


def test_a_run_without_growing_has_one_level() -> None:
    for shape in ((1, SIDE, SIDE), (2,)):
        schedule = Schedule(Growth(), shape, batch_size=4)
        assert [schedule.at(step).batch for step in (0, 7)] == [4, 4]
        assert [schedule.samples(step) for step in (0, 7)] == [0, 28]
        assert schedule.alpha(0) is None
        assert schedule.values(3) == schedule.told(3) == {}
        assert schedule.checked(1) == 1


def test_levels_may_begin_later_and_jump() -> None:
    schedule = Schedule(Growth(samples=10, fade=0, start=8), (1, SIDE, SIDE), batch_size=4)
    assert [(level.side, level.first, level.fading) for level in schedule.levels] == [(8, 0, 0), (16, 3, 0)]
    assert all(schedule.alpha(step) is None for step in range(9))
    equal = Schedule(Growth(samples=10), (1, SIDE, SIDE), batch_size=5)
    assert [(level.first, level.fading) for level in equal.levels] == [(0, 0), (2, 2), (6, 2)]


def test_images_of_a_level_are_means_over_areas() -> None:
    model = IntrospectiveVAE.build((1, SIDE, SIDE), NAME, Z, **OPTIONS)
    grower = Grower(Schedule(GROWTH, (1, SIDE, SIDE), 4), [model], [])
    x = torch.rand(3, 1, SIDE, SIDE)

    def area(side: int) -> Tensor:
        k = SIDE // side
        return x.unfold(2, k, k).unfold(3, k, k).mean((4, 5))

    for step, (side, _, alpha, _) in enumerate(LEVELS):
        grower.begin(step)
        assert model.shape == (1, side, side)
        expected = area(side)
        if alpha is not None:
            below = area(side // 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
            expected = (1 - alpha) * below + alpha * expected
        assert torch.allclose(grower.fit(x), expected, atol=1e-6)


@pytest.mark.parametrize("threaded", [False, True])
def test_batches_have_the_size_of_their_level_and_resume_in_the_midst(threaded: bool) -> None:
    data, schedule = from_array(pixels()), Schedule(GROWTH, (1, SIDE, SIDE), 4)

    def feed(half: int | None = None) -> Feed:
        def sizes(step: int) -> tuple[int, slice]:
            n = schedule.at(step).batch
            return n, slice(0, n) if half is None else (slice(0, n // 2), slice(n // 2, n))[half]

        return Feed(data.batches(4, 0), Z, 1, torch.device("cpu"), slice(0, 4), sizes=sizes)

    whole = feed()
    expected = [whole.next() for _ in LEVELS]
    assert [len(one.x) for one in expected] == [batch for _, batch, _, _ in LEVELS]
    assert [len(one.noise.fakes) for one in expected] == [2 * batch for _, batch, _, _ in LEVELS]
    for step, parts in enumerate(zip(*[[part.next() for _ in LEVELS] for part in (feed(0), feed(1))], strict=True)):
        assert torch.equal(torch.cat([own.x for own in parts]), expected[step].x)
        assert torch.equal(torch.cat([own.noise.prior for own in parts]), expected[step].noise.prior)
    first = feed()
    if threaded:
        with first:
            for _ in range(5):
                first.next()
            state = first.state_dict()
    else:
        for _ in range(5):
            first.next()
        state = first.state_dict()
    second = feed()
    second.load_state_dict(state)
    for step in range(5, STEPS):
        x, noise, _ = second.next()
        assert torch.equal(x, expected[step].x)
        assert torch.equal(noise.again, expected[step].noise.again)


# --- runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of all levels that keeps every checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("introvae.training.checkpoint.KEEP", 100)
        return grow(tmp_path_factory.mktemp("growing") / "whole", checkpoint_every=1, image_every=6)


def state_of(run: Run, step: int) -> dict[str, Any]:
    return torch.load(run.checkpoints / f"step_{step:08d}.pt", weights_only=True)


def test_a_run_equals_its_steps_written_out(whole: Run) -> None:
    """Each level by an update of its own, whose Adam is new; batches cut from the shuffled images by hand."""
    data = from_array(pixels())
    torch.manual_seed(3)
    model = IntrospectiveVAE.build((1, SIDE, SIDE), NAME, Z, **OPTIONS)
    draws, place, epoch = torch.Generator().manual_seed(4), 0, 0
    average = [p.detach().clone() for p in model.parameters()]
    step, side_before = None, None
    for index, (side, batch, alpha, beta_neg) in enumerate(LEVELS):
        model.grow(side, None if alpha is None else torch.tensor(alpha))
        if side != side_before:
            objective = SoftIntroVAE(beta_neg=9.0, scale=1 / SIDE**2)
            step, side_before = IntrospectiveStep(model, objective, lr=1e-2), side
        if place + batch > len(data.train):
            place, epoch = 0, epoch + 1
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(3 * 1_000_003 + epoch))
        x = data.train.x[order[place : place + batch]].float() / 255
        place += batch
        x = F.avg_pool2d(x, SIDE // side)
        if alpha is not None:
            x = torch.lerp(F.interpolate(F.avg_pool2d(x, 2), scale_factor=2), x, torch.tensor(alpha))
        values = {name: torch.tensor(v) for name, v in (("beta_rec", 1.0), ("beta_kl", 1.0), ("beta_neg", beta_neg))}
        assert step is not None
        record = step(x, Noise.draw(batch, Z, draws), values)
        row = whole.log()[index]
        assert {name: row[name] for name in record} == {name: value.item() for name, value in record.items()}
        decay = min(0.999, (1 + index) / (10 + index)) if index else 0.0
        for mean, p in zip(average, model.parameters(), strict=True):
            mean.lerp_(p.detach(), 1 - decay)
    found = state_of(whole, STEPS)["players"]["model"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor), name
    for ours, theirs in zip(whole.model().parameters(), average, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_the_log_tells_the_levels_and_the_model_is_whole(whole: Run) -> None:
    rows, seen = whole.log(), 0
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row, (side, batch, alpha, beta_neg) in zip(rows, LEVELS, strict=True):
        seen += batch
        assert (row["side"], row["faded_in"]) == (side, 1.0 if alpha is None else alpha)
        assert (row["samples_seen"], row["beta_neg"]) == (seen, beta_neg)
    assert whole.model().shape == (1, SIDE, SIDE)
    assert whole.model().sample(2).shape == (2, 1, SIDE, SIDE)
    assert whole.config().growing == GROWTH
    assert whole.config().steps == STEPS
    assert whole.config().objective == SoftIntroVAE(beta_neg=9.0, scale=1 / SIDE**2)
    pictures = sorted(path.name for path in whole.images.iterdir())
    assert pictures == ["final.png", "step_00000006.png", "step_00000012.png"]


def assert_same(a: Any, b: Any, where: str = "state") -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a.keys() - {"seconds", "seconds_waited"}:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    else:
        assert a == b, where


@pytest.mark.parametrize("at", [2, 3, 7, 14])
def test_resuming_in_the_midst_equals_going_on(whole: Run, tmp_path: Path, at: int) -> None:
    """At a level's first step (2), in a blend (3), within a level (7), at the full one (14)."""
    run = Run(Path(shutil.copytree(whole.folder, tmp_path / "resumed")))
    shutil.rmtree(run.model_folder)
    for path in list_checkpoints(run.checkpoints)[at + 1 :]:
        path.unlink()
    assert list_checkpoints(run.checkpoints)[-1].name == f"step_{at:08d}.pt"
    fit(resume=run.folder, data=pixels(), progress=False)
    assert_same(state_of(run, STEPS), state_of(whole, STEPS))
    assert_same(run.log(), whole.log())
    ours, theirs = ((each.model_folder / "model.safetensors").read_bytes() for each in (run, whole))
    assert ours == theirs


def test_levels_not_yet_used_stay_as_they_began(whole: Run) -> None:
    start, early = state_of(whole, 0), state_of(whole, 2)
    for kind in (lambda state: state["players"]["model"], lambda state: state["average"]):
        before, after = kind(start), kind(early)
        later = [name for name in before if ".blocks.1." in name or ".blocks.2." in name]
        assert len(later) > 20
        assert all(torch.equal(before[name], after[name]) for name in later)
        assert not all(torch.equal(before[name], after[name]) for name in before.keys() - set(later))
    for player in ("encoder_optimizer", "decoder_optimizer"):
        moments = [state_of(whole, step)["players"][player]["state"] for step in (0, 2, STEPS)]
        assert moments[0].keys() == moments[1].keys() == moments[2].keys()
        assert not any(tensor.any() for state in moments[0].values() for tensor in state.values())
        assert 0 < sum(bool(state["step"]) for state in moments[1].values()) < len(moments[1])
        # Counted from the last level's start: its blend took 3 steps of the colours below, none of the first level's.
        assert {int(state["step"]) for state in moments[2].values()} == {0, 3, 7}


def test_the_guard_takes_each_level_for_a_new_beginning(tmp_path: Path) -> None:
    training = trainer(growing=Growth(samples=32, fade=16, batch={4: 8}))
    level = training.schedule.levels[-1]
    began: list[tuple[int, int]] = []
    begin = training.guard.begin
    training.guard.begin = lambda step: (began.append((step, len(training._live()))), begin(step))[0]  # pyright: ignore
    training.train(Run.create(tmp_path / "run", training.config), progress=False)
    assert [step for step, _ in began] == [0, *(each.first for each in training.schedule.levels[1:])]
    assert len({count for _, count in began}) == 1
    assert training.guard.copies.good_step == level.first
    assert training.guard.watch.blind_until == level.first + 50
    training.guard.copies.restore()
    assert not any(tensor.any() for state in training.grower.optimizers[0].state.values() for tensor in state.values())  # pyright: ignore


def test_a_picture_shows_the_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[int, ...]] = []

    def note(model: IntrospectiveVAE, data: Any, path: Path, *_: Any) -> None:
        real = data.heldout.tensor()
        shown.append((real.shape[-1], model.reconstruct(real).shape[-1], model.sample(1).shape[-1]))

    monkeypatch.setattr("introvae.training.loop.preview", note)
    grow(tmp_path / "run", image_every=4)
    assert shown == [(8, 8, 8), (8, 8, 8), (16, 16, 16), (16, 16, 16)]


@pytest.mark.parametrize(
    "changed",
    [
        {"objective": SoftIntroVAE(beta_neg="auto"), "growing": Growth(samples=16), "warmup": Warmup(3)},
        {"objective": IntroVAE(), "growing": Growth(samples=16, start=8)},
        {"objective": ASIntroVAE(), "gradient_checkpointing": True, "flip": True},
        {"objective": SoftIntroVAE(gamma_r=0.1), "accumulation": 2, "growing": Growth(samples=8), "precision": "bf16"},
    ],
    ids=["auto", "introvae", "asintrovae", "accumulation"],
)
def test_other_settings_grow_too(tmp_path: Path, changed: dict[str, Any]) -> None:
    run = grow(tmp_path / "run", gradient_every=4, **changed)
    assert all(np.isfinite(row["rec"]) for row in run.log())
    assert run.log()[-1]["side"] == SIDE
    assert run.model().shape == (1, SIDE, SIDE)


# --- settings


def test_settings_are_read_from_words_and_files(tmp_path: Path) -> None:
    words = ["--growing.samples", "16", "--growing.fade", "12", "--growing.batch", "{4: 8, 16: 5}"]
    words += ["--growing.beta_neg", '{"4": 16, "8": 12}']
    assert parse_config(words).growing == GROWTH
    file = tmp_path / "recipe.yaml"
    file.write_text("growing: {samples: 16, fade: 12, batch: {4: 8, 16: 5}, beta_neg: {4: 16, 8: 12}}\n")
    assert load_config(file).growing == GROWTH
    assert parse_config(["--growing.samples", "20"], [file]).growing.samples == 20
    config = FitConfig(growing={"samples": 16, "fade": 12})  # pyright: ignore[reportArgumentType]
    assert config.growing == Growth(samples=16, fade=12)
    again = tmp_path / "again.yaml"
    again.write_text(FitConfig(**settings()).to_yaml())
    assert load_config(again).growing == GROWTH
    assert load_config(again) == FitConfig(**settings())
    assert parse_config([]).growing == Growth()


def test_length_of_a_run() -> None:
    data = from_array(pixels())
    steps = {
        "default": resolve(FitConfig(**settings()), data).steps,
        "more": resolve(FitConfig(**settings(steps=30)), data).steps,
        "epochs": resolve(FitConfig(**settings(epochs=5)), data).steps,
    }
    assert steps == {"default": STEPS, "more": 30, "epochs": STEPS + round((5 * 36 - 79) / 5)}
    assert len(data.train) == 36
    assert sum(batch for _, batch, _, _ in LEVELS) == 79


def test_the_scale_is_that_of_the_largest_images() -> None:
    data = from_array(pixels())
    for objective, scale in ((SoftIntroVAE(), 1 / 256), (SoftIntroVAE(scale=0.1), 0.1), (ASIntroVAE(), 1 / 256)):
        assert resolve(FitConfig(**settings(objective=objective)), data).objective.scale == scale  # pyright: ignore
    plain = settings(objective=SoftIntroVAE(), growing=Growth())
    assert resolve(FitConfig(**plain), data).objective.scale is None  # pyright: ignore


def test_memory_is_planned_for_the_largest_images() -> None:
    planned = trainer(growing=Growth(samples=16, batch={16: 2}), batch_size=8, objective=VAE()).plan()
    assert planned.config.batch_size == 2
    assert 2 * SIDE**2 * 4 < planned.step_bytes(2) < planned.step_bytes(4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"growing": Growth(samples=16, batch={32: 4})}, "growing.batch names 32 pixels.*choose from 4, 8, 16"),
        ({"growing": Growth(samples=16, beta_neg={5: 4})}, "growing.beta_neg names 5 pixels.*choose from 4, 8, 16"),
        ({"growing": Growth(samples=16, start=6)}, "growing.start 6 does not double to 16 pixels: choose from 4, 8"),
        ({"steps": 12}, "takes 12 steps before the whole network is trained, the run has 12: give --steps 16"),
        ({"network": "tiny-conv", "network_options": {}}, "ConvEncoder cannot grow: take network style"),
        ({"objective": SoftIntroVAE(beta_neg="auto")}, "SoftIntroVAE finds its own beta_neg: leave it out"),
        ({"objective": IntroVAE()}, "IntroVAE has no beta_neg: leave it out"),
        ({"objective": SoftIntroVAE(gamma_r=0.5, target_every=3)}, "a target decoder does not grow"),
        ({"growing": Growth(samples=16, batch={4: 37})}, "batch_size 37 exceeds the 36 training samples"),
        ({"objective": ASIntroVAE(), "growing": Growth(samples=16, batch={4: 1})}, "batch_size must be above 1"),
        ({"accumulation": 2}, "accumulation 2 does not divide a process' 5 samples"),
    ],
)
def test_what_does_not_go_together_is_said(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as found:
        trainer(**changed)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"samples": -1}, "growing.samples is -1"),
        ({"samples": 1.5}, "growing.samples is 1.5: it must be a whole number"),
        ({"samples": 8, "fade": -1}, "growing.fade is -1"),
        ({"samples": 8, "batch": {4: 0}}, r"growing.batch\[4\] is 0"),
        ({"samples": 8, "batch": {4: 1.5}}, r"growing.batch\[4\] is 1.5"),
        ({"samples": 8, "beta_neg": {8: -1.0}}, r"growing.beta_neg\[8\] is -1"),
        ({"batch": {4: 8}}, "growing.samples is 0: give the samples"),
        ({"start": 8}, "growing.samples is 0: give the samples"),
    ],
)
def test_numbers_out_of_range_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Growth(**given)


def test_compilers_and_vectors_are_refused() -> None:
    for compiler in ("cudagraph", "inductor"):
        with pytest.raises(ConfigError, match=f"compile '{compiler}' is for networks that do not grow"):
            FitConfig(growing=Growth(samples=8), compile=compiler)
    with pytest.raises(ConfigError, match="growing is for images whose side"):
        Schedule(Growth(samples=8), (5,), 4)
    with pytest.raises(ConfigError, match="growing is for images whose side"):
        Schedule(Growth(samples=8), (1, 30, 30), 4)


def test_the_command_grows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--recipe", "none", "--data", "digits", "--network", NAME, "--latent-dim", "2", "--batch-size", "8"]
    words += ["--network_options", '{"channels": [2, 2], "style_dim": 4, "mapping": 1}', "--growing.samples", "16"]
    out = ["--out", str(tmp_path / "run"), "--quiet"]
    assert main(["fit", *words, *out]) == 0
    assert Run.open(tmp_path / "run").config().steps == 6
    assert main(["fit", *words, *out, "--steps", "2", "--out", str(tmp_path / "short")]) == 2
    assert "growing takes 4 steps before the whole network is trained" in capsys.readouterr().err


def test_a_recipe_s_length_gives_way_to_growing() -> None:
    words = ["--data", "digits", "--network", "style", "--growing.samples", "1000"]
    assert config_from_words(words).steps is None
    assert config_from_words([*words, "--steps", "50"]).steps == 50
