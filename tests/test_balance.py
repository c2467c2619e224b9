"""Settings that find themselves, beta_neg and margin; and the two parts of the decoder's gradient."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import textbook
from commands import Refused
from introvae import (
    VAE,
    ASIntroVAE,
    ConfigError,
    DiagonalGaussian,
    FitConfig,
    IntrospectiveStep,
    IntrospectiveVAE,
    IntroVAE,
    Noise,
    Objective,
    Run,
    SoftIntroVAE,
    Warmup,
    fit,
)
from introvae.comparison.plan import from_file
from introvae.objectives import Judged
from introvae.training.balance import Averages, Gap, Margin, balancing_beta_neg, ramp_from, rules_for
from introvae.training.checkpoint import list_checkpoints
from introvae.training.config import config_from_words, load_config, parse_config
from introvae.training.controller import Controller
from introvae.training.loop import Trainer

AUTOMATIC = [
    (SoftIntroVAE, "beta_neg"),
    (ASIntroVAE, "beta_neg"),
    (IntroVAE, "margin"),
]
of_each = pytest.mark.parametrize(("cls", "name"), AUTOMATIC, ids=[cls.__name__ for cls, _ in AUTOMATIC])


def small(out: Path, **settings: Any) -> Run:
    base: dict[str, Any] = {"data": "density:8gaussians", "network": "tiny-mlp", "batch_size": 16, "log_every": 1}
    base |= {"image_every": 0, "lr": 1e-3, "device": "cpu", "out": str(out), "recipe": "none", "progress": False}
    return fit(**{**base, **settings})


def weights(run: Run) -> bytes:
    return (run.model_folder / "model.safetensors").read_bytes()


def numbers(run: Run, *without: str) -> list[dict[str, Any]]:
    hidden = {"seconds", "seconds_waited", *without}
    return [{name: value for name, value in row.items() if name not in hidden} for row in run.log()]


# --- asking for it


@of_each
def test_auto_is_the_same_from_the_command_line_yaml_and_python(
    tmp_path: Path, cls: type[Objective], name: str
) -> None:
    python = cls(**{name: "auto"})
    assert python.automatic == (name,)
    words = ["--objective", cls.__name__, f"--objective.{name}", "auto"]
    assert parse_config(words).objective == python
    assert parse_config([words[0], words[1], f"--objective.{name}=auto"]).objective == python
    recipe = tmp_path / "recipe.yaml"
    for text in ("auto", '"auto"'):
        recipe.write_text(f"objective:\n  class_path: {cls.__name__}\n  init_args: {{{name}: {text}}}\n")
        assert load_config(recipe).objective == python
    written = tmp_path / "config.yaml"
    written.write_text(FitConfig(objective=python).to_yaml())
    assert load_config(written).objective == python
    fixed = parse_config([words[0], words[1], f"--objective.{name}", "3.5"], [recipe]).objective
    assert getattr(fixed, name) == 3.5
    assert fixed.automatic == ()


@pytest.mark.parametrize(
    ("objective", "setting"),
    [
        ("SoftIntroVAE", "beta_kl"),
        ("SoftIntroVAE", "beta_rec"),
        ("SoftIntroVAE", "gamma_r"),
        ("ASIntroVAE", "beta_kl"),
        ("ASIntroVAE", "distance_weight"),
        ("IntroVAE", "alpha"),
        ("IntroVAE", "beta"),
        ("VAE", "beta_kl"),
    ],
)
def test_auto_is_refused_where_there_is_no_rule(tmp_path: Path, refused: Refused, objective: str, setting: str) -> None:
    out = tmp_path / "run"
    words = ["--recipe", "none", "--data", "density:rings", "--objective", objective, f"--objective.{setting}", "auto"]
    line = refused("fit", *words, "--steps", 3, "--out", out)
    assert setting in line
    assert "auto" in line
    assert not out.exists()
    with pytest.raises(ConfigError, match=f"{setting} is auto"):
        {c.__name__: c for c in (VAE, IntroVAE, SoftIntroVAE, ASIntroVAE)}[objective](**{setting: "auto"})


@pytest.mark.parametrize("word", ["automatic", "Auto", "-1", "nan", "inf"])
@of_each
def test_only_auto_and_numbers_will_do(
    refused: Refused, tmp_path: Path, cls: type[Objective], name: str, word: str
) -> None:
    words = ["--objective", cls.__name__, f"--objective.{name}={word}"]
    line = refused("fit", "--recipe", "none", "--data", "density:rings", *words, "--out", tmp_path / "run")
    assert name in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("warmup", [[], ["--warmup.steps", "19"], ["--warmup.share", "0.1"]])
def test_a_margin_that_reads_a_warm_up_needs_one(refused: Refused, tmp_path: Path, warmup: list[str]) -> None:
    words = ["--recipe", "none", "--data", "density:rings", "--network", "tiny-mlp", "--objective", "IntroVAE"]
    line = refused("fit", *words, "--objective.margin", "auto", "--steps", 100, *warmup, "--out", tmp_path / "run")
    assert "margin" in line
    assert "--warmup.share" in line
    assert not (tmp_path / "run").exists()


def test_an_objective_of_one_s_own_has_no_rule() -> None:
    @dataclasses.dataclass(frozen=True)
    class Own(Objective):
        weight: Any = "auto"
        tunable = ("weight",)

    with pytest.raises(ConfigError, match=r"weight.*give a number"):
        rules_for(Own(), 0.5, 100, "cpu")
    with pytest.raises(ConfigError, match=r"weight.*give a number"):
        Own().started(2)


def test_a_setting_of_one_s_own_hides_nothing_in_the_log() -> None:
    @dataclasses.dataclass(frozen=True)
    class Own(Objective):
        lr: float = 1.0
        tunable = ("lr",)

    with pytest.raises(ConfigError, match=r"Own has a setting 'lr'.*give it another name"):
        Controller(Own(), 0, 100, "cpu", 2)


@of_each
def test_a_step_by_itself_does_not_know_what_auto_is(cls: type[Objective], name: str) -> None:
    model = IntrospectiveVAE.build((2,), "tiny-mlp", latent_dim=2)
    objective = cls(**{name: "auto"})
    step = IntrospectiveStep(model, objective)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=f"{name} 'auto'.*give a number, or train with fit"):
        step(torch.randn(8, 2))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    numbers_given = {key: torch.tensor(value) for key, value in objective.started(2).values().items()}
    assert math.isfinite(step(torch.randn(8, 2), values=numbers_given)["loss_encoder"].item())


@pytest.mark.parametrize("pixels", [2, 784])
def test_what_an_automatic_setting_starts_from(pixels: int) -> None:
    """s beta_neg is 0.05; a margin starts at the default."""
    for cls in (SoftIntroVAE, ASIntroVAE):
        auto = cls(beta_neg="auto", beta_kl=0.3)
        assert auto.started(pixels) == cls(beta_neg=0.05 * pixels, beta_kl=0.3)
        assert cls(beta_neg="auto", scale=0.25).started(pixels) == cls(beta_neg=0.2, scale=0.25)
        assert auto.fitted(pixels) == auto
        assert cls(beta_neg=None).fitted(pixels).beta_neg == 0.05 * pixels
        assert cls(beta_neg=3.0).started(pixels) == cls(beta_neg=3.0)
    assert IntroVAE(margin="auto", beta=2.0).started(pixels) == IntroVAE(beta=2.0)
    assert IntroVAE(margin=7.0).started(pixels) == IntroVAE(margin=7.0)


# --- the rules, on hand-made KLs


class Hand:
    """The rule of beta_neg in plain float64 arithmetic."""

    def __init__(self, alpha: float, scale: float, beta_kl: float = 1.0) -> None:
        self.alpha, self.scale, self.beta_kl = alpha, scale, beta_kl
        self.exponent, self.home, self.settled = 2.5, 1.5, 0.0
        self.means: dict[str, float] = {}
        self.seen = {"kl": 0, "gap": 0}

    def _follow(self, name: str, value: float) -> None:
        seen = self.seen[name]
        kept = seen / (seen + 1) if seen < 4 else 0.8
        self.means[name] = kept * self.means.get(name, 0.0) + (1 - kept) * value
        self.seen[name] += 1

    def value(self) -> float:
        return self.exponent / (self.alpha * self.scale * max(self.settled or self.means["kl"], 0.1))

    def begin(self) -> None:
        """The exponent whose pushes cancel at 1.4 times KL(real), by bisection of r: ln r = q r, r above e."""
        q = 1.4 * self.alpha * self.scale * self.beta_kl * max(self.means["kl"], 0.1)
        low, high = math.e, math.exp(10.0)
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if math.log(middle) > q * middle else (low, middle)
        found = math.log(low)
        self.exponent, self.home = max(2.5, found), max(1.5, found)
        self.settled = 1.4 * self.means["kl"] if found > 2.5 else 0.0

    def look(self, real: float, fake: float | None) -> float | None:
        self._follow("kl", real)
        if fake is None:
            return None
        self._follow("gap", fake - real)
        relative = self.means["gap"] / max(self.means["kl"], 0.1)
        outside = min(relative, 0.0) if relative < 0 else max(relative - 0.5, 0.0)
        inside = 0.005 * math.log(self.home / self.exponent) if outside == 0 else 0.0
        most = 0.01 if self.settled else 0.04
        self.exponent *= math.exp(inside + min(max(0.5 * outside, -most), most))
        self.exponent = min(max(self.exponent, 1.0), 10.0)
        return self.value()


def shown(rule: Gap | Margin, kls: Sequence[tuple[float, float | None]], value: Tensor) -> list[float]:
    """What the rule makes of the value, look by look."""
    found = []
    for real, fake in kls:
        rule.look(torch.tensor(real), None if fake is None else torch.tensor(fake), value)
        found.append(value.item())
    return found


WALK = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)).mul(0.4).exp().tolist()


@pytest.mark.parametrize("spread", [0.2, 1.0, 3.0])
@pytest.mark.parametrize(
    ("objective", "scale"),
    [(SoftIntroVAE(beta_neg="auto"), 0.5), (SoftIntroVAE(beta_neg="auto", alpha=0.7), 1 / 784), (ASIntroVAE(), 1.0)],
)
def test_the_rule_of_beta_neg_equals_one_in_plain_arithmetic(objective: Objective, scale: float, spread: float) -> None:
    rule, hand, value = Gap(objective, scale, "cpu"), Hand(getattr(objective, "alpha", 2.0), scale), torch.tensor(9.0)
    warm = [(2.0 * kl, None) for kl, _ in WALK[:7]]
    assert shown(rule, warm, value) == [9.0] * 7  # it looks on during the warm-up
    for real, fake in warm:
        hand.look(real, fake)
    rule.begin(value)
    hand.begin()
    assert value.item() == pytest.approx(hand.value(), rel=1e-5)
    kls = [(2.0 * real, 2.0 * real + spread * (fake - 1.0)) for real, fake in WALK]
    expected = [hand.look(real, fake) for real, fake in kls]
    assert shown(rule, kls, value) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("fake", "change", "bound"),
    [
        (1.0, 0.96, 1.0),  # asleep: relative gap -1/2
        (1.98, math.exp(-0.005), 1.0),
        (1.96, math.exp(-0.01), 1.0),
        (3.04, math.exp(0.01), 10.0),
        (50.0, 1.04, 10.0),
    ],
)
def test_beta_neg_falls_where_the_adversary_sleeps_and_rises_where_it_sees_too_much(
    fake: float, change: float, bound: float
) -> None:
    """At KL(real) 2, s = 1/2, alpha = 2 the exponent is 2 beta_neg; it begins at 2.5 and stays in [1, 10]."""
    found = shown(Gap(SoftIntroVAE(), 0.5, "cpu"), [(2.0, fake)] * 400, torch.tensor(0.1))
    rate = math.exp(0.04) if change == 1.04 else math.exp(-0.04) if change == 0.96 else change
    for look in range(5):
        assert 2 * found[look] == pytest.approx(2.5 * rate ** (look + 1), rel=1e-4)
    assert 2 * found[-1] == pytest.approx(bound, rel=1e-5)
    assert found == (sorted(found) if change >= 1 else sorted(found, reverse=True))


@pytest.mark.parametrize(("kl", "beta_kl"), [(17.0, 0.5), (12.0, 1.0), (34.0, 0.5), (60.0, 0.1)])
def test_on_images_fakes_settle_above_the_real_images_of_the_warmup(kl: float, beta_kl: float) -> None:
    """With the beta_neg of the found exponent, the two pushes cancel at 1.4 times KL(real)."""
    objective = SoftIntroVAE(beta_kl=beta_kl, beta_neg="auto")
    rule, value = Gap(objective, 1 / 784, "cpu"), torch.tensor(0.1)
    shown(rule, [(kl, None)] * 5, value)
    rule.begin(value)
    shown(rule, [(1.4 * kl, 1.5 * kl)] * 50, value)  # where real images follow to
    level = math.log(value.item() / beta_kl) / (2 / 784 * value.item())
    assert level == pytest.approx(1.4 * kl, rel=1e-4)
    restored = Gap(objective, 1 / 784, "cpu")
    restored.load_state_dict(rule.state_dict())
    assert shown(restored, [(kl, kl)] * 9, torch.tensor(0.1)) == shown(rule, [(kl, kl)] * 9, torch.tensor(0.1))


@pytest.mark.parametrize("fake", [0.0, 1e6])
@pytest.mark.parametrize("kl", [1e-6, 0.05, 0.1, 60.0, 1e5])
def test_the_exponent_stays_in_its_bounds(kl: float, fake: float) -> None:
    """A KL below a tenth of a nat counts as that."""
    rule, value = Gap(SoftIntroVAE(), 0.5, "cpu"), torch.tensor(0.1)
    found = [beta_neg * max(kl, 0.1) for beta_neg in shown(rule, [(kl, kl * fake)] * 300, value)]
    assert all(1.0 * (1 - 1e-5) <= exponent <= 10.0 * (1 + 1e-5) for exponent in found)


@pytest.mark.parametrize(
    ("first", "factor", "home"),
    [(50.0, 1.0, 1.5), (2.0, 1.0, 1.5), (1.0, 1.0, 1.5), (50.0, 2.0, 3.0), (1.0, 9.0, 10.0)],
)
def test_inside_the_band_the_exponent_goes_home(first: float, factor: float, home: float) -> None:
    rule, value = Gap(SoftIntroVAE(), 0.5, "cpu"), torch.tensor(0.1)
    found = [2 * beta_neg for beta_neg in shown(rule, [(2.0, first)] * 20, value)]
    rule.multiply(factor)  # the guard's change is of what is aimed at
    found = [2 * beta_neg for beta_neg in shown(rule, [(2.0, 2.2)] * 2400, value)]
    away = [abs(math.log(exponent / home)) for exponent in found]
    steady = away.index(max(away[20:]))  # the average of the gap forgets first
    for index in range(steady, steady + 50):
        assert away[index + 1] == pytest.approx(0.995 * away[index], rel=1e-3, abs=1e-5)
    assert found[-1] == pytest.approx(home, rel=1e-3)


def test_beta_neg_follows_kl_real_so_that_the_exponent_stays() -> None:
    rule, value = Gap(SoftIntroVAE(), 0.5, "cpu"), torch.tensor(0.1)
    shown(rule, [(2.0, 2.2)] * 3000, value)
    assert value.item() == pytest.approx(0.75, rel=1e-5)
    shown(rule, [(8.0, 8.8)] * 100, value)
    assert value.item() == pytest.approx(1.5 / 8.0, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_kls_that_are_not_finite_change_nothing_of_a_game_in_its_band(bad: float) -> None:
    rule, value = Gap(SoftIntroVAE(), 0.5, "cpu"), torch.tensor(0.1)
    shown(rule, [(2.0, 2.2)] * 20, value)
    before = value.item()
    assert shown(rule, [(bad, 2.2), (2.0, bad), (bad, bad)] * 5, value) == pytest.approx([before] * 15, rel=1e-6)
    margin, kept = Margin(IntroVAE(), 1.0, "cpu"), torch.tensor(120.0)
    shown(margin, [(2.0, None)] * 5 + [(bad, None)] * 5, kept)
    margin.begin(kept)
    assert kept.item() == pytest.approx(2.4)


def test_kls_that_are_not_finite_change_nothing_of_a_game_outside_its_band() -> None:
    rule, value = Gap(SoftIntroVAE(), 0.5, "cpu"), torch.tensor(0.1)
    shown(rule, [(2.0, 9.0)] * 10, value)
    before = value.item()
    assert shown(rule, [(math.nan, math.nan)] * 3, value) == [before] * 3


def test_an_average_is_a_plain_mean_at_first_and_then_forgets() -> None:
    averages, plain = Averages(("kl",), "cpu"), []
    expected = 0.0
    for index, value in enumerate([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0]):
        averages.follow(kl=torch.tensor(value))
        plain.append(value)
        expected = sum(plain) / len(plain) if index < 5 else 0.8 * expected + 0.2 * value
        assert averages["kl"].item() == pytest.approx(expected, rel=1e-6)


def test_a_first_value_that_is_not_finite_is_not_averaged_in() -> None:
    averages = Averages(("kl",), "cpu")
    averages.follow(kl=torch.tensor(math.nan))
    averages.follow(kl=torch.tensor(2.0))
    assert averages["kl"].item() == 2.0


def test_the_margin_is_a_fifth_above_the_warm_up_s_kl_and_stays() -> None:
    rule, value = Margin(IntroVAE(), 1.0, "cpu"), torch.tensor(120.0)
    assert shown(rule, [(3.0, None), (5.0, None)], value) == [120.0, 120.0]
    rule.begin(value)
    assert value.item() == pytest.approx(1.2 * 4.0)
    assert shown(rule, [(50.0, 1.0)] * 20, value) == pytest.approx([4.8] * 20)
    collapsed = Margin(IntroVAE(), 1.0, "cpu")
    shown(collapsed, [(1e-4, None)] * 5, value)
    collapsed.begin(value)
    assert value.item() == pytest.approx(0.12)


@pytest.mark.parametrize(("alpha", "scale", "kl"), [(2.0, 0.5, 2.0), (0.5, 1 / 784, 30.0), (2.0, 0.5, 0.01)])
def test_the_balancing_beta_neg_gives_the_asked_exponent(alpha: float, scale: float, kl: float) -> None:
    for exponent in (1.0, 1.5, 7.0):
        beta_neg = balancing_beta_neg(SoftIntroVAE(alpha=alpha), scale, kl, exponent)
        assert alpha * scale * beta_neg * max(kl, 0.1) == pytest.approx(exponent)


# --- the controller


def kls(real: float, *fakes: float) -> dict[str, Tensor]:
    found = {"kl_real": real, **dict(zip(("kl_reconstruction", "kl_sample"), fakes, strict=False))}
    return {name: torch.tensor(value) for name, value in found.items()}


def test_multiply_of_a_fixed_setting_holds_for_the_rest_and_adds_up() -> None:
    controller = Controller(ASIntroVAE(beta_kl=0.4, beta_neg=2.0, annealing_rate=1.0), 0, 100, "cpu", 2)
    place = controller.values["beta_neg"].data_ptr()
    assert controller.update(0)["beta_neg"].item() == 2.0
    controller.multiply("beta_neg", 3.0)
    controller.multiply("beta_kl", 0.5)
    controller.multiply("beta_neg", 0.5)
    for step in (1, 50, 99):
        found = {name: value.item() for name, value in controller.update(step).items()}
        assert found == pytest.approx(
            {"beta_rec": 1.0, "beta_kl": 0.2, "beta_neg": 3.0, "distance_weight": 1.0, "c": step / 100}
        )
        assert controller.plain() == pytest.approx(found)
    assert controller.values["beta_neg"].data_ptr() == place  # a CUDA graph knows it by its address
    assert controller.found() == {}


def test_multiply_of_beta_neg_auto_holds_on_within_its_bounds() -> None:
    """What the rule aims at changes, not only the number of the moment."""
    found = {}
    for factor in (1.0, 2.0, 100.0, 0.01):
        controller = Controller(SoftIntroVAE(beta_neg="auto"), 0, 40_000, "cpu", 2)
        for step in range(0, 30_000, 10):
            controller.update(step)
            controller.observe(step, kls(2.0, 2.2, 2.4))
        assert controller.values["beta_neg"].item() == pytest.approx(0.75, rel=1e-5)
        controller.multiply("beta_neg", factor)
        assert controller.values["beta_neg"].item() == pytest.approx(0.75 * factor, rel=1e-5)
        for step in range(30_000, 30_200, 10):
            controller.update(step)
            controller.observe(step, kls(2.0, 2.2, 2.4))
        found[factor] = 2 * controller.values["beta_neg"].item()
    assert found == pytest.approx({1.0: 1.5, 2.0: 3.0, 100.0: 10.0, 0.01: 1.0}, rel=1e-5)


@pytest.mark.parametrize("start", [0.0, 0.05])
def test_the_other_betas_come_from_the_warm_up_s_to_their_own_in_equal_ratios(start: float) -> None:
    objective = SoftIntroVAE(beta_rec=0.2, beta_kl=0.3, beta_neg="auto")
    ramp = ramp_from(objective, Warmup(10, beta_rec=0.8, beta_kl=start))
    controller = Controller(objective, 10, 2010, "cpu", 2, ramp_from=ramp)
    found: dict[str, list[float]] = {"beta_rec": [], "beta_kl": []}
    for step in range(260):
        values = controller.update(step)
        for name, seen in found.items():
            seen.append(values[name].item())
            assert controller.plain()[name] == pytest.approx(seen[-1])
    for name, first, last in (("beta_rec", 0.8, 0.2), ("beta_kl", start, 0.3)):
        assert found[name][:11] == pytest.approx([first] * 11)
        assert found[name][210:] == pytest.approx([last] * 50)
        if first:  # a tenth of 2,000 steps; half the way is the geometric mean
            assert found[name][110] == pytest.approx(math.sqrt(first * last))
            ratios = [after / before for before, after in itertools.pairwise(found[name][10:211])]
            assert ratios == pytest.approx([ratios[0]] * 200, rel=1e-4)
        else:  # 0 has no ratio
            assert found[name][110] == pytest.approx(last / 2)
    controller.multiply("beta_kl", 2.0)
    assert controller.update(260)["beta_kl"].item() == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("objective", "warmup"),
    [
        (SoftIntroVAE(beta_neg=0.9), Warmup(10)),
        (SoftIntroVAE(beta_neg="auto"), Warmup(0)),
        (IntroVAE(margin="auto"), Warmup(50, beta_kl=0.0)),
        (IntroVAE(margin=3.0), Warmup(50)),
        (VAE(), Warmup(10)),
    ],
    ids=["fixed", "no-warm-up", "no-KL", "fixed-margin", "VAE"],
)
def test_without_a_setting_to_find_there_is_no_ramp(objective: Objective, warmup: Warmup) -> None:
    assert ramp_from(objective, warmup) == {}


def test_what_the_guard_multiplied_it_can_take_back() -> None:
    rule, value = Gap(SoftIntroVAE(), 0.5, "cpu"), torch.tensor(0.1)
    for factor in (0.25, 4.0):
        rule.multiply(factor)
    shown(rule, [(2.0, 2.2)] * 4000, value)
    assert 2 * value.item() == pytest.approx(1.5, rel=1e-4)


def test_multiply_of_an_automatic_margin_stays() -> None:
    controller = Controller(IntroVAE(margin="auto"), 30, 1000, "cpu", 2)
    for step in range(60):
        controller.update(step)
        controller.observe(step, kls(4.0, 5.0, 5.0))
    controller.multiply("margin", 1.5)
    for step in range(60, 100):
        controller.update(step)
        controller.observe(step, kls(40.0, 5.0, 5.0))
    assert controller.values["margin"].item() == pytest.approx(1.5 * 1.2 * 4.0)


def test_a_rule_looks_every_tenth_step_at_the_mean_of_both_fakes() -> None:
    controller, hand = Controller(SoftIntroVAE(beta_neg="auto"), 35, 1000, "cpu", 2), Hand(2.0, 0.5)
    for step in range(200):
        controller.update(step)
        if step == 35:
            assert controller.values["beta_neg"].item() == pytest.approx(hand.value(), rel=1e-5)
        real, fake = WALK[step]
        controller.observe(step, kls(real) if step < 35 else kls(real, fake, 3 * fake))
        if step % 10 == 0:
            hand.look(real, None if step < 35 else 2 * fake)
    assert controller.values["beta_neg"].item() == pytest.approx(hand.value(), rel=1e-4)


@of_each
def test_going_back_restores_the_rule_and_keeps_what_was_multiplied(cls: type[Objective], name: str) -> None:
    def after(controller: Controller, start: int, steps: int, scale: float = 1.0) -> float:
        for step in range(start, start + steps, 10):
            controller.update(step)
            controller.observe(step, kls(scale * 2.0, scale * 2.2, scale * 2.4))
        return controller.values[name].item()

    controller = Controller(cls(**{name: "auto"}), 40, 60_000, "cpu", 2)
    then = after(controller, 0, 45_000)
    state = controller.state_dict()
    after(controller, 45_000, 100, scale=30.0)
    controller.multiply(name, 2.0)
    controller.go_back(state)
    assert controller.values[name].item() == pytest.approx(2 * then, rel=1e-5)
    assert after(controller, 45_100, 100) == pytest.approx(2 * then, rel=1e-5)
    assert state["found"][name].item() == pytest.approx(then)  # what is kept is no view of what moves


@of_each
def test_the_state_of_a_controller_survives_a_file(cls: type[Objective], name: str) -> None:
    def played(controller: Controller, start: int, end: int) -> list[float]:
        found = []
        for step in range(start, end):
            found.append(controller.update(step)[name].item())
            real, fake = WALK[step]
            controller.observe(step, kls(real, fake, fake))
        return found

    one, two = (Controller(cls(**{name: "auto"}), 40, 200, "cpu", 2) for _ in range(2))
    for cut in (25, 40, 41, 90):
        played(one, {25: 0, 40: 25, 41: 40, 90: 41}[cut], cut)
        buffer = io.BytesIO()
        one.multiply(name, 1.01)
        torch.save(one.state_dict(), buffer)
        buffer.seek(0)
        two.load_state_dict(torch.load(buffer, weights_only=True))
        assert two.values[name].item() == one.values[name].item()
        assert two.plain() == one.plain()
    assert played(one, 90, 200) == played(two, 90, 200)


# --- in a run


@pytest.mark.parametrize("cls", [SoftIntroVAE, ASIntroVAE])
def test_beta_neg_auto_begins_with_the_balance_of_the_logged_warm_up(tmp_path: Path, cls: Any) -> None:
    run = small(tmp_path / "run", objective=cls(beta_neg="auto", beta_kl=0.3), warmup=Warmup(35, 0.8, 0.05), steps=60)
    log = run.log()
    assert all("beta_neg" in row for row in log)
    hand = Hand(2.0, 0.5, beta_kl=0.3)
    for row in log:
        index = row["step"] - 1
        if index == 35:
            hand.begin()
            assert row["beta_neg"] == pytest.approx(hand.value(), rel=1e-5)
            assert hand.means["kl"] == pytest.approx(sum(log[i]["kl_real"] for i in (0, 10, 20, 30)) / 4)
        if index >= 35:
            assert row["beta_neg"] == pytest.approx(hand.value(), rel=1e-4)
        if index % 10 == 0:
            fakes = (row["kl_reconstruction"] + row["kl_sample"]) / 2
            hand.look(row["kl_real"], None if index < 35 else fakes)
    assert [row["beta_neg"] for row in log[:35]] == pytest.approx([0.1] * 35)
    assert len({row["beta_neg"] for row in log[35:]}) == 3  # at its beginning, and after the looks of steps 41 and 51


def test_margin_auto_is_a_fifth_above_the_logged_warm_up_s_kl(tmp_path: Path) -> None:
    run = small(tmp_path / "run", objective=IntroVAE(margin="auto"), warmup=Warmup(30), steps=45)
    log = run.log()
    expected = 1.2 * max(0.1, sum(log[i]["kl_real"] for i in (0, 10, 20)) / 3)
    assert [row["margin"] for row in log[:30]] == [120.0] * 30
    assert [row["margin"] for row in log[30:]] == pytest.approx([expected] * 15)
    # The loss is that of this margin: L_E >= KL(x) + beta AE, and at most 2 alpha margin above it.
    for row in log[30:]:
        above = row["loss_encoder"] - row["kl_real"] - row["beta"] * 0.5 * row["rec"]
        assert 0 <= above <= 2 * 0.25 * expected + 1e-5


def test_the_logged_beta_neg_is_the_one_that_the_step_was_made_with(tmp_path: Path) -> None:
    run = small(tmp_path / "run", objective=SoftIntroVAE(beta_neg="auto"), warmup=Warmup(30), steps=31)
    log = run.log()
    hand = Hand(2.0, 0.5)
    for i in (0, 10, 20):
        hand.look(log[i]["kl_real"], None)
    hand.begin()
    assert log[30]["beta_neg"] == pytest.approx(hand.value(), rel=1e-5)


def rewound(run: Run, folder: Path, step: int) -> Run:
    found = Run(Path(shutil.copytree(run.folder, folder)))
    shutil.rmtree(found.model_folder)
    for path in list_checkpoints(found.checkpoints):
        if int(path.stem.removeprefix("step_")) > step:
            path.unlink()
    return found


@pytest.mark.parametrize("step", [20, 60], ids=["in-warmup", "in-game"])
@of_each
def test_a_resumed_run_with_auto_equals_one_that_was_not_stopped(
    tmp_path: Path, cls: type[Objective], name: str, step: int
) -> None:
    objective = cls(**{name: "auto"})
    settings: dict[str, Any] = {"objective": objective, "warmup": Warmup(33), "log_every": 5, "checkpoint_every": step}
    whole = small(tmp_path / "whole", steps={20: 39, 60: 95}[step], **settings)
    resumed = rewound(whole, tmp_path / "resumed", step)
    assert [path.stem for path in list_checkpoints(resumed.checkpoints)] == [f"step_{step:08d}"]
    fit(resume=resumed.folder, progress=False)
    assert weights(resumed) == weights(whole)
    assert numbers(resumed) == numbers(whole)
    assert len({row[name] for row in whole.log()}) > 1


def test_without_a_warm_up_the_exponent_begins_at_the_first_step_s_kl(tmp_path: Path) -> None:
    run = small(tmp_path / "run", objective=SoftIntroVAE(beta_rec=0.2, beta_kl=0.3, beta_neg="auto"), steps=12)
    first, second = run.log()[:2]
    assert second["beta_neg"] * max(0.1, first["kl_real"]) == pytest.approx(2.5, rel=0.05)  # but for one look's change
    assert (first["beta_rec"], first["beta_kl"]) == pytest.approx((0.2, 0.3))


@pytest.mark.parametrize("section", ["gradients"])
def test_rows_whose_gradients_are_compared_begin_at_the_same_weights(section: str) -> None:
    """The four objectives' warm-ups are one, to the bit: docs/gradients.md compares what follows."""
    found = []
    plan = from_file("table-2d")
    cells = next(its.cells for its in plan.sections if its.key == section)
    for cell in cells:
        words = [*cell.words, "--seed", "0", "--device", "cpu", "--out", "none"]
        trainer = Trainer(config_from_words([*words, "--steps", "200"]))
        assert trainer.config.warmup.steps == 20
        for _ in range(20):
            trainer._one_step()
        found.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert len(found) == 4
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_introvae_s_beta_comes_from_what_the_warm_up_has() -> None:
    """KL + beta rec / 2 with that beta is the warm-up's loss but for a factor."""
    objective, warmup = IntroVAE(beta=0.375, margin="auto"), Warmup(30, beta_rec=16.0, beta_kl=0.5)
    ramp = ramp_from(objective, warmup)
    real = Judged(*(torch.randn(4, 2) for _ in range(2)), DiagonalGaussian(*torch.randn(2, 4, 2)), torch.rand(4))
    with_beta = real.kl.mean() + ramp["beta"] * real.rec.mean() / 2
    assert with_beta.item() * 0.5 == pytest.approx(warmup.loss(real, 1.0).item(), rel=1e-6)
    controller = Controller(objective, 30, 1030, "cpu", 2, ramp_from=ramp)
    found = [controller.update(step)["beta"].item() for step in range(140)]
    assert found[:31] == pytest.approx([64.0] * 31)
    assert found[80] == pytest.approx(math.sqrt(64.0 * 0.375), rel=1e-5)
    assert found[130:] == pytest.approx([0.375] * 10)


def test_a_run_with_beta_neg_auto_tells_of_its_ramp_and_resumes_within_it(tmp_path: Path) -> None:
    warmup = Warmup(140, beta_rec=0.8, beta_kl=0.05)
    objective = SoftIntroVAE(beta_rec=0.2, beta_kl=0.3, beta_neg="auto")
    settings: dict[str, Any] = {"objective": objective, "warmup": warmup, "steps": 300, "checkpoint_every": 150}
    whole = small(tmp_path / "whole", **settings)
    # The ramp takes 16 steps, from the one with the number 140 on.
    found = [whole.log()[number]["beta_rec"] for number in (139, 140, 148, 156)]
    assert found == pytest.approx([0.8, 0.8, math.sqrt(0.8 * 0.2), 0.2])
    resumed = rewound(whole, tmp_path / "resumed", 150)
    fit(resume=resumed.folder, progress=False)
    assert weights(resumed) == weights(whole)
    assert numbers(resumed) == numbers(whole)


@of_each
def test_the_config_of_an_automatic_run_is_a_recipe_of_one(tmp_path: Path, cls: type[Objective], name: str) -> None:
    run = small(tmp_path / "run", objective=cls(**{name: "auto"}), warmup=Warmup(20), steps=25)
    assert yaml.safe_load(run.config_path.read_text())["objective"]["init_args"][name] == "auto"
    assert run.config().objective.automatic == (name,)
    again = fit(recipe=str(run.config_path), out=str(tmp_path / "again"), progress=False)
    assert weights(again) == weights(run)
    assert numbers(again) == numbers(run)


def test_another_number_of_lines_and_pictures_changes_nothing_of_an_automatic_run(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"objective": SoftIntroVAE(beta_neg="auto"), "steps": 50}
    assert weights(small(tmp_path / "a", log_every=50, **settings)) == weights(
        small(tmp_path / "b", log_every=3, checkpoint_every=7, **settings)
    )


# --- the decoder's gradient in two parts

SOFT = {"beta_rec": 0.7, "beta_kl": 0.4, "beta_neg": 1.9}
GRADIENTS: dict[str, tuple[Any, Callable[..., Any], dict[str, Any]]] = {
    "introvae": (IntroVAE, textbook.introvae, {"beta": 0.6, "alpha": 0.25, "margin": 2.0}),
    "introvae-official": (
        IntroVAE,
        textbook.introvae,
        {"beta": 0.6, "alpha": 0.25, "margin": 2.0, "variant": "official_code"},
    ),
    "soft": (SoftIntroVAE, textbook.soft_introvae, SOFT),
    "soft-gamma": (SoftIntroVAE, textbook.soft_introvae, {**SOFT, "gamma_r": 1.0}),
    "soft-gamma-official": (
        SoftIntroVAE,
        textbook.soft_introvae,
        {**SOFT, "gamma_r": 1.0, "variant": "official_code"},
    ),
    "as": (ASIntroVAE, textbook.as_introvae, SOFT),
    "as-real": (ASIntroVAE, textbook.as_introvae, {**SOFT, "contrast": "real-sample", "distance_weight": 2.0}),
    "as-official": (ASIntroVAE, textbook.as_introvae, {**SOFT, "variant": "official_code"}),
}
C = 0.3


def build(shape: tuple[int, ...] = (2,), network: str = "tiny-mlp") -> IntrospectiveVAE:
    torch.manual_seed(0)
    model = IntrospectiveVAE.build(shape, network, latent_dim=3).double()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    return model


def batch(model: IntrospectiveVAE, n: int = 6) -> tuple[Tensor, Noise]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, *(model.shape or ()), generator=generator, dtype=torch.float64)
    return x, Noise.draw(n, 3, generator, dtype=torch.float64)


def values_of(objective: Objective) -> dict[str, Tensor]:
    found = {name: torch.tensor(value, dtype=torch.float64) for name, value in objective.values().items()}
    return {**found, "c": torch.tensor(C, dtype=torch.float64)} if "c" in found else found


def norm(loss: Tensor, decoder: torch.nn.Module) -> float:
    found = torch.autograd.grad(loss, list(decoder.parameters()), retain_graph=True, allow_unused=True)
    return math.sqrt(sum(float((gradient**2).sum()) for gradient in found if gradient is not None))


@pytest.mark.parametrize(("shape", "network"), [((2,), "tiny-mlp"), ((1, 8, 8), "tiny-conv")])
@pytest.mark.parametrize("case", list(GRADIENTS))
def test_the_norms_are_those_of_the_losses_parts(case: str, shape: tuple[int, ...], network: str) -> None:
    """The decoder's terms of the fakes alone, and of the real images alone, from the papers' pseudo-code."""
    cls, transcription, settings = GRADIENTS[case]
    model = build(shape, network)
    x, noise = batch(model)
    before, objective = copy.deepcopy(model), cls(**settings)
    record = IntrospectiveStep(model, objective, lr=0.01)(x, noise, values_of(objective), gradients=True)

    encoder, decoder = model.encoder, before.decoder  # the decoder is judged by the updated encoder
    with torch.no_grad():
        q = before.encoder(x)
        z, again = textbook.latent(*q, noise.real), noise.again.chunk(2)
        if settings.get("contrast") == "real-sample":
            q = encoder(x)
    x_r, x_p = decoder(z), decoder(noise.prior)
    q_r, q_p = encoder(x_r), encoder(x_p)
    z_r, z_p = (textbook.latent(*q_f, eps) for q_f, eps in zip((q_r, q_p), again, strict=True))
    if settings.get("variant") == "official_code":
        recs = [textbook.rec(f.detach(), decoder(z_f.detach())) for f, z_f in ((x_r, z_r), (x_p, z_p))]
    else:
        recs = [textbook.rec(f, decoder(z_f).detach()) for f, z_f in ((x_r, z_r), (x_p, z_p))]
    more = {"c": C} if cls is ASIntroVAE else {}
    loss = transcription(**settings, **more)[1]
    adversarial = loss(x, x_r.detach(), q, q_r, q_p, *recs)
    weight = settings["beta"] / 2 if cls is IntroVAE else settings["beta_rec"] / x[0].numel()
    reconstruction = weight * textbook.rec(x, x_r).mean()
    expected = {"adversarial": norm(adversarial, decoder), "reconstruction": norm(reconstruction, decoder)}
    assert min(expected.values()) > 1e-6
    for name, value in expected.items():
        assert record[f"gradient_{name}"].item() == pytest.approx(value, rel=1e-8), name


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    ("case", "accumulation"),
    [(case, 1) for case in GRADIENTS]
    + [(case, 3) for case in ("introvae", "soft", "soft-gamma", "soft-gamma-official")],
)
def test_looking_at_the_gradients_changes_neither_the_update_nor_the_rest(
    case: str, share: bool, accumulation: int
) -> None:
    cls, _, settings = GRADIENTS[case]
    objective = cls(**settings)
    found = []
    for looks in (True, False):
        model = build()
        step = IntrospectiveStep(model, objective, lr=0.01, share=share, accumulation=accumulation)
        x, noise = batch(model)
        records = [step(x, noise, values_of(objective), gradients=looks) for _ in range(3)]
        found.append((model.state_dict(), records))
    (ours, with_norms), (theirs, without) = found
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for more, less in zip(with_norms, without, strict=True):
        assert more.keys() - less.keys() == {"gradient_adversarial", "gradient_reconstruction"}
        assert all(torch.equal(more[name], less[name]) for name in less)


@pytest.mark.parametrize("case", ["soft-gamma", "introvae"])
def test_the_norms_of_a_batch_in_parts_are_those_of_the_whole(case: str) -> None:
    cls, _, settings = GRADIENTS[case]
    records = []
    for accumulation in (1, 3):
        model = build()
        x, noise = batch(model)
        step = IntrospectiveStep(model, cls(**settings), lr=0.01, accumulation=accumulation)
        records.append(step(x, noise, gradients=True))
    for name in ("gradient_adversarial", "gradient_reconstruction"):
        assert records[1][name].item() == pytest.approx(records[0][name].item(), rel=1e-9)


def test_steps_without_fakes_have_no_parts() -> None:
    model = build()
    x, noise = batch(model)
    plain = IntrospectiveStep(model, VAE())(x, noise, gradients=True)
    warming = IntrospectiveStep(model, SoftIntroVAE(beta_neg=1.0))(x, noise, warming=True, gradients=True)
    assert not any(name.startswith("gradient") for name in (*plain, *warming))


def test_the_norms_are_in_the_log_where_they_are_asked_for(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"objective": SoftIntroVAE(beta_neg=1.0), "warmup": Warmup(10), "steps": 33}
    looked = small(tmp_path / "looked", log_every=5, gradient_every=10, **settings)
    plain = small(tmp_path / "plain", log_every=5, **settings)
    names = ("gradient_adversarial", "gradient_reconstruction")
    found = {row["step"]: [row[name] for name in names if name in row] for row in looked.log()}
    assert [step for step, norms in found.items() if norms] == [20, 30]  # step 10 is the warm-up's last
    assert list(found) == [5, 10, 15, 20, 25, 30, 33]
    assert all(len(norms) == 2 and min(norms) > 0 for norms in (found[20], found[30]))
    assert weights(looked) == weights(plain)
    assert numbers(looked, *names) == numbers(plain)
    assert not any(name in row for row in plain.log() for name in names)


@pytest.mark.parametrize(("gradient_every", "log_every"), [(7, 5), (5, 10), (-10, 5), (2.5, 1)])
def test_gradient_every_is_a_multiple_of_log_every(
    refused: Refused, tmp_path: Path, gradient_every: float, log_every: int
) -> None:
    words = ["--gradient-every", gradient_every, "--log-every", log_every, "--out", tmp_path / "run"]
    line = refused("fit", "--recipe", "none", "--data", "density:rings", *words)
    assert "gradient_every" in line
    assert json.dumps(gradient_every) in line
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="gradient_every"):
        FitConfig(gradient_every=gradient_every, log_every=log_every)  # pyright: ignore
    assert FitConfig(gradient_every=0, log_every=50).gradient_every == 0


def test_an_automatic_beta_neg_waits_while_the_distance_leads() -> None:
    controller = Controller(ASIntroVAE(beta_neg="auto", annealing_rate=5.0), 20, 120, "cpu", 2)
    seen = {}
    for step in range(120):
        seen[step] = controller.update(step)["beta_neg"].item()
        warm = {"kl_real": torch.tensor(2.0)}
        fakes = {
            "kl_reconstruction": torch.tensor(90.0),
            "kl_sample": torch.tensor(90.0),
            "kl_real": torch.tensor(60.0),
        }
        controller.observe(step, warm if step < 20 else fakes)
    begun = 2.5 / (2 * 0.5 * 2.0)
    assert [seen[step] for step in range(20, 41)] == pytest.approx([begun] * 21)  # c reaches 1 at step 40
    assert seen[60] < begun
