from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from introvae import VAE, ASIntroVAE, DiagonalGaussian, IntroVAE, SoftIntroVAE, Warmup
from introvae.errors import ConfigError, DataError
from introvae.objectives import as_distance, get_objective, list_objectives
from introvae.objectives.as_introvae import VARIANCE_FLOOR


def posteriors(n: int, z: int, seed: int, logvar: float | None = None) -> DiagonalGaussian:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(n, z, generator=generator, dtype=torch.float64)
    spread = 0.5 * torch.randn(n, z, generator=generator, dtype=torch.float64)
    return DiagonalGaussian(mean, spread if logvar is None else torch.full_like(mean, logvar))


@pytest.mark.parametrize("kernel", ["marginal", "joint"])
def test_kernel_is_the_integral_of_the_product_of_two_posteriors(kernel: str) -> None:
    a, b = posteriors(1, 1, 0), posteriors(1, 1, 1)
    z = torch.linspace(-30, 30, 200_001, dtype=torch.float64)[:, None]
    overlap = torch.trapezoid((a.log_prob(z) + b.log_prob(z)).exp(), z[:, 0])
    # Biased, one posterior each: D = k(a, a) + k(b, b) - 2 k(a, b), and the own overlaps are known.
    own = sum((1 / (2 * q.variance * math.sqrt(math.pi / q.variance.item()))).item() for q in (a, b))
    distance = as_distance(a, b, kernel=kernel, unbiased=False)
    assert distance.item() == pytest.approx(own - 2 * overlap.item(), rel=1e-9)


def test_joint_kernel_is_the_product_and_marginal_the_mean_of_one_dimensional_ones() -> None:
    a, b = posteriors(1, 3, 0), posteriors(1, 3, 1)
    single = [
        [
            math.exp(-0.5 * (p.mean[0, d] - q.mean[0, d]) ** 2 / (v := p.variance[0, d] + q.variance[0, d]))
            / math.sqrt(2 * math.pi * v)
            for d in range(3)
        ]
        for p, q in ((a, a), (b, b), (a, b))
    ]
    for kernel, combine in (("marginal", lambda ks: sum(ks) / 3), ("joint", math.prod)):
        expected = combine(single[0]) + combine(single[1]) - 2 * combine(single[2])
        assert as_distance(a, b, kernel=kernel, unbiased=False).item() == pytest.approx(expected, rel=1e-12)


def test_distance_is_a_squared_mmd() -> None:
    a, b = posteriors(7, 2, 0), posteriors(9, 2, 1)
    assert as_distance(a, b).item() == pytest.approx(as_distance(b, a).item(), rel=1e-12)
    assert as_distance(a, b, unbiased=False) > 0
    assert as_distance(a, a, unbiased=False).item() == pytest.approx(0, abs=1e-15)
    far = DiagonalGaussian(b.mean + 100, b.logvar)
    assert as_distance(a, far) > as_distance(a, b)


def test_unbiased_distance_of_one_distribution_has_mean_zero() -> None:
    draws = torch.stack([as_distance(posteriors(8, 2, 2 * i), posteriors(8, 2, 2 * i + 1)) for i in range(400)])
    assert abs(draws.mean()) < 4 * draws.std() / math.sqrt(len(draws))
    biased = torch.stack(
        [as_distance(posteriors(8, 2, 2 * i), posteriors(8, 2, 2 * i + 1), unbiased=False) for i in range(400)]
    )
    assert biased.mean() > 10 * biased.std() / math.sqrt(len(biased))


def test_pairs_of_a_posterior_with_itself_leave_no_rounding_behind() -> None:
    """They can be 1e40 times the others, so they must be left out before the sum, not taken from it."""
    generator = torch.Generator().manual_seed(0)
    logvar = [-7 + 2 * torch.rand(64, 8, generator=generator, dtype=torch.float64) for _ in range(2)]
    mean = [torch.randn(64, 8, generator=generator, dtype=torch.float64) for _ in range(2)]
    exact = [DiagonalGaussian(m, v) for m, v in zip(mean, logvar, strict=True)]
    rounded = [DiagonalGaussian(q.mean.float(), q.logvar.float()) for q in exact]
    pairs = torch.cat([q.mean for q in exact])
    apart = torch.cdist(pairs, pairs) + 1e9 * torch.eye(128)
    assert apart.min() > 0.5  # so that D is next to nothing
    assert 0 < abs(as_distance(*exact, kernel="joint").item()) < 1e-6
    found, expected = (as_distance(*pair, kernel="joint").item() for pair in (rounded, exact))
    assert found == pytest.approx(expected, rel=1e-3)


def test_shrinking_variances_do_not_raise_the_unbiased_distance_without_bound() -> None:
    kept, left_out = (
        as_distance(posteriors(64, 2, 0, logvar=-20.0), posteriors(64, 2, 1, logvar=-20.0), unbiased=unbiased).item()
        for unbiased in (False, True)
    )
    # Same distribution: every pair i = j adds the kernel's peak, here that of the floored variance.
    assert kept > 0.5
    assert abs(left_out) < 0.2
    at_floor = posteriors(64, 2, 0, logvar=math.log(VARIANCE_FLOOR)), posteriors(64, 2, 1, logvar=-60.0)
    assert as_distance(*at_floor, unbiased=False).item() == pytest.approx(kept, rel=1e-9)


def test_joint_kernel_is_refused_in_many_dimensions() -> None:
    with pytest.raises(ConfigError, match="at most 8"):
        as_distance(posteriors(4, 9, 0), posteriors(4, 9, 1), kernel="joint")
    with pytest.raises(DataError, match="batch of at least 2"):
        as_distance(posteriors(1, 2, 0), posteriors(4, 2, 1))


def test_annealing_reaches_one_after_a_fifth_of_the_adversarial_steps() -> None:
    linear = ASIntroVAE()
    assert [linear.values(p)["c"] for p in (0.0, 0.1, 0.2, 1.0)] == [0.0, 0.5, 1.0, 1.0]
    less = ASIntroVAE(annealed_to=0.8)
    assert [less.values(p)["c"] for p in (0.0, 0.1, 0.16, 1.0)] == [0.0, 0.5, 0.8, 0.8]
    assert less.at(1.0) is less
    assert ASIntroVAE(annealing="tanh", annealed_to=0.8).values(0.1)["c"] == pytest.approx(0.8 * math.tanh(0.5))
    tanh = ASIntroVAE(annealing="tanh")
    assert tanh.values(0.1)["c"] == pytest.approx(math.tanh(0.5))
    assert tanh.values(1.0)["c"] < 1
    assert tanh.at(1.0) is tanh


@pytest.mark.parametrize(
    ("objective_class", "setting", "value", "message"),
    [
        (VAE, "beta_rec", 0.0, "beta_rec is 0"),
        (VAE, "beta_kl", -1.0, "beta_kl is -1"),
        (VAE, "beta_kl", math.nan, "beta_kl is nan"),
        (IntroVAE, "margin", -1.0, "margin is -1"),
        (IntroVAE, "variant", "offical", "choose one of paper, official_code"),
        (SoftIntroVAE, "beta_neg", -0.1, "beta_neg is -0.1"),
        (SoftIntroVAE, "scale", 0.0, "scale is 0"),
        (SoftIntroVAE, "gamma_r", math.inf, "gamma_r is inf"),
        (ASIntroVAE, "annealed_to", 0.0, "annealed_to is 0"),
        (ASIntroVAE, "annealed_to", 1.5, "annealed_to is 1.5: it must be at most 1"),
        (SoftIntroVAE, "decoder_kl", 0.0, "decoder_kl is 0"),
        (ASIntroVAE, "decoder_kl", -1.0, "decoder_kl is -1"),
        (SoftIntroVAE, "consistency", -0.1, "consistency is -0.1"),
        (ASIntroVAE, "kernel", "gauss", "choose one of marginal, joint"),
        (ASIntroVAE, "contrast", "real", "reconstruction-sample, real-sample"),
        (ASIntroVAE, "annealing", "cosine", "linear, tanh"),
        (ASIntroVAE, "annealing_rate", 0.0, "annealing_rate is 0"),
        (Warmup, "steps", -1, r"warmup\.steps is -1"),
        (Warmup, "beta_rec", 0.0, r"warmup\.beta_rec is 0"),
    ],
)
def test_settings_out_of_range_are_refused(objective_class, setting, value, message) -> None:
    with pytest.raises(ConfigError, match=message):
        objective_class(**{setting: value})


def test_registry_knows_all_objectives_and_lists_them_for_an_unknown_name() -> None:
    assert list_objectives() == ["VAE", "IntroVAE", "SoftIntroVAE", "ASIntroVAE", "AGE", "WGANGP"]
    for name in list_objectives():
        objective = get_objective(name)()
        assert set(objective.tunable) <= {f.name for f in dataclasses.fields(objective)}  # pyright: ignore
        assert set(objective.tunable) <= set(objective.values())
    with pytest.raises(ConfigError, match="VAE, IntroVAE, SoftIntroVAE, ASIntroVAE, AGE, WGANGP"):
        get_objective("GAN")
