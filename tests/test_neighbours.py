"""Nearest neighbours against all distances at once; ties, cosine, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from introvae import ConfigError, IntrospectiveVAE
from introvae.data import from_array
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


def test_bad_input_is_named() -> None:
    with pytest.raises(ConfigError, match="a set of 3 has no 4 nearest"):
        nearest(QUERY, [SET[:3]], 4)
    with pytest.raises(ConfigError, match="distance"):
        nearest(QUERY, [SET], 1, distance="manhattan")
    with pytest.raises(ConfigError, match="k is 0"):
        nearest(QUERY, [SET], 0)


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
        assert facts[kind]["heldout"] > 1e-4
    sheet = np.asarray(picture.convert("L"))
    assert sheet.shape[1] > 8 * 48
    other = IntrospectiveVAE(Encodes(), Copies(data.heldout.tensor()), latent_dim=2)
    _, facts = neighbours(other, data)
    assert facts["pixels"]["samples"] == pytest.approx(facts["pixels"]["heldout"], rel=0.1)


def test_few_training_images_are_no_fault() -> None:
    data = from_array(np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8), dtype=np.uint8), name="three")
    _, facts = neighbours(IntrospectiveVAE(Encodes(), Copies(data.train.tensor()), latent_dim=2), data)
    assert facts["searched"] == len(data.train) < SHOWN


def test_the_page_says_where_not_all_training_images_were_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    data = from_array(np.random.default_rng(0).integers(0, 256, (60, 1, 8, 8), dtype=np.uint8), name="some")
    model = IntrospectiveVAE(Encodes(), Copies(data.train.tensor()), latent_dim=2)
    _, facts = neighbours(model, data)
    assert "nearest of 54 training images" in page._caption("neighbours", "", {"neighbours": facts})
    monkeypatch.setattr("introvae.report.neighbours.MOST", 20)
    _, facts = neighbours(model, data)
    assert "nearest of 20 (of 54: copies" in page._caption("neighbours", "", {"neighbours": facts})


@pytest.mark.parametrize("objective", ["AGE", "WGANGP", "VAE"])
def test_captions_do_not_tell_of_an_adversary_that_is_not_there(objective: str) -> None:
    told = page._caption("curves", page.CAPTIONS["curves"], {"objective": objective})
    assert "introspective" not in told
    overview = page._caption("overview", page.CAPTIONS["overview"], {"objective": objective})
    assert ("reconstructions" in overview) == (objective != "WGANGP")
