"""The commands on folders of images and on tables: whatever the files are like, the model's own preparation is used."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from commands import Command, Refused, call
from introvae import Run
from introvae.data import ArrayData, cache, load_data, preparation_from, read_images
from introvae.data.options import DATA_OPTIONS
from introvae.data.preparation import Preparation
from introvae.training.config import load_config
from unprepared import USED, write_odd_files

TINY = ["--recipe", "none", "--quiet", "--steps", "3", "--batch-size", "8"]
IMAGES = [*TINY, "--network", "tiny-conv", "--size", "16"]


def noise(*shape: int, seed: int = 0, top: int = 256, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, top, shape).astype(dtype)


def write_images(folder: Path, count: int, seed: int = 0, side: int = 24) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(noise(count, side, side, seed=seed)):
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


def write_deep(folder: Path, low: int, high: int, count: int = 30) -> Path:
    """Pictures of 16 bits, each with values from `low` to `high`, as ramps in several directions."""
    folder.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(low, high, 256).reshape(16, 16)
    for i in range(count):
        values = np.roll(np.rot90(ramp, i % 4), i, axis=0)
        Image.fromarray(values.astype(np.uint16)).save(folder / f"{i:03d}.png")
    return folder


def preparation(run: Run) -> Preparation:
    content = json.loads((run.model_folder / "config.json").read_text())
    found = preparation_from(content["data"])
    assert isinstance(found, Preparation)
    return found


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of images; not to be changed."""
    folder = tmp_path_factory.mktemp("home")
    write_images(folder / "plain", 40)
    write_images(folder / "mixed", 40)
    rough = Image.fromarray(noise(64, 64, seed=1))
    (folder / "fate.json").write_text(json.dumps(write_odd_files(folder / "mixed", rough)))
    write_deep(folder / "deep", 1000, 3000)
    write_deep(folder / "deeper", 2000, 6000)
    return folder


@pytest.fixture(scope="module")
def fate(home: Path) -> dict[str, str]:
    """What is to become of the odd files in `mixed`."""
    return json.loads((home / "fate.json").read_text())


@pytest.fixture(scope="module")
def run(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on 8-bit grey pictures; not to be changed."""
    folder = tmp_path_factory.mktemp("run") / "run"
    assert call("fit", *IMAGES, "--data", home / "plain", "--out", folder) == 0
    return Run(folder)


@pytest.fixture(scope="module")
def mixed(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on a folder with odd files: in colour, with a window."""
    folder = tmp_path_factory.mktemp("mixed") / "run"
    assert call("fit", *IMAGES, "--data", home / "mixed", "--out", folder) == 0
    return Run(folder)


@pytest.fixture(scope="module")
def deep(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on pictures of 16 bits."""
    folder = tmp_path_factory.mktemp("deep") / "run"
    assert call("fit", *IMAGES, "--data", home / "deep", "--out", folder) == 0
    return Run(folder)


COLUMNS = ["acid", "sugar", "big one"]


@pytest.fixture(scope="module")
def wine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table with names, units and classes; not to be changed."""
    draws = np.random.default_rng(0)
    rows = draws.normal(size=(90, 3)) * [1, 0.01, 1000] + [5, -0.3, 40_000]
    lines = [f"{i},{a:.8g},{b:.8g},{c:.8g},{'red' if i % 2 else 'white'}" for i, (a, b, c) in enumerate(rows)]
    path = tmp_path_factory.mktemp("wine") / "wine.csv"
    path.write_text("\n".join(["id," + ",".join(COLUMNS) + ",class", *lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def table(wine: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on the table; not to be changed."""
    folder = tmp_path_factory.mktemp("table") / "run"
    assert call("fit", *TINY, "--network", "tiny-mlp", "--data", wine, "--drop", "id", "--out", folder) == 0
    return Run(folder)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on digits, which have no preparation; not to be changed."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    assert call("fit", *TINY, "--network", "tiny-conv", "--data", "digits", "--out", folder) == 0
    return Run(folder)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on vectors; not to be changed."""
    home = tmp_path_factory.mktemp("vectors")
    np.save(home / "x.npy", np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32))
    assert call("fit", *TINY, "--network", "tiny-mlp", "--data", home / "x.npy", "--out", home / "run") == 0
    return Run(home / "run")


# --- fit


def test_fit_says_what_it_did_with_the_files(
    command: Command, home: Path, fate: dict[str, str], tmp_path: Path
) -> None:
    said = command("fit", *IMAGES, "--data", home / "mixed", "--out", tmp_path / "run")
    assert (said.code, said.err) == (0, "")
    skipped = {name: reason for name, reason in fate.items() if reason != USED}
    used = 40 + len(fate) - len(skipped)
    train = used - round(used / 10)
    assert f"{home / 'mixed'}: {used} pictures of 3 x 16 x 16, {train} to train on, {used - train} held out" in said.out
    assert f"skipped: {len(skipped)} ({40 + len(fate)} files or rows were found)" in said.out
    named = [name for name in skipped if f"{name}: {skipped[name]}" in said.out]
    assert len(named) == 10
    assert f"and {len(skipped) - 10} more" in said.out
    assert "brought to 16 x 16 pixels by pad" in said.out
    assert "2 pictures have more than 8 bits" in said.out


def test_the_log_names_every_skipped_file(mixed: Run, fate: dict[str, str]) -> None:
    (event,) = mixed.events("data")
    wanted = {name: reason for name, reason in fate.items() if reason != USED}
    found = {entry["name"]: entry["reason"] for entry in event["skipped"]}
    assert found.keys() == wanted.keys()
    for name, reason in found.items():
        assert reason.startswith(wanted[name]), name
    assert (event["found"], event["used"]) == (40 + len(fate), 40 + len(fate) - len(wanted))
    assert event["step"] == 0
    assert [row["step"] for row in mixed.log()] == [3]
    assert mixed.events("other") == []


def test_the_model_has_the_preparation(run: Run, mixed: Run, deep: Run) -> None:
    assert preparation(run) == Preparation((16, 16), 1)
    assert (preparation(mixed).size, preparation(mixed).channels) == ((16, 16), 3)
    assert preparation(mixed).window is not None
    window = preparation(deep).window
    assert window is not None
    assert 1000 < window[0] < 1050 < 2950 < window[1] < 3000  # percentiles 0.5 and 99.5
    assert run.model().shape == (1, 16, 16)


def test_options_of_the_data_reach_the_model(command: Command, home: Path, tmp_path: Path) -> None:
    words = ["--fit", "crop", "--channels", 3, "--window", "[10,90]", "--heldout", 0.25, "--cache", "false"]
    said = command("fit", *IMAGES, "--data", home / "deep", *words, "--out", tmp_path / "run")
    assert said.code == 0, said.err
    prepared = preparation(Run(tmp_path / "run"))
    assert (prepared.fit, prepared.channels) == ("crop", 3)
    assert prepared.window == pytest.approx((1200, 2800), abs=20)
    assert "22 to train on, 8 held out" in said.out


def test_a_dry_run_shows_the_folder_and_makes_nothing(
    command: Command, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = command("fit", *IMAGES, "--data", home / "plain", "--dry-run")
    assert (said.code, said.err) == (0, "")
    assert "40 pictures of 1 x 16 x 16" in said.out
    assert f"data: {home / 'plain'}, samples of shape (1, 16, 16)" in said.out
    assert re.search(r"^size: 16$", said.out, re.MULTILINE)
    assert re.search(r"^encoder: [\d,]+ parameters$", said.out, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


def test_help_of_fit_explains_the_options_of_the_data(command: Command) -> None:
    out = " ".join(command("fit", "--help").out.split())
    for option in DATA_OPTIONS:
        assert f"--{option}" in out
    for words in ("side of the images in pixels", "names the person or scan", "pad (black borders)"):
        assert words in out


# --- settings in config.yaml


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--size 64 --fit crop --columns a,b", {"size": 64, "fit": "crop", "columns": ("a", "b")}),
        ("--slices 60:120", {"slices": "60:120"}),
        ("--slices 10:50", {"slices": "10:50"}),  # YAML 1.1 may take it for 650
        ("--slices 1:2", {"slices": "1:2"}),
        ("--slices 30%:70%", {"slices": "30%:70%"}),
        ("--window [1,99] --window-of file", {"window": (1.0, 99.0), "window_of": "file"}),
        ("--columns no,yes --drop 1,2", {"columns": ("no", "yes"), "drop": ("1", "2")}),
        ("--columns 7", {"columns": ("7",)}),
        ("--label none", {"label": "none"}),
        ("--label 1", {"label": "1"}),
        (r"--group ^(\d+)_", {"group": r"^(\d+)_"}),
        ("--group 0", {"group": "0"}),
        ("--axis 1 --heldout 0.2 --heldout-seed 9", {"axis": 1, "heldout": 0.2, "heldout_seed": 9}),
        ("--cache false --channels 3", {"cache": False, "channels": 3}),
    ],
)
def test_options_of_the_data_go_through_config_yaml(
    command: Command, tmp_path: Path, words: str, wanted: dict[str, Any]
) -> None:
    common = [*TINY, "--data", "density:rings", "--network", "tiny-mlp"]
    said = command("fit", *common, *words.split(), "--out", tmp_path / "run")
    assert said.code == 0, said.err
    run = Run(tmp_path / "run")
    first = run.config()
    assert {name: getattr(first, name) for name in wanted} == wanted
    assert call("fit", "--quiet", "--recipe", run.config_path, "--out", tmp_path / "again") == 0
    again = load_config(tmp_path / "again" / "config.yaml")
    assert {name: getattr(again, name) for name in DATA_OPTIONS} == {n: getattr(first, n) for n in DATA_OPTIONS}
    assert (tmp_path / "again" / "config.yaml").read_text() == run.config_path.read_text()


def test_the_config_of_a_folder_run_repeats_it(command: Command, mixed: Run, tmp_path: Path) -> None:
    said = command("fit", "--quiet", "--recipe", mixed.config_path, "--out", tmp_path / "again")
    assert said.code == 0, said.err
    for name in ("config.json", "model.safetensors"):
        again = (tmp_path / "again" / "model" / name).read_bytes()
        assert again == (mixed.model_folder / name).read_bytes()


# --- resume


@pytest.fixture
def stopped(home: Path, tmp_path: Path) -> Run:
    """A run on a folder of its own, as if it had been killed after two steps."""
    data = shutil.copytree(home / "plain", tmp_path / "data")
    words = [*IMAGES, "--data", data, "--checkpoint-every", 2, "--out", tmp_path / "stopped"]
    assert call("fit", *words) == 0
    run = Run(tmp_path / "stopped")
    shutil.rmtree(run.model_folder)
    sorted(run.checkpoints.glob("*.pt"))[-1].unlink()
    return run


def test_resuming_a_folder_run_goes_on(command: Command, stopped: Run, run: Run) -> None:
    said = command("fit", "--quiet", "--resume", stopped.folder, "--cache", "false")
    assert said.code == 0, said.err
    assert [row["step"] for row in stopped.log()] == [3]
    assert len(stopped.events("data")) == 1
    same = (stopped.model_folder / "model.safetensors").read_bytes()
    assert same == (run.model_folder / "model.safetensors").read_bytes(), "as if it had not been killed"
    assert preparation(stopped) == preparation(run)


def test_resuming_with_other_options_of_the_data_names_each(refused: Refused, stopped: Run) -> None:
    words = ["--size", 32, "--fit", "crop", "--heldout", 0.3, "--cache", "false"]
    message = refused("fit", "--resume", stopped.folder, *words)
    for difference in ("size is 16 in the run, 32 here", "fit is pad in the run, crop here", "heldout is 0.1 in"):
        assert difference in message
    assert "cache" not in message


@pytest.mark.parametrize("change", ["a pixel", "a file more", "a file fewer", "other sizes"])
def test_resuming_on_changed_files_is_refused(refused: Refused, stopped: Run, change: str) -> None:
    data = Path(stopped.config().data)
    if change == "a pixel":
        Image.fromarray(noise(24, 24, seed=99)).save(data / "000.png")
    elif change == "a file more":
        Image.fromarray(noise(24, 24, seed=99)).save(data / "999.png")
    elif change == "a file fewer":
        (data / "000.png").unlink()
    else:
        write_images(data, 40, seed=5, side=48)
    message = refused("fit", "--resume", stopped.folder)
    assert "data are not the ones that the run was started with" in message
    assert not stopped.model_folder.exists()


# --- reconstruct


def test_reconstruct_takes_images_of_any_size_and_kind(
    command: Command, mixed: Run, home: Path, fate: dict[str, str], tmp_path: Path
) -> None:
    names = [home / "mixed" / name for name, becomes in fate.items() if becomes == USED]
    assert len(names) == 15
    said = command("reconstruct", mixed.folder, *names, "-o", tmp_path / "y.npy")
    assert (said.code, said.err) == (0, "")
    x, found = read_images(names, preparation(mixed))
    assert found == [str(name) for name in names]
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), mixed.model().reconstruct(x).numpy())


def test_reconstruct_prepares_as_fit_did(command: Command, run: Run, home: Path, tmp_path: Path) -> None:
    """The held-out images from disk give what the data in memory give."""
    data = load_data(home / "plain", run.config())
    assert isinstance(data, ArrayData)
    names = [home / "plain" / name for name in data.heldout.names]
    assert command("reconstruct", run.folder, *names, "-o", tmp_path / "y.npy").code == 0
    expected = run.model().reconstruct(data.heldout.tensor())
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), expected.numpy())


def test_reconstruct_as_pairs_and_into_a_folder(command: Command, run: Run, home: Path, tmp_path: Path) -> None:
    names = [home / "plain" / "001.png", home / "plain" / "002.png"]
    assert command("reconstruct", run.folder, *names, "-o", tmp_path / "pairs.png").code == 0
    assert command("reconstruct", run.folder, *names, "-o", tmp_path / "out").code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000_001.png", "00001_002.png"]
    x, _ = read_images(names, preparation(run))
    with Image.open(tmp_path / "pairs.png") as sheet:
        assert sheet.mode == "L"
        left = np.asarray(sheet)[2:50:3, 2:50:3]
        np.testing.assert_array_equal(left, (x[0, 0] * 255).round().numpy())
    for path, y in zip(sorted((tmp_path / "out").iterdir()), run.model().reconstruct(x), strict=True):
        with Image.open(path) as picture:
            np.testing.assert_array_equal(np.asarray(picture), (y[0] * 255).round().numpy())


def test_the_window_of_the_training_data_is_used_for_others(
    command: Command, deep: Run, home: Path, tmp_path: Path
) -> None:
    window = preparation(deep).window
    assert window is not None
    path = home / "deeper" / "000.png"
    values = np.asarray(Image.open(path)).astype(np.float64)
    wanted = np.clip(np.rint((values - window[0]) * 255 / (window[1] - window[0])), 0, 255)
    assert (wanted == 255).mean() > 0.5, "most of it is brighter than anything the model saw"
    x, _ = read_images([path], preparation(deep))
    np.testing.assert_allclose(x[0, 0] * 255, wanted, atol=1)
    assert command("reconstruct", deep.folder, path, "-o", tmp_path / "y.npy").code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), deep.model().reconstruct(x).numpy())


def test_evaluate_prepares_other_data_as_the_run_s(command: Command, deep: Run, home: Path, tmp_path: Path) -> None:
    copy = Run(Path(shutil.copytree(deep.folder, tmp_path / "run")))
    said = command("evaluate", copy.folder, "--data", home / "deeper")
    assert (said.code, said.err) == (0, "")
    report = json.loads((copy.folder / "report-deeper.json").read_text())
    names = [entry["name"] for entry in report["worst"]]
    x, _ = read_images([home / "deeper" / name for name in names], preparation(copy))
    assert x.mean() > 0.7, "by the first window, nearly white"
    errors = (x - copy.model().reconstruct(x)).square().flatten(1).mean(dim=1)
    assert [entry["mse"] for entry in report["worst"]] == pytest.approx(errors.tolist(), rel=1e-4)
    assert str(copy.folder / "report-deeper.html") in said.out
    assert (copy.folder / "report-deeper.html").is_file()


def test_evaluate_of_a_run_names_files_that_are_there(
    command: Command, table: Run, mixed: Run, vectors: Run, tmp_path: Path
) -> None:
    for kind, run in (("table", table), ("mixed", mixed), ("vectors", vectors)):
        copy = shutil.copytree(run.folder, tmp_path / kind)
        said = command("evaluate", copy)
        assert (said.code, said.err) == (0, "")
        places = re.findall(r"^(?:report|page|picture) +(.+)$", said.out, re.MULTILINE)
        assert len(places) >= 2
        for place in places:
            assert Path(place).is_file(), f"{kind}: {place} was promised"


def test_a_deep_image_is_refused_by_a_model_of_8_bits(refused: Refused, run: Run, home: Path, tmp_path: Path) -> None:
    path = home / "deep" / "000.png"
    message = refused("reconstruct", run.folder, path, "-o", tmp_path / "y.npy")
    for words in (str(path), "more than 8 bits", "convert it to 8 bits"):
        assert words in message
    message = refused("interpolate", run.folder, home / "plain" / "000.png", path, "-o", tmp_path / "y.npy")
    assert str(path) in message
    message = refused("evaluate", run.folder, "--data", home / "deep")
    for words in (str(home / "deep"), "more than 8 bits"):
        assert words in message
    assert list(tmp_path.iterdir()) == []


def test_a_deep_array_is_refused_by_a_model_of_8_bits(refused: Refused, run: Run, tmp_path: Path) -> None:
    """As a deep picture is: a window of its own would make it as bright as the training data, whatever it is."""
    copy = shutil.copytree(run.folder, tmp_path / "run")
    np.save(tmp_path / "deep.npy", noise(20, 16, 16, top=3000, dtype=np.uint16))
    message = refused("evaluate", copy, "--data", tmp_path / "deep.npy")
    assert "deep.npy" in message
    assert "8 bits" in message


def test_a_deep_array_goes_through_the_window_of_the_training_data(
    command: Command, deep: Run, home: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(deep.folder, tmp_path / "run")
    names = sorted((home / "deeper").iterdir())
    np.save(tmp_path / "same.npy", np.stack([np.asarray(Image.open(path)) for path in names]))
    for data in (home / "deeper", tmp_path / "same.npy"):
        assert command("evaluate", copy, "--data", data, "--metrics", "mse").code == 0
    values = [json.loads((copy / f"report-{n}.json").read_text())["metrics"]["mse"] for n in ("deeper", "same")]
    assert values[0]["value"] == pytest.approx(values[1]["value"], rel=1e-6)


@pytest.mark.parametrize("name", ["odd/empty.jpg", "odd/text.jpg", "odd/cut.png", "odd/enormous.png", "not there.png"])
def test_an_image_that_cannot_be_read_is_named(
    refused: Refused, mixed: Run, home: Path, tmp_path: Path, name: str
) -> None:
    path = home / "mixed" / name
    for words in (["reconstruct", mixed.folder, path], ["interpolate", mixed.folder, path, home / "plain" / "000.png"]):
        assert str(path) in refused(*words, "-o", tmp_path / "y.npy")
    assert list(tmp_path.iterdir()) == []


# --- interpolate


@pytest.fixture
def ends(home: Path) -> tuple[Path, Path]:
    return home / "mixed" / "odd" / "wide.png", home / "mixed" / "odd" / "print.jpg"


@pytest.mark.parametrize("way", [[], ["--spherical"]])
@pytest.mark.parametrize("steps", [2, 9, 12])
def test_a_way_starts_and_ends_at_the_reconstructions(
    command: Command, mixed: Run, ends: tuple[Path, Path], tmp_path: Path, way: list[str], steps: int
) -> None:
    words = ["interpolate", mixed.folder, *ends, *way, "-o", tmp_path / "way.npy"]
    said = command(*words, *([] if steps == 9 else ["--steps", steps]))  # the default
    assert (said.code, said.err) == (0, "")
    assert said.out == f"{tmp_path / 'way.npy'}\n"
    found = torch.from_numpy(np.load(tmp_path / "way.npy"))
    assert found.shape == (steps, 3, 16, 16)
    model, (x, _) = mixed.model(), read_images(ends, preparation(mixed))
    assert torch.equal(found, model.interpolate(x[:1], x[1:], steps, bool(way))[0])
    torch.testing.assert_close(found[[0, -1]], model.reconstruct(x), atol=1e-5, rtol=0)
    assert len(found.unique(dim=0)) == steps


def test_a_spherical_way_is_another_one(command: Command, mixed: Run, ends: tuple[Path, Path], tmp_path: Path) -> None:
    for name, way in (("a.npy", []), ("b.npy", ["--spherical"])):
        assert command("interpolate", mixed.folder, *ends, *way, "--steps", 5, "-o", tmp_path / name).code == 0
    a, b = np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy")
    assert np.abs(a[2] - b[2]).max() > 1e-5
    np.testing.assert_allclose(a[[0, -1]], b[[0, -1]], atol=1e-5)


def test_a_way_as_one_sheet_and_as_single_pictures(
    command: Command, mixed: Run, ends: tuple[Path, Path], tmp_path: Path
) -> None:
    for name in ("way.png", "way.npy", "way"):
        assert command("interpolate", mixed.folder, *ends, "--steps", 4, "-o", tmp_path / name).code == 0
    with Image.open(tmp_path / "way.png") as sheet:
        assert sheet.size == (4 * 50 + 2, 52)
    pictures = sorted((tmp_path / "way").iterdir())
    assert [path.name for path in pictures] == [f"way_000_{i:03d}.png" for i in range(4)]
    for path, x in zip(pictures, np.load(tmp_path / "way.npy"), strict=True):
        with Image.open(path) as picture:
            np.testing.assert_array_equal(np.asarray(picture), np.rint(x * 255).astype(np.uint8).transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("steps", "named"), [(1, "steps is 1"), (0, "steps is 0"), (-3, "steps is -3"), ("few", "--steps"), (2.5, "2.5")]
)
def test_steps_that_will_not_do(
    refused: Refused, mixed: Run, ends: tuple[Path, Path], tmp_path: Path, steps: object, named: str
) -> None:
    assert named in refused("interpolate", mixed.folder, *ends, f"--steps={steps}", "-o", tmp_path / "x.npy")
    assert list(tmp_path.iterdir()) == []


def test_a_way_between_the_rows_of_two_tables(command: Command, table: Run, wine: Path, tmp_path: Path) -> None:
    lines = wine.read_text().splitlines()
    for name, row in (("a.csv", 1), ("b.csv", 2)):
        (tmp_path / name).write_text(f"{lines[0]}\n{lines[row]}\n")
    words = ["interpolate", table.folder, tmp_path / "a.csv", tmp_path / "b.csv", "--steps", 3]
    said = command(*words, "-o", tmp_path / "way.csv")
    assert said.code == 0, said.err
    assert (tmp_path / "way.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    assert len((tmp_path / "way.csv").read_text().splitlines()) == 4


def test_a_way_between_tables_of_several_lengths_is_refused(
    refused: Refused, table: Run, wine: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_text("\n".join(wine.read_text().splitlines()[:4]) + "\n")
    message = refused("interpolate", table.folder, tmp_path / "a.csv", wine, "-o", tmp_path / "way.csv")
    for words in (str(wine), "3", "90"):
        assert words in message
    assert "slices" not in message, "these are rows"


# --- tables


def read_csv(path: Path) -> tuple[list[str], np.ndarray]:
    lines = path.read_text().splitlines()
    return lines[0].split(","), np.array([[float(v) for v in line.split(",")] for line in lines[1:]])


def test_samples_of_a_table_are_in_its_units(command: Command, table: Run, tmp_path: Path) -> None:
    for name in ("s.csv", "s.npy"):
        assert command("sample", table.folder, "-n", 300, "--seed", 1, "-o", tmp_path / name).code == 0
    columns, found = read_csv(tmp_path / "s.csv")
    assert columns == COLUMNS
    prepared = json.loads((table.model_folder / "config.json").read_text())["data"]["preparation"]
    assert prepared["columns"] == COLUMNS
    wanted = np.load(tmp_path / "s.npy").astype(np.float64) * prepared["std"] + prepared["mean"]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert abs(found[:, 2].mean() - 40_000) < 5000
    assert abs(found[:, 1].mean() + 0.3) < 0.05


def test_rows_of_a_table_are_reconstructed_in_its_units(
    command: Command, table: Run, wine: Path, tmp_path: Path
) -> None:
    said = command("reconstruct", table.folder, wine, "-o", tmp_path / "again.csv")
    assert (said.code, said.err) == (0, "")
    columns, found = read_csv(tmp_path / "again.csv")
    assert columns == COLUMNS
    assert found.shape == (90, 3)
    prepared = preparation_from(table.model().config["data"])  # pyright: ignore
    rows = np.array([[float(v) for v in line.split(",")[1:4]] for line in wine.read_text().splitlines()[1:]])
    x = torch.from_numpy(((rows - rows_mean(prepared)) / rows_std(prepared)).astype(np.float32))
    wanted = table.model().reconstruct(x).numpy() * rows_std(prepared) + rows_mean(prepared)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def rows_mean(prepared: Any) -> np.ndarray:
    return np.array(prepared.mean)


def rows_std(prepared: Any) -> np.ndarray:
    return np.array(prepared.std)


def test_a_table_needs_the_model_s_columns_in_any_order(
    command: Command, refused: Refused, table: Run, tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_text("big one,more,sugar,acid\n40000,x,-0.3,5\n41000,y,-0.31,4\n")
    (tmp_path / "b.csv").write_text("acid,sugar,big one\n5,-0.3,40000\n4,-0.31,41000\n")
    for name in "ab":
        assert command("reconstruct", table.folder, tmp_path / f"{name}.csv", "-o", tmp_path / f"{name}.npy").code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))
    (tmp_path / "c.csv").write_text("acid,sugar\n1,2\n")
    message = refused("reconstruct", table.folder, tmp_path / "c.csv", "-o", tmp_path / "c.npy")
    assert "c.csv" in message
    assert "big one" in message


def test_samples_of_vectors_as_a_table(command: Command, vectors: Run, tmp_path: Path) -> None:
    for name in ("s.csv", "s.npy"):
        assert command("sample", vectors.folder, "-n", 5, "-o", tmp_path / name).code == 0
    columns, found = read_csv(tmp_path / "s.csv")
    assert columns == ["x0", "x1", "x2"]
    np.testing.assert_allclose(found, np.load(tmp_path / "s.npy"), rtol=1e-5)


def test_evaluate_of_another_table_uses_the_run_s_columns_and_units(
    command: Command, table: Run, wine: Path, tmp_path: Path
) -> None:
    copy = Run(Path(shutil.copytree(table.folder, tmp_path / "run")))
    head, *lines = wine.read_text().splitlines()
    shifted = [",".join([*line.split(",")[1:3], str(float(line.split(",")[3]) + 5000)]) for line in lines]
    (tmp_path / "later.csv").write_text("\n".join([head.split(",", 1)[1].rpartition(",")[0], *shifted]) + "\n")
    said = command("evaluate", copy.folder, "--data", tmp_path / "later.csv")
    assert (said.code, said.err) == (0, "")
    report = json.loads((copy.folder / "report-later.json").read_text())
    prepared: Any = preparation_from(table.model().config["data"])  # pyright: ignore
    data = load_data(tmp_path / "later.csv", preparation=prepared)
    assert isinstance(data, ArrayData)
    x = data.whole().x
    assert len(x) == report["heldout"] == len(lines), "all of them are unseen"
    assert x[:, 2].mean() > 3, "five thousand more, in standard deviations"
    wanted = (x - table.model().reconstruct(x)).square().mean()
    assert report["metrics"]["mse"]["value"] == pytest.approx(wanted.item(), rel=1e-5)


# --- the wrong kind


def test_points_of_a_density_given_to_a_model_of_a_table(refused: Refused, wine: Path, tmp_path: Path) -> None:
    """The model's values are standardised columns: measured as points in the plane they mean nothing."""
    words = [*TINY, "--network", "tiny-mlp", "--data", wine, "--columns", "acid,sugar", "--out", tmp_path / "run"]
    assert call("fit", *words) == 0
    message = refused("evaluate", tmp_path / "run", "--data", "density:rings")
    assert "density:rings" in message
    assert not (tmp_path / "run" / "report-density-rings.json").exists()


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_given_to_a_model_of_tables(refused: Refused, table: Run, tmp_path: Path, suffix: str) -> None:
    Image.fromarray(noise(24, 24)).save(tmp_path / f"a.{suffix}")
    path = tmp_path / f"a.{suffix}"
    assert str(path) in refused("reconstruct", table.folder, path, "-o", tmp_path / "y.csv")
    assert str(path) in refused("interpolate", table.folder, path, path, "-o", tmp_path / "y.csv")
    assert not (tmp_path / "y.csv").exists()


def test_a_table_given_to_a_model_of_images(
    refused: Refused, run: Run, digits: Run, wine: Path, tmp_path: Path
) -> None:
    for model in (run, digits):
        assert str(wine) in refused("reconstruct", model.folder, wine, "-o", tmp_path / "y.npy")
        message = refused("evaluate", model.folder, "--data", wine)
        assert str(wine) in message
    assert list(tmp_path.iterdir()) == []


def test_vectors_given_to_a_model_of_images(refused: Refused, run: Run, vectors: Run, tmp_path: Path) -> None:
    path = Path(vectors.config().data)
    assert str(path) in refused("reconstruct", run.folder, path, "-o", tmp_path / "y.npy")
    message = refused("evaluate", run.folder, "--data", path)
    for words in (str(path), "(3,)", "(1, 16, 16)"):
        assert words in message


def test_images_given_to_a_model_of_vectors(refused: Refused, vectors: Run, home: Path, tmp_path: Path) -> None:
    image = home / "plain" / "000.png"
    assert "(3,)" in refused("reconstruct", vectors.folder, image, "-o", tmp_path / "y.npy")
    assert "(3,)" in refused("interpolate", vectors.folder, image, image, "-o", tmp_path / "y.npy")
    assert "(3,)" in refused("evaluate", vectors.folder, "--data", home / "plain")


def test_images_of_another_shape_need_a_model_with_a_preparation(
    refused: Refused, digits: Run, home: Path, tmp_path: Path
) -> None:
    image = home / "plain" / "000.png"
    message = refused("reconstruct", digits.folder, image, "-o", tmp_path / "y.npy")
    for words in (str(image), "24 x 24", "8 x 8"):
        assert words in message
    message = refused("evaluate", digits.folder, "--data", home / "plain")
    assert "(1, 8, 8)" in message


def test_images_are_not_written_as_a_table_nor_rows_as_pictures(
    refused: Refused, run: Run, table: Run, tmp_path: Path
) -> None:
    assert ".npy" in refused("sample", run.folder, "-n", 2, "-o", tmp_path / "x.csv")
    assert ".csv" in refused("sample", table.folder, "-n", 2, "-o", tmp_path / "x.png")
    assert ".csv" in refused("sample", table.folder, "-n", 2, "-o", tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change", [{"kind": "sound"}, {"size": [0, 16]}, {"fit": "zoom"}, {"window": [3, 1]}, {"x": 1}]
)
def test_a_damaged_preparation_is_said(
    refused: Refused, run: Run, home: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    copy = Run(Path(shutil.copytree(run.folder, tmp_path / "run")))
    path = copy.model_folder / "config.json"
    content = json.loads(path.read_text())
    content["data"]["preparation"] |= change
    path.write_text(json.dumps(content))
    message = refused("reconstruct", copy.folder, home / "plain" / "000.png", "-o", tmp_path / "y.npy")
    assert "preparation" in message


def test_evaluate_when_the_folder_is_gone(refused: Refused, stopped: Run, command: Command) -> None:
    assert command("fit", "--quiet", "--resume", stopped.folder).code == 0
    data = Path(stopped.config().data)
    shutil.rmtree(data)
    for words in (["evaluate", stopped.folder], ["fit", "--resume", stopped.folder]):
        assert str(data) in refused(*words)
    assert not stopped.report_path.exists()


def test_a_folder_that_is_gone_is_not_only_looked_for_on_the_hub(
    refused: Refused, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """data/faces is a path and could be owner/name."""
    import datasets

    def nowhere(*words: object, **options: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.chdir(tmp_path)
    shutil.copytree(home / "plain", "data/faces")
    assert call("fit", *IMAGES, "--data", "data/faces", "--out", "run") == 0
    shutil.rmtree("data")
    monkeypatch.setattr(datasets, "load_dataset", nowhere)
    message = refused("evaluate", "run")
    for words in ("data/faces", "folder", "hub"):
        assert words in message


# --- doctor


def test_doctor_says_what_there_is(command: Command) -> None:
    import introvae

    said = command("doctor")
    assert (said.code, said.err) == (0, "")
    for title in ("machine", "versions", "what auto chooses", "extras", "cache of decoded images"):
        assert re.search(rf"^{title}$", said.out, re.MULTILINE)
    rows = dict(re.findall(r"^  (\S.{0,18}\S) +(\S.*)$", said.out, re.MULTILINE))
    assert rows["torch"] == torch.__version__
    assert rows["introvae"] == introvae.__version__
    assert rows["Python"] == sys.version.split()[0]
    assert "missing" not in {rows[name] for name in ("numpy", "pillow", "pandas", "matplotlib", "jsonargparse")}
    for name in ("system", "processor", "memory", "accelerator", "--network auto", "--recipe auto", "medical"):
        assert rows[name]
    assert str(torch.get_num_threads()) in rows["processor"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    assert rows["--device auto"] == str(accelerator or "cpu")
    assert rows["folder"] == str(cache.cache_folder())


@pytest.mark.parametrize("broken", [False, True])
def test_doctor_says_how_to_get_what_is_missing(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: bool
) -> None:
    if broken:
        (tmp_path / "nibabel.py").write_text("raise RuntimeError('half installed')\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "nibabel", raising=False)
    else:
        monkeypatch.setitem(sys.modules, "nibabel", None)
    said = command("doctor")
    assert (said.code, said.err) == (0, "")
    (line,) = re.findall(r"^  medical +(.*)$", said.out, re.MULTILINE)
    for words in ("missing", "pip install 'introvae[medical]'", "nibabel"):
        assert words in line


def test_doctor_clears_the_cache(command: Command, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTROVAE_CACHE", str(tmp_path / "cache"))
    (line,) = re.findall(r"^  size +([\d.,]+ MB)", command("doctor").out, re.MULTILINE)
    assert line == "0.0 MB"
    assert command("fit", *IMAGES, "--size", 256, "--data", home / "plain", "--dry-run").code == 0
    kept = cache.cache_bytes()
    assert kept > 40 * 256 * 256
    (line,) = re.findall(r"^  size +([\d.,]+ MB)", command("doctor").out, re.MULTILINE)
    assert line == f"{kept / 1e6:,.1f} MB"
    (tmp_path / "cache" / "mine.txt").write_text("not the package's")
    said = command("doctor", "--clear-cache")
    assert said.out == f"freed {kept / 1e6:,.1f} MB in {tmp_path / 'cache'}\n"
    assert files(tmp_path / "cache") == {"mine.txt"}
    assert command("doctor", "--clear_cache").out.startswith("freed 0.0 MB")


def test_the_data_are_the_same_from_the_cache(
    command: Command, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTROVAE_CACHE", str(tmp_path / "cache"))
    weights = []
    for name, more in (("fresh", []), ("cached", []), ("without", ["--cache", "false"])):
        said = command("fit", *IMAGES, "--data", home / "mixed", *more, "--out", tmp_path / name)
        assert said.code == 0
        weights.append((tmp_path / name / "model" / "model.safetensors").read_bytes())
        assert ("cache    " in said.out) == (name == "fresh")
        weights.append((tmp_path / name / "log.jsonl").read_bytes().splitlines()[0])
    assert weights[0::2] == [weights[0]] * 3
    assert weights[1::2] == [weights[1]] * 3


# --- data that will not do


def bad(kind: str, folder: Path) -> tuple[Path, str]:
    """Data of a kind that will not do, and what the message must name."""
    path = folder / kind.replace(" ", "_")
    if kind == "empty folder":
        path.mkdir()
        return path, "no readable image"
    if kind == "texts":
        path.mkdir()
        for name in "ab":
            (path / f"{name}.txt").write_text("hello\n")
        return path, "no image that Pillow can read"
    if kind == "one image":
        return write_images(path, 1), "one readable image only"
    path = path.with_suffix(".npy" if "array" in kind else ".csv")
    draws = np.random.default_rng(0).normal(size=(40, 2))
    if kind == "array with NaN":
        x = draws.astype(np.float32)
        x[3, 1] = np.nan
        np.save(path, x)
        return path, "1 NaN"
    if kind == "image array with NaN":
        x = np.full((20, 1, 8, 8), 0.5, np.float32)
        x[0, 0, 0, 0] = np.nan
        np.save(path, x)
        return path, "1 NaN"
    rows = [f"{a},{b},{i % 5}" for i, (a, b) in enumerate(draws)]
    if kind == "unreadable table":
        path.write_bytes(bytes(range(128, 256)) * 20)
        return path, "cannot be read as a table"
    if kind == "empty table":
        path.write_text("")
        return path, "cannot be read as a table"
    if kind == "header only table":
        path.write_text("a,b,c\n")
        return path, "0 rows"
    if kind == "text column table":
        path.write_text("\n".join(["a,b,c,name", *(f"{row},mr {i}" for i, row in enumerate(rows))]))
        return path, "text: name"
    if kind == "constant column table":
        path.write_text("\n".join(["a,b,c,flat", *(f"{row},7" for row in rows)]))
        return path, "constant: flat"
    assert kind == "table with gaps"
    path.write_text("\n".join(["a,b,c", *rows[:5], "1,,2", *rows[5:]]))
    return path, "missing values: b (1, first in row 5)"


@pytest.mark.parametrize(
    "kind",
    [
        *("empty folder", "texts", "one image", "array with NaN", "image array with NaN", "unreadable table"),
        *("empty table", "header only table", "text column table", "constant column table", "table with gaps"),
    ],
)
def test_data_that_will_not_do(refused: Refused, tmp_path: Path, kind: str) -> None:
    path, named = bad(kind, tmp_path)
    message = refused("fit", *TINY, "--data", path, "--out", tmp_path / "run")
    assert str(path) in message
    assert named in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--size", 3], "size is 3: give 4 to 4096"),
        (["--size", -16], "size is -16"),
        (["--size", "big"], "size"),
        (["--size", 5000], "size is 5000: give 4 to 4096"),
        (["--fit", "zoom"], "'zoom': choose one of pad, crop, stretch"),
        (["--heldout", 1.5], "heldout is 1.5"),
        (["--heldout", 0], "heldout is 0"),
        (["--heldout-seed", -1], "seed is -1"),
        (["--axis", 7], "axis is 7: give 0"),
        (["--channels", 2], "channels is 2: give 1"),
        (["--window", "[50, 20]"], "window is (50"),
        (["--window", "[-1, 20]"], "window is (-1"),
        (["--window", "[1, 2, 3]"], "window"),
        (["--window", "wide"], "window"),
        (["--window-of", "each"], "'each': choose one of all, file"),
        (["--slices", "first"], "slices is 'first': give START:END"),
        (["--group", "("], "group '(' is no regular expression"),
        (["--group", "xyz"], "group 'xyz' matches no file name, such as 000.png"),
        (["--group", "png"], "belong to 'png'"),
        (["--cache", "perhaps"], "cache"),
        (["--batch-size", 50], "batch_size 50 exceeds the 36 training samples"),
        (["--size", 9, "--network", "conv"], "(1, 9, 9)"),
    ],
)
def test_options_that_will_not_do(
    refused: Refused, home: Path, tmp_path: Path, words: list[object], named: str
) -> None:
    message = refused("fit", *IMAGES, "--data", home / "plain", "--out", tmp_path / "run", *words)
    assert named in message
    for inside in ("<class", "Union", "NoneType", "Expected"):
        assert inside not in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--columns", "acid,zzz"], "no column 'zzz' for --columns: choose from id, acid"),
        (["--drop", "zzz"], "no column 'zzz' for --drop"),
        (["--label", "zzz"], "no column 'zzz' for --label"),
        (["--group", "zzz"], "no column 'zzz' for --group"),
        (["--drop", "id,acid,sugar,big one"], "no column is left"),
        (["--label", "none", "--drop", "id"], "text: class"),
    ],
)
def test_columns_that_will_not_do(refused: Refused, wine: Path, tmp_path: Path, words: list[str], named: str) -> None:
    common = [*TINY, "--network", "tiny-mlp", "--data", wine, "--out", tmp_path / "run"]
    message = refused("fit", *common, *words)
    assert str(wine) in message
    assert named in message
    assert not (tmp_path / "run").exists()


# --- data that changed, or are named in another way


def test_evaluate_refuses_a_folder_that_changed_since_training(
    refused: Refused, command: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(40):
        Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(folder / f"{index:02d}.png")
    assert command("fit", *IMAGES, "--data", folder, "--out", tmp_path / "run").code == 0
    Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(folder / "05b.png")
    message = refused("evaluate", tmp_path / "run")
    assert "not what the run was trained on" in message
    assert "--data" in message


def test_the_run_s_own_data_by_another_path_keep_their_groups(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(40):
        Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(folder / f"{index // 5}_{index:02d}.png")
    words = ["--data", folder, "--group", r"^(\d+)_", "--out", tmp_path / "run"]
    assert command("fit", *IMAGES, *words).code == 0
    assert command("evaluate", tmp_path / "run").code == 0
    report = (tmp_path / "run" / "report.json").read_text()
    assert command("evaluate", tmp_path / "run", "--data", f"{folder}/").code == 0
    again = json.loads((tmp_path / "run" / "report.json").read_text())
    assert again["metrics"] == json.loads(report)["metrics"]
    assert again["heldout"] % 5 == 0
