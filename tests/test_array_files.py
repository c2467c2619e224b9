from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from introvae.data import ArrayData, DataOptions, Preparation, holds_vectors, load_data
from introvae.errors import DataError


def images(count: int = 20, *shape: int, seed: int = 0) -> np.ndarray:
    """Image i has the value i in its first pixel."""
    array = np.random.default_rng(seed).integers(0, 256, (count, *(shape or (8, 6))), dtype=np.uint8)
    array.reshape(count, -1)[:, 0] = np.arange(count)
    return array


def save(path: Path, *single: np.ndarray, **arrays: Any) -> Path:
    if path.suffix == ".npy":
        np.save(path, single[0])
    else:
        np.savez(path, *single, **arrays)
    return path


def load(path: Path, preparation: Preparation | None = None, **options: Any) -> ArrayData:
    data = load_data(path, DataOptions(**options), preparation)
    assert isinstance(data, ArrayData)
    return data


def all_rows(data: ArrayData) -> list[tuple[int, ...]]:
    return sorted(map(tuple, torch.cat([data.train.x, data.heldout.x]).flatten(1).tolist()))


def as_rows(array: np.ndarray) -> list[tuple[int, ...]]:
    return sorted(map(tuple, array.reshape(len(array), -1).tolist()))


def remarks(data: ArrayData) -> str:
    assert data.intake is not None
    return "\n".join(data.intake.remarks)


# Archives


@pytest.mark.parametrize("x", ["images", "x", "data"])
@pytest.mark.parametrize("y", ["labels", "y", None])
def test_archives_of_images_and_labels(tmp_path: Path, x: str, y: str | None):
    array = images()
    path = save(tmp_path / "a.npz", **{x: array}, **({y: np.arange(20)} if y else {}))
    data = load(path, heldout=0.2)
    assert data.name == str(path)
    assert data.shape == (1, 8, 6)
    assert (len(data.train), len(data.heldout)) == (16, 4)
    assert all_rows(data) == as_rows(array)
    for part in (data.train, data.heldout):
        assert (part.labels is not None) == (y is not None)
        if part.labels is not None:
            assert part.labels.tolist() == part.x[:, 0, 0, 0].tolist()
    assert data.intake is not None
    assert (data.intake.found, data.intake.used, data.intake.skipped) == (20, 20, ())


def test_an_archive_of_one_array_of_any_name(tmp_path: Path):
    assert all_rows(load(save(tmp_path / "a.npz", faces=images()))) == as_rows(images())
    assert all_rows(load(save(tmp_path / "b.npz", images()))) == as_rows(images())


@pytest.mark.parametrize("suffix", ["images", "x"])
@pytest.mark.parametrize("held", ["test", "val"])
def test_archives_of_parts_as_medmnist_has_them(tmp_path: Path, suffix: str, held: str):
    labels = "labels" if suffix == "images" else "y"
    path = save(
        tmp_path / "a.npz",
        **{
            f"train_{suffix}": images(20),
            f"train_{labels}": np.arange(20, dtype=np.uint8)[:, None],
            f"{held}_{suffix}": images(5, seed=1),
            f"{held}_{labels}": np.arange(5, dtype=np.uint8)[:, None],
        },
    )
    data = load(path, heldout=0.5)
    assert data.train.x.numpy().tolist() == images(20)[:, None].tolist()
    assert data.heldout.x.numpy().tolist() == images(5, seed=1)[:, None].tolist()
    assert data.train.labels is not None
    assert data.heldout.labels is not None
    assert data.train.labels.tolist() == list(range(20))
    assert data.heldout.labels.tolist() == list(range(5))


def test_test_goes_before_val_and_neither_is_trained_on(tmp_path: Path):
    parts = {f"{part}_images": images(6, seed=seed) for seed, part in enumerate(("train", "val", "test"))}
    data = load(save(tmp_path / "a.npz", **parts))
    assert data.train.x[:, 0].numpy().tolist() == parts["train_images"].tolist()
    assert data.heldout.x[:, 0].numpy().tolist() == parts["test_images"].tolist()


def test_an_archive_of_other_things_names_them(tmp_path: Path):
    path = save(tmp_path / "a.npz", pixels=images(), persons=np.arange(20))
    with pytest.raises(DataError, match=r"a\.npz holds pixels, persons: name the samples images"):
        load(path)


def test_archives_of_vectors(tmp_path: Path):
    x = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    path = save(tmp_path / "a.npz", x=x, y=np.arange(20))
    data = load(path)
    assert data.shape == (5,)
    for part in (data.train, data.heldout):
        assert part.labels is not None
        assert torch.equal(part.x, torch.from_numpy(x)[part.labels])


def test_vectors_are_told_from_images_before_loading(tmp_path: Path):
    vectors = np.random.default_rng(0).normal(size=(20, 5))
    for name in ("a.npy", "a.npz"):
        assert holds_vectors(str(save(tmp_path / name, vectors)))
    for name in ("b.npy", "b.npz"):
        assert not holds_vectors(str(save(tmp_path / name, images())))


@pytest.mark.parametrize("labels", [np.arange(19), np.linspace(0, 1, 20), np.array(["a"] * 20), np.zeros((20, 2), int)])
def test_labels_that_are_refused(tmp_path: Path, labels: np.ndarray):
    with pytest.raises(DataError, match=r"the labels of .*a\.npz"):
        load(save(tmp_path / "a.npz", images=images(), labels=labels))


@pytest.mark.parametrize("name", ["images", "labels"])
def test_pickled_arrays_are_refused(tmp_path: Path, name: str):
    arrays = {"images": images(), "labels": np.arange(20), name: np.array([{}] * 20, dtype=object)}
    with pytest.raises(DataError, match=r"a\.npz cannot be read as an array \(it holds Python objects\)"):
        load(save(tmp_path / "a.npz", **arrays))


@pytest.mark.parametrize("kept", [0, 3, 100, 0.5, 0.99, -1])
def test_a_cut_archive_is_refused(tmp_path: Path, kept: float):
    path = save(tmp_path / "a.npz", images=images())
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if 0 < kept < 1 else int(kept)])
    with pytest.raises(DataError, match=r"a\.npz cannot be read as an array") as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are listed by Linux only")
def test_a_refused_archive_is_closed(tmp_path: Path):
    path = save(tmp_path / "a.npz", images=images())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError) as caught:
        load(path)
    assert caught.value.__traceback__ is not None  # which keeps alive what was not closed
    assert path not in [link.resolve() for link in Path("/proc/self/fd").iterdir()]


@pytest.mark.parametrize("compressed", [False, True])
def test_an_archive_with_flipped_bytes_is_refused(tmp_path: Path, compressed: bool):
    path = tmp_path / "a.npz"
    (np.savez_compressed if compressed else np.savez)(path, images=images(30, 16, 16))
    content = bytearray(path.read_bytes())
    for place in range(90, len(content) - 200, 331):
        flipped = content.copy()
        flipped[place : place + 8] = bytes(value ^ 255 for value in flipped[place : place + 8])
        path.write_bytes(flipped)
        with pytest.raises(DataError, match=r"a\.npz"):
            load(path)


# Shapes


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
@pytest.mark.parametrize("channels", [1, 3])
def test_channels_may_come_last(tmp_path: Path, name: str, channels: int):
    array = images(20, 8, 6, channels)
    data = load(save(tmp_path / name, array))
    assert data.shape == (channels, 8, 6)
    assert all_rows(data) == as_rows(array.transpose(0, 3, 1, 2))


def test_channels_may_come_first(tmp_path: Path):
    data = load(save(tmp_path / "a.npy", images(20, 3, 8, 6)))
    assert data.shape == (3, 8, 6)
    assert all_rows(data) == as_rows(images(20, 3, 8, 6))


def test_images_of_other_channels_are_left_as_they_are_and_can_be_saved(tmp_path: Path):
    data = load(save(tmp_path / "a.npy", images(20, 4, 8, 8)))
    assert data.shape == (4, 8, 8)
    assert all_rows(data) == as_rows(images(20, 4, 8, 8))
    if data.preparation is not None:
        assert Preparation.from_dict(data.preparation.to_dict()) == data.preparation


def test_images_of_other_channels_cannot_be_resized(tmp_path: Path):
    with pytest.raises(DataError, match="has 4 channels: give 1 or 3"):
        load(save(tmp_path / "a.npy", images(20, 4, 8, 8)), size=4)


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
@pytest.mark.parametrize("shape", [(20,), (1, 8, 8), (0, 8, 8), (4, 0, 8), (4, 1, 1, 8, 8)])
def test_shapes_that_are_refused(tmp_path: Path, name: str, shape: tuple[int, ...]):
    with pytest.raises(DataError, match=rf"has shape \({', '.join(map(str, shape))}"):
        load(save(tmp_path / name, np.zeros(shape, np.uint8)))


# Values


def windowed(array: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((array.astype(np.float64) - low) / (high - low), 0, 1) * 255


def assert_windowed(data: ArrayData, array: np.ndarray, low: float, high: float) -> None:
    """The parts hold the images of the array, in an order that the labels tell."""
    for part in (data.train, data.heldout):
        assert part.labels is not None
        wanted = windowed(array[part.labels.numpy()], low, high)
        assert np.abs(part.x[:, 0].numpy() - wanted).max() < 0.51


@pytest.mark.parametrize("kind", ["u2", "i2", "i4", "f4", "f8", "f2", ">u2", ">f4", ">i2"])
@pytest.mark.parametrize("window", [(0.5, 99.5), (10, 70)])
def test_deep_arrays_go_through_the_window(tmp_path: Path, kind: str, window: tuple[float, float]):
    array = np.random.default_rng(0).gamma(2, 800, (20, 8, 6)).astype(kind)
    data = load(save(tmp_path / "a.npz", images=array, labels=np.arange(20)), window=window)
    low, high = np.percentile(array.astype(np.float64), window)
    assert isinstance(data.preparation, Preparation)
    assert data.preparation.window == pytest.approx((low, high), rel=1e-3)
    assert_windowed(data, array, *data.preparation.window)
    assert "become black to white" in remarks(data)


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", ">f8"])
def test_floats_between_0_and_1_are_kept_as_they_are(tmp_path: Path, kind: str):
    array = np.random.default_rng(0).uniform(0.2, 0.7, (20, 8, 6)).astype(kind)
    data = load(save(tmp_path / "a.npz", images=array, labels=np.arange(20)))
    assert_windowed(data, array, 0, 1)
    assert "become black to white" not in remarks(data)


def test_the_test_part_goes_through_the_training_parts_window(tmp_path: Path):
    array = np.random.default_rng(0).gamma(2, 800, (20, 8, 6))
    path = save(
        tmp_path / "a.npz", train_images=array, test_images=3 * array, train_y=np.arange(20), test_y=np.arange(20)
    )
    data = load(path, window=(1, 99))
    low, high = np.percentile(array, (1, 99))
    assert np.abs(data.heldout.x[:, 0].numpy() - windowed(3 * array, low, high)).max() < 0.51


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_values_that_are_none_are_refused(tmp_path: Path, value: float, name: str):
    array = np.random.default_rng(0).uniform(size=(20, 8, 6))
    array[11, 3, 3:5] = value
    with pytest.raises(DataError, match=rf"{name} holds 2 NaN or infinite values"):
        load(save(tmp_path / name, array))


@pytest.mark.parametrize("kind", [bool, complex, "U3", "datetime64[s]"])
def test_values_of_other_kinds_are_refused(tmp_path: Path, kind: Any):
    with pytest.raises(DataError, match=r"a\.npy holds .* values"):
        load(save(tmp_path / "a.npy", np.ones((20, 8, 6)).astype(int).astype(kind)))


# Sizes and preparations


@pytest.mark.parametrize("channels", [1, 3])
def test_a_size_resizes(tmp_path: Path, channels: int):
    array = images(20, 12, 24, channels)
    data = load(save(tmp_path / "a.npz", images=array, labels=np.arange(20)), size=8, fit="stretch")
    assert data.shape == (channels, 8, 8)
    for x, label in zip(data.train.x, data.train.labels.tolist(), strict=True):  # pyright: ignore
        picture = Image.fromarray(array[label, ..., 0] if channels == 1 else array[label])
        wanted = np.asarray(picture.resize((8, 8), Image.Resampling.LANCZOS)).reshape(8, 8, channels)
        assert np.abs(x.permute(1, 2, 0).numpy().astype(int) - wanted).max() <= 1


def test_resized_images_fit_as_asked_for(tmp_path: Path):
    path = save(tmp_path / "a.npy", np.full((20, 16, 32), 200, np.uint8))
    padded, cropped = (load(path, size=16, fit=fit).train.x for fit in ("pad", "crop"))
    assert (cropped == 200).all()
    assert (padded[:, :, 4:12] == 200).all()
    assert (padded[:, :, :4] == 0).all()
    assert (padded[:, :, 12:] == 0).all()


@pytest.mark.parametrize(("given", "asked"), [(1, 3), (3, 1)])
def test_channels_can_be_asked_for(tmp_path: Path, given: int, asked: int):
    array = np.full((20, 8, 8, given), 90, np.uint8)
    data = load(save(tmp_path / "a.npy", array), channels=asked)
    assert data.shape == (asked, 8, 8)
    assert (data.train.x == 90).all()


def test_a_models_preparation_is_used(tmp_path: Path):
    array = np.random.default_rng(0).gamma(2, 800, (20, 8, 8))
    path = save(tmp_path / "a.npz", images=array, labels=np.arange(20))
    preparation = Preparation((8, 8), 1, window=(500, 1500))
    data = load(path, preparation, window=(20, 30), size=64)
    assert data.preparation == preparation
    assert_windowed(data, array, 500, 1500)


def test_a_models_percentiles_of_each_file_are_used(tmp_path: Path):
    array = np.random.default_rng(0).gamma(2, 800, (20, 8, 8))
    path = save(tmp_path / "a.npz", images=array, labels=np.arange(20))
    data = load(path, Preparation((8, 8), 1, percentiles=(20, 60)))
    assert_windowed(data, array, *np.percentile(array, (20, 60)))


def test_a_models_size_and_channels_are_used(tmp_path: Path):
    data = load(save(tmp_path / "a.npy", images(20, 12, 24, 3)), Preparation((10, 16), 1, "stretch"))
    assert data.shape == (1, 10, 16)
