"""Parquet files as the source of a stream: their row groups, here or at addresses."""

from __future__ import annotations

import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from introvae.data.downloads import copied
from introvae.data.options import DataOptions
from introvae.data.rows import ParquetSource, RowSource, _quiet, used_splits
from introvae.data.shards import NEVER, ORDER, mixed
from introvae.data.sources import SPLIT_WORDS, Item
from introvae.errors import DataError, first_line

FOOTERS = 16
"""Files whose row groups are asked for at once: at addresses each takes a while to answer."""
HELD_BLOCKS = 64
"""Row groups that held-out rows are taken from, at least: a few must do, or all would have to be read for them."""
MOST_CLASSES = 100_000
"""Integers as labels that go higher, or more words than that, are of something else than classes, such as persons."""


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
            with ThreadPoolExecutor(FOOTERS) as pool:
                footers = list(pool.map(_row_groups, files[split]))
            for file, groups in zip(files[split], footers, strict=True):
                for group, (count, size) in enumerate(groups):
                    file_of.append(len(self.files))
                    group_of.append(group)
                    counts.append(count)
                    sizes.append(size)
                self.files.append(file)
            ends[part_of[split]] = sum(counts)
        self.file_of, self.group_of = np.array(file_of), np.array(group_of)
        self.block_bytes: np.ndarray | None = np.array(sizes)
        self.starts = np.cumsum([0, *counts])
        begins = [0, *ends.values()]
        self.parts = {part: range(begin, end) for begin, (part, end) in zip(begins, ends.items(), strict=False)}

    def copy_files(self) -> None:
        """Read the files at addresses from copies in the cache, which are made where there is room; see `copied`.

        Raises:
            DataError: a file cannot be fetched.
        """
        self.files = copied(self.files, fetch=True)

    @cached_property
    def rows(self) -> RowSource:
        """The data set's columns, read when needed: the number of rows needs none."""
        return self._open_rows()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the label column's type, or the words in it, or the numbers from 0 up to its highest."""
        return self.rows.class_names or self._names

    @cached_property
    def _names(self) -> tuple[str, ...]:
        values = () if self.rows.label is None else self._labels.values
        words = sorted(value for value in values if isinstance(value, str))
        highest = max((value for value in values if isinstance(value, int)), default=-1)
        numbers = range(highest + 1 if highest < MOST_CLASSES else 0)
        return tuple(words if len(words) <= MOST_CLASSES else ()) or tuple(map(str, numbers))

    @cached_property
    def _labels(self) -> _Labels:
        """The label column: it alone is read, once, and kept as four bytes a row."""
        import pyarrow as pa

        known: dict[Any, int] = {}
        codes = np.zeros(int(self.starts[-1]), np.int32)
        for index, file in enumerate(self.files):
            with _opened(file) as parquet:
                for block in np.flatnonzero(self.file_of == index).tolist():
                    table = parquet.read_row_group(int(self.group_of[block]), columns=[self.rows.label])
                    column = table.column(0).combine_chunks()
                    if pa.types.is_dictionary(column.type):  # of a writer that keeps categories
                        column = column.dictionary_decode()
                    found = column.dictionary_encode("encode")
                    own = np.array([_code(value, known) for value in found.dictionary.to_pylist()], np.int32)
                    codes[self.starts[block] : self.starts[block + 1]] = own[found.indices]
        return _Labels(tuple(known), codes)

    def occurrences(self, rows: range, left_out: np.ndarray) -> dict[int, int]:
        values, codes = self._labels
        counts = np.bincount(codes[rows.start : rows.stop], minlength=len(values))
        counts -= np.bincount(codes[left_out], minlength=len(values))
        index, found = {name: i for i, name in enumerate(self.class_names)}, dict[int, int]()
        for value, count in zip(values, counts.tolist(), strict=True):
            if count:
                label = value if isinstance(value, int) else index.get(value, -1)
                found[label] = found.get(label, 0) + count
        return found

    @property
    def labelled(self) -> bool:
        return self.rows.label is not None

    def fetch(self, blocks: Sequence[int], rows: np.ndarray | None = None) -> Callable[[int], Item]:
        kept: dict[int, list[Any] | DataError] = {}
        # Of a block that is not kept as a whole, the rows that are.
        own_rows: dict[int, np.ndarray] = {}
        if rows is not None:
            cuts = np.searchsorted(rows, np.stack([self.starts[:-1], self.starts[1:]])[:, blocks]).T.tolist()
            own_rows = {b: rows[start:end] for b, (start, end) in zip(blocks, cuts, strict=True) if start < end}
            blocks = list(own_rows)
        wanted = [column for column in self.rows.columns if column is not None]
        for file in dict.fromkeys(int(self.file_of[block]) for block in blocks):
            own = [int(block) for block in blocks if self.file_of[block] == file]
            try:
                with _opened(self.files[file]) as parquet:
                    for block in own:
                        table = parquet.read_row_group(int(self.group_of[block]), columns=wanted, use_threads=False)
                        if block in own_rows:  # a copy, so that the rest can go
                            table = table.take(own_rows[block] - self.starts[block])
                        kept[block] = [c and table.column(c).combine_chunks() for c in self.rows.columns]
            except Exception as error:  # pyarrow and each file system raise their own; what is left must still come
                for block in own:
                    kept.setdefault(block, DataError(f"its row group cannot be read ({first_line(error)})"))

        def item(row: int) -> Item:
            block = int(np.searchsorted(self.starts, row, side="right")) - 1
            found, index = kept[block], row - int(self.starts[block])
            if block in own_rows:
                index = int(np.searchsorted(own_rows[block], row))
                if index == len(own_rows[block]) or own_rows[block][index] != row:
                    raise KeyError(row)
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


class _Labels(NamedTuple):
    """The different values of a label column, and for each row the index of its own: int32 `[N]`."""

    values: tuple[Any, ...]
    codes: np.ndarray


def _code(label: Any, known: dict[Any, int]) -> int:
    """The index of a label among those that are known, to which it is added.

    Few different ones remain: integers that are no class' index are one that is too low or too high, and when there are
    more words than classes can be, new ones are none.
    """
    if isinstance(label, int):
        label = min(max(label, -1), MOST_CLASSES)
    elif not isinstance(label, str) or (label not in known and len(known) > MOST_CLASSES + 1):
        label = None
    return known.setdefault(label, len(known))


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


def _row_groups(file: str) -> list[tuple[int, int]]:
    """Rows and bytes of each row group."""
    with _opened(file) as parquet:
        groups = map(parquet.metadata.row_group, range(parquet.metadata.num_row_groups))
        return [(group.num_rows, group.total_byte_size) for group in groups]


def parquet_shards(source: ParquetSource) -> ParquetShards:
    """The row groups of Parquet files in a folder."""
    return ParquetShards(source.name, source.splits, lambda: source.rows)


class MissingDataError(DataError):
    """There are no such data, in whatever way they were to be read."""


def hub_shards(name: str, options: DataOptions) -> ParquetShards:
    """The row groups of a data set on the hub, read from there as they are needed, or from copies that are in the
    cache.

    Raises:
        MissingDataError: there is no such data set, or no way to the hub.
        DataError: it is none of Parquet files.
    """
    import datasets

    try:
        repository, _, configuration = name.partition(":")
        with _quiet():
            config: Any = datasets.load_dataset_builder(repository, configuration or None).config
        found: dict[Any, Any] = config.data_files or {}
        files = used_splits({str(split): [str(file) for file in its] for split, its in found.items()})
    except Exception as error:  # datasets and the hub each raise types of their own
        raise MissingDataError(
            f"{name} cannot be read as image data: {first_line(error)}; give a folder or file"
        ) from error
    kinds = Counter(Path(file).suffix for found in files.values() for file in found)
    if set(kinds) != {".parquet"}:
        listed = ", ".join(kinds) or "no"
        raise DataError(
            f"{name} has {listed} files, and only Parquet can be streamed: download it and give the folder, or take "
            "--stream never"
        )
    files = {split: copied(found, fetch=False) for split, found in files.items()}
    return ParquetShards(name, files, lambda: RowSource(name, name, options))
