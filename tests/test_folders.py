from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from introvae.data import (
    HUB_NAME,
    ArrayData,
    DataOptions,
    Intake,
    Part,
    Preparation,
    load_data,
    preparation_from,
    read_images,
)
from introvae.data import survey as survey_module
from introvae.data.arrays import heldout_rows, set_apart
from introvae.data.options import slice_range
from introvae.data.preparation import automatic_size
from introvae.data.rows import RowSource, used_splits
from introvae.errors import CheckpointError, ConfigError, DataError
from unprepared import SKIPPED, USED, write_odd_files

ROTATED = 0x0112


def texture(seed: int, width: int = 16, height: int = 16) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def flat(value: int | tuple[int, ...], side: int = 16, mode: str = "L") -> Image.Image:
    return Image.new(mode, (side, side), value)


def put(folder: Path, name: str, image: Image.Image | np.ndarray, **options: Any) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)


def put_flat(folder: Path, names: list[str]) -> None:
    """Image i has the value i everywhere."""
    for value, name in enumerate(names):
        put(folder, name, flat(value))


def load(source: Path, preparation: Preparation | None = None, **options: Any) -> ArrayData:
    data = load_data(source, DataOptions(**options), preparation)
    assert isinstance(data, ArrayData)
    return data


def intake(data: ArrayData) -> Intake:
    assert data.intake is not None
    assert len({name for part in (data.train, data.heldout) for name in part.names}) == data.intake.used
    return data.intake


def by_name(data: ArrayData) -> dict[str, Tensor]:
    return {name: x for part in (data.train, data.heldout) for name, x in zip(part.names, part.x, strict=True)}


def class_of(data: ArrayData) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for part in (data.train, data.heldout):
        assert part.labels is not None
        for name, label in zip(part.names, part.labels.tolist(), strict=True):
            found[name] = None if label == -1 else data.class_names[label]
    return found


@contextmanager
def within(seconds: float) -> Iterator[None]:
    def late(*_: Any) -> None:
        pytest.fail(f"not done after {seconds} s")  # no Exception: nothing on the way catches it

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# What is found


def test_images_in_nested_folders_are_found_and_named_by_their_path(tmp_path: Path):
    names = ["a.png", "b/c.png", "b/d/e.png", "b/d/f/g.png", "ü ä/h (1).png"]
    put_flat(tmp_path, names)
    data = load(tmp_path)
    assert data.name == str(tmp_path)
    assert data.shape == (1, 16, 16)
    assert data.train.x.dtype == torch.uint8
    assert intake(data).found == intake(data).used == 5
    found = by_name(data)
    assert {name: int(x.unique()) for name, x in found.items()} == dict(zip(names, range(5), strict=True))


def test_folders_on_the_first_level_are_classes(tmp_path: Path):
    names = [f"{kind}/{i}/{j}.png" for kind in ("cats", "dogs", "newts") for i in range(2) for j in range(4)]
    put_flat(tmp_path, [*names, "unsorted.png"])
    data = load(tmp_path)
    assert data.class_names == ("cats", "dogs", "newts")
    assert class_of(data) == {**{name: name.split("/")[0] for name in names}, "unsorted.png": None}


@pytest.mark.parametrize("names", [["a.png", "b.png", "c.png"], ["in/a.png", "in/b.png", "in/c/d.png"]])
def test_without_two_folders_there_are_no_classes(tmp_path: Path, names: list[str]):
    put_flat(tmp_path, names)
    data = load(tmp_path)
    assert data.class_names == ()
    assert data.train.labels is None


@pytest.mark.parametrize(
    ("train", "test"), [("train", "test"), ("Training", "TESTING"), ("train", "val"), ("train", "valid")]
)
def test_folders_named_train_and_test_are_the_parts(tmp_path: Path, train: str, test: str):
    trained_on = [f"{train}/{kind}/{i}.png" for kind in ("cats", "dogs") for i in range(6)]
    looked_at = [f"{test}/{kind}/{i}.png" for kind in ("dogs", "newts") for i in range(2)]
    put_flat(tmp_path, [*trained_on, *looked_at])
    data = load(tmp_path, heldout=0.5)
    assert list(data.train.names) == trained_on
    assert list(data.heldout.names) == looked_at
    assert data.class_names == ("cats", "dogs", "newts")
    assert class_of(data) == {name: name.split("/")[1] for name in [*trained_on, *looked_at]}


def test_test_goes_before_validation_and_neither_is_trained_on(tmp_path: Path):
    names = [f"{part}/{i}.png" for part in ("train", "test", "validation") for i in range(3)]
    put_flat(tmp_path, names)
    data = load(tmp_path)
    assert list(data.train.names) == names[:3]
    assert list(data.heldout.names) == names[3:6]


@pytest.mark.parametrize("other", ["train", "test"])
def test_a_part_without_its_counterpart_is_a_folder_like_others(tmp_path: Path, other: str):
    put_flat(tmp_path, [f"{kind}/{i}.png" for kind in (other, "newts") for i in range(5)])
    data = load(tmp_path, heldout=0.3)
    assert data.class_names == tuple(sorted((other, "newts")))
    assert (len(data.train), len(data.heldout)) == (7, 3)


def test_hidden_files_and_clutter_are_not_even_counted(tmp_path: Path):
    put_flat(tmp_path, ["a.png", "b.png", "c/d.png", ".hidden.png", "._a.png", ".cache/e.png", "c/.git/f.png"])
    for name in (".DS_Store", "Thumbs.db", "c/desktop.ini"):
        (tmp_path / name).write_bytes(b"no picture")
    data = load(tmp_path)
    assert set(by_name(data)) == {"a.png", "b.png", "c/d.png"}
    assert intake(data) == Intake(3, 3, (), intake(data).remarks)


def test_hidden_parquet_files_do_not_make_a_folder_of_images_one_of_parquet(tmp_path: Path):
    put_flat(tmp_path, ["a.png", "b.png", "c.png"])
    for name in ("._table.parquet", ".cache/table.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"a Mac's notes on a file")
    assert set(by_name(load(tmp_path))) == {"a.png", "b.png", "c.png"}


def test_links_that_lead_back_up_end_and_no_file_counts_twice(tmp_path: Path):
    put_flat(tmp_path, ["data/a.png", "data/deep/b.png", "data/deep/c.png"])
    (tmp_path / "data/deep/up").symlink_to(tmp_path / "data", target_is_directory=True)
    (tmp_path / "data/deep/here").symlink_to(".", target_is_directory=True)
    (tmp_path / "data/itself").symlink_to("itself")
    with within(5):
        data = load(tmp_path / "data")
    assert set(by_name(data)) == {"a.png", "deep/b.png", "deep/c.png"}
    assert [name for name, _ in intake(data).skipped] == ["itself"]


def test_links_to_folders_and_files_elsewhere_are_followed(tmp_path: Path):
    put_flat(tmp_path, ["far/a.png", "far/b.png", "c.png"])
    (tmp_path / "near").mkdir()
    (tmp_path / "near/linked").symlink_to(tmp_path / "far", target_is_directory=True)
    (tmp_path / "near/c.png").symlink_to(tmp_path / "c.png")
    assert set(by_name(load(tmp_path / "near"))) == {"linked/a.png", "linked/b.png", "c.png"}


def test_a_broken_link_is_skipped_and_named(tmp_path: Path):
    put_flat(tmp_path, ["a.png", "b.png"])
    (tmp_path / "c.png").symlink_to(tmp_path / "gone.png")
    found = intake(load(tmp_path))
    assert (found.found, found.used) == (3, 2)
    assert found.skipped == (("c.png", "cannot be opened (No such file or directory)"),)


def test_a_fifo_does_not_block(tmp_path: Path):
    put_flat(tmp_path, ["a.png", "b.png"])
    os.mkfifo(tmp_path / "pipe.png")
    with within(5):
        found = intake(load(tmp_path))
    assert found.skipped == (("pipe.png", "no regular file"),)


def test_a_fifo_as_the_data_does_not_block(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    with within(5), pytest.raises(DataError, match=r"pipe\.png.*no regular file"):
        load(tmp_path / "pipe.png")


def forbid(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    scandir = os.scandir

    def refusing(path: Any = ".") -> Any:
        if Path(os.fsdecode(path)) == folder:
            raise PermissionError(errno.EACCES, "Permission denied", os.fsdecode(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)


def test_a_folder_inside_that_cannot_be_opened_is_skipped_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    put_flat(tmp_path, ["a.png", "b.png", "secret/c.png"])
    forbid(monkeypatch, tmp_path / "secret")
    found = intake(load(tmp_path))
    assert (found.found, found.used) == (3, 2)
    assert found.skipped == (("secret", "cannot be opened (Permission denied)"),)


def one_line(error: pytest.ExceptionInfo[DataError], folder: Path) -> str:
    message = str(error.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


def test_a_folder_that_cannot_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    put_flat(tmp_path, ["a.png", "b.png"])
    forbid(monkeypatch, tmp_path)
    with pytest.raises(DataError, match="cannot be opened") as caught:
        load(tmp_path)
    one_line(caught, tmp_path)


def test_an_empty_folder_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="has no readable image: give at least two") as caught:
        load(tmp_path)
    one_line(caught, tmp_path)


def test_a_folder_without_a_readable_image_gives_some_reasons(tmp_path: Path):
    for i in range(50):
        (tmp_path / f"{i:02}.png").write_text("no\npicture\n")
    with pytest.raises(DataError, match=r"no readable image \(50 files were skipped: 00\.png: no image") as caught:
        load(tmp_path)
    assert len(one_line(caught, tmp_path)) < 500


def test_a_single_image_is_too_few(tmp_path: Path):
    put_flat(tmp_path, ["a.png"])
    for path in (tmp_path, tmp_path / "a.png"):
        with pytest.raises(DataError, match="one readable image only") as caught:
            load(path)
        one_line(caught, path)


# Damaged and odd files


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Image.Image, dict[str, str]]:
    folder = tmp_path_factory.mktemp("unprepared")
    for i in range(40):
        put(folder, f"{i:03}.jpg", texture(i, 48, 48), quality=95)
    good = texture(7, 64, 64)
    return folder, good, write_odd_files(folder, good)


def test_every_odd_file_meets_its_fate(odd: tuple[Path, Image.Image, dict[str, str]]):
    folder, _, fate = odd
    data = load(folder)
    found = intake(data)
    assert found.found == 40 + len(fate) == found.used + len(found.skipped)
    skipped = dict(found.skipped)
    assert set(skipped) == {name for name, becomes in fate.items() if becomes != USED}
    assert len(skipped) == len(found.skipped) == 15
    for name, reason in skipped.items():
        assert reason.startswith(fate[name]), (name, reason)
        assert reason not in ("", SKIPPED)
        assert "\n" not in reason
    assert set(by_name(data)) == {f"{i:03}.jpg" for i in range(40)} | {n for n, b in fate.items() if b == USED}
    assert data.shape == (3, 64, 64)


def test_a_picture_taken_lying_comes_out_upright(odd: tuple[Path, Image.Image, dict[str, str]]):
    folder, good, _ = odd
    found = by_name(load(folder))
    upright = np.asarray(good).astype(float)
    for name in ("odd/lying.jpg", "odd/broken_exif.jpg", "odd/UPPER CASE (1) ü.JPG"):
        difference = found[name].float().mean(dim=0).numpy() - upright
        assert np.abs(difference).mean() < 4, name
    assert np.abs(np.rot90(upright) - upright).mean() > 20


def test_odd_files_are_as_pillow_reads_them(odd: tuple[Path, Image.Image, dict[str, str]]):
    folder, good, _ = odd
    found = {name: x.numpy().astype(float) for name, x in by_name(load(folder)).items()}
    grey = np.asarray(good).astype(float)
    colour = np.stack([grey, grey // 2, grey])
    clear = grey / 255
    assert np.abs(found["odd/colour.png"] - colour).max() == 0
    assert np.abs(found["odd/palette.png"] - colour).mean() < 12
    assert np.abs(found["odd/transparent.png"] - (colour * clear + 255 * (1 - clear))).max() <= 1
    assert np.abs(found["odd/grey_transparent.png"] - (grey * clear + 255 * (1 - clear))).max() <= 1
    assert np.abs(found["odd/print.jpg"] - colour).mean() < 12
    assert set(np.unique(found["odd/black_and_white.png"])) == {0, 255}
    assert np.abs(found["odd/moving.gif"] - grey).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_the_automatic_size_is_that_of_upright_pictures(tmp_path: Path, kind: str):
    exif = Image.Exif()
    exif[ROTATED] = 6
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    arrays = [np.asarray(texture(i, 20, 12)) for i in range(4)]
    for i, array in enumerate(arrays):
        put(tmp_path, f"{i}.{kind.lower()}", array, exif=exif, **options)
    data = load(tmp_path, channels=1)
    assert data.shape == (1, 20, 12)
    for i, array in enumerate(arrays):
        turned = np.rot90(array, -1).astype(float)
        assert np.abs(by_name(data)[f"{i}.{kind.lower()}"][0].numpy() - turned).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_undone(orientation: int, tmp_path: Path):
    upright = np.asarray(texture(3, 16, 12))
    lying = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ROTATED] = orientation
    put(tmp_path, "x.png", np.ascontiguousarray(lying), exif=exif)
    x, _ = read_images([tmp_path / "x.png"], Preparation((12, 16), 1))
    assert torch.equal((x[0, 0] * 255).round().byte(), torch.from_numpy(upright.copy()))


def test_skipped_files_are_counted_and_ten_are_named_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    put_flat(tmp_path, [f"{i}.png" for i in range(10)])
    for i in range(12):
        (tmp_path / f"x{i:02}.png").write_bytes(b"no")
    with caplog.at_level(logging.INFO, logger="introvae"):
        load(tmp_path)
    assert "10 pictures of 1 x 16 x 16, 9 to train on, 1 held out" in caplog.text
    assert "skipped: 12 (22 files or rows were found)" in caplog.text
    assert [f"x{i:02}.png" in caplog.text for i in range(12)] == 10 * [True] + 2 * [False]
    assert "and 2 more" in caplog.text


def test_an_intake_gives_plain_values():
    found = Intake(5, 3, (("a", "why"), ("b", "so")), ("one",), (("c", "d"),))
    assert json.loads(json.dumps(found.to_dict())) == {
        "found": 5,
        "used": 3,
        "skipped": [{"name": "a", "reason": "why"}, {"name": "b", "reason": "so"}],
        "converted": [],
        "remarks": ["one"],
        "duplicates": [{"heldout": "c", "train": "d"}],
    }


# Kinds of pictures


def prepared(picture: Image.Image, channels: int, **settings: Any) -> np.ndarray:
    made = Preparation((picture.height, picture.width), channels, **settings)(picture)
    assert made.dtype == np.uint8
    assert made.shape == (channels, picture.height, picture.width)
    return made.astype(int)


def test_transparency_is_laid_over_white():
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (9, 7, 4), dtype=np.uint8)
    clear = array[..., 3:] / 255
    wanted = array[..., :3] * clear + 255 * (1 - clear)
    assert np.abs(prepared(Image.fromarray(array), 3) - wanted.transpose(2, 0, 1)).max() <= 1
    pair = array[..., [0, 3]]
    wanted = pair[..., 0] * clear[..., 0] + 255 * (1 - clear[..., 0])
    assert np.abs(prepared(_la(pair), 1)[0] - wanted).max() <= 1


def _la(pair: np.ndarray) -> Image.Image:
    return Image.merge("LA", [Image.fromarray(np.ascontiguousarray(pair[..., i])) for i in range(2)])


def test_what_is_wholly_transparent_is_white():
    assert (prepared(Image.new("RGBA", (5, 5), (0, 0, 0, 0)), 3) == 255).all()
    assert (prepared(Image.new("RGBA", (5, 5), (10, 20, 30, 255)), 3)[:, 2, 2] == [10, 20, 30]).all()


def test_a_palettes_transparent_colour_is_white(tmp_path: Path):
    picture = Image.new("P", (6, 6), 1)
    picture.putpalette([200, 0, 0, 0, 100, 50])
    picture.putpixel((2, 3), 0)
    put(tmp_path, "x.png", picture, transparency=0)
    x, _ = read_images([tmp_path / "x.png"], Preparation((6, 6), 3))
    x = (x[0] * 255).round()
    assert x[:, 3, 2].tolist() == [255, 255, 255]
    assert x[:, 0, 0].tolist() == [0, 100, 50]


def test_palettes_are_looked_up():
    picture = Image.new("P", (6, 6), 1)
    picture.putpalette([200, 0, 0, 0, 100, 50])
    picture.putpixel((2, 3), 0)
    made = prepared(picture, 3)
    assert made[:, 3, 2].tolist() == [200, 0, 0]
    assert made[:, 0, 0].tolist() == [0, 100, 50]


@pytest.mark.parametrize(
    ("ink", "colour"),
    [
        ((0, 0, 0, 0), [255, 255, 255]),
        ((0, 0, 0, 255), [0, 0, 0]),
        ((255, 0, 0, 0), [0, 255, 255]),
        ((0, 255, 255, 0), [255, 0, 0]),
    ],
)
def test_print_colours_become_screen_colours(ink: tuple[int, ...], colour: list[int]):
    assert prepared(Image.new("CMYK", (5, 5), ink), 3)[:, 2, 2].tolist() == colour


def test_one_bit_is_black_and_white():
    array = np.random.default_rng(0).integers(0, 2, (8, 8)).astype(bool)
    assert (prepared(Image.fromarray(array), 1)[0] == 255 * array).all()


def test_grey_becomes_three_equal_channels_and_colour_the_usual_grey():
    grey = np.asarray(texture(0))
    assert (prepared(Image.fromarray(grey), 3) == grey[None]).all()
    colour = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    wanted = colour @ np.array([0.299, 0.587, 0.114])
    assert np.abs(prepared(Image.fromarray(colour), 1)[0] - wanted).max() <= 1


def kinds(folder: Path, grey: int, colour: int) -> None:
    for i in range(grey):
        put(folder, f"grey{i:03}.png", flat(i, 8))
    for i in range(colour):
        put(folder, f"colour{i}.png", flat((200, i, 40), 8, "RGB"))


@pytest.mark.parametrize(
    ("grey", "colour", "channels"),
    [(120, 0, 1), (120, 1, 1), (99, 1, 1), (98, 1, 3), (50, 50, 3), (0, 5, 3)],
)
def test_colour_needs_more_than_one_picture_in_a_hundred(tmp_path: Path, grey: int, colour: int, channels: int):
    kinds(tmp_path, grey, colour)
    data = load(tmp_path)
    assert data.shape == (channels, 8, 8)
    if colour:
        wanted = [200, 0, 40] if channels == 3 else [round(200 * 0.299 + 40 * 0.114)]
        assert by_name(data)["colour0.png"][:, 0, 0].tolist() == pytest.approx(wanted, abs=1)
    said = [remark for remark in intake(data).remarks if re.search("in colour|colour pictures", remark)]
    assert len(said) == (1 if grey and colour else 0)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_can_be_asked_for(tmp_path: Path, channels: int):
    kinds(tmp_path, 4, 4)
    data = load(tmp_path, channels=channels)
    assert data.shape == (channels, 8, 8)
    assert by_name(data)["grey003.png"].unique().tolist() == [3]


# More than 8 bits


def deep_arrays(count: int, kind: Any, low: float = 500, high: float = 40_000) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [(low + (high - low) * rng.beta(2, 5, (20, 20)) / (1 + i % 3)).astype(kind) for i in range(count)]


def windowed(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((values.astype(np.float64) - low) / (high - low), 0, 1) * 255


@pytest.mark.parametrize(("kind", "suffix"), [(np.uint16, "png"), (np.int32, "tif"), (np.float32, "tif")])
@pytest.mark.parametrize("window", [(0.5, 99.5), (10, 80)])
def test_deep_pictures_go_through_one_window_of_percentiles(
    tmp_path: Path, kind: Any, suffix: str, window: tuple[float, float]
):
    arrays = deep_arrays(6, kind)
    for i, array in enumerate(arrays):
        put(tmp_path, f"{i}.{suffix}", array)
    data = load(tmp_path, window=window)
    low, high = np.percentile(np.stack(arrays).astype(np.float64), window)
    assert isinstance(data.preparation, Preparation)
    assert data.preparation.window == pytest.approx((low, high), rel=1e-6)
    assert data.preparation.percentiles is None
    for i, array in enumerate(arrays):
        assert np.abs(by_name(data)[f"{i}.{suffix}"][0].numpy() - windowed(array, low, high)).max() < 0.51
    assert any(
        f"6 pictures have more than 8 bits: values from {low:.6g} to {high:.6g}" in r for r in intake(data).remarks
    )


def test_the_window_can_be_of_each_file(tmp_path: Path):
    arrays = deep_arrays(6, np.uint16)
    for i, array in enumerate(arrays):
        put(tmp_path, f"{i}.png", array)
    data = load(tmp_path, window_of="file", window=(5, 90))
    assert isinstance(data.preparation, Preparation)
    assert data.preparation.window is None
    assert data.preparation.percentiles == (5, 90)
    for i, array in enumerate(arrays):
        low, high = np.percentile(array, (5, 90))
        assert np.abs(by_name(data)[f"{i}.png"][0].numpy() - windowed(array, low, high)).max() < 0.51


@pytest.mark.parametrize("window_of", ["all", "file"])
def test_floats_between_0_and_1_are_kept_as_they_are(tmp_path: Path, window_of: str):
    rng = np.random.default_rng(0)
    arrays = [rng.uniform(0.2, 0.6, (12, 12)).astype(np.float32) for _ in range(4)]
    for i, array in enumerate(arrays):
        put(tmp_path, f"{i}.tif", array)
    data = load(tmp_path, window_of=window_of)
    for i, array in enumerate(arrays):
        assert np.abs(by_name(data)[f"{i}.tif"][0].numpy() - 255 * array.astype(np.float64)).max() < 0.51


def test_8_bit_pictures_beside_deep_ones_keep_their_values(tmp_path: Path):
    for i, array in enumerate(deep_arrays(4, np.uint16)):
        put(tmp_path, f"deep{i}.png", array)
    put(tmp_path, "plain.png", texture(3, 20, 20))
    data = load(tmp_path)
    assert data.shape == (1, 20, 20)
    assert (by_name(data)["plain.png"][0].numpy() == np.asarray(texture(3, 20, 20))).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_picture_with_a_value_that_is_none_is_skipped(tmp_path: Path, value: float):
    for i, array in enumerate(deep_arrays(5, np.float32)):
        if i == 2:
            array[3, 4] = value
        put(tmp_path, f"{i}.tif", array)
    found = intake(load(tmp_path))
    assert (found.found, found.used) == (5, 4)
    assert [name for name, _ in found.skipped] == ["2.tif"]
    assert "NaN or infinite" in found.skipped[0][1]


def test_also_one_that_the_window_was_not_made_from_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(survey_module, "WINDOW_FILES", 2)
    arrays = deep_arrays(30, np.float32)
    bad = {11, 17, 29}
    for i, array in enumerate(arrays):
        if i in bad:
            array[3, 4] = np.nan
        put(tmp_path, f"{i:02}.tif", array)
    data = load(tmp_path, cache=False)
    found = intake(data)
    assert (found.found, found.used) == (30, 27)
    assert {name for name, _ in found.skipped} == {f"{i:02}.tif" for i in bad}


def test_the_window_of_many_files_is_close_to_that_of_all_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(survey_module, "WINDOW_FILES", 8)
    monkeypatch.setattr(survey_module, "WINDOW_VALUES", 100)
    arrays = deep_arrays(60, np.uint16)
    for i, array in enumerate(arrays):
        put(tmp_path, f"{i:02}.png", array)
    data = load(tmp_path, cache=False, window=(2, 98))
    assert isinstance(data.preparation, Preparation)
    assert data.preparation.window is not None
    values = np.sort(np.stack(arrays).ravel())
    places = np.searchsorted(values, data.preparation.window) / len(values)
    assert places == pytest.approx([0.02, 0.98], abs=0.01)


def test_the_window_is_of_all_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(survey_module, "WINDOW_VALUES", 64)
    array = np.tile(np.arange(64) * 1000, (64, 1)).astype(np.uint16)  # dark at the left, as pictures with a border are
    for i in range(8):
        put(tmp_path, f"{i}.png", array)
    data = load(tmp_path, cache=False, window=(5, 95))
    assert isinstance(data.preparation, Preparation)
    assert data.preparation.window == pytest.approx((3000, 60_000), abs=4000)


def test_deep_pictures_without_contrast_are_refused(tmp_path: Path):
    for i in range(3):
        put(tmp_path, f"{i}.png", np.full((8, 8), 700, np.uint16))
    with pytest.raises(DataError, match="all values are 700"):
        load(tmp_path)


def test_a_window_around_a_rare_value_falls_back_to_all_values(tmp_path: Path):
    arrays = [np.zeros((20, 20), np.uint16) for _ in range(4)]
    arrays[0][0, 0] = 1000
    for i, array in enumerate(arrays):
        put(tmp_path, f"{i}.png", array)
    data = load(tmp_path)
    assert by_name(data)["0.png"][0, 0, :2].tolist() == [255, 0]


def test_deep_pictures_for_a_model_without_a_window_are_refused(tmp_path: Path):
    put(tmp_path, "a.png", deep_arrays(1, np.uint16)[0])
    with pytest.raises(DataError, match=r"a\.png.*more than 8 bits and the model saw 8-bit images only"):
        read_images([tmp_path / "a.png"], Preparation((20, 20), 1))


# Size


WIDE = np.zeros((32, 64), np.uint8)
WIDE[:, :16] = WIDE[:, 48:] = 255


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_padding_leaves_black_bars(turned: bool, kind: Any):
    white = np.full((64, 32) if turned else (32, 64), np.iinfo(kind).max, kind)
    made = Preparation((32, 32), 1, "pad", (0, 65535))(Image.fromarray(white))[0]
    made = made.T if turned else made
    assert (made[8:24] == 255).all()
    assert (made[:8] == 0).all()
    assert (made[24:] == 0).all()


def test_padding_to_a_size_that_is_not_square():
    made = Preparation((10, 40), 3, "pad")(Image.new("RGB", (30, 30), (9, 99, 199)))
    assert (made[:, :, 15:25] == np.array([9, 99, 199])[:, None, None]).all()
    assert (made[:, :, :15] == 0).all()
    assert (made[:, :, 25:] == 0).all()


def test_cropping_keeps_the_centre():
    assert (Preparation((32, 32), 1, "crop")(Image.fromarray(WIDE)) == 0).all()
    assert (Preparation((32, 32), 1, "crop")(Image.fromarray(WIDE.T.copy())) == 0).all()
    assert (Preparation((16, 16), 1, "crop")(Image.fromarray(255 - WIDE)) > 235).all()  # but for ringing at the edge


def test_stretching_keeps_everything():
    made = Preparation((32, 32), 1, "stretch")(Image.fromarray(WIDE))[0]
    assert (made[:, :6] > 240).all()
    assert (made[:, 10:22] < 15).all()
    assert (made[:, 26:] > 240).all()


def test_an_option_decides_how_pictures_fit(tmp_path: Path):
    for i in range(3):
        put(tmp_path, f"{i}.png", np.full((32, 64), 255 - i, np.uint8))
    means = {fit: load(tmp_path, fit=fit, size=32).train.tensor().mean().item() for fit in ("pad", "crop", "stretch")}
    assert means["pad"] == pytest.approx(0.5, abs=0.01)
    assert means["crop"] == means["stretch"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("kind", ["L", "RGB", "deep"])
@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
def test_making_smaller_is_antialiased(kind: str, fit: str):
    board = (np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)
    picture = Image.fromarray(board.astype(np.uint16) * 257) if kind == "deep" else Image.fromarray(board).convert(kind)
    made = Preparation((32, 32), 1, fit, (0, 65535))(picture)
    assert np.abs(made.astype(float) - 127.5).max() < 4


def test_a_large_jpeg_is_antialiased_too(tmp_path: Path):
    board = (np.indices((512, 512)).sum(axis=0) % 2 * 255).astype(np.uint8)
    put(tmp_path, "x.jpg", board, quality=95)
    x, _ = read_images([tmp_path / "x.jpg"], Preparation((32, 32), 1))
    assert (x - 0.5).abs().max() < 0.03


def test_a_small_jpeg_decoded_coarsely_looks_as_decoded_finely(tmp_path: Path):
    put(tmp_path, "x.jpg", texture(2, 1024, 1024), quality=95)
    put(tmp_path, "x.png", Image.open(tmp_path / "x.jpg"))
    x, _ = read_images([tmp_path / "x.jpg", tmp_path / "x.png"], Preparation((32, 32), 1))
    assert (x[0] - x[1]).abs().max() < 0.02


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ({(28, 28): 9}, (28, 28)),
        ({(32, 32): 9}, (32, 32)),
        ({(64, 64): 9}, (64, 64)),
        ({(128, 128): 9}, (128, 128)),
        ({(96, 96): 9}, (96, 96)),
        ({(48, 48): 9}, (48, 48)),
        ({(256, 256): 9}, (64, 64)),
        ({(100, 100): 9}, (64, 64)),
        ({(36, 36): 9}, (32, 32)),
        ({(31, 20): 9}, (20, 31)),
        ({(17, 17): 9}, (17, 17)),
        ({(64, 32): 9}, (32, 32)),
        ({(178, 218): 9}, (64, 64)),
        ({(28, 28): 9, (29, 28): 1}, (32, 32)),
        ({(47, 200): 5, (48, 200): 5}, (32, 32)),
        ({(47, 200): 4, (48, 200): 6}, (64, 64)),
        ({(640, 480): 60, (480, 640): 40}, (64, 64)),
    ],
)
def test_automatic_sizes(sizes: dict[tuple[int, int], int], wanted: tuple[int, int]):
    assert automatic_size(sizes) == wanted


@pytest.mark.parametrize(
    ("side", "other", "shape"),
    [((20, 12), (20, 12), (12, 20)), ((40, 30), (40, 30), (32, 32)), ((90, 80), (50, 70), (64, 64))],
)
def test_the_size_of_a_folder(tmp_path: Path, side: tuple[int, int], other: tuple[int, int], shape: tuple[int, int]):
    for i, size in enumerate([side, other, side]):
        put(tmp_path, f"{i}.png", texture(i, *size))
    data = load(tmp_path)
    assert data.shape == (1, *shape)
    assert any("pixels by pad; --size" in remark for remark in intake(data).remarks) == (shape != side[::-1])


@pytest.mark.parametrize("size", [4, 16, 50])
def test_a_size_that_was_asked_for(tmp_path: Path, size: int):
    for i in range(3):
        put(tmp_path, f"{i}.png", texture(i, 28, 28))
    data = load(tmp_path, size=size)
    assert data.shape == (1, size, size)
    assert data.preparation == Preparation((size, size), 1)
    wanted = np.asarray(texture(1, 28, 28).resize((size, size), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(by_name(data)["1.png"][0].numpy() - wanted).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 3}, "size is 3"),
        ({"size": 5000}, "size is 5000"),
        ({"size": 32.5}, "size is 32.5"),
        ({"fit": "squeeze"}, "'squeeze'.*pad, crop, stretch"),
        ({"channels": 2}, "channels is 2"),
        ({"window": (99, 1)}, "window is"),
        ({"window": (0, 101)}, "window is"),
        ({"window": (1, 2, 3)}, "window is"),
        ({"window_of": "some"}, "'some'.*all, file"),
        ({"heldout": 0}, "heldout is 0"),
        ({"heldout": 1.0}, "heldout is 1"),
        ({"heldout_seed": -1}, "seed is -1"),
        ({"axis": 3}, "axis is 3"),
        ({"slices": "5"}, "slices is '5'"),
        ({"slices": "a:b"}, "slices is 'a:b'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        DataOptions(**options)


@pytest.mark.parametrize(
    ("slices", "count", "wanted"),
    [
        (":", 7, (0, 7)),
        ("2:5", 7, (2, 5)),
        ("2:", 7, (2, 7)),
        (":5", 3, (0, 3)),
        ("25%:75%", 8, (2, 6)),
        ("9:", 7, (7, 7)),
    ],
)
def test_ranges_of_slices(slices: str, count: int, wanted: tuple[int, int]):
    assert slice_range(slices, count) == range(*wanted)


# The held-out part


def numbered(folder: Path, count: int) -> list[str]:
    names = [f"{i:03}.png" for i in range(count)]
    put_flat(folder, names)
    return names


@pytest.mark.parametrize(("share", "heldout"), [(0.01, 1), (0.1, 4), (0.25, 10), (0.99, 39)])
def test_the_share_decides_how_many_are_held_out(tmp_path: Path, share: float, heldout: int):
    names = numbered(tmp_path, 40)
    data = load(tmp_path, heldout=share)
    assert (len(data.train), len(data.heldout)) == (40 - heldout, heldout)
    assert sorted([*data.train.names, *data.heldout.names]) == names


def test_the_seed_decides_which_are_held_out(tmp_path: Path):
    numbered(tmp_path, 40)
    first, same, other = (load(tmp_path, heldout_seed=seed) for seed in (0, 0, 1))
    assert first.heldout.names == same.heldout.names
    assert first.train.names == same.train.names
    assert torch.equal(first.train.x, same.train.x)
    assert set(first.heldout.names) != set(other.heldout.names)


def test_images_keep_their_names_and_labels_on_both_sides(tmp_path: Path):
    names = [f"{'even' if i % 2 == 0 else 'odd'}/{i}.png" for i in range(30)]
    put_flat(tmp_path, names)
    data = load(tmp_path, heldout=0.3)
    for name, x in by_name(data).items():
        assert x.unique().tolist() == [names.index(name)]
    assert class_of(data) == {name: name.split("/")[0] for name in names}


@pytest.mark.parametrize("pattern", [r"^p(\d+)_", r"^p\d+", r"^(?:q(\d)|p(\d+))"])
@pytest.mark.parametrize("seed", range(4))
def test_nobody_is_on_both_sides(tmp_path: Path, pattern: str, seed: int):
    names = [f"p{person:02}_{i}.png" for person in range(12) for i in range(1 + person % 4)]
    put_flat(tmp_path, names)
    data = load(tmp_path, group=pattern, heldout=0.2, heldout_seed=seed)
    trained_on, looked_at = ({name.split("_")[0] for name in part.names} for part in (data.train, data.heldout))
    assert not trained_on & looked_at
    assert len(trained_on) + len(looked_at) == 12
    assert sorted([*data.train.names, *data.heldout.names]) == names
    assert 6 <= len(data.heldout) <= 6 + 3


def test_names_without_a_match_stand_alone(tmp_path: Path):
    put_flat(tmp_path, [f"p{i % 2}_{i}.png" for i in range(8)] + ["x.png", "y.png"])
    data = load(tmp_path, group=r"^p\d", heldout=0.2)
    assert any("2 of 10 names do not match the group pattern" in remark for remark in intake(data).remarks)


def test_a_pattern_that_matches_no_file_is_refused(tmp_path: Path):
    numbered(tmp_path, 5)
    with pytest.raises(ConfigError, match=r"group 'sub-\\\\d\+' matches no file name, such as 000\.png"):
        load(tmp_path, group=r"sub-\d+")


def test_a_pattern_that_is_none_is_refused(tmp_path: Path):
    numbered(tmp_path, 5)
    with pytest.raises(ConfigError, match="is no regular expression") as caught:
        load(tmp_path, group="(")
    assert "\n" not in str(caught.value)


def test_a_single_group_is_refused(tmp_path: Path):
    put_flat(tmp_path, [f"anna_{i}.png" for i in range(5)])
    with pytest.raises(DataError, match="all 5 samples belong to 'anna'"):
        load(tmp_path, group="^[a-z]+")


def test_groups_on_both_sides_of_given_parts_are_told(tmp_path: Path):
    put_flat(
        tmp_path, [f"{part}/{who}_{i}.png" for part, who in (("train", "anna"), ("test", "anna")) for i in range(4)]
    )
    data = load(tmp_path, group="(anna|bert)")
    assert any("1 groups are in the training and in the held-out part" in remark for remark in intake(data).remarks)


@pytest.mark.parametrize("seed", range(30))
def test_setting_apart_keeps_image_label_and_name_together(seed: int):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 60))
    rows = rng.permutation(count)[: rng.integers(1, count)].tolist()
    x = torch.from_numpy(rng.integers(0, 256, (count, 1, 3, 2), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, 9, count))
    original = x.clone()
    train, heldout = set_apart(Part(x, labels, [str(i) for i in range(count)]), rows)
    assert [int(name) for name in heldout.names] == rows
    assert sorted(int(name) for name in train.names) == sorted(set(range(count)) - set(rows))
    for part in (train, heldout):
        assert part.labels is not None
        kept = torch.tensor([int(name) for name in part.names])
        assert torch.equal(part.x, original[kept])
        assert torch.equal(part.labels, labels[kept])
    plain, rest = set_apart(Part(original.clone()), rows)
    assert torch.equal(plain.x, train.x)
    assert torch.equal(rest.x, heldout.x)
    assert plain.labels is None
    assert plain.names == ()


@pytest.mark.parametrize("seed", range(20))
def test_groups_are_held_out_whole(seed: int):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(10, 200))
    groups = [None if rng.random() < 0.1 else str(rng.integers(0, 12)) for _ in range(count)]
    share = float(rng.uniform(0.05, 0.5))
    rows = heldout_rows(count, share, seed, groups)
    assert len(rows) == len(set(rows))
    held = {groups[row] for row in rows} - {None}
    assert not held & {groups[row] for row in range(count) if row not in rows}
    largest = max(groups.count(group) for group in set(groups) - {None})
    wanted = max(1, round(share * count))
    assert wanted <= len(rows) < wanted + largest
    assert rows == heldout_rows(count, share, seed, groups)


# Duplicates


def test_pictures_on_both_sides_are_reported_whatever_their_encoding(tmp_path: Path):
    twin = {}
    for i in range(20):
        suffix = ["bmp", "tif", "png"][i % 3]
        put(tmp_path, f"a{i:02}.png", texture(i))
        put(tmp_path, f"b{i:02}.{suffix}", texture(i))
        twin |= {f"a{i:02}.png": f"b{i:02}.{suffix}", f"b{i:02}.{suffix}": f"a{i:02}.png"}
    data = load(tmp_path, heldout=0.3)
    trained_on = set(data.train.names)
    wanted = {(name, twin[name]) for name in data.heldout.names if twin[name] in trained_on}
    assert len(wanted) > 3
    assert set(intake(data).duplicates) == wanted
    assert len(intake(data).duplicates) == len(wanted)
    assert any(f"in the training part too: {len(wanted)} (" in r for r in intake(data).remarks)


def test_pictures_in_both_given_parts_are_reported(tmp_path: Path):
    for i in range(5):
        put(tmp_path, f"train/{i}.png", texture(i))
        put(tmp_path, f"test/{i}.png", texture(i + 3))
    assert intake(load(tmp_path)).duplicates == (("test/0.png", "train/3.png"), ("test/1.png", "train/4.png"))


def test_twins_on_one_side_are_not_reported(tmp_path: Path):
    for i in range(5):
        put(tmp_path, f"train/{i}.png", texture(i % 2))
        put(tmp_path, f"test/{i}.png", texture(10 + i % 2))
    assert intake(load(tmp_path)).duplicates == ()


# A model's preparation


PREPARATIONS = [
    Preparation((20, 20), 1),
    Preparation((12, 20), 3, "crop", (-1000.5, 400.25)),
    Preparation((64, 64), 1, "stretch", None, (1, 98.5), 0, "30%:70%"),
]


@pytest.mark.parametrize("preparation", PREPARATIONS)
def test_a_preparation_survives_json(preparation: Preparation):
    content = json.loads(json.dumps(preparation.to_dict()))
    assert Preparation.from_dict(content) == preparation
    assert preparation_from({"preparation": content}) == preparation


def test_a_model_of_data_in_memory_has_no_preparation():
    assert preparation_from({}) is None
    assert preparation_from({"preparation": None}) is None


@pytest.mark.parametrize("content", [{}, {"kind": "sounds"}, "images", [1], {"size": [8, 8], "channels": 1}])
def test_a_preparation_of_an_unknown_kind_is_refused(content: Any):
    with pytest.raises(CheckpointError, match="unknown kind"):
        preparation_from({"preparation": content})


@pytest.mark.parametrize(
    "damage",
    [
        {"size": None},
        {"size": [8]},
        {"size": [8, 8, 8]},
        {"size": [8.5, 8.5]},
        {"size": [0, 8]},
        {"size": "ab"},
        {"size": 8},
        {"channels": 2},
        {"channels": None},
        {"fit": "squeeze"},
        {"window": [1]},
        {"window": [2, 1]},
        {"window": ["a", "b"]},
        {"window": 3},
        {"window": [float("nan"), 1]},
        {"percentiles": [99, 1]},
        {"percentiles": [1]},
        {"axis": 3},
        {"slices": "some"},
        {"colour": True},
    ],
    ids=str,
)
def test_a_damaged_preparation_is_refused(damage: dict[str, Any]):
    with pytest.raises(CheckpointError, match="the model's data preparation"):
        Preparation.from_dict({**Preparation((8, 8), 1).to_dict(), **damage})


@pytest.mark.parametrize("missing", ["size", "channels"])
def test_a_preparation_that_lacks_a_value_is_refused(missing: str):
    content = Preparation((8, 8), 1).to_dict()
    del content[missing]
    with pytest.raises(CheckpointError, match="the model's data preparation"):
        Preparation.from_dict(content)


@pytest.mark.parametrize("settings", [{}, {"size": 50, "channels": 3, "window": (20, 30)}])
def test_a_models_preparation_is_used_instead_of_one_for_these_data(tmp_path: Path, settings: dict[str, Any]):
    array = np.linspace(0, 4000, 400).reshape(20, 20).astype(np.uint16)
    for i in range(3):
        put(tmp_path, f"{i}.png", array + i)
    preparation = Preparation((20, 20), 1, window=(1000, 2000))
    data = load(tmp_path, preparation, **settings)
    assert data.preparation == preparation
    assert data.shape == (1, 20, 20)
    assert np.abs(by_name(data)["0.png"][0].numpy() - windowed(array, 1000, 2000)).max() < 0.51


def test_a_models_size_and_channels_are_used(tmp_path: Path):
    for i in range(3):
        put(tmp_path, f"{i}.png", texture(i, 40, 20))
    data = load(tmp_path, Preparation((10, 24), 3, "stretch"))
    assert data.shape == (3, 10, 24)


def test_images_are_read_as_a_model_takes_them(tmp_path: Path):
    put(tmp_path, "a.png", flat(51, 8))
    put(tmp_path, "b.png", flat((255, 0, 102), 16, "RGB"))
    paths = [tmp_path / "b.png", str(tmp_path / "a.png")]
    x, names = read_images(paths, Preparation((8, 8), 3))
    assert x.dtype == torch.float32
    assert x.shape == (2, 3, 8, 8)
    assert names == [str(path) for path in paths]
    assert torch.allclose(x[:, :, 0, 0], torch.tensor([[1, 0, 0.4], [0.2, 0.2, 0.2]]), atol=1e-6)


@pytest.mark.parametrize("content", [None, b"", b"no picture"])
def test_an_image_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None):
    put(tmp_path, "a.png", flat(51, 8))
    if content is not None:
        (tmp_path / "b.png").write_bytes(content)
    with pytest.raises(DataError, match=rf"{re.escape(str(tmp_path))}/b\.png cannot be read as an image"):
        read_images([tmp_path / "a.png", tmp_path / "b.png"], Preparation((8, 8), 1))


# What a review found


def test_sixteen_bits_in_colour_are_skipped_and_named(tmp_path: Path):
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    for i in range(5):
        put(tmp_path, f"{i}.png", texture(i))
    rows = b"".join(b"\0" + np.full((16, 3), 900, ">u2").tobytes() for _ in range(16))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0))
    (tmp_path / "deep.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    ((name, reason),) = intake(load(tmp_path)).skipped
    assert name == "deep.png"
    assert reason.startswith("16 bits in colour")


def test_a_folder_without_a_picture_is_no_class(tmp_path: Path):
    for i in range(6):
        put(tmp_path, f"{['cats', 'dogs'][i % 2]}/{i}.png", texture(i))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "readme.txt").write_text("no picture")
    data = load(tmp_path)
    assert data.class_names == ("cats", "dogs")


def test_a_stray_parquet_file_among_pictures_is_skipped_and_named(tmp_path: Path):
    import pandas as pd

    for i in range(6):
        put(tmp_path, f"{i}.png", texture(i))
    pd.DataFrame({"a": [1.0, 2.0]}).to_parquet(tmp_path / "meta.parquet")
    assert [name for name, _ in intake(load(tmp_path)).skipped] == ["meta.parquet"]


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "x" * 300, "a\0b"])
def test_names_that_cannot_be_paths_are_refused_in_one_line(name: str):
    with pytest.raises(DataError) as caught:
        load_data(name)
    assert "\n" not in str(caught.value)


def test_unusual_pictures_are_named_with_what_was_done(tmp_path: Path):
    for i in range(300):
        put(tmp_path, f"good/{i:03}.jpg", texture(i, 128, 128))
    fate = write_odd_files(tmp_path, texture(1, 64, 64))
    found = dict(intake(load(tmp_path, size=64, channels=1)).converted)
    ordinary = {"odd/UPPER CASE (1) ü.JPG"}
    assert set(found) == {name for name, becomes in fate.items() if becomes == USED} - ordinary
    assert found["odd/wide.png"] == "64 x 20 pixels, pad"
    assert "turned upright" in found["odd/lying.jpg"]
    assert "EXIF data damaged" in found["odd/broken_exif.jpg"]
    assert "CMYK to RGB" in found["odd/print.jpg"]
    assert "through the window" in found["odd/deep.png"]
    assert "first of 2 frames" in found["odd/moving.gif"]


def test_a_hub_name_may_name_a_configuration_and_extra_parts_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[object, ...]] = []

    def stand_in(*words: object, streaming: bool) -> dict[str, object]:
        asked.append(words)
        rows = {"image": [Image.new("L", (8, 8), shade) for shade in (10, 20)], "label": [0, 1]}
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
        part = datasets.Dataset.from_dict(rows, features=features).to_iterable_dataset()
        return {"train": part, "test": part, "extra": part}

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    source = RowSource("owner/name:small", "owner/name:small", DataOptions())
    assert asked == [("owner/name", "small")]
    assert [item.split for item in source.items()] == ["train", "train", "test", "test"]
    assert used_splits({"extra": 1}) == {"extra": 1}
    assert HUB_NAME.fullmatch("owner/name:small")
    assert not HUB_NAME.fullmatch("density:rings")
