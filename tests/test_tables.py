from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_wine

from introvae.data import (
    ArrayData,
    DataOptions,
    Preparation,
    TablePreparation,
    holds_vectors,
    is_table,
    load_data,
    preparation_from,
    read_rows,
)
from introvae.errors import CheckpointError, ConfigError, DataError


def frame(rows: int = 40, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {"age": rng.integers(18, 90, rows), "height": rng.normal(1.7, 0.1, rows), "income": rng.gamma(2, 2e4, rows)}
    )


def write(table: pd.DataFrame, path: Path, separator: str = ",") -> Path:
    if path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, sep=separator, index=False)
    return path


def load(path: Path, preparation: TablePreparation | None = None, **options: Any) -> ArrayData:
    data = load_data(path, DataOptions(**options), preparation)
    assert isinstance(data, ArrayData)
    return data


def numbers(names: Any) -> list[int]:
    return [int(name.removeprefix("row ")) for name in names]


def remarks(data: ArrayData) -> str:
    assert data.intake is not None
    return "\n".join(data.intake.remarks)


def assert_standardised(data: ArrayData, table: pd.DataFrame) -> None:
    trained_on, looked_at = numbers(data.train.names), numbers(data.heldout.names)
    assert sorted([*trained_on, *looked_at]) == list(range(len(table)))
    values = table.to_numpy(np.float64)
    mean, std = values[trained_on].mean(axis=0), values[trained_on].std(axis=0)
    for part, rows in ((data.train, trained_on), (data.heldout, looked_at)):
        assert part.x.dtype == torch.float32
        assert part.x.numpy() == pytest.approx((values[rows] - mean) / std, abs=1e-4)
    assert isinstance(data.preparation, TablePreparation)
    assert data.preparation.mean == pytest.approx(mean)
    assert data.preparation.std == pytest.approx(std)
    back = data.preparation.inverse(data.heldout.x).numpy()
    assert (np.abs(back - values[looked_at]) < 1e-5 * (std + np.abs(mean))).all()


# Files


@pytest.mark.parametrize(
    ("name", "separator"), [("x.csv", ","), ("x.csv", ";"), ("x.csv", "\t"), ("x.tsv", "\t"), ("x.parquet", "")]
)
def test_tables_are_standardised_with_the_training_part_only(tmp_path: Path, name: str, separator: str):
    path = write(frame(), tmp_path / name, separator)
    data = load(path)
    assert data.name == str(path)
    assert data.shape == (3,)
    assert data.column_names == ("age", "height", "income")
    assert (len(data.train), len(data.heldout)) == (36, 4)
    assert data.train.labels is None
    assert_standardised(data, frame())
    assert is_table(path)
    assert holds_vectors(str(path))


@pytest.mark.parametrize("loader", [load_wine, load_breast_cancer])
def test_scikit_learns_tables(tmp_path: Path, loader: Any):
    table = loader(as_frame=True).frame
    data = load(write(table, tmp_path / "x.csv"))
    features = table.drop(columns="target")
    assert data.column_names == tuple(features.columns)
    assert_standardised(data, features)
    for part in (data.train, data.heldout):
        assert part.labels is not None
        assert part.labels.tolist() == table["target"].iloc[numbers(part.names)].tolist()
    assert data.class_names == tuple(str(kind) for kind in sorted(table["target"].unique()))


@pytest.mark.parametrize("name", ["height", "value", "Size (cm)", "a"])
def test_a_table_of_one_column(tmp_path: Path, name: str):
    table = pd.DataFrame({name: frame()["height"]})
    data = load(write(table, tmp_path / "x.csv"))
    assert data.column_names == (name,)
    assert_standardised(data, table)


def test_a_parquet_table_of_numbered_columns(tmp_path: Path):
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(30, 3)))
    data = load(write(table, tmp_path / "x.parquet"))
    assert data.column_names == ("0", "1", "2")
    assert_standardised(data, table)


@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe\x80" * 9, b'a,b\n1,2\n"3,4\n'])
@pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
def test_files_that_are_no_table_are_refused(tmp_path: Path, content: bytes, name: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(str(tmp_path / name))) as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rows", [0, 1])
def test_a_table_needs_two_rows(tmp_path: Path, rows: int):
    with pytest.raises(DataError, match=r"x\.csv"):
        load(write(frame(rows), tmp_path / "x.csv"))


def test_the_share_and_the_seed_decide_what_is_held_out(tmp_path: Path):
    path = write(frame(), tmp_path / "x.csv")
    first, same, other = (load(path, heldout=0.25, heldout_seed=seed) for seed in (0, 0, 1))
    assert len(first.heldout) == 10
    assert first.heldout.names == same.heldout.names
    assert set(first.heldout.names) != set(other.heldout.names)
    assert_standardised(other, frame())


# Columns


@pytest.mark.parametrize("asked", ["income,age", " income , age ", ["income", "age"], ("income", "age")])
def test_columns_that_were_asked_for_in_their_order(tmp_path: Path, asked: Any):
    data = load(write(frame(), tmp_path / "x.csv"), columns=asked)
    assert data.column_names == ("income", "age")
    assert_standardised(data, frame()[["income", "age"]])


@pytest.mark.parametrize("dropped", ["height", ["height"], "height,", "height , comment"])
def test_columns_that_were_dropped(tmp_path: Path, dropped: Any):
    table = frame()
    if "comment" in dropped:
        table["comment"] = "none"
    data = load(write(table, tmp_path / "x.csv"), drop=dropped)
    assert data.column_names == ("age", "income")
    assert_standardised(data, frame()[["age", "income"]])


@pytest.mark.parametrize("option", ["columns", "drop", "label", "group"])
def test_unknown_columns_are_refused_with_the_choices(tmp_path: Path, option: str):
    path = write(frame(), tmp_path / "x.csv")
    with pytest.raises(ConfigError, match=rf"no column 'weight' for --{option}: .*age, height, income"):
        load(path, **{option: "weight"})


def test_a_table_without_columns_left_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no column is left"):
        load(write(frame(), tmp_path / "x.csv"), drop="age,height,income")


def test_true_and_false_are_numbers(tmp_path: Path):
    table = frame()
    table["smokes"] = np.arange(40) % 3 == 0
    for name in ("x.csv", "x.parquet"):
        data = load(write(table, tmp_path / name))
        assert data.column_names == ("age", "height", "income", "smokes")
        assert_standardised(data, table)


def bad_table() -> pd.DataFrame:
    table = frame()
    table["city"] = ["Rome", "Oslo"] * 20
    table.loc[7, "height"] = np.nan
    table.loc[30, "height"] = np.nan
    table.loc[3, "income"] = np.inf
    table["planet"] = 3
    return table


@pytest.mark.parametrize("name", ["x.csv", "x.parquet"])
def test_all_that_is_wrong_is_said_in_one_line(tmp_path: Path, name: str):
    with pytest.raises(DataError) as caught:
        load(write(bad_table(), tmp_path / name))
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "text: city",
        "missing values: height (2, first in row 7)",
        "infinite values: income",
        "constant: planet",
    ):
        assert part in message
    assert "age" not in message.replace(str(tmp_path), "")
    assert "--drop" in message


@pytest.mark.parametrize(
    ("column", "part"),
    [
        ("city", "text"),
        ("height", r"missing values: height \(2, first in row 7\)"),
        ("income", "infinite"),
        ("planet", "constant"),
    ],
)
def test_each_of_them_is_refused_alone_and_may_be_dropped(tmp_path: Path, column: str, part: str):
    path = write(bad_table()[["age", column]], tmp_path / "x.csv")
    with pytest.raises(DataError, match=rf"{part}.*{column}" if "(" not in part else part):
        load(path)
    assert load(path, drop=column).column_names == ("age",)


def test_a_message_does_not_name_a_hundred_columns(tmp_path: Path):
    table = pd.concat([frame(), pd.DataFrame({f"word{i:03}": ["a", "b"] * 20 for i in range(100)})], axis=1)
    with pytest.raises(DataError, match="text: word000, word001, word002, word003, word004 and 95 more"):
        load(write(table, tmp_path / "x.csv"))


@pytest.mark.parametrize("value", [0.1, 3.0])
def test_a_column_that_is_constant_in_the_training_part_is_refused(tmp_path: Path, value: float):
    held = numbers(load(write(frame(), tmp_path / "x.csv")).heldout.names)
    table = frame()
    table["flag"] = value
    table.loc[held[0], "flag"] = 1.0
    with pytest.raises(DataError, match="constant in the training part: flag"):
        load(write(table, tmp_path / "y.csv"))


def test_a_column_that_counts_the_rows_is_remarked_on(tmp_path: Path):
    table = frame()
    assert "counts the rows" not in remarks(load(write(table, tmp_path / "x.csv")))
    table.insert(0, "number", range(1, 41))
    assert "column number only counts the rows" in remarks(load(write(table, tmp_path / "y.csv")))


def test_a_written_index_is_remarked_on(tmp_path: Path):
    frame().to_csv(tmp_path / "x.csv")
    assert "only counts the rows" in remarks(load(tmp_path / "x.csv"))


# Labels, groups, duplicates


@pytest.mark.parametrize("name", ["label", "target", "class"])
@pytest.mark.parametrize("kinds", [[0, 1, 2, 1], [30, 10, 20, 10], ["newt", "cat", "dog", "cat"]])
def test_labels_stay_with_their_rows(tmp_path: Path, name: str, kinds: list):
    table = frame()
    table[name] = kinds * 10
    data = load(write(table, tmp_path / "x.csv"))
    assert data.column_names == ("age", "height", "income")
    assert data.class_names == tuple(map(str, sorted(set(kinds))))
    for part in (data.train, data.heldout):
        assert part.labels is not None
        assert part.labels.dtype == torch.int64
        assert [data.class_names[i] for i in part.labels] == [str(kinds[row % 4]) for row in numbers(part.names)]
    assert_standardised(data, frame())
    assert f"column {name!r} is taken as the class labels" in remarks(data)


def test_a_row_without_label_is_of_no_class(tmp_path: Path):
    table = frame()
    table["label"] = ["cat", None, "dog", "cat"] * 10
    data = load(write(table, tmp_path / "x.csv"))
    assert data.class_names == ("cat", "dog")
    assert data.train.labels is not None
    assert data.train.labels.tolist() == [[0, -1, 1, 0][row % 4] for row in numbers(data.train.names)]


def test_the_label_column_can_be_asked_for(tmp_path: Path):
    table = frame()
    table["city"] = ["Rome", "Oslo"] * 20
    data = load(write(table, tmp_path / "x.csv"), label="city")
    assert data.class_names == ("Oslo", "Rome")
    assert data.column_names == ("age", "height", "income")
    assert "class labels" not in remarks(data)


def test_without_labels_a_column_of_that_name_is_a_value(tmp_path: Path):
    table = frame()
    table["target"] = [0, 1, 2, 1] * 10
    data = load(write(table, tmp_path / "x.csv"), label="none")
    assert data.train.labels is None
    assert data.class_names == ()
    assert_standardised(data, table)


@pytest.mark.parametrize("seed", range(5))
def test_a_group_is_on_one_side(tmp_path: Path, seed: int):
    table = frame(60)
    table["person"] = [f"p{row % 13}" for row in range(60)]
    data = load(write(table, tmp_path / "x.csv"), group="person", heldout=0.2, heldout_seed=seed)
    trained_on, looked_at = ({row % 13 for row in numbers(part.names)} for part in (data.train, data.heldout))
    assert not trained_on & looked_at
    assert 12 <= len(data.heldout) <= 16
    assert data.column_names == ("age", "height", "income")
    assert_standardised(data, frame(60))


def test_a_single_group_is_refused(tmp_path: Path):
    table = frame()
    table["person"] = "anna"
    with pytest.raises(DataError, match="all 40 samples belong to 'anna'"):
        load(write(table, tmp_path / "x.csv"), group="person")


def test_rows_on_both_sides_are_reported(tmp_path: Path):
    table = pd.concat([frame(20), frame(20)], ignore_index=True)
    data = load(write(table, tmp_path / "x.csv"), heldout=0.25)
    trained_on = set(numbers(data.train.names))
    pairs = {(f"row {r}", f"row {(r + 20) % 40}") for r in numbers(data.heldout.names) if (r + 20) % 40 in trained_on}
    assert len(pairs) > 2
    assert data.intake is not None
    assert set(data.intake.duplicates) == pairs
    assert f"{len(pairs)} held-out rows are in the training part too" in remarks(data)


def test_different_rows_are_not_reported(tmp_path: Path):
    data = load(write(frame(), tmp_path / "x.csv"))
    assert data.intake is not None
    assert (data.intake.found, data.intake.used, data.intake.skipped, data.intake.duplicates) == (40, 40, (), ())


# A model's preparation


MODELS = TablePreparation(("income", "age"), (1000.0, 40.0), (500.0, 10.0))


def test_a_models_columns_means_and_deviations_are_used(tmp_path: Path):
    table = frame()
    table["comment"] = "text that the model does not take"
    path = write(table, tmp_path / "x.csv")
    data = load(path, MODELS)
    assert data.preparation == MODELS
    assert data.column_names == ("income", "age")
    wanted = (table[["income", "age"]].to_numpy(float) - [1000, 40]) / [500, 10]
    assert data.train.x.numpy() == pytest.approx(wanted[numbers(data.train.names)], rel=1e-5)
    assert read_rows(path, MODELS).numpy() == pytest.approx(wanted, rel=1e-5)


def test_a_model_takes_constant_columns(tmp_path: Path):
    path = write(pd.DataFrame({"age": [50.0] * 3, "income": [2000.0] * 3}), tmp_path / "x.csv")
    assert read_rows(path, MODELS).tolist() == [[2.0, 1.0]] * 3


@pytest.mark.parametrize("name", ["x.csv", "x.parquet"])
def test_a_table_that_lacks_a_models_column_is_refused(tmp_path: Path, name: str):
    path = write(frame()[["age", "height"]], tmp_path / name)
    for call in (lambda: load(path, MODELS), lambda: read_rows(path, MODELS)):
        with pytest.raises(DataError, match="lacks columns that the model takes: income"):
            call()


def test_tables_and_images_do_not_go_together(tmp_path: Path):
    with pytest.raises(DataError, match="is a table and the model takes images"):
        load_data(write(frame(), tmp_path / "x.csv"), None, Preparation((8, 8), 1))
    with pytest.raises(DataError, match=r"the model takes rows of a table \(income, age"):
        load_data(tmp_path, None, MODELS)


def test_a_preparation_goes_there_and_back():
    values = np.random.default_rng(0).normal(50, 20, (30, 2))
    x = MODELS(values)
    assert x.dtype == torch.float32
    assert x.numpy() == pytest.approx((values - [1000, 40]) / [500, 10], rel=1e-5)
    assert MODELS.inverse(x).numpy() == pytest.approx(values, rel=1e-4)


def test_a_preparation_survives_json():
    content = json.loads(json.dumps(MODELS.to_dict()))
    assert TablePreparation.from_dict(content) == MODELS
    assert preparation_from({"preparation": content}) == MODELS


@pytest.mark.parametrize(
    "damage",
    [
        {"columns": ["income"]},
        {"columns": None},
        {"mean": [1.0]},
        {"mean": 3},
        {"mean": ["x", "y"]},
        {"std": [0, 1]},
        {"std": [-1.0, 1.0]},
        {"std": [float("nan"), 1.0]},
        {"std": ["x", "y"]},
    ],
    ids=str,
)
def test_a_damaged_preparation_is_refused(damage: dict[str, Any]):
    with pytest.raises(CheckpointError, match="the model's table preparation"):
        TablePreparation.from_dict({**MODELS.to_dict(), **damage})


@pytest.mark.parametrize("missing", ["columns", "mean", "std"])
def test_a_preparation_that_lacks_a_value_is_refused(missing: str):
    content = MODELS.to_dict()
    del content[missing]
    with pytest.raises(CheckpointError, match="the model's table preparation"):
        TablePreparation.from_dict(content)
