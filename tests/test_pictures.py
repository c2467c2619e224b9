from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from introvae.files import write_atomically
from introvae.pictures import (
    density_estimate,
    grid_points,
    image_grid,
    labelled_rows,
    plane_figure,
    save_picture,
    stack_columns,
    to_pil,
    to_uint8,
)


def flat(values: list[int], side: int = 48, channels: int = 1) -> Tensor:
    # Images of one grey value each, in 1/255.
    return (torch.tensor(values) / 255).view(-1, 1, 1, 1).expand(-1, channels, side, side)


def coloured_pixels(picture: Image.Image, colour: str) -> np.ndarray:
    # Rows and columns [N, 2] of the pixels that are clearly blue, or clearly yellow.
    red, green, blue = np.asarray(picture.convert("RGB")).astype(int).transpose(2, 0, 1)
    return np.argwhere(blue - red > 40 if colour == "blue" else (red > 200) & (green > 200) & (blue < 100))


# Values


def test_to_uint8_rounds_and_does_not_cut_off():
    levels = torch.arange(256) / 255
    x = torch.stack([levels, levels + 0.49 / 255, levels - 0.49 / 255]).view(3, 1, 16, 16)
    assert to_uint8(x).reshape(3, 256).tolist() == [list(range(256))] * 3


def test_to_uint8_clamps_and_puts_the_channels_last():
    x = torch.zeros(2, 3, 4, 5)
    x[1, 0, 2, 3], x[1, 1, 2, 3], x[1, 2, 2, 3] = -7.0, 7.0, 0.999
    array = to_uint8(x.requires_grad_())
    assert array.shape == (2, 4, 5, 3)
    assert array.dtype == np.uint8
    assert array[1, 2, 3].tolist() == [0, 255, 255]
    assert array.sum() == 510


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_to_pil_keeps_the_size(channels: int, mode: str):
    x = torch.rand(channels, 4, 7, generator=torch.Generator().manual_seed(0))
    picture = to_pil(x)
    assert (picture.mode, picture.size) == (mode, (7, 4))
    np.testing.assert_array_equal(np.asarray(picture).reshape(4, 7, channels), to_uint8(x[None])[0])


# Sheets of images


@pytest.mark.parametrize(
    ("n", "columns", "gap", "size"),
    [
        (1, None, 2, (52, 52)),
        (4, None, 2, (102, 102)),
        (5, None, 2, (152, 102)),  # three columns, two rows
        (5, 5, 2, (252, 52)),
        (5, 2, 2, (102, 152)),
        (3, 8, 2, (402, 52)),
        (4, 2, 0, (96, 96)),
        (4, 2, 5, (111, 111)),
    ],
)
def test_grid_size(n: int, columns: int | None, gap: int, size: tuple[int, int]):
    assert image_grid(flat([9] * n), columns, gap).size == size


@pytest.mark.parametrize(("side", "shown"), [(8, 48), (16, 48), (28, 56), (32, 64), (47, 94), (48, 48), (100, 100)])
def test_small_images_are_enlarged_by_a_whole_factor(side: int, shown: int):
    x = torch.rand(1, 1, side, side, generator=torch.Generator().manual_seed(0))
    picture = np.asarray(image_grid(x))[2:-2, 2:-2]
    assert picture.shape == (shown, shown)
    zoom = shown // side
    np.testing.assert_array_equal(picture, to_uint8(x)[0, :, :, 0].repeat(zoom, axis=0).repeat(zoom, axis=1))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_grid_goes_row_by_row_on_white(channels: int, mode: str):
    gap, columns, values = 3, 3, [10, 20, 30, 40, 50]
    picture = image_grid(flat(values, channels=channels), columns, gap)
    assert picture.mode == mode
    sheet = np.asarray(picture).reshape(picture.height, picture.width, channels)
    wanted = np.full_like(sheet, 255)
    for index, value in enumerate(values):
        top, left = (gap + place * (48 + gap) for place in divmod(index, columns))
        wanted[top : top + 48, left : left + 48] = value
    np.testing.assert_array_equal(sheet, wanted)


def test_labelled_rows_stand_one_above_the_other_under_their_names():
    rows = {"real": flat([10, 20, 30]), "sample": flat([40], channels=3), "": flat([50, 60, 70])}
    picture = labelled_rows(rows, columns=2)
    assert picture.mode == "RGB"
    grids = {name: np.asarray(image_grid(images, 2).convert("RGB")) for name, images in rows.items()}
    sheet = np.asarray(picture)
    titles, top = {}, 0
    for name, grid in grids.items():
        title = (picture.height - sum(len(grid) for grid in grids.values())) // 3
        titles[name] = sheet[top : top + title]
        top += title
        np.testing.assert_array_equal(sheet[top : top + len(grid), : grid.shape[1]], grid)
        top += len(grid)
    assert sheet.shape == (top, 102, 3)
    assert titles["real"].min() < 60
    assert titles["sample"].min() < 60
    assert not np.array_equal(titles["real"], titles["sample"])
    assert (titles[""] == 255).all()


def test_stack_columns_puts_the_same_index_side_by_side():
    a, b = torch.arange(3)[:, None], torch.arange(10, 13)[:, None]
    assert stack_columns([a, b]).flatten().tolist() == [0, 10, 1, 11, 2, 12]


# The plane


def test_grid_points_are_cell_centres_with_the_second_coordinate_fastest():
    x = grid_points(2.0, 4)
    assert x.shape == (16, 2)
    assert x[:5].tolist() == [[-1.5, -1.5], [-1.5, -0.5], [-1.5, 0.5], [-1.5, 1.5], [-0.5, -1.5]]
    assert x.sum().item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_density_estimate_has_a_maximum_of_1(offset: float):
    x = torch.tensor([[3.0, 1.0], [2.0, 1.5]], dtype=torch.float64)
    values = density_estimate(x + offset)
    assert values.max().item() == 1.0
    np.testing.assert_allclose(values, np.exp([[-2, 0], [-1, -0.5]]), rtol=1e-10)


@pytest.mark.parametrize(("points", "densities"), [(1, 0), (0, 1), (2, 1), (3, 3)])
def test_plane_figure_is_a_picture_with_a_panel_for_each_name(tmp_path: Path, points: int, densities: int):
    draws = torch.Generator().manual_seed(0)
    figure = plane_figure(
        {f"points {i}": torch.randn(1234, 2, generator=draws) for i in range(points)},
        {f"density {i}": torch.rand(10, 10, generator=draws) for i in range(densities)},
        extent=2.0,
    )
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [f"points {i} (1,234)" for i in range(points)] + [f"density {i}" for i in range(densities)]
    assert all(axis.get_xlim() == axis.get_ylim() == (-2.0, 2.0) for axis in figure.axes)
    path = tmp_path / "plane.png"
    assert save_picture(figure, path) == path
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.size == (pytest.approx(286 * (points + densities), abs=2), 308)


@pytest.mark.parametrize(("x", "y"), [(1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0)])
def test_points_and_densities_stand_where_they_belong(tmp_path: Path, x: float, y: float):
    points = torch.tensor([[x, y]]).repeat(200, 1) + 0.05 * torch.randn(
        200, 2, generator=torch.Generator().manual_seed(0)
    )
    density = torch.zeros(4, 4)
    density[3 if x > 0 else 0, 3 if y > 0 else 0] = 1.0
    for figure, colour in (
        (plane_figure({"a": points.requires_grad_()}, {}, 2.0), "blue"),
        (plane_figure({}, {"b": density}, 2.0), "yellow"),
    ):
        path = save_picture(figure, tmp_path / f"{colour}.png")
        with Image.open(path) as picture:
            found = coloured_pixels(picture, colour)
            row, column = found.mean(axis=0) / [picture.height, picture.width]
        assert len(found) > 20
        assert (column > 0.5) == (x > 0)
        assert (row < 0.5) == (y > 0)


# Files


def test_save_picture_makes_the_folder_and_loses_nothing(tmp_path: Path):
    picture = image_grid(flat([0, 100, 200]))
    path = save_picture(picture, tmp_path / "new" / "folder" / "x.png")
    with Image.open(path) as loaded:
        assert loaded.format == "PNG"
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(picture))
    assert save_picture(picture, str(path)) == path
    assert os.listdir(path.parent) == ["x.png"]


@pytest.mark.parametrize("content", [b"", b"new", bytes(range(256)) * 5000])
def test_write_atomically_replaces_the_content(tmp_path: Path, content: bytes):
    path = tmp_path / "folder" / "file.bin"
    write_atomically(path, b"a longer old content")
    write_atomically(str(path), content)
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["file.bin"]


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str):
    path = tmp_path / "file.bin"
    write_atomically(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if failing != "write":
        monkeypatch.setattr(os, failing, full)
    with pytest.raises(TypeError if failing == "write" else OSError):
        write_atomically(path, "no bytes" if failing == "write" else b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_a_folder_in_the_files_place_is_left_alone(tmp_path: Path):
    path = tmp_path / "taken"
    (path / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="taken"):
        write_atomically(path, b"new")
    assert os.listdir(tmp_path) == ["taken"]
    assert os.listdir(path) == ["inside"]


def test_the_old_file_is_whole_until_the_new_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file.bin"
    write_atomically(path, b"old")
    seen = []
    fsync = os.fsync

    def look(descriptor: int) -> None:
        fsync(descriptor)
        seen.append(path.read_bytes())

    monkeypatch.setattr(os, "fsync", look)
    write_atomically(path, b"new")
    assert seen == [b"old"]
    assert path.read_bytes() == b"new"
