"""Moving pictures: GIF by Pillow, MP4 where an ffmpeg is at hand."""

from __future__ import annotations

import io
import shutil
import subprocess
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from introvae.errors import ConfigError, DataError, positive
from introvae.files import write_atomically
from introvae.pictures import image_grid

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".gif", ".mp4")


def write_animation(frames: Tensor, path: str | Path, seconds: float = 4.0) -> Path:
    """Images one after another, there and back, so that the end joins the beginning; a GIF loops without end.

    Arguments:
        frames: `[T, C, H, W]` in [0, 1]; small ones are enlarged as on sheets.
        path: FILE.gif or FILE.mp4. An MP4 needs the package imageio-ffmpeg or the program ffmpeg.
        seconds: of one loop. A GIF's frames last whole hundredths of a second, two at least: viewers slow down others.

    Returns:
        The path.

    Raises:
        ConfigError: another suffix, no ffmpeg, or a file that cannot be written.
        DataError: frames that are no images.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_animation(torch.rand(5, 1, 8, 8), f"{folder}/way.gif").name
        'way.gif'
    """
    positive(seconds=seconds)
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"cannot write {path} as moving pictures: give FILE.gif or FILE.mp4")
    if frames.ndim != 4 or not len(frames) or frames.shape[1] not in (1, 3):
        raise DataError(f"frames of shape {tuple(frames.shape)} are no images: give [T, C, H, W] with 1 or 3 channels")
    loop = torch.cat([frames, frames[1:-1].flip(0)])
    pictures = [image_grid(frame[None], columns=1, gap=0) for frame in loop]
    content = _gif(pictures, seconds) if path.suffix == ".gif" else _mp4(pictures, seconds)
    try:
        write_atomically(path, content)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error}): choose another -o") from error
    return path


def _gif(pictures: list[Image], seconds: float) -> bytes:
    buffer = io.BytesIO()
    milliseconds = 10 * max(2, round(100 * seconds / len(pictures)))
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0)
    return buffer.getvalue()


def _mp4(pictures: list[Image], seconds: float) -> bytes:
    program = _ffmpeg()
    if program is None:
        raise ConfigError(
            "an MP4 needs ffmpeg, and there is none: give FILE.gif, which needs nothing, or install imageio-ffmpeg"
        )
    width, height = pictures[0].size
    raw = b"".join(picture.convert("RGB").tobytes() for picture in pictures)
    with TemporaryDirectory() as folder:
        made = Path(folder) / "way.mp4"
        words = [program, "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
        words += ["-s", f"{width}x{height}", "-r", f"{len(pictures) / seconds:.6f}", "-i", "-"]
        # Players want 4:2:0 colours, which need even sides.
        words += ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-pix_fmt", "yuv420p", str(made)]
        done = subprocess.run(words, input=raw, capture_output=True, check=False)
        if done.returncode or not made.is_file():
            reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit {done.returncode}"]
            raise ConfigError(f"{program} made no MP4 ({reason[0]}): give FILE.gif instead")
        return made.read_bytes()


def _ffmpeg() -> str | None:
    """The program's path: imageio-ffmpeg's own, or one on the machine."""
    try:
        return import_module("imageio_ffmpeg").get_ffmpeg_exe()
    except Exception:  # missing, broken, or without its program
        return shutil.which("ffmpeg")
