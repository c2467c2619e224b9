"""The mutual information gap."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import mutual_info_score

from introvae.errors import ConfigError, DataError
from introvae.metrics.disentanglement import mutual_information_gap


def factors(n: int = 4000) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randint(0, k, (n,), generator=generator) for name, k in (("shape", 3), ("turn", 8))}


def test_a_dimension_for_each_factor_has_gap_one() -> None:
    found = factors()
    latents = torch.stack([torch.zeros(4000), -5.0 * found["turn"], 0.1 * found["shape"] + 7], dim=1)
    gap = mutual_information_gap(latents, found)
    assert gap.gaps == pytest.approx({"shape": 1, "turn": 1}, abs=0.01)
    assert gap.value == pytest.approx(1, abs=0.01)
    assert gap.information["shape"].argmax() == 2
    assert gap.information["turn"].argmax() == 1


def test_a_factor_spread_over_two_equal_dimensions_has_none() -> None:
    found = factors()
    latents = torch.stack([found["turn"].float(), 3 - found["turn"].float(), torch.randn(4000)], dim=1)
    assert mutual_information_gap(latents, {"turn": found["turn"]}).value == pytest.approx(0, abs=1e-12)


def test_noise_tells_next_to_nothing() -> None:
    latents = torch.randn(4000, 5, generator=torch.Generator().manual_seed(1))
    gap = mutual_information_gap(latents, factors())
    assert abs(gap.value) < 0.01
    # The bias of few samples, of the order of (bins - 1)(values - 1) / 2N nats.
    assert float(gap.information["turn"].max()) * math.log(8) < 3 * 19 * 7 / 8000


def test_information_is_scikit_learn_s() -> None:
    latents = torch.randn(500, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    turn = (latents[:, 0] * 2 + latents[:, 1]).round().long()
    gap = mutual_information_gap(latents, {"turn": turn}, bins=7)
    entropy = mutual_info_score(turn, turn)
    for column, share in zip(latents.T, gap.information["turn"], strict=True):
        edges = torch.linspace(float(column.min()), float(column.max()), 8, dtype=torch.float64)
        binned = torch.bucketize(column.contiguous(), edges[1:-1], right=True)
        assert float(share) == pytest.approx(mutual_info_score(binned, turn) / entropy, rel=1e-9)


def test_what_has_no_gap() -> None:
    latents, turn = torch.randn(10, 2), torch.arange(10) % 3
    for bad, given, message in (
        (latents[:, :1], {"turn": turn}, "have no gap: give two samples and dimensions"),
        (latents[:1], {"turn": turn[:1]}, "have no gap"),
        (latents / 0, {"turn": turn}, "NaN or infinite"),
        (latents, {}, "there are no factors"),
        (latents, {"turn": turn[:5]}, r"factor 'turn' has shape \(5,\): give a value for each of 10"),
        (latents, {"turn": turn * 0}, "factor 'turn' has a single value: leave it out"),
    ):
        with pytest.raises(DataError, match=message):
            mutual_information_gap(bad, given)
    for bins in (0, 2.5):
        with pytest.raises(ConfigError, match="bins is"):
            mutual_information_gap(latents, {"turn": turn}, bins=bins)  # pyright: ignore[reportArgumentType]
