from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from introvae.data.densities import get_density, list_densities
from introvae.errors import DataError
from introvae.metrics.histogram import (
    BINS,
    energy_distance,
    gnelbo,
    histogram,
    kl_jsd_nats,
    mode_coverage,
    soft_introvae_kl_jsd,
)

POINTS, REPEATS = 5000, 30
EIGHT = get_density("8gaussians")
Sampler = Callable[[int, torch.Generator], Tensor]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_eight_gaussians(modes: int = 8, sigma: float = 0.02 / 1.414) -> Sampler:
    assert EIGHT.modes is not None
    centres = EIGHT.modes

    def sample(n: int, generator: torch.Generator) -> Tensor:
        mode = torch.randint(modes, (n,), generator=generator)
        return centres[mode] + sigma * torch.randn(n, 2, generator=generator)

    return sample


def repeated(name: str, fake: Sampler) -> tuple[np.ndarray, np.ndarray]:
    # Mean and standard deviation of KL and JSD over the repeats of the protocol.
    density, draws = get_density(name), generator()
    scores = [
        soft_introvae_kl_jsd(density.sample(POINTS, draws), fake(POINTS, draws), density.extent) for _ in range(REPEATS)
    ]
    return np.mean(scores, axis=0), np.std(scores, axis=0, ddof=1)


def counts_with_outside(x: Tensor, extent: float) -> np.ndarray:
    counts = np.histogram2d(*x.double().numpy().T, bins=100, range=[[-extent, extent]] * 2)[0].ravel()
    return np.append(counts, len(x) - counts.sum())


@pytest.mark.parametrize(
    ("name", "kl", "jsd"),
    [("8gaussians", 0.66, 0.32), ("2spirals", 6.80, 3.14), ("checkerboard", 17.06, 8.10), ("rings", 7.82, 3.65)],
)
def test_floor_of_a_perfect_sampler(name: str, kl: float, jsd: float):
    mean, std = repeated(name, get_density(name).sample)
    # Published and measured are both means of 30 repeats: 3 standard errors of their difference, and the rounding.
    error = std * math.sqrt(2 / REPEATS)
    assert (np.abs(mean - [kl, jsd]) <= 3 * error + 0.005).all()


@pytest.mark.parametrize(
    ("modes", "kl", "jsd"),
    [(7, 27.9, 7.0), (6, 53, 13), (5, 79, 20), (4, 110, 27), (3, 134, 34), (2, 163, 41), (1, 191, 48)],
)
def test_some_of_the_eight_modes(modes: int, kl: float, jsd: float):
    mean, std = repeated("8gaussians", some_eight_gaussians(modes))
    # The published rows scatter like single draws around the means over repeats: 3 standard deviations of one draw.
    assert (np.abs(mean - [kl, jsd]) <= 3 * std).all()
    assert (std < [2.5, 0.65]).all()


def test_kl_counts_the_missing_modes():
    # Densities on bins of area 0.0016 sum to 625. Where fake is empty the KL sums real (log real + 14 ln 10); the four
    # modes that are there are twice as dense in fake: 625 / 2 ln(1/2).
    draws = generator()
    real, fake = EIGHT.sample(POINTS, draws), some_eight_gaussians(4)(POINTS, draws)
    p = histogram(real, 2.0) / (POINTS * 0.0016)
    unseen = p[(histogram(fake, 2.0) == 0) & (p > 0)]
    missing = (unseen * (unseen.log() + 14 * math.log(10))).sum().item() / 100
    kl, _ = soft_introvae_kl_jsd(real, fake, 2.0)
    assert missing == pytest.approx(110, abs=5)
    assert kl - missing == pytest.approx(625 / 2 * math.log(1 / 2) / 100, abs=0.3)


@pytest.mark.parametrize(("sigma", "kl", "jsd"), [(0.03, 0.8, 2.4), (0.05, 3.9, 13.7)])
def test_right_modes_but_too_wide(sigma: float, kl: float, jsd: float):
    mean, std = repeated("8gaussians", some_eight_gaussians(sigma=sigma / 1.414))
    assert (np.abs(mean - [kl, jsd]) <= 3 * std * math.sqrt(2 / REPEATS) + 0.05).all()


def test_every_point_around_the_origin():
    # Four bins meet at the origin and share the points.
    mean, std = repeated("8gaussians", lambda n, g: 1e-3 * torch.randn(n, 2, generator=g))
    assert mean == pytest.approx([220.2, 109.0], abs=0.15)
    assert (std < 0.1).all()


def test_every_point_exactly_at_the_origin():
    real = EIGHT.sample(POINTS, generator())
    kl, jsd = soft_introvae_kl_jsd(real, torch.zeros(POINTS, 2), 2.0)
    # All in one bin that holds no real point: density 625 there, its half in the mixture.
    p = histogram(real, 2.0).numpy() / (POINTS * 0.0016)
    tiny, entropy = 14 * math.log(10), (p[p > 0] * np.log(p[p > 0])).sum()
    assert kl == pytest.approx((entropy + 625 * tiny) / 100, rel=1e-9)
    to_real = 312.5 * (math.log(312.5) + tiny) - 312.5 * math.log(2)
    to_fake = -312.5 * math.log(2) + (entropy - 625 * math.log(2)) / 2 + 312.5 * tiny
    assert jsd == pytest.approx((to_real + to_fake) / 200, rel=1e-9)
    assert (kl, jsd) == pytest.approx((220.2, 111.15), abs=0.2)


@pytest.mark.parametrize("name", list_densities())
@pytest.mark.parametrize("stretch", [1.0, 1.3])
def test_soft_introvae_protocol_against_numpy(name: str, stretch: float):
    density = get_density(name)
    extent, draws = density.extent, generator()
    real, fake = density.sample(2000, draws), stretch * density.sample(3000, draws)
    p, q = (
        np.histogram2d(*x.double().numpy().T, bins=100, range=[[-extent, extent]] * 2, density=True)[0]
        for x in (real, fake)
    )

    def kl(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a[a > 0], b[a > 0]
        return float((a * (np.log(a) - np.log(b + 1e-14))).sum() / 100)

    mean = (p + q) / 2
    wanted = kl(p, q), (kl(mean, p) + kl(mean, q)) / 2
    assert soft_introvae_kl_jsd(real, fake, extent) == pytest.approx(wanted, rel=1e-9)


def test_soft_introvae_protocol_is_finite_with_every_point_outside():
    real, away = EIGHT.sample(1000, generator()), torch.full((1000, 2), 50.0)
    assert all(math.isfinite(value) for value in soft_introvae_kl_jsd(real, away, 2.0))
    assert all(math.isfinite(value) for value in soft_introvae_kl_jsd(real, torch.full((9, 2), math.inf), 2.0))


@pytest.mark.parametrize("extent", [2.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_histogram_against_numpy(extent: float, dtype: torch.dtype):
    x = 0.6 * extent * torch.randn(20_000, 2, generator=generator(), dtype=dtype)
    counts = histogram(x, extent)
    wanted = np.histogram2d(*x.double().numpy().T, bins=100, range=[[-extent, extent]] * 2)[0]
    assert counts.shape == (BINS, BINS)
    assert counts.dtype == torch.float64
    assert 0 < counts.sum() < len(x)
    np.testing.assert_array_equal(counts.numpy(), wanted)


def test_histogram_on_edges_and_outside_as_numpy():
    # 64 bins on [-2, 2]: every edge is a binary fraction, so that both round alike.
    edges = torch.linspace(-2, 2, 65)
    beyond = torch.tensor([-2.0001, 2.0001, -1e30, 1e30])
    x = torch.cat([torch.cartesian_prod(edges, edges), torch.cartesian_prod(beyond, edges)])
    wanted = np.histogram2d(*x.double().numpy().T, bins=64, range=[[-2, 2]] * 2)[0]
    counts = histogram(x, 2.0, bins=64)
    np.testing.assert_array_equal(counts.numpy(), wanted)
    assert counts[0, 0] == 1
    assert counts[63, 63] == 4
    assert counts.sum() == 65 * 65


def test_histogram_first_axis_is_x_and_infinite_points_are_outside():
    x = torch.tensor([[-0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [math.inf, 0.0], [0.0, -math.inf]])
    assert histogram(x, 1.0, bins=2).tolist() == [[0, 1], [0, 2]]


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 1, 2), (2,)])
def test_histogram_refuses_other_shapes(shape: tuple[int, ...]):
    with pytest.raises(DataError, match=r"shape \[N, 2\]"):
        histogram(torch.zeros(shape), 1.0)


@pytest.mark.parametrize(
    "metric",
    [
        pytest.param(lambda x, y: histogram(y, 2.0), id="histogram"),
        pytest.param(lambda x, y: soft_introvae_kl_jsd(x, y, 2.0), id="soft_introvae"),
        pytest.param(lambda x, y: soft_introvae_kl_jsd(y, x, 2.0), id="soft_introvae_real"),
        pytest.param(lambda x, y: kl_jsd_nats(x, y, 2.0), id="nats"),
        pytest.param(lambda x, y: mode_coverage(y, torch.zeros(1, 2), 1.0), id="mode_coverage"),
        pytest.param(energy_distance, id="energy_distance"),
    ],
)
def test_nan_points_raise(metric: Callable[[Tensor, Tensor], object]):
    x = torch.rand(40, 2, generator=generator())
    y = x.clone()
    y[3, 1] = math.nan
    with pytest.raises(DataError, match="NaN"):
        metric(x, y)


@pytest.mark.parametrize("name", list_densities())
def test_nats_against_scipy(name: str):
    density = get_density(name)
    extent, draws = 0.8 * density.extent, generator()
    real, fake = density.sample(4000, draws), 1.1 * density.sample(6000, draws)
    p, q = counts_with_outside(real, extent), counts_with_outside(fake, extent)
    assert q[-1] > 0
    kl, jsd = kl_jsd_nats(real, fake, extent)
    assert kl == pytest.approx(stats.entropy(p, q + 0.5), rel=1e-9)
    assert jsd == pytest.approx(jensenshannon(p, q) ** 2, rel=1e-9)


def test_nats_by_hand():
    # Real: all in one bin. Fake: 3 in that bin, 1 outside; 10,001 bins get half a point more for the KL.
    real = torch.full((10, 2), 0.5)
    fake = torch.tensor([[0.5, 0.5]] * 3 + [[9.0, 0.0]])
    kl, jsd = kl_jsd_nats(real, fake, 1.0)
    assert kl == pytest.approx(-math.log(3.5 / (4 + 0.5 * 10_001)), rel=1e-12)
    mixed = 0.875
    wanted = (-math.log(mixed) + 0.75 * math.log(0.75 / mixed) + 0.25 * math.log(0.25 / (1 - mixed))) / 2
    assert jsd == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", list_densities())
def test_jsd_in_nats_is_symmetric_and_between_0_and_ln_2(name: str):
    density, draws = get_density(name), generator()
    x, y = density.sample(500, draws), density.sample(500, draws)
    there, back = kl_jsd_nats(x, y, density.extent)[1], kl_jsd_nats(y, x, density.extent)[1]
    assert there == pytest.approx(back, rel=1e-12)
    assert 0 < there < math.log(2)
    assert kl_jsd_nats(x, x, density.extent)[1] == pytest.approx(0, abs=1e-12)
    disjoint = torch.full((77, 2), 0.99 * density.extent)
    assert kl_jsd_nats(x, disjoint, density.extent)[1] == pytest.approx(math.log(2), rel=1e-12)
    assert kl_jsd_nats(x, 100 * disjoint, density.extent)[1] == pytest.approx(math.log(2), rel=1e-12)


def test_kl_in_nats_tends_to_the_closed_form():
    # Gaussians of equal width, one moved by delta: delta^2 / (2 sigma^2); bins and sampling cost under 0.05 nats.
    draws = generator()
    x = 0.8 * torch.randn(400_000, 2, generator=draws)
    y = 0.8 * torch.randn(400_000, 2, generator=draws) + torch.tensor([0.8, 0.0])
    assert kl_jsd_nats(x, y, 4.0)[0] == pytest.approx(0.5, abs=0.05)


def test_mode_coverage_on_constructed_points():
    modes, sigma = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]), 1.0
    rows = [
        ((0.0, 0.0), 10),
        ((2.99, 0.0), 10),  # inside 3 sigma of the first mode
        ((3.01, 0.0), 6),  # just outside
        ((10.0, 2.9), 1),  # a tenth of the second mode's fair share of 10
        ((50.0, 50.0), 3),
    ]
    x = torch.tensor([point for point, count in rows for _ in range(count)])
    assert len(x) == 30
    assert mode_coverage(x, modes, sigma) == (2, pytest.approx(21 / 30, rel=1e-12))
    # One point more lifts the fair share above ten times the one point that the second mode has.
    more = torch.cat([x, torch.tensor([[50.0, 50.0]])])
    assert mode_coverage(more, modes, sigma) == (1, pytest.approx(21 / 31, rel=1e-12))


def test_mode_coverage_of_all_points_at_one_place():
    assert EIGHT.modes is not None
    assert EIGHT.sigma is not None
    assert mode_coverage(torch.zeros(100, 2), EIGHT.modes, EIGHT.sigma) == (0, 0.0)
    assert mode_coverage(EIGHT.modes[:1].repeat(100, 1), EIGHT.modes, EIGHT.sigma) == (1, 1.0)
    assert mode_coverage(EIGHT.modes, EIGHT.modes, EIGHT.sigma) == (8, 1.0)


@pytest.mark.parametrize("modes", range(1, 9))
def test_mode_coverage_counts_the_modes_of_a_sampler(modes: int):
    assert EIGHT.modes is not None
    assert EIGHT.sigma is not None
    n = 20_000
    found, share = mode_coverage(some_eight_gaussians(modes)(n, generator()), EIGHT.modes, EIGHT.sigma)
    assert found == modes
    perfect = 1 - math.exp(-4.5)
    assert share == pytest.approx(perfect, abs=4 * math.sqrt(perfect * (1 - perfect) / n))


@pytest.mark.parametrize(("n", "m"), [(2, 3), (20, 10), (60, 45)])
def test_energy_distance_against_a_double_loop(n: int, m: int):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, 2)), 0.5 + 2 * rng.normal(size=(m, 2))
    between = sum(math.dist(a, b) for a in x for b in y) / (n * m)
    within = [
        sum(math.dist(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j) / (len(z) * (len(z) - 1))
        for z in (x, y)
    ]
    found = energy_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(2 * between - sum(within), abs=1e-8)


def test_energy_distance_against_scipy_on_a_line():
    # scipy gives the root of the V-statistic, whose inner means include the zeros i = j.
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=50), rng.exponential(size=40)
    within = [np.abs(z[:, None] - z).mean() / (len(z) - 1) for z in (x, y)]
    wanted = stats.energy_distance(x, y) ** 2 - sum(within)
    x, y = (torch.from_numpy(np.stack([z, np.full_like(z, 3.0)], axis=1)) for z in (x, y))
    assert energy_distance(x, y) == pytest.approx(wanted, abs=1e-7)


def test_energy_distance_by_hand():
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    assert energy_distance(x, x) == pytest.approx(2 * 1 - 2 - 2, abs=1e-12)
    # Each set in one place, the two places 5 apart.
    assert energy_distance(torch.zeros(4, 2), torch.tensor([[3.0, 4.0]] * 3)) == pytest.approx(10, abs=1e-12)


@pytest.mark.parametrize("shift", [0.0, 0.5, 3.0])
def test_energy_distance_is_unbiased_for_two_gaussians(shift: float):
    # x - y has sigma sqrt(2) per axis: a Rice distribution; x - x' a Rayleigh distribution with mean sqrt(pi).
    draws = generator()
    values = np.array(
        [
            energy_distance(
                torch.randn(200, 2, generator=draws), torch.randn(200, 2, generator=draws) + torch.tensor([shift, 0.0])
            )
            for _ in range(100)
        ]
    )
    wanted = 2 * stats.rice.mean(shift / math.sqrt(2), scale=math.sqrt(2)) - 2 * math.sqrt(math.pi)
    assert values.mean() == pytest.approx(wanted, abs=4 * values.std(ddof=1) / 10)
    assert (values < 0).any() == (shift == 0)


@pytest.mark.parametrize("batch", [65_536, 7, 100])
def test_gnelbo_of_the_squared_norm(batch: int):
    extent, grid, n = 2.0, 16, 50
    data = torch.rand(n, 2, generator=generator(), dtype=torch.float64) * 2 - 1
    # The sum of squares of `grid` equally spaced numbers from -e to e is e^2 grid (grid + 1) / (3 (grid - 1)).
    grid_sum = 2 * grid * extent**2 * grid * (grid + 1) / (3 * (grid - 1))
    values = (data**2).sum(dim=1)
    wanted = (values.mean() / (grid_sum + values.sum())).item()
    found = gnelbo(lambda x: x.square().sum(dim=1), data, extent, grid=grid, batch=batch)
    assert found == pytest.approx(wanted, rel=1e-6)


def test_gnelbo_of_a_constant_on_the_published_grid():
    found = gnelbo(lambda x: torch.full((len(x),), 7.0), torch.zeros(512, 2), 2.0)
    assert found == pytest.approx(1 / (1024**2 + 512), rel=1e-12)


def test_gnelbo_is_smaller_for_a_better_fit():
    data = EIGHT.sample(500, generator())
    exact = EIGHT.log_prob
    assert exact is not None
    good = gnelbo(lambda x: 10 - exact(x), data, 2.0, grid=64)
    worse = gnelbo(lambda x: 10 - exact(x + 0.1), data, 2.0, grid=64)
    assert 0 < good < worse
