"""Where pictures come from: items, which every source gives alike, and folders of files."""

from __future__ import annotations

import io
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

from PIL import Image

from introvae.data.options import DataOptions
from introvae.data.scans import is_scan, slices
from introvae.errors import ConfigError, DataError

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
class File:
    """A file as it was found, and why it cannot be used."""

    name: str
    path: Path
    stat: os.stat_result | None
    problem: str = ""


class Files:
    """Signature and digest of a list of files."""

    files: list[File]

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


class FolderSource(Files):
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
        self.split_folders = are_parts(name.split("/")[0] for name in names if "/" in name)
        classes = {c for name in names if (c := self._place(name)[1]) is not None}
        persons = any(SUBJECT.fullmatch(c) for c in classes)
        self.class_names = tuple(sorted(classes)) if len(classes) > 1 and not persons else ()
        self.groups = _groups(names, options.group)

    def __len__(self) -> int:
        return len(self.files)

    def _place(self, name: str) -> tuple[str, str | None]:
        return part_and_class(name.split("/")[:-1], self.split_folders)

    def items(self) -> Iterator[Item]:
        order = ("train", *HELDOUT_SPLITS)
        for file in sorted(self.files, key=lambda file: (order.index(self._place(file.name)[0]), file.name)):
            split, label = self._place(file.name)
            content = DataError(file.problem) if file.problem else file.path
            yield Item(file.name, content, split, label if self.class_names else None, self.groups.get(file.name))


def are_parts(folders: Iterable[str]) -> bool:
    """Whether folders on the first level are parts: a training folder beside a test or validation folder."""
    found = {SPLIT_WORDS[folder.lower()] for folder in folders if folder.lower() in SPLIT_WORDS}
    return "train" in found and len(found) > 1


def part_and_class(folders: Sequence[str], split_folders: bool) -> tuple[str, str | None]:
    """The part and the class of what lies in these folders, the outermost first."""
    split = "train"
    if split_folders and folders and folders[0].lower() in SPLIT_WORDS:
        split, folders = SPLIT_WORDS[folders[0].lower()], folders[1:]
    return split, folders[0] if folders else None


def _walk(path: Path) -> list[File]:
    if not path.is_dir():
        info = path.stat()
        return [File(path.name, path, info, _problem(info))]
    found: list[File] = []
    seen: set[tuple[int, int]] = set()

    def failed(error: OSError) -> None:
        where = Path(error.filename or path)
        if where == path:
            raise DataError(f"{path} cannot be opened ({error.strerror}): give yourself the right to read it")
        found.append(File(where.relative_to(path).as_posix(), where, None, f"cannot be opened ({error.strerror})"))

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
            found.append(File(relative, file, info, problem))
    return found


def _problem(info: os.stat_result) -> str:
    """Why a file is not even opened (a pipe would block), or nothing."""
    if not stat.S_ISREG(info.st_mode):
        return "no regular file"
    return "" if info.st_size else "empty file"


def parquet_files(path: Path) -> list[Path]:
    """The Parquet files in a folder, without hidden ones."""
    found = (p for p in path.rglob("*.parquet") if p.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts))


def holds_parquet(path: Path) -> bool:
    """Whether a folder is one of Parquet files: it has some, and no image file or scan beside them."""
    if not parquet_files(path):
        return False
    pictures = (*image_suffixes(), ".nii", ".gz")
    names = (name for _, _, names in os.walk(path) for name in names)
    return not any(name.lower().endswith(pictures) and not name.startswith(".") for name in names)


def image_suffixes() -> tuple[str, ...]:
    """What the names of image files end in."""
    Image.init()
    return tuple(Image.EXTENSION)


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
        yield slices(item.name, content, options)
        return
    with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file, Image.open(file) as image:
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise Image.DecompressionBombError  # Pillow itself only warns up to twice that
        yield iter([(item.name, image)])
