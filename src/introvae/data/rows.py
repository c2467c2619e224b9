"""Rows of Parquet files and of data sets on the hub, as `datasets` streams them."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from introvae.data.options import DataOptions
from introvae.data.sources import HELDOUT_SPLITS, SPLIT_WORDS, File, Files, Item, parquet_files
from introvae.errors import ConfigError, DataError, first_line

LABEL_COLUMNS = ("label", "target", "class")


class ParquetSource(Files):
    """Rows of Parquet files in the `datasets` image convention, the parts named by the words in the files' names.

    Raises:
        DataError: no image column, or files that cannot be read.
    """

    def __init__(self, path: Path, options: DataOptions) -> None:
        self.name = str(path)
        paths = [path] if path.is_file() else parquet_files(path)
        self.files = [File(p.name if p == path else p.relative_to(path).as_posix(), p, p.stat()) for p in paths]
        self.splits: dict[str, list[str]] = {}
        for file in self.files:
            words = re.split(r"[^a-z]+", file.name.lower()) if path.is_dir() else []
            split = next((split for split in HELDOUT_SPLITS if split in words), "train")
            self.splits.setdefault(split, []).append(str(file.path))
        self.options = options

    @cached_property
    def rows(self) -> RowSource:
        """Opened when needed: images in the cache are not."""
        files = {split: [glob.escape(file) for file in files] for split, files in self.splits.items()}  # no patterns
        return RowSource(self.name, "parquet", self.options, data_files=files)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the label column's classes, where its type knows them."""
        return self.rows.class_names

    def __len__(self) -> int:
        return 0

    def items(self) -> Iterator[Item]:
        return self.rows.items()


Found = TypeVar("Found")


def used_splits(splits: dict[str, Found]) -> dict[str, Found]:
    """The splits that are data: where one is for training, none with a name of its own ("extra", "unsupervised")."""
    known = {name: split for name, split in splits.items() if name in SPLIT_WORDS}
    return known if "train" in {SPLIT_WORDS[name] for name in known} else splits


class RowSource:
    """Rows of a data set that `datasets` can stream: a name on the hub, or Parquet files.

    Arguments:
        name: what `--data` was.
        builder: what `datasets.load_dataset` takes; where it is a name on the hub, a configuration may follow it, as in
            owner/name:configuration.

    Raises:
        DataError: no such data set, or no image column in it.
        ConfigError: the group or label column is not there.
    """

    def __init__(self, name: str, builder: str, options: DataOptions, **arguments: Any) -> None:
        import datasets

        self.name = name
        builder, _, configuration = builder.partition(":")
        with _quiet(), _reading(name):
            found: Any = datasets.load_dataset(builder, configuration or None, streaming=True, **arguments)
            self.parts: dict[str, Any] = used_splits(dict(found.items()))
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
            return f"{self.name}@{dataset_info(self.name.partition(':')[0]).sha}"

    def items(self) -> Iterator[Item]:
        import datasets

        names = {split: SPLIT_WORDS.get(split, "train") for split in self.parts}
        order = ("train", *HELDOUT_SPLITS)
        for split in sorted(self.parts, key=lambda split: order.index(names[split])):
            part = self.parts[split].cast_column(self.column, datasets.Image(decode=False))
            kept = [c for c in self.columns if c is not None]
            row = 0
            with _quiet(), _reading(self.name):
                for batch in part.select_columns(list(dict.fromkeys(kept))).with_format("arrow").iter(batch_size=256):
                    columns = [batch[c].to_pylist() if c else [None] * len(batch) for c in self.columns]
                    for image, label, group in zip(*columns, strict=True):
                        yield self.item(split, row, image, label, group)
                        row += 1

    def item(self, split: str, row: int, image: dict[str, Any] | None, label: Any, group: Any) -> Item:
        """The item of a row: its number in its split and the values of its columns."""
        path = (image or {}).get("path")
        name = f"row {row}" + (f" ({path})" if path else "")
        name = f"{split} {name}" if len(self.parts) > 1 else name
        part = SPLIT_WORDS.get(split, "train")
        return Item(name, self._content(image), part, self._label(label, name), None if group is None else str(group))

    @property
    def columns(self) -> list[str | None]:
        """The columns of images, labels and groups."""
        return [self.column, self.label, self.group]

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
