from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits as sklearn_digits
from torch import Tensor

from introvae.data import ArrayData, DataOptions, DensityData, Part, from_array, load_data
from introvae.data.arrays import ArrayBatches, split, to_float
from introvae.data.densities import list_densities
from introvae.errors import ConfigError, DataError

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def no_progress_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grey(n: int, side: int = 6, first: int = 0) -> list[Image.Image]:
    # Image i has the value first + i everywhere but in one corner, so that it is known by any pixel.
    arrays = [np.full((side, side + 2), first + i, np.uint8) for i in range(n)]
    for array in arrays:
        array[0, 0] = 255
    return [Image.fromarray(array) for array in arrays]


def colour(n: int, side: int = 6, first: int = 0) -> list[Image.Image]:
    return [Image.merge("RGB", (image, image.point(lambda v: v // 2), image)) for image in grey(n, side, first)]


def png(image: Image.Image, **options: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", **options)
    return {"bytes": buffer.getvalue(), "path": None}


def write_parquet(
    path: Path, images: list, labels: list | None = None, feature: Any = None, column: str = "image"
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns, features = {column: images}, {column: datasets.Image()}
    if labels is not None:
        columns["label"], features["label"] = labels, feature or datasets.Value("int64")
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(str(path))
    return path


def values(part: Part) -> list[int]:
    return part.x[:, 0, 3, 3].tolist()


def rows(x: Tensor) -> list[tuple[int, ...]]:
    return sorted(map(tuple, x.flatten(1).tolist()))


def load_finite(source: Any) -> ArrayData:
    data = load_data(source)
    assert isinstance(data, ArrayData)
    return data


# Digits


def test_digits_shapes_types_and_names():
    data = load_finite("digits")
    assert data.name == "digits"
    assert data.shape == (1, 8, 8)
    assert (len(data.train), len(data.heldout)) == (1437, 360)
    for part in (data.train, data.heldout):
        assert part.x.dtype == torch.uint8
        assert part.x.amin() == 0
        assert part.x.amax() == 255
        assert part.labels is not None
        assert part.labels.dtype == torch.int64
        assert len(part.labels) == len(part)
    assert data.class_names == tuple("0123456789")


def test_digits_are_all_of_scikit_learns_each_once_with_its_label():
    data = load_finite("digits")
    assert data.train.labels is not None
    assert data.heldout.labels is not None
    original = sklearn_digits()
    wanted = torch.from_numpy(np.rint(original.images.reshape(-1, 64) / 16 * 255)).long()
    wanted = torch.cat([wanted, torch.from_numpy(original.target)[:, None]], dim=1)
    x = torch.cat([data.train.x, data.heldout.x]).flatten(1).long()
    labels = torch.cat([data.train.labels, data.heldout.labels])
    assert rows(torch.cat([x, labels[:, None]], dim=1)) == rows(wanted)
    assert len(set(rows(wanted))) == 1797  # no two digits are equal, so that the two parts are disjoint


def test_every_class_of_digits_gives_a_fifth_to_the_heldout_part():
    data = load_finite("digits")
    assert data.train.labels is not None
    assert data.heldout.labels is not None
    heldout = data.heldout.labels.bincount(minlength=10)
    total = heldout + data.train.labels.bincount(minlength=10)
    assert (heldout - 0.2 * total).abs().max() < 1


def test_digits_are_the_same_every_time():
    first, second = load_finite("digits"), load_finite("digits")
    assert torch.equal(first.train.x, second.train.x)
    assert torch.equal(first.heldout.x, second.heldout.x)


# Arrays


IMAGES = torch.randint(0, 256, (40, 3, 5, 4), generator=generator(), dtype=torch.uint8)
READ_ONLY = IMAGES.numpy().copy()
READ_ONLY.setflags(write=False)


@pytest.mark.parametrize(
    ("x", "shape"),
    [
        pytest.param(IMAGES, (3, 5, 4), id="uint8"),
        pytest.param(IMAGES[:, 0], (1, 5, 4), id="grey"),
        pytest.param(IMAGES / 255, (3, 5, 4), id="float32"),
        pytest.param(IMAGES.double() / 255, (3, 5, 4), id="float64"),
        pytest.param((IMAGES / 255).half(), (3, 5, 4), id="float16"),
        pytest.param(IMAGES.double()[:, 1] / 255, (1, 5, 4), id="grey_float64"),
        pytest.param(IMAGES.numpy(), (3, 5, 4), id="numpy"),
        pytest.param(IMAGES.numpy() / 255, (3, 5, 4), id="numpy_float64"),
        pytest.param(np.asfortranarray(IMAGES.numpy()), (3, 5, 4), id="numpy_fortran"),
        pytest.param(IMAGES.transpose(2, 3), (3, 4, 5), id="transposed"),
        pytest.param(IMAGES.numpy()[..., ::-1], (3, 5, 4), id="numpy_flipped"),
        pytest.param(READ_ONLY, (3, 5, 4), id="numpy_read_only"),
        pytest.param((IMAGES.numpy() / 255).astype(">f4"), (3, 5, 4), id="numpy_big_endian"),
    ],
)
def test_images_in_memory(x: Tensor | np.ndarray, shape: tuple[int, ...]):
    data = from_array(x)
    assert data.name == "array"
    assert data.shape == shape
    assert (len(data.train), len(data.heldout)) == (36, 4)
    assert data.train.x.dtype == data.heldout.x.dtype == torch.uint8
    assert data.train.labels is None
    wanted = x.double() if isinstance(x, Tensor) else torch.from_numpy(x.astype(np.float64, order="C"))
    wanted = (wanted if x.dtype in (torch.uint8, np.uint8) else wanted * 255).round()
    assert rows(torch.cat([data.train.x, data.heldout.x])) == rows(wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_vectors_in_memory_keep_their_values(dtype: torch.dtype):
    x = (100 * torch.randn(30, 5, generator=generator())).to(dtype)
    data = from_array(x, name="mine")
    assert data.name == "mine"
    assert data.shape == (5,)
    assert data.train.x.dtype == torch.float32
    assert rows(torch.cat([data.train.x, data.heldout.x])) == rows(x.float())
    assert torch.equal(data.train.tensor(), data.train.x)


def test_float_images_are_rounded_to_the_nearest_of_256_values():
    levels = torch.arange(256) / 255
    x = torch.stack([levels, (levels + 0.49 / 255).clamp(max=1), (levels - 0.49 / 255).clamp(min=0)]).view(3, 1, 16, 16)
    data = from_array(x)
    for image in torch.cat([data.train.x, data.heldout.x]):
        assert image.flatten().tolist() == list(range(256))


def test_tensor_gives_images_between_0_and_1():
    part = Part(torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1))
    assert part.tensor().dtype == torch.float32
    assert part.tensor().flatten().tolist() == pytest.approx([0, 0.2, 1], abs=1e-7)
    assert to_float(torch.tensor([[-3.5]])).item() == -3.5


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_labels_stay_with_their_images(dtype: torch.dtype):
    x = torch.arange(50, dtype=torch.uint8).view(50, 1, 1).expand(50, 3, 3)
    data = from_array(x, torch.arange(50).to(dtype))
    for part in (data.train, data.heldout):
        assert part.labels is not None
        assert part.labels.dtype == torch.int64
        assert part.labels.tolist() == part.x[:, 0, 0, 0].tolist()


def test_the_seed_decides_what_is_held_out():
    x = torch.arange(100.0)[:, None]
    first, same, other = (from_array(x, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.heldout.x, same.heldout.x)
    assert torch.equal(first.train.x, same.train.x)
    assert not torch.equal(first.heldout.x, other.heldout.x)


@pytest.mark.parametrize(("n", "heldout"), [(2, 1), (9, 1), (10, 1), (100, 10), (99_999, 10_000), (120_000, 10_000)])
def test_a_tenth_is_held_out_but_at_most_ten_thousand(n: int, heldout: int):
    train, rest = split(Part(torch.arange(n)[:, None]), seed=0)
    assert (len(train), len(rest)) == (n - heldout, heldout)
    assert torch.cat([train.x, rest.x]).flatten().sort().values.equal(torch.arange(n))


def with_value(value: float, shape: tuple[int, ...] = (10, 1, 4, 4), dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.full(shape, 0.5, dtype=dtype)
    x.view(-1)[17] = value
    return x


@pytest.mark.parametrize(
    ("x", "message"),
    [
        pytest.param(with_value(float("nan")), "holds 1 NaN or infinite values", id="nan_image"),
        pytest.param(with_value(float("inf"), (10, 5)), "holds 1 NaN or infinite values", id="infinite_vector"),
        pytest.param(with_value(float("-inf")), "holds 1 NaN or infinite values", id="infinite_image"),
        pytest.param(with_value(1e300, (10, 5), torch.float64), "NaN or infinite", id="infinite_in_float32"),
        pytest.param(with_value(1.01), r"from 0\.5 to 1\.01: scale images to \[0, 1\]", id="above_1"),
        pytest.param(with_value(-0.25), r"from -0\.25 to 0\.5: scale images to \[0, 1\]", id="below_0"),
        pytest.param(torch.full((10, 1, 4, 4), 200.0), "from 200 to 200", id="float_of_0_to_255"),
        pytest.param(torch.rand(10), r"shape \(10,\): give at least two images", id="one_dimension"),
        pytest.param(torch.rand(4, 1, 1, 2, 2), r"shape \(4, 1, 1, 2, 2\)", id="five_dimensions"),
        pytest.param(torch.tensor(0.5), r"shape \(\)", id="a_number"),
        pytest.param(torch.rand(1, 1, 4, 4), r"shape \(1, 1, 4, 4\): give at least two", id="one_image"),
        pytest.param(torch.rand(1, 5), r"shape \(1, 5\): give at least two", id="one_vector"),
        pytest.param(torch.rand(0, 5), r"shape \(0, 5\)", id="none"),
        pytest.param(torch.rand(5, 0), r"shape \(5, 0\)", id="empty_vectors"),
        pytest.param(torch.ones(10, 5, dtype=torch.int64), "holds torch.int64 values", id="int_vectors"),
        pytest.param(torch.ones(10, 5, dtype=torch.uint8), "holds torch.uint8 values", id="uint8_vectors"),
        pytest.param(torch.ones(10, 1, 4, 4, dtype=torch.int32), "holds torch.int32 values", id="int_images"),
        pytest.param(torch.ones(10, 1, 4, 4, dtype=torch.bool), "holds torch.bool values", id="bool_images"),
        pytest.param(np.array(["a", "b"]), "array", id="words"),
    ],
)
def test_arrays_that_are_refused(x: Tensor | np.ndarray, message: str):
    with pytest.raises(DataError, match=message):
        from_array(x)


@pytest.mark.parametrize(
    "labels",
    [torch.zeros(9, dtype=torch.long), torch.zeros(10), torch.zeros(10, 2, dtype=torch.long), np.zeros(10)],
    ids=["too_few", "floats", "columns", "numpy_floats"],
)
def test_labels_that_are_refused(labels: Tensor | np.ndarray):
    with pytest.raises(DataError, match="labels of mine must be 10 integers"):
        from_array(torch.rand(10, 5, generator=generator()), labels, name="mine")


def test_labels_in_one_column_are_taken():
    x = torch.arange(10.0)[:, None]
    data = from_array(x, torch.arange(10)[:, None])
    for part in (data.train, data.heldout):
        assert part.labels is not None
        assert part.labels.shape == (len(part),)
        assert part.labels.tolist() == part.x[:, 0].tolist()


# Batches


@pytest.mark.parametrize(("n", "batch_size"), [(20, 5), (23, 5), (7, 7), (9, 1)])
def test_every_epoch_is_shuffled_and_no_sample_comes_twice_in_one(n: int, batch_size: int):
    batches = ArrayBatches(torch.arange(float(n))[:, None], batch_size, seed=0)
    epochs = []
    for _ in range(4):
        drawn = [batches.next("cpu") for _ in range(n // batch_size)]
        assert all(batch.shape == (batch_size, 1) for batch in drawn)
        epochs.append(torch.cat(drawn).flatten().tolist())
        assert len(set(epochs[-1])) == batch_size * (n // batch_size)
        if n % batch_size == 0:
            assert sorted(epochs[-1]) == list(range(n))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_all_samples_come_over_some_epochs_though_each_drops_a_rest():
    batches = ArrayBatches(torch.arange(13.0)[:, None], 5, seed=0)
    seen = torch.cat([batches.next("cpu") for _ in range(40)]).flatten().tolist()
    assert set(seen) == set(range(13))


def test_the_seed_decides_the_order():
    x = torch.arange(50.0)[:, None]
    first, same, other = (ArrayBatches(x, 10, seed) for seed in (3, 3, 4))
    for _ in range(12):
        batch = first.next("cpu")
        assert torch.equal(batch, same.next("cpu"))
        assert not torch.equal(batch, other.next("cpu"))


def test_batches_of_images_are_floats_of_the_training_part():
    data = from_array(IMAGES)
    batch = data.batches(36, seed=0).next("cpu")
    assert batch.dtype == torch.float32
    assert rows((batch * 255).round()) == rows(data.train.x)


@pytest.mark.parametrize("done", [0, 1, 3, 4, 5, 11])
def test_array_batches_go_on_where_they_were(done: int):
    x = torch.randn(22, 3, generator=generator())
    batches = ArrayBatches(x, 5, seed=9)
    for _ in range(done):
        batches.next("cpu")
    state = batches.state_dict()
    wanted = [batches.next("cpu") for _ in range(9)]
    other = ArrayBatches(x, 5, seed=9)
    other.next("cpu")
    other.load_state_dict(state)
    assert all(torch.equal(other.next("cpu"), batch) for batch in wanted)


@pytest.mark.parametrize("name", list_densities())
@pytest.mark.parametrize("done", [0, 3])
def test_density_batches_go_on_where_they_were(name: str, done: int):
    data = load_data(f"density:{name}")
    assert isinstance(data, DensityData)
    batches = data.batches(16, seed=5)
    for _ in range(done):
        batches.next("cpu")
    state = batches.state_dict()
    wanted = [batches.next("cpu") for _ in range(4)]
    assert wanted[0].shape == (16, 2)
    assert not torch.equal(wanted[0], wanted[1])
    other = data.batches(16, seed=6)
    other.next("cpu")
    other.load_state_dict(state)
    assert all(torch.equal(other.next("cpu"), batch) for batch in wanted)


def test_batches_states_survive_a_file(tmp_path: Path):
    for data in (load_data("density:rings"), from_array(torch.rand(20, 2, generator=generator()))):
        batches, other = data.batches(4, seed=1), data.batches(4, seed=1)
        batches.next("cpu")
        torch.save(batches.state_dict(), tmp_path / "state.pt")
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert torch.equal(batches.next("cpu"), other.next("cpu"))


@pytest.mark.parametrize(("batch_size", "steps"), [(1, 36), (10, 3), (36, 1)])
def test_steps_per_epoch(batch_size: int, steps: int):
    assert from_array(IMAGES).steps_per_epoch(batch_size) == steps


def test_a_batch_larger_than_the_data_is_refused():
    data = from_array(IMAGES, name="mine")
    for call in (data.steps_per_epoch, lambda size: data.batches(size, seed=0)):
        with pytest.raises(ConfigError, match="batch_size 37 exceeds the 36 training samples of mine: lower it"):
            call(37)


# Names


def test_densities_by_name():
    for name in list_densities():
        data = load_data(f"density:{name}")
        assert isinstance(data, DensityData)
        assert data.name == f"density:{name}"
        assert data.shape == (2,)


def test_an_unknown_density_lists_the_densities():
    with pytest.raises(ConfigError, match=r"'moons'.*8gaussians, 2spirals, checkerboard, rings"):
        load_data("density:moons")


@pytest.mark.parametrize("name", ["mnist-please", "no/such/file.npy", "no/such/file.parquet"])
def test_an_unknown_name_lists_the_choices(name: str):
    with pytest.raises(DataError, match=rf"{name}'.*digits, density:8gaussians, .*density:rings") as caught:
        load_data(name)
    for choice in ("folder of images", "scans", ".parquet", ".npy", ".npz", ".csv", "on the hub"):
        assert choice in str(caught.value)


def test_data_and_arrays_pass_through():
    data = from_array(IMAGES)
    assert load_data(data) is data
    assert torch.equal(load_finite(IMAGES).train.x, data.train.x)
    assert torch.equal(load_finite(IMAGES.numpy()).train.x, data.train.x)


def test_a_folder_or_file_without_images_says_so(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("nothing here")
    for path in (tmp_path, tmp_path / "notes.txt"):
        wanted = (
            rf"^{re.escape(str(path))} has no readable image \(1 files? .*notes\.txt: no image that Pillow can read\)"
        )
        with pytest.raises(DataError, match=wanted):
            load_data(path)


# NumPy files


@pytest.mark.parametrize(
    "array", [IMAGES.numpy(), IMAGES.numpy()[:, 0] / 255, np.random.default_rng(0).normal(size=(40, 7))]
)
def test_npy_files(tmp_path: Path, array: np.ndarray):
    path = tmp_path / "x.npy"
    np.save(path, array)
    data, wanted = load_finite(path), from_array(array)
    assert data.name == str(path)
    assert rows(data.train.x) == rows(wanted.train.x)
    assert torch.equal(data.heldout.x, wanted.heldout.x)
    assert torch.equal(load_finite(str(path)).train.x, data.train.x)


@pytest.mark.parametrize("kept", [0, 3, 7, 9, 60, 128, 1000, -1])
def test_a_cut_npy_file_is_refused(tmp_path: Path, kept: int):
    path = tmp_path / "x.npy"
    np.save(path, IMAGES.numpy())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"x\.npy cannot be read as an array"):
        load_data(path)


@pytest.mark.parametrize(
    "kind", ["pickled_array", "plain_pickle", "text", "words", "archive", "big_endian_integers", "integers"]
)
def test_npy_files_of_other_things_are_refused(tmp_path: Path, kind: str):
    path = tmp_path / "x.npy"
    if kind == "pickled_array":
        np.save(path, np.array([{}, 1], dtype=object), allow_pickle=True)
    elif kind == "plain_pickle":
        path.write_bytes(pickle.dumps([1, 2, 3]))
    elif kind == "text":
        path.write_text("1, 2, 3\n")
    elif kind == "words":
        np.save(path, np.array(["a", "b"]))
    elif kind == "archive":
        with path.open("wb") as file:
            np.savez(file, x=IMAGES.numpy())
    elif kind == "big_endian_integers":
        np.save(path, np.ones((10, 5), ">i4"))
    else:
        np.save(path, np.ones((10, 5), int))
    with pytest.raises(DataError, match=r"x\.npy"):
        load_data(path)


# Parquet files


def test_a_single_file_holds_a_tenth_out(tmp_path: Path):
    path = write_parquet(tmp_path / "x.parquet", grey(40), list(range(40)))
    data = load_finite(path)
    assert data.name == str(path)
    assert data.shape == (1, 6, 8)
    assert data.train.x.dtype == torch.uint8
    assert (len(data.train), len(data.heldout)) == (36, 4)
    assert sorted(values(data.train) + values(data.heldout)) == list(range(40))
    for part in (data.train, data.heldout):
        assert part.labels is not None
        assert part.labels.tolist() == values(part)
        assert (part.x[:, 0, 0, 0] == 255).all()
    assert data.class_names == ()
    assert values(load_finite(str(path)).heldout) == values(data.heldout)


@pytest.mark.parametrize("heldout", ["test", "validation"])
def test_a_folder_with_a_test_file_holds_just_that_out(tmp_path: Path, heldout: str):
    feature = datasets.ClassLabel(names=["cat", "dog"])
    write_parquet(tmp_path / "train.parquet", grey(20), [0, 1] * 10, feature)
    write_parquet(tmp_path / f"{heldout}.parquet", grey(5, first=100), [1] * 5, feature)
    data = load_finite(tmp_path)
    assert values(data.train) == list(range(20))
    assert values(data.heldout) == list(range(100, 105))
    assert data.train.labels is not None
    assert data.heldout.labels is not None
    assert data.train.labels.tolist() == [0, 1] * 10
    assert data.heldout.labels.tolist() == [1] * 5
    assert data.class_names == ("cat", "dog")


def test_a_validation_file_beside_a_test_file_is_not_trained_on(tmp_path: Path):
    for first, name in ((0, "train"), (100, "validation"), (200, "test")):
        write_parquet(tmp_path / f"{name}.parquet", grey(6, first=first))
    data = load_finite(tmp_path)
    assert values(data.train) == list(range(6))
    assert set(values(data.heldout)) >= set(range(200, 206))


def test_a_folder_with_only_a_test_file_holds_a_tenth_of_it_out(tmp_path: Path):
    write_parquet(tmp_path / "test.parquet", grey(20))
    data = load_finite(tmp_path)
    assert (len(data.train), len(data.heldout)) == (18, 2)


def test_files_of_one_split_are_joined(tmp_path: Path):
    write_parquet(tmp_path / "part-0.parquet", grey(12))
    write_parquet(tmp_path / "deeper" / "part-1.parquet", grey(8, first=100))
    data = load_finite(tmp_path)
    wanted = [*range(12), *range(100, 108)]
    assert sorted(values(data.train) + values(data.heldout)) == wanted
    assert len(data.heldout) == 2


@pytest.mark.parametrize(
    ("names", "trained_on"), [(["train", "test"], 20), (["images"], 18)], ids=["with_splits", "one_file"]
)
def test_other_files_in_the_folder_do_no_harm(tmp_path: Path, names: list[str], trained_on: int):
    for name in names:
        write_parquet(tmp_path / f"{name}.parquet", grey(20))
    (tmp_path / "notes.txt").write_text("where these images are from")
    (tmp_path / "README.md").write_text("# Images\n")
    assert len(load_finite(tmp_path).train) == trained_on


@pytest.mark.parametrize(
    ("folder", "other"),
    [("with space", "with"), ("brackets[1]", "brackets1"), ("what?", "whats"), ("star*", "starfish")],
)
@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_path_is_no_pattern(tmp_path: Path, folder: str, other: str, whole_folder: bool):
    path = write_parquet(tmp_path / folder / "x.parquet", grey(20))
    write_parquet(tmp_path / other / "x.parquet", grey(20, first=100))
    data = load_finite(path.parent if whole_folder else path)
    assert sorted(values(data.train) + values(data.heldout)) == list(range(20))


def test_colour_images_keep_their_channels(tmp_path: Path):
    data = load_finite(write_parquet(tmp_path / "x.parquet", colour(20, first=50)))
    assert data.shape == (3, 6, 8)
    x = torch.cat([data.train.x, data.heldout.x])[:, :, 3, 3].int()
    assert sorted(x[:, 0].tolist()) == list(range(50, 70))
    assert torch.equal(x[:, 1], x[:, 0] // 2)
    assert torch.equal(x[:, 2], x[:, 0])


def test_grey_beside_colour_becomes_rgb(tmp_path: Path):
    data = load_finite(write_parquet(tmp_path / "x.parquet", grey(10) + colour(10, first=100)))
    assert data.shape == (3, 6, 8)
    x = torch.cat([data.train.x, data.heldout.x])[:, :, 3, 3].int()
    was_grey = x[:, 0] < 100
    assert was_grey.sum() == 10
    assert torch.equal(x[was_grey, 0], x[was_grey, 1])
    assert torch.equal(x[~was_grey, 1], x[~was_grey, 0] // 2)


@pytest.mark.parametrize("colourful", ["train", "test"])
def test_grey_split_beside_a_colour_split_becomes_rgb(tmp_path: Path, colourful: str):
    for name in ("train", "test"):
        write_parquet(tmp_path / f"{name}.parquet", colour(10) if name == colourful else grey(10))
    data = load_finite(tmp_path)
    assert data.train.x.shape == data.heldout.x.shape == (10, 3, 6, 8)
    for name, part in (("train", data.train), ("test", data.heldout)):
        assert values(part) == list(range(10))
        assert torch.equal(part.x[:, 1], part.x[:, 0] // 2 if name == colourful else part.x[:, 0])


def test_palette_images_are_looked_up(tmp_path: Path):
    images = [image.quantize(colors=4) for image in colour(20, first=50)]
    assert images[0].mode == "P"
    data = load_finite(write_parquet(tmp_path / "x.parquet", images))
    assert data.shape == (3, 6, 8)
    x = torch.cat([data.train.x, data.heldout.x])[:, :, 3, 3].int()
    assert sorted(x[:, 0].tolist()) == list(range(50, 70))
    assert torch.equal(x[:, 1], x[:, 0] // 2)


def test_palette_images_with_transparency_load_without_a_warning(tmp_path: Path):
    images = [png(image.quantize(colors=4), transparency=bytes([0, 128, 255])) for image in colour(4, first=50)]
    assert load_finite(write_parquet(tmp_path / "x.parquet", images)).shape == (3, 6, 8)


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", 1), ("1", 1), ("LA", 1), ("RGB", 3), ("RGBA", 3), ("CMYK", 3), ("YCbCr", 3)]
)
def test_kinds_of_images(tmp_path: Path, mode: str, channels: int):
    images = [image.convert(mode) for image in (grey(10, first=100) if channels == 1 else colour(10, first=100))]
    if mode in ("CMYK", "YCbCr"):
        buffers = [io.BytesIO() for _ in images]
        for image, buffer in zip(images, buffers, strict=True):
            image.save(buffer, format="TIFF", compression="tiff_lzw")  # Pillow 12 cannot read its own YCbCr without
        images = [{"bytes": buffer.getvalue(), "path": None} for buffer in buffers]
    data = load_finite(write_parquet(tmp_path / "x.parquet", images))
    assert data.shape == (channels, 6, 8)
    if mode in ("L", "LA", "RGB", "RGBA"):
        assert sorted(values(data.train) + values(data.heldout)) == list(range(100, 110))


def test_images_of_several_sizes_are_brought_to_one(tmp_path: Path):
    data = load_finite(write_parquet(tmp_path / "x.parquet", grey(9, first=100) + grey(1, side=9, first=109)))
    assert data.shape == (1, 32, 32)
    assert data.intake is not None
    assert data.intake.skipped == ()
    assert (data.intake.found, data.intake.used) == (10, 10)
    assert any("10 of 10 pictures (2 sizes) are brought to 32 x 32 pixels" in remark for remark in data.intake.remarks)
    x = torch.cat([data.train.x, data.heldout.x])
    assert sorted(x[:, 0, 16, 16].tolist()) == list(range(100, 110))
    assert (x[:, 0, 0] == 0).all()  # wider than high: black above and below


def test_splits_of_several_sizes_are_brought_to_one(tmp_path: Path):
    write_parquet(tmp_path / "train.parquet", grey(4, first=100))
    write_parquet(tmp_path / "test.parquet", grey(4, side=9, first=200))
    data = load_finite(tmp_path)
    assert data.train.x.shape == data.heldout.x.shape == (4, 1, 32, 32)
    assert data.train.x[:, 0, 16, 16].tolist() == [100, 101, 102, 103]
    assert data.heldout.x[:, 0, 16, 16].tolist() == [200, 201, 202, 203]


def deep(array: np.ndarray, mode: str) -> dict[str, Any]:
    image, buffer = Image.fromarray(array), io.BytesIO()
    assert image.mode == mode
    image.save(buffer, format="TIFF")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.mark.parametrize(("kind", "mode"), [(np.uint16, "I;16"), (np.float32, "F")])
def test_images_of_more_than_8_bits_go_through_the_window(tmp_path: Path, kind: Any, mode: str):
    rng = np.random.default_rng(0)
    arrays = [(rng.uniform(1000, 60_000, (6, 6))).astype(kind) for _ in range(10)]
    data = load_finite(write_parquet(tmp_path / "x.parquet", [deep(array, mode) for array in arrays]))
    assert data.shape == (1, 6, 6)
    low, high = np.percentile(np.stack(arrays).astype(np.float64), (0.5, 99.5))
    wanted = np.clip((np.stack(arrays).astype(np.float64) - low) / (high - low) * 255, 0, 255)
    found = {name: image for part in (data.train, data.heldout) for name, image in zip(part.names, part.x, strict=True)}
    for row, image in enumerate(wanted):
        assert np.abs(found[f"row {row}"][0].numpy() - image).max() < 0.51


def test_a_folder_of_files_without_image_column_is_refused(tmp_path: Path):
    datasets.Dataset.from_dict({"pixels": [[1.0], [2.0]], "label": [0, 1]}).to_parquet(str(tmp_path / "x.parquet"))
    with pytest.raises(DataError, match="has no image column: its columns are pixels, label"):
        load_data(tmp_path)


def test_a_file_without_image_column_is_a_table(tmp_path: Path):
    path = tmp_path / "x.parquet"
    datasets.Dataset.from_dict({"pixels": [[1.0], [2.0]], "label": [0, 1]}).to_parquet(str(path))
    with pytest.raises(DataError, match=r"x\.parquet has columns that cannot be used \(.*pixels\)"):
        load_data(path)


def test_an_image_column_of_another_name_is_taken(tmp_path: Path):
    data = load_finite(write_parquet(tmp_path / "x.parquet", grey(20), column="scan"))
    assert sorted(values(data.train) + values(data.heldout)) == list(range(20))


def test_the_column_named_image_comes_first(tmp_path: Path):
    features = datasets.Features({"mask": datasets.Image(), "image": datasets.Image()})
    columns = {"mask": grey(20, first=100), "image": grey(20)}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / "x.parquet"))
    data = load_finite(tmp_path / "x.parquet")
    assert sorted(values(data.train) + values(data.heldout)) == list(range(20))


@pytest.mark.parametrize("kept", [0, 3, 0.5, 0.99])
@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_cut_file_is_refused(tmp_path: Path, kept: float, whole_folder: bool):
    path = write_parquet(tmp_path / "train.parquet", grey(20))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept if kept >= 1 else kept * len(content))])
    with pytest.raises(DataError, match=r"cannot be read as image data") as caught:
        load_data(tmp_path if whole_folder else path)
    assert "\n" not in str(caught.value)


def test_a_broken_image_inside_is_skipped_and_named(tmp_path: Path):
    broken = png(grey(1)[0])
    broken["bytes"] = broken["bytes"][:40]
    data = load_finite(write_parquet(tmp_path / "x.parquet", [*grey(3), broken, *grey(3, first=50)]))
    assert data.intake is not None
    assert (data.intake.found, data.intake.used) == (7, 6)
    assert [name for name, _ in data.intake.skipped] == ["row 3"]
    assert sorted(values(data.train) + values(data.heldout)) == [0, 1, 2, 50, 51, 52]


def test_a_row_without_image_is_skipped_and_named(tmp_path: Path):
    data = load_finite(write_parquet(tmp_path / "x.parquet", [*grey(3), None, *grey(2, first=50)]))
    assert data.intake is not None
    assert (data.intake.found, data.intake.used) == (6, 5)
    assert data.intake.skipped == (("row 3", "no image"),)
    assert sorted(values(data.train) + values(data.heldout)) == [0, 1, 2, 50, 51]


def test_a_skipped_row_takes_its_label_with_it(tmp_path: Path):
    images = grey(20)
    data = load_finite(write_parquet(tmp_path / "x.parquet", [*images[:7], None, *images[8:]], list(range(20))))
    for part in (data.train, data.heldout):
        assert part.labels is not None
        assert part.labels.tolist() == values(part)
        assert list(part.names) == [f"row {value}" for value in values(part)]


@pytest.mark.parametrize(("n", "message"), [(0, "has no readable image"), (1, "has one readable image only")])
def test_a_file_needs_two_images(tmp_path: Path, n: int, message: str):
    path = write_parquet(tmp_path / "x.parquet", grey(n))
    with pytest.raises(DataError, match=f"{message}: give at least two"):
        load_data(path)


def test_words_as_labels_become_class_names(tmp_path: Path):
    words = ["dog", "cat", "newt", "dog", "cat"] * 2
    data = load_finite(write_parquet(tmp_path / "x.parquet", grey(10), words, datasets.Value("string")))
    assert data.class_names == ("cat", "dog", "newt")
    for part in (data.train, data.heldout):
        assert part.labels is not None
        assert [data.class_names[label] for label in part.labels] == [words[value] for value in values(part)]


def test_a_row_without_label_is_of_no_class(tmp_path: Path):
    words = ["dog", None, "cat", *["dog"] * 7]
    data = load_finite(write_parquet(tmp_path / "x.parquet", grey(10), words, datasets.Value("string")))
    for part in (data.train, data.heldout):
        assert part.labels is not None
        assert part.labels.tolist() == [{0: 1, 1: -1, 2: 0}.get(value, 1) for value in values(part)]


def test_fractions_as_labels_are_refused(tmp_path: Path):
    path = write_parquet(tmp_path / "x.parquet", grey(10), [0.25, 0.75] * 5, datasets.Value("float32"))
    with pytest.raises(DataError, match=r"label in row 0 is 0\.25"):
        load_data(path)


def test_fractions_are_let_be_where_no_labels_are_asked_for(tmp_path: Path):
    path = write_parquet(tmp_path / "x.parquet", grey(10), [0.25, 0.75] * 5, datasets.Value("float32"))
    data = load_data(path, DataOptions(label="none"))
    assert isinstance(data, ArrayData)
    assert data.train.labels is None


def test_progress_bars_are_as_before(tmp_path: Path):
    path = write_parquet(tmp_path / "x.parquet", grey(10))
    (tmp_path / "bad.parquet").write_bytes(b"no")
    for switch, enabled in ((datasets.enable_progress_bars, True), (datasets.disable_progress_bars, False)):
        switch()
        load_data(path)
        assert datasets.is_progress_bar_enabled() == enabled
        with pytest.raises(DataError):
            load_data(tmp_path / "bad.parquet")
        assert datasets.is_progress_bar_enabled() == enabled


@pytest.mark.skipif(not (SHARED / "mnist" / "test.parquet").is_file(), reason="../shared/data/mnist is not there")
def test_mnist_test_images():
    data = load_finite(SHARED / "mnist" / "test.parquet")
    assert data.shape == (1, 28, 28)
    assert (len(data.train), len(data.heldout)) == (9000, 1000)
    assert data.class_names == tuple("0123456789")
    x = torch.cat([data.train.x, data.heldout.x])
    assert (x.double().mean() / 255).item() == pytest.approx(0.1325, abs=5e-4)
    assert data.train.labels is not None
    assert data.heldout.labels is not None
    counts = (data.train.labels.bincount() + data.heldout.labels.bincount()).tolist()
    assert counts == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    zeros, ones = (data.train.tensor()[data.train.labels == digit].mean(dim=0)[0, 14, 14] for digit in (0, 1))
    assert zeros < 0.1 < 0.7 < ones
