"""What a model is trained on: folders of images and scans, Parquet files, arrays, tables, digits, 2D densities."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from introvae.data.arrays import ArrayData, Intake, Part, from_array
from introvae.data.densities import Density, get_density, list_densities
from introvae.data.options import DATA_OPTIONS, DataOptions
from introvae.data.preparation import Preparation
from introvae.data.tables import TABLE_SUFFIXES, TablePreparation, load_table, read_rows
from introvae.errors import CheckpointError, DataError

__all__ = [
    "DATA_OPTIONS",
    "ArrayData",
    "Data",
    "DataOptions",
    "Density",
    "DensityData",
    "Intake",
    "Part",
    "Preparation",
    "TablePreparation",
    "from_array",
    "holds_vectors",
    "is_table",
    "load_data",
    "preparation_from",
    "read_images",
    "read_rows",
]

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.+-]+)?")
"""owner/name, or owner/name:configuration."""
SAID = 10
"""How many skipped files are named on the terminal."""

log = logging.getLogger("introvae")


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
        return self.stored().to(device)

    def stored(self, share: slice = slice(None)) -> Tensor:
        """The next batch, or some rows of it, on the CPU."""
        return self.density.sample(self.batch_size, self.generator)[share]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.generator.set_state(state["generator"].cpu())


Data = ArrayData | DensityData


def load_data(
    source: str | Path | Data | Tensor | np.ndarray,
    options: DataOptions | None = None,
    preparation: Preparation | TablePreparation | None = None,
) -> Data:
    """The data that `--data` names; what became of each file is in `data.intake` and logged as "introvae".

    Arguments:
        source: "digits"; "density:NAME"; a folder of images (sub-folders are classes) or NIfTI scans; a Parquet file or
            a folder of them; a .npy or .npz file of images or vectors; a CSV, TSV or Parquet table; an image data set
            on the Hugging Face hub ("owner/name"); or an array in memory (see `from_array`).
        options: how to read it.
        preparation: a model's, so that the data are prepared as those it was trained on.

    Raises:
        ConfigError: an unknown density or column.
        DataError: an unknown name, or files that cannot be read.

    Example:
        >>> load_data("density:rings").shape
        (2,)
    """
    options = options or DataOptions()
    if isinstance(source, ArrayData | DensityData):
        return source
    if isinstance(source, Tensor | np.ndarray) and (options.size is not None or options.channels is not None):
        from introvae.data.files import load_array

        return load_array(np.asarray(source.detach().cpu() if isinstance(source, Tensor) else source), options)
    if isinstance(source, Tensor | np.ndarray):
        return from_array(source, seed=options.heldout_seed, share=options.heldout)
    data = _load(str(source), options, preparation)
    if isinstance(data, ArrayData) and data.intake is not None:
        _say(data, data.intake)
    return data


def _load(name: str, options: DataOptions, preparation: Preparation | TablePreparation | None) -> Data:
    if name.startswith("density:"):
        return DensityData(get_density(name.removeprefix("density:")))
    if name == "digits":
        from introvae.data.digits import load_digits

        return load_digits()
    if name == "array":
        raise DataError("the run's data were an array in memory: from Python, give the same array again as data=...")
    path = _path(name)
    if is_table(path):
        if isinstance(preparation, Preparation):
            raise DataError(f"{path} is a table and the model takes images: give images")
        return load_table(path, options, preparation)
    if isinstance(preparation, TablePreparation):
        raise DataError(f"the model takes rows of a table ({', '.join(preparation.columns[:5])} ...): give a CSV file")
    if path.suffix.lower() in (".npy", ".npz") and path.is_file():
        from introvae.data.files import load_array_file

        return load_array_file(path, options, preparation)
    from introvae.data.images import load_images
    from introvae.data.opening import load_stream
    from introvae.data.row_groups import hub_shards, parquet_shards
    from introvae.data.rows import ParquetSource, RowSource
    from introvae.data.shards import FolderShards
    from introvae.data.sources import FolderSource, holds_parquet

    if (path.suffix.lower() == ".parquet" and path.is_file()) or (path.is_dir() and holds_parquet(path)):
        source = ParquetSource(path, options)
        stream = load_stream(lambda: parquet_shards(source), options, preparation)
        return stream or load_images(source, options, preparation)
    if path.exists():
        stream = load_stream(lambda: FolderShards(path, options), options, preparation) if path.is_dir() else None
        return stream or load_images(FolderSource(path, options), options, preparation)
    if HUB_NAME.fullmatch(name):
        try:
            stream = load_stream(lambda: hub_shards(name, options), options, preparation)
            return stream or load_images(RowSource(name, name, options), options, preparation)
        except DataError as error:
            raise DataError(f"there is no folder or file {name} here, and as a name on the hub: {error}") from error
    choices = ", ".join(f"density:{density}" for density in list_densities())
    raise DataError(
        f"unknown data {name!r}, and no such folder or file here: choose digits, {choices}, the path of a folder of "
        "images, scans or Parquet files, of a .parquet, .npy, .npz or .csv file, or owner/name on the hub"
    )


def _path(name: str) -> Path:
    """The path that a name may be.

    Raises:
        DataError: it leads where one may not look.
    """
    try:
        path = Path(name).expanduser()
        with suppress(FileNotFoundError):
            path.stat()
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{name[:200]} cannot be opened ({reason}): give a path that can be read") from error
    return path


def _say(data: ArrayData, intake: Intake) -> None:
    unit = "pictures" if len(data.shape) == 3 else "rows"
    shape = " x ".join(map(str, data.shape))
    log.info(
        "data     %s: %s %s of %s, %s to train on, %s held out",
        *(data.name, f"{intake.used:,}", unit, shape, f"{len(data.train):,}", f"{len(data.heldout):,}"),
    )
    if len(data.class_names) > 1:
        log.info("         %d classes: %s", len(data.class_names), ", ".join(data.class_names[:10]))
    for remark in intake.remarks:
        log.info("         %s", remark)
    if intake.skipped:
        log.info("         skipped: %s (%s files or rows were found)", f"{len(intake.skipped):,}", f"{intake.found:,}")
    for name, reason in intake.skipped[:SAID]:
        log.info("           %s: %s", name, reason)
    if len(intake.skipped) > SAID:
        log.info("           and %s more, all named in the run's log.jsonl", f"{len(intake.skipped) - SAID:,}")


def is_table(path: str | Path) -> bool:
    """Whether a path is a table's: by its suffix, or a Parquet file without a column of images."""
    path = _path(str(path))
    if not path.is_file():
        return False
    if path.suffix.lower() in TABLE_SUFFIXES:
        return True
    if path.suffix.lower() != ".parquet":
        return False
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException):
        return False  # whoever reads it will say what is wrong
    if b"Image" in (schema.metadata or {}).get(b"huggingface", b""):
        return False
    return not any(pa.types.is_struct(field.type) or pa.types.is_binary(field.type) for field in schema)


def holds_vectors(source: str) -> bool:
    """Whether the named data are points, rows or vectors and no images, from the name or a file's head alone."""
    if source.startswith("density:"):
        return True
    path = _path(source)
    if is_table(path):
        return True
    if path.suffix.lower() not in (".npy", ".npz") or not path.is_file():
        return False
    from introvae.data.files import dimensions_of

    return dimensions_of(path) == 2


def preparation_from(facts: Mapping[str, Any]) -> Preparation | TablePreparation | None:
    """The preparation among the facts about the data that a model was saved with; None where there is none.

    Raises:
        CheckpointError: it is of an unknown kind or damaged.
    """
    content = facts.get("preparation")
    if content is None:
        return None
    kinds = {"images": Preparation, "table": TablePreparation}
    if not isinstance(content, dict) or content.get("kind") not in kinds:
        raise CheckpointError("the model's data preparation is of an unknown kind: use the version that wrote it")
    return kinds[content["kind"]].from_dict(content)


def read_images(paths: Sequence[str | Path], preparation: Preparation) -> tuple[Tensor, list[str]]:
    """Image files or scans as a model takes them, float32 `[N, C, H, W]` in [0, 1], and their names.

    Raises:
        DataError: a file cannot be read.
    """
    from introvae.data.images import read_one

    if not paths:
        raise DataError("no image is named: give at least one file")
    found = [pair for path in paths for pair in read_one(Path(path), preparation)]
    return torch.from_numpy(np.stack([image for _, image in found])).float() / 255, [name for name, _ in found]
