from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from introvae.data.densities import get_density, list_densities
from introvae.errors import ConfigError, IntrovaeError

ALL = list_densities()
EXACT = [name for name in ALL if get_density(name).log_prob is not None]
ENTROPY_NATS = {
    "8gaussians": math.log(8) + math.log(2 * math.pi * math.e * (0.02 / 1.414) ** 2),  # modes do not overlap
    "checkerboard": math.log(32),  # eight squares of side 2
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def log_prob(name: str, x: Tensor) -> Tensor:
    exact = get_density(name).log_prob
    assert exact is not None
    return torch.cat([exact(part) for part in x.split(100_000)])


def cell_centres(extent: float, size: int) -> Tensor:
    axis = (torch.arange(size, dtype=torch.float64) + 0.5) * (2 * extent / size) - extent
    return torch.cartesian_prod(axis, axis)


def cell_probabilities(name: str, cells: int, fine: int = 1024) -> np.ndarray:
    # exp(log_prob) on a fine grid, summed over each of the cells x cells squares.
    extent, block = get_density(name).extent, fine // cells
    mass = log_prob(name, cell_centres(extent, fine)).exp() * (2 * extent / fine) ** 2
    return mass.view(cells, block, cells, block).sum(dim=(1, 3)).numpy()


def spiral_cell_probabilities(edges: np.ndarray, angles: int = 4000) -> np.ndarray:
    # Given the angle, x and y are independent sums of a uniform and a normal variable; then the mean over angles.
    angle = np.sqrt((np.arange(angles) + 0.5) / angles) * 3 * math.pi
    total = np.zeros((len(edges) - 1, len(edges) - 1))
    for sign in (1, -1):
        steps = []
        for arm in (-np.cos(angle) * angle, np.sin(angle) * angle):
            starts, width = (arm if sign == 1 else -arm - 0.5) / 3, 0.5 / 3
            steps.append(np.diff(uniform_plus_normal_cdf(edges - starts[:, None], width, 0.1), axis=1))
        total += steps[0].T @ steps[1] / (2 * angles)
    return total


def uniform_plus_normal_cdf(x: np.ndarray, width: float, sigma: float) -> np.ndarray:
    def integral(t: np.ndarray) -> np.ndarray:
        return t * stats.norm.cdf(t / sigma) + sigma * stats.norm.pdf(t / sigma)

    return (integral(x) - integral(x - width)) / width


def chi_square_p_value(points: Tensor, probabilities: np.ndarray, extent: float) -> float:
    cells = len(probabilities)
    counts = np.histogram2d(*points.double().numpy().T, bins=cells, range=[[-extent, extent]] * 2)[0]
    expected = probabilities * len(points)
    large = expected >= 5
    observed = np.append(counts[large], len(points) - counts[large].sum())
    wanted = np.append(expected[large], max(len(points) - expected[large].sum(), 1e-9))
    if wanted[-1] < 5:
        observed, wanted = np.append(observed[:-2], observed[-2:].sum()), np.append(wanted[:-2], wanted[-2:].sum())
    assert len(wanted) > 10
    return float(stats.chi2.sf(((observed - wanted) ** 2 / wanted).sum(), df=len(wanted) - 1))


def test_names():
    assert ALL == ["8gaussians", "2spirals", "checkerboard", "rings"]
    assert EXACT == ["8gaussians", "checkerboard", "rings"]
    assert [get_density(name).name for name in ALL] == ALL


@pytest.mark.parametrize("name", ["", "8Gaussians", "moons", "density:rings"])
def test_unknown_name_lists_the_choices(name: str):
    with pytest.raises(ConfigError, match=f"{name!r}.*8gaussians, 2spirals, checkerboard, rings") as caught:
        get_density(name)
    assert isinstance(caught.value, IntrovaeError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("name", "extent"), [("8gaussians", 2.0), ("2spirals", 4.0), ("checkerboard", 4.0), ("rings", 4.0)]
)
def test_extent_is_twice_the_authors_scale_and_holds_the_samples(name: str, extent: float):
    density = get_density(name)
    assert density.extent == extent
    x = density.sample(50_000, generator())
    assert x.abs().amax() <= extent
    assert x.abs().amax() > extent / 2


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("n", [0, 1, 1000])
def test_shape_and_type(name: str, n: int):
    x = get_density(name).sample(n, generator())
    assert x.shape == (n, 2)
    assert x.dtype == torch.float32
    assert x.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_only_the_generator_decides_the_draw(name: str):
    sample = get_density(name).sample
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sample(100, generator(7))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    same = generator(7)
    assert torch.equal(sample(100, same), first)
    assert not torch.isin(sample(100, same)[:, 0], first[:, 0]).any()
    assert not torch.isin(sample(100, generator(8))[:, 0], first[:, 0]).any()


@pytest.mark.parametrize("name", ALL)
def test_without_a_generator_the_global_one_draws(name: str):
    sample = get_density(name).sample
    torch.manual_seed(3)
    first = sample(10, None)
    assert not torch.equal(sample(10, None), first)
    torch.manual_seed(3)
    assert torch.equal(sample(10, None), first)


@pytest.mark.parametrize(
    ("name", "size", "tolerance"), [("8gaussians", 1000, 1e-7), ("checkerboard", 400, 1e-7), ("rings", 400, 1e-10)]
)
def test_log_prob_integrates_to_one(name: str, size: int, tolerance: float):
    extent = get_density(name).extent
    mass = log_prob(name, cell_centres(extent, size)).exp().sum() * (2 * extent / size) ** 2
    assert mass.item() == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_prob_has_the_type_of_its_points_and_no_nan(name: str, dtype: torch.dtype):
    x = torch.tensor([[0, 0], [1.4144, 0], [0.75, 0], [1, 1], [-1, 1], [4, 4], [30, -40], [1e4, 1e4]], dtype=dtype)
    values = log_prob(name, x)
    assert values.shape == (8,)
    assert values.dtype == dtype
    assert not values.isnan().any()
    assert (values[-2:] < -1000).all()


def test_eight_gaussians_against_a_mixture_of_scipy():
    density = get_density("8gaussians")
    sigma = 0.02 / 1.414
    centres = [2 / 1.414 * np.array([math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)]) for k in range(8)]
    assert density.sigma == pytest.approx(sigma, rel=1e-12)
    assert density.modes is not None
    np.testing.assert_allclose(density.modes.numpy(), centres, atol=3e-7)
    x = density.sample(500, generator()).double()
    wanted = sum(stats.multivariate_normal(centre, sigma**2).pdf(x.numpy()) for centre in centres) / 8
    # Centres in float32 are off by up to 2e-7 of 0.014: at 4 sigma that is 6e-5 of log p.
    np.testing.assert_allclose(log_prob("8gaussians", x).numpy(), np.log(wanted), atol=1e-4)


def test_rings_against_an_integral_over_the_angle():
    x = torch.tensor([[0.0, 0.0], [0.3, -0.2], [0.75, 0.0], [1.0, 1.2], [-2.2, 0.1], [0.0, 3.3]], dtype=torch.float64)
    angles = np.arange(4096) * (2 * math.pi / 4096)
    wanted = np.zeros(len(x))
    for radius in (0.75, 1.5, 2.25, 3.0):
        circle = radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        squares = ((x.numpy()[:, None] - circle) ** 2).sum(axis=2)
        wanted += (np.exp(-squares / (2 * 0.08**2)) / (2 * math.pi * 0.08**2)).mean(axis=1) / 4
    np.testing.assert_allclose(log_prob("rings", x).numpy(), np.log(wanted), atol=1e-9)


def test_rings_only_depend_on_the_radius():
    angles = torch.linspace(0, 2 * math.pi, 17, dtype=torch.float64)
    for radius in (0.4, 1.5, 3.2):
        values = log_prob("rings", radius * torch.stack([angles.cos(), angles.sin()], dim=1))
        np.testing.assert_allclose(values.numpy(), values[0].item(), atol=1e-9)


def test_checkerboard_is_flat_on_eight_squares_and_nothing_elsewhere():
    corners = {(-4, -4), (-4, 0), (-2, -2), (-2, 2), (0, -4), (0, 0), (2, -2), (2, 2)}
    for left in range(-6, 6, 2):
        for low in range(-6, 6, 2):
            x = torch.tensor([[left + 0.01, low + 0.01], [left + 1, low + 1], [left + 1.99, low + 1.99]])
            wanted = -math.log(32) if (left, low) in corners else -math.inf
            np.testing.assert_allclose(log_prob("checkerboard", x).numpy(), wanted, atol=1e-6)


def test_checkerboard_log_prob_is_exact_in_float64():
    x = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    assert log_prob("checkerboard", x).item() == pytest.approx(-math.log(32), abs=1e-14)


@pytest.mark.parametrize("name", EXACT)
def test_samples_fill_the_cells_as_log_prob_says(name: str):
    density = get_density(name)
    cells = 8 if name == "checkerboard" else 32
    probabilities = cell_probabilities(name, cells)
    assert probabilities.sum() == pytest.approx(1, abs=1e-6)
    assert chi_square_p_value(density.sample(100_000, generator()), probabilities, density.extent) > 1e-3


def test_spirals_fill_the_cells_as_their_exact_density_says():
    probabilities = spiral_cell_probabilities(np.linspace(-4, 4, 33))
    assert probabilities.sum() == pytest.approx(1, abs=1e-4)
    assert chi_square_p_value(get_density("2spirals").sample(100_000, generator()), probabilities, 4.0) > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_the_chi_square_test_sees_a_sampler_that_is_five_percent_too_wide(name: str):
    density = get_density(name)
    cells = 8 if name == "checkerboard" else 32
    exact = name != "2spirals"
    probabilities = cell_probabilities(name, cells) if exact else spiral_cell_probabilities(np.linspace(-4, 4, 33))
    assert chi_square_p_value(1.05 * density.sample(100_000, generator()), probabilities, density.extent) < 1e-6


@pytest.mark.parametrize("name", EXACT)
def test_mean_log_prob_of_samples_is_minus_the_entropy(name: str):
    density = get_density(name)
    values = log_prob(name, density.sample(100_000, generator()).double())
    cells = log_prob(name, cell_centres(density.extent, 1000))
    entropy = -torch.special.xlogy(cells.exp(), cells.exp()).sum().item() * (2 * density.extent / 1000) ** 2
    if name in ENTROPY_NATS:
        assert entropy == pytest.approx(ENTROPY_NATS[name], abs=1e-6)
    error = values.std().item() / math.sqrt(len(values))
    assert values.mean().item() == pytest.approx(-entropy, abs=4 * error + 1e-6)


def test_modes_are_equally_frequent_and_their_points_normal():
    density = get_density("8gaussians")
    assert density.modes is not None
    assert density.sigma is not None
    x = density.sample(40_000, generator())
    distance, nearest = torch.cdist(x.double(), density.modes.double()).min(dim=1)
    assert stats.chisquare(torch.bincount(nearest, minlength=8).numpy()).pvalue > 1e-3
    assert stats.kstest((distance / density.sigma).numpy(), stats.rayleigh.cdf).pvalue > 1e-3
    assert all(get_density(name).modes is None and get_density(name).sigma is None for name in ALL[1:])
