"""A look at every picture before any is decoded: sizes, kinds, what cannot be read, what is unusual."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from introvae.data.options import DataOptions
from introvae.data.preparation import (
    DEEP_MODES,
    GREY_MODES,
    Preparation,
    automatic_size,
    deep_colour,
    deep_values,
    window_of,
)
from introvae.data.scans import is_scan, scan_size
from introvae.data.sources import FolderSource, Item, Source, opened
from introvae.errors import DataError, MissingExtraError, first_line
from introvae.progress import progress_bar

COLOUR_SHARE = 0.01
"""With no more colour pictures than this share, all become grey: a few strays must not treble the cost of the rest."""
COMMON_SHARE = 0.9
"""A size or kind that this share of the pictures have makes the others unusual, so that they are named."""
NAMED_EACH, NAMED_SIZES = 50, 1000
"""At most so many pictures of a size or kind, and so many sizes, are named."""
ODD_MODES = {
    "P": "colours of a palette looked up",
    "PA": "colours of a palette looked up, transparency laid over white",
    "CMYK": "CMYK to RGB",
    "YCbCr": "YCbCr to RGB",
    "1": "black and white to grey",
    "LA": "transparency laid over white",
    "RGBA": "transparency laid over white",
    **dict.fromkeys(DEEP_MODES, "more than 8 bits, through the window"),
}
MIN_SIDE = 4
"""Pictures with a smaller side are skipped."""
WINDOW_FILES, WINDOW_VALUES = 256, 4099
"""How many files, and values of each, the window's percentiles are of (up to twice as many files)."""


@dataclass
class Survey:
    """What a look at every picture's head found."""

    found: int = 0
    pictures: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, str] = field(default_factory=dict)
    frames: int = 0
    elsewhere: bool = False
    values: list[np.ndarray] = field(default_factory=list)
    stride: int = 1
    deep_files: int = 0
    odd: dict[str, list[str]] = field(default_factory=dict)
    of_size: dict[tuple[int, int], list[str]] = field(default_factory=dict)
    of_kind: dict[str, list[str]] = field(default_factory=dict)

    def sample(self, read: Callable[[], np.ndarray]) -> None:
        """Keep values of this deep file, if it is among the evenly spread ones that the window is made from."""
        if self.deep_files % self.stride == 0:
            values = read().ravel()
            if len(values) > WINDOW_VALUES:  # a prime number of places: no stride that meets the same columns again
                values = values[np.linspace(0, len(values) - 1, WINDOW_VALUES).astype(np.int64)]
            self.values.append(values)
            if len(self.values) > 2 * WINDOW_FILES:
                self.values, self.stride = self.values[::2], 2 * self.stride
        self.deep_files += 1

    def unusual(self, prepare: Preparation) -> list[tuple[str, str]]:
        """Names of pictures that are used and differ from most others, and what is done to each."""
        found = {name: list(said) for name, said in self.odd.items()}
        for size, names in self.of_size.items():
            if max(self.sizes.values()) >= COMMON_SHARE * self.pictures and self.sizes[size] < max(self.sizes.values()):
                done = prepare.fit if size[0] != size[1] else "resized"
                for name in names if size[::-1] != prepare.size else []:
                    found.setdefault(name, []).append(f"{size[0]} x {size[1]} pixels, {done}")
        kinds = {kind: count for kind, count in self.kinds.items() if kind != "deep"}
        for kind, names in self.of_kind.items():
            to = "colour" if prepare.channels == 3 else "grey"
            if kind != to and kinds[kind] <= (1 - COMMON_SHARE) * self.pictures:
                for name in names:
                    found.setdefault(name, []).append(f"{kind} to {to}")
        return [(name, "; ".join(said)) for name, said in sorted(found.items())]

    def see(self, name: str, size: tuple[int, int], kind: str, said: list[str]) -> None:
        """Count a picture; keep its name where it may turn out to be unusual."""
        self.pictures += 1
        self.sizes[size] += 1
        self.kinds[kind] += 1
        if said and len(self.odd) < NAMED_SIZES:
            self.odd[name] = said
        if size in self.of_size or len(self.of_size) < NAMED_SIZES:
            names = self.of_size.setdefault(size, [])
            if len(names) < NAMED_EACH:
                names.append(name)
        if kind != "deep" and len(self.of_kind.setdefault(kind, [])) < NAMED_EACH:
            self.of_kind[kind].append(name)

    def preparation(self, options: DataOptions) -> Preparation:
        size = (options.size, options.size) if options.size is not None else automatic_size(self.sizes)
        channels = options.channels or (3 if self.kinds["colour"] > COLOUR_SHARE * self.pictures else 1)
        per_file = options.window_of == "file" and bool(self.values)
        window = None
        if self.values and not per_file:
            try:
                window = window_of(np.concatenate(self.values), options.window)
            except DataError as error:
                raise DataError(f"the pictures of more than 8 bits: {error}") from error
        percentiles = options.window if per_file else None
        return Preparation(size, channels, options.fit, window, percentiles, options.axis, options.slices)

    def remarks(self, options: DataOptions, prepare: Preparation) -> list[str]:
        said = []
        height, width = prepare.size
        resized = sum(count for size, count in self.sizes.items() if size != (width, height))
        if resized:
            many = f"{len(self.sizes)} sizes" if len(self.sizes) > 1 else f"{min(self.sizes)[0]} x {min(self.sizes)[1]}"
            why = "" if options.size is not None else "; --size chooses another"
            said.append(
                f"{resized:,} of {self.pictures:,} pictures ({many}) are brought to {width} x {height} pixels by "
                f"{prepare.fit}{why}"
            )
        if self.kinds["colour"] and self.pictures > self.kinds["colour"] and prepare.channels == 3:
            grey = self.pictures - self.kinds["colour"]
            said.append(f"{grey:,} grey pictures beside {self.kinds['colour']:,} in colour: all become colour")
        if self.kinds["colour"] and prepare.channels == 1:
            few = "" if options.channels else ", as all but these few are grey; --channels 3 keeps their colour"
            said.append(f"{self.kinds['colour']:,} colour pictures become grey{few}")
        if prepare.window is not None and self.kinds["deep"]:
            low, high = prepare.window
            said.append(
                f"{self.kinds['deep']:,} pictures have more than 8 bits: values from {low:.6g} to {high:.6g} become "
                "black to white"
            )
        if prepare.percentiles is not None and self.kinds["deep"]:
            low, high = prepare.percentiles
            said.append(
                f"{self.kinds['deep']:,} pictures have more than 8 bits: percentiles {low:g} to {high:g} of each file "
                "become black to white"
            )
        if self.frames:
            said.append(f"of files with several frames ({self.frames:,}) the first is used")
        return said


def look_through(source: Source, options: DataOptions) -> Survey:
    # A row that names a file has contents which the source's digest does not cover, so it is not cached.
    return look_at(source.items(), len(source), options, files_elsewhere=not isinstance(source, FolderSource))


def look_at(items: Iterator[Item], count: int, options: DataOptions, *, files_elsewhere: bool = False) -> Survey:
    """A survey of items, `count` of them where it is known."""
    survey = Survey()
    for item in progress(items, count, "looking"):
        survey.found += 1
        survey.elsewhere |= files_elsewhere and isinstance(item.content, Path)
        try:
            _look_at(item, options, survey)
        except MissingExtraError:
            raise
        except Exception as error:  # Pillow and nibabel raise what they like; one bad file must not end the rest
            survey.skipped[item.name] = reason_of(error)
    return survey


def _look_at(item: Item, options: DataOptions, survey: Survey) -> None:
    if isinstance(item.content, Path) and is_scan(item.content.name):
        count, size = scan_size(item.content, options)
        if not count:
            raise DataError(f"no slice in {options.slices}")
        big_enough(size)
        survey.sample(lambda: _values_of_scan(item, options))
        survey.pictures += count
        survey.sizes[size] += count
        survey.kinds["deep"] += count
        return
    with opened(item, options) as pictures:
        for _, picture in pictures:
            width, height = picture.size
            size = (height, width) if _orientation(picture) in (5, 6, 7, 8) else (width, height)
            big_enough(size)
            if deep_colour(picture):
                raise DataError("16 bits in colour: convert it to 8 bits, or to 16-bit grey")
            kind = "deep" if picture.mode in DEEP_MODES else "grey" if picture.mode in GREY_MODES else "colour"
            frames = getattr(picture, "n_frames", 1)
            said = [ODD_MODES[picture.mode]] if picture.mode in ODD_MODES else []
            said += ["transparency laid over white"] if "transparency" in picture.info else []
            orientation = _orientation(picture)
            said += ["EXIF data damaged, taken as it lies"] if orientation == 0 else []
            said += ["turned upright"] if orientation is not None and orientation > 1 else []
            said += [f"the first of {frames} frames"] if frames > 1 else []
            if kind == "deep":
                survey.sample(lambda picture=picture: deep_values(picture))
            survey.see(item.name, size, kind, said)
            survey.frames += frames > 1


def _orientation(picture: Image.Image) -> int | None:
    """EXIF's orientation of a picture, 1 ... 8; 0 where it cannot be read, None where there is no EXIF."""
    if "exif" not in picture.info:  # Pillow turns TIFF itself, and would read a whole PNG to search for EXIF
        return None
    try:
        exif = picture.getexif()
    except Exception:  # a damaged EXIF block; the picture itself may be fine
        return 0
    return exif.get(0x0112, 1) if len(exif) else 0


def _values_of_scan(item: Item, options: DataOptions) -> np.ndarray:
    with opened(item, options) as slices:
        return np.concatenate([deep_values(picture).ravel() for _, picture in slices])


def big_enough(size: tuple[int, int]) -> None:
    """Raise `DataError` for a picture that is too small to show anything."""
    if min(size) < MIN_SIDE:
        raise DataError(f"{size[0]} x {size[1]} pixels, too small (at least {MIN_SIDE} each way)")


def reason_of(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no image that Pillow can read"
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return f"enormous: more than {Image.MAX_IMAGE_PIXELS or 0:,} pixels"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be opened ({error.strerror})"
    return first_line(error)


def progress(items: Iterator[Item], count: int, what: str) -> Iterator[Item]:
    return iter(progress_bar(items, what, count or None, unit="file", delay=2, leave=False, mininterval=0.5))
