"""Searching for what does not belong: every file is accounted for, and one image scores alone as among many."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from commands import Command, Refused, call
from introvae import ConfigError, DataError, Run, cli_detect
from introvae.apps import judge as judging
from introvae.apps import truth
from introvae.apps.detect import DEFAULT, detect
from introvae.apps.judge import Judge
from introvae.apps.scores import SCORES
from introvae.apps.truth import Masks, read_labels
from introvae.data import Preparation
from introvae.data.each import each, open_readings
from introvae.data.scans import slices
from introvae.metrics.detection import detection_metrics
from introvae.training.devices import pick_device

TRAIN = ["--recipe", "none", "--quiet", "--steps", "60", "--batch-size", "16", "--lr", "0.003"]


def disc(i: int, square: bool = False, side: int = 16) -> np.ndarray:
    """A grey disc that lies somewhere, dark around it; an anomaly has a white square, too."""
    generator = np.random.default_rng(i)
    y, x = np.mgrid[:side, :side]
    cy, cx = generator.uniform(5, 10, 2)
    picture = np.where((y - cy) ** 2 + (x - cx) ** 2 < 12, 150, 20) + generator.integers(0, 10, (side, side))
    if square:
        picture[1:5, 10:14] = 255
    return picture.astype(np.uint8)


def write(folder: Path, numbers: range, square: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in numbers:
        Image.fromarray(disc(i, square)).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on discs, and a folder with discs, others with a square, and what nobody can read; not to be changed."""
    folder = tmp_path_factory.mktemp("detect")
    write(folder / "good", range(400, 640))
    write(folder / "new" / "in", range(200, 230))
    write(folder / "new" / "out", range(300, 312), square=True)
    (folder / "new" / "broken.png").write_bytes(b"no picture")
    (folder / "new" / "empty.jpg").write_bytes(b"")
    (folder / "new" / "notes.txt").write_text("hello")
    Image.new("L", (2, 2)).save(folder / "new" / "tiny.png")
    Image.fromarray(np.tile(disc(5), (4, 9))).save(folder / "new" / "wide.png")
    Image.new("1", (10_000, 10_000)).save(folder / "new" / "huge.png")
    content = (folder / "good" / "403.png").read_bytes()
    (folder / "new" / "cut.png").write_bytes(content[: len(content) // 2])
    for i in range(300, 312):
        mask = np.zeros((16, 16), np.uint8)
        mask[1:5, 10:14] = 1  # 0 and 1 are as good as 0 and 255
        (folder / "masks" / "out").mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(folder / "masks" / "out" / f"{i:03d}_mask.png")
    rows = [f"in/{i:03d}.png,normal" for i in range(200, 230)] + [f"./out/{i:03d}.png,1" for i in range(300, 312)]
    (folder / "labels.csv").write_text("file,label\n" + "\n".join(rows) + "\n")
    out = ["--network", "mlp", "--network_options.hidden", 64, "--latent-dim", 4, "--out", folder / "run"]
    assert call("fit", "--data", folder / "good", *TRAIN, "--steps", 400, *out) == 0
    return folder


@pytest.fixture(scope="module")
def report(home: Path) -> dict[str, Any]:
    return detect(home / "run", home / "new", labels=home / "labels.csv", masks=home / "masks", out=home / "found")


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "scores.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_file_is_a_row_in_the_order_of_names_and_what_is_not_scored_has_a_reason(
    home: Path, report: dict[str, Any]
) -> None:
    rows = table(home / "found")
    names = sorted(p.relative_to(home / "new").as_posix() for p in (home / "new").rglob("*") if p.is_file())
    assert [row["file"] for row in rows] == names
    reasons = {row["file"]: row["reason"] for row in rows if row["reason"]}
    assert reasons.keys() == {"broken.png", "cut.png", "empty.jpg", "huge.png", "notes.txt", "tiny.png"}
    assert "too small" in reasons["tiny.png"]
    assert "truncated" in reasons["cut.png"]
    for row in rows:
        empty = [row[name] == "" for name in ("anomalous", "p_value", "error", "kl", "neg_elbo", "latent")]
        assert all(empty) if row["reason"] else not any(empty)
    assert report["counts"] == {
        "found": len(rows),
        "scored": len(rows) - len(reasons),
        "called_anomalous": sum(row["anomalous"] == "1" for row in rows),
    }


def test_what_has_a_square_is_found_and_where_it_is(home: Path, report: dict[str, Any]) -> None:
    rows = table(home / "found")
    metrics = report["metrics"]
    assert metrics["auroc_neg_elbo"]["value"] > 0.95
    assert metrics["pixel_auroc"]["value"] > 0.85
    assert 0 < metrics["dice"]["value"] <= metrics["best_dice"]["value"] + 1e-9
    for name in ("pixel_auroc", "dice", "best_dice"):
        low, value, high = (metrics[name][key] for key in ("low", "value", "high"))
        assert low <= value <= high
        # Dice may be the same in all draws, where all squares are found with the same border around them.
        assert low < high or name != "pixel_auroc"
        assert metrics[name]["protocol"].endswith("95 % interval of 500 bootstraps of whole images")
    kinds = [
        torch.tensor([float(row["neg_elbo"]) for row in rows if row["label"] == label], dtype=torch.float64)
        for label in "01"
    ]
    assert [len(kind) for kind in kinds] == [30, 12]
    entry = metrics["auroc_neg_elbo"]
    assert entry["resampled"] == metrics["dice"]["resampled"] == "images"
    assert entry["protocol"] == (
        "12 anomalous against 30 normal images; 95 % interval of 1,000 bootstraps of whole images"
    )
    assert "normal_scans" not in report["scores"]["neg_elbo"]
    again = detection_metrics(*kinds)["auroc"]
    assert metrics["auroc_neg_elbo"]["value"] == pytest.approx(again.value, abs=1e-9)
    assert metrics["auroc_neg_elbo"]["low"] <= again.value <= metrics["auroc_neg_elbo"]["high"]


def test_thresholds_and_p_values_are_of_the_images_that_the_run_held_out(home: Path, report: dict[str, Any]) -> None:
    judge = Judge(Run.open(home / "run"), ["neg_elbo"], "randconv", "residual", 1, 0, None, pick_device("cpu"))
    from introvae.data import ArrayData
    from introvae.evaluation import load_for

    data = load_for(judge.config, judge.model, None)
    assert isinstance(data, ArrayData)
    normal = judge.score(data.heldout.tensor())["neg_elbo"]
    about = report["scores"]["neg_elbo"]
    assert about["normal_images"] == len(normal) == 24
    assert float((normal > about["threshold"]).double().mean()) <= 0.05 + 1e-9
    assert about["false_positive_rate_low"] < 0.05 < about["false_positive_rate_high"]
    for row in table(home / "found"):
        if not row["reason"]:
            value = float(row["neg_elbo"])
            assert row["anomalous"] == str(int(value > about["threshold"]))
            p = (int((normal >= value * (1 - 1e-6)).sum()) + 1) / (len(normal) + 1)
            assert float(row["p_value"]) == pytest.approx(p, rel=1e-3)


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_one_image_scores_alone_as_in_a_batch(home: Path, tmp_path: Path, report: dict[str, Any], batch: int) -> None:
    names = ["error", "kl", "neg_elbo", "latent", "neg_log_likelihood", "perceptual", "complexity"]
    for out, size in ((tmp_path / "a", batch), (tmp_path / "b", 5)):
        detect(home / "run", home / "new", scores=names, draws=8, batch_size=size, maps=0, out=out)
    for one, other in zip(table(tmp_path / "a"), table(tmp_path / "b"), strict=True):
        assert one["file"] == other["file"]
        for name in names:
            if not one["reason"]:
                assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-4, abs=1e-4)


def test_the_page_and_the_maps_show_the_highest(home: Path, report: dict[str, Any]) -> None:
    page = (home / "found" / "report.html").read_text(encoding="utf-8")
    for word in ("broken.png", "pixel_auroc", "held out", "data:image/png;base64,", "AUROC"):
        assert word in page
    assert "http" not in page.replace("http-equiv", "")
    maps = report["maps"]
    assert len(maps) == 24
    scores = [entry["score"] for entry in maps]
    assert scores == sorted(scores, reverse=True)
    with Image.open(home / "found" / maps[0]["picture"]) as picture:
        assert picture.size == (48, 16)  # image, reconstruction, heat
    assert json.loads((home / "found" / "report.json").read_text())["metrics"] == report["metrics"]


def test_the_report_says_which_model_it_is_of_and_with_what_settings(home: Path, tmp_path: Path) -> None:
    scores = ["error", "perceptual", "neg_log_likelihood"]
    report = detect(home / "run", home / "new" / "in", scores=scores, draws=7, seed=3, maps=0, out=tmp_path)
    weights = hashlib.sha256((home / "run" / "model" / "model.safetensors").read_bytes()).hexdigest()
    assert report["model"] == {"steps": 400, "sha256": weights}
    assert report["settings"] == {"draws": 7, "features": "randconv", "seed": 3}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for word in (
        "for 400 steps",
        weights[:12],
        "with 7 latents an image",
        "the space <code>randconv</code>",
        "Seed 3.",
    ):
        assert word in page


def test_a_folder_of_normal_images_sets_the_thresholds(home: Path, tmp_path: Path) -> None:
    report = detect(home / "run", home / "new" / "out", normal=home / "new" / "in", out=tmp_path, maps=2)
    assert report["scores"]["error"]["normal_images"] == 30
    assert report["metrics"] == {}
    assert len(list((tmp_path / "maps").iterdir())) == 2


def test_a_run_whose_data_are_gone_still_detects_where_it_is_told_what_is_normal(
    home: Path, tmp_path: Path, command: Command
) -> None:
    shutil.copytree(home / "run", tmp_path / "run")
    settings = (tmp_path / "run" / "config.yaml").read_text().replace(str(home / "good"), str(tmp_path / "gone"))
    (tmp_path / "run" / "config.yaml").write_text(settings)
    words = ["detect", tmp_path / "run", "--images", home / "new" / "out", "--out", tmp_path / "found", "--maps", 0]
    said = command(*words, "--normal", home / "new" / "in")
    assert said.code == 0, said.err
    assert "without the score latent" in said.out
    assert "latent" not in table(tmp_path / "found")[0]
    assert command(*words).code == 2
    assert command(*words, "--normal", home / "new" / "in", "--scores", "latent").code == 2


@pytest.mark.parametrize(("images", "name"), [(".", "in"), ("..", "new"), ("../in/", "in")])
def test_results_go_into_a_folder_named_after_the_images_wherever_these_are_named_from(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: str, name: str
) -> None:
    shutil.copytree(home / "run", tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    monkeypatch.chdir(home / "new" / "in")
    report = detect(tmp_path / "run", images, maps=0)
    assert Path(report["folder"]) == tmp_path / "run" / "detect" / name
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before


def test_results_inside_the_images_folder_are_never_searched(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "new", tmp_path / "new")
    (tmp_path / "new" / "found-later.png").write_bytes((home / "good" / "400.png").read_bytes())
    out = tmp_path / "new" / "found"  # before most of the names
    first = detect(home / "run", tmp_path / "new", normal=tmp_path / "new", maps=6, out=out)
    rows = {row["file"]: row for row in table(out)}
    assert "found-later.png" in rows
    for entry in first["maps"]:
        assert rows[entry["name"]]["neg_elbo"] == f"{entry['score']:.8g}"
        with Image.open(out / entry["picture"]) as picture, Image.open(tmp_path / "new" / entry["name"]) as image:
            if image.size == (16, 16):  # what it was brought to
                assert np.array_equal(np.asarray(picture.convert("L"))[:, :16], np.asarray(image)), entry["name"]
    second = detect(home / "run", tmp_path / "new", normal=tmp_path / "new", maps=6, out=out)
    assert second["counts"] == first["counts"]
    assert second["scores"] == first["scores"]  # what is normal was there, too


def test_a_picture_shows_the_image_that_has_the_score_though_files_come_in_between(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(home / "new" / "out", tmp_path / "new")
    draw = Judge.draw

    def later(self: Judge, *words: Any) -> list[dict[str, Any]]:
        for i in range(5):
            shutil.copy(home / "good" / f"40{i}.png", tmp_path / "new" / f"000{i}.png")
        return draw(self, *words)

    monkeypatch.setattr(judging.Judge, "draw", later)
    maps = detect(home / "run", tmp_path / "new", maps=3, out=tmp_path / "found")["maps"]
    scores = {row["file"]: row["neg_elbo"] for row in table(tmp_path / "found")}
    assert [f"{entry['score']:.8g}" for entry in maps] == [scores[entry["name"]] for entry in maps]
    for entry in maps:
        with Image.open(tmp_path / "found" / entry["picture"]) as picture:
            shown = np.asarray(picture.convert("L"))[:, :16]
        assert np.array_equal(shown, disc(int(entry["name"][:3]), square=True))


@pytest.mark.parametrize("maps", [2, 0])
def test_heat_maps_of_an_earlier_search_go_and_other_files_stay(home: Path, tmp_path: Path, maps: int) -> None:
    detect(home / "run", home / "new" / "in", maps=5, out=tmp_path)
    for name in ("notes.txt", "mine.png", "0001.png", "0001_a b.png"):
        (tmp_path / "maps" / name).write_bytes(b"")
    report = detect(home / "run", home / "new" / "out", maps=maps, out=tmp_path)
    drawn = {Path(entry["picture"]).name for entry in report.get("maps", [])}
    assert len(drawn) == maps
    assert {path.name for path in (tmp_path / "maps").iterdir()} == {
        *drawn,
        "notes.txt",
        "mine.png",
        "0001.png",
        "0001_a b.png",
    }


@pytest.mark.parametrize(
    ("images", "out", "file"), [(".", ".", "a.png"), ("new/maps", "new", "a.png"), (".", "new", "a.parquet")]
)
def test_results_do_not_go_among_the_images(home: Path, tmp_path: Path, images: str, out: str, file: str) -> None:
    (tmp_path / images).mkdir(parents=True, exist_ok=True)
    (tmp_path / images / file).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"the results cannot go to .*, among the images of .*: give another folder"):
        detect(home / "run", tmp_path / images, out=tmp_path / out)


def test_memory_does_not_grow_with_the_folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than a batch of images is held."""
    seen: list[int] = []
    score = Judge.score

    def counted(self: Judge, x: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append(len(x))
        return score(self, x)

    monkeypatch.setattr(judging.Judge, "score", counted)
    detect(home / "run", home / "new", batch_size=4, maps=0, out=tmp_path)
    assert max(seen) == 4


def test_an_encoder_without_a_posterior_decides_by_the_error(home: Path, tmp_path: Path, refused: Refused) -> None:
    words = ["--network", "mlp", "--latent-dim", 4, "--out", tmp_path / "run"]
    assert call("fit", "--data", home / "good", "--objective", "AGE", *TRAIN, "--steps", 4, *words) == 0
    report = detect(tmp_path / "run", home / "new" / "in", out=tmp_path / "found")
    assert report["scores"].keys() == {"error", "latent"}
    assert (report["deciding"], report["heatmap"]) == ("error", "local")
    search = ("detect", tmp_path / "run", "--images", home / "new" / "in")
    for name in ("kl", "neg_elbo", "neg_log_likelihood", "complexity"):
        said = refused(*search, "--scores", f"error,{name},latent")
        assert f"objective AGE, which leaves the log-variance untrained, so that {name} would mean nothing" in said
    for name in ("latent", "combined"):
        assert f"so that the heat map {name} would mean nothing: leave" in refused(*search, "--map", name)


def test_rows_of_a_table_are_scored(command: Command, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(200, 3))
    lines = ["a,b,c", *(",".join(f"{v:.5f}" for v in row) for row in rows)]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    (tmp_path / "odd.csv").write_text("a,b,c\n0.1,0.2,0.1\n9,-9,9\n")
    said = command("fit", "--data", tmp_path / "rows.csv", *TRAIN, "--latent-dim", 2, "--out", tmp_path / "run")
    assert said.code == 0, said.err
    said = command("detect", tmp_path / "run", "--images", tmp_path / "odd.csv", "--out", tmp_path / "found")
    assert said.code == 0, said.err
    one, two = table(tmp_path / "found")
    assert float(two["neg_elbo"]) > float(one["neg_elbo"])
    assert two["anomalous"] == "1"
    assert not (tmp_path / "found" / "maps").exists()


def test_rows_that_hold_no_numbers_are_listed_and_the_others_scored(command: Command, tmp_path: Path) -> None:
    np.savetxt(
        tmp_path / "rows.csv", np.random.default_rng(0).normal(size=(200, 2)), "%.5f", ",", header="a,b", comments=""
    )
    words = ["fit", "--data", tmp_path / "rows.csv", *TRAIN, "--latent-dim", 2, "--out", tmp_path / "run"]
    assert command(*words).code == 0
    (tmp_path / "new.csv").write_text("a,b\n0.1,0.2\n,\n0.3,\nx,0\ninf,1\n1e300,1\n0.1,0.2\n")
    detect(tmp_path / "run", tmp_path / "new.csv", out=tmp_path / "found")
    rows = table(tmp_path / "found")
    said = "no number, or one too large: "
    assert [row["reason"].removeprefix(said) for row in rows] == ["", "a, b", "b", "a", "a", "a", ""]
    assert rows[0]["error"] == rows[6]["error"] != ""


@pytest.mark.parametrize("shape", [(5,), (8, 8)])
def test_rows_of_an_array_that_are_not_finite_are_listed(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).random((300, *shape))
    x[0, 0], x[290, -1] = np.nan, np.inf
    np.save(tmp_path / "x.npy", x)
    preparation = None if len(shape) == 1 else Preparation(shape, 1)
    found = list(each(tmp_path / "x.npy", preparation))
    assert [i for i, reading in enumerate(found) if reading.x is None] == [0, 290]
    assert {reading.reason for reading in found} == {"", "NaN or infinite values"}
    again = np.load(tmp_path / "x.npy")
    assert np.array_equal(x, again, equal_nan=True)  # the file is as it was
    for reading, row in list(zip(found, x, strict=True))[1:290]:
        assert reading.x is not None
        assert np.allclose(reading.x.numpy().reshape(shape), row, atol=1 / 500)


@pytest.mark.parametrize("kind", ["images.npy", "images.npz", "vectors.npy", "parts.npz"])
def test_arrays_come_in_their_order(tmp_path: Path, kind: str) -> None:
    x = np.random.default_rng(0).integers(0, 256, (300, 8, 8), dtype=np.uint8)
    vectors = x.reshape(300, 64)[:, :5].astype(np.float32)
    if kind == "images.npy":
        np.save(tmp_path / kind, x)
    elif kind == "vectors.npy":
        np.save(tmp_path / kind, vectors)
    elif kind == "images.npz":
        np.savez(tmp_path / kind, images=x, labels=np.arange(300) % 3)
    else:
        np.savez(tmp_path / kind, train_images=x[:200], test_images=x[200:])
    found = list(each(tmp_path / kind, None))
    assert [reading.name for reading in found] == [f"row {i}" for i in range(300)]
    for i, reading in enumerate(found):
        assert reading.x is not None
        expected = vectors[i] if kind == "vectors.npy" else x[i, None] / np.float32(255)
        assert np.array_equal(reading.x.numpy(), expected)
        assert reading.label == (i % 3 if kind == "images.npz" else None)


def test_digits_come_as_rows() -> None:
    found = list(each("digits", None))
    assert len({reading.name for reading in found}) == len(found) == 1797
    assert all(reading.x is not None and reading.x.shape == (1, 8, 8) for reading in found)


def test_the_help_lists_the_scores_that_there_are() -> None:
    assert cli_detect.SCORES.keys() == SCORES.keys()
    assert tuple(cli_detect.DEFAULT.split(",")) == DEFAULT


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("file,label\na.png,0\nb/c.png,1\n", {"a.png": False, "b/c.png": True}),
        ("name;anomalous;label2\na.png;yes;0\n", {"a.png": True}),
        ("x,y\n.\\b\\c.png,GOOD\n", {"b/c.png": False}),
    ],
)
def test_labels_are_read(tmp_path: Path, text: str, found: dict[str, bool]) -> None:
    (tmp_path / "labels.csv").write_text(text)
    assert read_labels(tmp_path / "labels.csv") == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.png,maybe\n", "label of a.png is 'maybe': give 0"),
        ("file\na.png\n", "has one column"),
        ("file,label\na.png,0\na.png,1\n", "a.png stands there as normal and as anomalous"),
    ],
)
def test_labels_that_say_nothing_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_labels(tmp_path / "labels.csv")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scores", "error,nope"], "unknown score 'nope'"),
        (["--scores", ","], "no score is named"),
        (["--by", "latent", "--scores", "kl"], "latent.*is not among kl"),
        (["--rate", "0"], "false_positive_rate is 0"),
        (["--labels", "missing.csv"], "there is no file missing.csv"),
        (["--masks", "missing"], "there is no folder missing"),
        (["--map", "warm"], "unknown heatmap 'warm'"),
        (["--draws", "0"], "draws is 0"),
        (["--maps", "-1"], "maps is -1"),
    ],
)
def test_wrong_words_are_refused(home: Path, refused: Refused, words: list[str], message: str) -> None:
    import re

    said = refused("detect", home / "run", "--images", home / "new" / "in", *words)
    assert re.search(message, said), said


def test_a_folder_that_is_not_there_is_told_before_thresholds_are_found(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def calibrated(*_: Any) -> None:
        raise AssertionError("the thresholds' minutes")

    monkeypatch.setattr(Judge, "calibrated", calibrated)
    with pytest.raises(DataError, match="nowhere"):
        detect(home / "run", home / "nowhere")


def test_labels_and_masks_of_other_images_are_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,label\nelsewhere.png,1\n")
    with pytest.raises(DataError, match="none of the 1 names in the labels"):
        detect(home / "run", home / "new", labels=tmp_path / "labels.csv", out=tmp_path)
    with pytest.raises(DataError, match="none of the 12 masks"):
        detect(home / "run", home / "new" / "in", masks=home / "masks", out=tmp_path)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"nothing that can be scored \(empty file"):
        detect(home / "run", tmp_path / "none", out=tmp_path / "x")


@pytest.fixture
def nothing_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fit", "calibrated", "score", "search"):
        monkeypatch.setattr(Judge, name, lambda *_, name=name: pytest.fail(f"{name} before the names were matched"))


@pytest.mark.usefixtures("nothing_is_scored")
def test_labels_and_masks_of_other_images_are_refused_before_anything_is_scored(home: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,label\nelsewhere.png,1\n200.png,0\n")
    out = tmp_path / "found"
    with pytest.raises(DataError, match="none of the 2 names in the labels"):
        detect(home / "run", home / "new", labels=tmp_path / "labels.csv", out=out)
    with pytest.raises(DataError, match="none of the 12 masks"):
        detect(home / "run", home / "new" / "in", masks=home / "masks", out=out)
    masks = shutil.copytree(home / "masks", tmp_path / "masks")
    (masks / "out" / "311_mask.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"the mask .*311_mask\.png cannot be used: "):
        detect(home / "run", home / "new", masks=masks, out=out)
    assert not out.exists()
    out.write_text("a file")
    with pytest.raises(ConfigError, match=r"the results cannot be written to .*found .*: give another folder"):
        detect(home / "run", home / "new", masks=home / "masks", out=out)


def test_files_that_cannot_be_read_may_have_labels_and_masks(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "masks", tmp_path / "masks")
    shutil.copy(home / "masks" / "out" / "300_mask.png", tmp_path / "masks" / "broken.png")
    report = detect(home / "run", home / "new", masks=tmp_path / "masks", maps=0, scores=["error"], out=tmp_path / "x")
    assert report["metrics"]["auroc_error"]["n"] == report["counts"]["scored"]
    (tmp_path / "labels.csv").write_text("file,label\nbroken.png,1\n")
    report = detect(home / "run", home / "new", labels=tmp_path / "labels.csv", maps=0, out=tmp_path / "y")
    assert report["metrics"] == {}
    assert len(table(tmp_path / "y")) == report["counts"]["found"]


@pytest.mark.parametrize("kind", ["folder", "one.png", "scans", "images.npy", "parts.npz", "digits"])
def test_names_are_known_before_anything_is_read(home: Path, tmp_path: Path, kind: str) -> None:
    x = np.random.default_rng(0).integers(0, 256, (300, 8, 8), dtype=np.uint8)
    source: Path | str = tmp_path / kind
    if kind == "folder":
        source = home / "new"
    elif kind == "one.png":
        shutil.copy(home / "good" / "400.png", source)
    elif kind == "scans":
        scan(tmp_path / kind / "b.nii.gz", np.random.default_rng(0).integers(0, 9, GRID).astype(np.int16))
        scan(tmp_path / kind / "flat.nii", np.random.default_rng(0).integers(0, 9, (5, 5, 3)).astype(np.int16))
        (tmp_path / kind / "a.nii.gz").write_bytes(b"no scan")
        (tmp_path / kind / "c.txt").write_text("no scan either")
    elif kind == "digits":
        source = kind
    elif kind == "images.npy":
        np.save(tmp_path / kind, x)
    else:
        np.savez(tmp_path / kind, train_images=x[:200], test_images=x[200:])
    preparation = (
        None if kind in ("digits", "parts.npz") else Preparation((16, 16), 1, "stretch", (0, 100), slices="4:7")
    )
    if kind == "images.npy":
        preparation = Preparation((8, 8), 1)
    names = open_readings(source, preparation).names()
    assert names == [reading.name for reading in each(source, preparation)]
    if kind == "scans":
        assert names == ["a.nii.gz", *(f"b.nii.gz slice {n}" for n in (4, 5, 6)), "c.txt", "flat.nii"]


@pytest.mark.parametrize("value", [0, 255])
def test_masks_of_one_kind_of_pixel_leave_the_pixels_metrics_out(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, value: int
) -> None:
    """The labels know of anomalies, so that everything else is measured."""
    (tmp_path / "masks" / "out").mkdir(parents=True)
    for i in range(300, 312):
        Image.new("L", (16, 16), value).save(tmp_path / "masks" / "out" / f"{i}.png")
    images = shutil.copytree(home / "new" / "out", tmp_path / "new" / "out")
    if not value:
        shutil.copytree(home / "new" / "in", images.parent / "in")
    with caplog.at_level("INFO", "introvae"):
        report = detect(
            home / "run", images.parent, labels=home / "labels.csv", masks=tmp_path / "masks", maps=0, out=tmp_path
        )
    assert not {"pixel_auroc", "dice", "best_dice"} & report["metrics"].keys()
    assert "without the pixels' metrics: the masks need both" in caplog.text
    assert ("auroc_error" in report["metrics"]) == (not value)
    assert ("without AUROC and the like" in caplog.text) == bool(value)


GRID = (10, 12, 14)
"""Voxels of a scan to the right, to the front, upwards; slices are axial."""


def scan(path: Path, values: np.ndarray, spacing: tuple[int, int, int] = (1, 1, 1)) -> Path:
    nibabel = pytest.importorskip("nibabel")
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.diag((*spacing, 1))), path)
    return path


def test_masks_of_scans_are_volumes_or_pictures_of_slices(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, masks = tmp_path / "scans", tmp_path / "masks"
    for i in range(4):
        head = np.random.default_rng(i).integers(100, 900, GRID).astype(np.int16)
        scan(images / f"s{i}.nii.gz", head)
    lesion = np.zeros(GRID, np.int16)
    lesion[2:6, 3:6, 4:7] = 1
    lesion[2:4, 3:5, 6] = 4  # another label, as tumours have
    scan(masks / "s0.nii", lesion)
    scan(masks / "s1_mask.nii.gz", (lesion > 0) * np.float32(0.7) + np.float32(0.1))  # probabilities
    Image.new("L", GRID[:2], 255).save(masks / "s2.nii.gz slice 3.png")
    words = ["--size", 16, "--fit", "stretch", "--network", "mlp", "--latent-dim", 2, "--out", tmp_path / "run"]
    assert call("fit", "--data", images, *TRAIN, "--steps", 2, *words) == 0
    report = detect(tmp_path / "run", images, normal=images, masks=masks, maps=1, out=tmp_path / "found")
    rows = table(tmp_path / "found")
    assert [row["file"] for row in rows] == [f"s{i}.nii.gz slice {n}" for i in range(4) for n in range(14)]
    marked = {row["file"] for row in rows if row["label"] == "1"}
    assert marked == {f"s{i}.nii.gz slice {n}" for i in (0, 1) for n in (4, 5, 6)} | {"s2.nii.gz slice 3"}
    assert report["metrics"]["pixel_auroc"]["protocol"].endswith("bootstraps of whole scans")
    scores = {
        label: {row["file"]: float(row["neg_elbo"]) for row in rows if row["label"] == label} for label in ("0", "1")
    }
    sets = [torch.tensor(list(scores[label].values()), dtype=torch.float64) for label in ("0", "1")]
    whole = detection_metrics(*sets, groups=([n[:2] for n in scores["0"]], [n[:2] for n in scores["1"]]))["auroc"]
    entry = report["metrics"]["auroc_neg_elbo"]
    assert [entry["low"], entry["high"]] == pytest.approx([whole.low, whole.high], abs=0.02)  # 8 digits in the table
    assert entry["resampled"] == report["metrics"]["pixel_auroc"]["resampled"] == "scans"
    assert entry["protocol"] == (
        "7 anomalous against 49 normal slices of 4 scans; 95 % interval of 1,000 bootstraps of whole scans"
    )
    threshold = report["scores"]["neg_elbo"]
    assert (threshold["normal_images"], threshold["normal_scans"]) == (56, 4)
    assert "slices of 4 scans</small>" in (tmp_path / "found" / "report.html").read_text(encoding="utf-8")

    # One scan with a lesion, and one that the run held out, are too few.
    (masks / "s1_mask.nii.gz").unlink()
    (masks / "s2.nii.gz slice 3.png").unlink()
    (images / "s9.nii.gz").write_bytes(b"no scan")
    (images / "a.nii.gz").write_bytes(b"no scan")
    shutil.copy(masks / "s0.nii", masks / "s9.nii")
    words = ["--masks", masks, "--out", tmp_path / "few", "--rate", 0.1]
    said = command("detect", tmp_path / "run", "--images", images, *words)
    assert said.code == 0, said.err
    report = json.loads((tmp_path / "few" / "report.json").read_text())
    for metric in ("auroc_neg_elbo", "aupr_kl", "fpr_at_95_tpr_error"):
        entry = report["metrics"][metric]
        assert entry["no_interval"] == "fewer than two scans with anomalous slices"
        assert not {"low", "high", "resampled"} & entry.keys()
        assert entry["protocol"] == "3 anomalous against 53 normal slices of 4 scans"
    assert report["metrics"]["dice"]["no_interval"] == "fewer than two scans with marked pixels"
    threshold = report["scores"]["neg_elbo"]
    assert threshold["normal_scans"] == 1
    assert threshold["no_interval"] == "fewer than two scans of normal images"
    assert "false_positive_rate_low" not in threshold
    assert "none: fewer than two scans of normal images" in (tmp_path / "few" / "report.html").read_text("utf-8")

    # Slices that the scans do not have, and a mask on another grid, are told before anything is scored.
    monkeypatch.setattr(Judge, "score", lambda *_: pytest.fail("scored"))
    (tmp_path / "labels.csv").write_text("file,label\ns0.nii.gz slice 14,1\ns0.nii.gz,0\n")
    with pytest.raises(DataError, match=r"none of the 2 names in the labels .*: give a row for each slice"):
        detect(tmp_path / "run", images, labels=tmp_path / "labels.csv", out=tmp_path / "refused")
    scan(masks / "s3.nii.gz", np.ones((*GRID[:2], 9), np.int16))
    with pytest.raises(DataError, match=r"s3\.nii\.gz cannot be used: it has 9 slices"):
        detect(tmp_path / "run", images, masks=masks, out=tmp_path / "refused")


@pytest.mark.parametrize("kept", [range(200, 230), ()])
def test_masks_of_one_image_give_no_interval_and_say_so(
    home: Path, tmp_path: Path, command: Command, kept: Sequence[int]
) -> None:
    why = "fewer than two images with marked pixels"
    for i in (*kept, 300):
        source = home / "new" / ("out" if i == 300 else "in") / f"{i}.png"
        (tmp_path / "new").mkdir(exist_ok=True)
        shutil.copy(source, tmp_path / "new")
    (tmp_path / "masks").mkdir()
    shutil.copy(home / "masks" / "out" / "300_mask.png", tmp_path / "masks")
    words = ["--images", tmp_path / "new", "--masks", tmp_path / "masks", "--out", tmp_path / "found", "--maps", 0]
    said = command("detect", home / "run", *words)
    assert said.code == 0, said.err
    metrics = json.loads((tmp_path / "found" / "report.json").read_text())["metrics"]
    for name in ("pixel_auroc", "dice", "best_dice"):
        assert metrics[name]["no_interval"] == why
        assert "low" not in metrics[name]
    assert said.out.count(f"(no interval: {why})") == 3
    assert f"none: {why}</td>" in (tmp_path / "found" / "report.html").read_text(encoding="utf-8")


def test_masks_among_the_images_are_not_searched(home: Path, tmp_path: Path, refused: Refused) -> None:
    shutil.copytree(home / "new" / "out", tmp_path / "new" / "out")
    shutil.copytree(home / "masks", tmp_path / "new" / "masks")
    report = detect(home / "run", tmp_path / "new", masks=tmp_path / "new" / "masks", maps=0, out=tmp_path / "found")
    assert [row["file"] for row in table(tmp_path / "found")] == [f"out/{i}.png" for i in range(300, 312)]
    assert report["metrics"]["pixel_auroc"]["n"] == 12
    said = refused("detect", home / "run", "--images", tmp_path / "new", "--masks", tmp_path / "new")
    assert "new holds the images, too: give the masks a folder of their own" in said


def test_pixels_of_anomalous_images_without_a_mask_are_not_taken_for_normal(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(home / "masks", tmp_path / "masks")
    for i in range(304, 312):
        (tmp_path / "masks" / "out" / f"{i}_mask.png").unlink()
    some = shutil.copytree(home / "new" / "in", tmp_path / "some" / "in").parent
    for i in range(300, 304):
        (some / "out").mkdir(exist_ok=True)
        shutil.copy(home / "new" / "out" / f"{i}.png", some / "out")
    words: dict[str, Any] = {"labels": home / "labels.csv", "masks": tmp_path / "masks", "maps": 0, "scores": ["error"]}
    with caplog.at_level("INFO", "introvae"):
        few = detect(home / "run", some, **words, out=tmp_path / "few")["metrics"]
        assert "no image for 8 of the 42 labels, such as that of out/304.png" in caplog.text
        caplog.clear()
        shutil.copytree(home / "new" / "out", some / "out", dirs_exist_ok=True)
        all_ = detect(home / "run", some, **words, out=tmp_path / "all")["metrics"]
    assert "8 images are not in the pixels' metrics: they have no mask" in caplog.text
    assert "no image for" not in caplog.text
    assert all_["auroc_error"]["n"] == 42
    assert few["pixel_auroc"]["n"] == all_["pixel_auroc"]["n"] == 34
    for name in ("pixel_auroc", "dice", "best_dice"):
        assert few[name]["value"] == pytest.approx(all_[name]["value"], abs=1e-4)


@pytest.mark.parametrize("shape", [(10, 12, 28), (20, 24, 14)])
def test_a_volume_on_another_grid_is_refused_though_it_has_the_slices(tmp_path: Path, shape: tuple[int, ...]) -> None:
    scan(tmp_path / "scans" / "t1.nii.gz", np.ones(GRID, np.int16))
    scan(tmp_path / "masks" / "t1.nii.gz", np.ones(shape, np.int16))
    preparation = Preparation((12, 10), 1, "stretch", slices="4:7")
    told = rf"it has {shape[2]} slices of {shape[0]} x {shape[1]} pixels, its scan 14 slices of 10 x 12 pixels: give"
    for images in (tmp_path / "scans", tmp_path / "scans" / "t1.nii.gz"):
        with pytest.raises(DataError, match=told):
            Masks(tmp_path / "masks", preparation, images).of("t1.nii.gz slice 5")


def test_labels_of_scans_where_those_of_slices_are_needed_are_refused() -> None:
    known = truth.Truth({"t1.nii.gz": True})
    with pytest.raises(DataError, match=r"'t1\.nii\.gz'\) is one of the images' .*: give a row for each slice"):
        known.check(["t1.nii.gz slice 0"])


def masks_of(folder: Path, size: tuple[int, int], **settings: Any) -> Masks:
    return Masks(folder, Preparation(size, 1, "stretch", **settings))


def test_a_volume_of_labels_is_read_once_and_marks_all_that_have_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.zeros(GRID, np.uint8)
    labels[1:3, 2:9, 5] = 1
    labels[6, 7, 5] = 4
    scan(tmp_path / "a" / "t1_mask.nii.gz", labels)
    read: list[Path] = []

    def counted(name: str, path: Path, *words: Any) -> Any:
        read.append(path)
        return slices(name, path, *words)

    monkeypatch.setattr(truth, "slices", counted)
    masks = masks_of(tmp_path, (12, 10), slices="4:7")
    for n in (4, 5, 6):
        upright = np.rot90(labels[:, :, n]) > 0
        assert np.array_equal(masks.of(f"a/t1.nii.gz slice {n}").numpy(), upright)
    assert len(read) == 1
    assert not masks.of("t1.nii.gz slice 5").any()
    with pytest.raises(DataError, match=r"t1_mask\.nii\.gz has nothing for a/t1\.nii\.gz slice 9: give a volume"):
        masks.of("a/t1.nii.gz slice 9")


def test_thin_voxels_of_a_label_do_not_grow_when_they_are_made_square(tmp_path: Path) -> None:
    labels = np.zeros(GRID, np.int16)
    labels[4, 5, 0] = 7
    scan(tmp_path / "t1.nii", labels, (1, 3, 1))
    found = masks_of(tmp_path, (36, 10)).of("t1.nii slice 0")
    assert found.sum() == 3
    assert found[:, 4].sum() == 3


@pytest.mark.parametrize("values", [np.uint16(40_000), np.uint16(1), np.int32(70_000), np.float32(0.3)])
def test_masks_of_more_than_8_bits_are_read_by_their_own_brightest(tmp_path: Path, values: Any) -> None:
    square = np.zeros((8, 8), values.dtype)
    square[2:5, 1:4] = values
    Image.fromarray(square).save(tmp_path / "a.tif")
    Image.fromarray(square * 0).save(tmp_path / "b.tif")
    masks = masks_of(tmp_path, (8, 8), window=(0.0, 500.0))
    assert np.array_equal(masks.of("a.png").numpy(), square > 0)
    assert not masks.of("b.png").any()


@pytest.mark.parametrize("name", ["a.png", "a.nii"])
def test_a_mask_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    if name == "a.nii":
        scan(tmp_path / name, np.zeros((*GRID, 2), np.int16))
    else:
        (tmp_path / name).write_bytes(b"no picture")
    image = name if name == "a.png" else f"{name} slice 0"
    with pytest.raises(DataError, match=rf"the mask .*{name} cannot be used: "):
        masks_of(tmp_path, (8, 8)).of(image)


def test_the_tables_in_the_documentation_are_those_of_the_results() -> None:
    root = Path(__file__).parents[1]
    text = (root / "docs/detect.md").read_text(encoding="utf-8")
    cases = {
        name: {case["case"]: case for case in json.loads(path.read_text())["cases"]}
        for name in ("fashion", "cifar10", "one-class", "places", "speed")
        for path in [root / f"benchmarks/results/detection-{name}.json"]
    }
    assert all(f"(../benchmarks/results/detection-{name}.json)" in text for name in cases)

    def rows(head: str) -> list[list[str]]:
        lines = text[text.index(head) :].split("\n\n")[0].splitlines()
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]

    sets = {"CIFAR-10": "cifar10", "ETH-80 objects": "eth80", "grey faces": "faces-lfw-gray", "scenes": "scenes15-gray"}
    sets |= {"MNIST": "mnist", "faces with masks": "faces-mask-color", "images of one colour": "single colour"}
    sets |= {"Fashion-MNIST": "fashion-mnist"}
    for name, data, start in (
        ("fashion", "fashion-mnist", "| against | model |"),
        ("cifar10",) * 2 + ("| against | tr",),
    ):
        head, *found = rows(start)
        assert len(found) == len(cases[name])
        for against, model, *values in found:
            case = cases[name][f"{data}--{model.lower()}--0 against {sets.get(against, against)}"]
            assert values == [f"{case[score.strip('`')]:.3f}" for score in head[2:]], (against, model)
    head, *found = rows("| map | pasted |")
    for name, *values in found:
        parts = {"`local`, detail alone": "detail", "`local`, residuals alone": "residuals"}
        key = f"pixel_auroc_{parts.get(name, name.strip('`'))}"
        assert values == [f"{cases['places'][f'faces, {change}'][key]:.3f}" for change in head[1:]], name
    _, *found = rows("| score | images a second |")
    assert len(found) == len(cases["speed"])
    for names, value in found:
        case = cases["speed"][f"faces, {names.replace('`', '').replace(', ', '+')}"]
        assert value == f"{case['images_per_second']:,.0f}", names
    mean = cases["one-class"]["mean"]
    assert f"mean over the ten digits {mean['neg_elbo']:.3f} by `neg_elbo`" in text
    for score in ("neg_log_likelihood", "error", "perceptual", "latent", "complexity", "kl"):
        assert f"{mean[score]:.3f} `{score}`" in text


def test_a_density_has_nothing_held_out(command: Command, tmp_path: Path) -> None:
    said = command("fit", "--data", "density:rings", *TRAIN, "--steps", 2, "--out", tmp_path / "run")
    assert said.code == 0, said.err
    np.save(tmp_path / "points.npy", np.zeros((5, 2), np.float32))
    with pytest.raises(ConfigError, match="a density has no held-out points"):
        detect(tmp_path / "run", tmp_path / "points.npy", scores=["error"], out=tmp_path)
    with pytest.raises(DataError, match="points of a density, without an end"):
        detect(tmp_path / "run", "density:rings", scores=["error"], out=tmp_path)
