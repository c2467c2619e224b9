"""Where a stream's pictures are: found by their number, without a list of them in memory."""

from __future__ import annotations

import os
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from introvae.data.options import DataOptions
from introvae.data.rows import ParquetSource, RowSource, used_splits
from introvae.data.scans import is_scan
from introvae.data.sources import (
    HELDOUT_SPLITS,
    SPLIT_WORDS,
    SUBJECT,
    Item,
    are_parts,
    image_suffixes,
    part_and_class,
)
from introvae.errors import ConfigError, DataError, first_line

HELD_BLOCKS = 64
"""Row groups that held-out rows are taken from, at least: a few must do, or all would have to be read for them."""
MOST_NUMBERS = 100_000
"""Integers as labels that go higher get no names."""
NEVER = np.uint64(2**64 - 1)
"""The key of a row that is not held out."""
ORDER = ("train", *HELDOUT_SPLITS)


class Shards(Protocol):
    """Pictures in blocks: what has to be read at once (a row group), or one file.

    Rows are numbered through all blocks, those of the training part first.
    """

    name: str
    starts: np.ndarray
    """Each block's first row, and the number of all rows: int64 `[B + 1]`."""
    block_bytes: np.ndarray | None
    """What each block takes in memory at most, None where none has to be kept."""
    parts: dict[str, range]
    """The rows of train, test and validation, where there are any."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, empty where unknown."""
        ...

    @property
    def labelled(self) -> bool:
        """Whether the items have labels."""
        ...

    def keys(self, rows: range, seed: int, n: int) -> np.ndarray:
        """A number for each row, uint64, that depends on its name (or its group's) and the seed alone: those with the
        n smallest are held out.
        """
        ...

    def fetch(self, blocks: Sequence[int]) -> Callable[[int], Item]:
        """A function that gives the items of these blocks' rows."""
        ...

    def checksum(self) -> int:
        """Of all names and sizes."""
        ...

    def remarks(self) -> list[str]:
        """What a user should know."""
        ...


def mixed(values: np.ndarray, seed: int) -> np.ndarray:
    """Random-looking uint64 for integers, one to one.

    Source: Steele, Lea and Flood (2014), Fast Splittable Pseudorandom Number Generators, `mix64`.
    """
    z = values.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class _Folder(NamedTuple):
    """The image files of one folder: all names behind one another, and where each ends."""

    path: bytes
    names: bytes
    ends: np.ndarray

    def name(self, index: int) -> bytes:
        return self.path + self.names[self.ends[index - 1] if index else 0 : self.ends[index]]


class FolderShards:
    """Image files in a folder and the folders in it, as `FolderSource` takes them, but known by their suffix and kept
    as a few bytes each.

    Raises:
        DataError: the folder cannot be opened.
    """

    block_bytes: np.ndarray | None = None

    def __init__(self, path: Path, options: DataOptions) -> None:
        self.name, self.root, self.group = str(path), os.fsencode(path), options.group
        self.others, self.scans, self.unopened = 0, 0, 0
        folders = list(self._walk())
        tops = {os.fsdecode(folder.path.split(b"/")[0]) for folder in folders if folder.path}
        split_folders = are_parts(tops)
        places = [part_and_class(os.fsdecode(folder.path).split("/")[:-1], split_folders) for folder in folders]
        order = sorted(range(len(folders)), key=lambda i: (ORDER.index(places[i][0]), folders[i].path))
        self.folders = [folders[i] for i in order]
        self._classes = [places[i][1] for i in order]
        classes = {name for name in self._classes if name is not None}
        persons = any(SUBJECT.fullmatch(name) for name in classes)
        self.class_names = tuple(sorted(classes)) if len(classes) > 1 and not persons else ()
        self.firsts = np.cumsum([0, *(len(folder.ends) for folder in self.folders)])
        self.starts = np.arange(self.firsts[-1] + 1)
        self.splits = [places[i][0] for i in order]
        self.parts = {}
        for split in dict.fromkeys(self.splits):
            first, count = self.splits.index(split), self.splits.count(split)
            self.parts[split] = range(int(self.firsts[first]), int(self.firsts[first + count]))

    @property
    def labelled(self) -> bool:
        return bool(self.class_names)

    def _walk(self) -> Iterator[_Folder]:
        suffixes = tuple(suffix.encode() for suffix in image_suffixes())
        seen: set[tuple[int, int]] = set()
        waiting = [b""]
        while waiting:
            path = waiting.pop()
            try:
                info = os.stat(os.path.join(self.root, path))
                with os.scandir(os.path.join(self.root, path)) as found:
                    seen_here = [e for e in found if not e.name.startswith(b".")]
                    # A pipe would block whoever opens it; a link that leads nowhere is named when it is met.
                    entries = [(e.name, e.is_dir()) for e in seen_here if e.is_dir() or e.is_file() or e.is_symlink()]
                    self.others += len(seen_here) - len(entries)
            except OSError as error:
                if not path:
                    raise DataError(
                        f"{self.name} cannot be opened ({error.strerror}): give yourself the right to read it"
                    ) from error
                self.unopened += 1
                continue
            if (info.st_dev, info.st_ino) in seen:  # a link that leads back up
                continue
            seen.add((info.st_dev, info.st_ino))
            entries.sort()
            names = [name for name, folder in entries if not folder and name.lower().endswith(suffixes)]
            self.scans += sum(is_scan(os.fsdecode(name)) for name, folder in entries if not folder)
            self.others += sum(not folder for _, folder in entries) - len(names)
            waiting += [path + name + b"/" for name, folder in reversed(entries) if folder]
            if names:
                yield _Folder(path, b"".join(names), np.cumsum([len(name) for name in names]))

    def _name(self, row: int) -> bytes:
        index = int(np.searchsorted(self.firsts, row, side="right")) - 1
        return self.folders[index].name(row - int(self.firsts[index]))

    def fetch(self, blocks: Sequence[int]) -> Callable[[int], Item]:
        return self._item

    def _item(self, row: int) -> Item:
        index = int(np.searchsorted(self.firsts, row, side="right")) - 1
        name = os.fsdecode(self._name(row))
        label = self._classes[index] if self.class_names else None
        return Item(name, Path(os.fsdecode(self.root), name), self.splits[index], label)

    def keys(self, rows: range, seed: int, n: int) -> np.ndarray:
        pattern = None if self.group is None else _pattern(self.group)
        found, matched = array("Q"), False
        for row in rows:
            name = self._name(row)
            if pattern is not None and (match := pattern.search(os.fsdecode(name))):
                name, matched = os.fsencode(next((g for g in match.groups() if g is not None), match.group())), True
            found.append(zlib.crc32(name))
        if pattern is not None and not matched:
            raise ConfigError(
                f"group {self.group!r} matches no file name, such as {os.fsdecode(self._name(rows[0]))}: give a "
                "pattern that finds the person in it"
            )
        return mixed(np.frombuffer(found, np.uint64), seed)

    def checksum(self) -> int:
        found = 0
        for folder in self.folders:
            found = zlib.crc32(folder.names, zlib.crc32(folder.path, found))
        return found

    def remarks(self) -> list[str]:
        said = []
        if self.others:
            said.append(
                f"{self.others:,} files are not used: their names do not end as image files' do, or they are pipes"
            )
        if self.unopened:
            said.append(f"{self.unopened:,} folders cannot be opened")
        return said


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(f"group {text!r} is no regular expression ({error}): give one, such as '^(\\d+)_'") from error


class ParquetShards:
    """Rows of Parquet files, here or at addresses that fsspec opens; a block is a row group.

    Arguments:
        name: what `--data` was.
        files: of each split.
        rows: opens the data set, for its columns.

    Raises:
        DataError: files that cannot be read.
    """

    def __init__(self, name: str, files: Mapping[str, Sequence[str]], rows: Callable[[], RowSource]) -> None:
        self.name, self._open_rows = name, rows
        part_of = {split: SPLIT_WORDS.get(split, "train") for split in files}
        self.files: list[str] = []
        self.split_starts: dict[str, int] = {}
        file_of, group_of, counts, sizes = array("l"), array("l"), array("q"), array("q")
        ends: dict[str, int] = {}
        for split in sorted(files, key=lambda split: ORDER.index(part_of[split])):
            self.split_starts[split] = sum(counts)
            for file in files[split]:
                with _opened(file) as parquet:
                    for group in range(parquet.metadata.num_row_groups):
                        found = parquet.metadata.row_group(group)
                        file_of.append(len(self.files))
                        group_of.append(group)
                        counts.append(found.num_rows)
                        sizes.append(found.total_byte_size)
                self.files.append(file)
            ends[part_of[split]] = sum(counts)
        self.file_of, self.group_of = np.array(file_of), np.array(group_of)
        self.block_bytes: np.ndarray | None = np.array(sizes)
        self.starts = np.cumsum([0, *counts])
        begins = [0, *ends.values()]
        self.parts = {part: range(begin, end) for begin, (part, end) in zip(begins, ends.items(), strict=False)}

    @cached_property
    def rows(self) -> RowSource:
        """The data set's columns, read when needed: the number of rows needs none."""
        return self._open_rows()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the label column's type, or the words in it, or the numbers from 0 up to its highest."""
        return self.rows.class_names or self._words

    @cached_property
    def _words(self) -> tuple[str, ...]:
        label = self.rows.label
        if label is None:
            return ()
        words, highest = set[str](), -1
        for file in self.files:
            with _opened(file) as parquet:
                for part in parquet.iter_batches(columns=[label], batch_size=65_536, use_threads=False):
                    values = part.column(0).unique().to_pylist()
                    words |= {value for value in values if isinstance(value, str)}
                    highest = max(highest, *(value for value in values if isinstance(value, int)), -1)
        numbers = range(highest + 1 if highest < MOST_NUMBERS else 0)  # higher ones are of something else than classes
        return tuple(sorted(words)) or tuple(map(str, numbers))

    @property
    def labelled(self) -> bool:
        return self.rows.label is not None

    def fetch(self, blocks: Sequence[int]) -> Callable[[int], Item]:
        kept: dict[int, list[Any] | DataError] = {}
        wanted = [column for column in self.rows.columns if column is not None]
        for file in dict.fromkeys(int(self.file_of[block]) for block in blocks):
            own = [int(block) for block in blocks if self.file_of[block] == file]
            try:
                with _opened(self.files[file]) as parquet:
                    for block in own:
                        table = parquet.read_row_group(int(self.group_of[block]), columns=wanted, use_threads=False)
                        kept[block] = [c and table.column(c).combine_chunks() for c in self.rows.columns]
            except Exception as error:  # pyarrow and each file system raise their own; what is left must still come
                for block in own:
                    kept.setdefault(block, DataError(f"its row group cannot be read ({first_line(error)})"))

        def item(row: int) -> Item:
            block = int(np.searchsorted(self.starts, row, side="right")) - 1
            found, index = kept[block], row - int(self.starts[block])
            split = next(name for name, start in reversed(self.split_starts.items()) if start <= row)
            number = row - self.split_starts[split]
            if isinstance(found, DataError):
                return Item(f"row {number}", found)
            image, label, group = (None if values is None else values[index].as_py() for values in found)
            return self.rows.item(split, number, image, label, group)

        return item

    def keys(self, rows: range, seed: int, n: int) -> np.ndarray:
        first, last = np.searchsorted(self.starts, (rows.start, rows.stop))
        names = np.array([zlib.crc32(Path(file).name.encode()) for file in self.files], np.uint64)
        blocks = np.arange(int(first), int(last))
        in_file = blocks - np.searchsorted(self.file_of, self.file_of[blocks])
        block_keys = mixed((names[self.file_of[blocks]] << np.uint64(20)) + in_file.astype(np.uint64), seed)
        counts = np.diff(self.starts)[blocks]
        if self.rows.group is not None:
            return self._group_keys(blocks, seed)
        order = np.argsort(block_keys, kind="stable")
        enough = max(HELD_BLOCKS, 1 + int(np.searchsorted(np.cumsum(counts[order]), 2 * n)))
        found = np.full(len(rows), NEVER)
        for index in order[:enough]:
            start, count = int(self.starts[blocks[index]]) - rows.start, int(counts[index])
            found[start : start + count] = mixed(np.arange(count, dtype=np.uint64) + block_keys[index], seed)
        return found

    def _group_keys(self, blocks: np.ndarray, seed: int) -> np.ndarray:
        group, found = self.rows.group, array("Q")
        for file in np.unique(self.file_of[blocks]):
            with _opened(self.files[file]) as parquet:
                for block in blocks[self.file_of[blocks] == file]:
                    values = parquet.read_row_group(int(self.group_of[block]), columns=[group]).column(0).to_pylist()
                    names = (f"row {len(found) + i}" if value is None else str(value) for i, value in enumerate(values))
                    found.extend([zlib.crc32(name.encode()) for name in names])
        return mixed(np.frombuffer(found, np.uint64), seed)

    def checksum(self) -> int:
        names = "\0".join(Path(file).name for file in self.files).encode()
        sizes = b"" if self.block_bytes is None else self.block_bytes.tobytes()
        return zlib.crc32(sizes, zlib.crc32(self.starts.tobytes(), zlib.crc32(names)))

    def remarks(self) -> list[str]:
        return []


@contextmanager
def _opened(file: str) -> Iterator[Any]:
    """A Parquet file at a path or an address.

    Raises:
        DataError: it cannot be read.
    """
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with ExitStack() as stack:
            stream = stack.enter_context(fsspec.open(file, "rb")) if "://" in file else file
            yield stack.enter_context(pq.ParquetFile(stream))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read as Parquet ({first_line(error)}): restore it or remove it") from error


def parquet_shards(source: ParquetSource) -> ParquetShards:
    """The row groups of Parquet files in a folder."""
    return ParquetShards(source.name, source.splits, lambda: source.rows)


def hub_shards(name: str, options: DataOptions) -> ParquetShards:
    """The row groups of a data set on the hub, read from there as they are needed.

    Raises:
        DataError: there is no such data set, or it is none of Parquet files.
    """
    import datasets

    try:
        repository, _, configuration = name.partition(":")
        config: Any = datasets.load_dataset_builder(repository, configuration or None).config
        found: dict[Any, Any] = config.data_files or {}
        files = used_splits({str(split): [str(file) for file in its] for split, its in found.items()})
    except Exception as error:  # datasets and the hub each raise types of their own
        raise DataError(f"{name} cannot be read as image data: {first_line(error)}; give a folder or file") from error
    kinds = Counter(Path(file).suffix for found in files.values() for file in found)
    if set(kinds) != {".parquet"}:
        listed = ", ".join(kinds) or "no"
        raise DataError(
            f"{name} has {listed} files, and only Parquet can be streamed: download it and give the folder, or take "
            "--stream never"
        )
    return ParquetShards(name, files, lambda: RowSource(name, name, options))


def largest_block(shards: Shards) -> float:
    """What the largest block takes in memory, 0 where none has to be kept."""
    sizes = shards.block_bytes
    return 0.0 if sizes is None or not len(sizes) else float(sizes.max())


def mean_bytes(shards: Shards) -> float:
    """What a row takes in memory while its block is kept."""
    sizes = shards.block_bytes
    return 0.0 if sizes is None else float(sizes.sum()) / max(1, int(shards.starts[-1]))
