"""Where a stream's pictures are: found by their number, without a list of them in memory."""

from __future__ import annotations

import os
import re
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from introvae.data.options import DataOptions
from introvae.data.scans import is_scan
from introvae.data.sources import (
    HELDOUT_SPLITS,
    SUBJECT,
    Item,
    are_parts,
    image_suffixes,
    part_and_class,
)
from introvae.errors import ConfigError, DataError

NEVER = np.uint64(2**64 - 1)
"""The key of a row that is not held out."""
ORDER = ("train", *HELDOUT_SPLITS)
SIZED = 1000
"""Files whose sizes are in a checksum: asking for that of every file takes twice as long as listing them all."""


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

    def occurrences(self, rows: range, left_out: np.ndarray) -> dict[int, int]:
        """How often each class index occurs among some rows without those left out (sorted); -1: unknown.

        No picture is opened for it, so those that cannot be read count too.
        """
        ...

    def keys(self, rows: range, seed: int, n: int) -> np.ndarray:
        """A number for each row, uint64, that depends on its name (or its group's) and the seed alone: those with the
        n smallest are held out.
        """
        ...

    def fetch(self, blocks: Sequence[int], rows: np.ndarray | None = None) -> Callable[[int], Item]:
        """A function that gives the items of these blocks' rows; a KeyError for others.

        Arguments:
            rows: the only ones that it will be asked for, sorted.
        """
        ...

    def checksum(self) -> int:
        """Of all names and of sizes, without opening a picture."""
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

    def occurrences(self, rows: range, left_out: np.ndarray) -> dict[int, int]:
        ends = np.clip(self.firsts, rows.start, rows.stop)
        index, found = {name: i for i, name in enumerate(self.class_names)}, dict[int, int]()
        for name, count in zip(self._classes, np.diff(ends - np.searchsorted(left_out, ends)).tolist(), strict=True):
            if count:
                label = -1 if name is None else index.get(name, -1)
                found[label] = found.get(label, 0) + count
        return found

    def fetch(self, blocks: Sequence[int], rows: np.ndarray | None = None) -> Callable[[int], Item]:
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
        """Of all names, and of the sizes of at most 1,000 files that are spread evenly over all."""
        found = 0
        for folder in self.folders:
            found = zlib.crc32(folder.names, zlib.crc32(folder.path, found))
        count = int(self.firsts[-1])
        rows = np.linspace(0, count - 1, min(count, SIZED)).round().astype(np.int64)
        return zlib.crc32(np.array([self._size(row) for row in rows.tolist()], "<i8").tobytes(), found)

    def _size(self, row: int) -> int:
        """Of a file in bytes; -1 where it cannot be asked for it, as a link that leads nowhere."""
        try:
            return os.stat(os.path.join(self.root, self._name(row))).st_size
        except OSError:
            return -1

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


def largest_block(shards: Shards) -> float:
    """What the largest block takes in memory, 0 where none has to be kept."""
    sizes = shards.block_bytes
    return 0.0 if sizes is None or not len(sizes) else float(sizes.max())


def mean_bytes(shards: Shards) -> float:
    """What a row takes in memory while its block is kept."""
    sizes = shards.block_bytes
    return 0.0 if sizes is None else float(sizes.sum()) / max(1, int(shards.starts[-1]))
