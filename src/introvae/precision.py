"""Number formats: what the networks compute in, and where losses and latents stay wide."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from introvae.errors import ConfigError, one_of

PRECISIONS = ("auto", "float32", "tf32", "bf16")


def wide(x: Tensor) -> Tensor:
    """float32 for the half-width formats, others as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def unrounded(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)` in the format of its weights, also where autocast is on: for the few numbers that make a posterior."""
    x = x.to(next(layer.parameters()).dtype)
    if not torch.amp.is_autocast_available(x.device.type):
        return layer(x)
    with torch.autocast(x.device.type, enabled=False):
        return layer(x)


def pick_precision(name: str, device: torch.device, shape: tuple[int, ...]) -> str:
    """What a setting means on a device for data of a shape: float32, tf32 or bf16.

    "auto" takes bf16 for images where the hardware multiplies in it, else tf32 on a GPU. Vectors stay float32: near 1.4
    the spacing of bf16 is 0.008, a mode of the 8 Gaussians has a sigma of 0.014.

    Arguments:
        name: one of `PRECISIONS`.
        device: where the networks are.
        shape: of one sample, (C, H, W) or (D,).

    Raises:
        ConfigError: another name, a format that only GPUs have, or a short one for vectors.

    Example:
        >>> pick_precision("auto", torch.device("cpu"), shape=(2,))
        'float32'
    """
    one_of(PRECISIONS, precision=name)
    if name == "tf32" and device.type != "cuda":
        raise ConfigError(f"precision 'tf32' is for NVIDIA GPUs, this run is on {device.type}: choose auto or float32")
    if name in ("tf32", "bf16") and len(shape) != 3:
        raise ConfigError(f"precision {name!r} is for images, vectors need all digits: choose auto or float32")
    if name != "auto":
        return name
    if len(shape) != 3:
        return "float32"
    if multiplies_bf16(device):
        return "bf16"
    return "tf32" if device.type == "cuda" else "float32"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies matrices in bf16 (AVX512-BF16 or AMX on the CPU), so that it is the faster."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return False


_asked: list[tuple[object, Any]] = []
_before: list[Any] = []
_changing = Lock()


@contextmanager
def float32_multiplications(tf32: bool) -> Iterator[None]:
    """Let NVIDIA GPUs multiply float32 with TF32's 10 bits, or not; other devices do not care.

    The setting is the whole process', so the last one asked for holds. Threads and generators may leave in another
    order than they came: when all have left, it is what it was before the first.
    """
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        name, value = "fp32_precision", "tf32" if tf32 else "ieee"
        owners: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # pyright: ignore
    else:  # torch 2.8 and older; the newer one cannot be read by these names once the others were used
        name, value = "allow_tf32", tf32
        owners = (torch.backends.cuda.matmul, torch.backends.cudnn)
    mine = (object(), value)
    with _changing:
        if not _asked:
            _before[:] = [getattr(owner, name) for owner in owners]
        _asked.append(mine)
        for owner in owners:
            setattr(owner, name, value)
    try:
        yield
    finally:
        with _changing:
            _asked.remove(mine)
            for owner, found in zip(owners, _before, strict=True):
                setattr(owner, name, _asked[-1][1] if _asked else found)
