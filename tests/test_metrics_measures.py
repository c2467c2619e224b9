"""What is measured of a model: each set read once, in each space; variants of it; what evaluate does with that."""

from __future__ import annotations

import copy
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from commands import Command, Refused
from introvae import IntrospectiveVAE, Run, evaluate, fit
from introvae.data import ArrayData, DensityData, Part, from_array, load_data
from introvae.errors import ConfigError, MissingExtraError
from introvae.measures import (
    METRICS,
    class_metrics_in,
    entries,
    examine,
    look_at_heldout,
    measure,
    measure_variants,
    metrics_in,
    sets,
)
from introvae.measures.sets import collect_sets, set_metrics
from introvae.measures.variants import PlaneYardstick
from introvae.metrics import kernel
from introvae.metrics.classifier import load_classifier
from introvae.metrics.collect import Collected, Wanted, collect
from introvae.metrics.features import FeatureSpace, feature_space
from introvae.metrics.frechet import GaussianStatistics, frechet_distance
from introvae.metrics.histogram import energy_distance
from introvae.metrics.kernel import polynomial_mmd
from introvae.metrics.manifold import Manifold, neighbourhoods
from introvae.model import IntrospectiveVAE as Model
from introvae.report import figures


def images(count: int, channels: int = 1, side: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


def of_features(x: Tensor) -> GaussianStatistics:
    found = GaussianStatistics(x.shape[1])
    found.update(x)
    return found


@pytest.fixture(autouse=True)
def fewer_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the pixel metrics' samples a fifth."""
    monkeypatch.setattr(sets, "SAMPLES", 100)


# --- one pass over a set


def counted(calls: list[int]) -> FeatureSpace:
    def rows(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x.mean(dim=(1, 3))

    return FeatureSpace("rows", rows)


@pytest.mark.parametrize("batch", [1, 4, 7, 100])
@pytest.mark.parametrize(("wanted", "kept"), [(20, 0), (20, 6), (5, 20), (0, 3), (50, 50)])
def test_a_pass_keeps_what_is_wanted_and_computes_it_once(batch: int, wanted: int, kept: int):
    x, calls = images(20), []
    read: list[tuple[int, int]] = []

    def reader(first: int, last: int) -> Tensor:
        read.append((first, last))
        return x[first:last]

    found = collect(reader, [Wanted(counted(calls), wanted, kept)], 20, batch=batch).spaces["rows"]
    features, most = x.mean(dim=(1, 3)), min(20, max(wanted, kept))
    assert sum(calls) == most == read[-1][1]
    assert all(last - first <= batch for first, last in read)
    if wanted:
        assert found.sums is not None
        assert found.sums.count == min(20, wanted)
        np.testing.assert_allclose(found.sums.mean, features[:wanted].double().mean(dim=0), rtol=1e-6)
    else:
        assert found.sums is None
    assert sum(len(part) for part in found.kept) == min(20, kept)
    if kept:
        np.testing.assert_allclose(found.features, features[:kept], rtol=1e-6)


def test_two_passes_over_halves_make_one():
    x = images(40, side=28)
    spaces = [Wanted(feature_space("mnist"), 40, 25), Wanted(feature_space("thumb"), 30)]

    def reader(first: int, last: int) -> Tensor:
        return x[first:last]

    whole, halves = collect(reader, spaces, 40, pairs=20), Collected()
    first = collect(reader, spaces, 24, pairs=20)
    halves.merge(first)
    halves.merge(collect(reader, spaces, 40, start=24, pairs=20))
    for name in ("mnist", "thumb"):
        a, b = whole.spaces[name], halves.spaces[name]
        assert a.sums is not None
        assert b.sums is not None
        np.testing.assert_allclose(a.sums.covariance, b.sums.covariance, rtol=1e-5, atol=1e-6)
    a, b = whole.spaces["mnist"], halves.spaces["mnist"]
    np.testing.assert_allclose(a.features, b.features, atol=1e-4)
    assert torch.equal(a.shares(10), b.shares(10))
    assert a.confident(0.5) == b.confident(0.5)
    np.testing.assert_allclose(torch.cat(whole.alike), torch.cat(halves.alike), atol=1e-5)
    assert len(torch.cat(whole.alike)) == 20
    assert first.spaces["mnist"].sums is not None
    assert first.spaces["mnist"].sums.count == 24  # what it was merged into is another


def test_a_space_with_too_many_features_is_refused():
    space = FeatureSpace("wide", lambda x: x.flatten(1).repeat(1, 100))
    with pytest.raises(ConfigError, match="wide has 6,400 features, a covariance takes at most 4,096: choose another"):
        collect(lambda a, b: images(9)[a:b], [Wanted(space, 9)], 9)


# --- the metrics


class Fixed(nn.Module):
    """A decoder whose images are rows of a table, chosen by the first latent; the encoder is another network's."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table, requires_grad=False)

    def forward(self, z: Tensor) -> Tensor:
        rows = (torch.special.ndtr(z[:, 0]) * len(self.table)).long().clamp(max=len(self.table) - 1)
        return self.table[rows]


class Coder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.flatten(1)[:, :2] * self.weight
        return mean, torch.zeros_like(mean)


def drawn(table: Tensor) -> Model:
    return IntrospectiveVAE(Coder(), Fixed(table), latent_dim=2).eval()


def data_of(x: Tensor, heldout: Tensor, name: str = "mine", labels: Tensor | None = None) -> ArrayData:
    parts = [Part((255 * part).round().to(torch.uint8)) for part in (x, heldout)]
    return ArrayData(name, parts[0], Part(parts[1].x, labels))


def test_metrics_in_a_space_are_those_of_its_features():
    x = images(40, side=28, seed=1)
    judged = load_classifier("mnist").network(x.mul(255).round() / 255).argmax(dim=1)
    data = data_of(images(60, side=28), x, "mnist", judged)
    model = drawn(images(30, side=28, seed=2) ** 2)
    found = set_metrics(kept := collect_sets(model, data, 0), data, 0)[0]
    assert set(metrics_in("mnist")) <= set(found)
    space = feature_space("mnist")
    train, heldout = (space(part.tensor()) for part in (data.train, data.heldout))
    samples = space(model.decode(kept.latents[:40]))  # as many as there are held-out images
    entry = found["frechet_mnist"]
    assert entry["value"] == pytest.approx(frechet_distance(of_features(samples), of_features(train)), rel=1e-4)
    assert entry["floor"] == pytest.approx(frechet_distance(of_features(heldout), of_features(train)), rel=1e-4)
    assert entry["n"] == 40
    assert found["kid_mnist"]["value"] == pytest.approx(polynomial_mmd(samples, train), rel=1e-4)
    assert found["kid_mnist"]["floor"] == pytest.approx(polynomial_mmd(heldout, train), rel=1e-3, abs=1e-6)
    real, first = Manifold(heldout, [3, 5]), kept.train.spaces["mnist"].features[:40]
    for name, value in neighbourhoods(real, Manifold(samples, [3]))._asdict().items():
        assert found[f"{name}_mnist"]["value"] == pytest.approx(value, abs=1e-9)
    for name, value in neighbourhoods(real, Manifold(first, [3]))._asdict().items():
        assert found[f"{name}_mnist"]["floor"] == pytest.approx(value, abs=1e-9)
    shipped = load_classifier("mnist")
    p = shipped.network.probabilities(samples)
    assert found["confident_share_mnist"]["value"] == pytest.approx((p.amax(1) >= 0.9).double().mean().item())
    counts = torch.bincount(p.argmax(dim=1), minlength=10).double() / 40
    assert found["class_entropy_nats_mnist"]["value"] == pytest.approx(
        -torch.special.xlogy(counts, counts).sum().item()
    )
    other = torch.bincount(shipped.network.probabilities(heldout).argmax(1), minlength=10).double() / 40
    assert found["class_distance_mnist"]["value"] == pytest.approx((counts - other).abs().sum().item() / 2)


def test_a_sampler_of_the_training_images_is_near_the_floor_and_another_is_not():
    x = images(300, side=28)
    data = data_of(x, images(200, side=28, seed=1))
    good, bad = (measure(drawn(table), data) for table in (x, 0.3 * x))
    for name in ("frechet_mnist", "kid_mnist", "frechet_thumb"):
        assert abs(good[name]["value"] - good[name]["floor"]) < 0.2 * abs(bad[name]["value"] - bad[name]["floor"])
    for name in ("density_mnist", "coverage_mnist", "recall_mnist"):
        assert good[name]["value"] > bad[name]["value"]


def test_pairs_of_a_collapsed_model_are_all_alike():
    data = data_of(images(60), images(40, seed=1))
    collapsed, diverse = (measure(drawn(table), data)["msssim_pairs"] for table in (images(1), images(50, seed=3)))
    assert collapsed["value"] == pytest.approx(1, abs=1e-5)
    assert diverse["value"] < 0.3
    assert collapsed["floor"] == diverse["floor"] < 0.3
    assert collapsed["n"] == 20
    assert "1 of 5 scales" in collapsed["protocol"]


def test_classes_are_told_only_where_they_are_those_of_the_data():
    x = images(40, side=28)
    judged = load_classifier("mnist").network(x.mul(255).round() / 255).argmax(dim=1)
    names = {"confident_share_mnist", "class_entropy_nats_mnist", "class_distance_mnist"}
    unknown, half = torch.full((40,), -1), torch.where(torch.arange(40) < 20, judged, -1)
    for labels, told in ((judged, True), (half, True), ((judged + 1) % 10, False), (None, False), (unknown, False)):
        found = examine(drawn(x), data_of(images(50, side=28, seed=1), x, "mnist", labels))
        assert (names <= set(found.metrics)) == told
        assert bool(names & set(found.metrics)) == told
        assert ("mnist" in found.class_shares) == told
        assert "frechet_mnist" in found.metrics
        assert found.yardstick is not None
        assert ("confident_share_mnist" in found.yardstick.saved) == told
        assert all("no labels" not in entry["protocol"] for entry in found.metrics.values())
    found = examine(drawn(x), data_of(images(50, side=28, seed=1), x, labels=judged))
    shares = found.class_shares["mnist"]
    assert shares["classes"] == [str(i) for i in range(10)]
    assert shares["heldout"] == pytest.approx((torch.bincount(judged, minlength=10) / 40).tolist(), abs=1e-6)
    assert sum(shares["samples"]) == pytest.approx(1, abs=1e-5)
    n, entry = shares["n"], found.metrics["class_distance_mnist"]
    assert n == entry["n"] == 40
    assert shares["protocol"].startswith(f"shares of the likeliest class of {n} samples and of 40 held-out images,")
    assert "classifier of mnist (99.5 % right on its test images)" in shares["protocol"]


@pytest.mark.parametrize("labels", [None, torch.full((40,), -1)])
def test_classes_of_images_without_labels_are_told_where_they_are_asked_for_with_a_remark(labels: Tensor | None):
    data, model = data_of(images(50, side=28, seed=1), images(40, side=28), labels=labels), drawn(images(9, side=28))
    found = examine(model, data, features=["mnist"])
    for name in class_metrics_in("mnist"):
        assert (
            "the data have no labels: whether they are of its classes is not known;" in found.metrics[name]["protocol"]
        )
    assert "the data have no labels" in found.class_shares["mnist"]["protocol"]
    wrong = (load_classifier("mnist").network(data.heldout.tensor()).argmax(dim=1) + 1) % 10
    found = examine(model, data_of(images(50, side=28, seed=1), images(40, side=28), labels=wrong), features=["mnist"])
    assert not set(class_metrics_in("mnist")) & set(found.metrics), "of other classes it has nothing to say"


def test_floors_are_of_as_many_real_images_as_samples():
    x = images(40, side=28)
    judged = load_classifier("mnist").network(x.mul(255).round() / 255).argmax(dim=1)
    data, model = data_of(images(300, side=28, seed=1), x, labels=judged), drawn(images(30, side=28, seed=2))
    found, of = examine(model, data).metrics, collect_sets(model, data, 0)
    train, heldout, samples = (s.spaces["mnist"] for s in (of.train, of.heldout, of.samples))
    assert (len(train.features), len(heldout.features), len(samples.features)) == (300, 40, 40)
    fair = neighbourhoods(Manifold(heldout.features, [3, 5]), Manifold(train.features[:40], [3]))
    for name in ("precision", "recall", "density", "coverage"):
        assert found[f"{name}_mnist"]["floor"] == getattr(fair, name), name
        assert "40 training images in the samples' place" in found[f"{name}_mnist"]["protocol"]
    first = torch.bincount(torch.cat(train.classes)[:40], minlength=10).double() / 40
    wanted = float((first - heldout.shares(10)).abs().sum() / 2)
    assert found["class_distance_mnist"]["floor"] == pytest.approx(wanted, abs=1e-12)
    assert "40 training images in the samples' place" in found["class_distance_mnist"]["protocol"]


def test_the_kernel_distance_says_how_large_its_subsets_are(monkeypatch: pytest.MonkeyPatch):
    data, model = data_of(images(60), images(40, seed=1)), drawn(images(30, seed=2))
    monkeypatch.setattr(kernel, "SUBSET", 50)
    monkeypatch.setattr(kernel.kernel_distances, "__defaults__", (50, 3))
    protocol = examine(model, data, features=["randconv"]).metrics["kid_randconv"]["protocol"]
    assert "mean and std of 3 random subsets of 40 and 50;" in protocol


def test_spaces_that_are_asked_for_have_all_metrics():
    data, model = data_of(images(60), images(40, seed=1)), drawn(images(30, seed=2))
    usual = measure(model, data)
    mean = FeatureSpace("mean", lambda x: x.mean(dim=(2, 3)), "the mean")
    found = examine(model, data, features=["pixels", "thumb", mean]).metrics
    assert set(found) - set(usual) == {
        *metrics_in("mean"),
        *(set(metrics_in("thumb")) - {"frechet_thumb"}),
        *("frechet_pixels", "kid_pixels"),
    }
    assert {name: found[name]["value"] for name in usual} == {name: usual[name]["value"] for name in usual}
    means = model.decode(collect_sets(model, data, 0).latents[:40]).mean(dim=(2, 3))
    wanted = frechet_distance(of_features(means), of_features(data.train.tensor().mean(dim=(2, 3))))
    assert found["frechet_mean"]["value"] == pytest.approx(wanted, rel=1e-5)
    assert "the mean" in found["frechet_mean"]["protocol"]


@pytest.mark.parametrize(
    ("name", "channels", "side", "fully"),
    [
        ("faces", 1, 64, "randconv"),
        ("digits", 1, 8, "randconv"),
        ("mnist", 1, 28, "mnist"),
        ("photographs", 3, 32, "cifar10"),
        ("icons", 1, 6, None),
    ],
)
def test_images_are_compared_by_all_metrics_in_one_space(name: str, channels: int, side: int, fully: str | None):
    data = data_of(images(20, channels, side), images(12, channels, side, seed=1), name)
    found = measure(drawn(images(10, channels, side, seed=2)), data)
    spaces = {metric.partition("_")[2] for metric in found if metric.startswith(("kid_", "precision_", "coverage_"))}
    assert spaces - {"pixels"} == ({fully} if fully else set())
    for metric in metrics_in(fully)[:6] if fully else ():
        assert math.isfinite(found[metric]["value"]), metric
        assert math.isfinite(found[metric]["floor"]), metric
    if fully == "randconv":
        assert "384 statistics of an untrained convolutional network" in found["frechet_randconv"]["protocol"]
        assert "floor: 12 training images" in found["density_randconv"]["protocol"]


def test_no_image_is_decoded_or_looked_at_twice(monkeypatch: pytest.MonkeyPatch):
    data, model = data_of(images(60), images(40, seed=1)), drawn(images(30, seed=2))
    seen: list[Tensor] = []
    decode = model.decode
    monkeypatch.setattr(sets, "decoded", lambda _, z, c: lambda a, b: (seen.append(z[a:b]), decode(z[a:b]))[1])
    kept = collect_sets(model, data, 0)
    assert torch.equal(torch.cat(seen), kept.latents)


@pytest.mark.parametrize(("train", "heldout"), [(50, 1), (50, 2), (50, 49), (49, 50), (50, 50)])
def test_few_images_have_the_metrics_that_they_can_have(train: int, heldout: int):
    found = measure(drawn(images(9, seed=2)), data_of(images(train), images(heldout, seed=1)))
    assert ("frechet_thumb" in found) == (heldout > 1)
    assert ("precision_pixels" in found) == ("coverage_pixels" in found) == (train == heldout == 50)
    assert all(math.isfinite(entry["value"]) for entry in found.values())


@pytest.mark.parametrize("encodes", ["posterior", "mode", "nothing"])
def test_what_the_encoder_does_not_give_is_not_measured(encodes: str):
    data, model = data_of(images(60), images(50, seed=1)), drawn(images(30, seed=2))
    found = examine(model, data, encodes=encodes)
    assert ("kl_real_nats" in found.metrics) == ("active_units" in found.metrics) == (encodes == "posterior")
    assert ("mse" in found.metrics) == (encodes != "nothing")
    assert {"frechet_thumb", "msssim_pairs", "recall_pixels"} <= set(found.metrics)
    assert found.yardstick is not None
    assert ("kl_real_nats" in found.yardstick.saved) == (encodes == "posterior")
    assert ("active_units" in found.yardstick.saved) == (encodes == "posterior")
    assert set(found.yardstick.measure(model, 16)) == set(found.yardstick.saved)


def test_an_aggregate_posterior_has_no_floor_and_a_collapsed_encoder_has_zero():
    class Collapsed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return (zeros := self.weight.expand(len(x), 2)), zeros

    data = data_of(images(60), images(40, seed=1))
    model = IntrospectiveVAE(Collapsed(), Fixed(images(30, seed=2)), latent_dim=2).eval()
    found = measure(model, data)
    assert found["kl_aggregate_nats"]["value"] == pytest.approx(0, abs=1e-9)
    assert found["active_units"]["value"] == 0
    assert "floor" not in found["kl_aggregate_nats"]
    assert "has 0 too" in found["kl_aggregate_nats"]["protocol"]


def test_held_out_images_are_looked_at_in_batches():
    data, model = data_of(images(20), images(50, seed=1)), drawn(images(30, seed=2))
    whole, parts = look_at_heldout(model, data), look_at_heldout(model, data, batch=7)
    assert torch.equal(whole.mse, parts.mse)
    assert torch.equal(whole.posterior.mean, parts.posterior.mean)
    x = data.heldout.tensor()
    y = model.reconstruct(x)
    assert torch.equal(whole.mse, (x - y).square().flatten(1).mean(dim=1))
    assert torch.equal(whole.reconstruct(model, [3, 1]), y[[3, 1]])


def test_large_images_are_given_to_the_model_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch):
    data, model = data_of(images(20), images(31, seed=1)), drawn(images(30, seed=2))
    whole, sheet = examine(model, data).metrics, figures.draw(model, 25, seed=1)
    assert torch.equal(sheet, model.sample(25, torch.Generator().manual_seed(1)))
    sizes: list[int] = []

    def noting(method: Callable[..., object]) -> Callable[..., object]:
        return lambda x, condition=None: (sizes.append(len(x)), method(x, condition))[1]

    monkeypatch.setattr(entries, "PIXELS", 6 * 8 * 8)
    monkeypatch.setattr(entries, "BATCH", 100)
    monkeypatch.setattr(figures, "BATCH", 6)
    for name in ("encode", "decode"):
        monkeypatch.setattr(model, name, noting(getattr(model, name)))
    found = examine(model, data).metrics
    assert torch.equal(figures.draw(model, 25, seed=1), sheet)
    assert max(sizes) == 6
    assert {name: entry["n"] for name, entry in found.items()} == {name: entry["n"] for name, entry in whole.items()}
    for name, entry in found.items():
        assert entry["value"] == pytest.approx(whole[name]["value"], rel=1e-4), name


# --- variants


def batch_normed(seed: int = 0) -> Model:
    """A model whose running statistics are far from those of a batch."""
    torch.manual_seed(seed)
    model = IntrospectiveVAE.build((1, 8, 8), "tiny-conv", latent_dim=4, norm="batch")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_var is not None
            module.running_var.fill_(4.0)
    return model.eval()


def test_a_model_without_batch_statistics_has_no_gap_in_training_mode():
    torch.manual_seed(0)
    model = IntrospectiveVAE.build((1, 8, 8), "tiny-conv", latent_dim=4, norm="layer").eval()
    data = data_of(images(60), images(41, seed=1))
    yardstick = examine(model, data).yardstick
    assert yardstick is not None
    found = measure_variants(model, yardstick, None, batch=8)
    assert found["raw weights"] == "no checkpoint with these weights"
    assert "batches of 9;" in found["training mode"]["mse"]["protocol"]  # 41 = 5 x 8 + 1: no batch of one
    more = measure_variants(model, yardstick, None, batch=64)["training mode"]["mse"]["protocol"]
    assert "batches of 41;" in more  # all there are
    assert set(found["training mode"]) == {
        "mse",
        "psnr_db",
        "ssim",
        "kl_real_nats",
        "active_units",
        "kl_aggregate_nats",
        "msssim_pairs",
        "frechet_thumb",
        *metrics_in("randconv"),
    }
    for name, entry in found["training mode"].items():
        assert entry["value"] == pytest.approx(entry["saved"], rel=1e-4), name
        assert entry["n"] == 41


def test_training_mode_is_measured_on_a_copy_with_the_statistics_of_batches():
    model, data = batch_normed(), data_of(images(60), images(32, seed=1))
    before = copy.deepcopy(model.state_dict())
    yardstick = examine(model, data).yardstick
    assert yardstick is not None
    found = measure_variants(model, yardstick, None, batch=16)["training mode"]
    assert not model.training
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert abs(found["mse"]["gap"]) > 0.01
    assert "batches of 16" in found["mse"]["protocol"]
    trained = copy.deepcopy(model).train()
    rows = collect_sets(model, data, 0).unseen.tensor()
    with torch.no_grad():
        wanted = torch.cat([(x - trained(x)).square().flatten(1).mean(dim=1) for x in rows.split(16)]).mean().item()
    assert found["mse"]["value"] == pytest.approx(wanted, rel=1e-5)
    assert found["mse"]["gap"] == pytest.approx(wanted / found["mse"]["saved"] - 1, rel=1e-5)


def test_the_saved_values_are_those_of_the_report():
    model, data = batch_normed(), data_of(images(60), images(32, seed=1))
    found = examine(model, data, features=["randconv"])
    assert found.yardstick is not None
    more = {"active_units", "kl_aggregate_nats", "msssim_pairs"}
    assert {*metrics_in("randconv"), *more} <= set(found.yardstick.saved)
    for name, value in found.yardstick.saved.items():
        assert value == pytest.approx(found.metrics[name]["value"], rel=1e-6), name


def test_other_weights_are_measured_as_they_would_be_alone():
    model, other, data = batch_normed(), batch_normed(1), data_of(images(60), images(33, seed=1))
    yardstick = examine(model, data, features=["randconv"]).yardstick
    assert yardstick is not None
    found = measure_variants(model, yardstick, other.state_dict(), batch=16)  # 33 = 2 x 16 + 1: no batch of one
    assert set(found) == {"training mode", "raw weights"}
    alone = examine(other, data, features=["randconv"]).metrics
    for name, entry in found["raw weights"].items():
        assert entry["value"] == pytest.approx(alone[name]["value"], rel=1e-4), name
    assert "evaluation mode" in found["raw weights"]["mse"]["protocol"]
    assert "batches of 17" in found["training mode"]["mse"]["protocol"]


def test_variants_are_measured_by_the_features_of_as_many_images(monkeypatch: pytest.MonkeyPatch):
    data, model = data_of(images(60), images(40, seed=1)), batch_normed()
    monkeypatch.setattr(kernel, "SUBSET", 20)
    monkeypatch.setattr(sets, "COMPARED", 16)
    yardstick = examine(model, data, features=["randconv"]).yardstick
    assert yardstick is not None
    kept, space = collect_sets(model, data, 0, ["randconv"]), feature_space("randconv")
    with torch.no_grad():
        train, heldout = kept.train.spaces["randconv"].features[:20], space(kept.unseen.tensor()[:16])
        samples = space(model.decode(kept.latents[:16]))
    saved = yardstick.saved
    assert saved["kid_randconv"] == pytest.approx(polynomial_mmd(samples, train), rel=1e-4)
    for name, value in neighbourhoods(Manifold(heldout, [3, 5]), Manifold(samples, [3]))._asdict().items():
        assert saved[f"{name}_randconv"] == pytest.approx(value, abs=1e-9)
    assert "KID against 20 training images, precision to coverage against 16 held-out" in yardstick.protocol
    plain = examine(IntrospectiveVAE.build((3,), "mlp", 2).eval(), from_array(torch.rand(60, 3))).yardstick
    assert plain is not None
    assert "KID" not in plain.protocol


def test_variants_are_measured_by_the_classes_of_a_classifier():
    digits = load_data("digits")
    assert isinstance(digits, ArrayData)
    x = nn.functional.interpolate(digits.train[:130].tensor(), 28).mul(255).round() / 255
    labels = load_classifier("mnist").network(x[60:100]).argmax(dim=1)
    data, model = data_of(x[:60], x[60:100], "mnist", labels), drawn(x[100:])
    found = examine(model, data)
    assert found.yardstick is not None
    assert found.yardstick.saved["class_distance_mnist"] > 0
    assert set(class_metrics_in("mnist")) <= set(found.yardstick.saved)
    for name in class_metrics_in("mnist"):
        assert found.yardstick.saved[name] == pytest.approx(found.metrics[name]["value"], abs=1e-12), name
    assert "shares of classes against 40 held-out images" in found.yardstick.protocol
    entries = measure_variants(model, found.yardstick, None, batch=8)["training mode"]
    assert "gap" not in entries["class_distance_mnist"], "near 0 for good samples"
    assert entries["class_entropy_nats_mnist"]["gap"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("batch", [1, 7, 16])
def test_the_same_pairs_are_compared_whatever_the_batch_is(batch: int):
    x = images(30, side=28)
    wanted = [Wanted(feature_space("thumb"), 30)]
    (found,), (whole,) = (
        [torch.cat(collect(lambda a, b: x[a:b], wanted, 30, batch=size, pairs=13).alike)] for size in (batch, 30)
    )
    assert len(whole) == 13
    np.testing.assert_allclose(found, whole, atol=1e-6)


def test_variants_in_the_plane_are_measured_by_modes_and_energy_too():
    data = load_data("density:8gaussians")
    assert isinstance(data, DensityData)
    density = data.density
    assert density.modes is not None
    centre = density.modes[2].clone()
    model = IntrospectiveVAE(nn.Identity(), nn.Identity(), 2)
    model.decoder = OnePoint(centre)
    yardstick = PlaneYardstick(model, density, 400, 0)
    assert set(yardstick.saved) == {
        *("kl_soft_introvae", "jsd_soft_introvae", "energy_distance", "modes", "share_within_3_sigma")
    }
    assert (yardstick.saved["modes"], yardstick.saved["share_within_3_sigma"]) == (1, 1)
    wanted = energy_distance(yardstick.real, centre.expand(400, 2))
    assert yardstick.saved["energy_distance"] == pytest.approx(wanted, rel=1e-6)
    found = measure_variants(model.eval(), yardstick, None, batch=100)["training mode"]
    assert found["modes"]["gap"] == 0
    assert "gap" not in found["energy_distance"]


class OnePoint(nn.Module):
    """A decoder that gives one point, whatever the latents."""

    def __init__(self, point: Tensor) -> None:
        super().__init__()
        self.point = nn.Parameter(point)

    def forward(self, z: Tensor) -> Tensor:
        return self.point.expand(len(z), 2)


def test_a_variant_that_diverged_is_said_to_have():
    model, data = batch_normed(), data_of(images(60), images(32, seed=1))
    yardstick = examine(model, data).yardstick
    assert yardstick is not None
    broken = {name: torch.full_like(x, torch.nan) if "weight" in name else x for name, x in model.state_dict().items()}
    found = measure_variants(model, yardstick, broken, batch=16)
    assert found["raw weights"] == "not finite"
    assert math.isfinite(found["training mode"]["mse"]["value"])


class TooLoud(nn.Module):
    """A layer that gives no numbers in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.nan if self.training else x


def test_training_mode_that_is_not_finite_is_named_in_the_plane_too():
    for data in (data_of(images(60), images(32, seed=1)), load_data("density:8gaussians")):
        torch.manual_seed(0)
        network = "tiny-conv" if isinstance(data, ArrayData) else "mlp"
        model = IntrospectiveVAE.build(data.shape, network, latent_dim=4)
        model.decoder = nn.Sequential(model.decoder, TooLoud())
        model.eval()
        plane = PlaneYardstick(model, data.density, 50, 0) if isinstance(data, DensityData) else None
        yardstick = plane or examine(model, data).yardstick
        assert yardstick is not None
        found = measure_variants(model, yardstick, None, batch=16)
        assert found == {"training mode": "not finite", "raw weights": "no checkpoint with these weights"}


def test_a_random_layer_does_not_change_other_draws():
    model, data = batch_normed(), data_of(images(60), images(32, seed=1))
    model.decoder = nn.Sequential(model.decoder, nn.Dropout(0.5)).eval()
    yardstick = examine(model, data).yardstick
    assert yardstick is not None
    state = torch.random.get_rng_state()
    found = [measure_variants(model, yardstick, None, batch=16) for _ in range(2)]
    assert found[0] == found[1]
    assert torch.equal(torch.random.get_rng_state(), state)


# --- evaluate


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with averaged weights far from the last ones; not to be changed."""
    folder = tmp_path_factory.mktemp("measures") / "run"
    return fit(data="digits", network="tiny-conv", steps=6, batch_size=16, lr=0.01, ema=0.9, recipe="none",
               progress=False, out=str(folder))  # fmt: skip


@pytest.fixture
def run(digits: Run, tmp_path: Path) -> Run:
    return Run(Path(shutil.copytree(digits.folder, tmp_path / "run")))


def raw_of(run: Run) -> dict[str, Tensor]:
    newest = sorted(run.checkpoints.glob("*.pt"))[-1]
    return torch.load(newest, weights_only=True)["players"]["model"]


def test_evaluate_measures_training_mode_and_raw_weights(run: Run):
    report = evaluate(run)
    assert set(report["variants"]) == {"training mode", "raw weights"}
    model, raw = run.model(), run.model()
    raw.load_state_dict(raw_of(run))
    data = load_data("digits")
    assert isinstance(data, ArrayData)
    x = data.heldout.tensor()
    for name, other in (("raw weights", raw), ("training mode", model)):
        wanted = (x - other.reconstruct(x)).square().mean().item()
        entry = report["variants"][name]["mse"]
        assert entry["value"] == pytest.approx(wanted, rel=1e-4)
        assert entry["saved"] == pytest.approx(report["metrics"]["mse"]["value"], rel=1e-5)
    assert abs(report["variants"]["raw weights"]["mse"]["gap"]) > 1e-4
    page = (run.folder / "report.html").read_text()
    assert "Other ways to run it" in page
    assert f"{100 * report['variants']['raw weights']['mse']['gap']:+.1f} %" in page


def spoil_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def spoil_other(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    state["average"] = {name: x + 1 for name, x in state["average"].items()}
    torch.save(state, path)


@pytest.mark.parametrize("spoil", [Path.unlink, spoil_cut, spoil_other])
def test_raw_weights_that_are_not_the_models_are_not_measured(run: Run, spoil: Callable[[Path], None]):
    for path in run.checkpoints.glob("*.pt"):
        spoil(path)
    report = evaluate(run)
    assert report["variants"]["raw weights"] == "no checkpoint with these weights"
    assert report["variants"]["training mode"]["mse"]["n"] > 0
    assert '<td colspan="4">no checkpoint with these weights</td>' in (run.folder / "report.html").read_text()
    again = evaluate(run, metrics="mse")["variants"]
    assert again == report["variants"]


def test_named_metrics_name_those_of_the_variants_too(run: Run):
    report = evaluate(run, metrics=["mse", "recall_pixels"])
    assert set(report["metrics"]) == {"mse", "recall_pixels"}
    assert {name: set(entries) for name, entries in report["variants"].items()} == {
        "training mode": {"mse"},
        "raw weights": {"mse"},
    }


def test_evaluate_takes_feature_spaces_by_name_module_and_file(run: Run, tmp_path: Path, command: Command):
    network = nn.Sequential(nn.AvgPool2d(4), nn.Flatten())
    dynamic = ({0: torch.export.Dim("n")},)
    torch.export.save(torch.export.export(network, (images(2),), dynamic_shapes=dynamic), tmp_path / "pool.pt2")
    report = evaluate(run, features=[FeatureSpace("again", network), "mnist"], metrics=["frechet_again", "kid_mnist"])
    assert set(report["metrics"]) == {"frechet_again", "kid_mnist"}
    assert report["neighbours"]["space"] == "mnist"  # the last
    words = ("--features", f"pixels, {tmp_path / 'pool.pt2'}", "--metrics", "frechet_pool,kid_pixels")
    said = command("evaluate", run.folder, *words)
    assert (said.code, said.err) == (0, "")
    assert "frechet_pool" in said.out
    found = run.report()["metrics"]
    assert set(found) == {"frechet_again", "kid_mnist", "frechet_pool", "kid_pixels"}
    assert found["frechet_pool"]["value"] == pytest.approx(found["frechet_again"]["value"], rel=1e-5)
    assert json.loads(run.report_path.read_text())["metrics"] == found


def test_what_cannot_be_measured_is_said_before_anything_is(
    run: Run, refused: Refused, monkeypatch: pytest.MonkeyPatch
):
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="unknown feature space 'vgg'"):
        evaluate(run, features="vgg")
    with pytest.raises(ConfigError, match="frechet_mnist does not apply to digits"):
        evaluate(run, metrics="frechet_mnist")
    assert "vgg" in refused("evaluate", run.folder, "--features", "vgg")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(MissingExtraError, match=r"introvae\[lpips\]"):
        evaluate(run, metrics="lpips")
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


def test_metrics_have_one_name_each():
    assert len(METRICS) == len(set(METRICS))


# --- models that are told the class


class OfClass(nn.Module):
    """A decoder whose image is as bright as its class says, and an encoder that gives the class."""

    def __init__(self, decodes: bool) -> None:
        super().__init__()
        self.decodes, self.weight = decodes, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        level = self.weight * condition.float() / 4
        if self.decodes:
            return level[:, None, None, None].expand(-1, 1, 8, 8) + 0.01 * x[:, :1, None, None].tanh().abs()
        return torch.stack([level, level], dim=1), torch.zeros(len(x), 2)


def test_a_class_conditional_model_is_told_the_classes():
    labels = torch.arange(40) % 3
    x = (labels / 4)[:, None, None, None].expand(-1, 1, 8, 8)
    data = data_of(images(60), x, labels=labels)
    model = IntrospectiveVAE(OfClass(decodes=False), OfClass(decodes=True), latent_dim=2, classes=3).eval()
    found = examine(model, data)
    assert found.metrics["mse"]["value"] < 1e-3  # each decoded as its own class
    heldout = look_at_heldout(model, data)
    np.testing.assert_allclose(heldout.reconstruct(model, [2, 3]).mean(dim=(1, 2, 3)), [0.5, 0.0], atol=0.02)
    levels = set((4 * collect_sets(model, data, 0).samples.spaces["pixels"].features.mean(dim=1)).round().tolist())
    assert levels == {0.0, 1.0, 2.0}
    assert found.yardstick is not None
    raw = measure_variants(model, found.yardstick, model.state_dict(), batch=16)["raw weights"]
    assert all(abs(entry["gap"]) < 1e-4 for entry in raw.values() if "gap" in entry)
