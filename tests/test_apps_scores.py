"""Scores against closed forms and plain transcriptions; one image alone has the score that it has in a batch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from introvae import IntrospectiveVAE
from introvae.apps import scores
from introvae.apps.scores import (
    SCORES,
    ScoreSettings,
    evaluating,
    log_likelihood,
    png_bits,
    score_images,
    scores_for,
    shared_noise,
)
from introvae.errors import ConfigError, DataError
from introvae.metrics.features import FeatureSpace, feature_space
from introvae.pictures import save_picture, to_pil

SHAPES = {"tiny-conv": (1, 8, 8), "conv": (3, 16, 16), "mlp": (5,)}


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def norms(latents: Tensor) -> Tensor:
    return latents.norm(dim=1)


def built(network: str, classes: int | None = None) -> IntrospectiveVAE:
    torch.manual_seed(0)
    options: dict[str, Any] = {"channels": [4, 8]} if network == "conv" else {}
    return IntrospectiveVAE.build(SHAPES[network], network, latent_dim=3, classes=classes, **options).eval()


class LinearEncoder(nn.Module):
    """The posterior of a linear decoder with orthogonal columns w: diagonal, the same variance for all x."""

    def __init__(self, w: Tensor, b: Tensor, variance: float, off: float = 0.0) -> None:
        super().__init__()
        spread = 1 / (1 + w.square().sum(dim=0) / variance)
        self.matrix = nn.Parameter(w * spread / variance)
        self.offset, self.logvar, self.off = b, spread.log(), off

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = (x.flatten(1) - self.offset) @ self.matrix
        return mean + self.off, self.logvar.expand_as(mean) + self.off


class LinearDecoder(nn.Module):
    def __init__(self, w: Tensor, b: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.matrix, self.offset, self.shape = nn.Parameter(w), b, shape

    def forward(self, z: Tensor) -> Tensor:
        return (z @ self.matrix.T + self.offset).unflatten(1, self.shape)


def linear(shape: tuple[int, ...], variance: float, off: float = 0.0) -> tuple[IntrospectiveVAE, Tensor, Tensor]:
    """A linear-Gaussian model in float64 whose encoder is right, or off; its w `[D, 3]` and b `[D]`."""
    generator = torch.Generator().manual_seed(1)
    dimensions = math.prod(shape)
    w = torch.linalg.qr(torch.randn(dimensions, 3, generator=generator, dtype=torch.float64)).Q
    w = w * torch.tensor([2.0, 1.0, 0.3], dtype=torch.float64)
    b = torch.randn(dimensions, generator=generator, dtype=torch.float64)
    encoder, decoder = LinearEncoder(w, b, variance, off), LinearDecoder(w, b, shape)
    return IntrospectiveVAE(encoder, decoder, latent_dim=3), w, b


# --- the likelihood


def exact_likelihood(x: Tensor, w: Tensor, b: Tensor, variance: float) -> np.ndarray:
    """-log N(x; b, w w^T + variance I), `[N]`."""
    covariance = (w @ w.T).numpy() + variance * np.eye(len(b))
    off = x.flatten(1).numpy() - b.numpy()
    squares = (off * np.linalg.solve(covariance, off.T).T).sum(axis=1)
    return 0.5 * (squares + np.linalg.slogdet(2 * np.pi * covariance)[1])


def log_normal(x: np.ndarray, mean: np.ndarray | float, variance: np.ndarray | float) -> float:
    return float((-0.5 * ((x - mean) ** 2 / variance + np.log(2 * np.pi * variance) + 0 * x)).sum())


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 4, 4), (6,)])
@pytest.mark.parametrize("draws", [1, 7])
def test_with_the_exact_posterior_any_number_of_draws_is_exact(shape: tuple[int, ...], draws: int):
    variance = 0.2
    model, w, b = linear(shape, variance)
    x = torch.randn(9, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = exact_likelihood(x, w, b, variance)
    found = score_images(model, x, ["neg_log_likelihood"], variance=variance, draws=draws, seed=draws)
    np.testing.assert_allclose(found["neg_log_likelihood"], expected, rtol=1e-10)
    # The same variance from the weights: beta_kl / (2 beta_rec).
    weighted = score_images(model, x, ["neg_log_likelihood"], beta_rec=2.5, beta_kl=1.0, draws=draws)
    np.testing.assert_allclose(weighted["neg_log_likelihood"], expected, rtol=1e-10)


def test_with_another_posterior_more_draws_come_nearer_from_above():
    variance = 0.2
    model, w, b = linear((6,), variance, off=0.3)
    x = b + torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    exact = exact_likelihood(x, w, b, variance).mean()

    def mean(draws: int, seeds: int) -> float:
        found = [
            score_images(model, x, ["neg_log_likelihood"], variance=variance, draws=draws, seed=seed)
            for seed in range(seeds)
        ]
        return float(np.mean([values["neg_log_likelihood"].mean() for values in found]))

    one, few, many = mean(1, 200), mean(8, 200), mean(4000, 5)
    assert one > few + 0.1 > many + 0.1
    assert few > exact + 0.01
    assert many == pytest.approx(exact, abs=0.03)
    # One draw of each posterior is the ELBO of the normalised model.
    with torch.no_grad():
        posterior = model.encode(x)
        trace = w.square().sum(dim=0) @ posterior.variance.T / (2 * variance)
        expected = model.decode(posterior.mean) - x
    elbo = expected.square().sum(dim=1) / (2 * variance) + trace + posterior.kl() + 3 * math.log(2 * math.pi * variance)
    assert one == pytest.approx(elbo.mean().item(), abs=0.15)


@pytest.mark.parametrize("network", list(SHAPES))
def test_the_likelihood_is_the_importance_sampled_sum_written_plainly(network: str):
    model, x = built(network).double(), draw((4, *SHAPES[network])).double()
    found = score_images(model, x, ["neg_log_likelihood"], beta_rec=0.7, beta_kl=0.3, draws=5, seed=3)
    noise, variance = shared_noise(5, 3, 3).double(), 0.3 / 1.4
    for i in range(len(x)):
        weights = []
        for k in range(5):
            with torch.no_grad():
                q = model.encode(x[i : i + 1])
                z = q.mean + noise[k] * q.variance.sqrt()
                y = model.decode(z)
            log_x = log_normal(x[i].numpy(), y[0].numpy(), variance)
            log_z = log_normal(z.numpy(), 0.0, 1.0)
            log_q = log_normal(z.numpy(), q.mean.numpy(), q.variance.numpy())
            weights.append(log_x + log_z - log_q)
        expected = -(np.logaddexp.reduce(weights) - math.log(5))
        assert found["neg_log_likelihood"][i].item() == pytest.approx(expected, rel=1e-9)


def test_memory_is_bounded_over_images_and_draws(monkeypatch: pytest.MonkeyPatch):
    model, x, sizes = built("tiny-conv"), draw((11, 1, 8, 8)), []
    expected = score_images(model, x, ["neg_log_likelihood", "error"], draws=10)
    decode = IntrospectiveVAE.decode

    def counted(self: IntrospectiveVAE, z: Tensor, condition: Tensor | None = None) -> Tensor:
        sizes.append(len(z))
        return decode(self, z, condition)

    monkeypatch.setattr(IntrospectiveVAE, "decode", counted)
    monkeypatch.setattr(scores, "at_once", lambda shape: 8)
    found = score_images(model, x, ["neg_log_likelihood", "error"], draws=10)
    assert max(sizes) <= 8
    assert sum(sizes) == 11 * 10 + 11
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=0)


# --- the other scores


@pytest.mark.parametrize("network", list(SHAPES))
def test_scores_equal_their_formulas_in_numpy(network: str, tmp_path: Path):
    model, x = built(network), draw((6, *SHAPES[network])).mul(255).round() / 255
    names = scores_for(SHAPES[network])
    rows = FeatureSpace("rows", lambda x: x.mean(dim=3))
    found = score_images(model, x, names, beta_rec=2.0, beta_kl=0.5, draws=4, features=rows, latents=norms)
    assert list(found) == names
    with torch.no_grad():
        q = model.encode(x)
        y = model.decode(q.mean).double().numpy()
    mean, logvar, pixels = q.mean.double().numpy(), q.logvar.double().numpy(), x.double().numpy()
    error = ((pixels - y) ** 2).reshape(6, -1).sum(axis=1)
    kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum(axis=1)
    expected = {"error": error, "kl": kl, "neg_elbo": 2 * error + 0.5 * kl, "latent": np.sqrt((mean**2).sum(axis=1))}
    if len(SHAPES[network]) == 3:
        difference = pixels.mean(axis=3) - y.clip(0, 1).mean(axis=3)
        expected["perceptual"] = (difference**2).reshape(6, -1).mean(axis=1)
        png = []
        for i, image in enumerate(x):
            array = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
            path = tmp_path / f"{i}.png"
            Image.fromarray(array.squeeze()).save(path, optimize=True)
            png.append(8 * path.stat().st_size)
        likelihood = found["neg_log_likelihood"].numpy() / np.log(2) + pixels[0].size * np.log2(255)
        expected["complexity"] = likelihood - np.array(png)
    assert set(names) == {*expected, "neg_log_likelihood"}
    for name, values in expected.items():
        assert found[name].dtype == torch.float64
        np.testing.assert_allclose(found[name], values, rtol=2e-5, err_msg=name)


def test_png_bits_are_those_of_the_file(tmp_path: Path):
    for channels in (1, 3):
        x = torch.cat([draw((2, channels, 20, 24)), torch.full((1, channels, 20, 24), 0.3)])
        paths = [save_picture(to_pil(image), tmp_path / f"{channels}-{i}.png") for i, image in enumerate(x)]
        found = png_bits(x)
        assert found.tolist() == [8 * path.stat().st_size for path in paths]
        assert found[2] < found[0] / 4
    with pytest.raises(DataError, match=r"shape \(2, 2, 4, 4\) are no PNG images: give"):
        png_bits(draw((2, 2, 4, 4)))


def test_feature_spaces_see_images_in_their_range():
    """A linear decoder may go beyond it."""
    model, _, b = linear((1, 4, 4), 0.2)
    assert b.min() < 0
    assert b.max() > 1
    x = draw((3, 1, 4, 4)).double()
    seen: list[Tensor] = []
    space = FeatureSpace("seen", lambda x: seen.append(x) or x.flatten(1))
    found = score_images(model, x, ["perceptual"], features=space)["perceptual"]
    y = model.reconstruct(x).clamp(0, 1)
    torch.testing.assert_close(seen[1], y)
    torch.testing.assert_close(found, (x - y).square().flatten(1).mean(dim=1))


def test_a_fitted_object_is_asked_for_its_distances():
    class Fitted:
        def distances(self, latents: Tensor) -> Tensor:
            assert latents.dtype == torch.float64
            return norms(latents) + 1

    model, x = built("tiny-conv"), draw((4, 1, 8, 8))
    found = score_images(model, x, ["latent"], latents=Fitted())["latent"]
    torch.testing.assert_close(found, score_images(model, x, ["latent"], latents=norms)["latent"] + 1)
    with pytest.raises(DataError, match=r"distances of 4 latents are \(4, 3\): give one for each"):
        score_images(model, x, ["latent"], latents=lambda latents: latents)


# --- the law


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("network", list(SHAPES))
def test_one_image_has_the_same_scores_alone_as_in_any_batch(network: str, classes: int | None):
    model, x = built(network, classes), draw((12, *SHAPES[network]))
    condition = None if classes is None else torch.arange(12) % classes
    space = feature_space("thumb")

    def scored(rows: Tensor) -> dict[str, Tensor]:
        known = None if condition is None else condition[rows]
        names = scores_for(SHAPES[network])
        return score_images(model, x[rows], names, draws=6, features=space, latents=norms, condition=known)

    batch, order = scored(torch.arange(12)), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled, alone = scored(order), [scored(torch.tensor([row])) for row in range(12)]
    for name, values in batch.items():
        assert values.shape == (12,)
        assert values.unique().numel() == 12, name  # images that all score the same would show nothing
        torch.testing.assert_close(shuffled[name], values[order], rtol=1e-5, atol=0, msg=name)
        torch.testing.assert_close(torch.cat([one[name] for one in alone]), values, rtol=1e-5, atol=0, msg=name)


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(64), nn.Linear(64, 6)
        self.norm.eval()  # one that its user froze

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.head(nn.functional.dropout(self.norm(x.flatten(1)), 0.5, self.training)).chunk(2, dim=1)
        return mean, logvar


def test_a_model_in_training_is_scored_in_evaluation_mode_and_left_as_it_was():
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(3, 64), nn.BatchNorm1d(64), nn.Unflatten(1, (1, 8, 8)))
    model, x = IntrospectiveVAE(Normalised(), decoder, latent_dim=3), draw((8, 1, 8, 8))
    modes = [module.training for module in model.modules()]
    assert True in modes
    assert False in modes
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first = score_images(model, x, ["neg_elbo", "neg_log_likelihood"], draws=3)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(values.requires_grad for values in first.values())
    found = score_images(model.eval(), x, ["neg_elbo", "neg_log_likelihood"], draws=3)
    assert all(torch.equal(found[name], first[name]) for name in first)
    with pytest.raises(KeyError), evaluating(model.train()):
        raise KeyError
    assert model.training


def test_what_several_scores_need_is_computed_once(monkeypatch: pytest.MonkeyPatch):
    model, x, calls = built("tiny-conv"), draw((4, 1, 8, 8)), []
    encode, decode = IntrospectiveVAE.encode, IntrospectiveVAE.decode
    monkeypatch.setattr(IntrospectiveVAE, "encode", lambda self, *given: calls.append("e") or encode(self, *given))
    monkeypatch.setattr(IntrospectiveVAE, "decode", lambda self, *given: calls.append("d") or decode(self, *given))
    score_images(model, x, ["kl", "latent"], latents=norms)
    assert calls == ["e"]
    calls.clear()
    score_images(model, x, ["neg_elbo", "error", "kl", "perceptual"], features=feature_space("thumb"))
    assert calls == ["e", "d"]
    calls.clear()
    score_images(model, x, ["neg_log_likelihood", "complexity"], draws=9)
    assert calls == ["e", "d"]


def test_the_scores_rise_for_what_does_not_belong():
    """An image off the line that a linear model draws; one far out on the line has a larger KL only."""
    model, w, b = linear((1, 4, 4), 0.2)
    on = (b + torch.randn(30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) @ w.T).unflatten(
        1, (1, 4, 4)
    )
    away = torch.randn(30, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    names = ["neg_elbo", "error", "neg_log_likelihood"]
    near, far = (score_images(model, x, names, variance=0.2, draws=2) for x in (on, on + 3 * away))
    assert all(far[name].min() > near[name].max() for name in names)
    out = (b + 9 * w.sum(dim=1)).reshape(1, 1, 4, 4)
    assert score_images(model, out, ["kl"])["kl"] > score_images(model, on, ["kl"])["kl"].max()


# --- bad input


def test_every_score_says_what_it_is():
    for name, score in SCORES.items():
        assert name == score.name
        assert score.unit
        assert "\n" not in score.meaning


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        ([], {}, r"names is \[\]: give a list with some of neg_elbo"),
        ("kl", {}, "names is 'kl': give a list"),
        (["kl", "elbo"], {}, "unknown score 'elbo': choose one of neg_elbo, error"),
        (["perceptual"], {}, "perceptual needs a feature space: give features"),
        (["latent"], {}, "latent needs normal images' latents: give latents"),
        (["kl"], {"beta_rec": 0.0}, "beta_rec is 0.0: it must be a number above 0"),
        (["kl"], {"beta_kl": -1.0}, "beta_kl is -1.0"),
        (["kl"], {"draws": 0}, "draws is 0"),
        (["kl"], {"draws": 1.5}, "draws is 1.5: it must be a whole number"),
        (["kl"], {"seed": -1}, "seed is -1"),
        (["kl"], {"variance": 0.0}, "variance is 0.0"),
        (["neg_log_likelihood"], {"beta_kl": 0.0}, "beta_kl is 0, .*: give variance"),
        (["kl"], {"condition": 0}, "the model knows no classes"),
    ],
)
def test_settings_that_do_not_fit_are_refused(names: list[str], settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        score_images(built("tiny-conv"), draw((2, 1, 8, 8)), names, **settings)


@pytest.mark.parametrize("name", ["perceptual", "complexity"])
def test_vectors_have_no_scores_of_images(name: str):
    message = f"vectors have no score {name}: choose of neg_elbo, error, kl, neg_log_likelihood, latent"
    with pytest.raises(ConfigError, match=message):
        score_images(built("mlp"), draw((2, 5)), ["kl", name], features=feature_space("thumb"))


def test_data_that_do_not_fit_are_refused():
    model, x = built("tiny-conv"), draw((9, 1, 8, 8))
    for wrong in (x[0], x[:, :, None]):
        with pytest.raises(DataError, match=r"give images \[N, C, H, W\] or vectors"):
            score_images(model, wrong, ["kl"])
    with pytest.raises(DataError, match=r"takes data of shape \(1, 8, 8\), not \(1, 8, 6\)"):
        score_images(model, x[..., :6], ["kl"])
    with pytest.raises(DataError, match="divide uint8 images by 255"):
        score_images(model, x.mul(255).byte(), ["kl"])
    x[[1, 2, 3, 5, 7, 8], 0, 0, 0] = torch.tensor([math.nan, math.inf, -math.inf, math.nan, math.nan, math.nan])
    with pytest.raises(DataError, match="rows 1, 2, 3, 5, 7 … hold NaN or infinite values: mend them or leave them"):
        score_images(model, x, ["kl"])
    with torch.no_grad():
        next(model.decoder.parameters()).fill_(math.nan)
    with pytest.raises(DataError, match="score error of rows 0 is no number: leave them out, or train"):
        score_images(model, x[:1], ["kl", "error"])


def test_no_images_have_no_scores():
    found = score_images(built("tiny-conv"), torch.empty(0, 1, 8, 8), ["kl", "complexity"])
    assert {name: tuple(values.shape) for name, values in found.items()} == {"kl": (0,), "complexity": (0,)}


def test_a_class_for_all_is_given_by_its_name():
    model, x = built("tiny-conv", 3), draw((4, 1, 8, 8))
    one, other = (score_images(model, x, ["neg_log_likelihood"], condition=c, draws=3) for c in (2, "1"))
    all_of_it = score_images(model, x, ["neg_log_likelihood"], condition=torch.full((4,), 2), draws=3)
    assert torch.equal(one["neg_log_likelihood"], all_of_it["neg_log_likelihood"])
    assert not torch.equal(one["neg_log_likelihood"], other["neg_log_likelihood"])
    with pytest.raises(ConfigError, match="the model knows 3 classes: give the condition"):
        score_images(model, x, ["kl"])
    posterior = model.encode(x, 2)
    by_hand = log_likelihood(model, x, posterior, shared_noise(3, 3, 0), 0.5, condition=2)
    np.testing.assert_allclose(one["neg_log_likelihood"], -by_hand.detach(), rtol=1e-6)


def test_the_variance_is_the_one_that_the_objective_stands_for():
    settings = ScoreSettings(beta_rec=2.0, beta_kl=0.1)
    assert settings.sigma2 == pytest.approx(0.025)
    assert ScoreSettings(beta_kl=0.0, variance=0.3).sigma2 == 0.3
    # -ELBO's two terms over beta_kl are those of the normalised model: error / (2 variance) + KL.
    model, x = built("mlp"), draw((3, 5))
    found = score_images(model, x, ["neg_elbo", "error", "kl"], beta_rec=2.0, beta_kl=0.1)
    expected = found["error"] / (2 * settings.sigma2) + found["kl"]
    np.testing.assert_allclose(found["neg_elbo"] / 0.1, expected, rtol=1e-12)
