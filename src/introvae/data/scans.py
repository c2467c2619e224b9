"""NIfTI volumes: slices, anterior or superior up, with square pixels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from introvae.data.options import DataOptions, slice_range
from introvae.errors import DataError
from introvae.extras import import_extra

SLICE = re.compile(r"(.+\.nii(?:\.gz)?) slice \d+", re.IGNORECASE)
"""What `slices` calls a slice."""


def is_scan(name: str) -> bool:
    """Whether a file name is a NIfTI volume's."""
    return name.lower().endswith((".nii", ".nii.gz"))


def scan_of(name: str) -> str | None:
    """The scan that a slice is of, by the slice's name; None for another name.

    Example:
        >>> scan_of("sub-1/t1.nii.gz slice 12"), scan_of("sub-1/t1.nii.gz")
        ('sub-1/t1.nii.gz', None)
    """
    found = SLICE.fullmatch(name)
    return found[1] if found else None


def slices(
    name: str, path: Path, options: DataOptions, change: Callable[[np.ndarray], np.ndarray] | None = None
) -> Iterator[tuple[str, Image.Image]]:
    """Slices of a volume as floats, anterior or superior up, with square pixels.

    Arguments:
        name: what the scan is called in the slices' names.
        path: of the volume.
        options: the axis, and which slices.
        change: what becomes of the values of all these slices before any is resized.
    """
    volume, spacing = _canonical(path)
    array = volume.dataobj
    other = [axis for axis in range(3) if axis != options.axis]
    rows = slice_range(options.slices, volume.shape[options.axis])
    values = np.asarray(
        array[tuple(slice(rows.start, rows.stop) if a == options.axis else slice(None) for a in range(3))],
        dtype=np.float32,
    )
    values = values if change is None else change(values)
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
    volume = nibabel.squeeze_image(volume)  # a fourth axis of length 1 is common
    if len(volume.shape) != 3:
        raise _no_volume(volume.shape)
    volume = nibabel.as_closest_canonical(volume)
    return volume, tuple(float(z) or 1.0 for z in volume.header.get_zooms()[:3])


def scan_size(path: Path, options: DataOptions) -> tuple[int, tuple[int, int]]:
    """How many slices a volume gives, and their (width, height), from its header."""
    shape, spacing = _header(path)
    a, b = (axis for axis in range(3) if axis != options.axis)
    fine = min(spacing[a], spacing[b])
    size = (round(shape[a] * spacing[a] / fine), round(shape[b] * spacing[b] / fine))
    return len(slice_range(options.slices, shape[options.axis])), size


def slice_names(name: str, path: Path, options: DataOptions) -> list[str]:
    """What `slices` calls the slices of a volume, from its header.

    Arguments:
        name: what the scan is called in the slices' names.
        path: of the volume.
        options: the axis, and which slices.
    """
    shape, _ = _header(path)
    return [f"{name} slice {index}" for index in slice_range(options.slices, shape[options.axis])]


def _header(path: Path) -> tuple[list[int], list[float]]:
    """The shape and the spacing that `_canonical` gives; nibabel reads a volume to turn it, this does not."""
    nibabel = import_extra("nibabel")
    volume = nibabel.load(path)
    shape = volume.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise _no_volume(shape)
    axes = nibabel.io_orientation(volume.affine)[:, 0]
    if not np.isfinite(axes).all():
        raise DataError("its header does not say how its axes lie: save it with an affine of three axes")
    zooms = volume.header.get_zooms()
    order = np.argsort(axes).tolist()
    return [shape[axis] for axis in order], [float(zooms[axis]) or 1.0 for axis in order]


def _no_volume(shape: tuple[int, ...]) -> DataError:
    return DataError(f"{len(shape)} dimensions {shape}, not 3: give one volume a file")
