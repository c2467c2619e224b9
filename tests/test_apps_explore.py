"""Exploring a model: each function against a model whose latents are the data themselves; each command on tiny runs."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from commands import call
from introvae import CheckpointError, ConfigError, DataError, IntrospectiveVAE, Run, cli_explore
from introvae.apps import animation, explore
from introvae.apps.animation import write_animation
from introvae.apps.directions import Direction, direction, edit
from introvae.apps.explore import (
    Batch,
    active_dimensions,
    batches,
    decoded,
    latents,
    mix_styles,
    nearest_images,
    traverse,
    ways,
)
from introvae.apps.maps import CELLS, draw_map, latent_map
from introvae.data import Part
from introvae.networks.conditional import Conditional, ConditionalDecoder
from introvae.networks.style import StyleDecoder

TINY = ["--recipe", "none", "--quiet", "--steps", "2", "--batch-size", "8"]


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Same(nn.Module):
    """The encoder whose means are the data."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.most = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.most = max(self.most, len(x))
        return self.weight * x, torch.zeros_like(x)


class Back(Same):
    """The decoder that gives latents back."""

    def forward(self, z: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(z)[0]


def plain(size: int) -> IntrospectiveVAE:
    return IntrospectiveVAE(Same(), Back(), size)


def conditional(network: str = "tiny-conv", side: int = 8) -> IntrospectiveVAE:
    torch.manual_seed(0)
    model = IntrospectiveVAE.build((1, side, side), network, latent_dim=4, classes=["cat", "dog"])
    assert isinstance(model.encoder, Conditional)
    nn.init.normal_(model.encoder.labels.weight)  # zero at the start
    return model


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on digits; not to be changed."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    assert call("fit", *TINY, "--network", "tiny-conv", "--data", "digits", "--out", folder) == 0
    return Run(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark and bright pictures in folders of their own; not to be changed."""
    home = tmp_path_factory.mktemp("folders")
    generator = np.random.default_rng(0)
    for name, low in (("dark", 0), ("bright", 128)):
        (home / name).mkdir()
        for i, pixels in enumerate(generator.integers(low, low + 128, (12, 16, 16), dtype=np.uint8)):
            Image.fromarray(pixels).save(home / name / f"{i:02d}.png")
    return home


@pytest.fixture(scope="module")
def style(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A style run on the folders; not to be changed."""
    folder = tmp_path_factory.mktemp("style") / "run"
    words = [*TINY, "--network", "tiny-style", "--size", 16, "--data", folders, "--out", folder]
    assert call("fit", *words) == 0
    return Run(folder)


@pytest.fixture(scope="module")
def pets(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A class-conditional run on the folders; not to be changed."""
    folder = tmp_path_factory.mktemp("pets") / "run"
    words = [*TINY, "--network", "tiny-conv", "--size", 16, "--data", folders, "--conditional", "true"]
    assert call("fit", *words, "--out", folder) == 0
    return Run(folder)


def digit(tmp_path: Path, index: int) -> Path:
    from introvae.data.digits import load_digits

    path = tmp_path / f"digit{index}.png"
    Image.fromarray(load_digits().train.x[index, 0].numpy()).save(path)
    return path


def read(paths: Sequence[Path | str]) -> Tensor:
    """Grey pictures as the model takes them."""
    found = []
    for path in paths:
        with Image.open(path) as picture:
            found.append(torch.from_numpy(np.array(picture))[None].float() / 255)
    return torch.stack(found)


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


# --- what all functions share


def test_a_bounded_number_is_computed_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = plain(3), draws(10, 3)
    monkeypatch.setattr(explore, "BATCH", 4)
    assert torch.equal(latents(model, x), x)
    assert torch.equal(decoded(model, x), x)
    assert ways(model, x, steps=7).shape == (9, 7, 3)
    assert traverse(model, x[0], [0, 1, 2], steps=5).shape == (3, 5, 3)
    assert edit(model, x, x[0], [0.0, 1.0, 2.0]).shape == (10, 3, 3)
    assert (model.encoder.most, model.decoder.most) == (4, 4)
    parts = list(batches(model, Part(x)))
    assert [len(part.x) for part in parts] == [4, 4, 2]
    assert torch.equal(latents(model, parts), x)


def test_the_model_is_looked_at_in_evaluation_mode_and_left_as_it_was() -> None:
    model = IntrospectiveVAE.build((1, 8, 8), "conv", latent_dim=4, channels=[4], norm="batch").train()
    model.decoder.eval()
    before = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.rand(6, 1, 8, 8)
    found = ways(model, x, steps=3)
    assert not found.requires_grad
    assert [module.training for module in model.modules()] == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(found, ways(model.eval(), x, steps=3))
    with pytest.raises(DataError):
        ways(model.train(), torch.rand(2, 1, 9, 9))
    assert model.training


def test_no_samples_are_refused() -> None:
    with pytest.raises(DataError, match="give at least one"):
        latents(plain(2), [])
    with pytest.raises(DataError, match="give at least one"):
        latents(plain(2), torch.empty(0, 2))


# --- ways


def test_a_chain_goes_through_all_images() -> None:
    x = draws(4, 3)
    found = ways(plain(3), x, steps=5)
    torch.testing.assert_close(found[:, 0], x[:-1])
    torch.testing.assert_close(found[:, -1], x[1:])
    torch.testing.assert_close(found[:, 2], (x[:-1] + x[1:]) / 2)


@pytest.mark.parametrize("spherical", [False, True])
def test_each_row_is_what_interpolate_gives(spherical: bool) -> None:
    model, x, of = conditional(), torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 1])
    found = ways(model, x, 4, spherical, of)
    torch.testing.assert_close(found, model.interpolate(x[:-1], x[1:], 4, spherical, of[:-1], of[1:]))
    assert ways(model, x, 4, spherical, "cat").shape == found.shape


def test_a_spherical_way_keeps_its_length() -> None:
    found = ways(plain(2), torch.tensor([[2.0, 0.0], [0.0, 2.0]]), 7, spherical=True)[0]
    torch.testing.assert_close(found.norm(dim=1), torch.full((7,), 2.0))
    torch.testing.assert_close(found[3], torch.full((2,), math.sqrt(2)))


def test_ways_that_are_none() -> None:
    with pytest.raises(DataError, match="at least two"):
        ways(plain(2), draws(1, 2))
    with pytest.raises(ConfigError, match="steps is 1"):
        ways(plain(2), draws(2, 2), steps=1)
    with pytest.raises(ConfigError, match="knows no classes"):
        ways(plain(2), draws(2, 2), condition=1)
    with pytest.raises(ConfigError, match="give the condition"):
        ways(conditional(), torch.rand(2, 1, 8, 8))


# --- dimensions


def test_active_dimensions_are_those_that_vary() -> None:
    x = draws(400, 5) * torch.tensor([0.1, 3.0, 0.0, 1.0, 2.0]) + 7
    found = active_dimensions(plain(5), x, k=4)
    assert found.dimensions.tolist() == [1, 4, 3, 0]
    torch.testing.assert_close(found.variance, x.var(dim=0)[found.dimensions])
    assert active_dimensions(plain(5), [Batch(x[:90]), Batch(x[90:])], k=4).dimensions.equal(found.dimensions)
    for k in (0, 6):
        with pytest.raises(ConfigError, match="give 1 to 5"):
            active_dimensions(plain(5), x, k)
    with pytest.raises(DataError, match="at least two"):
        active_dimensions(plain(5), x[:1], 2)


def test_a_traverse_changes_one_dimension_at_a_time() -> None:
    z = draws(4)
    found = traverse(plain(4), z, [3, 1], reach=2, steps=5)
    for row, dimension in enumerate((3, 1)):
        assert found[row, :, dimension].tolist() == [-2, -1, 0, 1, 2]
        others = [i for i in range(4) if i != dimension]
        assert torch.equal(found[row][:, others], z[others].expand(5, 3))


def test_a_traverse_keeps_the_class() -> None:
    model, z = conditional(), draws(4)
    found = traverse(model, z, [0], steps=3, condition=torch.tensor([1]))
    at = z.repeat(3, 1)
    at[:, 0] = torch.tensor([-3.0, 0.0, 3.0])
    with torch.no_grad():
        torch.testing.assert_close(found[0], model.decode(at, "dog"))
        assert not torch.allclose(found[0], model.decode(at, "cat"))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"dimensions": [4]}, "0 to 3"),
        ({"dimensions": [-1]}, "0 to 3"),
        ({"dimensions": []}, "0 to 3"),
        ({"reach": 0}, "reach"),
        ({"steps": 1}, "steps is 1"),
        ({"z": torch.zeros(3)}, "give one of"),
    ],
)
def test_a_traverse_that_cannot_be(given: dict[str, object], named: str) -> None:
    options: dict[str, object] = {"z": torch.zeros(4), "dimensions": [0], **given}
    with pytest.raises(ConfigError, match=named):
        traverse(plain(4), **options)  # pyright: ignore[reportArgumentType]


# --- directions


def test_the_mean_direction_leads_from_one_average_to_the_other() -> None:
    with_, without = draws(30, 3) + torch.tensor([2.0, 0.0, -1.0]), draws(50, 3, seed=1)
    found = direction(plain(3), with_, without)
    torch.testing.assert_close(found.vector, with_.mean(dim=0) - without.mean(dim=0))
    assert found.agreement is not None
    assert 0.9 < found.agreement <= 1
    assert direction(plain(3), with_[:1], without).agreement is None


def test_the_agreement_of_sets_that_do_not_differ_is_low() -> None:
    found = direction(plain(200), draws(20, 200), draws(20, 200, seed=1))
    assert found.agreement is not None
    assert abs(found.agreement) < 0.3


def test_the_classifier_leaves_out_what_differs_by_chance() -> None:
    """The first dimension is the difference; the second varies much, and by chance not equally in both sets."""
    spread = torch.tensor([1.0, 5.0])
    with_, without = draws(400, 2) * spread + torch.tensor([4.0, 2.0]), draws(400, 2, seed=1) * spread
    mean, normal = (direction(plain(2), with_, without, method).vector for method in ("mean", "classifier"))
    assert mean[1] > 1
    assert abs(float(normal[1] / normal[0])) < abs(float(mean[1] / mean[0])) / 2
    # Strength 1 brings the average without to where the classifier has the average with.
    unit = normal / normal.norm()
    torch.testing.assert_close(unit @ (without.mean(dim=0) + normal), unit @ with_.mean(dim=0))


def test_sets_without_a_difference_and_unknown_methods() -> None:
    x = draws(5, 2)
    for method in ("mean", "classifier"):
        with pytest.raises(DataError, match="the same mean latents"):
            direction(plain(2), x, x, method)
    with pytest.raises(ConfigError, match="mean, classifier"):
        direction(plain(2), x, x, "median")


def test_an_edit_adds_the_direction() -> None:
    x, vector = draws(4, 3), torch.tensor([1.0, 0.0, 2.0])
    found = edit(plain(3), x, vector, [-1, 0, 0.5])
    torch.testing.assert_close(found, x[:, None] + torch.tensor([-1.0, 0.0, 0.5])[:, None] * vector)
    with pytest.raises(ConfigError, match="give at least one"):
        edit(plain(3), x, vector, [])
    with pytest.raises(ConfigError, match="shape"):
        edit(plain(3), x, vector[:2], [1])


def test_an_edit_keeps_each_class() -> None:
    model, x, of = conditional(), torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    found = edit(model, x, torch.ones(4), [0, 1], of)
    torch.testing.assert_close(found[:, 0], model.reconstruct(x, of))
    assert not torch.allclose(found[:, 0], model.reconstruct(x, 1 - of))


def test_a_saved_direction_belongs_to_its_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = (IntrospectiveVAE.build((2,), "tiny-mlp", latent_dim=3) for _ in range(2))
    found = direction(model, draws(9, 2) + 1, draws(9, 2, seed=1), "classifier")
    path = found.save(tmp_path / "up.safetensors")
    again = Direction.load(path, model)
    assert torch.equal(again.vector, found.vector)
    assert (again.method, again.model, again.agreement) == (found.method, found.model, found.agreement)
    with pytest.raises(CheckpointError, match="another model"):
        Direction.load(path, other)
    with pytest.raises(ConfigError, match="another model"):
        edit(other, draws(2, 2), found, [1])
    with pytest.raises(CheckpointError, match="3 dimensions and the model has 2"):
        Direction.load(path, plain(2))
    path.write_bytes(path.read_bytes()[:20])
    for broken in (path, tmp_path / "none.safetensors"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            Direction.load(broken, model)
    with pytest.raises(ConfigError, match=r"FILE\.safetensors"):
        found.save(tmp_path / "up.pt")


# --- neighbours


def test_nearest_by_latents_pixels_and_features() -> None:
    x = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = IntrospectiveVAE.build((1, 8, 8), "tiny-conv", latent_dim=4)
    query = (x[[3, 11]] + 0.01).clamp(0, 1)
    z, of_query = latents(model, x), latents(model, query)
    wanted = torch.cdist(of_query.double(), z.double()).sort(dim=1)
    found = nearest_images(model, query, batches(model, Part((255 * x).round().byte())), k=5)
    torch.testing.assert_close(found.distance, wanted.values[:, :5], atol=0.05, rtol=0)  # 8 bits
    found = nearest_images(model, query, map(Batch, x.split(7)), k=5)
    assert torch.equal(found.rows, wanted.indices[:, :5])
    for by in ("pixels", "thumb"):
        found = nearest_images(model, query, map(Batch, x.split(7)), k=2, by=by)
        assert found.rows[:, 0].tolist() == [3, 11]
    with pytest.raises(ConfigError, match="unknown feature space"):
        nearest_images(model, query, [Batch(x)], by="beauty")


# --- maps


def test_the_map_is_the_principal_axes() -> None:
    from sklearn.decomposition import PCA

    x = draws(60, 5) @ draws(5, 5, seed=1)
    found = latent_map(plain(5), x)
    pca = PCA(2)
    wanted = torch.from_numpy(pca.fit_transform(x.double().numpy())).float()
    wanted *= (wanted * found.points).sum(dim=0).sign()
    torch.testing.assert_close(found.points, wanted, atol=1e-4, rtol=1e-4)
    assert found.shares == pytest.approx(pca.explained_variance_ratio_, rel=1e-5)


def test_maps_of_one_dimension_and_of_none() -> None:
    x = draws(9, 1)
    found = latent_map(plain(1), x)
    torch.testing.assert_close(found.points[:, 0], x[:, 0] - x.mean())
    assert not found.points[:, 1].any()
    assert found.shares == pytest.approx((1, 0))
    assert latent_map(plain(3), torch.ones(4, 3)).shares == (0, 0)
    with pytest.raises(DataError, match="at least three"):
        latent_map(plain(2), draws(2, 2))
    with pytest.raises(ConfigError, match="pca, tsne"):
        latent_map(plain(2), x, "umap")


def test_tsne_keeps_clusters_apart_and_repeats_itself() -> None:
    x = draws(40, 4)
    x[20:] += 20
    first, again = (latent_map(plain(4), x, "tsne", seed=3) for _ in range(2))
    assert first.shares is None
    assert torch.equal(first.points, again.points)
    distances = torch.cdist(first.points, first.points) + torch.eye(40) * 1e9
    nearest = distances.argmin(dim=1)
    assert torch.equal(nearest < 20, torch.arange(40) < 20)


def test_the_picture_names_the_classes_that_are_there() -> None:
    figure = draw_map(draws(9, 2), torch.tensor([0, 2, -1] * 3), ["cat", "cow", "dog"], axes=("one", "two"))
    (axis,) = figure.axes
    legend = axis.get_legend()
    assert legend is not None
    assert {text.get_text() for text in legend.get_texts()} == {"cat", "dog", "unknown"}
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("one", "two")
    assert draw_map(draws(9, 2)).axes[0].get_legend() is None
    with pytest.raises(DataError, match="9 points and 8 labels"):
        draw_map(draws(9, 2), torch.zeros(8))


def test_thumbnails_do_not_hide_each_other() -> None:
    from matplotlib.offsetbox import AnnotationBbox

    points = torch.cat([draws(500, 2), torch.zeros(300, 2)])
    figure = draw_map(points, images=torch.rand(800, 1, 4, 4))
    boxes = [artist for artist in figure.axes[0].artists if isinstance(artist, AnnotationBbox)]
    places = np.array([box.xy for box in boxes])
    assert 100 < len(boxes) < 500
    assert len(np.unique(places, axis=0)) == len(boxes)
    low, high = points.numpy().min(axis=0), points.numpy().max(axis=0)
    cells = np.minimum(((places - low) / (high - low).max() * CELLS).astype(int), CELLS - 1)
    assert len(np.unique(cells, axis=0)) == len(boxes)


# --- styles


def steered(model: IntrospectiveVAE, z: Tensor, fine: Tensor, levels: int) -> Tensor:
    """Mixed by hooks that change the style on its way into each block."""
    decoder = model.decoder.network if isinstance(model.decoder, ConditionalDecoder) else model.decoder
    assert isinstance(decoder, StyleDecoder)
    styles: list[Any] = []
    hook = decoder.mapping.register_forward_hook(lambda module, args, out: styles.append(out))
    decoder(fine)
    hook.remove()
    hooks = [
        block.register_forward_pre_hook(lambda module, args: (args[0], styles[0]))
        for block in list(decoder.blocks)[levels:]
    ]
    image = decoder(z)
    for hook in hooks:
        hook.remove()
    return image


@torch.no_grad()
@pytest.mark.parametrize("levels", [1, 2])
def test_mixed_styles_are_those_of_hooks(levels: int) -> None:
    torch.manual_seed(0)
    model = IntrospectiveVAE.build((1, 16, 16), "tiny-style", latent_dim=4)
    a, b = torch.rand(2, 3, 1, 16, 16)
    found = mix_styles(model, a, b, levels)
    z, fine = latents(model, a), latents(model, b)
    torch.testing.assert_close(found, steered(model, z, fine, levels))
    assert not torch.allclose(found, model.reconstruct(a))
    assert not torch.allclose(found, model.reconstruct(b))
    torch.testing.assert_close(mix_styles(model, a, a, levels), model.reconstruct(a))


@torch.no_grad()
def test_styles_of_classes_are_mixed_too() -> None:
    model = conditional("tiny-style", 16)
    a, b = torch.rand(2, 2, 1, 16, 16)
    assert isinstance(model.decoder, ConditionalDecoder)
    given = [torch.cat([latents(model, x, of), model.decoder.labels.weight[[of] * 2]], 1) for x, of in ((a, 0), (b, 1))]
    torch.testing.assert_close(mix_styles(model, a, b, 1, "cat", "dog"), steered(model, given[0], given[1], 1))


def test_styles_that_cannot_be_mixed() -> None:
    model, x = IntrospectiveVAE.build((1, 16, 16), "tiny-style", latent_dim=4), torch.rand(2, 1, 16, 16)
    for levels in (0, 3):
        with pytest.raises(ConfigError, match="4, 8, 16 pixels: give 1 to 2"):
            mix_styles(model, x, x, levels)
    with pytest.raises(DataError, match="as many of each"):
        mix_styles(model, x, x[:1], 1)
    with pytest.raises(ConfigError, match="--network style"):
        mix_styles(IntrospectiveVAE.build((1, 16, 16), "tiny-conv", latent_dim=4), x, x, 1)


# --- moving pictures


def test_a_gif_goes_there_and_back(tmp_path: Path) -> None:
    frames = torch.linspace(0, 1, 5)[:, None, None, None].expand(5, 1, 8, 8)
    with Image.open(write_animation(frames, tmp_path / "a" / "way.gif", seconds=4)) as gif:
        assert (gif.n_frames, gif.info["loop"], gif.size) == (8, 0, (48, 48))  # pyright: ignore[reportAttributeAccessIssue]
        shown = []
        for i in range(8):
            gif.seek(i)
            assert gif.info["duration"] == 500
            shown.append(np.asarray(gif.convert("L"))[0, 0])
    assert shown == [0, 64, 128, 191, 255, 191, 128, 64]


def test_animations_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = torch.rand(3, 3, 8, 8)
    monkeypatch.setattr(animation, "_ffmpeg", lambda: None)
    with pytest.raises(ConfigError, match=r"an MP4 needs ffmpeg.*give FILE\.gif"):
        write_animation(frames, tmp_path / "way.mp4")
    with pytest.raises(ConfigError, match=r"FILE\.gif or FILE\.mp4"):
        write_animation(frames, tmp_path / "way.avi")
    with pytest.raises(ConfigError, match="seconds"):
        write_animation(frames, tmp_path / "way.gif", seconds=0)
    with pytest.raises(DataError, match="no images"):
        write_animation(torch.rand(3, 8), tmp_path / "way.gif")
    assert list(tmp_path.iterdir()) == []


def test_an_mp4_is_made_by_the_ffmpeg_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the program keeps what it is given: the pixels of all frames, their size and rate."""
    program = tmp_path / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$@" > "$0.words"\nfor last; do :; done\ncat > "$last"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(animation, "import_module", lambda name: 1 / 0)  # imageio-ffmpeg is missing or broken
    frames = torch.rand(3, 3, 50, 60)
    path = write_animation(frames, tmp_path / "way.mp4", seconds=2)
    sent = np.frombuffer(path.read_bytes(), np.uint8).reshape(4, 50, 60, 3)
    np.testing.assert_array_equal(sent[[0, 1, 2]], (frames * 255).round().byte().permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(sent[3], sent[1])
    said = Path(f"{program}.words").read_text()
    assert "-s 60x50 -r 2.000000 -i -" in said
    program.write_text("#!/bin/sh\ncat > /dev/null\necho no such codec >&2\nexit 3\n")
    with pytest.raises(ConfigError, match=r"no such codec.*give FILE.gif"):
        write_animation(frames, tmp_path / "way.mp4")


# --- commands


def test_interpolate_through_several_images(digits: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [digit(tmp_path, i) for i in range(3)]
    words = ["interpolate", str(digits.folder), *map(str, names), "--steps", "4", "-o"]
    capsys.readouterr()
    for output in ("way.npy", "way.png", "way", "way.gif"):
        cli_explore.interpolate([*words[1:], str(tmp_path / output)])
        assert capsys.readouterr().out == f"{tmp_path / output}\n"
    x = read(names)
    wanted = ways(digits.model(), x, 4)
    np.testing.assert_allclose(np.load(tmp_path / "way.npy"), wanted.flatten(0, 1).numpy(), atol=1e-6)
    assert size_of(tmp_path / "way.png") == (4 * 50 + 2, 2 * 50 + 2)
    assert len(list((tmp_path / "way").iterdir())) == 8
    with Image.open(tmp_path / "way.gif") as gif:
        seconds = 0
        for i in range(gif.n_frames):  # pyright: ignore[reportAttributeAccessIssue]
            gif.seek(i)
            seconds += gif.info["duration"]
    assert seconds == pytest.approx(4000, abs=60)  # 12 frames, of which equal ones are one


def test_traverse_says_which_dimensions(digits: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, image = str(digits.folder), str(digit(tmp_path, 0))
    cli_explore.traverse([run, image, "--dimensions", "3", "--steps", "5", "-o", str(tmp_path / "sheet.png")])
    said = capsys.readouterr().out
    model = digits.model()
    from introvae.data.digits import load_digits

    found = active_dimensions(model, batches(model, load_digits().heldout), 3)
    assert "columns: the dimension's value from -3 to 3 in 5 steps" in said
    for row, dimension in enumerate(found.dimensions.tolist()):
        assert f"row {row + 1}: dimension {dimension}, variance" in said
    assert size_of(tmp_path / "sheet.png") == (5 * 50 + 2, 3 * (52 + 18))
    cli_explore.traverse([run, "--which", "1,0", "--reach", "2", "--steps", "3", "-o", str(tmp_path / "x.npy")])
    wanted = traverse(model, torch.zeros(model.latent_dim), [1, 0], 2, 3).flatten(0, 1)
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), wanted.numpy(), atol=1e-6)


def test_edit_by_two_folders_and_by_a_saved_direction(
    style: Run, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, saved = str(style.folder), str(tmp_path / "light.safetensors")
    images = [str(folders / "dark" / f"{i:02d}.png") for i in range(2)]
    pair = ["--with", str(folders / "bright"), "--without", str(folders / "dark")]
    cli_explore.edit([run, *images, *pair, "--save", saved, "-o", str(tmp_path / "a.npy")])
    said = capsys.readouterr().out
    for words in ("cosine", saved, "columns: the image, then strengths 0, 1", "row 2: 01.png"):
        assert words in said
    cli_explore.edit([run, *images, "--direction", saved, "-o", str(tmp_path / "b.npy")])
    a, b = (np.load(tmp_path / name) for name in ("a.npy", "b.npy"))
    np.testing.assert_array_equal(a, b)
    assert a.shape == (6, 1, 16, 16)
    model = style.model()
    x = read(images)
    vector = Direction.load(saved, model).vector
    sets = [latents(model, read(sorted((folders / name).iterdir()))) for name in ("bright", "dark")]
    torch.testing.assert_close(vector, sets[0].mean(dim=0) - sets[1].mean(dim=0), atol=1e-5, rtol=1e-4)
    wanted = torch.cat([x[:, None], edit(model, x, vector, [0, 1])], dim=1).flatten(0, 1)
    np.testing.assert_allclose(a, wanted.numpy(), atol=1e-6)
    cli_explore.edit([run, *images, "--direction", saved, "--strength", "-1", "0", "2", "-o", str(tmp_path / "c.png")])
    assert "strengths -1, 0, 2" in capsys.readouterr().out
    assert size_of(tmp_path / "c.png") == (4 * 50 + 2, 2 * (52 + 18))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("a.png -o x.png", "give --with DATA and --without DATA"),
        ("a.png --with A -o x.png", "give --with DATA and --without DATA"),
        ("a.png --with A --without B --direction F -o x.png", "give --with DATA and --without DATA"),
        ("a.png --with A --without B", "give images and -o FILE"),
        ("--with A --without B -o x.png", "give images and -o FILE"),
        ("--with A --without B", "give images and -o FILE"),
    ],
)
def test_edit_words_that_do_not_go_together(digits: Run, words: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        cli_explore.edit([str(digits.folder), *words.split()])


def test_neighbours_finds_a_copy_first(
    style: Run, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = folders / "bright" / "05.png"
    for by in ("latents", "pixels", "randconv"):
        words = [str(style.folder), str(image), "--data", str(folders), "-k", "3", "--by", by]
        cli_explore.neighbours([*words, "-o", str(tmp_path / "near.npy")])
        said = capsys.readouterr().out
        first = said.removeprefix(f"{image}: ").split(",")[0].split()
        assert first[0] == "bright/05.png"
        assert float(first[1]) < 1e-5  # one image's latent is not, to the last bit, what it is in a batch
        found = np.load(tmp_path / "near.npy")
        assert found.shape == (4, 1, 16, 16)
        np.testing.assert_array_equal(found[0], found[1])
        assert f"its 3 nearest in {folders} by {by}" in said
    cli_explore.neighbours([*words[:2], "-k", "2", "-o", str(tmp_path / "near.png")])
    assert size_of(tmp_path / "near.png") == (3 * 50 + 2, 52 + 18)


def test_a_map_as_picture_and_as_table(digits: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from introvae.data.digits import load_digits

    run = str(digits.folder)
    cli_explore.latents([run, "-n", "500", "-o", str(tmp_path / "map.csv")])
    said = capsys.readouterr().out
    assert "first principal axis" in said
    with open(tmp_path / "map.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    part = load_digits().heldout.some(500, torch.Generator().manual_seed(0))
    assert part.labels is not None
    assert [row["label"] for row in rows] == [str(label) for label in part.labels.tolist()]
    found = latent_map(digits.model(), part.tensor()).points
    torch.testing.assert_close(torch.tensor([[float(row["x"]), float(row["y"])] for row in rows]), found)
    for more in ([], ["--thumbnails"], ["--method", "tsne", "-n", "30"]):
        cli_explore.latents([run, "-n", "50", *more, "-o", str(tmp_path / "map.png")])
        assert size_of(tmp_path / "map.png") == (880, 770)
    assert "t-SNE" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"give FILE.png or FILE.csv"):
        cli_explore.latents([run, "-o", str(tmp_path / "map.gif")])


def test_mix_has_coarse_images_in_rows_and_fine_ones_in_columns(
    style: Run, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(folders / "dark" / f"{i:02d}.png") for i in range(5)]
    words = [str(style.folder), "--coarse", *names[:2], "--fine", *names[2:], "--levels", "1"]
    cli_explore.mix([*words, "-o", str(tmp_path / "mix.npy")])
    said = capsys.readouterr().out
    assert "levels 1 to 1 have, then with the fine ones of 02.png, 03.png, 04.png" in said
    assert "row 3: 01.png" in said
    found = torch.from_numpy(np.load(tmp_path / "mix.npy")).unflatten(0, (3, 4))
    x = read(names)
    assert torch.equal(found[0, 1:], x[2:])
    assert torch.equal(found[1:, 0], x[:2])
    wanted = mix_styles(style.model(), x[1:2], x[3:4], 1)[0]
    torch.testing.assert_close(found[2, 2], wanted)
    cli_explore.mix([*words, "-o", str(tmp_path / "mix.png")])
    assert size_of(tmp_path / "mix.png") == (4 * 50 + 2, 3 * (52 + 18))


def test_a_model_of_classes_is_explored_with_them(pets: Run, folders: Path, tmp_path: Path) -> None:
    run, image, out = str(pets.folder), str(folders / "dark" / "00.png"), ["-o", str(tmp_path / "x.png")]
    label = ["--label", "dark"]
    cli_explore.traverse([run, image, *label, "--dimensions", "2", *out])
    cli_explore.neighbours([run, image, *label, "-k", "2", *out])
    cli_explore.latents([run, "--data", str(folders), *out])
    words = [run, image, "--with", str(folders), "--without", str(folders), *out]
    with pytest.raises(DataError, match="the same mean latents"):
        cli_explore.edit([*words, *label])
    for command in (cli_explore.traverse, cli_explore.neighbours):
        with pytest.raises(ConfigError, match="give --label"):
            command([run, image, *out])


def test_data_that_are_not_the_run_s_any_more_are_refused(digits: Run, tmp_path: Path) -> None:
    copy = shutil.copytree(digits.folder, tmp_path / "run")
    path = copy / "model" / "config.json"
    config = json.loads(path.read_text())
    config["data"]["fingerprint"][-1] += 1
    path.write_text(json.dumps(config))
    with pytest.raises(DataError, match="not what the run was trained on"):
        cli_explore.latents([str(copy), "-o", str(tmp_path / "map.png")])


def test_data_of_another_shape_are_refused(style: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "flat.npy", np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32))
    with pytest.raises(DataError, match=r"the model takes \(1, 16, 16\)"):
        cli_explore.latents([str(style.folder), "--data", str(tmp_path / "flat.npy"), "-o", str(tmp_path / "x.png")])


@pytest.mark.parametrize("name", ["interpolate", "traverse", "edit", "neighbours", "latents", "mix"])
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        getattr(cli_explore, name)(["--help"])
    assert stop.value.code == 0
    assert f"introvae {name} runs/" in capsys.readouterr().out
