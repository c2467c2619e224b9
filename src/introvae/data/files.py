"""Arrays in .npy and .npz files."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from introvae.data.arrays import (
    ArrayData,
    Intake,
    Part,
    as_vectors,
    channels_first,
    checked_labels,
    from_array,
    heldout_rows,
    set_apart,
)
from introvae.data.options import DataOptions
from introvae.data.preparation import Preparation, window_of
from introvae.errors import DataError

IMAGE_KEYS = ("images", "x", "data", "arr_0")
LABEL_KEYS = ("labels", "y", "targets")
SPLITS = ("train", "test", "val")
CHUNK = 1024
DAMAGES = (OSError, EOFError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error)
"""What numpy raises for files that are cut or no arrays."""


def dimensions_of(path: Path) -> int | None:
    """Number of axes of the samples' array in a .npy or .npz file, from its head alone; None where that fails."""
    try:
        if path.suffix == ".npy":
            with open(path, "rb") as file:
                return _dimensions(file)
        with zipfile.ZipFile(path) as archive:
            members = {name.removesuffix(".npy"): name for name in archive.namelist()}
            keys = [*IMAGE_KEYS, *(f"train_{key}" for key in IMAGE_KEYS), *(f"{key}_train" for key in IMAGE_KEYS)]
            name = next((members[key] for key in keys if key in members), next(iter(members.values())))
            with archive.open(name) as file:
                return _dimensions(file)
    except (*DAMAGES, StopIteration):
        return None  # who loads it will say what is wrong


def _dimensions(file: Any) -> int:
    old = np.lib.format.read_magic(file) == (1, 0)
    read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
    return len(read(file)[0])


def load_array_file(path: Path, options: DataOptions, preparation: Preparation | None = None) -> ArrayData:
    """Images or vectors of a .npy or .npz file.

    An .npz file holds the samples as `images`, `x` or `data`, or as its only array, and class indices as `labels` or
    `y`; or parts as `train_images`, `train_labels`, `test_images`, `test_labels` (as MedMNIST does) or `x_train` and so
    on (as Keras does).

    Images that are not uint8 nor float in [0, 1] go through a window of percentiles; `--size` resizes.

    Raises:
        DataError: the file cannot be read, or holds no such arrays.
    """
    return _assemble(str(path), _arrays(path), options, preparation)


def read_array_file(path: Path, preparation: Preparation | None = None) -> tuple[Part, list[int]]:
    """All samples of such a file in their order, as a model takes them, with labels where each of them has one; and the
    rows that hold NaN or infinite values, in whose place another row stands.

    Raises:
        DataError: as `load_array_file`; a single sample will do here, but one at least must be finite.
    """
    parts: list[Part] = []
    strange: list[int] = []
    for array, labels in _arrays(path).values():
        strange += [sum(map(len, parts)) + row for row in _replaced(array)]
        if array.ndim == 2:
            x = as_vectors(array, str(path))
        elif array.ndim in (3, 4) and 0 not in array.shape:
            x = _eight_bit(array, str(path), DataOptions(), preparation, [])[0]
        else:
            raise DataError(f"{path} has shape {array.shape}: give images [N, C, H, W] or vectors [N, D]")
        parts.append(Part(x, checked_labels(labels, len(x), str(path))))
    if len({part.x.shape[1:] for part in parts}) > 1:
        raise DataError(f"{path} has parts of several shapes: make them one size")
    known = [part.labels for part in parts if part.labels is not None]
    whole = Part(torch.cat([part.x for part in parts]), torch.cat(known) if len(known) == len(parts) else None)
    return whole, strange


def _replaced(array: np.ndarray) -> list[int]:
    """Put a finite row in the place of those that are not (of a file, in memory only); which these were."""
    if array.ndim < 2 or not np.issubdtype(array.dtype, np.floating) or 0 in array.shape:
        return []
    with np.errstate(over="ignore"):  # finite as float32, in which the model takes them
        chunks = (array[i : i + CHUNK].astype(np.float32) for i in range(0, len(array), CHUNK))
        fine = np.concatenate([np.isfinite(chunk).reshape(len(chunk), -1).all(axis=1) for chunk in chunks])
    rows = np.flatnonzero(~fine).tolist()
    if rows and fine.any():
        array[rows] = array[int(fine.argmax())]
    return rows


def _arrays(path: Path) -> dict[str, tuple[np.ndarray, Any]]:
    if path.suffix == ".npy":
        return {"train": (_npy(path), None)}
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: array for name in archive.files if (array := archive[name]).ndim}
    except DAMAGES as error:
        raise _unreadable(path, error, "numpy.savez") from error
    return _parts(path, arrays)


def _npy(path: Path) -> np.ndarray:
    try:
        with open(path, "rb") as file:  # checks magic and header; a pickle is refused
            np.lib.format.read_magic(file)
        return np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise _unreadable(path, error, "numpy.save") from error


def _unreadable(path: Path, error: Exception, remedy: str) -> DataError:
    reason = "it holds Python objects" if "pickle" in str(error) or "Python object" in str(error) else str(error)
    return DataError(f"{path} cannot be read as an array ({reason}): give a file written by {remedy}")


def _parts(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[np.ndarray, Any]]:
    def found(keys: tuple[str, ...], split: str = "") -> np.ndarray | None:
        names = [name for key in keys for name in ((f"{split}_{key}", f"{key}_{split}") if split else (key,))]
        return next((arrays[name] for name in names if name in arrays), None)

    images = found(IMAGE_KEYS)
    if images is None and len(arrays) == 1:
        (images,) = arrays.values()
    if images is not None:
        return {"train": (images, found(LABEL_KEYS))}
    parts = {split: (found(IMAGE_KEYS, split), found(LABEL_KEYS, split)) for split in SPLITS}
    kept = {split: (x, y) for split, (x, y) in parts.items() if x is not None}
    if "train" not in kept:
        raise DataError(
            f"{path} holds {', '.join(arrays) or 'no array'}: name the samples images and the labels labels, or "
            "train_images, test_images and so on"
        )
    held = next((split for split in ("test", "val") if split in kept), None)
    return {"train": kept["train"]} | ({"test": kept[held]} if held else {})


def load_array(x: np.ndarray, options: DataOptions) -> ArrayData:
    """Images or vectors in memory, read as those of a file are.

    Raises:
        DataError: they are neither.
    """
    return _assemble("array", {"train": (x, None)}, options, None)


def _assemble(
    name: str,
    parts: Mapping[str, tuple[np.ndarray, Any]],
    options: DataOptions,
    preparation: Preparation | None,
) -> ArrayData:
    first, labels = parts["train"]
    if first.ndim == 2:
        whole = from_array(first, labels, name, options.heldout_seed, options.heldout)
        if len(parts) == 1:
            return whole
        (train, _), (held, held_labels) = ((as_vectors(x, name), y) for x, y in parts.values())
        if held.shape[1:] != train.shape[1:]:
            raise DataError(f"{name} has parts of several widths: give vectors of one length")
        heldout = Part(held, checked_labels(held_labels, len(held), name))
        return ArrayData(name, Part(train, checked_labels(labels, len(train), name)), heldout)
    remarks: list[str] = []
    done: dict[str, Part] = {}
    for split, (array, y) in parts.items():
        if array.ndim not in (3, 4) or 0 in array.shape or (len(array) < 2 and split == "train"):
            raise DataError(f"{name} has shape {array.shape}: give at least two images [N, C, H, W] or vectors [N, D]")
        x, preparation = _eight_bit(array, name, options, preparation, remarks)
        done[split] = Part(x, checked_labels(y, len(x), name))
    whole = done["train"]
    if "test" in done:
        if whole.x.shape[1:] != done["test"].x.shape[1:]:
            raise DataError(f"{name} has parts of several shapes: make them one size, or resize with --size")
        train, heldout = whole, done["test"]
    else:
        train, heldout = set_apart(whole, heldout_rows(len(whole), options.heldout, options.heldout_seed))
    count = sum(len(part) for part in done.values())
    intake = Intake(count, count, (), tuple(remarks))
    return ArrayData(name, train, heldout, (), preparation, intake, own_parts="test" in done)


def _eight_bit(
    array: np.ndarray, name: str, options: DataOptions, preparation: Preparation | None, remarks: list[str]
) -> tuple[torch.Tensor, Preparation | None]:
    """Images as uint8 `[N, C, H, W]`, and what was done to them; `preparation` decides where it is given."""
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    deep = array.dtype != np.uint8
    if deep and not (np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)):
        raise DataError(f"{name} holds {array.dtype} values: give images as integers or floats")
    window = preparation.window if preparation else None
    percentiles = preparation.percentiles if preparation else options.window if options.window_of == "file" else None
    if deep:
        bad = sum(int((~np.isfinite(array[i : i + CHUNK])).sum()) for i in range(0, len(array), CHUNK))
        if bad:
            raise DataError(f"{name} holds {bad} NaN or infinite values: remove or fill them")
        if window is None and percentiles is None and preparation is not None and not _unit_floats(array):
            raise DataError(
                f"{name} has more than 8 bits ({array.dtype}) and the model saw 8-bit images only, so there is no "
                "window: give uint8"
            )
        if window is None:
            stride = max(1, len(array) // 512)
            try:
                window = window_of(np.asarray(array[::stride]), percentiles or options.window)
            except DataError as error:
                raise DataError(f"{name}: {error}") from error
            if window != (0.0, 1.0):
                remarks.append(f"values from {window[0]:.6g} to {window[1]:.6g} become black to white")
    first = channels_first(torch.from_numpy(np.array(array[:1])))
    channels, side = first.shape[1], options.size
    if preparation is None:
        size = (side, side) if side else (first.shape[2], first.shape[3])
        kept = (None, percentiles) if deep and percentiles else (window, None)
        preparation = Preparation(size, options.channels or channels, options.fit, *kept)
    alike = (channels, *first.shape[2:]) == (preparation.channels, *preparation.size)
    if not alike and channels not in (1, 3):
        raise DataError(f"{name} has {channels} channels: give 1 or 3, or leave the size as it is")
    made = torch.empty((len(array), preparation.channels, *preparation.size), dtype=torch.uint8)
    for start in range(0, len(array), CHUNK):
        x = np.array(array[start : start + CHUNK])
        if deep and window is not None:
            scaled = (x.astype(np.float32) - window[0]) * (255 / (window[1] - window[0]))
            x = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
        images = channels_first(torch.from_numpy(x))
        made[start : start + len(x)] = images if alike else torch.stack([_resized(i, preparation) for i in images])
    return made, preparation if channels in (1, 3) else None


def _unit_floats(array: np.ndarray) -> bool:
    return np.issubdtype(array.dtype, np.floating) and float(array.min()) >= 0 and float(array.max()) <= 1


def _resized(image: torch.Tensor, prepare: Preparation) -> torch.Tensor:
    array = image.permute(1, 2, 0).numpy()
    return torch.from_numpy(prepare(Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)))
