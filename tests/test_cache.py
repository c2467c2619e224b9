from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from introvae.data import ArrayData, DataOptions, load_data
from introvae.data import images as images_module
from introvae.data.cache import Writer, cache_bytes, cache_folder, clear_cache
from introvae.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    monkeypatch.setenv("INTROVAE_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO, logger="introvae")
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(12):
        put(tmp_path / "images" / f"{'even' if i % 2 == 0 else 'odd'}/{i:02}.bmp", i)
    (tmp_path / "images/broken.png").write_bytes(b"no picture")
    return tmp_path / "images"


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def refuse(*_: Any) -> None:
        raise AssertionError("decoded though it is in the cache")

    def start() -> None:
        monkeypatch.setattr(images_module, "_decode", refuse)
        monkeypatch.setattr(images_module, "look_through", refuse)

    return start


def put(path: Path, seed: int, side: int = 16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)).save(path)


def load(source: Path, **options: Any) -> ArrayData:
    data = load_data(source, DataOptions(**options))
    assert isinstance(data, ArrayData)
    return data


def entries(cache: Path) -> set[str]:
    return {path.name for path in (cache / "entries").glob("*")}


def assert_same(first: ArrayData, second: ArrayData) -> None:
    assert first.class_names == second.class_names
    assert first.preparation == second.preparation
    assert first.intake == second.intake
    for one, other in ((first.train, second.train), (first.heldout, second.heldout)):
        assert torch.equal(one.x, other.x)
        assert list(one.names) == list(other.names)
        assert (one.labels is None) == (other.labels is None)
        if one.labels is not None and other.labels is not None:
            assert torch.equal(one.labels, other.labels)


# Found again


def test_a_second_start_decodes_nothing_and_gives_the_same(folder: Path, cache: Path, no_decoding: Callable[[], None]):
    first = load(folder)
    assert len(entries(cache)) == 1
    no_decoding()
    assert_same(first, load(folder))
    assert_same(first, load(folder, cache=True))
    assert len(entries(cache)) == 1


def test_the_cache_gives_what_decoding_without_it_gives(folder: Path):
    fresh = load(folder, cache=False)
    assert_same(fresh, load(folder))
    assert_same(fresh, load(folder))


@pytest.mark.parametrize("options", [{"heldout": 0.5}, {"heldout_seed": 3}])
def test_another_held_out_part_needs_no_decoding(
    folder: Path, options: dict[str, Any], no_decoding: Callable[[], None]
):
    fresh = load(folder, cache=False, **options)
    load(folder)
    no_decoding()
    assert_same(fresh, load(folder, **options))


def test_a_copied_folder_is_in_the_cache_already(
    folder: Path, tmp_path: Path, cache: Path, no_decoding: Callable[[], None]
):
    first = load(folder)
    shutil.copytree(folder, tmp_path / "copy")
    no_decoding()
    copy = load(tmp_path / "copy")
    assert copy.name == str(tmp_path / "copy")
    assert_same(first, copy)
    assert len(entries(cache)) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"size": 8},
        {"fit": "crop"},
        {"channels": 3},
        {"window": (1, 99)},
        {"window_of": "file"},
        {"group": r"\d+"},
    ],
    ids=str,
)
def test_other_options_make_another_entry(folder: Path, cache: Path, options: dict[str, Any]):
    first = load(folder)
    other = load(folder, **options)
    assert len(entries(cache)) == 2
    assert_same(other, load(folder, cache=False, **options))
    assert_same(first, load(folder))
    assert len(entries(cache)) == 2


def test_a_models_preparation_makes_another_entry(folder: Path, cache: Path):
    first = load(folder)
    other = load(folder, size=8)
    again = load_data(folder, DataOptions(), other.preparation)  # pyright: ignore
    assert isinstance(again, ArrayData)
    assert again.shape == (1, 8, 8)
    assert torch.equal(again.train.x, other.train.x)
    assert_same(first, load(folder))


# Touched files


def changed(folder: Path) -> None:
    put(folder / "even/00.bmp", 99)


def renamed(folder: Path) -> None:
    (folder / "even/00.bmp").rename(folder / "even/first.bmp")


def moved(folder: Path) -> None:
    (folder / "even/00.bmp").rename(folder / "odd/00.bmp")


def added(folder: Path) -> None:
    put(folder / "even/99.bmp", 99)


def removed(folder: Path) -> None:
    (folder / "even/00.bmp").unlink()


def mended(folder: Path) -> None:
    put(folder / "broken.png", 99)


def rewritten_in_place(folder: Path) -> None:
    path = folder / "even/00.bmp"
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-20, os.SEEK_END)
        file.write(bytes(20))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)


def swapped(folder: Path) -> None:
    one, other, third = (folder / f"even/{name}.bmp" for name in ("00", "02", "x"))
    one.rename(third)
    other.rename(one)
    third.rename(other)


@pytest.mark.parametrize("touch", [changed, renamed, moved, added, removed, mended, rewritten_in_place, swapped])
def test_touched_files_are_noticed(folder: Path, cache: Path, touch: Callable[[Path], None]):
    first = load(folder)
    touch(folder)
    second = load(folder)
    assert len(entries(cache)) == 2
    assert_same(second, load(folder, cache=False))
    assert not torch.equal(first.train.x, second.train.x) or first.train.names != second.train.names


def test_a_file_that_was_only_touched_is_in_the_cache(folder: Path, cache: Path, no_decoding: Callable[[], None]):
    first = load(folder)
    for path in folder.rglob("*.bmp"):
        os.utime(path)
    no_decoding()
    assert_same(first, load(folder))


# Damaged entries


def format_of_another_version(entry: Path) -> None:
    facts = json.loads((entry / "facts.json").read_text())
    (entry / "facts.json").write_text(json.dumps({**facts, "format": facts["format"] + 1}))


def cut_pixels(entry: Path) -> None:
    os.truncate(entry / "pixels.bin", (entry / "pixels.bin").stat().st_size - 1)


def no_pixels(entry: Path) -> None:
    (entry / "pixels.bin").unlink()


def broken_json(entry: Path) -> None:
    (entry / "facts.json").write_text((entry / "facts.json").read_text()[:50])


def binary_json(entry: Path) -> None:
    (entry / "facts.json").write_bytes(b"\xff\xfe\x00")


def other_json(entry: Path) -> None:
    (entry / "facts.json").write_text("[1, 2]")


def no_json(entry: Path) -> None:
    (entry / "facts.json").unlink()


@pytest.mark.parametrize(
    "damage",
    [format_of_another_version, cut_pixels, no_pixels, broken_json, binary_json, other_json, no_json],
)
def test_a_damaged_entry_is_decoded_anew(
    folder: Path, cache: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
):
    first = load(folder)
    (name,) = entries(cache)
    damage(cache / "entries" / name)
    caplog.clear()
    assert_same(first, load(folder))
    assert "decoding anew" in caplog.text
    assert entries(cache) == {name}
    caplog.clear()
    assert_same(first, load(folder))
    assert "decoding anew" not in caplog.text


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"signature": 1}'])
def test_a_damaged_memory_of_the_sources_does_no_harm(folder: Path, cache: Path, content: bytes):
    first = load(folder)
    (memo,) = (cache / "sources").glob("*.json")
    memo.write_bytes(content)
    assert_same(first, load(folder))


# Not kept


def test_without_a_cache_nothing_is_written(folder: Path, cache: Path):
    data = load(folder, cache=False)
    assert data.shape == (1, 16, 16)
    assert not cache.exists()


def test_a_cache_that_cannot_be_made_is_told_and_done_without(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").write_bytes(b"in the way")
    monkeypatch.setenv("INTROVAE_CACHE", str(tmp_path / "file/cache"))
    data = load(folder)
    assert "cannot be written (Not a directory); the images stay in memory" in caplog.text
    assert_same(data, load(folder, cache=False))


def test_a_cache_that_may_not_be_written_is_told_and_done_without(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    mkdir = Path.mkdir

    def refusing(self: Path, *arguments: Any, **options: Any) -> None:
        if cache in (self, *self.parents):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refusing)
    data = load(folder)
    assert "cannot be written (Permission denied); the images stay in memory" in caplog.text
    assert not cache.exists()
    assert_same(data, load(folder, cache=False))


def test_a_disk_without_room_is_told_and_done_without(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    usage = shutil.disk_usage(cache.parent)
    size = 12 * 16 * 16
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(1.1 * size)))
    data = load(folder)
    assert "no cache: 12 images of 1 x 16 x 16" in caplog.text
    assert "stay in memory" in caplog.text
    assert entries(cache) == set()
    assert_same(data, load(folder, cache=False))


def test_a_disk_with_room_is_used(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(cache.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(1.3 * 12 * 16 * 16)))
    load(folder)
    assert len(entries(cache)) == 1


def test_a_disk_that_turns_out_to_be_full_leaves_nothing_behind(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    data = load(folder)
    assert "cannot be written (No space left on device); the images stay in memory" in caplog.text
    assert entries(cache) == set()
    assert_same(data, load(folder, cache=False))


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, DataError])
def test_an_interrupted_decoding_leaves_nothing_behind(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
):
    add = Writer.add

    def failing(self: Writer, image: np.ndarray) -> None:
        if self.count == 5:
            raise kind("stop")
        add(self, image)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "add", failing)
        with pytest.raises(kind, match="stop"):
            load(folder)
    assert entries(cache) == set()
    assert_same(load(folder), load(folder, cache=False))


def test_an_interrupted_finish_leaves_nothing_behind(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    def failing(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("introvae.data.cache.write_atomically", failing)
    monkeypatch.setattr(images_module, "remember_digest", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        load(folder)
    assert entries(cache) == set()


def test_data_without_two_images_leave_nothing_behind(tmp_path: Path, cache: Path):
    put(tmp_path / "few/a.png", 1)
    with pytest.raises(DataError):
        load(tmp_path / "few")
    assert entries(cache) == set()


# What is said, what is freed


def test_the_cost_is_said_before_decoding(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, cache: Path
):
    for i in range(20):
        put(tmp_path / f"images/{i}.png", i, 8)
    said: list[str] = []
    read = images_module.read_item
    monkeypatch.setattr(images_module, "read_item", lambda *a: said.append(caplog.text) or read(*a))
    load(tmp_path / "images", size=256, channels=3)
    assert len(said) == 20
    assert all(f"20 images of 3 x 256 x 256: {20 * 3 * 256 * 256 / 1e6:.0f} MB in {cache}" in text for text in said)


def test_clearing_frees_the_bytes_that_it_says(folder: Path, cache: Path, tmp_path: Path):
    load(folder)
    load(folder, size=32)
    taken = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    assert taken > 12 * (16 * 16 + 32 * 32)
    assert cache_bytes() == taken
    assert clear_cache() == taken
    assert cache_bytes() == 0
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert clear_cache() == 0
    assert len(list(folder.rglob("*.bmp"))) == 12


def test_clearing_leaves_other_files_alone(folder: Path, cache: Path):
    load(folder)
    (cache / "mine.txt").write_text("not the program's")
    assert clear_cache() > 0
    assert cache_bytes() == len("not the program's")


def test_clearing_a_cache_that_is_not_there_frees_nothing(cache: Path):
    assert cache_bytes() == clear_cache() == 0


def test_the_folder_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path):
    assert cache_folder() == cache
    monkeypatch.delenv("INTROVAE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/introvae"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home/.cache/introvae"


# In use


def test_changes_of_loaded_data_stay_in_memory(folder: Path):
    fresh = load(folder, cache=False)
    for _ in range(2):  # decoded, then from the cache
        data = load(folder)
        assert_same(fresh, data)
        data.train.x.zero_()
        data.heldout.x.fill_(7)
        assert data.train.x.sum() == 0
    assert_same(fresh, load(folder))


def test_data_in_use_survive_clearing(folder: Path):
    fresh = load(folder, cache=False)
    load(folder)
    data = load(folder)
    clear_cache()
    assert_same(fresh, data)


def test_parquet_images_that_lie_elsewhere_are_noticed_when_they_change(tmp_path: Path):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        put(path, i)
    images = pa.array(
        [{"bytes": None, "path": str(path)} for path in paths],
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    )
    schema = datasets.Features({"image": datasets.Image()}).arrow_schema
    pq.write_table(pa.table({"image": images}, schema=schema), tmp_path / "x.parquet")
    load(tmp_path / "x.parquet")
    put(paths[0], 99)
    assert_same(load(tmp_path / "x.parquet"), load(tmp_path / "x.parquet", cache=False))


SCRIPT = """
import re, resource, sys
from pathlib import Path
from introvae.data import DataOptions, load_data
data = load_data(sys.argv[1], DataOptions(size=256, channels=3, cache=sys.argv[2] == "True"))
batch = data.batches(64, 0).next("cpu")
status = Path("/proc/self/status")  # a child's ru_maxrss may start from its parent's
found = re.search(r"VmHWM:\\s+(\\d+)", status.read_text()) if status.exists() else None
peak = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(data.train.x.numel() + data.heldout.x.numel(), peak * 1024)
"""


@pytest.mark.parametrize("kept", [True, False])
def test_memory_stays_near_the_size_of_the_data(tmp_path: Path, kept: bool):
    (tmp_path / "many").mkdir()
    for i in range(1000):
        Image.new("RGB", (8, 8), (i % 256, i // 256, 90)).save(tmp_path / f"many/{i:04}.png")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "many"), str(kept)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    size, peak = map(int, done.stdout.split())
    assert size == 1000 * 3 * 256 * 256
    assert peak < 1.5 * size + 2**30


def test_a_cache_that_is_cleared_while_images_are_decoded_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for i in range(5):
        put(tmp_path / "pictures" / f"{i}.png", i)
    wanted = load(tmp_path / "pictures", cache=False)
    add = Writer.add

    def clear_and_add(self: Writer, image: Any) -> None:
        clear_cache()
        add(self, image)

    monkeypatch.setattr(Writer, "add", clear_and_add)
    assert_same(load(tmp_path / "pictures"), wanted)
