"""What a model is trained on: 2D densities, digits, images in Parquet files, arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from introvae.data.arrays import ArrayData, Part, from_array
from introvae.data.densities import Density, get_density, list_densities
from introvae.errors import DataError

__all__ = ["ArrayData", "Data", "Density", "DensityData", "Part", "from_array", "holds_vectors", "load_data"]


@dataclass(frozen=True)
class DensityData:
    """An endless supply of points in the plane."""

    density: Density

    @property
    def name(self) -> str:
        """What `--data` was."""
        return f"density:{self.density.name}"

    @property
    def shape(self) -> tuple[int, ...]:
        """(2,)."""
        return (2,)

    def batches(self, batch_size: int, seed: int) -> DensityBatches:
        """An endless stream of fresh points."""
        return DensityBatches(self.density, batch_size, seed)


class DensityBatches:
    """Endless batches of fresh draws."""

    def __init__(self, density: Density, batch_size: int, seed: int) -> None:
        self.density, self.batch_size = density, batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def next(self, device: torch.device | str) -> Tensor:
        """The next batch, float32 `[N, 2]`."""
        return self.density.sample(self.batch_size, self.generator).to(device)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.generator.set_state(state["generator"].cpu())


Data = ArrayData | DensityData


def load_data(source: str | Path | Data | Tensor | np.ndarray) -> Data:
    """The data that `--data` names.

    Arguments:
        source: "digits", "density:NAME", a Parquet file, a folder of Parquet files, a .npy file of images or vectors,
            or an array in memory (see `from_array`).

    Raises:
        ConfigError: an unknown density.
        DataError: an unknown name, or files that cannot be read.

    Example:
        >>> load_data("density:rings").shape
        (2,)
    """
    if isinstance(source, ArrayData | DensityData):
        return source
    if isinstance(source, Tensor | np.ndarray):
        return from_array(source)
    name = str(source)
    if name.startswith("density:"):
        return DensityData(get_density(name.removeprefix("density:")))
    if name == "digits":
        from introvae.data.images import load_digits

        return load_digits()
    if name == "array":
        raise DataError("the run's data were an array in memory: give it again, as data=... or as --data FILE.npy")
    path = Path(name).expanduser()
    if path.suffix == ".npy" and path.is_file():
        try:
            with open(path, "rb") as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
        except (OSError, EOFError, ValueError) as error:
            reason = "it holds Python objects" if "pickle" in str(error) else str(error)
            raise DataError(
                f"{path} cannot be read as an array ({reason}): give a file written by numpy.save"
            ) from error
        return from_array(array, name=name)
    if (path.suffix == ".parquet" and path.is_file()) or (path.is_dir() and any(path.rglob("*.parquet"))):
        from introvae.data.images import load_parquet

        return load_parquet(path)
    choices = ", ".join(f"density:{density}" for density in list_densities())
    if path.exists():
        raise DataError(f"{path} holds no Parquet file: give a .parquet or .npy file or a folder of Parquet files")
    raise DataError(
        f"unknown data {name!r}: choose digits, {choices}, or the path of a .parquet or .npy file or of a folder of "
        "Parquet files"
    )


def holds_vectors(source: str) -> bool:
    """Whether the named data are points or vectors and no images, from the name or a file's head alone."""
    if source.startswith("density:"):
        return True
    path = Path(source).expanduser()
    if path.suffix != ".npy" or not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            old = np.lib.format.read_magic(file) == (1, 0)
            read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
            return len(read(file)[0]) == 2
    except (OSError, EOFError, ValueError):
        return False  # load_data will say what is wrong
