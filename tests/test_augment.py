"""Differentiable augmentation: a function of images and draws, sample by sample, that gradients pass."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from commands import Refused
from introvae import VAE, ASIntroVAE, FitConfig, IntrospectiveVAE, IntroVAE, Run, SoftIntroVAE, fit, from_array
from introvae.augment import DRAWS, Augmentation, color, cutout, list_policies, translation
from introvae.baselines.wgan_gp import WGANGP
from introvae.capture import CapturedStep
from introvae.errors import ConfigError, DataError
from introvae.model import squared_error
from introvae.objectives import Objective, Warmup
from introvae.parallel import Alone
from introvae.step import IntrospectiveStep, Noise, step_class
from introvae.training.checkpoint import list_checkpoints
from introvae.training.config import parse_config
from introvae.training.feed import Feed
from introvae.training.growing import Growth
from introvae.training.planner import Plan
from lockstep import in_lockstep

ALL = "color,translation,cutout"


def images(n: int = 6, channels: int = 3, height: int = 12, width: int = 10, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, height, width, generator=generator, dtype=torch.float64)


def draws(n: int = 6, seed: int = 1) -> Tensor:
    return Augmentation.draw(n, torch.Generator().manual_seed(seed)).double()


# --- against a transcription, pixel by pixel, for images in [-1, 1] as in the paper


def slow_color(image: list[Any], u: list[float]) -> list[Any]:
    channels, height, width = len(image), len(image[0]), len(image[0][0])
    y = [[[image[c][i][j] + (u[0] - 0.5) for j in range(width)] for i in range(height)] for c in range(channels)]
    for i in range(height):
        for j in range(width):
            mean = sum(y[c][i][j] for c in range(channels)) / channels
            for c in range(channels):
                y[c][i][j] = (y[c][i][j] - mean) * (u[1] * 2) + mean
    mean = sum(y[c][i][j] for c in range(channels) for i in range(height) for j in range(width))
    mean /= channels * height * width
    return [[[(v - mean) * (u[2] + 0.5) + mean for v in row] for row in plane] for plane in y]


def slow_translation(image: list[Any], u: list[float]) -> list[Any]:
    height, width = len(image[0]), len(image[0][0])
    most = int(height * 0.125 + 0.5), int(width * 0.125 + 0.5)
    down, right = (math.floor(d * (2 * m + 1)) - m for d, m in zip(u, most, strict=True))
    found = [[[0.0] * width for _ in range(height)] for _ in image]
    for plane, to in zip(image, found, strict=True):
        for i in range(height):
            for j in range(width):
                if 0 <= i + down < height and 0 <= j + right < width:
                    to[i + down][j + right] = plane[i][j]
    return found


def slow_cutout(image: list[Any], u: list[float]) -> list[Any]:
    height, width = len(image[0]), len(image[0][0])
    sides = int(height * 0.5 + 0.5), int(width * 0.5 + 0.5)
    top, left = (math.floor(d * (n + (1 - s % 2))) - s // 2 for d, n, s in zip(u, (height, width), sides, strict=True))
    found = [[list(row) for row in plane] for plane in image]
    for plane in found:
        for i in range(max(0, top), min(height, top + sides[0])):
            for j in range(max(0, left), min(width, left + sides[1])):
                plane[i][j] = 0.0
    return found


SLOW = {"color": (slow_color, slice(0, 3)), "translation": (slow_translation, slice(3, 5))}
SLOW |= {"cutout": (slow_cutout, slice(5, 7))}


@pytest.mark.parametrize("policy", ["color", "translation", "cutout", ALL, "cutout,color", "translation,translation"])
@pytest.mark.parametrize("shape", [(3, 12, 10), (1, 8, 8), (3, 7, 9), (2, 16, 5)])
def test_it_is_the_paper_s(policy: str, shape: tuple[int, int, int]) -> None:
    x, u = images(8, *shape), draws(8)
    found = Augmentation(policy, 1.0)(x, u)
    for image, own, result in zip(x, u.tolist(), found, strict=True):
        expected = (2 * image - 1).tolist()
        for name in policy.split(","):
            function, columns = SLOW[name]
            expected = function(expected, own[columns])
        assert (2 * result - 1 - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-13


# --- laws


@pytest.mark.parametrize("policy", ["color", "translation", "cutout", ALL])
@pytest.mark.parametrize("probability", [0.5, 1.0])
def test_gradients_pass(policy: str, probability: float) -> None:
    augment, u = Augmentation(policy, probability), draws(3)
    x = images(3, 3, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: augment(x, u), x)
    assert torch.autograd.gradgradcheck(lambda x: augment(x, u) ** 2, x)


def test_gradients_are_those_of_what_can_be_seen() -> None:
    x, u = images(50).requires_grad_(), draws(50)
    augment = Augmentation("cutout", 1.0)
    (gradient,) = torch.autograd.grad(augment(x, u).sum(), x)
    seen = augment(torch.full_like(x, 7.0), u) == 7.0
    assert torch.equal(gradient, seen.double())
    assert 0.5 < seen.double().mean() < 0.9


@pytest.mark.parametrize("policy", ["color", "translation", "cutout", ALL])
def test_an_image_s_change_depends_on_its_own_draws_alone(policy: str) -> None:
    augment, x, u = Augmentation(policy, 0.7), images(9), draws(9)
    whole = augment(x, u)
    for rows in (slice(0, 3), slice(3, 4), slice(4, 9)):
        assert torch.allclose(augment(x[rows], u[rows]), whole[rows], rtol=0, atol=1e-15)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(augment(x[order], u[order]), whole[order], rtol=0, atol=1e-15)
    assert torch.equal(augment(x, u), whole)


def test_real_and_fake_get_the_same_change_from_the_same_draws() -> None:
    """What the squared error between T(x; u) and T(D(z); u) rests on: T is affine in the image."""
    x, y, u = images(seed=3), images(seed=4), draws()
    augment = Augmentation(ALL, 0.8)
    between = augment(0.25 * x + 0.75 * y, u)
    assert torch.allclose(between, 0.25 * augment(x, u) + 0.75 * augment(y, u), rtol=0, atol=1e-14)


@pytest.mark.parametrize("augment", [Augmentation(""), Augmentation(" , "), Augmentation(ALL, 0.0)])
def test_nothing_is_changed_where_nothing_is_asked_for(augment: Augmentation) -> None:
    x = images()
    assert augment(x, draws()) is x


def test_draws_in_the_middle_change_no_colour() -> None:
    x = images()
    assert torch.allclose(color(x, torch.full((6, 3), 0.5, dtype=torch.float64)), x, rtol=0, atol=1e-15)
    assert torch.equal(translation(x, torch.full((6, 2), 0.5, dtype=torch.float64)), x)


def test_grey_images_have_no_saturation() -> None:
    x, u = images(channels=1), draws()
    other = u.clone()
    other[:, 1] = 1 - other[:, 1]
    assert torch.allclose(color(x, u[:, :3]), color(x, other[:, :3]), rtol=0, atol=1e-15)


def test_ends_of_the_draws_stay_in_the_image() -> None:
    x = images(2, 1, 8, 8)
    ends = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    moved = translation(x, ends)
    assert torch.equal(moved[0, :, :7, :7], x[0, :, 1:, 1:])
    assert torch.equal(moved[1, :, 1:, 1:], x[1, :, :7, :7])
    assert torch.equal(moved[0, :, 7], torch.full((1, 8), 0.5, dtype=torch.float64))
    cut = cutout(x, ends)
    assert (cut[0, :, :2, :2] == 0.5).all()
    assert (cut[1, :, 6:, 6:] == 0.5).all()
    assert (cut != x).sum() == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_type_of_the_images_stays(dtype: torch.dtype) -> None:
    assert Augmentation()(images().to(dtype), draws().float()).dtype == dtype


# --- statistics


N = 20_000


def test_draws_are_uniform_and_each_image_has_its_own() -> None:
    u = Augmentation.draw(N, torch.Generator().manual_seed(0))
    assert u.shape == (N, DRAWS)
    assert ((u >= 0) & (u < 1)).all()
    assert (u.mean(dim=0) - 0.5).abs().max() < 4 / math.sqrt(12 * N)
    correlation = torch.corrcoef(u.T) - torch.eye(DRAWS)
    assert correlation.abs().max() < 5 / math.sqrt(N)
    assert torch.equal(Augmentation.draw(5, torch.Generator().manual_seed(0)), u[:5])
    assert torch.equal(Augmentation.draw(3, torch.Generator().manual_seed(0), kinds=2).flatten(0, 1), u[:6])


def test_brightness_and_contrast_have_their_spread() -> None:
    x = torch.zeros(N, 1, 2, 2, dtype=torch.float64)
    x[:, :, 0] = 1.0
    found = color(x, draws(N)[:, :3])
    shift, contrast = found.mean(dim=(1, 2, 3)) - 0.5, found.amax(dim=(1, 2, 3)) - found.amin(dim=(1, 2, 3))
    for values, half in ((shift, 0.25), (contrast - 1, 0.5)):  # uniform in [-half, half]
        assert values.abs().max() <= half + 1e-12
        assert abs(values.mean()) < 4 * half / math.sqrt(3 * N)
        assert values.std() == pytest.approx(half / math.sqrt(3), rel=0.02)


def test_every_shift_is_as_likely() -> None:
    x = torch.zeros(N, 1, 16, 24, dtype=torch.float64)
    x[:, :, 8, 12] = 1.0
    place = translation(x, draws(N)[:, 3:5]).flatten(1).argmax(dim=1)
    counts = torch.bincount(place, minlength=16 * 24).view(16, 24)
    assert (counts > 0).nonzero().amin(dim=0).tolist() == [6, 9]
    assert (counts > 0).nonzero().amax(dim=0).tolist() == [10, 15]
    inner, expected = counts[6:11, 9:16].double(), N / 35
    assert ((inner - expected) ** 2 / expected).sum() < 70  # chi^2 with 34 degrees of freedom: p < 0.0003


def test_the_cut_s_centre_is_anywhere() -> None:
    cut = cutout(torch.zeros(N, 1, 8, 8, dtype=torch.float64), draws(N)[:, 5:7]) == 0.5
    # 9 places, a row r in a cut of 4 rows for the centres r - 1 ... r + 2.
    rows = torch.tensor([sum(0 <= c <= 8 for c in range(r - 1, r + 3)) / 9 for r in range(8)])
    expected = rows[:, None] * rows
    assert (cut.double().mean(dim=(0, 1)) - expected).abs().max() < 4 * 0.5 / math.sqrt(N)


@pytest.mark.parametrize("probability", [0.3, 0.8])
def test_the_share_of_changed_images(probability: float) -> None:
    x = images(1, 1, 4, 4).expand(N, -1, -1, -1)
    same = (Augmentation("color", probability)(x, draws(N)) == x).flatten(1).all(dim=1)
    assert same.double().mean() == pytest.approx(1 - probability, abs=4 * 0.5 / math.sqrt(N))


# --- names and errors


def test_policies_by_name() -> None:
    assert list_policies() == ["color", "translation", "cutout"]
    assert Augmentation(" color, cutout ").names == ("color", "cutout")
    assert Augmentation("color") == Augmentation("color", 0.8)
    with pytest.raises(ConfigError, match="unknown augmentation 'blur': choose one of color, translation, cutout"):
        Augmentation("color,blur")
    with pytest.raises(ConfigError, match="the augmentation is True: give names"):
        Augmentation(True)  # pyright: ignore[reportArgumentType]
    for probability in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="probability"):
            Augmentation("color", probability)


def test_vectors_and_wrong_draws_are_refused() -> None:
    with pytest.raises(DataError, match=r"images \[N, C, H, W\]"):
        Augmentation()(torch.rand(4, 2), draws(4))
    for wrong in (draws(5), draws(4)[:, :7]):
        with pytest.raises(DataError, match="need draws"):
            Augmentation()(images(4), wrong)


# --- in a step: it is one on images T(x) with the decoder T after D

BATCH, Z = 6, 4
CHANGE = Augmentation(ALL, 0.7)
OBJECTIVES: dict[str, Objective] = {
    "soft": SoftIntroVAE(beta_neg=3.0, gamma_r=0.5),
    "target": SoftIntroVAE(beta_neg=3.0, target_every=5),
    "intro": IntroVAE(margin=5.0),
    "vae": VAE(),
    "as": ASIntroVAE(beta_neg=3.0),
    "wgan": WGANGP(n_critic=1),
}


def build(norm: str = "none", **options: Any) -> IntrospectiveVAE:
    torch.manual_seed(0)
    return IntrospectiveVAE.build((3, 16, 16), "tiny-conv", latent_dim=Z, norm=norm, **options).double()


def noise(seed: int = 1) -> Noise:
    generator = torch.Generator().manual_seed(seed)
    return Noise.draw(BATCH, Z, generator, dtype=torch.float64, augment=True)


def uniform(drawn: Noise) -> Tensor:
    """The draws for augmentation, which must be there."""
    assert drawn.augment is not None
    return drawn.augment


def batch(seed: int) -> Tensor:
    return images(BATCH, 3, 16, 16, seed)


class Behind(nn.Module):
    """T after a decoder, with the draws of each row of a batch, for its reconstructions as for its samples."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder, self.draws = decoder, torch.empty(0)

    def forward(self, z: Tensor) -> Tensor:
        made = self.decoder(z)
        return CHANGE(made, self.draws.repeat(len(made) // len(self.draws), 1))


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters()]


def cases(names: Iterable[str], second: Iterable[Any], *third: Any) -> list[tuple[Any, ...]]:
    """All together, but a WGAN with a warm-up or with batch statistics: it has neither."""
    found = product(names, second, *third)
    return [case for case in found if case[0] != "wgan" or not (True in case or "batch" in case)]


@pytest.mark.parametrize(("name", "warming", "norm"), cases(OBJECTIVES, (False, True), ("none", "batch")))
def test_a_step_is_one_of_changed_images_with_a_changing_decoder(name: str, warming: bool, norm: str) -> None:
    objective = OBJECTIVES[name]
    made, behind, plain = build(norm), build(norm), build(norm)
    assert isinstance(behind.decoder, nn.Module)
    behind.decoder = decoder = Behind(behind.decoder)
    ours, theirs, without = (
        step_class(objective)(model, objective, lr=1e-3, **settings)
        for model, settings in ((made, {"augment": CHANGE}), (behind, {}), (plain, {}))
    )
    decoders = [decoder, *([theirs.target] if name == "target" else [])]
    for seed in range(2):
        x, drawn = batch(seed), noise(seed)
        u = uniform(drawn)[:, 0]
        drawn = drawn._replace(augment=torch.stack([u, u], dim=1))
        for each in decoders:
            each.draws = u
        assert_equal(ours.fake_kls(x, drawn), theirs.fake_kls(CHANGE(x, u), drawn))
        found = ours(x, drawn, warming=warming, gradients=not warming)
        expected = theirs(CHANGE(x, u), drawn, warming=warming, gradients=not warming)
        without(x, drawn, warming=warming)
        assert_equal(found, {key: value for key, value in expected.items() if not key.startswith("apart")})
    for a, b in zip(weights(made), weights(behind), strict=True):
        assert torch.equal(a, b)
    assert any((a - b).abs().max() > 1e-5 for a, b in zip(weights(made), weights(plain), strict=True))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() >= expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@dataclass(frozen=True)
class Spy(Augmentation):
    """Notes what was changed by which draws, and what came of it."""

    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, x: Tensor, draws: Tensor) -> Tensor:
        self.calls.append((x.detach().clone(), draws))
        return super().__call__(x, draws)


@pytest.mark.parametrize("share", [True, False])
def test_samples_have_draws_of_their_own(share: bool) -> None:
    """Of real images and reconstructions u, of samples v, also for what is decoded of their latents."""
    spy, model, x, drawn = Spy(ALL, 1.0), build(), batch(0), noise()
    u, v = uniform(drawn).unbind(1)
    decoded: list[Tensor] = []
    encoded: list[Tensor] = []
    assert isinstance(model.decoder, nn.Module)
    assert isinstance(model.encoder, nn.Module)
    model.decoder.register_forward_hook(lambda module, given, made: decoded.append(made.detach().clone()))
    model.encoder.register_forward_hook(lambda module, given, made: encoded.append(given[0].detach().clone()))
    step = IntrospectiveStep(model, SoftIntroVAE(beta_neg=3.0, gamma_r=0.5), augment=spy, share=share)
    record = step(x, drawn)
    fakes = [(0, u), (1, v)]
    # Those of the encoder's phase, what is decoded of their latents, and both again in the decoder's phase.
    order = [*fakes, *((2 + i, w) for i, w in fakes)]
    order += [(i, w) for i, w in fakes if not share] + [(4 + i, w) for i, w in fakes]
    made = [part for each in decoded for part in each.split(BATCH)]
    made = [*made[:4], *made[4 if share else 6 :]]
    assert len(spy.calls) == 1 + len(order)
    assert torch.equal(spy.calls[0][0], x)
    assert torch.equal(spy.calls[0][1], u)
    for (changed, used), (index, wanted) in zip(spy.calls[1:], order, strict=True):
        assert torch.equal(used, wanted)
        assert torch.allclose(changed, made[index], rtol=0, atol=1e-12)
    assert torch.equal(encoded[0], CHANGED(x, u))
    judged = torch.cat([CHANGED(made[0], u), CHANGED(made[1], v)])
    assert [torch.equal(seen, judged) for seen in encoded[1:]] == [True, True]
    # How far fakes are apart is said of the decoder's own images: no change hides that they are alike.
    assert torch.equal(record["apart_fakes"], squared_error(made[1], made[0]).mean())
    assert torch.equal(record["apart_real"], squared_error(made[1], x).mean())


CHANGED = Augmentation(ALL, 1.0)


@pytest.mark.parametrize(("name", "warming"), cases(("soft", "intro", "vae", "wgan"), (False, True)))
def test_parts_of_a_batch_equal_the_whole(name: str, warming: bool) -> None:
    objective, found = OBJECTIVES[name], []
    # Without a first moment, Adam makes much of rounding.
    most = 1e-9 if name == "wgan" else 1e-12
    for accumulation in (1, 2):
        model = build()
        step = step_class(objective)(model, objective, lr=1e-3, augment=CHANGE, accumulation=accumulation)
        record = step(batch(0), noise(), warming=warming)
        found.append([*weights(model), *record.values()])
    assert all((a - b).abs().max() < most * (1 + a.abs().max()) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["soft", "as"])
def test_two_processes_train_the_model_that_one_trains(name: str) -> None:
    def trained(peers: Alone) -> list[Tensor]:
        model, rows = made[peers.count > 1].pop(), peers.rows(BATCH)
        step = IntrospectiveStep(model, OBJECTIVES[name], lr=1e-3, peers=peers, augment=CHANGE)
        for seed in range(2):
            step(batch(seed)[rows], noise(seed).rows(rows))
        return weights(model)

    made = [[build()], [build(), build()]]
    ours, others = in_lockstep(trained)
    for weight, other, alone in zip(ours, others, trained(Alone()), strict=True):
        assert torch.equal(weight, other)
        assert (weight - alone).abs().max() < 1e-9


def test_a_step_draws_for_itself_or_says_what_is_missing() -> None:
    step = IntrospectiveStep(build(), SoftIntroVAE(beta_neg=3.0), augment=CHANGE)
    assert all(value.isfinite() for value in step(batch(0)).values())
    with pytest.raises(DataError, match=r"no draws for augmentation: take Noise.draw\(..., augment=True\)"):
        step(batch(0), noise()._replace(augment=None))


def test_a_conditional_step_is_changed_too() -> None:
    model = build(classes=3)
    step = IntrospectiveStep(model, SoftIntroVAE(beta_neg=3.0, gamma_r=0.5), augment=CHANGE)
    record = step(batch(0), noise(), condition=torch.tensor([0, 1, 2, 2, 1, 0]))
    assert all(value.isfinite() for value in record.values())


# --- the draws of a run


def test_the_other_noise_stays_as_it_is() -> None:
    of = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    plain, drawn = Noise.draw(BATCH, Z, of[0]), Noise.draw(BATCH, Z, of[1], augment=True)
    assert plain.augment is None
    for ours, theirs in zip(drawn[:4], plain[:4], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(uniform(drawn), torch.rand(BATCH, 2, DRAWS, generator=of[0]))
    assert uniform(drawn).unique().numel() == BATCH * 2 * DRAWS


def test_rows_and_maps_of_the_noise() -> None:
    drawn = noise()
    parts = [uniform(drawn.rows(slice(start, start + 2))) for start in range(0, BATCH, 2)]
    assert torch.equal(torch.cat(parts), uniform(drawn))
    doubled = drawn.map(lambda draws: 2 * draws)
    assert torch.equal(uniform(doubled), 2 * uniform(drawn))
    assert all(torch.equal(ours, 2 * theirs) for ours, theirs in zip(doubled[:4], drawn[:4], strict=True))
    without = drawn._replace(augment=None)
    assert without.rows(slice(2)).augment is without.map(Tensor.float).augment is None


def feed(rows: slice = slice(0, BATCH), augment: bool = True) -> Feed:
    data = from_array(np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8))
    return Feed(data.batches(BATCH, seed=3), Z, 7, torch.device("cpu"), rows, flip=True, augment=augment)


def test_a_feed_without_augmentation_draws_nothing_for_it() -> None:
    one, generator = feed(augment=False), torch.Generator().manual_seed(7)
    for _ in range(3):
        found = one.next().noise
        assert found.augment is None
        assert torch.equal(torch.cat(found[:4]), torch.randn(6 * BATCH, Z, generator=generator))
        torch.rand(BATCH, generator=generator)  # whom to mirror


def test_a_feed_shares_the_draws_out_and_goes_on_in_another() -> None:
    with feed() as threaded:
        whole = [threaded.next() for _ in range(3)]
        state = threaded.state_dict()
        after = threaded.next()
    halves = [feed(rows) for rows in (slice(0, 3), slice(3, 6))]
    for each in whole:
        parts = [half.next() for half in halves]
        assert torch.equal(torch.cat([part.x for part in parts]), each.x)
        assert torch.equal(torch.cat([uniform(part.noise) for part in parts]), uniform(each.noise))
    other = feed()
    other.load_state_dict(state)
    found = other.next()
    assert torch.equal(found.x, after.x)
    assert torch.equal(found.noise.real, after.noise.real)
    assert torch.equal(uniform(found.noise), uniform(after.noise))


# --- runs


def run(out: Path, **settings: Any) -> Run:
    x = np.random.default_rng(0).integers(0, 256, (40, 16, 16), dtype=np.uint8)
    base: dict[str, Any] = {"data": x, "network": "tiny-conv", "latent_dim": Z, "batch_size": 8, "steps": 4}
    base |= {"log_every": 1, "objective": SoftIntroVAE(beta_neg=4.0), "warmup": Warmup(1), "device": "cpu"}
    return fit(**{**base, "out": str(out), "recipe": "none", "progress": False, **settings})


def rows_of(found: Run) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in found.log()]


def weights_of(found: Run) -> bytes:
    return (found.model_folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"objective": WGANGP(n_critic=2), "warmup": Warmup()},
        {"network": "tiny-style", "growing": Growth(samples=8, fade=8, start=8), "steps": None},
    ],
    ids=["soft", "wgan", "growing"],
)
def test_a_run_trains(tmp_path: Path, settings: dict[str, Any]) -> None:
    changed = run(tmp_path / "changed", augment="translation", **settings)
    plain = run(tmp_path / "plain", **settings)
    assert len(changed.log()) == len(plain.log()) >= 3
    assert all(math.isfinite(value) for row in changed.log() for value in row.values() if isinstance(value, float))
    assert rows_of(changed)[0] != rows_of(plain)[0]  # of the same images and the same other noise
    assert weights_of(changed) != weights_of(plain)
    assert changed.config().augmentation == Augmentation("translation")


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"augment": ALL, "augment_probability": 0.6, "flip": True, "checkpoint_every": 2}
    whole = run(tmp_path / "whole", **settings)
    resumed = Run(Path(shutil.copytree(whole.folder, tmp_path / "resumed")))
    shutil.rmtree(resumed.model_folder)
    list_checkpoints(resumed.checkpoints)[-1].unlink()
    x = np.random.default_rng(0).integers(0, 256, (40, 16, 16), dtype=np.uint8)
    fit(resume=resumed.folder, data=x, progress=False)
    assert weights_of(resumed) == weights_of(whole)
    assert rows_of(resumed) == rows_of(whole)


def test_a_conditional_run_trains(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (40, 1, 16, 16), dtype=np.uint8)
    found = run(tmp_path / "run", data=from_array(x, np.arange(40) % 2), conditional=True, augment="cutout")
    assert found.log()[-1]["step"] == 4


def test_settings_are_read_from_words_and_files(tmp_path: Path) -> None:
    config = parse_config(["--augment", "color,cutout", "--augment_probability", "0.5"])
    assert config.augmentation == Augmentation("color,cutout", 0.5)
    file = tmp_path / "recipe.yaml"
    file.write_text(config.to_yaml())
    assert parse_config([], [file]) == config
    assert FitConfig().augmentation is FitConfig(augment=" , ").augmentation is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augment": "color,blur"}, "unknown augmentation 'blur': choose one of"),
        ({"augment": ["color"]}, r"the augmentation is \['color'\]: give names"),
        ({"augment_probability": 1.5}, r"the probability of augmentation is 1.5: give a share in \[0, 1\]"),
        ({"augment_probability": "often"}, "augment_probability is often: it must be a number"),
        ({"augment": "color", "compile": "cudagraph"}, "records steps without augmentation: take none"),
    ],
)
def test_settings_that_will_not_do(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FitConfig(**settings)


def test_vectors_and_unknown_names_are_refused_by_the_command(refused: Refused, tmp_path: Path) -> None:
    words = ("fit", "--recipe", "none", "--steps", 2, "--quiet", "--out", tmp_path / "run")
    err = refused(*words, "--data", "density:rings", "--network", "tiny-mlp", "--augment", "color")
    assert "augment changes images, density:rings has vectors: leave it out" in err
    assert "unknown augmentation 'blur'" in refused(*words, "--data", "digits", "--augment", "blur")
    assert not (tmp_path / "run").exists()


def test_steps_with_augmentation_are_not_recorded() -> None:
    step = IntrospectiveStep(build(), SoftIntroVAE(), augment=CHANGE, capturable=True)
    with pytest.raises(ConfigError, match="CUDA graphs are recorded without augmentation: take compile none"):
        CapturedStep(step, capture=lambda run: (lambda: None, run()))


def test_memory_is_planned_with_it() -> None:
    model = build().float()
    plain, changed = (
        Plan(FitConfig(network="tiny-conv", latent_dim=Z, augment=augment), (3, 16, 16), model, "float32")
        for augment in ("", ALL)
    )
    kept, batch_bytes = 4, 16 * 3 * 16 * 16 * 4  # both kinds of fake, changed and as they are
    assert kept * batch_bytes < changed.step_bytes(16) - plain.step_bytes(16) < 40 * batch_bytes
