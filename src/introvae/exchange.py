"""Files that go into a model and come out of one, for the commands."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from introvae.data import TablePreparation, preparation_from, read_images, read_rows
from introvae.data.preparation import DEEP_MODES, eight_bit
from introvae.errors import ConfigError, DataError
from introvae.files import write_atomically
from introvae.model import IntrospectiveVAE
from introvae.pictures import image_grid, plane_figure, save_picture, to_pil


def read_samples(model: IntrospectiveVAE, names: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Files as the model takes them, `[N, ...]`, prepared as the data it was trained on, and a name for each sample."""
    preparation = preparation_from(model.config["data"]) if model.config else None
    if isinstance(preparation, TablePreparation):
        rows = [read_rows(Path(name), preparation) for name in names]
        return torch.cat(rows), [f"row {i}" for part in rows for i in range(len(part))]
    if preparation is not None:
        return read_images(names, preparation)
    return torch.stack([_read_image(Path(name), model.shape or ()) for name in names]), list(names)


def _read_image(path: Path, shape: tuple[int, ...]) -> Tensor:
    from PIL import Image

    if len(shape) != 3:
        raise DataError(f"the model takes vectors of shape {shape}, not images: use a model of images")
    try:
        with Image.open(path) as image:
            if image.mode in DEEP_MODES:
                raise DataError(f"{path} has mode {image.mode}: convert it to 8-bit grey or RGB")
            array = np.asarray(eight_bit(image).convert("L" if shape[0] == 1 else "RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # PIL: SyntaxError for a broken PNG
        raise DataError(f"{path} cannot be read as an image ({error}): give a PNG or JPEG file") from error
    if array.shape[:2] != shape[1:]:
        raise DataError(
            f"{path} is {array.shape[1]} x {array.shape[0]} pixels, the model takes {shape[2]} x {shape[1]}: resize it"
        )
    x = torch.from_numpy(array.copy())
    return (x[None] if x.ndim == 2 else x.permute(2, 0, 1)).float() / 255


def write_samples(
    x: Tensor, output: Path, names: list[str], columns: int | None = None, model: IntrospectiveVAE | None = None
) -> Path:
    """Samples as one picture, an array, a table in its own units, or one picture each in a folder; returns where."""
    preparation = preparation_from(model.config["data"]) if model is not None and model.config else None
    table = preparation if isinstance(preparation, TablePreparation) else None
    if not str(output).strip("."):
        raise ConfigError("the output has no name: give FILE.png, FILE.npy or a folder")
    try:
        if output.suffix == ".csv" and x.ndim == 2:
            import pandas as pd

            columns_of = list(table.columns) if table else [f"x{i}" for i in range(x.shape[1])]
            frame = pd.DataFrame((table.inverse(x) if table else x).numpy(), columns=pd.Index(columns_of))
            write_atomically(output, frame.to_csv(index=False).encode())
        elif output.suffix == ".npy":
            buffer = io.BytesIO()
            np.save(buffer, x.numpy())
            write_atomically(output, buffer.getvalue())
        elif x.ndim == 4 and output.suffix == ".png":
            save_picture(image_grid(x, columns), output)
        elif x.ndim == 4 and (not output.suffix or output.is_dir()):
            for image, name in zip(x, names, strict=True):
                save_picture(to_pil(image), output / name)
        elif x.ndim == 2 and x.shape[1] == 2 and output.suffix == ".png":
            save_picture(plane_figure({"sample": x}, {}, float(x.abs().max()) * 1.05), output)
        else:
            kinds = (
                "FILE.png, FILE.npy or a folder" if x.ndim == 4 else "FILE.csv or FILE.npy (or FILE.png in the plane)"
            )
            raise ConfigError(f"cannot write {output}: give {kinds}")
    except OSError as error:
        raise ConfigError(f"{output} cannot be written ({error}): choose another -o") from error
    return output
