"""How data are read: size, window, columns, held-out part."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from introvae.errors import ConfigError, checked_seed, one_of, positive, whole

FITS = ("pad", "crop", "stretch")
STREAMS = ("auto", "always", "never")
SLICES = re.compile(r"(\d+%?)?:(\d+%?)?")


@dataclass(frozen=True)
class DataOptions:
    """How files become samples. Options that do not apply to the data at hand are not used.

    Arguments:
        size: side of the images in pixels. By default images that have one size, and one that networks take, keep it;
            others become 64 (small ones 32).
        fit: how an image that is not square gets there: pad (black borders), crop (the centre) or stretch; always
            antialiased.
        channels: 1 for grey, 3 for colour; by default colour where more than one image in a hundred has it.
        window: percentiles of the values that become black and white, for images of more than 8 bits or of floats;
            floats that all lie in [0, 1] are taken as they are. The window's values are saved with the model.
        window_of: all (one window for the data) or file (one for each file, as scans with units of their own need).
        heldout: share of the data that is only looked at; at most 10,000 samples. Used where the data bring no test
            part of their own.
        heldout_seed: decides which samples these are; apart from the run's seed, so that runs can be compared.
        group: keeps what belongs together on one side: for files a regular expression whose match (or first group) in
            the path names the person or scan, for tables and Parquet files a column. Scans are kept whole anyway.
        label: column of the class labels; by default one named label, target or class, where there is one. "none" for
            no labels.
        columns: the columns of a table to use, by default all numbers; as "a,b" or ["a", "b"].
        drop: columns of a table to leave out.
        axis: of a scan (NIfTI), across which it is sliced: 0 sagittal, 1 coronal, 2 axial.
        slices: range of a scan's slices, as START:END in numbers or percents ("30%:70%").
        cache: keep decoded images on disk, so that the next start is quick.
        stream: always (decode images anew whenever they are needed, for sets of any size), never (decode them all at
            the start) or auto (stream where decoded they would take more than a quarter of the disk's free space or
            half of the memory, and more than 1 GiB; without the cache, more than a process' share of half of the
            memory or of 1 GiB). Parquet files on the hub are copied into the cache when auto streams them, if they
            take no more than a quarter of the disk's free space; always reads them there, or the copies.
        stream_buffer: images among which a stream of Parquet files is shuffled; row groups come in random order.

    Raises:
        ConfigError: a value is out of range.

    Example:
        >>> DataOptions(columns="alcohol, ash").columns
        ('alcohol', 'ash')
    """

    size: int | None = None
    fit: str = "pad"
    channels: int | None = None
    window: tuple[float, float] = (0.5, 99.5)
    window_of: str = "all"
    heldout: float = 0.1
    heldout_seed: int = 0
    group: str | None = None
    label: str | None = None
    columns: tuple[str, ...] | str = ()
    drop: tuple[str, ...] | str = ()
    axis: int = 2
    slices: str = ":"
    cache: bool = True
    stream: str = "auto"
    stream_buffer: int = 16_384

    def __post_init__(self) -> None:
        for name in ("columns", "drop"):
            object.__setattr__(self, name, _names(getattr(self, name)))
        object.__setattr__(self, "window", tuple(self.window))
        if self.size is not None:
            positive(size=self.size)
            whole(size=self.size)
            if not 4 <= self.size <= 4096:
                raise ConfigError(f"size is {self.size}: give 4 to 4096 pixels")
        one_of(FITS, fit=self.fit)
        one_of(("all", "file"), window_of=self.window_of)
        one_of(STREAMS, stream=self.stream)
        positive(stream_buffer=self.stream_buffer)
        whole(stream_buffer=self.stream_buffer)
        if self.channels not in (None, 1, 3):
            raise ConfigError(f"channels is {self.channels}: give 1 (grey) or 3 (colour)")
        if len(self.window) != 2 or not 0 <= self.window[0] < self.window[1] <= 100:
            raise ConfigError(f"window is {self.window}: give two percentiles, such as [0.5, 99.5]")
        if not 0 < self.heldout < 1:
            raise ConfigError(f"heldout is {self.heldout}: it must be a share above 0 and below 1")
        checked_seed(self.heldout_seed)
        if self.axis not in (0, 1, 2):
            raise ConfigError(f"axis is {self.axis}: give 0 (sagittal), 1 (coronal) or 2 (axial)")
        if not SLICES.fullmatch(self.slices):
            raise ConfigError(f"slices is {self.slices!r}: give START:END, such as 60:120 or 30%:70%")

    def of_data(self) -> dict[str, Any]:
        """The options that decide how a file is read, as plain values: what a cache must be keyed by."""
        options = asdict(self) if type(self) is DataOptions else {n: getattr(self, n) for n in DATA_OPTIONS}
        return {name: options[name] for name in options if name not in WITHOUT_EFFECT}


WITHOUT_EFFECT = ("heldout", "heldout_seed", "cache", "stream", "stream_buffer")
"""Options that change no pixel."""


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    names = given.split(",") if isinstance(given, str) else given
    return tuple(dict.fromkeys(name.strip() for name in names if name.strip()))


DATA_OPTIONS = tuple(DataOptions.__dataclass_fields__)
"""Names of all options."""


def slice_range(slices: str, count: int) -> range:
    """The slices of a scan that has `count`.

    Example:
        >>> slice_range("25%:75%", 8), slice_range("2:", 5)
        (range(2, 6), range(2, 5))
    """
    ends = []
    for text, default in zip(slices.split(":"), (0, count), strict=True):
        value = round(float(text[:-1]) / 100 * count) if text.endswith("%") else int(text) if text else default
        ends.append(min(max(value, 0), count))
    return range(ends[0], ends[1])
