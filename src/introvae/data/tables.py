"""Tables: columns of numbers, standardised, for the networks that take vectors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from introvae.data.arrays import ArrayData, Intake, Part, heldout_rows
from introvae.data.options import DataOptions
from introvae.data.rows import label_column
from introvae.errors import CheckpointError, ConfigError, DataError, first_line

if TYPE_CHECKING:
    from pandas import DataFrame

TABLE_SUFFIXES = (".csv", ".tsv")
NAMED = 5
"""How many columns of a kind a message names."""


@dataclass(frozen=True)
class TablePreparation:
    """The columns of a table and their means and standard deviations over the training part, saved with the model.

    Example:
        >>> table = TablePreparation(("a", "b"), (1.0, 0.0), (2.0, 1.0))
        >>> table.inverse(torch.tensor([[0.5, 0.0]]))
        tensor([[2., 0.]])
    """

    columns: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, values: np.ndarray) -> Tensor:
        """Values `[N, D]` in their units as standardised float32."""
        return torch.from_numpy(((values - np.array(self.mean)) / np.array(self.std)).astype(np.float32))

    def inverse(self, x: Tensor) -> Tensor:
        """Standardised values `[N, D]` in the table's units."""
        return (x.double() * torch.tensor(self.std).double() + torch.tensor(self.mean).double()).float()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a model's config.json."""
        return {"kind": "table", **{name: list(value) for name, value in asdict(self).items()}}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> TablePreparation:
        """What `to_dict` gave.

        Raises:
            CheckpointError: keys or values that no version of this class wrote.
        """
        try:
            columns, *numbers = (tuple(content[name]) for name in ("columns", "mean", "std"))
            table = cls(columns, *(tuple(float(value) for value in values) for values in numbers))
            fine = len(table.columns) == len(table.mean) == len(table.std) and all(s > 0 for s in table.std)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the model's table preparation cannot be read ({error}): restore a copy") from error
        if not fine:
            raise CheckpointError("the model's table preparation has lists of several lengths: restore a copy")
        return table


def load_table(path: Path, options: DataOptions, preparation: TablePreparation | None = None) -> ArrayData:
    """Columns of a CSV, TSV or Parquet file, standardised with the mean and deviation of the training part.

    Raises:
        DataError: the file cannot be read, or columns with text, missing, infinite or constant values (each is named).
        ConfigError: a column that was asked for is not there.
    """
    frame = read_table(path)
    names = [str(name) for name in frame.columns]
    label = label_column(names, options.label, str(path))
    if options.group is not None and options.group not in names:
        raise ConfigError(f"{path} has no column {options.group!r} for --group: choose one of {', '.join(names)}")
    if len(frame) < 2:
        raise DataError(f"{path} has {len(frame)} rows: give at least two")
    known = preparation is not None
    columns = list(preparation.columns) if preparation else _columns(path, names, options, label)
    values = _values(path, frame, columns, constant_allowed=known)
    groups = [] if options.group is None else [_group(value) for value in frame[options.group]]
    rows = heldout_rows(len(values), options.heldout, options.heldout_seed, groups)
    kept = np.setdiff1d(np.arange(len(values)), rows)
    if preparation is None:
        with np.errstate(over="ignore", under="ignore"):
            std = values[kept].std(axis=0)
        if odd := [name for name, s in zip(columns, std, strict=True) if not np.isfinite(s) or 0 < s < 1e-100]:
            raise DataError(f"{path}: values too large or too small: {_named(odd)}; scale them or use --drop")
        if flat := [name for name, s in zip(columns, np.ptp(values[kept], axis=0), strict=True) if s == 0]:
            raise DataError(f"{path}: constant in the training part: {_named(flat)}; leave them out with --drop")
        mean = values[kept].mean(axis=0)
        preparation = TablePreparation(tuple(columns), tuple(mean.tolist()), tuple(std.tolist()))
    labels, class_names = _labels(frame[label]) if label is not None and label not in columns else (None, ())
    whole = Part(preparation(values), labels, [f"row {row}" for row in range(len(values))])
    train, heldout = whole[torch.from_numpy(kept)], whole[torch.tensor(rows)]
    remarks = _remarks(values, columns, label if label not in columns else None, options)
    first: dict[bytes, int] = {}
    for row in kept.tolist():
        first.setdefault(values[row].tobytes(), row)
    pairs = tuple((f"row {r}", f"row {first[values[r].tobytes()]}") for r in rows if values[r].tobytes() in first)
    if pairs:
        remarks.append(
            f"{len(pairs):,} held-out rows are in the training part too (such as {pairs[0][0]} = {pairs[0][1]})"
        )
    intake = Intake(len(values), len(values), (), tuple(remarks), pairs)
    return ArrayData(str(path), train, heldout, class_names, preparation, intake, tuple(columns))


def read_rows(path: Path, preparation: TablePreparation) -> Tensor:
    """All rows of a table as a model takes them, `[N, D]`.

    Raises:
        DataError: the file cannot be read, or lacks a column, or a value is no finite number.
    """
    return preparation(_values(path, read_table(path), list(preparation.columns), constant_allowed=True))


def read_all_rows(path: Path, preparation: TablePreparation) -> tuple[Tensor, dict[int, str]]:
    """All rows of a table as a model takes them, `[N, D]`, and the reason of each that cannot be used.

    Raises:
        DataError: the file cannot be read, or lacks a column.
    """
    import pandas as pd

    frame, columns = read_table(path), list(preparation.columns)
    _check_columns(path, frame, columns)
    numbers = frame[columns].apply(pd.to_numeric, errors="coerce")
    with np.errstate(over="ignore"):
        x = preparation(numbers.to_numpy(dtype=np.float64, na_value=np.nan))
    strange = ~x.isfinite().numpy()
    return x, {
        row: f"no number, or one too large: {_named([columns[i] for i in np.flatnonzero(strange[row])])}"
        for row in np.flatnonzero(strange.any(axis=1)).tolist()
    }


def read_table(path: Path) -> DataFrame:
    """A CSV (commas, semicolons or tabs), TSV or Parquet file.

    Raises:
        DataError: it cannot be read.
    """
    import pandas as pd

    try:
        if path.suffix == ".parquet":
            frame = pd.read_parquet(path)
        else:
            with open(path, encoding="utf-8-sig") as file:
                head = file.readline()
            frame = pd.read_csv(path, sep=max(",;\t", key=head.count), encoding="utf-8-sig")
        frame.columns = [str(name) for name in frame.columns]
        return frame
    except Exception as error:  # pandas and pyarrow have many types
        raise DataError(
            f"{path} cannot be read as a table ({first_line(error)}): give a CSV file with a header"
        ) from error


def _columns(path: Path, names: list[str], options: DataOptions, label: str | None) -> list[str]:
    for option, asked in (("columns", options.columns), ("drop", options.drop)):
        for name in asked:
            if name not in names:
                raise ConfigError(f"{path} has no column {name!r} for --{option}: choose from {', '.join(names)}")
    columns_asked = set(options.columns)
    left_out = {*options.drop, options.group, None if label in columns_asked else label}
    columns = [name for name in options.columns or names if name not in left_out]
    if not columns:
        raise ConfigError(f"{path}: no column is left: name some with --columns, choose from {', '.join(names)}")
    return columns


def _values(path: Path, frame: DataFrame, columns: list[str], constant_allowed: bool) -> np.ndarray:
    """The columns as float64 `[N, D]`; all that is wrong with any of them is said at once."""
    import pandas as pd

    _check_columns(path, frame, columns)
    text = [c for c in columns if not (pd.api.types.is_numeric_dtype(frame[c]) or pd.api.types.is_bool_dtype(frame[c]))]
    problems = [f"text: {_named(text)}"] if text else []
    numbers = [name for name in columns if name not in text]
    values = frame[numbers].to_numpy(dtype=np.float64, na_value=np.nan) if numbers else np.empty((len(frame), 0))
    gaps = np.isnan(values)
    if gaps.any():
        holes = [
            f"{numbers[i]} ({int(n)}, first in row {int(gaps[:, i].argmax())})" for i, n in enumerate(gaps.sum(0)) if n
        ]
        problems.append(f"missing values: {_named(holes)}")
    if np.isinf(values).any():
        problems.append(f"infinite values: {_named([numbers[i] for i in np.flatnonzero(np.isinf(values).any(0))])}")
    if not constant_allowed and len(values):
        flat = [numbers[i] for i in range(len(numbers)) if not gaps[:, i].any() and np.ptp(values[:, i]) == 0]
        if flat:
            problems.append(f"constant: {_named(flat)}")
    if problems:
        raise DataError(
            f"{path} has columns that cannot be used ({'; '.join(problems)}): fill them, or leave them out with --drop"
        )
    return values


def _check_columns(path: Path, frame: DataFrame, columns: list[str]) -> None:
    if missing := [name for name in columns if name not in frame.columns]:
        raise DataError(f"{path} lacks columns that the model takes: {_named(missing)}; give a table with them")


def _named(names: list[str]) -> str:
    listed = ", ".join(names[:NAMED])
    return f"{listed} and {len(names) - NAMED} more" if len(names) > NAMED else listed


def _group(value: Any) -> str | None:
    import pandas as pd

    return None if pd.isna(value) else str(value)


def _labels(column: Any) -> tuple[Tensor, tuple[str, ...]]:
    import pandas as pd

    codes, classes = pd.factorize(column, sort=True)
    return torch.from_numpy(codes.astype(np.int64)), tuple(str(name) for name in classes)


def _remarks(values: np.ndarray, columns: list[str], label: str | None, options: DataOptions) -> list[str]:
    said = [f"{len(columns)} columns, each minus its mean over its standard deviation: {', '.join(columns)}"]
    if label is not None and options.label is None:
        said.append(f"column {label!r} is taken as the class labels, not as a value (--label none makes it one)")
    counting = [name for i, name in enumerate(columns) if len(values) > 2 and (np.diff(values[:, i]) == 1).all()]
    if counting:
        said.append(f"column {_named(counting)} only counts the rows: leave it out with --drop")
    return said
