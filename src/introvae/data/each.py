"""One picture or row after the other, with what is wrong with it: for uses that must account for every file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from introvae.data import is_table, load_data
from introvae.data.arrays import ArrayData, Part
from introvae.data.files import read_array_file
from introvae.data.images import Result, ordered, read_item, strict_pillow
from introvae.data.options import DataOptions
from introvae.data.preparation import Preparation
from introvae.data.scans import is_scan, slice_names
from introvae.data.sources import FolderSource, Item
from introvae.data.tables import TablePreparation, read_all_rows
from introvae.errors import DataError, MissingExtraError

AT_ONCE = 256
"""Rows of data in memory that are made floats at a time."""


@dataclass(frozen=True)
class Reading:
    """A picture or row, or why there is none.

    Arguments:
        name: path inside the folder (of a scan's slice with its number), or the row.
        x: as the model takes it, `[C, H, W]` float32 in [0, 1] or `[D]`; None where it cannot be read.
        reason: why not.
        label: class folder or label column, None where unknown.
    """

    name: str
    x: Tensor | None
    reason: str = ""
    label: str | int | None = None


class Readings(Protocol):
    """A source that was opened: the names of all that it holds are known before any of it is prepared."""

    def names(self) -> list[str]:
        """What the readings will be called, in order; of scans each header is read."""
        ...

    def __iter__(self) -> Iterator[Reading]:
        """All of them, as `each` gives them."""
        ...


def each(
    source: str | Path, preparation: Preparation | TablePreparation | None, without: Sequence[Path] = ()
) -> Iterator[Reading]:
    """Everything that a source holds, in a stable order: files by name, rows of tables and arrays as they come.

    A folder or a single file is read a few pictures at a time, so that millions need no memory, and what cannot be used
    comes as a `Reading` with a reason, a row too; nothing is left out. Images in Parquet files and on the hub are
    loaded as `load_data` loads them, training part first; what was skipped comes with its reason, at the end.

    Arguments:
        source: as `--data` takes it.
        preparation: the model's, so that pictures are prepared as those it was trained on.
        without: folders whose files are left out, as if they were not there.

    Raises:
        DataError: the source is unknown or cannot be opened.

    Example:
        >>> first = next(each("digits", None))
        >>> first.name, first.x.shape
        ('row 0', torch.Size([1, 8, 8]))
    """
    yield from open_readings(source, preparation, without)


def open_readings(
    source: str | Path, preparation: Preparation | TablePreparation | None, without: Sequence[Path] = ()
) -> Readings:
    """What `each` goes through, with the names of it all; arguments and errors as there.

    Example:
        >>> open_readings("digits", None).names()[:2]
        ['row 0', 'row 1']
    """
    path = Path(source).expanduser()
    if isinstance(preparation, Preparation) and _holds_files(path):
        return _Files(path, preparation, without)
    if isinstance(preparation, TablePreparation) and is_table(path):
        x, reasons = read_all_rows(path, preparation)
        return _Rows([Part(x)], reasons=reasons)
    if path.suffix.lower() in (".npy", ".npz") and path.is_file():
        part, strange = read_array_file(path, preparation if isinstance(preparation, Preparation) else None)
        return _Rows([part], reasons=dict.fromkeys(strange, "NaN or infinite values"))
    data = load_data(source, None, preparation)
    if not isinstance(data, ArrayData):
        raise DataError(f"{source} are points of a density, without an end: give files or rows")
    skipped = data.intake.skipped if data.intake is not None else ()
    return _Rows([data.train, data.heldout], data.class_names, skipped)


class _Rows:
    """Rows of parts in memory, one part after the other.

    Arguments:
        parts: of the data.
        class_names: of the labels.
        skipped: name and reason of what is in no part.
        reasons: of rows of the first part that cannot be used.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        class_names: Sequence[str] = (),
        skipped: Sequence[tuple[str, str]] = (),
        reasons: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self.parts, self.class_names, self.skipped, self.reasons = parts, class_names, skipped, reasons

    def names(self) -> list[str]:
        first, found = 0, []
        for part in self.parts:
            found += part.names or [f"row {first + i}" for i in range(len(part))]
            first += len(part)
        return [*found, *(name for name, _ in self.skipped)]

    def __iter__(self) -> Iterator[Reading]:
        first = 0
        for part in self.parts:
            yield from _rows(part, self.class_names, first, self.reasons if not first else {})
            first += len(part)
        for name, reason in self.skipped:
            yield Reading(name, None, reason)


def _rows(
    part: Part, class_names: Sequence[str] = (), first: int = 0, reasons: Mapping[int, str] = MappingProxyType({})
) -> Iterator[Reading]:
    """Rows of a part, which begin with the number `first`; `reasons` are of those that cannot be used."""
    for start in range(0, len(part), AT_ONCE):
        some = part[slice(start, start + AT_ONCE)]
        names = some.names or [f"row {first + start + i}" for i in range(len(some))]
        labels = [None] * len(some) if some.labels is None else some.labels.tolist()
        for row, (name, x, label) in enumerate(zip(names, some.tensor(), labels, strict=True), start):
            reason = reasons.get(row, "")
            yield Reading(name, None if reason else x, reason, _named(label, class_names))


def _named(label: int | None, names: Sequence[str]) -> str | int | None:
    """The class that an index stands for; None for the index of no class."""
    if label is None or label < 0:
        return None
    return names[label] if label < len(names) else label


def _holds_files(path: Path) -> bool:
    from introvae.data.sources import holds_parquet

    arrays = (".npy", ".npz", ".parquet", ".csv", ".tsv")
    return (path.is_file() and path.suffix.lower() not in arrays) or (path.is_dir() and not holds_parquet(path))


class _Files:
    """Files of a folder, or one, in the order of their names."""

    def __init__(self, path: Path, preparation: Preparation, without: Sequence[Path]) -> None:
        self.preparation = preparation
        self.options = DataOptions(axis=preparation.axis, slices=preparation.slices)
        whole, folders = path.resolve(), [folder.resolve() for folder in without]
        inside = tuple(f"{folder.relative_to(whole).as_posix()}/" for folder in folders if whole in folder.parents)
        wanted = (item for item in FolderSource(path, self.options).items() if not item.name.startswith(inside))
        self.items = sorted(wanted, key=lambda item: item.name)

    def names(self) -> list[str]:
        return [name for item in self.items for name in self._names(item)]

    def _names(self, item: Item) -> list[str]:
        found = []
        if isinstance(item.content, Path) and is_scan(item.content.name):
            try:
                found = slice_names(item.name, item.content, self.options)
            except MissingExtraError:
                raise
            except Exception:  # nibabel has many types; who reads the scan says what is wrong with it
                found = []
        return found or [item.name]

    def __iter__(self) -> Iterator[Reading]:
        def read(items: Sequence[Item]) -> list[Result]:
            return [read_item(item, self.options, self.preparation) for item in items]

        with strict_pillow():
            for item, found in ordered(read, iter(self.items)):
                for name, image in found or [(item.name, "holds no picture")]:
                    if isinstance(image, str):
                        yield Reading(name, None, image, item.label)
                    else:
                        yield Reading(name, torch.from_numpy(image).float() / 255, label=item.label)
