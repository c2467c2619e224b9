"""Real images: scikit-learn's digits, and Parquet files in the `datasets` image convention."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from introvae.data.arrays import ArrayData, Part, split
from introvae.errors import DataError

COLOUR_MODES = ("RGB", "RGBA", "P", "CMYK", "YCbCr")
GREY_MODES = ("L", "1", "LA")
HELDOUT_SPLITS = ("test", "validation")


def load_digits() -> ArrayData:
    """The 1,797 handwritten digits that come with scikit-learn: 8 x 8 pixels, grey; every class gives a fifth to the
    held-out part.

    Source: UCI optical recognition of handwritten digits (test part).
    """
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    digits: Any = load()
    x = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[:, None]
    y = torch.from_numpy(digits.target).long()
    rows = train_test_split(np.arange(len(y)), test_size=0.2, stratify=digits.target, random_state=0)
    train, heldout = (Part(x, y)[torch.from_numpy(part)] for part in rows)
    return ArrayData("digits", train, heldout, tuple(map(str, range(10))))


def load_parquet(path: Path) -> ArrayData:
    """Images of a Parquet file, or of a folder of them, in the `datasets` image convention.

    Beside a training split, one named test (or else validation) is the held-out part; without one, a tenth is held out.
    The images are decoded once and kept as uint8. Grey stays grey; where any image has colour, all become RGB.

    Raises:
        DataError: no image column, unreadable files, images of several sizes or of a kind that cannot be converted.
    """
    import datasets

    bars, verbosity = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # our one line says what is wrong
    try:
        parts: Any = datasets.load_dataset("parquet", streaming=True, data_files=_files(path))
        features = next(iter(parts.values())).features
        column, label = _columns(features or {}, path)
        decoded = {name: _decode(part, column, label, path) for name, part in parts.items()}
    except DataError:
        raise
    except Exception as error:  # pyarrow, PIL and datasets each raise types of their own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{path} cannot be read as Parquet images: {reason[0]}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()
    decoded = _alike(decoded, path)
    held = [decoded.pop(name) for name in HELDOUT_SPLITS if name in decoded and "train" in decoded]
    labelled = all(part.labels is not None for part in decoded.values())
    train = Part(
        torch.cat([part.x for part in decoded.values()]),
        torch.cat([part.labels for part in decoded.values()]) if labelled else None,  # pyright: ignore
    )
    train, heldout = (train, held[0]) if held else split(train, seed=0)
    names = getattr(features.get(label), "names", None) if label else None
    return ArrayData(str(path), train, heldout, tuple(names or ()))


def _files(path: Path) -> dict[str, list[str]]:
    """The Parquet files by split, from the words in their names; as literal names, not as patterns."""
    if path.is_file():
        return {"train": [glob.escape(str(path))]}
    found: dict[str, list[str]] = {}
    for file in sorted(path.rglob("*.parquet")):
        words = re.split(r"[^a-z]+", file.relative_to(path).as_posix().lower())
        name = next((split for split in HELDOUT_SPLITS if split in words), "train")
        found.setdefault(name, []).append(glob.escape(str(file)))
    return found


def _columns(features: dict[str, Any], path: Path) -> tuple[str, str | None]:
    import datasets

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not images:
        raise DataError(
            f"{path} has no image column: its columns are {', '.join(features) or 'none'}; write it with the "
            "`datasets` library, or give a column the feature type Image"
        )
    column = "image" if "image" in images else images[0]
    return column, "label" if "label" in features else None


def _decode(rows: Iterable[dict[str, Any]], column: str, label: str | None, path: Path) -> Part:
    images: list[np.ndarray] = []
    labels: list[int] = []
    for index, row in enumerate(rows):
        image = row[column]
        if image is None:
            raise DataError(f"{path}: row {index} has no image")
        array = np.asarray(to_eight_bit(image, f"{path}: the image in row {index}"))
        if images and array.shape[:2] != images[0].shape[:2]:
            raise DataError(
                f"{path}: the image in row {index} is {array.shape[1]} x {array.shape[0]} pixels, the first "
                f"{images[0].shape[1]} x {images[0].shape[0]}: make them one size"
            )
        images.append(array)
        if label is not None:
            value = row[label]
            if not (value is None or isinstance(value, int)):
                raise DataError(f"{path}: the label in row {index} is {value!r}: give class indices or ClassLabel")
            labels.append(-1 if value is None else value)
    if len(images) < 2:
        raise DataError(f"{path} holds {len(images)} images: give at least two")
    if len({image.ndim for image in images}) > 1:
        images = [np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image for image in images]
    x = torch.from_numpy(np.stack(images))
    x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()
    return Part(x, torch.tensor(labels) if label is not None else None)


def to_eight_bit(image: Image, name: str) -> Image:
    """A picture as 8-bit grey (mode L) or RGB; transparency is dropped.

    Raises:
        DataError: 16-bit, float and other pictures, which would lose values.
    """
    if image.mode not in GREY_MODES + COLOUR_MODES:
        raise DataError(f"{name} has mode {image.mode}: convert it to 8-bit grey or RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB would warn
    return image.convert("L" if image.mode in GREY_MODES else "RGB")


def _alike(parts: dict[str, Part], path: Path) -> dict[str, Part]:
    """All parts with as many channels as the most colourful; refuses several sizes."""
    if len({part.x.shape[2:] for part in parts.values()}) > 1:
        sizes = ", ".join(f"{name} {part.x.shape[3]} x {part.x.shape[2]}" for name, part in parts.items())
        raise DataError(f"{path}: the splits have images of several sizes ({sizes}): make them one size")
    channels = max(part.x.shape[1] for part in parts.values())
    return {name: Part(part.x.expand(-1, channels, -1, -1).contiguous(), part.labels) for name, part in parts.items()}
