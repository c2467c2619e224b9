"""What is known of images that are searched for anomalies: labels in a table, masks in a folder."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from introvae.data import preparation_from
from introvae.data.images import strict_pillow
from introvae.data.options import DataOptions
from introvae.data.preparation import DEEP_MODES, Preparation, deep_values
from introvae.data.scans import is_scan, scan_of, scan_size, slices
from introvae.data.sources import Item, opened
from introvae.data.survey import reason_of
from introvae.errors import ConfigError, DataError, MissingExtraError
from introvae.model import IntrospectiveVAE

log = logging.getLogger("introvae")

ANOMALOUS = {"1", "1.0", "true", "yes", "anomalous", "anomaly", "abnormal", "defect", "bad"}
NORMAL = {"0", "0.0", "false", "no", "normal", "good", "ok"}
"""What may stand in the label column of a table, in capitals or not."""


def read_labels(path: str | Path) -> dict[str, bool]:
    """Which files are anomalous: a CSV with a column of file names (the first) and one of labels (`label` or
    `anomalous`, else the second).

    Raises:
        DataError: it cannot be read, has one column, a label that means neither, or a name twice with different ones.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "labels.csv").write_text("file,label\\na.png,0\\nb.png,anomalous\\n")
        ...     read_labels(Path(folder, "labels.csv"))
        {'a.png': False, 'b.png': True}
    """
    from introvae.data.tables import read_table

    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no file {path}: give a CSV with the columns file,label")
    table = read_table(path)
    if table.shape[1] < 2:
        raise DataError(f"{path} has one column ({table.columns[0]}): give a CSV with the columns file,label")
    called = {str(name).strip().lower(): name for name in table.columns}
    column = next((called[name] for name in ("label", "anomalous") if name in called), table.columns[1])
    found: dict[str, bool] = {}
    for name, label in zip(table[table.columns[0]].astype(str), table[column].astype(str), strict=True):
        word = label.strip().lower()
        if word not in ANOMALOUS | NORMAL:
            raise DataError(f"{path}: the label of {name} is {label!r}: give 0 (normal) or 1 (anomalous)")
        key = name.replace("\\", "/").removeprefix("./")
        if found.setdefault(key, word in ANOMALOUS) != (word in ANOMALOUS):
            raise DataError(f"{path}: {name} stands there as normal and as anomalous: keep one of them")
    return found


class Masks:
    """Masks of the anomalous pixels, one file for each anomalous image; an image without one has none.

    A mask lies in the folder where its image lies in the images' folder, with the same name up to the suffix, or with
    `_mask` after it. Pixels above half of the mask's brightest are anomalous, so 0 and 1 will do as well as 0 and 255
    or 65,535.

    The mask of a scan is a NIfTI volume on the scan's grid. If it holds whole numbers they are labels, and all above 0
    are anomalous; else voxels above half of its largest value are. A single slice may have a picture instead, which has
    the slice's whole name: `t1.nii.gz slice 12.png`.

    Arguments:
        folder: of the masks.
        preparation: the images': a mask is brought to size as its image is, so that they fit.
        images: the images' folder, or the file, in which a scan's size is looked up.

    Raises:
        DataError: no such folder, or a mask that cannot be read.
    """

    def __init__(self, folder: str | Path, preparation: Preparation, images: Path | None = None) -> None:
        self.folder, self.images = Path(folder), images
        if not self.folder.is_dir():
            raise DataError(f"there is no folder {folder}: give the one with the masks")
        # Not to be stretched to the images' window of grey values: each mask has its own, from 0 to its brightest.
        self.preparation = dataclasses.replace(preparation, channels=1, percentiles=(0.0, 100.0), window=None)
        self.options = DataOptions(axis=preparation.axis, slices=preparation.slices)
        self.files: dict[str, Path] = {}
        for file in sorted(self.folder.rglob("*")):
            if file.is_file() and not file.name.startswith("."):
                key = _key(file.relative_to(self.folder).as_posix(), "_mask")
                if self.files.setdefault(key, file) != file:
                    raise DataError(f"{file} and {self.files[key]} are masks of the same image: keep one of them")
        self._volume: tuple[Path, dict[str, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def key_of(self, name: str) -> str | None:
        """The key in `files` of the mask of the image or slice `name`; None where it has none."""
        scan = scan_of(name)
        keys = [_key(name)] if scan is None else [name, _key(scan)]
        return next((key for key in keys if key in self.files), None)

    def of(self, name: str) -> Tensor:
        """The mask of the image or slice `name`, bool `[H, W]`."""
        scan, key = scan_of(name), self.key_of(name)
        if key is None:
            return torch.zeros(self.preparation.size, dtype=torch.bool)
        file = self.files[key]
        try:
            if scan is None or not is_scan(file.name):
                return self._picture(file)
            marked = self._slices(file, scan)
        except MissingExtraError:
            raise
        except Exception as error:  # Pillow and nibabel have many types
            raise DataError(f"the mask {file} cannot be used: {reason_of(error)}") from error
        if name not in marked:
            raise DataError(f"the mask {file} has nothing for {name}: give a volume on the scan's own grid")
        return marked[name]

    def _picture(self, file: Path) -> Tensor:
        with strict_pillow(), opened(Item(str(file), file), self.options) as pictures:
            return self._prepared(next(pictures)[1])

    def _slices(self, file: Path, scan: str) -> dict[str, Tensor]:
        # Slices of a scan come one after the other, so that one volume in memory is enough to read each once.
        if self._volume is None or self._volume[0] != file:
            source = self.images / scan if self.images is not None and self.images.is_dir() else self.images
            whole = DataOptions(axis=self.options.axis)
            if source is not None and (its := scan_size(file, whole)) != (size := scan_size(source, whole)):
                raise DataError(f"it has {_size(its)}, its scan {_size(size)}: give it on the scan's own grid")
            found = slices(scan, file, self.options, _marked)
            self._volume = file, {name: self._prepared(picture) for name, picture in found}
        return self._volume[1]

    def _prepared(self, picture: Image.Image) -> Tensor:
        window = None
        if picture.mode in DEEP_MODES:
            brightest = float(deep_values(picture).max())
            if brightest <= 0:
                return torch.zeros(self.preparation.size, dtype=torch.bool)
            window = (0.0, brightest)
        pixels = self.preparation(picture, window)[0]
        return torch.from_numpy(pixels > pixels.max() / 2)

    def check(self, names: Sequence[str]) -> None:
        """Read every mask of these images once, so that one that cannot be used is told before anything is scored.

        Raises:
            DataError: no mask is of one of these images, or one cannot be read or does not fit.
        """
        keys = [self.key_of(name) for name in names]
        used = {key for key in keys if key is not None}
        if not used:
            raise DataError(
                f"none of the {len(self):,} masks in {self.folder} has the name of an image ({names[0]!r}): give them "
                "the images' names"
            )
        for name, key in zip(names, keys, strict=True):
            if key is not None and not is_scan(name):  # a scan without slices cannot be read, and is no reason to stop
                self.of(name)
        for path in sorted(str(self.files[key]) for key in self.files.keys() - used):
            log.info("no image for the mask %s", path)


def _key(name: str, ending: str = "") -> str:
    """A file's name without suffix and ending; a scan's with `.nii` again, for a picture may be called like it."""
    if is_scan(name):
        return re.sub(r"\.nii(\.gz)?$", "", name, flags=re.IGNORECASE).removesuffix(ending) + ".nii"
    return Path(name).with_suffix("").as_posix().removesuffix(ending)


def _size(size: tuple[int, tuple[int, int]]) -> str:
    """What `scan_size` gives, in words."""
    return f"{size[0]} slices of {size[1][0]} x {size[1][1]} pixels"


def _marked(values: np.ndarray) -> np.ndarray:
    """Which voxels of a mask are anomalous, as 0 and 1."""
    values = np.nan_to_num(values)  # some programs write NaN around the head
    least = 0 if np.array_equal(values, np.rint(values)) else values.max() / 2
    return (values > least).astype(np.float32)


class Truth:
    """What is known of the images.

    Arguments:
        labels: by file name.
        masks: of pixels.
    """

    def __init__(self, labels: dict[str, bool] | None = None, masks: Masks | None = None) -> None:
        self.labels, self.masks = labels, masks

    @classmethod
    def read(
        cls, labels: str | Path | None, masks: str | Path | None, model: IntrospectiveVAE, images: Path | None = None
    ) -> Truth:
        """From a file and a folder, of what `images` holds."""
        preparation = preparation_from(model.config["data"]) if model.config else None
        if masks is not None and not isinstance(preparation, Preparation):
            raise ConfigError("masks need a model that was trained on pictures: leave --masks out")
        found = None if labels is None else read_labels(labels)
        if masks is None or not isinstance(preparation, Preparation):
            return cls(found)
        return cls(found, Masks(masks, preparation, images))

    def of(self, name: str, mask: Tensor | None) -> bool | None:
        """Whether an image is anomalous."""
        if self.labels is not None:
            return self.labels.get(name)
        return None if mask is None else bool(mask.any())

    def tells_pixels(self, name: str) -> bool:
        """Whether the anomalous pixels of an image are known: it has a mask, or none because it is normal."""
        if self.masks is None:
            return False
        return self.masks.key_of(name) is not None or self.labels is None or self.labels.get(name) is False

    def check(self, names: Sequence[str]) -> None:
        """Before anything is scored: whether labels and masks are of these images, and masks can be read.

        Arguments:
            names: of all images, also of those that may turn out to be broken.

        Raises:
            DataError: labels or masks fit none of them (a folder or a naming that differs), or a mask cannot be used.
        """
        if not names:
            return  # who reads them will say so
        elsewhere = sorted((self.labels or {}).keys() - set(names))
        if self.labels is not None and len(elsewhere) == len(self.labels):
            sliced = next((name for name in names if scan_of(name) is not None), None)
            remedy = "give paths inside the images' folder" if sliced is None else "give a row for each slice"
            raise DataError(
                f"none of the {len(self.labels):,} names in the labels ({next(iter(self.labels), '')!r}) is one of the "
                f"images' ({sliced or names[0]!r}): {remedy}"
            )
        if elsewhere:
            of = len(self.labels or {})
            log.info("no image for %d of the %d labels, such as that of %s", len(elsewhere), of, elsewhere[0])
        if self.masks is not None:
            self.masks.check(names)
