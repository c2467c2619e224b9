"""Where pictures come from: folders of files and scans, Parquet files, the hub. Each source gives the same items."""

from __future__ import annotations

import glob
import io
import logging
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from introvae.data.options import DataOptions, slice_range
from introvae.errors import ConfigError, DataError
from introvae.extras import import_extra

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}
HELDOUT_SPLITS = ("test", "validation")
SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")
"""How the BIDS standard marks the person in the names of brain scans."""
LABEL_COLUMNS = ("label", "target", "class")
CLUTTER = {"thumbs.db", "desktop.ini"}


@dataclass(frozen=True)
class Item:
    """A file or row before it is read.

    Arguments:
        name: path inside the folder, or the row.
        content: where the bytes are, the bytes, or why there are none.
        split: train, test or validation.
        label: class name or index, None where unknown.
        group: what it belongs to, None where nothing says so.
    """

    name: str
    content: Path | bytes | DataError
    split: str = "train"
    label: str | int | None = None
    group: str | None = None


class Source(Protocol):
    """A supply of items that can be walked more than once."""

    name: str

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, empty where unknown."""
        ...

    def items(self) -> Iterator[Item]:
        """All of them, those of the training part first."""
        ...

    def __len__(self) -> int:
        """How many, or 0 where only walking tells."""
        ...

    def signature(self) -> str:
        """Cheap to compute, different whenever a file was touched."""
        ...

    def digest(self) -> str:
        """A hash of names and contents."""
        ...


@dataclass(frozen=True)
class _File:
    name: str
    path: Path
    stat: os.stat_result | None
    problem: str = ""


class _Files:
    """Signature and digest of a list of files."""

    files: list[_File]

    def signature(self) -> str:
        found = blake2b(digest_size=16)
        for file in self.files:
            s = file.stat
            times = (s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) if s else (file.problem,)
            found.update(repr((file.name, *times)).encode())
        return found.hexdigest()

    def digest(self) -> str:
        found = blake2b(digest_size=16)
        for file in self.files:
            inner = blake2b(digest_size=16)
            try:
                if not file.problem:
                    with open(file.path, "rb") as stream:
                        while block := stream.read(1 << 20):
                            inner.update(block)
            except OSError as error:
                inner.update(str(error.errno).encode())
            found.update(repr((file.name, inner.hexdigest())).encode())
        return found.hexdigest()


class FolderSource(_Files):
    """Image files and scans in a folder and the folders in it; those on the first level are classes.

    Where the first level has a training folder beside a test or validation folder, these are the parts, and the level
    below gives the classes.

    Raises:
        DataError: the folder cannot be opened.
        ConfigError: the group pattern is no regular expression, or matches no file.
    """

    def __init__(self, path: Path, options: DataOptions) -> None:
        self.name = str(path)
        self.files = _walk(path)
        names = [file.name for file in self.files]
        parts = {name: [word.lower() for word in name.split("/")[:-1]] for name in names}
        top = {SPLIT_WORDS[words[0]] for words in parts.values() if words and words[0] in SPLIT_WORDS}
        self.split_folders = "train" in top and len(top) > 1
        classes = {c for name in names if (c := self._place(name)[1]) is not None}
        persons = any(SUBJECT.fullmatch(c) for c in classes)
        self.class_names = tuple(sorted(classes)) if len(classes) > 1 and not persons else ()
        self.groups = _groups(names, options.group)

    def __len__(self) -> int:
        return len(self.files)

    def _place(self, name: str) -> tuple[str, str | None]:
        folders = name.split("/")[:-1]
        split = "train"
        if self.split_folders and folders and folders[0].lower() in SPLIT_WORDS:
            split = SPLIT_WORDS[folders.pop(0).lower()]
        return split, folders[0] if folders else None

    def items(self) -> Iterator[Item]:
        order = ("train", *HELDOUT_SPLITS)
        for file in sorted(self.files, key=lambda file: (order.index(self._place(file.name)[0]), file.name)):
            split, label = self._place(file.name)
            content = DataError(file.problem) if file.problem else file.path
            yield Item(file.name, content, split, label if self.class_names else None, self.groups.get(file.name))


def _walk(path: Path) -> list[_File]:
    if not path.is_dir():
        info = path.stat()
        return [_File(path.name, path, info, _problem(info))]
    found: list[_File] = []
    seen: set[tuple[int, int]] = set()

    def failed(error: OSError) -> None:
        where = Path(error.filename or path)
        if where == path:
            raise DataError(f"{path} cannot be opened ({error.strerror}): give yourself the right to read it")
        found.append(_File(where.relative_to(path).as_posix(), where, None, f"cannot be opened ({error.strerror})"))

    for folder, folders, names in os.walk(path, followlinks=True, onerror=failed):
        info = os.stat(folder)
        if (info.st_dev, info.st_ino) in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add((info.st_dev, info.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.startswith(".") or name.lower() in CLUTTER:
                continue
            file = Path(folder, name)
            relative = file.relative_to(path).as_posix()
            try:
                info = file.stat()
                problem = _problem(info)
            except OSError as error:
                info, problem = None, f"cannot be opened ({error.strerror})"
            found.append(_File(relative, file, info, problem))
    return found


def _problem(info: os.stat_result) -> str:
    """Why a file is not even opened (a pipe would block), or nothing."""
    if not stat.S_ISREG(info.st_mode):
        return "no regular file"
    return "" if info.st_size else "empty file"


def parquet_files(path: Path) -> list[Path]:
    """The Parquet files in a folder, without hidden ones."""
    found = path.rglob("*.parquet")
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts))


def _groups(names: list[str], pattern: str | None) -> dict[str, str]:
    """The group of each file that has one: by the pattern, or a scan's subject or itself."""
    if pattern is None:
        subjects = {name: SUBJECT.search(name) for name in names if is_scan(name)}
        return {name: match.group() if match else name for name, match in subjects.items()}
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"group {pattern!r} is no regular expression ({error}): give one, such as '^(\\d+)_'"
        ) from error
    found = {}
    if not names:
        return found  # who reads them will say that there are none
    for name in names:
        if match := compiled.search(name):
            found[name] = next((part for part in match.groups() if part is not None), match.group())
    if not found:
        example = f", such as {names[0]}"
        raise ConfigError(
            f"group {pattern!r} matches no file name{example}: give a pattern that finds the person in it"
        )
    return found


def is_scan(name: str) -> bool:
    """Whether a file name is a NIfTI volume's."""
    return name.lower().endswith((".nii", ".nii.gz"))


class ParquetSource(_Files):
    """Rows of Parquet files in the `datasets` image convention, the parts named by the words in the files' names.

    Raises:
        DataError: no image column, or files that cannot be read.
    """

    def __init__(self, path: Path, options: DataOptions) -> None:
        self.name = str(path)
        paths = [path] if path.is_file() else parquet_files(path)
        self.files = [_File(p.name if p == path else p.relative_to(path).as_posix(), p, p.stat()) for p in paths]
        self.splits: dict[str, list[str]] = {}
        for file in self.files:
            words = re.split(r"[^a-z]+", file.name.lower()) if path.is_dir() else []
            split = next((split for split in HELDOUT_SPLITS if split in words), "train")
            self.splits.setdefault(split, []).append(glob.escape(str(file.path)))  # a name is no pattern
        self.options = options

    @cached_property
    def rows(self) -> RowSource:
        """Opened when needed: images in the cache are not."""
        return RowSource(self.name, "parquet", self.options, data_files=self.splits)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the label column's classes, where its type knows them."""
        return self.rows.class_names

    def __len__(self) -> int:
        return 0

    def items(self) -> Iterator[Item]:
        return self.rows.items()


class RowSource:
    """Rows of a data set that `datasets` can stream: a name on the hub, or Parquet files.

    Arguments:
        name: what `--data` was.
        builder: what `datasets.load_dataset` takes.

    Raises:
        DataError: no such data set, or no image column in it.
        ConfigError: the group or label column is not there.
    """

    def __init__(self, name: str, builder: str, options: DataOptions, **arguments: Any) -> None:
        import datasets

        self.name = name
        with _quiet(), _reading(name):
            self.parts: dict[str, Any] = dict(datasets.load_dataset(builder, streaming=True, **arguments).items())
            first = next(iter(self.parts.values()))
            self.features: dict[str, Any] = dict(first.features or next(iter(first.take(1)), {}))
        names = list(self.features)
        images = [name for name in names if isinstance(self.features[name], datasets.Image)]
        if not images:
            raise DataError(
                f"{name} has no image column: its columns are {', '.join(names) or 'none'}; write it with the "
                "`datasets` library, or give a column the feature type Image"
            )
        self.column = "image" if "image" in images else images[0]
        self.group = options.group
        self.label = label_column(names, options.label, name)
        if self.group is not None and self.group not in names:
            raise ConfigError(f"{name} has no column {self.group!r} for --group: choose one of {', '.join(names)}")
        self.class_names = tuple(getattr(self.features.get(self.label or ""), "names", None) or ())

    def __len__(self) -> int:
        return 0

    def signature(self) -> str:
        return self.digest()

    def digest(self) -> str:
        """The data set's commit on the hub."""
        from huggingface_hub import dataset_info

        with _reading(self.name):
            return f"{self.name}@{dataset_info(self.name).sha}"

    def items(self) -> Iterator[Item]:
        import datasets

        names = {split: SPLIT_WORDS.get(split, "train") for split in self.parts}
        order = ("train", *HELDOUT_SPLITS)
        for split in sorted(self.parts, key=lambda split: order.index(names[split])):
            part = self.parts[split].cast_column(self.column, datasets.Image(decode=False))
            kept = [c for c in (self.column, self.label, self.group) if c is not None]
            row = 0
            with _quiet(), _reading(self.name):
                for batch in part.select_columns(list(dict.fromkeys(kept))).with_format("arrow").iter(batch_size=256):
                    columns = [
                        batch[c].to_pylist() if c else [None] * len(batch)
                        for c in (self.column, self.label, self.group)
                    ]
                    for image, label, group in zip(*columns, strict=True):
                        path = (image or {}).get("path")
                        name = f"row {row}" + (f" ({path})" if path else "")
                        name = f"{split} {name}" if len(self.parts) > 1 else name
                        yield Item(name, self._content(image), names[split], self._label(label, name), _text(group))
                        row += 1

    def _content(self, image: dict[str, Any] | None) -> Path | bytes | DataError:
        if image and image.get("bytes"):
            return image["bytes"]
        if image and image.get("path"):
            path = image["path"]
            return Path(path) if Path(path).is_file() else self._fetched(path)
        return DataError("no image")

    def _fetched(self, path: str) -> bytes | DataError:
        import fsspec

        try:
            with fsspec.open(path, "rb") as file:
                return file.read()  # pyright: ignore[reportAttributeAccessIssue]
        except Exception as error:  # each kind of address raises its own
            return DataError(f"cannot be fetched ({first_line(error)})")

    def _label(self, value: Any, name: str) -> str | int | None:
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, bool) or not isinstance(value, int):
            raise DataError(
                f"{self.name}: the label in {name} is {value!r}: give class names or indices, or --label none"
            )
        return value


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def label_column(names: list[str], asked: str | None, source: str) -> str | None:
    """The column of labels: the one asked for, the first of the usual names, or None.

    Raises:
        ConfigError: the one asked for is not there.
    """
    if asked is None:
        return next((name for name in LABEL_COLUMNS if name in names), None)
    if asked == "none":
        return None
    if asked not in names:
        raise ConfigError(f"{source} has no column {asked!r} for --label: choose one of {', '.join(names)}, or none")
    return asked


@contextmanager
def _quiet() -> Iterator[None]:
    """`datasets` and the hub without bars and logs: our one line says what is wrong."""
    import datasets
    from huggingface_hub.utils import logging as hub

    bars, verbosity, hub_verbosity = (
        datasets.is_progress_bar_enabled(),
        datasets.logging.get_verbosity(),
        hub.get_verbosity(),
    )
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    hub.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        hub.set_verbosity(hub_verbosity)
        if bars:
            datasets.enable_progress_bars()


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except (DataError, ConfigError, GeneratorExit):
        raise
    except Exception as error:  # pyarrow, PIL, datasets and the hub each raise types of their own
        raise DataError(f"{name} cannot be read as image data: {first_line(error)}; give a folder or file") from error


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextmanager
def opened(item: Item, options: DataOptions) -> Iterator[Iterator[tuple[str, Image.Image]]]:
    """The named pictures of an item, read when asked for: one of an image, one for each slice of a scan.

    Raises:
        DataError: the item has no content.
        Exception: whatever Pillow or nibabel raise for a damaged file.
    """
    content = item.content
    if isinstance(content, DataError):
        raise content
    if isinstance(content, Path) and is_scan(content.name):
        yield _slices(item.name, content, options)
        return
    with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file, Image.open(file) as image:
        yield iter([(item.name, image)])


def _slices(name: str, path: Path, options: DataOptions) -> Iterator[tuple[str, Image.Image]]:
    """Slices of a volume as floats, anterior or superior up, with square pixels."""
    volume, spacing = _canonical(path)
    array = volume.dataobj
    other = [axis for axis in range(3) if axis != options.axis]
    rows = slice_range(options.slices, volume.shape[options.axis])
    values = np.asarray(
        array[tuple(slice(rows.start, rows.stop) if a == options.axis else slice(None) for a in range(3))],
        dtype=np.float32,
    )
    for index in rows:
        plane = np.rot90(np.take(values, index - rows.start, axis=options.axis))
        picture = Image.fromarray(np.ascontiguousarray(plane))
        across, up = (spacing[axis] for axis in other)
        fine = min(across, up)
        size = (round(picture.width * across / fine), round(picture.height * up / fine))
        if size != picture.size:
            picture = picture.resize(size, Image.Resampling.BILINEAR)
        yield f"{name} slice {index}", picture


def _canonical(path: Path) -> tuple[Any, tuple[float, ...]]:
    nibabel = import_extra("nibabel")
    volume = nibabel.load(path)
    if len(volume.shape) != 3:
        raise DataError(f"{len(volume.shape)} dimensions {volume.shape}, not 3: give one volume a file")
    volume = nibabel.as_closest_canonical(volume)
    return volume, tuple(float(z) or 1.0 for z in volume.header.get_zooms()[:3])


def scan_size(path: Path, options: DataOptions) -> tuple[int, tuple[int, int]]:
    """How many slices a volume gives, and their (width, height), from its header."""
    volume, spacing = _canonical(path)
    a, b = (axis for axis in range(3) if axis != options.axis)
    fine = min(spacing[a], spacing[b])
    size = (round(volume.shape[a] * spacing[a] / fine), round(volume.shape[b] * spacing[b] / fine))
    return len(slice_range(options.slices, volume.shape[options.axis])), size
