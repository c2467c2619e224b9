"""How many images are compared, what identifies the numbers of a report, and which ones may stand together."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from commands import Command, Refused
from introvae import Classes, IntrospectiveVAE, Run, evaluate, evaluation, fit
from introvae.data import ArrayData, DataOptions, Part, load_data
from introvae.data.stream import StreamData
from introvae.errors import ConfigError
from introvae.measures import examine, measure_variants, reference, sets
from introvae.measures.reference import Reference
from introvae.measures.sets import collect_sets
from introvae.metrics.diversity import ms_ssim
from introvae.metrics.features import thumb
from introvae.metrics.frechet import GaussianStatistics, frechet_distance


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (count, 1, 8, 8), generator=generator(seed), dtype=torch.uint8)


def data_of(train: int, heldout: int) -> ArrayData:
    return ArrayData("mine", Part(images(train)), Part(images(heldout, seed=1)))


def built(seed: int = 0) -> IntrospectiveVAE:
    torch.manual_seed(seed)
    return IntrospectiveVAE.build((1, 8, 8), "tiny-conv", latent_dim=4).eval()


def moments(x: Tensor) -> GaussianStatistics:
    found = GaussianStatistics(64)
    found.update(thumb(x))
    return found


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """All that a model decodes, in the order in which it does."""
    seen: list[Tensor] = []
    decode = IntrospectiveVAE.decode

    def noting(self: IntrospectiveVAE, z: Tensor, condition: Tensor | None = None) -> Tensor:
        seen.append(decode(self, z, condition))
        return seen[-1]

    monkeypatch.setattr(IntrospectiveVAE, "decode", noting)
    return seen


# --- how many samples


def test_any_number_of_samples_is_summed_in_bounded_memory(decoded: list[Tensor], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sets, "MANY", 40)
    monkeypatch.setattr(sets, "SAMPLES", 10)
    data, model = data_of(200, 60), built()
    kept = collect_sets(model, data, 0, ["thumb"], samples=600)
    assert sum(map(len, decoded)) == 600, "each is decoded once"
    assert max(map(len, decoded)) <= 256
    assert len(kept.latents) == 50, "the others are drawn when they are decoded"
    assert len(kept.samples.spaces["thumb"].features) == 40
    found = sets.set_metrics(kept, data, 0)[0]
    entry, train = found["frechet_thumb"], moments(data.train.tensor())
    assert entry["value"] == pytest.approx(frechet_distance(moments(torch.cat(decoded)), train), rel=1e-6)
    assert entry["floor"] == pytest.approx(frechet_distance(moments(data.heldout.tensor()), train), rel=1e-6)
    assert entry["n"] == 600
    assert "600 samples against 200 of the training part; floor: 60 held-out images in" in entry["protocol"]


def test_all_samples_are_different_and_the_same_again(decoded: list[Tensor], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sets, "MANY", 40)
    monkeypatch.setattr(sets, "SAMPLES", 10)
    model = built()
    kept = [collect_sets(model, data_of(60, 20), 0, samples=400) for _ in range(2)]
    first, second = torch.cat(decoded).chunk(2)
    assert torch.equal(first, second)
    assert len(first.unique(dim=0)) == 400
    assert torch.equal(kept[0].latents, kept[1].latents)
    collect_sets(model, data_of(60, 20), 1, samples=400)
    assert not (torch.cat(decoded)[800:] == first).flatten(1).all(dim=1).any(), "another seed"


def test_what_needs_all_features_at_once_takes_a_stated_number_of_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sets, "MANY", 40)
    monkeypatch.setattr(sets, "SAMPLES", 10)
    monkeypatch.setattr(sets, "FEWEST", 20)
    data, model = data_of(200, 30), built()
    usual, more = (examine(model, data, features=["randconv"], samples=n).metrics for n in (None, 500))
    for name in ("precision", "recall", "density", "coverage"):
        entry = more[f"{name}_randconv"]
        assert entry["n"] == usual[f"{name}_randconv"]["n"] == 30, "more samples cover more"
        assert "30 samples, 30 held-out images" in entry["protocol"]
        assert entry["floor"] == usual[f"{name}_randconv"]["floor"]
    assert usual["kid_randconv"]["n"] == 30
    assert more["kid_randconv"]["n"] == 40
    assert "40 samples against 40 of the training part" in more["kid_randconv"]["protocol"]
    assert more["frechet_randconv"]["n"] == 500
    for name in ("mse", "recall_pixels"):
        assert more[name]["n"] == usual[name]["n"], "their protocols fix it"


def test_few_samples_are_the_number_of_all_that_compares_them():
    data, model = data_of(200, 50), built()
    found = examine(model, data, features=["randconv"], samples=20)
    for name in ("frechet_thumb", "kid_randconv", "precision_randconv"):
        assert found.metrics[name]["n"] == 20, name
    assert found.metrics["msssim_pairs"]["n"] == 10
    assert "floor: 10 pairs of held-out images" in found.metrics["msssim_pairs"]["protocol"]
    assert "floor: 20 held-out" in found.metrics["frechet_thumb"]["protocol"]
    assert found.yardstick is not None
    assert found.yardstick.n == 20
    variant = measure_variants(model, found.yardstick, model.state_dict(), 8)["raw weights"]
    assert all(abs(entry.get("gap", 0)) < 1e-4 for entry in variant.values())
    assert {entry["n"] for entry in variant.values()} == {20}
    assert found.yardstick.saved["frechet_thumb"] == pytest.approx(found.metrics["frechet_thumb"]["value"], rel=1e-9)


# --- how many pairs


@pytest.mark.parametrize(
    ("samples", "pairs", "ours", "floor"),
    [
        (None, None, 12, 12),  # as many samples as held-out images
        (600, None, 70, 12),
        (600, 300, 300, 12),
        (31, None, 15, 12),
        (600, 9, 9, 9),
        (None, 300, 300, 12),
    ],
)
def test_pairs_are_as_many_as_asked_for_or_as_there_are_images_for(
    samples: int | None,
    pairs: int | None,
    ours: int,
    floor: int,
    decoded: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(sets, "MANY", 40)
    monkeypatch.setattr(sets, "SAMPLES", 10)
    monkeypatch.setattr(sets, "PAIRS", 70)
    data, model = data_of(60, 25), built()
    kept = collect_sets(model, data, 0, samples=samples, pairs=pairs)
    x, real = torch.cat(decoded), data.heldout[kept.rows].tensor()
    assert len(x) == max(2 * ours, samples or 0, 50), "each sample is decoded once"
    values = ms_ssim(x[0 : 2 * ours : 2], x[1 : 2 * ours : 2])
    found = sets.set_metrics(kept, data, 0)[0]
    entry = found["msssim_pairs"]
    assert (entry["n"], entry["value"]) == (ours, pytest.approx(values.mean().item(), rel=1e-5))
    assert entry["std"] == pytest.approx(values.std().item(), rel=1e-4)
    expected = ms_ssim(real[0 : 2 * floor : 2], real[1 : 2 * floor : 2]).mean().item()
    assert entry["floor"] == pytest.approx(expected, rel=1e-5)
    assert f"MS-SSIM of {ours} pairs of samples" in entry["protocol"]
    assert f"floor: {floor} pairs of held-out images" in entry["protocol"]
    assert found["frechet_thumb"]["n"] == (25 if samples is None else samples), "pairs are drawn for themselves"


@pytest.mark.parametrize("side", [8, 64])
@pytest.mark.parametrize("classes", [None, 3])
def test_more_pairs_change_no_other_number(side: int, classes: int | None):
    """Also of images that are not compared by their pixels, which takes 2,500 samples anyway."""
    x = torch.randint(0, 256, (80, 1, side, side), generator=generator(), dtype=torch.uint8)
    labels = torch.arange(80) % 3
    data = ArrayData("mine", Part(x[:60], labels[:60]), Part(x[60:], labels[60:]))
    torch.manual_seed(0)
    told = None if classes is None else Classes(("a", "b", "c"), (2, 3, 5))
    model = IntrospectiveVAE.build((1, side, side), "tiny-conv", latent_dim=3, classes=told).eval()
    usual, more = (examine(model, data, pairs=pairs).metrics for pairs in (None, 1400))
    assert more.pop("msssim_pairs")["n"] == 1400
    assert usual.pop("msssim_pairs")["n"] == 10
    assert more == usual


# --- how many training images


@pytest.mark.parametrize(("asked", "taken"), [(2, 2), (50, 50), (200, 200), (10**9, 200)])
def test_any_number_of_training_images_is_compared_with(asked: int, taken: int):
    data, model = data_of(200, 30), built()
    rows = torch.randperm(200, generator=generator())[:taken]
    kept = collect_sets(model, data, 0, reference=asked)
    found = sets.set_metrics(kept, data, 0)[0]["frechet_thumb"]
    samples = moments(model.decode(kept.latents[:30]).detach())
    assert found["value"] == pytest.approx(frechet_distance(samples, moments(data.train[rows].tensor())), rel=1e-6)
    assert f"30 samples against {taken} of the training part" in found["protocol"]


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> StreamData:
    """Images in row groups of 20, decoded when they are needed."""
    import datasets

    def written(pixels: np.ndarray) -> Image.Image:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return Image.open(file)

    path = tmp_path_factory.mktemp("stream") / "images.parquet"
    pictures = [written(x[0]) for x in images(300).numpy()]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"image": pictures, "label": [n % 3 for n in range(300)]}, features=features)
    table.to_parquet(str(path), batch_size=20)
    found = load_data(path, DataOptions(stream="always", stream_buffer=60))
    assert isinstance(found, StreamData)
    return found


@pytest.mark.parametrize("n", [100, 10_000])
def test_a_stream_is_read_a_piece_at_a_time_and_gives_the_same_images(
    stream: StreamData, n: int, monkeypatch: pytest.MonkeyPatch
):
    whole = stream.train.some(n, generator(3))
    sizes: list[int] = []
    part = type(stream.train.pictures).part  # pyright: ignore[reportAttributeAccessIssue]

    def noting(self: object, rows: np.ndarray, read: object = None) -> Part:
        sizes.append(len(rows))
        return part(self, rows, read)

    monkeypatch.setattr(type(stream.train.pictures), "part", noting)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(reference, "AHEAD_BYTES", 40 * 64)
    draws = generator(3)
    pieces = Reference(stream.train, n, draws)
    assert len(pieces) == len(whole) == min(n, len(stream.train))
    parts = [pieces[start : start + 16] for start in range(0, len(pieces), 16)]
    assert torch.equal(torch.cat([part.x for part in parts]), whole.x)
    assert torch.equal(torch.cat([part.labels for part in parts if part.labels is not None]), whole.labels)  # pyright: ignore
    assert max(sizes) == 40
    assert sum(sizes) < 1.3 * len(whole), "hardly any is decoded twice"
    after = generator(3)
    stream.train.some(n, after)
    assert torch.equal(draws.get_state(), after.get_state()), "what is drawn next is the same"


def test_a_stream_is_measured_as_the_same_images_in_memory_would_be(stream: StreamData):
    model = built()
    found = examine(model, stream, reference=10**9, samples=100).metrics
    held = stream.train[slice(None)]
    wanted = examine(model, ArrayData("mine", held, stream.heldout), reference=10**9, samples=100).metrics
    assert found["frechet_thumb"]["floor"] == pytest.approx(wanted["frechet_thumb"]["floor"], rel=1e-6)
    assert "against 270 of the training part" in found["frechet_thumb"]["protocol"]


# --- what will not do


def test_pairs_that_will_not_do(tmp_path: Path):
    model, data = built(), data_of(60, 20)
    with pytest.raises(ConfigError, match="pairs is 30, which takes 60 samples, not 59: give as many, or leave one"):
        examine(model, data, samples=59, pairs=30)
    assert examine(model, data, samples=60, pairs=30).metrics["msssim_pairs"]["n"] == 30
    rows = Part(torch.rand(9, 3))
    with pytest.raises(ConfigError, match="pairs does not apply to rows: leave it out"):
        examine(model, ArrayData("rows", rows, rows), pairs=3)
    tiny = Part(images(9)[..., :4, :4])
    with pytest.raises(ConfigError, match="pairs does not apply to tiny: leave it out, MS-SSIM is of images from 5"):
        examine(model, ArrayData("tiny", tiny, tiny), pairs=3)


@pytest.mark.parametrize("option", ["samples", "reference", "pairs"])
def test_numbers_that_will_not_do(option: str):
    model, data = built(), data_of(60, 20)
    for number in (1, 0, -5):
        wrong: dict[str, Any] = {option: number}
        with pytest.raises(ConfigError, match=f"{option} is {number}: it must be at least 2"):
            examine(model, data, **wrong)
    wrong = {option: 2.5}
    with pytest.raises(ConfigError, match=f"{option} is 2.5: it must be a whole number"):
        examine(model, data, **wrong)
    wrong = {option: 100}
    with pytest.raises(ConfigError, match=f"{option} does not apply to density:rings: leave it out"):
        examine(model, load_data("density:rings"), **wrong)


# --- what identifies a report


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An evaluated run on few images; not to be changed."""
    home = tmp_path_factory.mktemp("small")
    np.save(home / "images.npy", images(80).numpy()[:, 0])
    run = fit(data=str(home / "images.npy"), network="tiny-conv", steps=3, batch_size=16, recipe="none",
              progress=False, out=str(home / "run"))  # fmt: skip
    evaluate(run)
    return run


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures: they take most of the time and are others' to test."""
    monkeypatch.setattr(evaluation, "_draw", lambda *_: {"pictures": {}})


@pytest.fixture
def run(small: Run, tmp_path: Path, undrawn: None) -> Run:
    """A copy of it in which a number is marked."""
    copy = Run(Path(shutil.copytree(small.folder, tmp_path / "run")))
    mark(copy)
    return copy


def mark(run: Run) -> None:
    report = run.report()
    report["metrics"]["psnr_db"]["value"] = -123.0
    run.report_path.write_text(json.dumps(report))


def kept(report: dict[str, dict[str, dict[str, float]]]) -> bool:
    """Whether the other, marked numbers are there."""
    assert "mse" in report["metrics"]
    assert ("psnr_db" in report["metrics"]) == (len(report["metrics"]) > 1)
    return report["metrics"].get("psnr_db", {}).get("value") == -123.0


def test_a_report_names_what_it_is_of(run: Run):
    import hashlib

    its = evaluate(run, seed=7, samples=30, reference=40, pairs=15)["evaluation"]
    weights = (run.model_folder / "model.safetensors").read_bytes()
    assert its["model"] == hashlib.sha256(weights).hexdigest()
    assert (its["seed"], its["samples"], its["reference"], its["pairs"]) == (7, 30, 40, 15)
    assert its["device"] == str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    assert (its["train"][0], its["heldout"][0]) == (72, 8)
    assert run.report()["evaluation"] == its
    page = (run.folder / "report.html").read_text()
    assert f"SHA-256 {its['model']}" in page
    for row in ("measured on", "seed of the draws", "samples asked for", "reference asked for", "pairs asked for"):
        assert f"<td>{row}</td>" in page


def test_numbers_of_the_same_evaluation_stay(run: Run, caplog: pytest.LogCaptureFixture):
    assert kept(evaluate(run, metrics="mse"))
    assert kept(evaluate(run, metrics="mse", device="cpu"))
    report = run.report()
    del report["evaluation"]["pairs"]  # as before there was a choice
    run.report_path.write_text(json.dumps(report))
    assert kept(evaluate(run, metrics="mse"))
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seed": 1}, "another seed"),
        ({"samples": 20}, "another number of samples"),
        ({"pairs": 20}, "another number of pairs"),
        ({"reference": 20, "seed": 1}, "another seed and number of training images"),
    ],
)
def test_numbers_of_another_evaluation_go_and_it_is_said(
    run: Run, caplog: pytest.LogCaptureFixture, options: dict[str, Any], named: str
):
    before = len(run.report()["metrics"])
    report = evaluate(run, metrics="mse", **options)
    assert not kept(report)
    assert set(report["metrics"]) == {"mse"}
    assert set(report["variants"]["training mode"]) == {"mse"}
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{run.report_path}: its {before - 1} other numbers are of {named} and go; ")
    mark_free = evaluate(run, metrics="ssim", **options)
    assert set(mark_free["metrics"]) == {"mse", "ssim"}, "of the same evaluation again"


def test_numbers_of_other_weights_go(run: Run, caplog: pytest.LogCaptureFixture):
    model = run.model()
    with torch.no_grad():
        next(model.parameters()).add_(0.01)
    model.save_pretrained(run.model_folder)
    assert not kept(evaluate(run, metrics="mse"))
    assert "are of another model and go" in caplog.text


def test_numbers_of_a_run_that_was_trained_further_go(run: Run, caplog: pytest.LogCaptureFixture):
    settings = run.config_path.read_text()
    assert "\nsteps: 3\n" in settings
    run.config_path.write_text(settings.replace("\nsteps: 3\n", "\nsteps: 6\n"))
    fit(resume=run.folder, progress=False)
    caplog.clear()
    assert not kept(evaluate(run, metrics="mse"))
    assert "are of another model and go" in caplog.text


def test_numbers_of_other_data_of_the_same_name_go(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "other.npy"
    np.save(path, images(40, seed=5).numpy()[:, 0])
    first = evaluate(run, data=path)
    assert first["evaluation"]["heldout"][0] == 40
    np.save(path, images(40, seed=6).numpy()[:, 0])
    assert set(evaluate(run, data=path, metrics="mse")["metrics"]) == {"mse"}
    assert "of another held-out data and go" in caplog.text


def test_numbers_of_a_report_that_does_not_say_what_they_are_of_go(run: Run, caplog: pytest.LogCaptureFixture):
    report = run.report()
    del report["evaluation"]
    run.report_path.write_text(json.dumps(report))
    assert not kept(evaluate(run, metrics="mse"))
    assert "are of a model that it does not name and go" in caplog.text


# --- on the command line


def test_the_command_takes_the_numbers_and_the_device(command: Command, refused: Refused, run: Run):
    said = command("evaluate", run.folder, "--samples", 50, "--reference", 60, "--device", "cpu", "--seed", 3)
    assert (said.code, said.err) == (0, "")
    report = run.report()
    assert report["metrics"]["frechet_thumb"]["n"] == 50
    assert report["metrics"]["msssim_pairs"]["n"] == 25
    assert "50 samples against 60 of the training part" in report["metrics"]["frechet_thumb"]["protocol"]
    said = command("evaluate", run.folder, "--metrics", "mse")
    assert (said.code, said.err) == (0, "")
    assert "are of another seed and number of samples and number of training images and go; without" in said.out
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    assert "samples is 1" in refused("evaluate", run.folder, "--samples", 1)
    assert "pairs is 0" in refused("evaluate", run.folder, "--pairs", 0)
    assert "takes 60 samples, not 50" in refused("evaluate", run.folder, "--samples", 50, "--pairs", 30)
    assert "device 'warp' cannot be used" in refused("evaluate", run.folder, "--device", "warp")
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


def test_class_metrics_of_images_without_labels_name_the_remedy(
    tmp_path: Path, refused: Refused, command: Command, undrawn: None
):
    np.save(tmp_path / "grey.npy", np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8))
    run = fit(data=str(tmp_path / "grey.npy"), network="tiny-conv", steps=1, batch_size=8, recipe="none",
              progress=False, out=str(tmp_path / "run"))  # fmt: skip
    line = refused("evaluate", run.folder, "--metrics", "confident_share_mnist")
    assert "whose classes are not known: label the images or, if they are of the mnist classes, give" in line
    assert "frechet_mnist" in evaluate(run)["metrics"]
    assert not any("confident" in name for name in run.report()["metrics"])
    said = command("evaluate", run.folder, "--metrics", "confident_share_mnist", "--features", "mnist")
    assert (said.code, said.err) == (0, "")
    assert "the data have no labels" in run.report()["metrics"]["confident_share_mnist"]["protocol"]
