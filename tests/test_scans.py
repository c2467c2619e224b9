from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from introvae.data import ArrayData, DataOptions, Preparation, load_data, read_images
from introvae.data.scans import scan_size, slice_names, slices
from introvae.errors import IntrovaeError

nibabel = pytest.importorskip("nibabel")

SHAPE = (10, 12, 14)
"""Voxels to the right, to the front, upwards."""


def volume(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Noise; the corner at the left, back and bottom is marked."""
    array = np.random.default_rng(seed).integers(100, 900, shape).astype(np.int16)
    array[(slice(0, 3),) * 3] = 1000
    array[-1, -1, -1] = 0
    return array


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def stored(array: np.ndarray, axes: tuple[int, int, int], flips: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """An array of right, front, up stored along other axes, some of them backwards, and the affine that says so."""
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    affine[:3, 3] = (-40, 25, 7)
    for new, old in enumerate(axes):
        sign = -1 if old in flips else 1
        affine[old, new] = sign
        if sign < 0:
            affine[old, 3] += array.shape[old] - 1
    for old in flips:
        array = np.flip(array, old)
    return np.ascontiguousarray(array.transpose(axes)), affine


def load(source: Path, preparation: Preparation | None = None, **options: Any) -> ArrayData:
    data = load_data(source, DataOptions(**options), preparation)
    assert isinstance(data, ArrayData)
    return data


def by_name(data: ArrayData) -> dict[str, Tensor]:
    return {name: x for part in (data.train, data.heldout) for name, x in zip(part.names, part.x, strict=True)}


def skipped(data: ArrayData) -> dict[str, str]:
    assert data.intake is not None
    return dict(data.intake.skipped)


def plane(array: np.ndarray, axis: int, index: int) -> np.ndarray:
    """Row by row from the top: upwards is superior (of an axial plane: anterior), to the right is right or front."""
    if axis == 0:
        return np.array([[array[index, y, z] for y in range(array.shape[1])] for z in reversed(range(array.shape[2]))])
    if axis == 1:
        return np.array([[array[x, index, z] for x in range(array.shape[0])] for z in reversed(range(array.shape[2]))])
    return np.array([[array[x, y, index] for x in range(array.shape[0])] for y in reversed(range(array.shape[1]))])


def windowed(array: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((array.astype(float) - low) / (high - low), 0, 1) * 255


# Planes


STORED = {
    "RAS": ((0, 1, 2), ()),
    "LPS": ((0, 1, 2), (0, 1)),
    "LAI": ((0, 1, 2), (0, 2)),
    "ASR": ((1, 2, 0), ()),
    "PIR": ((1, 2, 0), (1, 2)),
}


@pytest.mark.parametrize("kind", list(STORED))
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_planes_are_the_right_way_up_however_they_are_stored(tmp_path: Path, kind: str, axis: int):
    arrays = {name: volume(seed) for seed, name in enumerate(("a.nii", "b.nii.gz"))}
    for name, array in arrays.items():
        save(tmp_path / name, *stored(array, *STORED[kind]))
    data = load(tmp_path, axis=axis, window=(0, 100), heldout=0.5)
    found = by_name(data)
    assert len(found) == 2 * SHAPE[axis]
    for name, array in arrays.items():
        for index in range(SHAPE[axis]):
            wanted = windowed(plane(array, axis, index), 0, 1000)
            assert found[f"{name} slice {index}"].shape == (1, *wanted.shape)
            assert np.abs(found[f"{name} slice {index}"][0].numpy() - wanted).max() < 0.51


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_marked_corner_is_at_the_bottom_left(tmp_path: Path, axis: int):
    for name in ("a.nii", "b.nii"):
        save(tmp_path / name, *stored(volume(), *STORED["PIR"]))
    x = by_name(load(tmp_path, axis=axis, window=(0, 100)))["a.nii slice 1"][0]
    assert (x[-3:, :3] == 255).all()
    assert (x[:3] < 250).all()
    assert (x[:, -3:] < 250).all()


def test_axial_is_the_default(tmp_path: Path):
    for name in ("a.nii", "b.nii"):
        save(tmp_path / name, volume())
    assert load(tmp_path).shape == (1, 12, 10)


@pytest.mark.parametrize(
    ("slices", "indices"),
    [("2:5", range(2, 5)), ("25%:75%", range(4, 10)), ("12:", range(12, 14)), (":2", range(2)), (":99", range(14))],
)
def test_ranges_of_slices(tmp_path: Path, slices: str, indices: range):
    for name in ("a.nii", "b.nii"):
        save(tmp_path / name, volume())
    data = load(tmp_path, slices=slices)
    assert set(by_name(data)) == {f"{name} slice {index}" for name in ("a.nii", "b.nii") for index in indices}


def test_a_range_that_a_scan_does_not_reach_skips_it(tmp_path: Path):
    save(tmp_path / "short.nii", volume(0, (10, 12, 6)))
    for name in ("a.nii", "b.nii"):
        save(tmp_path / name, volume())
    data = load(tmp_path, slices="8:10")
    assert skipped(data) == {"short.nii": "no slice in 8:10"}
    assert len(by_name(data)) == 4


@pytest.mark.parametrize(("axis", "coarse"), [(0, 2), (1, 2), (0, 1), (2, 0), (2, 1), (1, 0)])
def test_pixels_are_square_where_voxels_are_not(tmp_path: Path, axis: int, coarse: int):
    """A cube of 24 mm, brighter along the coarse axis."""
    shape = [24, 24, 24]
    shape[coarse] = 8
    ramp = np.broadcast_to(np.arange(8).reshape([-1 if a == coarse else 1 for a in range(3)]), shape).astype(np.int16)
    affine = np.diag([3.0 if a == coarse else 1.0 for a in range(3)] + [1.0])
    for name in ("a.nii", "b.nii"):
        save(tmp_path / name, ramp, affine)
    data = load(tmp_path, axis=axis, window=(0, 100))
    assert data.shape == (1, 24, 24)
    x = by_name(data)["a.nii slice 3"][0].float()
    vertical = coarse == max(a for a in range(3) if a != axis)
    profile = x.mean(dim=1).flip(0) if vertical else x.mean(dim=0)
    wanted = np.clip((np.arange(24) + 0.5) / 3 - 0.5, 0, 7) * 255 / 7
    assert np.abs(profile.numpy() - wanted).max() < 2
    assert x.std(dim=1 if vertical else 0).max() < 1


def test_slices_of_one_value_are_skipped_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for name in ("a.nii", "b.nii"):
        array = volume()
        array[:, :, [0, 5, 13]] = 0
        array[:, :, 7] = 300
        save(tmp_path / name, array)
    with caplog.at_level(logging.INFO, logger="introvae"):
        data = load(tmp_path)
    wanted = {f"{name} slice {index}": "one value only" for name in ("a.nii", "b.nii") for index in (0, 5, 7, 13)}
    assert skipped(data) == wanted
    assert data.intake is not None
    assert (data.intake.found, data.intake.used) == (2, 20)
    assert not set(by_name(data)) & set(wanted)
    for count, of in re.findall(r"(\d+) of (\d+) files skipped", caplog.text):
        assert int(count) <= int(of)


# Persons


@pytest.mark.parametrize("seed", range(4))
def test_a_subject_is_on_one_side(tmp_path: Path, seed: int):
    for subject in range(6):
        for session in (1, 2):
            name = f"sub-{subject:02}/ses-{session}/anat/sub-{subject:02}_ses-{session}_T1w.nii.gz"
            save(tmp_path / name, volume(10 * subject + session, (6, 6, 4)))
    data = load(tmp_path, heldout=0.3, heldout_seed=seed)
    trained_on, looked_at = ({name[:6] for name in part.names} for part in (data.train, data.heldout))
    assert not trained_on & looked_at
    assert (len(trained_on), len(looked_at)) == (4, 2)
    assert data.class_names == ()


def test_a_file_is_on_one_side_where_no_subject_is_named(tmp_path: Path):
    for i in range(6):
        save(tmp_path / f"scan{i}.nii", volume(i, (6, 6, 5)))
    data = load(tmp_path, heldout=0.3)
    trained_on, looked_at = ({name.split()[0] for name in part.names} for part in (data.train, data.heldout))
    assert not trained_on & looked_at
    assert (len(trained_on), len(looked_at)) == (4, 2)


def test_a_pattern_names_the_person(tmp_path: Path):
    for i in range(9):
        save(tmp_path / f"p{i // 3}_scan{i}.nii", volume(i, (6, 6, 5)))
    data = load(tmp_path, heldout=0.1, group=r"^p\d")
    assert len({name[:2] for name in data.heldout.names}) == 1
    assert len(data.heldout) == 15


def test_folders_of_scans_are_classes(tmp_path: Path):
    for i in range(3):
        for kind in ("healthy", "ill"):
            save(tmp_path / kind / f"{i}.nii", volume(i, (6, 6, 4)))
    data = load(tmp_path)
    assert data.class_names == ("healthy", "ill")
    for part in (data.train, data.heldout):
        assert part.labels is not None
        assert [data.class_names[label] for label in part.labels] == [name.split("/")[0] for name in part.names]


# Damaged scans


def test_scans_that_cannot_be_used_are_skipped_with_a_reason(tmp_path: Path):
    for name in ("a.nii.gz", "b.nii.gz"):
        save(tmp_path / name, volume())
    save(tmp_path / "four.nii.gz", volume(0, (6, 6, 6, 3)))
    content = (tmp_path / "a.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(content[: len(content) // 2])
    (tmp_path / "head.nii.gz").write_bytes(content[:40])
    (tmp_path / "empty.nii").write_bytes(b"")
    (tmp_path / "text.nii").write_bytes(b"no scan")
    save(tmp_path / "plain.nii", volume())
    content = (tmp_path / "plain.nii").read_bytes()
    (tmp_path / "plain.nii").write_bytes(content[: len(content) // 2])
    values = volume().astype(np.float32)
    values[4, 4, 4] = np.nan
    save(tmp_path / "nan.nii", values)
    save(tmp_path / "thin.nii", volume(0, (3, 12, 14)))
    data = load(tmp_path)
    found = skipped(data)
    plain = {f"{name}.nii" for name in ("empty", "text", "plain", "nan", "thin")}
    assert set(found) == plain | {f"{name}.nii.gz" for name in ("four", "cut", "head")}
    assert re.match(r"4 dimensions \(6, 6, 6, 3\)", found["four.nii.gz"])
    assert "NaN" in found["nan.nii"]
    assert found["empty.nii"] == "empty file"
    assert found["thin.nii"].startswith("3 x 12 pixels, too small")
    assert all(reason and "\n" not in reason for reason in found.values())
    assert data.intake is not None
    assert (data.intake.found, data.intake.used) == (10, 28)


def without_nibabel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nibabel", None)


def test_without_nibabel_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("a.nii", "b.nii"):
        save(tmp_path / name, volume())
    without_nibabel(monkeypatch)
    for call in (
        lambda: load(tmp_path, cache=False),
        lambda: load(tmp_path / "a.nii", cache=False),
        lambda: read_images([tmp_path / "a.nii"], Preparation((8, 8), 1, window=(0, 1000))),
    ):
        with pytest.raises(IntrovaeError, match=r"pip install 'introvae\[medical\]'") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_scans_are_not_forgotten_once_nibabel_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path / "a.nii", volume())
    for i in range(3):
        Image.fromarray(np.full((12, 10), i, np.uint8)).save(tmp_path / f"{i}.png")
    with monkeypatch.context() as patch:
        without_nibabel(patch)
        try:
            load(tmp_path)
        except IntrovaeError as error:
            assert "introvae[medical]" in str(error)  # noqa: PT017
    assert "a.nii slice 3" in by_name(load(tmp_path))


# Window


def test_one_window_for_all_scans(tmp_path: Path):
    arrays = {"a.nii": volume(0), "b.nii": 3 * volume(1)}
    for name, array in arrays.items():
        save(tmp_path / name, array)
    data = load(tmp_path, window=(2, 95))
    low, high = np.percentile(np.stack(list(arrays.values())), (2, 95))
    assert isinstance(data.preparation, Preparation)
    assert data.preparation.window == pytest.approx((low, high))
    for name, array in arrays.items():
        found = by_name(data)[f"{name} slice 6"][0].numpy()
        assert np.abs(found - windowed(plane(array, 2, 6), low, high)).max() < 0.51


def test_a_window_for_each_scan(tmp_path: Path):
    arrays = {"a.nii": volume(0), "b.nii": 3 * volume(1)}
    for name, array in arrays.items():
        save(tmp_path / name, array)
    data = load(tmp_path, window=(2, 95), window_of="file")
    assert isinstance(data.preparation, Preparation)
    assert (data.preparation.window, data.preparation.percentiles) == (None, (2, 95))
    for name, array in arrays.items():
        low, high = np.percentile(array, (2, 95))
        for index in (0, 6):
            found = by_name(data)[f"{name} slice {index}"][0].numpy()
            assert np.abs(found - windowed(plane(array, 2, index), low, high)).max() < 0.51


def test_the_window_is_of_the_slices_that_are_used(tmp_path: Path):
    array = volume()
    array[:, :, :4] = 30_000
    for name in ("a.nii", "b.nii"):
        save(tmp_path / name, array)
    data = load(tmp_path, slices="4:", window=(0, 100))
    assert isinstance(data.preparation, Preparation)
    assert data.preparation.window == (array[:, :, 4:].min(), array[:, :, 4:].max())


def test_the_scale_in_the_header_is_applied(tmp_path: Path):
    image = nibabel.Nifti1Image(volume(), np.eye(4))
    image.header.set_slope_inter(2.5, -1000)
    for name in ("a.nii", "b.nii"):
        nibabel.save(image, tmp_path / name)
    values = np.asarray(nibabel.load(tmp_path / "a.nii").dataobj)
    data = load(tmp_path, window=(0, 100))
    assert isinstance(data.preparation, Preparation)
    assert data.preparation.window == pytest.approx((values.min(), values.max()))


# A model's preparation


def test_a_models_axis_slices_and_window_are_used(tmp_path: Path):
    array = volume()
    save(tmp_path / "a.nii", array)
    save(tmp_path / "b.nii", array)
    preparation = Preparation((14, 10), 1, "pad", (200, 800), None, 1, "50%:75%")
    wanted = torch.from_numpy(np.stack([windowed(plane(array, 1, index), 200, 800) for index in range(6, 9)]))
    x, names = read_images([tmp_path / "a.nii"], preparation)
    assert names == [f"{tmp_path / 'a.nii'} slice {index}" for index in range(6, 9)]
    assert x.shape == (3, 1, 14, 10)
    assert (255 * x[:, 0] - wanted).abs().max() < 0.51
    data = load(tmp_path, preparation)
    assert data.preparation == preparation
    assert set(by_name(data)) == {f"{name} slice {index}" for name in ("a.nii", "b.nii") for index in range(6, 9)}
    assert np.abs(by_name(data)["a.nii slice 7"][0].numpy() - wanted[1].numpy()).max() < 0.51


def test_scans_for_a_model_without_a_window_are_refused(tmp_path: Path):
    save(tmp_path / "a.nii", volume())
    with pytest.raises(IntrovaeError, match="the model saw 8-bit images only"):
        read_images([tmp_path / "a.nii"], Preparation((12, 10), 1))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_names_and_sizes_of_slices_are_told_by_the_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, axes: tuple[int, int, int], axis: int
) -> None:
    array, affine = stored(volume(), axes, (1,))
    affine = affine @ np.diag([1, 2, 3, 1])
    path = save(tmp_path / "t1.nii.gz", array[..., None], affine)
    options = DataOptions(axis=axis, slices="20%:80%")
    found = list(slices("a/t1.nii.gz", path, options))
    monkeypatch.setattr(nibabel.Nifti1Image, "dataobj", property(lambda _: pytest.fail("the volume is read")))
    assert slice_names("a/t1.nii.gz", path, options) == [name for name, _ in found]
    assert scan_size(path, options) == (len(found), found[0][1].size)
