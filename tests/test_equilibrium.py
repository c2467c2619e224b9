"""The equilibria of the papers on small tables (examples/equilibrium.py, docs/equilibrium.md): by best response."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.optimize import linprog, minimize
from scipy.special import softmax

SCRIPT = Path(__file__).parents[1] / "examples" / "equilibrium.py"
_spec = importlib.util.spec_from_file_location("equilibrium", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
eq = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(eq)

DOCS = (SCRIPT.parents[1] / "docs" / "equilibrium.md").read_text()
NOTHING = 1e-3  # nats: what a player may gain alone at an equilibrium; the gains found are below 1e-9
SHAPES = [(5, 1), (5, 3), (6, 6), (7, 20)]  # points, latents: one latent, fewer, as many and more


def game(seed: int, x: int, z: int) -> tuple[np.random.Generator, np.ndarray, np.ndarray]:
    """A generator, a data distribution (X,) with no tiny point, and a prior (Z,)."""
    rng = np.random.default_rng(seed)
    return rng, 0.8 * rng.dirichlet(np.ones(x)) + 0.2 / x, 0.5 * rng.dirichlet(np.ones(z)) + 0.5 / z


def decoder_with(p: np.ndarray, prior: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """A decoder of marginal p: the mean of two couplings in random orders of the points."""
    d = np.zeros((len(prior), len(p)))
    for _ in range(2):
        order = rng.permutation(len(p))
        d[:, order] += eq.coupled(p[order], prior, share) / 2
    return d


def generic_minimum(p_data: np.ndarray, gamma: float, rng: np.random.Generator) -> np.ndarray:
    def value(logits: np.ndarray) -> float:
        return eq.regularised(softmax(logits), p_data, gamma)

    runs = [minimize(value, rng.normal(size=len(p_data)) * scale, tol=1e-12) for scale in (0.3, 0.6, 1, 2, 3, 4)]
    return softmax(min(runs, key=lambda run: run.fun).x)


@pytest.mark.parametrize("gamma", [0.0, 0.05, 0.3, 0.8, 1.0, 2.0])
def test_the_regularised_distribution_is_the_minimum_that_a_generic_optimiser_finds(gamma: float) -> None:
    for seed in range(3):
        rng, p_data, _ = game(seed, 6, 1)
        p, found = eq.sharpened(p_data, gamma), generic_minimum(p_data, gamma, rng)
        assert p.sum() == pytest.approx(1, abs=1e-12)
        assert eq.regularised(p, p_data, gamma) <= eq.regularised(found, p_data, gamma) + 1e-9
        np.testing.assert_allclose(p, found, atol=1e-4)


def test_it_is_sharper_than_the_data_and_jumps_to_one_point_when_gamma_is_large() -> None:
    entropy = [-(p := eq.sharpened(eq.P_DATA, gamma)) @ np.log(p) for gamma in (0, 0.1, 0.3, 0.5, 0.8, 2)]
    assert (np.diff(entropy) < 0).all()
    even = np.full(6, 1 / 6)
    np.testing.assert_allclose(eq.sharpened(even, 0.82), even, atol=1e-9)
    assert eq.sharpened(even, 0.83).max() > 0.49


def largest(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Up to where a condition holds that holds at `low` and not at `high`."""
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


@pytest.mark.parametrize(
    ("gamma", "mode"), [(0.1, 0.315), (0.3, 0.358), (0.5, 0.439), (0.7, 0.598), (0.8, 0.671), (1.0, 0.765)]
)
def test_the_mode_s_mass_is_the_one_in_the_docs(gamma: float, mode: float) -> None:
    assert eq.sharpened(eq.P_DATA, gamma).max() == pytest.approx(mode, abs=5e-4)
    assert f"{mode:.3f}"[1:] in DOCS


@pytest.mark.parametrize(("alpha", "gamma"), [(0.5, 0.51), (1.0, 0.64), (2.0, 0.79), (4.0, 1.06)])
def test_the_condition_holds_up_to_the_gamma_in_the_docs(alpha: float, gamma: float) -> None:
    found = largest(lambda g: eq.condition(eq.sharpened(eq.P_DATA, g), eq.P_DATA, alpha), 0.0, 2.0)
    assert gamma <= found < gamma + 0.01  # two digits, cut


@pytest.mark.parametrize(("points", "gamma"), [(3, 0.96), (6, 0.82), (10, 0.72), (100, 0.39)])
def test_even_data_jump_at_the_gamma_in_the_docs(points: int, gamma: float) -> None:
    even = np.full(points, 1 / points)
    found = largest(lambda g: eq.sharpened(even, g).max() < 1.01 / points, 0.1, 1.5)
    assert found == pytest.approx(gamma, abs=0.011)
    assert 0.38 < eq.sharpened(even, found + 0.01).max() < 0.55


def test_the_data_as_a_code_are_proved_up_to_the_gamma_in_the_docs() -> None:
    assert 1.47 <= largest(lambda g: eq.code_is_answer(eq.P_DATA, eq.P_DATA, g), 0.1, 3.0) < 1.48


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("alpha", "gamma"), [(2.0, 0.05), (2.0, 0.3), (1.0, 0.1), (0.5, 0.2)])
def test_nobody_gains_alone_at_the_regularised_distribution(shape, alpha, gamma) -> None:
    for seed, share in enumerate((0.0, 0.6, 1.0)):
        rng, p_data, prior = game(seed, *shape)
        p_star = eq.sharpened(p_data, gamma)
        assert eq.condition(p_star, p_data, alpha)
        d = decoder_with(p_star, prior, share, rng)
        np.testing.assert_allclose(prior @ d, p_star, atol=1e-9)
        q = eq.posterior(d, prior)
        assert eq.encoder_gain(q, d, prior, p_data, alpha) < NOTHING
        found, bound = eq.decoder_gain(q, d, prior, p_data, gamma, rng, n=2)
        assert found <= bound + 1e-9
        assert bound < NOTHING


def test_a_latent_that_tells_nothing_lets_the_decoder_gain_all_of_the_excess() -> None:
    for seed, gamma in enumerate((0.1, 0.3, 0.5)):
        rng, p_data, prior = game(seed, 6, 4)
        d = np.tile(rng.dirichlet(np.full(6, 5.0)), (4, 1))
        excess = eq.regularised(d[0], p_data, gamma) - eq.regularised(eq.sharpened(p_data, gamma), p_data, gamma)
        found, bound = eq.decoder_gain(eq.posterior(d, prior), d, prior, p_data, gamma, rng, n=1)
        assert found > 10 * NOTHING
        assert found == pytest.approx(excess, abs=1e-9)
        assert bound == pytest.approx(excess, abs=1e-9)


def test_an_encoder_that_is_not_the_posterior_gains_and_so_does_its_decoder() -> None:
    for seed in range(3):
        rng, p_data, prior = game(seed, 6, 8)
        d = decoder_with(eq.sharpened(p_data, 0.2), prior, 0.6, rng)
        q = 0.5 * eq.posterior(d, prior) + 0.5 * rng.dirichlet(np.ones(8), size=6)
        q = np.where(d.T > 0, q, 0) / np.where(d.T > 0, q, 0).sum(1, keepdims=True)
        assert eq.encoder_gain(q, d, prior, p_data, 2.0) > 10 * NOTHING
        assert eq.decoder_gain(q, d, prior, p_data, 0.2, rng, n=2)[0] > 10 * NOTHING


def test_the_regularised_distribution_is_not_the_only_equilibrium() -> None:
    """Against codes (each latent makes one point) a decoder gains nothing, wherever their marginal is."""
    prior = np.full(24, 1 / 24)
    for seed, gamma in enumerate((0.1, 0.3, 0.5)):
        rng = np.random.default_rng(seed)
        p = (1 + rng.multinomial(18, rng.dirichlet(np.full(6, 3.0)))) / 24
        assert (
            eq.regularised(p, eq.P_DATA, gamma) - eq.regularised(eq.sharpened(eq.P_DATA, gamma), eq.P_DATA, gamma)
            > 0.05
        )
        assert eq.condition(p, eq.P_DATA, 2.0)
        assert eq.code_is_answer(p, eq.P_DATA, gamma)
        d = eq.coupled(p, prior, 1.0)
        assert ((d == 0) | (d > 1 - 1e-9)).all()
        q = eq.posterior(d, prior)
        assert eq.encoder_gain(q, d, prior, eq.P_DATA, 2.0) < NOTHING
        assert eq.decoder_gain(q, d, prior, eq.P_DATA, gamma, rng)[0] < NOTHING
        blurred = 0.9 * d + 0.1 * p  # the same marginal
        gain = eq.decoder_gain(eq.posterior(blurred, prior), blurred, prior, eq.P_DATA, gamma, rng, n=2)[0]
        assert gain > NOTHING


def test_a_code_far_out_is_no_equilibrium() -> None:
    p, prior, gamma = np.array([0.01, 0.04, 0.95]), np.full(100, 0.01), 0.9
    p_data = np.array([0.005, 0.095, 0.9])  # the rare first point is what fails
    assert not eq.code_is_answer(p, p_data, gamma)
    assert eq.code_is_answer(p, np.array([0.05, 0.095, 0.855]), gamma)
    d = eq.coupled(p, prior, 1.0)
    rng = np.random.default_rng(0)
    assert eq.decoder_gain(eq.posterior(d, prior), d, prior, p_data, gamma, rng)[0] > NOTHING


def test_a_decoder_whose_encoder_always_answers_finds_the_regularised_distribution() -> None:
    for seed, gamma in enumerate((0.1, 0.3)):
        rng, p_data, prior = game(seed, 6, 10)
        d = eq.leading_decoder(prior, p_data, 2.0, gamma, rng, n=4)
        np.testing.assert_allclose(prior @ d, eq.sharpened(p_data, gamma), atol=1e-3)
        q = eq.encoder_answer(d, prior, p_data, 2.0)
        assert eq.encoder_gain(q, d, prior, p_data, 2.0) < NOTHING
        assert eq.decoder_gain(q, d, prior, p_data, gamma, rng, n=2)[1] < NOTHING


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_the_posterior_is_the_encoder_s_best_just_when_the_condition_holds(alpha: float) -> None:
    held = 0
    for seed in range(60):
        rng, p_data, prior = game(seed, 5, 7)
        p = rng.dirichlet(np.full(5, rng.choice([1.0, 10.0])))
        d = decoder_with(p, prior, rng.uniform(), rng)
        q = eq.posterior(d, prior)
        np.testing.assert_allclose(eq.elbo(q, d, prior), np.log(p), atol=1e-7)
        gain = eq.encoder_gain(q, d, prior, p_data, alpha)
        excess = np.log(p / p_data ** (1 / (alpha + 1))).max()
        assert eq.condition(p, p_data, alpha) == (excess <= 0)
        held += excess <= 0
        assert (gain < 1e-12) if excess <= 0 else (gain > 0)
        if excess > 0.2:
            assert gain > NOTHING
            w = eq.elbo(eq.encoder_answer(d, prior, p_data, alpha), d, prior)
            least = (prior * d.T).min(1)  # exp W at the worst single latent: lower W cannot go
            np.testing.assert_allclose(np.exp(w), np.maximum((p_data / p) ** (1 / alpha), least).clip(max=p), atol=1e-6)
    assert 5 <= held <= 55


def test_with_one_latent_the_encoder_has_no_choice_and_the_condition_does_not_matter() -> None:
    d, p_data = np.array([[0.9, 0.1]]), np.array([0.5, 0.5])
    assert not eq.condition(d[0], p_data, 2.0)
    assert eq.encoder_gain(np.ones((2, 1)), d, np.ones(1), p_data, 2.0) == 0


def test_the_encoder_s_answer_is_the_best_that_a_generic_optimiser_finds() -> None:
    alpha = 0.5
    for seed in range(3):
        rng, _, prior = game(seed, 4, 3)
        d = eq.random_tables(3, (3, 4), rng)[1]
        p_data = (prior @ d) ** -2.0 / (
            (prior @ d) ** -2.0
        ).sum()  # far from the decoder's, so that the condition fails
        assert not eq.condition(prior @ d, p_data, alpha)

        def negative(logits: np.ndarray, d=d, prior=prior, p_data=p_data) -> float:
            w = eq.elbo(softmax(logits.reshape(4, 3), axis=1), d, prior)
            return -eq.encoder_payoff(w, prior @ d, p_data, alpha)

        found = -min(minimize(negative, rng.normal(size=12)).fun for _ in range(4))
        w = eq.elbo(eq.encoder_answer(d, prior, p_data, alpha), d, prior)
        assert eq.encoder_payoff(w, prior @ d, p_data, alpha) == pytest.approx(found, abs=1e-5)


def test_the_encoder_leaves_the_posterior_where_gamma_is_too_large() -> None:
    gains = []
    for gamma in (0.5, 0.7, 0.9, 1.0):
        p_star = eq.sharpened(eq.P_DATA, gamma)
        d = eq.coupled(p_star, eq.PRIOR, 0.0)
        gains.append(eq.encoder_gain(eq.posterior(d, eq.PRIOR), d, eq.PRIOR, eq.P_DATA, 2.0))
        assert (gains[-1] < NOTHING) == eq.condition(p_star, eq.P_DATA, 2.0)
    assert gains[-1] == pytest.approx(0.0137, abs=5e-4)  # the number in docs/equilibrium.md


def test_introvae_has_its_saddle_points_where_theorem_1_says_and_nowhere_else() -> None:
    margin = 2.0
    for energy in (0.0, 0.7, margin):
        assert max(eq.introvae_gains(np.full(6, energy), eq.P_DATA, eq.P_DATA, margin)) < 1e-12
    assert eq.introvae_gains(np.full(6, margin + 0.1), eq.P_DATA, eq.P_DATA, margin)[0] == pytest.approx(0.1)
    rng = np.random.default_rng(0)
    for _ in range(300):
        p_data, p_g = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
        energy = rng.uniform(0, 1.5 * margin, size=6) * rng.integers(2, size=6)
        gains = eq.introvae_gains(energy, p_g, p_data, margin)
        assert min(gains) >= -1e-12
        assert sum(gains) >= margin * np.abs(p_g - p_data).sum() / 2 - 1e-12
        # The right generator, an energy that is not constant: the generator moves to where it is least.
        if np.ptp(energy) > 0:
            assert eq.introvae_gains(energy, p_data, p_data, margin)[1] == pytest.approx(
                p_data @ (energy - energy.min())
            )


def test_introvae_s_best_responses_are_those_of_linear_programs() -> None:
    margin, n = 2.0, 5
    rng = np.random.default_rng(0)
    for _ in range(10):
        p_data, p_g = rng.dirichlet(np.ones(n)), rng.dirichlet(np.ones(n))
        energy = rng.uniform(0, 3, size=n)
        # Over E >= 0 and hinges s >= 0 with s >= m - E.
        rows = np.hstack([-np.eye(n), -np.eye(n)])
        encoder = linprog(np.concatenate([p_data, p_g]), A_ub=rows, b_ub=np.full(n, -margin))
        generator = linprog(energy, A_eq=np.ones((1, n)), b_eq=[1.0])
        v = p_data @ energy + p_g @ np.maximum(margin - energy, 0)
        gains = eq.introvae_gains(energy, p_g, p_data, margin)
        assert gains == pytest.approx((v - encoder.fun, p_g @ energy - generator.fun), abs=1e-9)


def test_introvae_s_theorem_needs_data_everywhere() -> None:
    p_data, energy = np.array([0.6, 0.4, 0.0]), np.array([0.5, 0.5, 9.0])
    assert eq.introvae_gains(energy, p_data, p_data, 2.0) == (0.0, 0.0)  # a saddle point, its energy not constant


def test_the_script_draws_its_figure(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["equilibrium.py", "--out", str(tmp_path / "e.png")])
    eq.main()
    assert "20 are proved" in capsys.readouterr().out
    with Image.open(tmp_path / "e.png") as picture:
        assert picture.width > 800
