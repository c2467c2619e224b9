"""Detection figures against closed forms, scikit-learn and scipy; thresholds and intervals by simulation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.integrate
import scipy.spatial.distance
import scipy.stats
import sklearn.covariance
import sklearn.metrics
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from commands import REMEDY
from introvae.errors import CheckpointError, ConfigError, DataError
from introvae.metrics.detection import METRICS, ROC_POINTS, Interval, calibrate, detection_metrics, roc_curve
from introvae.metrics.mahalanobis import Mahalanobis
from introvae.metrics.pixel_curve import DRAWS, MANTISSA, PixelCurve

PHI = torch.special.ndtr


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(n: int, seed: int = 0, shift: float = 0.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, generator=generator(seed), dtype=dtype) + shift


def evenly(n: int, shift: float = 0.0) -> Tensor:
    """The quantiles of a Gaussian, which follow it without chance."""
    return torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n) + shift


def values(normal: Tensor, anomalous: Tensor) -> list[float]:
    found = detection_metrics(normal, anomalous, draws=1)
    return [found[name].value for name in METRICS]


def by_sklearn(normal: Tensor, anomalous: Tensor) -> list[float]:
    """The same from scikit-learn, in the order of `METRICS`."""
    scores = np.concatenate([normal.double().numpy(), anomalous.double().numpy()])
    labels = np.repeat([0, 1], [len(normal), len(anomalous)])
    fpr, tpr, _ = sklearn.metrics.roc_curve(labels, scores, drop_intermediate=False)
    area = sklearn.metrics.roc_auc_score(labels, scores)
    return [float(area), float(sklearn.metrics.average_precision_score(labels, scores)), float(fpr[tpr >= 0.95][0])]


SETS: dict[str, tuple[Tensor, Tensor]] = {
    "apart": (drawn(80), drawn(50, 1, shift=1.0)),
    "float32": (drawn(80, dtype=torch.float32), drawn(50, 1, shift=1.0, dtype=torch.float32)),
    "mixed types": (drawn(40, dtype=torch.float32), drawn(50, 1)),
    "ties": (drawn(100).mul(2).round(), drawn(60, 1, shift=0.5).mul(2).round()),
    "two values": ((drawn(30) > 0).double(), (drawn(20, 1, shift=0.5) > 0).double()),
    "all equal": (torch.ones(7), torch.ones(4)),
    "few anomalies": (drawn(300), drawn(3, 1, shift=0.5)),
    "one of each": (torch.tensor([0.3]), torch.tensor([0.2])),
    "exactly 95 %": (drawn(50), drawn(20, 1)),
    "the wrong way": (drawn(50, shift=1.0), drawn(40, 1)),
}


# --- images


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0, 3.0])
def test_of_two_gaussians_in_closed_form(shift: float) -> None:
    n, x = 4000, torch.tensor(shift, dtype=torch.float64)
    auroc, aupr, fpr = values(evenly(n), evenly(n, shift))
    assert auroc == pytest.approx(PHI(x / math.sqrt(2)).item(), abs=1e-4)
    assert fpr == pytest.approx(PHI(-x - torch.special.ndtri(torch.tensor(0.05).double())).item(), abs=1e-3)
    norm = scipy.stats.norm

    def precision(recall: float) -> float:
        return recall / (recall + norm.sf(norm.isf(recall) + shift))

    assert aupr == pytest.approx(scipy.integrate.quad(precision, 0, 1)[0], abs=1e-3)


@pytest.mark.parametrize("name", list(SETS))
def test_values_are_those_of_sklearn(name: str) -> None:
    assert values(*SETS[name]) == pytest.approx(by_sklearn(*SETS[name]), rel=1e-12)


@pytest.mark.parametrize("name", ["apart", "float32", "ties", "two values", "few anomalies"])
def test_every_draw_of_the_bootstrap_is_that_of_sklearn(name: str) -> None:
    normal, anomalous = SETS[name]
    draws, of_seed = 30, generator(5)
    each = []
    for _ in range(draws):
        rows = [torch.randint(len(x), (len(x),), generator=of_seed) for x in (normal, anomalous)]
        each.append(by_sklearn(normal[rows[0]], anomalous[rows[1]]))
    for n in (1, 2, draws):  # all quantiles of the first n draws agree only if each draw does
        low, high = np.quantile(np.array(each[:n]), [0.025, 0.975], axis=0)
        found = detection_metrics(normal, anomalous, draws=n, seed=5)
        assert [found[name].low for name in METRICS] == pytest.approx(low.tolist(), rel=1e-12)
        assert [found[name].high for name in METRICS] == pytest.approx(high.tolist(), rel=1e-12)


@pytest.mark.parametrize("name", list(SETS))
def test_order_and_sign(name: str) -> None:
    normal, anomalous = SETS[name]
    auroc = values(normal, anomalous)[0]
    assert values(anomalous, normal)[0] == pytest.approx(1 - auroc, rel=1e-12)
    assert values(-normal, -anomalous)[0] == pytest.approx(1 - auroc, rel=1e-12)
    assert values(normal.flip(0), anomalous.flip(0)) == values(normal, anomalous)


@pytest.mark.parametrize("monotone", [torch.exp, torch.atan, lambda x: 3 * x - 7, lambda x: x**3 + x])
def test_monotone_transforms_change_nothing(monotone: Callable[[Tensor], Tensor]) -> None:
    normal, anomalous = SETS["ties"]
    found = detection_metrics(normal, anomalous, draws=20)
    assert detection_metrics(monotone(normal), monotone(anomalous), draws=20) == found
    for ours, theirs in zip(
        roc_curve(normal, anomalous), roc_curve(monotone(normal), monotone(anomalous)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_sets_that_do_not_overlap_or_do_not_differ() -> None:
    assert values(torch.zeros(9), torch.ones(3)) == [1.0, 1.0, 0.0]
    assert values(torch.zeros(9), torch.zeros(3)) == [0.5, 0.25, 1.0]
    assert values(torch.ones(9), torch.zeros(3)) == [0.0, 0.25, 1.0]


def test_more_separation_is_better() -> None:
    found = [values(evenly(500), evenly(300, shift)) for shift in (-1.0, 0.0, 1.0, 2.0, 4.0)]
    auroc, aupr, fpr = zip(*found, strict=True)
    assert list(auroc) == sorted(auroc)
    assert list(aupr) == sorted(aupr)
    assert list(fpr) == sorted(fpr, reverse=True)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    # Three standard errors about the share that the docstring tells.
    shift, repeats, draws = 1.0, 200, generator()
    truth = {
        "auroc": scipy.stats.norm.cdf(shift / math.sqrt(2)),
        "fpr_at_95_tpr": scipy.stats.norm.sf(scipy.stats.norm.ppf(0.05) + shift),
    }
    held = dict.fromkeys(truth, 0)
    for seed in range(repeats):
        normal, anomalous = torch.randn(2, 100, generator=draws, dtype=torch.float64)
        found = detection_metrics(normal, anomalous + shift, draws=100, seed=seed)
        for name, value in truth.items():
            held[name] += bool(found[name].low <= value <= found[name].high)
    for times in held.values():
        assert times / repeats == pytest.approx(0.93, abs=3 * math.sqrt(0.93 * 0.07 / repeats))


def test_intervals_narrow_with_the_root_of_the_number() -> None:
    few, many = (detection_metrics(evenly(n), evenly(n, 1.0), draws=400)["auroc"] for n in (100, 1600))
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(4.0, rel=0.2)
    # Hanley and McNeil's standard error, for 100 of each.
    a = few.value
    error = math.sqrt((a * (1 - a) + 99 * (a / (2 - a) - a**2) + 99 * (2 * a**2 / (1 + a) - a**2)) / 100**2)
    assert few.high - few.low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_the_seed_gives_the_draws() -> None:
    sets = SETS["apart"]
    first = detection_metrics(*sets, draws=20)
    state = torch.get_rng_state()
    assert detection_metrics(*sets, draws=20) == first
    assert torch.equal(state, torch.get_rng_state())
    other = detection_metrics(*sets, draws=20, seed=1)
    assert other != first
    assert [other[name].value for name in METRICS] == [first[name].value for name in METRICS]
    assert detection_metrics(*SETS["one of each"])["auroc"] == Interval(0.0, 0.0, 0.0)


BAD = {
    "empty": (torch.zeros(0), "there are no .* scores"),
    "NaN": (torch.tensor([1.0, math.nan, math.inf]), "2 of 3 .* scores are NaN or infinite"),
    "table": (torch.zeros(3, 1), r"shape \[N\], not \(3, 1\)"),
}


@pytest.mark.parametrize("name", list(BAD))
@pytest.mark.parametrize("measure", [detection_metrics, roc_curve])
def test_scores_that_are_none_are_refused(name: str, measure: Callable[..., object]) -> None:
    scores, message = BAD[name]
    for sets, kind in (((scores, torch.ones(3)), "normal"), ((torch.ones(3), scores), "anomalous")):
        with pytest.raises(DataError, match=message) as refusal:
            measure(*sets)
        assert kind in str(refusal.value)
    with pytest.raises(DataError, match=message):
        calibrate(scores)


def test_draws_and_seeds_that_are_none_are_refused() -> None:
    for settings in ({"draws": 0}, {"draws": 2.5}, {"seed": -1}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            detection_metrics(*SETS["apart"], **settings)


# --- groups of images


def scans(n: int, slices: int, correlation: float, seed: int, shift: float = 0.0) -> Tensor:
    """Scores `[n, slices]` of standard deviation 1 that correlate within a scan."""
    own, shared = torch.randn(n, slices + 1, generator=generator(seed), dtype=torch.float64).split([slices, 1], dim=1)
    return math.sqrt(1 - correlation) * own + math.sqrt(correlation) * shared + shift


@pytest.mark.parametrize("name", list(SETS))
def test_groups_of_one_image_change_nothing(name: str) -> None:
    normal, anomalous = SETS[name]
    names = [f"{i}.png" for i in range(len(normal) + len(anomalous))]
    groups = names[: len(normal)], names[len(normal) :]
    assert detection_metrics(normal, anomalous, groups=groups, draws=30) == detection_metrics(
        normal, anomalous, draws=30
    )


@pytest.mark.parametrize("name", ["apart", "ties", "few anomalies"])
def test_slices_that_are_all_alike_tell_no_more_than_one_of_each_scan(name: str) -> None:
    normal, anomalous = SETS[name]
    groups = (
        [i for i in range(len(normal)) for _ in range(7)],
        [-1 - i for i in range(len(anomalous)) for _ in range(7)],
    )
    copies = normal.repeat_interleave(7), anomalous.repeat_interleave(7)
    one, many = detection_metrics(normal, anomalous), detection_metrics(*copies, groups=groups)
    for metric in METRICS:
        assert many[metric] == pytest.approx(one[metric], rel=1e-9)
    apart = detection_metrics(*copies)["auroc"]
    assert apart.high - apart.low < 0.6 * (one["auroc"].high - one["auroc"].low)


@pytest.mark.parametrize("kind", ["some of both", "one without an anomaly", "each of both"])
def test_every_draw_is_of_whole_scans(kind: str) -> None:
    normal, anomalous = drawn(40), drawn(30, 1, shift=1.0)
    groups = {
        "some of both": ([i // 5 for i in range(40)], [5 + i // 6 for i in range(30)]),  # 5 to 7
        "one without an anomaly": ([i // 5 for i in range(40)], [1 + i // 4 for i in range(30)]),
        "each of both": ([i // 5 for i in range(40)], [i // 4 for i in range(30)]),
    }[kind]
    some = sorted(set(groups[1]))
    others = sorted(set(groups[0]) - set(some))
    strata = (
        [sorted({*groups[0], *groups[1]})] if len(others) == 1 else [stratum for stratum in (others, some) if stratum]
    )
    assert len(strata) == (2 if kind == "some of both" else 1)
    rows, of_seed = [np.array(kind) for kind in groups], generator(5)
    each = []
    for _ in range(30):
        whole = [s[i] for s in strata for i in torch.randint(len(s), (len(s),), generator=of_seed).tolist()]
        chosen = [np.concatenate([np.flatnonzero(of == scan) for scan in whole]) for of in rows]
        each.append(by_sklearn(normal[chosen[0]], anomalous[chosen[1]]))
    for n in (1, 2, 30):
        low, high = np.quantile(np.array(each[:n]), [0.025, 0.975], axis=0)
        found = detection_metrics(normal, anomalous, groups=groups, draws=n, seed=5)
        assert [found[name].low for name in METRICS] == pytest.approx(low.tolist(), rel=1e-12)
        assert [found[name].high for name in METRICS] == pytest.approx(high.tolist(), rel=1e-12)
        assert [found[name].value for name in METRICS] == by_sklearn(normal, anomalous)


def test_draws_without_one_kind_do_not_count() -> None:
    normal, anomalous = drawn(10), drawn(30, 1)
    groups = [i % 2 for i in range(10)], [i // 3 for i in range(30)]  # two of ten scans have normal slices
    for name, found in detection_metrics(normal, anomalous, groups=groups, draws=200).items():
        assert 0 <= found.low < found.high <= 1, name


@pytest.mark.parametrize("few", [0, 1])
def test_one_scan_of_a_kind_gives_no_interval(few: int) -> None:
    groups = [[f"scan {i // 4}" for i in range(20)], [f"other {i // 4}" for i in range(20)]]
    groups[few] = ["alone"] * 20
    found = detection_metrics(drawn(20), drawn(20, 1), groups=(groups[0], groups[1]), draws=5)
    assert [found[name].value for name in METRICS] == values(drawn(20), drawn(20, 1))
    assert all(math.isnan(end) for interval in found.values() for end in interval[1:])


def test_intervals_of_whole_scans_hold_the_truth_where_those_of_slices_do_not() -> None:
    truth, held, taken = scipy.stats.norm.cdf(1 / math.sqrt(2)), 0, 0
    groups = [i for i in range(30) for _ in range(20)], [-1 - i for i in range(30) for _ in range(20)]
    for seed in range(60):
        sets = scans(30, 20, 0.6, 2 * seed).flatten(), scans(30, 20, 0.6, 2 * seed + 1, shift=1.0).flatten()
        its, apart = (detection_metrics(*sets, groups=of, draws=60)["auroc"] for of in (groups, None))
        held += its.low <= truth <= its.high
        taken += apart.low <= truth <= apart.high
    assert held / 60 > 0.93 - 3 * math.sqrt(0.93 * 0.07 / 60)
    assert taken / 60 < 0.6


@pytest.mark.parametrize("groups", [([0, 1], [2]), ([0, 1, 1], []), ([], [0, 1, 1])])
def test_groups_of_another_number_are_refused(groups: tuple[list[int], list[int]]) -> None:
    with pytest.raises(DataError, match=r"groups for 3, 1 scores: give one for each"):
        detection_metrics(drawn(3), drawn(1), groups=groups)
    with pytest.raises(DataError, match=r"2 groups for 30 scores: give one for each"):
        calibrate(drawn(30), groups=[0, 1])


# --- the curve


@pytest.mark.parametrize("name", list(SETS))
def test_a_short_curve_is_that_of_sklearn(name: str) -> None:
    normal, anomalous = SETS[name]
    labels = np.repeat([0, 1], [len(normal), len(anomalous)])
    scores = torch.cat([normal.double(), anomalous.double()]).numpy()
    fpr, tpr, _ = sklearn.metrics.roc_curve(labels, scores, drop_intermediate=False)
    found = roc_curve(normal, anomalous)
    assert found[0].tolist() == pytest.approx(fpr.tolist(), rel=1e-12)
    assert found[1].tolist() == pytest.approx(tpr.tolist(), rel=1e-12)


@pytest.mark.parametrize("shift", [0.0, 1.0, 4.0, -2.0])
@pytest.mark.parametrize("kind", ["all differ", "many equal", "few anomalies"])
def test_a_long_curve_keeps_its_shape(shift: float, kind: str) -> None:
    normal, anomalous = drawn(8000), drawn(3 if kind == "few anomalies" else 3000, 1, shift)
    if kind == "many equal":  # a straight piece across the middle
        normal, anomalous = normal.clamp(min=0), anomalous.clamp(min=0)
    fpr, tpr = roc_curve(normal, anomalous)
    assert len(fpr) == len(tpr) <= ROC_POINTS
    assert len(fpr) > 100
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert bool((fpr.diff() >= 0).all() and (tpr.diff() >= 0).all())
    # Each exact point is near the piece of the line at its place along the curve.
    every = np.unique(torch.cat([normal, anomalous]).numpy())
    exact = [1 - np.searchsorted(np.sort(x.numpy()), every) / len(x) for x in (normal, anomalous)]
    line = torch.stack([fpr, tpr], dim=1).numpy()
    for x, y in zip(*exact, strict=True):
        nearby = int(np.searchsorted(line.sum(axis=1), x + y).clip(1, len(line) - 1))
        start, end = line[nearby - 1], line[nearby]
        along = np.clip(np.dot([x, y] - start, end - start) / max(1e-300, np.dot(end - start, end - start)), 0, 1)
        assert np.hypot(*(start + along * (end - start) - [x, y])) < 0.003
    assert float(torch.trapezoid(tpr, fpr)) == pytest.approx(values(normal, anomalous)[0], abs=0.003)


# --- thresholds


@pytest.mark.parametrize(
    ("n", "rate", "place"), [(99, 0.05, 94), (19, 0.05, 18), (99, 0.29, 70), (10, 0.5, 5), (3, 0.99, 0)]
)
def test_the_threshold_is_an_order_statistic(n: int, rate: float, place: int) -> None:
    scores = torch.arange(float(n))
    found = calibrate(scores[torch.randperm(n, generator=generator())], rate)
    assert (found.value, found.false_positive_rate, found.n) == (place, rate, n)
    assert int(found.flags(scores).sum()) == n - 1 - place


@pytest.mark.parametrize("n", [1, 4, 30])
def test_the_interval_of_the_largest_score_in_closed_form(n: int) -> None:
    # The share beyond the largest of n is below x with probability 1 - (1 - x)^n.
    found = calibrate(drawn(n), 1 / (n + 1))
    assert found.low == pytest.approx(1 - 0.975 ** (1 / n), rel=1e-9)
    assert found.high == pytest.approx(1 - 0.025 ** (1 / n), rel=1e-9)


def test_the_rate_and_its_interval_hold_on_new_images() -> None:
    # Of uniform scores a threshold's true rate is one less it.
    n, rate, repeats = 59, 0.1, 3000
    scores = torch.rand(repeats, n, generator=generator(), dtype=torch.float64)
    found = [calibrate(row, rate) for row in scores]
    true = np.array([1 - threshold.value for threshold in found])
    assert true.mean() == pytest.approx(rate, abs=3 * true.std() / math.sqrt(repeats))  # 6 / 60
    assert scipy.stats.kstest(true, scipy.stats.beta(6, 54).cdf).pvalue > 0.01
    error = math.sqrt(0.025 * 0.975 / repeats)
    assert np.mean([t.low > x for t, x in zip(found, true, strict=True)]) == pytest.approx(0.025, abs=3 * error)
    assert np.mean([t.high < x for t, x in zip(found, true, strict=True)]) == pytest.approx(0.025, abs=3 * error)


def test_thresholds_of_scans_have_the_interval_of_fewer_images() -> None:
    scores = drawn(99)
    one, copies = calibrate(scores), scores.repeat_interleave(5)
    assert calibrate(scores, groups=list(range(99))) == dataclasses.replace(one, groups=99)
    apart, scans = calibrate(copies), calibrate(copies, groups=[i for i in range(99) for _ in range(5)])
    assert (scans.value, scans.n, scans.groups) == (one.value, 495, 99)
    assert apart.high - apart.low < 0.6 * (one.high - one.low)
    assert scans.low <= one.low * 1.02
    assert scans.high == pytest.approx(one.high, rel=0.05)
    none = calibrate(copies, groups=["one scan"] * 495)
    assert none.value == one.value
    assert math.isnan(none.low)
    assert math.isnan(none.high)


@pytest.mark.parametrize(
    ("number", "correlation", "held", "taken"), [(20, 0.3, 0.93, 0.69), (20, 0.8, 0.89, 0.39), (5, 0.8, 0.81, 0.41)]
)
def test_the_interval_of_scans_holds_as_often_as_it_says(
    number: int, correlation: float, held: float, taken: float
) -> None:
    repeats, groups = 400, [i for i in range(number) for _ in range(30)]
    found: list[list[bool]] = []
    for seed in range(repeats):
        scores = scans(number, 30, correlation, seed).flatten()
        its, apart = calibrate(scores, groups=groups), calibrate(scores)
        true = scipy.stats.norm.sf(its.value)
        found.append([bool(x.low <= true <= x.high) for x in (its, apart)])
    shares = np.mean(found, axis=0)
    assert shares[0] == pytest.approx(held, abs=3 * math.sqrt(held * (1 - held) / repeats))
    assert shares[1] == pytest.approx(taken, abs=3 * math.sqrt(taken * (1 - taken) / repeats))


def test_where_no_score_lies_below_the_threshold_each_scan_counts_once() -> None:
    scores, groups = drawn(40), [i // 10 for i in range(40)]
    found, apart = calibrate(scores, 0.99, groups=groups), calibrate(scores, 0.99)
    assert found.value == apart.value == scores.min()
    assert found.low < apart.low


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_with_equal_scores_the_rate_is_kept_and_the_interval_still_holds(p: float) -> None:
    n, rate, repeats = 99, 0.2, 1000
    scores = torch.from_numpy(np.random.default_rng(0).geometric(p, (repeats, n)).astype(np.float64))
    found = [calibrate(row, rate) for row in scores]
    true = np.array([scipy.stats.geom.sf(t.value, p) for t in found])
    assert true.mean() <= rate
    assert np.mean([t.low <= x <= t.high for t, x in zip(found, true, strict=True)]) > 0.94


def test_of_equal_scores_none_is_flagged() -> None:
    found = calibrate(torch.full((50,), 3.0))
    assert found.value == 3.0
    assert found.low == 0.0
    assert not found.flags(torch.full((9,), 3.0)).any()
    assert found.flags(torch.tensor([[2.0, 4.0]])).tolist() == [[False, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_threshold_flags_the_same_images_in_any_unit(dtype: torch.dtype) -> None:
    normal, new = drawn(200, dtype=dtype), drawn(100, 1, shift=1.0, dtype=dtype)
    first, second = calibrate(normal), calibrate(normal.exp())
    assert (first.low, first.high, first.n) == (second.low, second.high, second.n)
    assert torch.equal(first.flags(new), second.flags(new.exp()))
    assert int(first.flags(normal).sum()) == 9  # ten of 201, less the threshold itself


@pytest.mark.parametrize(("n", "rate"), [(18, 0.05), (98, 0.01), (1, 0.3), (30, 0.03)])
def test_too_few_images_are_refused_and_both_remedies_help(n: int, rate: float) -> None:
    with pytest.raises(ConfigError, match=f"on {n} normal images") as refusal:
        calibrate(torch.rand(n, generator=generator()), rate)
    words = str(refusal.value).replace(",", "").split()
    assert REMEDY.search(str(refusal.value))
    more, larger = int(words[words.index("least") + 1]), float(words[-1])
    calibrate(torch.rand(more, generator=generator()), rate)
    calibrate(torch.rand(n, generator=generator()), larger)
    with pytest.raises(ConfigError):
        calibrate(torch.rand(more - 1, generator=generator()), rate)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, math.nan])
def test_rates_that_are_none_are_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="false_positive_rate"):
        calibrate(drawn(50), rate)


# --- latents


def cloud(n: int, dim: int, seed: int = 0, shift: float = 0.0) -> Tensor:
    """Correlated latents of unequal spread."""
    mixing = torch.randn(dim, dim, generator=generator(99), dtype=torch.float64) + 2 * torch.eye(
        dim, dtype=torch.float64
    )
    return torch.randn(n, dim, generator=generator(seed), dtype=torch.float64) @ mixing + shift


def fitted(latents: Tensor, batch: int = 10**6, shrinkage: float | None = None) -> Mahalanobis:
    found = Mahalanobis(latents.shape[1], shrinkage)
    for part in latents.split(batch):
        found.update(part)
    return found


@pytest.mark.parametrize("dim", [1, 2, 7])
def test_distances_are_those_of_scipy(dim: int) -> None:
    x, new = cloud(60, dim, shift=2.0), cloud(9, dim, 1)
    inverse = np.linalg.inv(np.atleast_2d(np.cov(x.numpy().T)))
    centre = x.numpy().mean(axis=0)
    wanted = [scipy.spatial.distance.mahalanobis(row, centre, inverse) for row in new.numpy()]
    assert fitted(x, shrinkage=0.0).distances(new).tolist() == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize(("n", "dim"), [(500, 4), (30, 20), (10, 25), (3, 6)])
def test_the_covariance_is_that_of_ledoit_and_wolf(n: int, dim: int) -> None:
    x = cloud(n, dim, shift=5.0)
    found = fitted(x, batch=7)
    theirs = sklearn.covariance.LedoitWolf().fit(x.numpy())
    assert 0 < found.shrinkage == pytest.approx(theirs.shrinkage_, rel=1e-9)
    wanted = theirs.covariance_ * n / (n - 1)  # theirs divides by n
    assert found.covariance.numpy() == pytest.approx(wanted, rel=1e-9, abs=1e-9 * np.abs(wanted).max())
    squared = theirs.mahalanobis(cloud(5, dim, 1).numpy()) * (n - 1) / n
    assert found.distances(cloud(5, dim, 1)).square().tolist() == pytest.approx(squared.tolist(), rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 33, 100])
def test_batches_give_what_one_pass_gives(batch: int, dtype: torch.dtype) -> None:
    x, new = cloud(100, 5, shift=1000.0).to(dtype), cloud(20, 5, 1, shift=1000.0).to(dtype)
    whole, parts = fitted(x), fitted(x.flip(0), batch)
    assert parts.count == whole.count == 100
    assert parts.shrinkage == pytest.approx(whole.shrinkage, rel=1e-8)
    assert torch.allclose(parts.distances(new), whole.distances(new), rtol=1e-9, atol=0)
    alone = torch.cat([whole.distances(row[None]) for row in new])
    assert alone.dtype == torch.float64
    assert torch.allclose(alone, whole.distances(new), rtol=1e-13, atol=0)


def test_more_latents_change_the_distances() -> None:
    found, new = fitted(cloud(50, 3)), cloud(4, 3, 2)
    before = found.distances(new)
    found.update(cloud(50, 3, 1))
    found.update(cloud(0, 3))
    assert not torch.allclose(found.distances(new), before)
    assert torch.allclose(found.distances(new), fitted(torch.cat([cloud(50, 3), cloud(50, 3, 1)])).distances(new))


def test_turns_shifts_and_units_change_nothing() -> None:
    x, new = cloud(40, 6), cloud(9, 6, 1)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator(), dtype=torch.float64)).Q
    turned = fitted(3 * x @ rotation + 5).distances(3 * new @ rotation + 5)
    assert torch.allclose(turned, fitted(x).distances(new), rtol=1e-9)
    skewed = torch.randn(6, 6, generator=generator(3), dtype=torch.float64)
    linear = fitted(x @ skewed, shrinkage=0.0).distances(new @ skewed)
    assert torch.allclose(linear, fitted(x, shrinkage=0.0).distances(new), rtol=1e-8)


def test_squared_distances_of_gaussian_latents_follow_chi_squared() -> None:
    found = fitted(cloud(20_000, 8)).distances(cloud(2000, 8, 1)).square()
    assert scipy.stats.kstest(found.numpy(), scipy.stats.chi2(8).cdf).pvalue > 0.01


def test_the_mean_is_at_distance_zero_and_what_is_far_is_farther() -> None:
    x = cloud(10, 30)  # fewer than dimensions
    found = fitted(x)
    away = torch.arange(5.0, dtype=torch.float64)[:, None] * cloud(1, 30, 4) + x.mean(dim=0)
    distances = found.distances(away)
    assert distances[0] == pytest.approx(0.0, abs=1e-9)
    assert (distances / distances[1]).tolist() == pytest.approx([0, 1, 2, 3, 4], abs=1e-9)


def test_a_dimension_that_never_varied_tells_most() -> None:
    x = cloud(5000, 4)
    x[:, 2] = 1.0
    found = fitted(x)
    usual, unusual = x[:1].clone(), x[:1].clone()
    unusual[:, 2] += 1.0
    assert found.distances(unusual) > 5 * found.distances(usual)
    with pytest.raises(DataError, match="do not vary in all 4 dimensions"):
        fitted(x, shrinkage=0.0).distances(x)


def test_the_state_can_be_saved_and_goes_on(tmp_path: Path) -> None:
    x, new = cloud(60, 4, shift=3.0), cloud(5, 4, 1)
    first = fitted(x[:40], batch=9)
    save_file(first.state_dict(), tmp_path / "normal.safetensors")
    second = Mahalanobis(4)
    second.load_state_dict(load_file(tmp_path / "normal.safetensors"))
    assert torch.equal(second.distances(new), first.distances(new))
    second.update(x[40:])
    first.update(x[40:])
    assert torch.equal(second.distances(new), first.distances(new))
    empty = Mahalanobis(4)
    second.load_state_dict(empty.state_dict())
    second.update(x)
    assert torch.equal(second.distances(new), fitted(x).distances(new))
    for state in (Mahalanobis(5).state_dict(), {"mean": torch.zeros(4)}):
        with pytest.raises(CheckpointError, match="in 4 dimensions"):
            empty.load_state_dict(state)


def test_latents_that_have_no_distance_are_refused() -> None:
    for bad in (torch.zeros(3, 5), torch.zeros(4)):
        with pytest.raises(DataError, match=r"shape \[N, 4\]"):
            Mahalanobis(4).update(bad)
    with pytest.raises(DataError, match="NaN or infinite"):
        fitted(cloud(9, 4)).distances(torch.full((1, 4), math.nan))
    with pytest.raises(ConfigError, match="give at least two"):
        Mahalanobis(4).distances(cloud(1, 4))
    for few in (cloud(2, 4), torch.ones(10, 4)):  # two points have one direction, and no scatter of products
        with pytest.raises(DataError, match="do not vary"):
            fitted(few).distances(few)
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="shrinkage"):
            Mahalanobis(4, wrong)
    with pytest.raises(ConfigError, match="dim"):
        Mahalanobis(0)


# --- pixels


def pixels(kind: str) -> tuple[Tensor, Tensor]:
    """Maps and masks of 6 images of 16 pixels."""
    shape = (6, 16, 16)
    masks = torch.rand(shape, generator=generator(1)) < 0.15
    noise = torch.randn(shape, generator=generator(2), dtype=torch.float64)
    maps = {
        "long tails": (3 * noise + masks).exp(),
        "float32": (noise + masks).abs().float(),
        "many zeros": (noise + masks - 0.5).clamp(min=0),
        "8 bits": ((noise + masks).abs() * 40).round() / 255,
        "narrow": 1 + 1e-3 * torch.sigmoid(noise + 2 * masks),
        "tiny": (noise + masks).abs() * 1e-40,
        "the wrong way": (noise - masks.double()).exp(),
    }
    return maps[kind], masks


KINDS = ["long tails", "float32", "many zeros", "8 bits", "narrow", "tiny", "the wrong way"]


def curve_of(maps: Tensor, masks: Tensor, batch: int = 100) -> PixelCurve:
    found = PixelCurve()
    for part, marks in zip(maps.split(batch), masks.split(batch), strict=True):
        found.update(part, marks)
    return found


def dice_of(maps: Tensor, masks: Tensor, threshold: float) -> float:
    """By the definition."""
    flagged = maps > threshold
    return 2 * int((flagged & masks).sum()) / int(flagged.sum() + masks.sum())


@pytest.mark.parametrize("kind", KINDS)
def test_the_pixel_auroc_is_that_of_sklearn_within_its_bound(kind: str) -> None:
    maps, masks = pixels(kind)
    found = curve_of(maps, masks)
    exact = sklearn.metrics.roc_auc_score(masks.flatten().numpy(), maps.flatten().numpy())
    assert abs(found.auroc - exact) <= found.auroc_error + 1e-12
    if kind not in ("narrow", "tiny", "8 bits"):
        assert found.auroc_error < 5e-4
    if kind == "8 bits":  # no two levels share a bin, and equal scores count half by both
        assert found.auroc == pytest.approx(exact, rel=1e-12)


def test_the_bound_is_reached_where_all_scores_share_a_bin() -> None:
    width = 2.0**-MANTISSA
    masks = torch.tensor([[[False, True]]])
    close = curve_of(torch.tensor([[[1 + 0.3 * width, 1 + 0.6 * width]]]), masks)
    assert (close.auroc, close.auroc_error) == (0.5, 0.5)
    apart = curve_of(torch.tensor([[[1 + 0.3 * width, 1 + 1.3 * width]]]), masks)
    assert (apart.auroc, apart.auroc_error) == (1.0, 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_dice_is_exact_at_a_border_and_rounds_a_threshold_up_to_it(kind: str) -> None:
    maps, masks = pixels(kind)
    found = curve_of(maps, masks)
    for threshold in (0.0, *maps.flatten()[:40].tolist(), float(maps.max()), 1e30, 1e300, math.inf):
        bits = np.float32(min(threshold, 3e38)).view(np.int32)
        border = float(np.int32(-(-int(bits) >> (23 - MANTISSA)) << (23 - MANTISSA)).view(np.float32))
        assert border == pytest.approx(min(threshold, 3e38), rel=2.0**-MANTISSA, abs=2e-38)
        assert found.dice(threshold) == pytest.approx(dice_of(maps.float(), masks, border), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_dice_is_the_best_of_all_thresholds_within_its_bound(kind: str) -> None:
    maps, masks = pixels(kind)
    found = curve_of(maps, masks).best_dice
    exact = max(dice_of(maps, masks, t) for t in [0.0, *maps.unique().tolist()])
    assert found.value - 1e-12 <= exact <= found.value + found.error + 1e-12
    assert curve_of(maps, masks).dice(found.threshold) == pytest.approx(found.value, rel=1e-12)
    assert dice_of(maps.float(), masks, found.threshold) == pytest.approx(found.value, rel=1e-12)
    if kind not in ("narrow", "tiny"):
        assert found.error < 0.01


def test_a_perfect_map_is_perfect() -> None:
    _, masks = pixels("8 bits")
    found = curve_of(masks.float(), masks)
    assert (found.auroc, found.auroc_error, found.best_dice) == (1.0, 0.0, (1.0, 0.0, 0.0))
    inverted = curve_of(1 - masks.float(), masks)
    assert (inverted.auroc, inverted.dice(0.5)) == (0.0, 0.0)
    assert curve_of(torch.zeros(masks.shape), masks).auroc == 0.5


@pytest.mark.parametrize("batch", [1, 4])
def test_any_batches_in_any_order_give_the_same(batch: int) -> None:
    maps, masks = pixels("long tails")
    whole, parts = curve_of(maps, masks), curve_of(maps.flip(0), masks.flip(0), batch)
    assert torch.equal(whole.counts, parts.counts)
    assert whole.counts.nbytes < 17e6


def test_billions_of_pixels_do_not_overflow() -> None:
    few, many = (curve_of(*pixels("long tails")) for _ in range(2))
    many.counts *= 2**36
    assert many.auroc == pytest.approx(few.auroc, rel=1e-12)
    assert many.auroc_error == pytest.approx(few.auroc_error, rel=1e-12)
    assert many.best_dice == pytest.approx(few.best_dice, rel=1e-12)


def test_scores_at_the_ends_of_float32() -> None:
    scores = torch.tensor([[[-0.0, 0.0, 1e-45, 1e-38, 1.0, torch.finfo(torch.float32).max]]])
    masks = torch.tensor([[[False, True, True, True, True, True]]])
    found = curve_of(scores, masks)
    assert found.auroc == pytest.approx(0.9)  # -0 is 0
    assert found.dice(0.0) == pytest.approx(2 * 4 / (5 + 4))
    assert found.dice(1.0) == pytest.approx(2 / (5 + 1))
    assert found.dice(math.inf) == 0.0


def test_scaled_maps_give_the_same() -> None:
    maps, masks = pixels("long tails")
    first, second = curve_of(maps, masks), curve_of(8 * maps, masks)  # a power of two moves all bins alike
    assert first.auroc == second.auroc
    assert first.best_dice.value == second.best_dice.value
    assert second.best_dice.threshold == 8 * first.best_dice.threshold


def test_maps_and_masks_that_are_none_are_refused_and_leave_no_trace() -> None:
    maps, masks = pixels("float32")
    found = curve_of(maps, masks)
    before = found.counts.clone()
    for bad in (-1.0, math.nan, math.inf, 1e39):
        wrong = maps.double()
        wrong[3, 2, 1] = bad
        with pytest.raises(DataError, match="negative, NaN or above"):
            found.update(wrong, masks)
    for wrong, marks in ((maps[:5], masks), (maps[:, None], masks[:, None])):
        with pytest.raises(DataError, match=r"\[N, H, W\]"):
            found.update(wrong, marks)
    with pytest.raises(DataError, match=r"not torch\.uint8"):
        found.update(maps, masks.byte())
    assert torch.equal(found.counts, before)
    for threshold in (-1.0, math.nan):
        with pytest.raises(ConfigError, match="threshold is"):
            found.dice(threshold)


def test_masks_of_one_kind_have_no_auroc() -> None:
    maps, masks = pixels("float32")
    empty, full = curve_of(maps, torch.zeros_like(masks)), curve_of(maps, torch.ones_like(masks))
    for found, kind in ((empty, "empty"), (full, "full"), (PixelCurve(), "empty")):
        for name in ("auroc", "auroc_error"):
            with pytest.raises(DataError, match=f"all masks are {kind}"):
                getattr(found, name)
    with pytest.raises(DataError, match="all masks are empty"):
        empty.dice(0.1)
    with pytest.raises(DataError, match="all masks are empty"):
        _ = empty.best_dice
    assert full.dice(0.0) == 1.0


def patients(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Maps and masks of `n` images of 16 pixels; how hot a lesion is differs from image to image, half have one."""
    shape, its = (n, 16, 16), generator(seed)
    masks = torch.zeros(shape, dtype=torch.bool)
    masks[::2, 4:9, 4:9] = True
    hot = torch.rand(n, 1, 1, generator=its, dtype=torch.float64) * 2
    return (torch.randn(shape, generator=its, dtype=torch.float64) + hot * masks).exp(), masks


def with_draws(
    maps: Tensor, masks: Tensor, batch: int = 100, groups: list[int] | None = None, draws: int = DRAWS
) -> PixelCurve:
    found = PixelCurve(draws)
    for start in range(0, len(maps), batch):
        part = slice(start, start + batch)
        found.update(maps[part], masks[part], None if groups is None else groups[part])
    return found


def intervals_of(curve: PixelCurve, threshold: float = 2.0) -> list[Interval]:
    found = [curve.auroc_interval(), curve.dice_interval(threshold), curve.best_dice_interval()]
    return [interval for interval in found if interval is not None]


def drawn_directly(maps: Tensor, masks: Tensor, weights: Tensor, threshold: float = 2.0) -> Tensor:
    """AUROC, Dice and best Dice of the images repeated as often as each row of weights says, `[draws, 3]`."""
    rows = []
    for repeats in weights.long():
        x, marked = (part.repeat_interleave(repeats, dim=0).flatten() for part in (maps, masks))
        if not marked.any() or marked.all():
            continue
        precision, recall, _ = sklearn.metrics.precision_recall_curve(marked.numpy(), x.numpy())
        dice = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        auroc = sklearn.metrics.roc_auc_score(marked.numpy(), x.numpy())
        rows.append([auroc, dice_of(x, marked, threshold), dice.max()])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("n", [3, 12])
def test_the_pixels_intervals_are_the_percentiles_of_the_images_drawn_directly(n: int) -> None:
    maps, masks = patients(n)
    its = generator()
    weights = torch.stack([torch.poisson(torch.ones(80, dtype=torch.float64), its) for _ in range(n)], dim=1)
    direct = drawn_directly(maps, masks, weights)
    low, high = direct.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0).tolist()
    curve = with_draws(maps, masks, draws=80)
    found = intervals_of(curve)
    assert [interval.value for interval in found] == [curve.auroc, curve.dice(2.0), curve.best_dice.value]
    assert [interval.low for interval in found] == pytest.approx(low, abs=0.004)
    assert [interval.high for interval in found] == pytest.approx(high, abs=0.004)


def test_the_pixels_intervals_are_those_of_a_bootstrap_of_as_many_images() -> None:
    maps, masks = patients(40)
    drawn = torch.randint(40, (100, 40), generator=generator(1))
    direct = drawn_directly(maps, masks, torch.stack([row.bincount(minlength=40) for row in drawn]))
    spread = 2 * 1.96 * direct.std(dim=0)
    for interval, width in zip(intervals_of(with_draws(maps, masks)), spread.tolist(), strict=True):
        assert interval.low < interval.value < interval.high
        assert interval.high - interval.low == pytest.approx(width, rel=0.2)


def test_the_pixels_intervals_hold_the_truth_about_as_often_as_they_say_and_widen_with_fewer_images() -> None:
    maps, masks = patients(1000, seed=9)
    truth, found = curve_of(maps, masks).auroc, {}
    for n in (10, 40):
        parts = [slice(start, start + n) for start in range(0, 25 * n, n)]
        intervals = [with_draws(maps[part], masks[part]).auroc_interval() for part in parts]
        found[n] = [interval for interval in intervals if interval is not None]
    assert sum(interval.low <= truth <= interval.high for interval in found[40]) >= 21
    few, many = (sum(interval.high - interval.low for interval in found[n]) for n in (10, 40))
    assert few > 1.6 * many


def test_the_pixels_intervals_do_not_depend_on_the_batches_and_groups_are_drawn_together() -> None:
    maps, masks = patients(12)
    whole = intervals_of(with_draws(maps, masks))
    assert all(intervals_of(with_draws(maps, masks, batch)) == whole for batch in (1, 5))
    # Four copies of an image say no more than the image.
    copies, marks = maps.repeat_interleave(4, dim=0), masks.repeat_interleave(4, dim=0)
    groups = [i // 4 for i in range(48)]
    for batch in (3, 100):
        assert intervals_of(with_draws(copies, marks, batch, groups)) == whole
    apart, together = (intervals_of(with_draws(copies, marks, groups=which))[0] for which in (None, groups))
    assert apart.high - apart.low < 0.7 * (together.high - together.low)


def test_too_few_images_have_no_interval() -> None:
    maps, masks = patients(12)
    masks[2:] = False
    one = with_draws(maps, masks)
    assert one.groups == [12, 1]
    full = torch.ones_like(masks)
    full[0] = False
    slices = with_draws(maps, patients(12)[1], groups=[0] * 12)
    for curve in (one, with_draws(maps, full), with_draws(maps[:1], masks[:1]), slices):
        assert intervals_of(curve) == []
    masks[2, 0, 0] = True  # two with marks: draws with neither do not count
    assert len(intervals_of(with_draws(maps, masks))) == 3
    with pytest.raises(DataError, match="all masks are empty"):
        with_draws(maps, torch.zeros_like(masks)).auroc_interval()
    with pytest.raises(ConfigError, match="an interval needs draws"):
        curve_of(maps, masks).auroc_interval()
    with pytest.raises(DataError, match="2 groups for 12 maps: give one for each"):
        PixelCurve(DRAWS).update(maps, masks, [1, 2])
