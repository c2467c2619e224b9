"""From a picture as it was found to the 8-bit image that a model takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from introvae.data.options import FITS, SLICES
from introvae.errors import CheckpointError, DataError

DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
GREY_MODES = ("L", "1", "LA", "La", *DEEP_MODES)
KEPT_SIDE, SMALL_SIDE, AUTO_SIDE, SMALL_AUTO_SIDE = 128, 32, 64, 32
"""Images of one size keep it up to the first; see `automatic_size`."""


@dataclass(frozen=True)
class Preparation:
    """What is done to every picture, saved with the model so that later commands do the same.

    8-bit grey stays grey; RGB, palette, CMYK, YCbCr and the like become RGB; transparency is laid over white; 16-bit,
    32-bit and float grey pictures go through the window (16 bits in colour are refused). EXIF's orientation is applied.
    Resizing is Lanczos, antialiased.

    Arguments:
        size: (height, width) in pixels.
        channels: 1 or 3.
        fit: pad, crop or stretch.
        window: the values that become black and white in pictures of more than 8 bits; None where the data had none.
        percentiles: takes the window from each file instead.
        axis, slices: of scans.

    Example:
        >>> prepare = Preparation(size=(4, 4), channels=1)
        >>> prepare(Image.new("RGB", (20, 10), "red")).shape
        (1, 4, 4)
    """

    size: tuple[int, int]
    channels: int
    fit: str = "pad"
    window: tuple[float, float] | None = None
    percentiles: tuple[float, float] | None = None
    axis: int = 2
    slices: str = ":"

    def __call__(self, picture: Image.Image, window: tuple[float, float] | None = None) -> np.ndarray:
        """A picture as uint8 `[C, H, W]`.

        Arguments:
            window: of this picture's file, where `percentiles` is set.

        Raises:
            DataError: NaN or infinite values, or more than 8 bits where the model has no window.
        """
        if picture.format == "JPEG":  # let the decoder do the first halvings
            picture.draft(picture.mode, (3 * max(self.size), 3 * max(self.size)))
        if deep_colour(picture):
            raise DataError("16 bits in colour, of which only 8 would be read: convert it to 8 bits, or to 16-bit grey")
        picture = upright(picture)
        if picture.mode in DEEP_MODES:
            picture = self._windowed(picture, window)
        else:
            picture = eight_bit(picture).convert("L" if self.channels == 1 else "RGB")
        array = np.asarray(resized(picture, self.size, self.fit))
        if array.dtype != np.uint8:
            array = np.clip(np.rint(array), 0, 255).astype(np.uint8)
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        return np.array(np.broadcast_to(array, (self.channels, *self.size)))

    def _windowed(self, picture: Image.Image, window: tuple[float, float] | None) -> Image.Image:
        values = deep_values(picture)
        if self.percentiles is None:
            window = self.window
        elif window is None:
            window = window_of(values, self.percentiles)
        if window is None:
            raise DataError(
                "it has more than 8 bits and the model saw 8-bit images only, so there is no window: convert it to 8 "
                "bits"
            )
        low, high = window
        return Image.fromarray(np.clip((values - low) * (255 / (high - low)), 0, 255).astype(np.float32))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a model's config.json."""
        return {"kind": "images", **asdict(self)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Preparation:
        """What `to_dict` gave, also after a round trip through JSON.

        Raises:
            CheckpointError: keys or values that no version of this class wrote.
        """
        values = {name: value for name, value in content.items() if name != "kind"}
        try:
            pairs = {k: tuple(values[k]) if values.get(k) is not None else None for k in PAIRS}
            preparation = cls(**{**values, **pairs})
            fine = preparation.fit in FITS and preparation.channels in (1, 3) and preparation.axis in (0, 1, 2)
            fine = fine and len(preparation.size) == 2 and SLICES.fullmatch(preparation.slices) is not None
            fine = fine and all(isinstance(side, int) and side > 0 for side in preparation.size)
            for pair in (preparation.window, preparation.percentiles):
                fine = fine and (pair is None or (len(pair) == 2 and float(pair[0]) < float(pair[1])))
        except (TypeError, ValueError, KeyError, IndexError) as error:
            raise CheckpointError(f"the model's data preparation cannot be read ({error}): restore a copy") from error
        if not fine:
            raise CheckpointError(f"the model's data preparation {content} is impossible: restore it from a copy")
        return preparation


PAIRS = ("size", "window", "percentiles")


def deep_colour(picture: Image.Image) -> bool:
    """Whether a picture that was not loaded yet has 16 bits a channel in colour; Pillow keeps the upper 8."""
    tiles = getattr(picture, "tile", [])  # how the file's bytes are to be read; gone once they were
    return bool(picture.mode in ("RGB", "RGBA") and tiles and ";16" in str(tiles[0][3]))


def upright(picture: Image.Image) -> Image.Image:
    """The picture turned as its EXIF data say; as it is where they are damaged."""
    try:
        return ImageOps.exif_transpose(picture)
    except (OSError, Image.DecompressionBombError):
        raise  # of the pixels
    except Exception:  # of the EXIF block: Pillow has no type of its own for it
        return picture


def eight_bit(picture: Image.Image) -> Image.Image:
    """A picture of up to 8 bits as grey (mode L) or RGB, its transparency laid over white.

    Raises:
        DataError: a mode that cannot be converted.
    """
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "RGBa", "La", "PA"):
        clear = picture.convert("RGBA")
        white = Image.new("RGBA", clear.size, "white")
        flat = Image.alpha_composite(white, clear)
        return flat.convert("L" if picture.mode in GREY_MODES else "RGB")
    if picture.mode in ("L", "RGB"):
        return picture
    try:
        return picture.convert("L" if picture.mode in GREY_MODES else "RGB")
    except ValueError as error:
        raise DataError(f"mode {picture.mode} cannot be converted: convert it to 8-bit grey or RGB") from error


def deep_values(picture: Image.Image) -> np.ndarray:
    """The values of a picture of more than 8 bits, float32 `[H, W]`.

    Raises:
        DataError: NaN or infinite values.
    """
    values = np.asarray(picture).astype(np.float32)
    if not np.isfinite(values).all():
        raise DataError("it holds NaN or infinite values: remove or fill them")
    return values


def window_of(values: np.ndarray, percentiles: tuple[float, float]) -> tuple[float, float]:
    """The values at two percentiles; [0, 1] for floats that all lie in it.

    Raises:
        DataError: one value only.

    Example:
        >>> window_of(np.arange(101), (10, 90))
        (10.0, 90.0)
    """
    lowest, highest = float(values.min()), float(values.max())
    if np.issubdtype(values.dtype, np.floating) and 0 <= lowest < highest <= 1:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(values, percentiles))
    if low >= high:  # nearly all values are the same
        low, high = lowest, highest
    if low >= high:
        raise DataError(f"all values are {low:g}: there is no contrast to learn, give other images")
    return low, high


def resized(picture: Image.Image, size: tuple[int, int], fit: str) -> Image.Image:
    """The picture at (height, width), antialiased: padded with black, cropped at the centre, or stretched."""
    height, width = size
    if picture.size == (width, height):
        return picture
    if fit == "crop":
        return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    inner = (width, height)
    if fit == "pad":
        scale = min(width / picture.width, height / picture.height)
        inner = (max(1, round(scale * picture.width)), max(1, round(scale * picture.height)))
    small = picture.resize(inner, Image.Resampling.LANCZOS, reducing_gap=3.0)
    if inner == (width, height):
        return small
    sheet = Image.new(picture.mode, (width, height))
    sheet.paste(small, ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return sheet


def automatic_size(sizes: dict[tuple[int, int], int]) -> tuple[int, int]:
    """(height, width) for images of these (width, height)s and counts, where none was asked for.

    One size that networks take (a square of at most 128 pixels that halves down to 4 ... 7), or one under 32 pixels, is
    kept; otherwise a square of 64, or of 32 where half of the images have a side below 48.

    Example:
        >>> automatic_size({(28, 28): 100}), automatic_size({(640, 480): 60, (480, 640): 40})
        ((28, 28), (64, 64))
    """
    if len(sizes) == 1:
        ((width, height),) = sizes
        square = width == height <= KEPT_SIDE and halves_evenly(width)
        if square or max(width, height) < SMALL_SIDE:
            return height, width
    sides = sorted((min(size), count) for size, count in sizes.items())
    seen, half = 0, sum(sizes.values()) / 2
    for side, count in sides:
        seen += count
        if seen >= half:
            auto = SMALL_AUTO_SIDE if side < 48 else AUTO_SIDE
            return auto, auto
    return AUTO_SIDE, AUTO_SIDE


def halves_evenly(side: int) -> bool:
    """Whether a side can be halved, at least once, until 4 to 7 pixels are left."""
    while side >= 8 and side % 2 == 0:
        side //= 2
        if side < 8:
            return True
    return False
