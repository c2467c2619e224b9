"""AS-IntroVAE's distance against integration, and its two kernels where the latent dimensions are many."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from scipy.integrate import quad
from torch import Tensor

from introvae import DiagonalGaussian
from introvae.objectives import as_distance

spec = importlib.util.spec_from_file_location(
    "kernel_distance", Path(__file__).parents[1] / "examples" / "kernel_distance.py"
)
assert spec is not None
assert spec.loader is not None
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)
SHARP, TYPICAL, posteriors = example.SHARP, example.TYPICAL, example.posteriors


def density(q: DiagonalGaussian, i: int, z: float) -> float:
    variance = math.exp(q.logvar[i, 0])
    return math.exp(-0.5 * (z - q.mean[i, 0].item()) ** 2 / variance) / math.sqrt(2 * math.pi * variance)


def integral(f, *batches: DiagonalGaussian) -> float:
    """Adaptive, told where the peaks are."""
    means = sorted(mean.item() for batch in batches for mean in batch.mean[:, 0])
    return quad(f, means[0] - 12, means[-1] + 12, points=means, epsabs=1e-14, epsrel=1e-11, limit=2000)[0]


def test_variances_below_a_ten_thousandth_count_as_that() -> None:
    mean = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = [
        as_distance(*(DiagonalGaussian(m, torch.full_like(m, logvar)) for m in mean), kernel="marginal").item()
        for logvar in (-20.0, -12.0, math.log(1e-4), -9.0)
    ]
    assert found[0] == found[1] == pytest.approx(found[2], rel=1e-12)
    assert found[3] != pytest.approx(found[2], rel=1e-3)


@pytest.mark.parametrize("shift", [0.0, 0.7, 6.0])
@pytest.mark.parametrize("logvars", [(-1.0, 0.0), TYPICAL, SHARP])
def test_distance_in_one_dimension_is_an_integral(logvars: tuple[float, float], shift: float) -> None:
    a, b = posteriors(4, 1, 0, logvars), posteriors(5, 1, 1, logvars, shift)

    def aggregate(q: DiagonalGaussian, z: float) -> float:
        return sum(density(q, i, z) for i in range(len(q.mean))) / len(q.mean)

    def pairs(p: DiagonalGaussian, q: DiagonalGaussian) -> float:
        each = [
            integral(lambda z: density(p, i, z) * density(q, j, z), p[i : i + 1], q[j : j + 1])  # noqa: B023
            for i in range(len(p.mean))
            for j in range(len(q.mean))
            if p is not q or i != j
        ]
        return sum(each) / len(each)

    biased = integral(lambda z: (aggregate(a, z) - aggregate(b, z)) ** 2, a, b)
    unbiased = pairs(a, a) + pairs(b, b) - 2 * pairs(a, b)
    assert example.integrated(a, b) == pytest.approx((biased, unbiased), rel=1e-9)
    for kernel in ("marginal", "joint"):
        assert as_distance(a, b, kernel=kernel, unbiased=False).item() == pytest.approx(biased, rel=1e-9)
        assert as_distance(a, b, kernel=kernel).item() == pytest.approx(unbiased, rel=1e-9)


def aggregate_on_a_grid(q: DiagonalGaussian, axis: Tensor) -> Tensor:
    x, y = ((-0.5 * (axis - q.mean[:, d, None]) ** 2 / q.variance[:, d, None]).exp() for d in (0, 1))
    return torch.einsum("nx,ny,n->xy", x, y, 1 / (2 * math.pi * q.variance.prod(dim=1).sqrt())) / len(q.mean)


def test_in_the_plane_joint_compares_the_aggregates_and_marginal_their_marginals() -> None:
    a, b = posteriors(6, 2, 0), posteriors(7, 2, 1, shift=0.5)
    axis = torch.linspace(-9, 9, 601, dtype=torch.float64)
    difference = aggregate_on_a_grid(a, axis) - aggregate_on_a_grid(b, axis)
    joint = torch.trapezoid(torch.trapezoid(difference**2, axis), axis)
    assert as_distance(a, b, kernel="joint", unbiased=False).item() == pytest.approx(joint.item(), rel=1e-10)
    marginals = [torch.trapezoid(torch.trapezoid(difference, axis, dim=d) ** 2, axis) for d in (0, 1)]
    marginal = torch.stack(marginals).mean().item()
    assert as_distance(a, b, kernel="marginal", unbiased=False).item() == pytest.approx(marginal, rel=1e-10)


def test_only_the_joint_kernel_sees_how_dimensions_hang_together() -> None:
    logvar = torch.full((2, 2), -2.0, dtype=torch.float64)
    same_sign = DiagonalGaussian(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]).double(), logvar)
    other_sign = DiagonalGaussian(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).double(), logvar)
    assert as_distance(same_sign, other_sign, unbiased=False).item() == pytest.approx(0, abs=1e-15)
    # The four centres are the corners of a square of side 2: k = peak * e per side that two of them differ by.
    variance = 2 * math.exp(-2.0)
    peak, e = 1 / (2 * math.pi * variance), math.exp(-2 / variance)
    joint = as_distance(same_sign, other_sign, kernel="joint", unbiased=False).item()
    assert joint == pytest.approx(peak * (1 + e**2 - 2 * e), rel=1e-12)
    assert joint > 0.5


@pytest.mark.parametrize("dim", [1, 2, 3, 8])
@pytest.mark.parametrize("kernel", ["marginal", "joint"])
def test_the_example_s_own_kernels_equal_the_package_s(kernel: str, dim: int) -> None:
    a, b = posteriors(12, dim, 0), posteriors(9, dim, 1, shift=0.5)
    for unbiased in (False, True):
        own = example.distance(a, b, kernel, unbiased).item()
        assert as_distance(a, b, kernel=kernel, unbiased=unbiased).item() == pytest.approx(own, rel=1e-11)


@pytest.mark.parametrize(("kernel", "dim"), [("joint", 2), ("joint", 4), ("marginal", 2), ("marginal", 64)])
def test_distance_is_on_average_that_of_the_aggregates(kernel: str, dim: int) -> None:
    for shift in (0.0, 0.5):
        batches = [(posteriors(32, dim, 2 * i), posteriors(32, dim, 2 * i + 1, shift=shift)) for i in range(200)]
        draws = torch.stack([as_distance(a, b, kernel=kernel) for a, b in batches])
        error = draws.std().item() / math.sqrt(len(draws))
        assert draws.mean().item() == pytest.approx(example.expected(dim, kernel, shift), abs=4 * error)
        if shift:
            assert draws.mean() > 8 * error


@pytest.mark.parametrize("dim", [64, 128, 512])
def test_joint_kernel_leaves_nothing_in_float32(dim: int) -> None:
    a, b = posteriors(64, dim, 0, dtype=torch.float32), posteriors(64, dim, 1, shift=0.5, dtype=torch.float32)
    b.mean.requires_grad_()
    assert not example.overlaps(a, b, "joint").any()
    for unbiased in (True, False):
        distance = example.distance(a, b, "joint", unbiased)
        (gradient,) = torch.autograd.grad(distance, b.mean)
        assert not gradient.any()
    assert example.distance(a, b, "joint").item() == 0
    # A posterior with itself: all that is left of the biased form, until it is lost too.
    itself = example.overlaps(a, a, "joint").diagonal()
    assert (itself > 0).all() == (dim < 512)
    sharp = posteriors(64, dim, 0, SHARP, dtype=torch.float32)
    assert example.overlaps(sharp, sharp, "joint").diagonal().isinf().all()


def test_joint_kernel_is_no_better_off_in_float64() -> None:
    a, b = posteriors(64, 128, 0), posteriors(64, 128, 1)
    pairs = example.overlaps(a, b, "joint")
    assert pairs.median().item() < 1e-150
    assert pairs.max() < 1e-6 * example.expected(128, "joint")  # the expectation rests on pairs no batch contains
    assert not example.overlaps(*(posteriors(64, 512, i) for i in (0, 1)), "joint").any()


@pytest.mark.parametrize("dim", [2, 8, 64, 512])
def test_marginal_kernel_keeps_its_size_in_float32(dim: int) -> None:
    found = example.measured(dim, "marginal", torch.float32, repeats=12)
    assert found["two posteriors"] == pytest.approx(1 / math.sqrt(4 * math.pi), rel=0.1)
    assert found["one with itself"] == pytest.approx(math.exp(1) / math.sqrt(4 * math.pi), rel=0.1)
    assert 0.028 < found["D"] < 0.041
    assert found["signal/noise"] > {2: 1, 8: 2, 64: 5, 512: 12}[dim]
    # The mean over dimensions gives each of them a Z-th of the pull, so the whole falls as 1 / sqrt(Z); KL's grows.
    assert 0.03 < found["gradient"] * math.sqrt(dim) < 0.04
    assert 0.11 < found["KL's gradient"] / math.sqrt(dim) < 0.15


def test_float32_does_not_change_what_either_kernel_says_up_to_8_dimensions() -> None:
    for dim in (2, 4, 8):
        for kernel in ("marginal", "joint"):
            wide, narrow = (
                as_distance(posteriors(64, dim, 0, dtype=t), posteriors(64, dim, 1, shift=0.5, dtype=t), kernel=kernel)
                for t in (torch.float64, torch.float32)
            )
            assert narrow.item() == pytest.approx(wide.item(), rel=1e-4)


def test_the_figure_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(example, "DIMS", (2, 64))
    monkeypatch.setattr(example, "BATCH", 8)
    monkeypatch.setattr(sys, "argv", ["kernel_distance.py", "--repeats", "3", "--out", str(tmp_path / "k.png")])
    example.main()
    with Image.open(tmp_path / "k.png") as picture:
        assert picture.width > 1000
    said = capsys.readouterr().out
    assert float(said.splitlines()[0].split()[-1]) < 1e-9
    assert "joint  64" in said
