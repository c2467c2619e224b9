"""Nearest neighbours against all distances at once; ties, cosine, bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from introvae import ConfigError, IntrospectiveVAE
from introvae.data import ArrayData, DataOptions, from_array, load_data
from introvae.metrics import neighbours as metric
from introvae.metrics.features import feature_space
from introvae.metrics.neighbours import nearest
from introvae.report import page
from introvae.report.neighbours import SHOWN, neighbours

QUERY = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(0))
SET = torch.randn(53, 2, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [1, 10, 53])
@pytest.mark.parametrize("k", [1, 4, 53])
def test_one_pass_finds_what_all_distances_say(size: int, k: int) -> None:
    found = nearest(QUERY, SET.split(size), k)
    every = (QUERY.flatten(1)[:, None].double() - SET.flatten(1)[None].double()).square().sum(dim=2).sqrt()
    values, index = every.sort(dim=1)
    assert found.rows.equal(index[:, :k])
    torch.testing.assert_close(found.distance, values[:, :k])


def test_cosine_is_of_the_angle_not_of_the_length() -> None:
    found = nearest(3 * QUERY, SET.split(20), 5, distance="cosine")
    every = 1 - cosine_similarity(QUERY.flatten(1)[:, None].double(), SET.flatten(1)[None].double(), dim=2)
    values, index = every.sort(dim=1)
    assert found.rows.equal(index[:, :5])
    torch.testing.assert_close(found.distance, values[:, :5])
    assert nearest(-QUERY, [QUERY], 7, distance="cosine").distance.max() == pytest.approx(2.0)


def test_a_copy_is_found_at_no_distance_and_of_equals_the_first() -> None:
    found = nearest(SET[[5, 9]], torch.cat([SET, SET]).split(8), 2)
    assert found.rows.tolist() == [[5, 58], [9, 62]]
    assert found.distance.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_copies_far_from_the_origin_are_at_no_distance() -> None:
    """There the matrix product rounds squares by more than what the points are apart."""
    points = 1e6 + 1e-3 * torch.randn(40, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = nearest(points[[3, 17]], torch.cat([points, points]).split(9), 2)
    assert found.rows.tolist() == [[3, 43], [17, 57]]
    assert found.distance.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    every = (points[:, None] - points[None]).square().sum(dim=2).sqrt().sort(dim=1)
    assert nearest(points, points.split(7), 5).rows.equal(every.indices[:, :5])


@pytest.mark.parametrize("pairs", [1, 20, 2**22])
def test_of_many_equals_the_first_are_found(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric, "PAIRS", pairs)
    found = nearest(SET[:2], [SET[2:5], SET[:1].expand(30, -1, -1), SET[1:2].expand(30, -1, -1)], 3)
    assert found.rows.tolist() == [[3, 4, 5], [33, 34, 35]]
    assert found.distance.eq(0).all()


def test_of_a_large_set_few_distances_are_computed_exactly() -> None:
    points = torch.randn(2000, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    query = points[:10] + 0.1
    exact = metric._distances(query, points, 3, torch.full((10,), torch.inf))
    assert exact.isfinite().sum(dim=1).eq(3).all()
    exact = metric._distances(query, points[10:], 3, torch.full((10,), 0.5))  # nearer ones are known already
    assert not exact.isfinite().any()


def test_bad_input_is_named() -> None:
    with pytest.raises(ConfigError, match="a set of 3 has no 4 nearest"):
        nearest(QUERY, [SET[:3]], 4)
    with pytest.raises(ConfigError, match="distance"):
        nearest(QUERY, [SET], 1, distance="manhattan")
    with pytest.raises(ConfigError, match="k is 0"):
        nearest(QUERY, [SET], 0)
    with pytest.raises(ConfigError, match="of 6 and of 3 features cannot be compared"):
        nearest(QUERY, [SET[:, 0]], 1)


class Copies(nn.Module):
    """A decoder that has learnt its training images by heart."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.register_buffer("images", images)

    def forward(self, z: Tensor) -> Tensor:
        images = self.get_buffer("images")
        return images[(z[:, 0].abs() * 1000).long() % len(images)]


class Encodes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.scale * x.flatten(1)[:, :2], x.flatten(1)[:, :2]


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 7, 7), (1, 28, 28)])
def test_the_report_finds_a_model_out_that_copies(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, *shape), dtype=np.uint8)
    data = from_array(pixels, name="noise")
    copies = IntrospectiveVAE(Encodes(), Copies(data.train.tensor()), latent_dim=2)
    picture, facts = neighbours(copies, data)
    assert facts["searched"] == len(data.train)
    assert facts["n"] == 200
    for kind in ("pixels", "features"):
        assert facts[kind]["samples"] == pytest.approx(0.0, abs=1e-6)
        assert facts[kind]["heldout"] > facts[kind]["heldout_5"] > 1e-4
    sheet = np.asarray(picture.convert("L"))
    assert sheet.shape[1] > 7 * 48
    other = IntrospectiveVAE(Encodes(), Copies(data.heldout.tensor()), latent_dim=2)
    _, facts = neighbours(other, data)
    assert facts["pixels"]["samples"] == pytest.approx(facts["pixels"]["heldout"], rel=0.1)


def test_few_training_images_are_no_fault() -> None:
    data = from_array(np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8), dtype=np.uint8), name="three")
    _, facts = neighbours(IntrospectiveVAE(Encodes(), Copies(data.train.tensor()), latent_dim=2), data)
    assert facts["searched"] == len(data.train) < SHOWN


def test_a_model_that_copies_some_images_is_found_out_by_the_quantile() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (400, 1, 16, 16), dtype=np.uint8)
    data = from_array(pixels, name="noise")
    new = torch.rand(9 * 20, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    model = IntrospectiveVAE(Encodes(), Copies(torch.cat([new, data.train[:20].tensor()])), latent_dim=2)
    _, facts = neighbours(model, data)
    for kind in ("pixels", "features"):
        assert facts[kind]["samples"] > 0.5 * facts[kind]["heldout"]
        assert facts[kind]["samples_5"] == pytest.approx(0.0, abs=1e-6)
    told = page._caption("neighbours", "", {"neighbours": facts})
    its = facts["pixels"]
    assert f"median and 5 % quantile: by pixels {page.number(its['samples'])}, {page.number(its['samples_5'])}" in told
    assert f"(held-out images {page.number(its['heldout'])}, {page.number(its['heldout_5'])})" in told
    count = f"{facts['n']} samples and {len(data.heldout)} held-out images, each to the nearest of {facts['searched']} "
    assert facts["protocol"].startswith(count)
    assert "pixels: Euclidean distance, values in [0, 1]" in facts["protocol"]
    space = feature_space(facts["space"])
    assert f"features: 1 - cosine in {space.name} ({space.note})" in facts["protocol"]
    assert f"Protocol: {facts['protocol']}." in told


def test_large_images_are_searched_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    data = from_array(np.random.default_rng(0).integers(0, 256, (60, 1, 8, 8), dtype=np.uint8), name="some")
    model = IntrospectiveVAE(Encodes(), Copies(data.train.tensor()), latent_dim=2)
    _, whole = neighbours(model, data)
    monkeypatch.setattr("introvae.report.neighbours.BYTES", 5 * 8 * 64)
    _, found = neighbours(model, data)
    assert found["searched"] == 54
    assert found["pixels"] == whole["pixels"]


@pytest.mark.parametrize(("limit", "value"), [("MOST", 20), ("BYTES", 20 * 64)])
def test_of_a_stream_some_are_searched_and_the_page_says_so(
    limit: str, value: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(f"introvae.report.neighbours.{limit}", value)
    for stream, told in (("never", "nearest of 54 training"), ("always", "nearest of 20 (of 54: copies")):
        data = load_data(tmp_path, DataOptions(stream=stream, size=8))
        assert isinstance(data, ArrayData)
        model = IntrospectiveVAE(Encodes(), Copies(data.heldout.tensor()), latent_dim=2)
        _, facts = neighbours(model, data)
        assert told in page._caption("neighbours", "", {"neighbours": facts})
        assert f"each to the nearest of {facts['searched']} of 54 training images" in facts["protocol"]


@pytest.mark.parametrize("objective", ["AGE", "WGANGP", "VAE"])
def test_captions_do_not_tell_of_an_adversary_that_is_not_there(objective: str) -> None:
    told = page._caption("curves", page.CAPTIONS["curves"], {"objective": objective})
    assert "introspective" not in told
    overview = page._caption("overview", page.CAPTIONS["overview"], {"objective": objective})
    assert ("reconstructions" in overview) == (objective != "WGANGP")
