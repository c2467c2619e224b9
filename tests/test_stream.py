"""Streams: every image once an epoch, in another order each time, resumed exactly, in bounded memory."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from introvae import ConfigError, DataError, DataOptions, fit, load_data
from introvae.data import cache as cache_module
from introvae.data import downloads as downloads_module
from introvae.data import opening as opening_module
from introvae.data import pictures as pictures_module
from introvae.data import row_groups as row_groups_module
from introvae.data import stream as stream_module
from introvae.data.arrays import ArrayData, Batches
from introvae.data.order import Order
from introvae.data.row_groups import ParquetShards, hub_shards, parquet_shards
from introvae.data.rows import ParquetSource, RowSource
from introvae.data.shards import NEVER, FolderShards, mixed
from introvae.data.stream import StreamBatches, StreamData, StreamedPart
from introvae.machine import local_processes
from introvae.training.feed import Feed

SIDE, BATCH = 8, 48
KINDS = ("parquet", "folder")


def picture(number: int) -> bytes:
    """A portable grey map whose first three pixels are its number."""
    pixels = np.full(SIDE * SIDE, number % 251, np.uint8)
    pixels[:3] = number >> 16, number >> 8 & 255, number & 255
    return b"P5 8 8 255\n" + pixels.tobytes()


def numbers(x: Tensor) -> list[int]:
    """The numbers of images `[N, 1, 8, 8]`."""
    first = x.flatten(1)[:, :3].long()
    return (first[:, 0] * 65536 + first[:, 1] * 256 + first[:, 2]).tolist()


def write_parquet(path: Path, contents: list[bytes | None], rows: int = 40, **columns: list[Any]) -> Path:
    """Images in a column, as Hugging Face writes them, in row groups of some rows."""
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    image = pa.array(
        [{"bytes": content, "path": None} for content in contents],
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    )
    kinds = {name: datasets.Value("int64" if isinstance(c[0], int) else "string") for name, c in columns.items()}
    schema = datasets.Features({"image": datasets.Image(), **kinds}).arrow_schema
    pq.write_table(pa.table({"image": image, **columns}, schema=schema), path, row_group_size=rows)
    return path


def write_source(kind: str, folder: Path, count: int = 1000) -> Path:
    """`count` numbered pictures, in three shards or three folders; their class is their place there."""
    for part, some in enumerate(np.array_split(np.arange(count), 3)):
        if kind == "parquet":
            contents: list[bytes | None] = [picture(number) for number in some.tolist()]
            write_parquet(folder / f"{part}.parquet", contents, label=[f"class{part}"] * len(some))
            continue
        (folder / f"class{part}").mkdir(parents=True)
        for number in some.tolist():
            (folder / f"class{part}" / f"{number:06d}.pgm").write_bytes(picture(number))
    return folder


@pytest.fixture(params=KINDS)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_source(request.param, tmp_path / request.param)


def stream(source: str | Path, **options: Any) -> StreamData:
    data = load_data(source, DataOptions(**{"stream": "always", "stream_buffer": 150, **options}))
    assert isinstance(data, StreamData)
    return data


def part(data: StreamData) -> StreamedPart:
    assert isinstance(data.train, StreamedPart)
    return data.train


def batches(data: StreamData, seed: int = 3, size: int = BATCH) -> StreamBatches:
    found = data.batches(size, seed)
    assert isinstance(found, StreamBatches)
    return found


def epoch(stream: Batches, data: StreamData, share: slice = slice(None)) -> list[int]:
    """The numbers of the images of an epoch, in their order."""
    steps = data.steps_per_epoch(stream.batch_size)
    return [number for _ in range(steps) for number in numbers(stream.stored(share))]


# --- the order


def rows_of(order: Order, number: int, start: int = 0, stop: int | None = None) -> list[int]:
    pieces = order.pieces(number, start, len(order) if stop is None else stop)
    return [row for piece in pieces for row in piece.rows.tolist()]


@pytest.mark.parametrize("sizes", [[7, 1, 30, 12, 12, 12, 3, 25], [1] * 100, [100]])
def test_an_order_gives_every_row_once_and_none_that_is_left_out(sizes: list[int]) -> None:
    starts = np.cumsum([0, *sizes])
    count = int(starts[-1])
    left_out = np.array([0, 5, 6, 40, count - 1])
    order = Order(starts, range(count), left_out, seed=1, buffer=20)
    wanted = sorted(set(range(count)) - set(left_out.tolist()))
    found = [rows_of(order, number) for number in range(4)]
    assert all(sorted(rows) == wanted for rows in found)
    assert len(order) == len(wanted)
    assert len({tuple(rows) for rows in found}) == 4
    assert rows_of(Order(starts, range(count), left_out, seed=2, buffer=20), 0) != found[0]


def test_an_order_is_a_function_of_epoch_and_position() -> None:
    starts = np.cumsum([0, *[13] * 40])
    arguments = (starts, range(int(starts[-1])), np.array([3, 50, 77]), 5, 60)
    order = Order(*arguments)
    found = {number: rows_of(order, number) for number in range(3)}
    for number, start, stop in [(2, 500, 517), (0, 3, 90), (1, 59, 61), (2, 0, 1), (0, 0, 517)]:
        assert rows_of(order, number, start, stop) == found[number][start:stop]
        assert rows_of(Order(*arguments), number, start, stop) == found[number][start:stop]


def test_an_order_mixes_blocks_and_keeps_to_its_buffer() -> None:
    starts = np.arange(0, 1001, 10)
    order = Order(starts, range(1000), np.empty(0, np.int64), seed=0, buffer=100)
    blocks = [order.blocks(0, window) for window in range(order.windows(0))]
    assert sorted(np.concatenate(blocks).tolist()) == list(range(100))
    assert all(len(some) == 10 for some in blocks)
    rows = np.array(rows_of(order, 0))
    for window, some in enumerate(blocks):
        assert set(rows[window * 100 : (window + 1) * 100] // 10) == set(some.tolist())
        assert len(set((rows[window * 100 : window * 100 + 10] // 10).tolist())) > 3  # of several blocks, not one
    assert np.abs(np.corrcoef(rows, np.arange(1000))[0, 1]) < 0.2


def test_an_order_of_some_blocks_gives_out_their_rows() -> None:
    order = Order(np.array([0, 10, 20, 30, 40]), range(10, 30), np.array([12, 29]), seed=0, buffer=5)
    assert sorted(rows_of(order, 0)) == [10, 11, *range(13, 29)]
    assert sorted(block for window in range(order.windows(0)) for block in order.blocks(0, window)) == [1, 2]


def test_keys_are_spread_evenly_and_one_to_one() -> None:
    keys = mixed(np.arange(100_000), seed=0)
    assert len(np.unique(keys)) == 100_000
    assert np.histogram(keys, bins=10, range=(0, 2.0**64))[0].min() > 9_600
    assert not np.array_equal(keys, mixed(np.arange(100_000), seed=1))


# --- every image once, with its class, never a held-out one


def test_an_epoch_has_every_image_once_and_the_next_in_another_order(source: Path) -> None:
    data = stream(source)
    assert (len(data.train), len(data.heldout), data.shape) == (900, 100, (1, SIDE, SIDE))
    loader = batches(data, size=45)
    held = numbers(data.heldout.x)
    assert len(set(held)) == 100
    first, second = epoch(loader, data), epoch(loader, data)
    for found in (first, second):
        assert sorted([*found, *held]) == list(range(1000))
    assert first != second
    assert first == epoch(batches(data, size=45), data)
    assert first != epoch(batches(data, seed=4, size=45), data)
    assert np.abs(np.corrcoef(first, np.arange(900))[0, 1]) < 0.35  # three shards' order, mixed within 150 images


def test_an_unfinished_batch_ends_an_epoch(source: Path) -> None:
    data = stream(source)
    loader = batches(data)
    assert data.steps_per_epoch(BATCH) == 18
    assert len(set(epoch(loader, data))) == 18 * BATCH
    assert loader.state_dict()["epoch"] == 0
    loader.stored()
    assert (loader.epoch, loader.position) == (1, BATCH)


def test_a_stream_holds_the_images_of_the_cache_with_their_classes(source: Path) -> None:
    kept = load_data(source, DataOptions(stream="never", size=4, cache=False))
    data = stream(source, size=4)
    assert isinstance(kept, ArrayData)
    assert kept.class_names == data.class_names == ("class0", "class1", "class2")
    assert kept.preparation == data.preparation
    expected = {}
    for one in (kept.train, kept.heldout):
        assert one.labels is not None
        for name, x, label in zip(one.names, one.x, one.labels.tolist(), strict=True):
            expected[name.split("/")[-1]] = (x, label)
    whole = part(data)[slice(None)]
    assert whole.labels is not None
    assert len(whole) == 900
    for name, x, label in zip(whole.names, whole.x, whole.labels.tolist(), strict=True):
        assert torch.equal(x, expected[name.split("/")[-1]][0])
        assert label == expected[name.split("/")[-1]][1]


def test_labels_come_with_the_batches(source: Path) -> None:
    data = stream(source)
    x, labels = batches(data).labelled()
    assert labels.tolist() == [next(c for c in range(3) if n < (334, 667, 1000)[c]) for n in numbers(x)]


def test_whole_numbers_as_labels_stay(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [picture(n) for n in range(200)], label=[n % 7 for n in range(200)])
    x, labels = batches(stream(tmp_path)).labelled()
    assert labels.tolist() == [n % 7 for n in numbers(x)]
    assert stream(tmp_path, label="none").heldout.labels is None


def test_whole_numbers_name_all_classes_also_one_that_is_not_held_out(tmp_path: Path) -> None:
    labels = [9 if n == 199 else n % 3 for n in range(200)]
    write_parquet(tmp_path / "a.parquet", [picture(n) for n in range(200)], label=labels)
    data = stream(tmp_path)
    assert data.heldout.labels is not None
    assert data.heldout.labels.max() < 9
    assert data.class_names == tuple("0123456789")
    write_parquet(tmp_path / "a.parquet", [picture(n) for n in range(200)], label=[n + 10**6 for n in range(200)])
    assert stream(tmp_path).class_names == ()


def trained_on(data: StreamData) -> Counter[int]:
    """How often each class comes in an epoch, by decoding it."""
    labels = part(data)[slice(None)].labels
    assert labels is not None
    return Counter(labels.tolist())


def test_classes_are_counted_in_the_training_part(source: Path) -> None:
    """Three classes of about 333 pictures, of which few are held out."""
    data = stream(source, heldout=0.02)
    found = part(data).occurrences()
    assert found == trained_on(data)
    assert set(found or {}) == {0, 1, 2}
    assert sum((found or {}).values()) == len(data.train) == 980
    if source.name != "folder":
        assert part(stream(source, label="none")).occurrences() is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_test_part_s_classes_do_not_count(kind: str, tmp_path: Path) -> None:
    classes = {"train": [n % 9 // 4 for n in range(90)], "test": [1] * 30}
    for split, labels in classes.items():
        contents: list[bytes | None] = [picture(n) for n in range(len(labels))]
        if kind == "parquet":
            write_parquet(tmp_path / f"images/{split}.parquet", contents, rows=7, label=labels)
            continue
        for number, label in enumerate(labels):
            path = tmp_path / f"images/{split}/{label}/{'inner/' * (number % 2)}{number}.pgm"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(number))
    assert part(stream(tmp_path / "images")).occurrences() == {0: 40, 1: 40, 2: 10}


def test_classes_are_counted_without_opening_a_picture(tmp_path: Path) -> None:
    folder = write_source("folder", tmp_path / "images", 300)
    shards = FolderShards(folder, DataOptions())
    for file in folder.rglob("*.pgm"):
        file.unlink()
    assert shards.occurrences(range(300), np.array([0, 1, 250])) == {0: 98, 1: 100, 2: 99}


@pytest.mark.parametrize("labels", [["cat", None, "dog"], [4, None, 0]])
def test_the_label_column_is_read_once_and_alone(
    labels: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "a.parquet", [picture(n) for n in range(300)], rows=30, label=labels * 100)
    shards = part(stream(path)).pictures.shards
    again = ParquetShards("again", {"train": [str(path)]}, lambda: shards.rows)  # pyright: ignore
    asked: list[tuple[int, list[str]]] = []
    read = pq.ParquetFile.read_row_group

    def noted(self: Any, group: int, columns: list[str], **options: Any) -> Any:
        asked.append((group, columns))
        return read(self, group, columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", noted)
    names = {str: ("cat", "dog"), int: tuple("01234")}[type(labels[0])]
    assert again.class_names == names
    index = {label: (names.index(label) if isinstance(label, str) else label) for label in labels if label is not None}
    for _ in range(2):
        found = again.occurrences(range(30, 300), np.array([30, 40, 299]))
        assert found == {-1: 90 - 1, **{i: 90 - (labels.index(label) in (0, 2)) for label, i in index.items()}}
    assert asked == [(group, ["label"]) for group in range(10)]


def test_a_label_column_of_categories_has_their_names(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [picture(n) for n in range(100)], rows=30)
    labels = pa.array(["dog", "cat", None, "cat"] * 25).dictionary_encode()
    pq.write_table(pq.read_table(path).append_column("label", labels), path, row_group_size=30)
    shards = parquet_shards(ParquetSource(path, DataOptions()))
    assert shards.class_names == ("cat", "dog")
    assert shards.occurrences(range(100), np.array([0])) == {-1: 25, 0: 50, 1: 24}


def test_labels_that_are_no_classes_take_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_groups_module, "MOST_CLASSES", 20)
    contents: list[bytes | None] = [picture(n) for n in range(200)]
    for labels in ([f"file {n}" for n in range(200)], [n * 10**6 for n in range(200)]):
        data = stream(write_parquet(tmp_path / "a.parquet", contents, label=labels))
        shards = part(data).pictures.shards
        assert isinstance(shards, ParquetShards)
        assert data.class_names == ()
        assert len(shards._labels.values) <= 24
    assert max(part(data).occurrences() or {}) == 20


# --- several processes, resuming


def counted(pictures: pictures_module.Pictures, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that are decoded from here on."""
    rows: list[int] = []
    decode = pictures.decode
    monkeypatch.setattr(pictures, "decode", lambda row, find: rows.append(row) or decode(row, find))
    return rows


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_a_stream_without_overlap_and_decode_their_own_alone(
    source: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, size = stream(source), BATCH // processes
    whole = batches(data)
    expected = [numbers(whole.stored()) for _ in range(25)]
    for rank in range(processes):
        own = stream(source)
        decoded = counted(part(own).pictures, monkeypatch)
        loader, share = batches(own), slice(rank * size, (rank + 1) * size)
        for batch in expected:
            assert numbers(loader.stored(share)) == batch[share]
        part(own).pictures.pool.shutdown()
        assert 25 * size <= len(decoded) <= (25 + stream_module.AHEAD) * size


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_keep_their_rows_of_a_window_alone(tmp_path: Path, processes: int) -> None:
    source, size = write_source("parquet", tmp_path / "images", 1000), BATCH // processes
    kept: list[set[int]] = []
    data = stream(source)
    loader = batches(data)
    for rank in range(processes):
        loader = batches(data)
        for _ in range(5):
            loader.stored(slice(rank * size, (rank + 1) * size))
        kept.append(set())
        for place, window in loader._windows.items():
            for row in loader.order.rows(*place).tolist():
                with suppress(KeyError):
                    assert window.result()(row).content == picture(row)
                    kept[-1].add(row)
    rows = [row for place in loader._windows for row in loader.order.rows(*place).tolist()]
    assert sorted(row for some in kept for row in some) == sorted(rows)
    assert max(len(some) for some in kept) <= len(rows) / processes + BATCH / processes


def test_shares_are_found_where_sizes_change_and_where_a_stream_goes_on(tmp_path: Path) -> None:
    """A process keeps the right rows, from the midst of an epoch too: none has to be read by itself."""
    source = write_source("parquet", tmp_path / "images", 1000)
    alone: list[int] = []

    def given_out(process: int | None) -> Iterator[tuple[int, list[int]]]:
        loader = batches(stream(source))
        shards = loader.part.pictures.shards
        fetch = shards.fetch

        def noted(blocks: Any, rows: np.ndarray | None = None) -> Any:
            if rows is not None and len(blocks) == len(rows) == 1:
                alone.append(int(rows[0]))
            return fetch(blocks, rows)

        shards.fetch = noted
        for size, count in ((48, 3), (20, 4), (64, 30), (36, 3)):
            loader.batch_size = size
            share = slice(None) if process is None else slice(process * size // 2, (process + 1) * size // 2)
            for _ in range(count):
                yield size, numbers(loader.stored(share))
            state = loader.state_dict()
            loader.stored(share)
            loader.load_state_dict(state)

    for (size, whole), first, second in zip(*map(given_out, (None, 0, 1)), strict=True):
        assert len(whole) == size
        assert first[1] + second[1] == whole
    assert alone == []


def test_a_stream_goes_on_from_any_point(source: Path) -> None:
    data = stream(source)
    loader = batches(data)
    states, expected = [], []
    for _ in range(45):  # two epochs and a half, several windows each
        states.append(loader.state_dict())
        expected.append(numbers(loader.stored()))
    for point in (0, 1, 17, 18, 19, 30, 41):
        file = io.BytesIO()
        torch.save(states[point], file)
        file.seek(0)
        other = batches(stream(source), seed=3)
        other.stored()
        other.load_state_dict(torch.load(file, weights_only=True))
        steps = 45 if point == 17 else 4  # from the last batch of an epoch through the next one
        assert [numbers(other.stored()) for _ in range(min(steps, 45 - point))] == expected[point : point + steps]
    assert {key for state in states for key in state} == {"epoch", "position", "data"}


def test_the_loop_s_feed_reads_a_stream_ahead_and_resumes_it(source: Path) -> None:
    data = stream(source)

    def feed() -> Feed:
        return Feed(batches(data), 2, 7, torch.device("cpu"), slice(0, BATCH))

    plain = feed()
    expected = [plain.next().x for _ in range(25)]
    with feed() as threaded:
        for done in range(1, 20):
            assert torch.equal(threaded.next().x, expected[done - 1])
            if done in (3, 17, 19):
                other = feed()
                other.load_state_dict(threaded.state_dict())
                assert torch.equal(other.next().x, expected[done])
    assert torch.equal(feed().next().x, expected[0])


def test_batches_may_change_their_size(source: Path) -> None:
    data = stream(source)
    loader, order = batches(data), part(data).order(3)
    rows = rows_of(order, 0)
    whole = dict(zip(rows, numbers(data.train[torch.tensor([_index(data, row) for row in rows])].x), strict=True))
    found = []
    for size in (48, 48, 20, 20, 64):
        loader.batch_size = size
        found += numbers(loader.stored())
    assert found == [whole[row] for row in rows[:200]]


def _index(data: StreamData, row: int) -> int:
    return row - int(np.searchsorted(part(data).left_out, row))


def test_other_data_s_states_are_refused(source: Path, tmp_path: Path) -> None:
    state = batches(stream(source)).state_dict()
    with pytest.raises(DataError, match="not the ones"):
        batches(stream(source, stream_buffer=40)).load_state_dict({**state, "data": [1, 2, 3]})
    other = stream(write_source("parquet", tmp_path / "other", 990))
    with pytest.raises(DataError, match="not the ones"):
        batches(other).load_state_dict(state)


def test_threads_end_with_their_data(source: Path) -> None:
    before = set(threading.enumerate())
    data = stream(source)
    loader = batches(data)
    loader.stored()
    new = set(threading.enumerate()) - before
    assert new
    del data, loader
    for thread in new:
        thread.join(5)
    assert not [thread for thread in new if thread.is_alive()]


# --- what is held out


def test_the_held_out_part_depends_on_its_seed_alone(source: Path) -> None:
    held = [set(numbers(stream(source, heldout_seed=seed).heldout.x)) for seed in (0, 0, 1)]
    assert held[0] == held[1] != held[2]
    assert len(set(numbers(stream(source, heldout=0.3).heldout.x))) == 300


def test_held_out_files_stay_held_out_when_others_come(tmp_path: Path) -> None:
    folder = write_source("folder", tmp_path / "images", 300)
    before = set(numbers(stream(folder, heldout=0.2).heldout.x))
    for number in range(300, 330):
        (folder / "class1" / f"{number:06d}.pgm").write_bytes(picture(number))
    after = set(numbers(stream(folder, heldout=0.2).heldout.x))
    assert len(before & after) > 50  # of 60; a fresh draw would keep 11
    assert after & set(range(300, 330))


def test_a_test_part_is_the_held_out_part(tmp_path: Path) -> None:
    write_parquet(tmp_path / "p/test.parquet", [picture(n) for n in range(500, 560)])
    write_parquet(tmp_path / "p/train-0.parquet", [picture(n) for n in range(200)])
    for split, some in (("train", range(200)), ("test", range(500, 560))):
        for number in some:
            path = tmp_path / f"f/{split}/c{number % 2}/{number}.pgm"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(number))
    for name in "pf":
        data = stream(tmp_path / name)
        assert data.own_parts
        assert sorted(numbers(data.heldout.x)) == list(range(500, 560))
        assert sorted(epoch(batches(data, size=50), data)) == list(range(200))
    assert stream(tmp_path / "f").class_names == ("c0", "c1")


def test_the_held_out_part_is_bounded(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening_module, "HELDOUT_BYTES", 10 * SIDE * SIDE)
    data = stream(source)
    assert (len(data.train), len(data.heldout)) == (990, 10)


def test_few_row_groups_hold_the_held_out_rows(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [picture(n) for n in range(4000)], rows=10)
    data = stream(path, heldout=0.01)
    groups = {number // 10 for number in numbers(data.heldout.x)}
    assert len(data.heldout) == 40
    assert 20 < len(groups) <= 64
    assert max(groups) > 300
    assert len(set(epoch(batches(data, size=40), data)) & set(numbers(data.heldout.x))) == 0


def test_groups_stay_together(tmp_path: Path) -> None:
    people = [f"person{n // 9}" for n in range(360)]
    write_parquet(tmp_path / "p/a.parquet", [picture(n) for n in range(360)], who=people)
    for number in range(360):
        (tmp_path / "f").mkdir(exist_ok=True)
        (tmp_path / f"f/{number // 9}_{number}.pgm").write_bytes(picture(number))
    for name, group in (("p", "who"), ("f", r"^(\d+)_")):
        data = stream(tmp_path / name, group=group)
        held, trained = set(numbers(data.heldout.x)), set(epoch(batches(data, size=4), data))
        assert not {n // 9 for n in held} & {n // 9 for n in trained}
        assert 30 <= len(held) <= 45
        assert held | trained == set(range(360))
    with pytest.raises(ConfigError, match="matches no file name"):
        stream(tmp_path / "f", group="nobody")
    with pytest.raises(ConfigError, match="no regular expression"):
        stream(tmp_path / "f", group="(")
    with pytest.raises(ConfigError, match="no column"):
        stream(tmp_path / "p", group="nobody")
    with pytest.raises(DataError, match="one group"):
        stream(tmp_path / "f", group=r"()_")


# --- what cannot be read


def broken(kind: str, folder: Path, bad: set[int]) -> Path:
    contents = [b"no picture" if n in bad else picture(n) for n in range(400)]
    if kind == "parquet":
        return write_parquet(folder / "a.parquet", [None if n % 2 and n in bad else c for n, c in enumerate(contents)])
    folder.mkdir()
    for number, content in enumerate(contents):
        (folder / f"{number:03d}.pgm").write_bytes(content)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_takes_the_place_of_a_broken_picture(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = {0, 7, 8, 9, 120, 121, 399}
    path = broken(kind, tmp_path / "images", bad)
    caplog.set_level(logging.INFO, logger="introvae")
    data = stream(path)
    assert not set(numbers(data.heldout.x)) & bad
    train = part(data)
    left_out = set(train.left_out.tolist())
    rows = [row for row in range(400) if row not in left_out]
    following = {row: next((r for r in [*rows, *rows] if r not in bad and r >= row), rows[1]) for row in rows}
    assert numbers(train[slice(None)].x) == [following[row] for row in rows]
    loader = batches(data, size=30)
    expected = rows_of(loader.order, 0)[:360]
    found = [numbers(loader.stored()) for _ in range(12)]
    for number, row in zip([n for batch in found for n in batch], expected, strict=True):
        assert number == row or (row in bad and number in set(rows) - bad)
    own = batches(stream(path), size=30)
    assert [numbers(own.stored(slice(10, 20))) for _ in range(12)] == [batch[10:20] for batch in found]
    assert train.pictures.unreadable == len(data.skipped) == len(bad)
    assert set(data.skipped.values()) == (
        {"no image that Pillow can read", "no image"} if kind == "parquet" else {"no image that Pillow can read"}
    )
    said = [record.message for record in caplog.records if record.message.startswith("skipped  ")]
    assert len(bad) <= len(said) <= 2 * len(bad)  # once by each loader that meets it


def test_a_broken_row_group_is_passed_over(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [picture(n) for n in range(400)])
    data = stream(path)
    chunk = pq.read_metadata(path).row_group(3).column(0)
    with path.open("r+b") as file:
        file.seek(chunk.data_page_offset)
        file.write(b"\xff" * 200)
    loader = batches(data, size=40)
    found = {number for _ in range(9) for number in numbers(loader.stored())}
    assert not found & set(range(120, 160))
    assert len(found) > 300
    assert any("its row group cannot be read" in reason for reason in data.skipped.values())


def test_no_picture_takes_all_places_of_a_broken_row_group(tmp_path: Path) -> None:
    contents: list[bytes | None] = [b"no picture" if 120 <= number < 160 else picture(number) for number in range(400)]
    loader = batches(stream(write_parquet(tmp_path / "a.parquet", contents)), size=40)
    found = Counter(number for _ in range(9) for number in numbers(loader.stored()))
    assert found.total() == 360
    assert max(found.values()) <= 6  # the places are about 36


def test_data_without_a_readable_picture_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no two readable images"):
        stream(broken("folder", tmp_path / "none", set(range(400))))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no two readable images"):
        stream(tmp_path / "empty")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        stream(tmp_path / "cut.parquet")
    folder = broken("folder", tmp_path / "vanished", set())
    data = stream(folder)
    for file in folder.glob("*.pgm"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="no picture can be read any more"):
        batches(data).stored()
    monkeypatch.setattr(pictures_module, "PATIENCE", 3)
    with pytest.raises(DataError, match="no picture can be read any more"):
        batches(data).stored()


def test_files_that_are_no_images_are_left_out_and_said(tmp_path: Path) -> None:
    folder = write_source("folder", tmp_path / "images", 60)
    (folder / "notes.txt").write_text("hello")
    (folder / ".hidden.pgm").write_bytes(picture(999))
    (folder / "class1" / "loop").symlink_to(folder)
    data = stream(folder)
    assert data.intake is not None
    assert (data.intake.found, data.intake.used) == (60, 60)
    assert any("1 files are not used" in remark for remark in data.intake.remarks)
    (folder / "scan.nii.gz").write_bytes(b"")
    with pytest.raises(DataError, match="scans"):
        stream(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_are_not_opened(tmp_path: Path) -> None:
    folder = broken("folder", tmp_path / "images", set())
    os.mkfifo(folder / "pipe.png")
    assert len(FolderShards(folder, DataOptions()).starts) == 401
    assert "1 files are not used" in " ".join(FolderShards(folder, DataOptions()).remarks())


def test_names_that_are_no_text_can_be_read(tmp_path: Path) -> None:
    for number in range(20):
        with open(bytes(tmp_path) + b"/\xff%d.pgm" % number, "wb") as file:
            file.write(picture(number))
    data = stream(tmp_path)
    assert sorted(numbers(part(data)[slice(None)].x) + numbers(data.heldout.x)) == list(range(20))


# --- preparation


def test_deep_pictures_get_their_window_from_a_sample(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(40):
        values = rng.integers(1000, 30_000, (16, 16)).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / f"{number}.png")
    kept = load_data(tmp_path, DataOptions(stream="never", cache=False))
    data = stream(tmp_path)
    assert isinstance(kept, ArrayData)
    assert data.preparation == kept.preparation
    again = load_data(tmp_path, DataOptions(stream="always", size=8), kept.preparation)  # pyright: ignore
    assert again.shape == (1, 16, 16)


@pytest.mark.parametrize("fit_as", ["pad", "crop", "stretch"])
def test_pictures_are_fitted_as_in_the_cache(tmp_path: Path, fit_as: str) -> None:
    rng = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(rng.integers(0, 256, (20, 31, 3), dtype=np.uint8)).save(tmp_path / f"{number:02}.png")
    kept = load_data(tmp_path, DataOptions(stream="never", size=16, fit=fit_as, cache=False))
    data = stream(tmp_path, size=16, fit=fit_as)
    assert isinstance(kept, ArrayData)
    images = {name: x for one in (kept.train, kept.heldout) for name, x in zip(one.names, one.x, strict=True)}
    found = part(data)[slice(None)]
    assert len(found) == 11
    assert all(torch.equal(x, images[name]) for name, x in zip(found.names, found.x, strict=True))
    assert any("12 of 12 pictures (31 x 20)" in remark for remark in (data.intake and data.intake.remarks) or ())


# --- rows that are asked for


def test_rows_are_read_when_asked_for(source: Path) -> None:
    data = stream(source)
    train, held = part(data), set(numbers(data.heldout.x))
    trained = [number for number in range(1000) if number not in held]
    rows = torch.tensor([5, 899, 0, 5, 450])
    assert numbers(train[rows].x) == [trained[row] for row in rows.tolist()]
    assert numbers(train[slice(10, 40, 3)].x) == trained[10:40:3]
    assert len(train[:0]) == 0
    some = train.some(100, torch.Generator().manual_seed(0))
    assert len(set(numbers(some.x)) - held) == 100
    assert numbers(some.x) == numbers(train.some(100, torch.Generator().manual_seed(0)).x)
    assert train.x.shape == (900, 1, SIDE, SIDE)
    assert train.x[0].numel() == SIDE * SIDE
    assert data.whole() is data.heldout
    with pytest.raises(DataError, match="do not fit the memory"):
        train.tensor()
    with pytest.raises(ConfigError, match="exceeds the 900 training samples"):
        data.batches(901, 0)


# --- when a stream is chosen


def test_what_fits_the_cache_is_not_streamed(source: Path) -> None:
    for setting in ("auto", "never"):
        assert not isinstance(load_data(source, DataOptions(stream=setting, cache=False)), StreamData)


def test_what_does_not_is(source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="introvae")
    monkeypatch.setattr(opening_module, "affordable_bytes", lambda _: 1000 * SIDE * SIDE)
    assert not isinstance(load_data(source, DataOptions(cache=False)), StreamData)
    monkeypatch.setattr(opening_module, "affordable_bytes", lambda _: 1000 * SIDE * SIDE - 1)
    assert isinstance(load_data(source, DataOptions()), StreamData)
    assert "stream   1,000 images of 1 x 8 x 8: 0 MB if they were kept decoded" in caplog.text
    assert not isinstance(load_data(source, DataOptions(stream="never", cache=False)), StreamData)


class Memory(NamedTuple):
    """What psutil says of it."""

    total: int
    available: int


def test_the_share_of_disk_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTROVAE_CACHE", str(tmp_path))
    usage = cache_module.shutil.disk_usage("/")
    for free, memory, most in ((100, 10, 5), (8, 100, 2), (1, 1, 1)):
        monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _, free=free: usage._replace(free=free * 2**30))
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: Memory(memory * 2**30, 0))
        assert cache_module.affordable_bytes() == most * 2**30


def test_what_was_kept_is_not_streamed_at_the_second_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = cache_module.shutil.disk_usage("/")
    monkeypatch.setenv("INTROVAE_CACHE", str(tmp_path))
    monkeypatch.setattr(cache_module, "SMALL", 0)
    for kept in (0, 900):
        (tmp_path / "pixels.bin").write_bytes(bytes(kept))
        monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _, kept=kept: usage._replace(free=4000 - kept))
        assert cache_module.affordable_bytes() == 1000


@pytest.mark.parametrize("kept", [True, False])
def test_what_fits_nowhere_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    folder = write_source("folder", tmp_path / "images", 30)
    usage = cache_module.shutil.disk_usage("/")
    monkeypatch.setenv("INTROVAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: usage._replace(free=0))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(2**30, 30 * SIDE * SIDE))
    with pytest.raises(DataError, match=r"no room for 30 images of 1 x 8 x 8: 0 MB decoded.*--stream always"):
        load_data(folder, DataOptions(cache=kept))


def test_streaming_changes_no_entry_of_the_cache() -> None:
    assert DataOptions(stream="never", stream_buffer=7).of_data() == DataOptions().of_data()
    with pytest.raises(ConfigError, match="choose one of auto, always, never"):
        DataOptions(stream="yes")
    with pytest.raises(ConfigError, match="stream_buffer"):
        DataOptions(stream_buffer=0)


def test_a_row_group_that_fills_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", [picture(n) for n in range(100)], rows=100)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(10_000, 10_000))
    with pytest.raises(DataError, match="row group of 0 MB, which must be read at once"):
        stream(path)


def launch(monkeypatch: pytest.MonkeyPatch, **words: str) -> None:
    """Let this process look as one of several that torchrun started."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", **words}.items():
        monkeypatch.setenv(name, value)


def test_processes_of_one_machine_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert local_processes() == 1
    launch(monkeypatch, WORLD_SIZE="8", LOCAL_WORLD_SIZE="4")
    assert local_processes() == 4
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert local_processes() == 8
    monkeypatch.delenv("MASTER_ADDR")  # a batch system's own
    assert local_processes() == 1


def test_processes_share_the_machine_s_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", [picture(n) for n in range(100)], rows=100)
    size = int(pq.read_metadata(path).row_group(0).total_byte_size)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(25 * size, 25 * size))
    alone = part(stream(path))
    launch(monkeypatch, WORLD_SIZE="2")
    together = part(stream(path))
    assert (alone.buffer, alone.fingerprint()) == (together.buffer, together.fingerprint())
    launch(monkeypatch, WORLD_SIZE="3")
    with pytest.raises(DataError, match="row group of 0 MB, which must be read at once"):
        stream(path)


def test_what_is_not_cached_is_in_memory_once_for_each_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(40 * 2**30, 40 * 2**30))
    usage = cache_module.shutil.disk_usage("/")
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: usage._replace(free=8 * 2**30))
    monkeypatch.setenv("INTROVAE_CACHE", str(tmp_path))
    assert [cache_module.affordable_bytes(cached) for cached in (True, False)] == [2 * 2**30, 20 * 2**30]
    launch(monkeypatch, WORLD_SIZE="4")
    assert [cache_module.affordable_bytes(cached) for cached in (True, False)] == [2 * 2**30, 5 * 2**30]
    shape, free = (100, 1, 8, 8), int(1.2 * 6400)
    for rank, copies in (("0", 4), ("1", 3)):  # the first one has its own when the others come
        launch(monkeypatch, LOCAL_RANK=rank)
        monkeypatch.setattr(psutil, "virtual_memory", lambda copies=copies: Memory(0, copies * free))
        assert cache_module.Writer(None, shape).x.shape == shape
        monkeypatch.setattr(psutil, "virtual_memory", lambda copies=copies: Memory(0, copies * free - copies))
        with pytest.raises(DataError, match=f"memory are free for each of {copies} processes: take --stream always"):
            cache_module.Writer(None, shape)


def test_the_buffer_is_bounded_by_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", [picture(n) for n in range(1000)])
    assert part(stream(path, stream_buffer=500)).buffer == 500
    monkeypatch.setattr(opening_module, "WINDOW_BYTES", 10_000)
    assert 50 < part(stream(path, stream_buffer=500)).buffer < 200


# --- addresses


@pytest.fixture
def remote() -> Iterator[Callable[[str, Path], str]]:
    """Put a file where only fsspec finds it."""
    import fsspec

    system = fsspec.filesystem("memory")

    def put(name: str, path: Path) -> str:
        system.pipe(f"/stream/{name}", path.read_bytes())
        return f"memory://stream/{name}"

    yield put
    system.rm("/stream", recursive=True)


def test_parquet_files_at_an_address_are_read_there(remote: Callable[[str, Path], str], tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [picture(n) for n in range(200)])
    local = load_data(path, DataOptions(stream="always"))
    assert isinstance(local, StreamData)
    shards = part(local).pictures.shards
    assert isinstance(shards, ParquetShards)
    far = ParquetShards("far", {"train": [remote("a.parquet", path)]}, lambda: shards.rows)
    assert [far.fetch([2])(row) for row in range(80, 85)] == [shards.fetch([2])(row) for row in range(80, 85)]
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        ParquetShards("far", {"train": ["memory://stream/none.parquet"]}, lambda: shards.rows)


def test_a_data_set_of_the_hub_gives_its_parquet_files(tmp_path: Path) -> None:
    """`datasets` opens a folder as it opens a name on the hub."""
    folder = tmp_path / "owner"
    write_parquet(
        folder / "data/train-00000.parquet", [picture(n) for n in range(80)], label=[n % 3 for n in range(80)]
    )
    write_parquet(folder / "data/test-00000.parquet", [picture(n) for n in range(80, 120)], label=[0] * 40)
    shards = hub_shards(str(folder), DataOptions())
    assert shards.parts == {"train": range(80), "test": range(80, 120)}
    assert shards.labelled
    assert shards.fetch([0])(5).label == 2
    assert shards.fetch([2])(81).name == "test row 1"
    write_source("folder", tmp_path / "plain", 9)
    with pytest.raises(DataError, match="only Parquet can be streamed"):
        hub_shards(str(tmp_path / "plain"), DataOptions())
    with pytest.raises(DataError, match="cannot be read as image data"):
        hub_shards(str(tmp_path / "nowhere"), DataOptions())


@pytest.fixture
def hub(remote: Callable[[str, Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A data set of 200 pictures that goes by owner/name, whose files fsspec alone can open; which it was asked for."""
    import datasets
    import fsspec

    paths = [tmp_path / f"hub/train-{shard}.parquet" for shard in range(2)]
    for shard, path in enumerate(paths):
        contents: list[bytes | None] = [picture(n) for n in range(100 * shard, 100 * shard + 100)]
        write_parquet(path, contents, label=[n % 3 for n in range(100)])
    addresses = [remote(path.name, path) for path in paths]
    load, builder = datasets.load_dataset, datasets.load_dataset_builder
    local: dict[str, Any] = {"data_files": [str(path) for path in paths]}

    def stand_in(name: str, configuration: str | None) -> Any:
        assert (name, configuration) == ("owner/name", None)
        found = builder("parquet", **local)
        found.config.data_files = {"train": addresses}  # pyright: ignore
        return found

    monkeypatch.setattr(datasets, "load_dataset_builder", stand_in)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, _, streaming: load("parquet", streaming=True, **local))
    monkeypatch.setattr(RowSource, "digest", lambda _: "owner/name@commit")
    monkeypatch.setenv("INTROVAE_CACHE", str(tmp_path / "cache"))
    opened: list[str] = []
    system = type(fsspec.filesystem("memory"))
    plain = system._open
    monkeypatch.setattr(system, "_open", lambda self, path, *a, **k: opened.append(path) or plain(self, path, *a, **k))
    return opened


def test_a_hub_s_small_data_set_is_kept_decoded(hub: list[str]) -> None:
    data = load_data("owner/name")
    assert isinstance(data, ArrayData)
    assert not isinstance(data, StreamData)
    assert len(data.train) + len(data.heldout) == 200
    assert not list(cache_module.cache_folder().rglob("*.parquet"))


def test_a_hub_s_large_data_set_streams_from_copies(
    hub: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="introvae")
    expected = epoch(batches(stream("owner/name")), stream("owner/name"))
    far = part(stream("owner/name")).fingerprint()
    assert hub
    assert not list(cache_module.cache_folder().rglob("*.parquet"))  # --stream always keeps nothing
    monkeypatch.setattr(opening_module, "affordable_bytes", lambda _: 100)
    data = stream("owner/name", stream="auto")
    copies = list(cache_module.cache_folder().rglob("*"))
    assert sorted(path.name for path in copies if path.is_file()) == ["train-0.parquet", "train-1.parquet"]
    assert "MB of files, copied to" in caplog.text
    hub.clear()
    for setting in ("auto", "always"):  # as a run that is resumed has it
        again = stream("owner/name", stream=setting)
        assert part(again).fingerprint() == part(data).fingerprint() == far
        assert epoch(batches(again), again) == expected
    assert hub == []
    assert cache_module.clear_cache() > 0
    assert not [path for path in cache_module.cache_folder().rglob("*") if path.is_file()]


def test_files_that_would_fill_the_disk_are_read_on_the_hub(
    hub: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO, logger="introvae")
    usage = cache_module.shutil.disk_usage("/")
    monkeypatch.setattr(opening_module, "affordable_bytes", lambda _: 100)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    data = stream("owner/name", stream="auto")
    assert "too much for a copy" in caplog.text
    hub.clear()
    assert len(set(epoch(batches(data, size=20), data))) == 180
    assert hub
    assert not list(cache_module.cache_folder().rglob("*.parquet"))
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: usage)
    (tmp_path / "file").touch()
    monkeypatch.setenv("INTROVAE_CACHE", str(tmp_path / "file"))
    assert len(stream("owner/name", stream="auto").train) == 180
    assert "cannot be written" in caplog.text


def test_a_copy_is_whole_or_not_at_all(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def cut(self: Any, path: str, to: str) -> None:
        Path(to).write_bytes(b"PAR1")
        raise ConnectionError("the line was cut")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "get_file", cut)
    monkeypatch.setattr(opening_module, "affordable_bytes", lambda _: 100)
    with pytest.raises(DataError, match=r"cannot be fetched .the line was cut.: try again"):
        load_data("owner/name")
    assert not [path for path in cache_module.cache_folder().rglob("*") if path.is_file()]


def test_copies_are_for_all_users_of_the_cache_and_leave_nothing_behind(
    hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening_module, "affordable_bytes", lambda _: 100)
    first = downloads_module.copy_of("memory://stream/train-0.parquet")
    first.parent.mkdir(parents=True)
    left, busy = first.parent / ".new-killed", first.parent / ".new-at-work"
    for path in (left, busy):
        path.write_bytes(b"PAR1")
    os.utime(left, (0, 0))
    load_data("owner/name")
    copies = sorted(cache_module.cache_folder().rglob("*.parquet"))
    assert [path.stat().st_mode & 0o777 for path in copies] == [0o644] * 2
    assert (left.exists(), busy.exists()) == (False, True)


def test_what_another_process_has_copied_meanwhile_is_not_copied_again(
    hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    copy = downloads_module._copy

    def both(address: str, path: Path) -> None:
        for name in ("train-0.parquet", "train-1.parquet"):
            made.append(name)
            copy(f"memory://stream/{name}", downloads_module.copy_of(f"memory://stream/{name}"))

    monkeypatch.setattr(opening_module, "affordable_bytes", lambda _: 100)
    monkeypatch.setattr(downloads_module, "_copy", both)
    assert len(stream("owner/name", stream="auto").train) == 180
    assert made == ["train-0.parquet", "train-1.parquet"]


def test_a_disk_that_fills_up_on_the_way_leaves_the_files_on_the_hub(
    hub: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import fsspec

    def full(self: Any, path: str, to: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    caplog.set_level(logging.INFO, logger="introvae")
    monkeypatch.setattr(opening_module, "affordable_bytes", lambda _: 100)
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "get_file", full)
    data = stream("owner/name", stream="auto")
    assert "No space left on device" in caplog.text
    assert len(set(epoch(batches(data, size=20), data))) == 180


def test_a_hub_that_is_not_reached_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[str] = []

    def nowhere(name: str, *words: object, **options: object) -> None:
        asked.append(name)
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset_builder", nowhere)
    monkeypatch.setattr(datasets, "load_dataset", nowhere)
    with pytest.raises(DataError, match=r"no folder or file owner/name here, and as a name on the hub: .*no network"):
        load_data("owner/name")
    assert asked == ["owner/name"]


# --- the sources


def test_paths_take_little_memory(tmp_path: Path) -> None:
    folder = write_source("folder", tmp_path / "images", 300)
    shards = FolderShards(folder, DataOptions())
    assert len(shards.folders) == 3
    assert all(isinstance(one.names, bytes) and isinstance(one.ends, np.ndarray) for one in shards.folders)
    assert [shards.fetch(())(row).name for row in (0, 99, 100, 299)] == [
        "class0/000000.pgm",
        "class0/000099.pgm",
        "class1/000100.pgm",
        "class2/000299.pgm",
    ]
    (folder / "class0/000000.pgm").rename(folder / "class0/0.pgm")
    assert FolderShards(folder, DataOptions()).checksum() != shards.checksum()


def test_files_that_changed_are_noticed(tmp_path: Path) -> None:
    folder = write_source("folder", tmp_path / "images", 300)
    state = batches(stream(folder)).state_dict()
    batches(stream(folder)).load_state_dict(state)
    changed = folder / "class1/000150.pgm"
    content = changed.read_bytes()
    changed.write_bytes(content.replace(b" 255", b"  255"))  # the same picture in another file
    with pytest.raises(DataError, match="not the ones"):
        batches(stream(folder)).load_state_dict(state)
    changed.write_bytes(content)
    batches(stream(folder)).load_state_dict(state)
    changed.unlink()
    changed.symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="not the ones"):
        batches(stream(folder)).load_state_dict(state)


def test_a_thousand_files_are_asked_for_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1300):
        (tmp_path / f"{number:04d}.pgm").touch()
    shards, asked = FolderShards(tmp_path, DataOptions()), list[int]()
    size = shards._size
    monkeypatch.setattr(shards, "_size", lambda row: asked.append(row) or size(row))
    before = shards.checksum()
    assert (len(set(asked)), asked[0], asked[-1]) == (1000, 0, 1299)
    assert max(np.diff(asked)) == 2
    (tmp_path / f"{asked[500]:04d}.pgm").write_text("more")
    assert shards.checksum() != before
    (tmp_path / "empty").mkdir()
    assert FolderShards(tmp_path / "empty", DataOptions()).checksum() == 0


def test_only_rows_of_chosen_groups_have_keys(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [picture(n) for n in range(1000)], rows=5)
    data = stream(path)
    shards = part(data).pictures.shards
    keys = shards.keys(range(1000), 0, 20)
    assert (keys != NEVER).sum() == 64 * 5
    assert (shards.keys(range(1000), 0, 200) != NEVER).sum() >= 400
    assert np.array_equal(keys[keys != NEVER], shards.keys(range(1000), 0, 200)[keys != NEVER])


# --- 20,000 images


MEMORY = """
import json, sys
import torch
from introvae import DataOptions, load_data
from introvae.machine import resident_bytes

torch.set_num_threads(1)
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
load_data(sys.argv[2], DataOptions(stream="always", size=48, channels=3)).batches(16, 0).stored()
before = resident_bytes()
data = load_data(sys.argv[1], DataOptions(stream="always", size=48, channels=3, stream_buffer=2048, heldout=0.01))
batches, seen = data.batches(198, 0), torch.zeros(20_000, dtype=torch.int64)
for _ in range(100):
    _, labels = batches.labelled()
    seen[labels] += 1
print(json.dumps([int(seen.max()), int(seen.sum()), batches.epoch, peak() - before]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_20_000_images_pass_once_in_bounded_memory(tmp_path: Path) -> None:
    for shard in range(4):
        some = range(5000 * shard, 5000 * (shard + 1))
        contents: list[bytes | None] = [picture(number) for number in some]
        write_parquet(tmp_path / f"many/{shard}.parquet", contents, rows=250, label=list(some))
    write_parquet(tmp_path / "few.parquet", [picture(n) for n in range(40)], label=list(range(40)))
    words = [sys.executable, "-c", MEMORY, str(tmp_path / "many"), str(tmp_path / "few.parquet")]
    most, count, number, taken = json.loads(subprocess.run(words, capture_output=True, check=True, text=True).stdout)
    assert (most, count, number) == (1, 19_800, 0)
    assert taken < 70e6 < math.prod((19_800, 3, 48, 48))


# --- a run


def test_a_run_streams_and_resumes_to_the_same_weights(tmp_path: Path) -> None:
    source = write_source("parquet", tmp_path / "source", 500)
    settings: dict[str, Any] = {"data": str(source), "stream": "always", "stream_buffer": 150, "network": "tiny-conv"}
    settings |= {"latent_dim": 2, "batch_size": 40, "steps": 30, "checkpoint_every": 10, "log_every": 5}
    settings |= {"recipe": "none", "progress": False, "device": "cpu", "precision": "float32"}
    whole = fit(**settings, out=str(tmp_path / "whole"))
    (event,) = whole.events("data")
    assert event["found"] == 500
    before = [weight.clone() for weight in whole.model().parameters()]
    last = sorted(whole.checkpoints.glob("step_*.pt"))[-1]
    assert last.stem == "step_00000030"
    last.unlink()
    again = fit(resume=whole.folder, progress=False)  # from step 20, in the midst of the second epoch
    assert len([row for row in again.log() if row["step"] == 30]) == 1
    assert all(torch.equal(a, b) for a, b in zip(again.model().parameters(), before, strict=True))
