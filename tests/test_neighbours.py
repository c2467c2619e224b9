"""Nearest neighbours against all distances at once; ties, cosine, bad input."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from introvae import ConfigError
from introvae.metrics.neighbours import nearest

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
