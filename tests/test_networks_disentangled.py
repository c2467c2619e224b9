"""The two-encoder pair, latents that are lent within a class, and translation."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import textbook
from introvae import (
    AGE,
    VAE,
    ASIntroVAE,
    ConfigError,
    DataError,
    DiagonalGaussian,
    FitConfig,
    IntrospectiveStep,
    IntrospectiveVAE,
    IntroVAE,
    Noise,
    Run,
    SoftIntroVAE,
    Warmup,
    cli_explore,
    fit,
    from_array,
)
from introvae.apps.translate import translate
from introvae.data import ArrayData
from introvae.exchange import read_samples
from introvae.gaussian import dependence, lent_within
from introvae.networks.disentangled import class_dim
from introvae.parallel import Alone
from introvae.pictures import to_pil
from introvae.step import OWN
from introvae.training.loop import Trainer
from test_networks_dcgan import assert_checkpointing_changes_nothing
from test_step import BETAS, CASES, LR, assert_equals, capture

GROUPS = torch.tensor([2, 0, 2, 1, 0, 2])
LENDER = [2, 4, 5, 3, 1, 0]
"""The next sample of the same group, around the end; the only one of group 1 keeps its own."""

PAYS = [pytest.approx(w) for w in (1 / 3, 1 / 2, 1 / 3, 1, 1 / 2, 1 / 3)]
"""One divided by the size of each sample's group."""


def images(n: int, shape: tuple[int, ...] = (3, 16, 16)) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(1))


def build(shape: tuple[int, ...] = (3, 16, 16), latent_dim: int = 5, **options: Any) -> IntrospectiveVAE:
    torch.manual_seed(0)
    return IntrospectiveVAE.build(shape, "disentangled", latent_dim, **{"channels": [6, 8], "hidden": 12, **options})


# --- the networks


@pytest.mark.parametrize(("latent_dim", "given", "first"), [(6, None, 3), (7, None, 3), (6, 5, 5), (2, 1, 1)])
def test_the_first_latents_are_the_class_tower_s(latent_dim: int, given: int | None, first: int) -> None:
    model = build(latent_dim=latent_dim, class_dim=given)
    assert class_dim(model.encoder) == first
    for tower, rows in (("class", slice(0, first)), ("content", slice(first, None))):
        model.zero_grad()
        q = model.encode(images(2))
        (q.mean[:, rows].sum() + q.logvar[:, rows].sum()).backward()
        for name, p in model.encoder.named_parameters():
            moved = p.grad is not None and bool(p.grad.abs().sum() > 0)
            # An instance norm takes away what a bias in front of it adds.
            assert moved == name.startswith(tower) or name.endswith("bias"), name


def test_class_latents_do_not_know_where_things_are_and_content_latents_not_how_bright() -> None:
    """The class tower averages over the image, so a shift by its stride (away from the edges) changes nothing."""
    model = build((1, 32, 32), channels=[4, 4])
    x = torch.zeros(1, 1, 32, 32)
    x[:, :, 8:16, 8:16] = images(1, (1, 8, 8))
    shifted = x.roll((8, 4), dims=(2, 3))
    first = class_dim(model.encoder)
    a, b = model.encode(x), model.encode(shifted)
    torch.testing.assert_close(a.mean[:, :first], b.mean[:, :first])
    assert not torch.allclose(a.mean[:, first:], b.mean[:, first:], atol=1e-2)
    darker = model.encode(0.5 * x)
    torch.testing.assert_close(a.mean[:, first:], darker.mean[:, first:], rtol=0.05, atol=0.02)
    assert not torch.allclose(a.mean[:, :first], darker.mean[:, :first], atol=1e-2)


def test_both_parts_of_a_latent_are_seen_in_the_image() -> None:
    model = build()
    z = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
    before = model.decode(z)
    for part in (slice(0, 2), slice(2, 5)):
        changed = z.clone()
        changed[:, part] += 1
        assert (model.decode(changed) - before).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 64)])
def test_signals_at_the_start_have_a_sensible_size(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = IntrospectiveVAE.build(shape, "disentangled", 16)
    sizes: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            module.register_forward_hook(
                lambda _, __, y, name=name: sizes.__setitem__(name, float(y.detach().square().mean().sqrt()))
            )
    model.encoder(images(8, shape))
    model.decoder(torch.randn(64, 16, generator=torch.Generator().manual_seed(2)))
    assert len(sizes) == len([m for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)])
    assert min(sizes.values()) >= 0.2
    assert max(sizes.values()) <= 3
    assert model.sample(16).std() < 0.2  # grey, not black and white


def test_checkpointing_changes_no_gradient() -> None:
    assert_checkpointing_changes_nothing(build().double(), images(4).double())


def test_a_sample_does_not_depend_on_its_batch_and_a_saved_model_is_the_same(tmp_path: Path) -> None:
    model = build().eval()
    x = images(3)
    for i in range(3):
        torch.testing.assert_close(model.encode(x[i : i + 1]).mean, model.encode(x).mean[i : i + 1])
        torch.testing.assert_close(model.reconstruct(x[i : i + 1]), model.reconstruct(x)[i : i + 1])
    model.save_pretrained(tmp_path)
    loaded = IntrospectiveVAE.from_pretrained(tmp_path)
    assert torch.equal(loaded.reconstruct(x), model.reconstruct(x))
    assert class_dim(loaded.encoder) == class_dim(model.encoder)


@pytest.mark.parametrize("objective", [VAE(), IntroVAE(margin=5.0), SoftIntroVAE(beta_neg=2.0), ASIntroVAE(), AGE()])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_every_objective_takes_a_step(objective: Any, precision: str) -> None:
    model = build()
    step = IntrospectiveStep(model, objective, precision=precision, lent=class_dim(model.encoder))
    record = step(images(6), condition=GROUPS)
    assert all(value.isfinite() for value in record.values())


@pytest.mark.slow
def test_a_step_at_full_size() -> None:
    model = IntrospectiveVAE.build((3, 128, 128), "disentangled", 128)
    record = IntrospectiveStep(model, SoftIntroVAE(beta_neg=64.0))(images(2, (3, 128, 128)))
    assert all(value.isfinite() for value in record.values())


@pytest.mark.parametrize(
    ("shape", "latent_dim", "options", "message"),
    [
        ((3, 44, 44), 4, {}, r"network 'disentangled' cannot take data of shape \(3, 44, 44\): .* resize with --size"),
        ((16,), 4, {}, "a square side of"),
        ((1, 28, 28), 4, {"channels": [4, 4, 4]}, "3 channel widths .* 28 pixels do not allow: give 1 to 2"),
        ((3, 32, 32), 4, {"channels": [4] * 5}, "5 channel widths leave a single pixel of 32, .* give 4"),
        ((1, 28, 28), 4, {"class_dim": 4}, "class_dim 4 of 4 latents .* above 0 and below latent_dim"),
        ((1, 28, 28), 4, {"class_dim": 0}, "class_dim 0 of 4 latents"),
        ((1, 28, 28), 4, {"class_dim": 1.5}, "class_dim is 1.5"),
        ((1, 28, 28), 1, {}, "class_dim 0 of 1 latents"),
        ((1, 28, 28), 4, {"hidden": 0}, "hidden is 0"),
        ((1, 28, 28), 4, {"depth": -1}, "depth is -1"),
        ((1, 28, 28), 4, {"norm": "batch"}, "unknown option of network 'disentangled' 'norm'"),
    ],
)
def test_bad_settings_are_refused_in_one_line(
    shape: tuple[int, ...], latent_dim: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        IntrospectiveVAE.build(shape, "disentangled", latent_dim, **options)
    assert len(str(refused.value).splitlines()) == 1


def test_other_encoders_have_no_class_latents() -> None:
    plain = IntrospectiveVAE.build((3, 8, 8), "tiny-conv", 4)
    told = IntrospectiveVAE.build((3, 8, 8), "tiny-disentangled", 4, classes=3)
    for model in (plain, told):
        with pytest.raises(ConfigError, match="does not tell class from content: train with --network disentangled"):
            class_dim(model.encoder)


# --- lending


@pytest.mark.parametrize("count", [0, 2, 5])
def test_every_sample_gets_the_class_latents_of_the_next_one_of_its_group(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    own = DiagonalGaussian(torch.randn(6, 5, generator=generator), torch.randn(6, 5, generator=generator))
    found, weight = lent_within(own, GROUPS, count)
    for before, after in ((own.mean, found.mean), (own.logvar, found.logvar)):
        assert torch.equal(after[:, count:], before[:, count:])
        assert torch.equal(after[:, :count], before[LENDER, :count])
    # Lent and borrowed once each, so that the mean KL stays what it was, but a group pays for what is lent once.
    torch.testing.assert_close(found.kl().mean(), own.kl().mean())
    assert torch.equal(weight[:, count:], torch.ones(6, 5 - count))
    assert weight[:, :count].tolist() == [[w] * count for w in PAYS]


class Lending(nn.Module):
    """The encoder of the pseudo-code: real images are known by being the batch itself."""

    def __init__(self, encoder: nn.Module, x: Tensor, first: int) -> None:
        super().__init__()
        self.encoder, self.x, self.first = encoder, x, first

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        parts = self.encoder(x)
        if x is not self.x:
            return parts
        return tuple(
            torch.stack([torch.cat([p[LENDER[i], : self.first], p[i, self.first :]]) for i in range(6)]) for p in parts
        )


def once_for_a_group(transcription: Any, first: int) -> Any:
    """The pseudo-code's losses, less what all but one of a group would pay for the latents that it shares."""

    def of(**settings: Any) -> Any:
        encoder_loss, decoder_loss = transcription(**settings)

        def less(x: Tensor, x_r: Tensor, q: Any, *others: Any) -> Tensor:
            mu, logvar = (part[:, :first] for part in q)
            kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(dim=1)
            sizes = torch.tensor([3, 2, 3, 1, 2, 3], dtype=kl.dtype)
            weight = settings["beta_kl"] / x[0].numel() if "beta_kl" in settings else 1.0
            return encoder_loss(x, x_r, q, *others) - weight * (kl * (1 - 1 / sizes)).mean()

        return less, decoder_loss

    return of


@pytest.mark.parametrize("share", [True, False], ids=["shared", "recomputed"])
@pytest.mark.parametrize("case", ["introvae", "soft", "soft-consistency", "as-real"])
def test_gradients_with_lent_latents_equal_the_pseudo_code(case: str, share: bool) -> None:
    objective_class, transcription, settings = CASES[case]
    model = build((1, 8, 8), latent_dim=3, class_dim=2, channels=[4], hidden=8).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(6, 1, 8, 8, generator=generator, dtype=torch.float64)
    noise = Noise.draw(6, 3, generator, dtype=torch.float64)
    theirs = copy.deepcopy(model)
    objective = objective_class(**settings)
    values = {name: torch.tensor(v, dtype=torch.float64) for name, v in objective.values().items()}
    if "c" in values:
        values["c"] = torch.tensor(0.4, dtype=torch.float64)
        settings = {**settings, "c": 0.4}
    step = IntrospectiveStep(model, objective, lr=LR, adam_betas=BETAS, share=share, lent=2)
    seen = capture(step)
    record = step(x, noise, values, condition=GROUPS)
    expected = textbook.textbook(
        Lending(theirs.encoder, x, 2),
        theirs.decoder,
        x,
        noise,
        once_for_a_group(transcription, 2),
        settings,
        lr=LR,
        adam_betas=BETAS,
    )
    assert_equals(record, seen, expected)


def test_warm_up_and_vae_lend_too() -> None:
    x, noise = images(6), Noise.draw(6, 5, torch.Generator().manual_seed(3))
    for objective, warming, scale in ((VAE(), False, 1.0), (SoftIntroVAE(beta_neg=1.0), True, 1 / 768)):
        model = build()
        q, weight = lent_within(model.encode(x), GROUPS, 2)
        error = textbook.rec(x, model.decode(q.sample(noise.real)))
        kl = (weight * q.kl_per_dimension()).sum(dim=1)
        step = IntrospectiveStep(model, objective, warmup=Warmup(1), lent=2)
        record = step(x, noise, condition=GROUPS, warming=warming)
        torch.testing.assert_close(record["rec"], error.mean().detach())
        torch.testing.assert_close(record["loss_encoder"], (scale * (error + kl).mean()).detach())
        plain = model.eval().encode(x).kl().mean()  # the look at fakes of a step without them lends nothing
        assert step.fake_kls(x, noise, GROUPS).keys() == {"kl_reconstruction", "kl_sample"}
        assert plain.isfinite()


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_warm_up_takes_as_much_of_the_own_latents_as_it_is_told(share: float) -> None:
    x, noise = images(6), Noise.draw(6, 5, torch.Generator().manual_seed(3))
    model = build()
    z = lent_within(model.encode(x), GROUPS, 2)[0].sample(noise.real)
    z[:, 2:] = share * z[:, 2:] + (1 - share) * noise.real[:, 2:]
    error = textbook.rec(x, model.decode(z))
    values = {"beta_rec": torch.tensor(1.0), "beta_kl": torch.tensor(1.0), OWN: torch.tensor(share)}
    record = IntrospectiveStep(model, VAE(), lent=2)(x, noise, values, condition=GROUPS)
    torch.testing.assert_close(record["rec"], error.mean().detach())


def test_a_paired_run_decodes_the_prior_s_content_in_the_first_half_of_the_warm_up() -> None:
    def told(objective: Any, warmup: int) -> list[float]:
        settings: dict[str, Any] = {"network": "tiny-disentangled", "latent_dim": 4, "batch_size": 16, "steps": 8}
        trainer = Trainer(FitConfig(**settings, paired=True, objective=objective, warmup=Warmup(warmup)), pictures())
        given, step = [], trainer.step

        def watched(x: Tensor, noise: Noise, values: Any, **more: Any) -> Any:
            given.append(float(values[OWN]))
            return step(x, noise, values, **more)

        trainer.step = watched  # pyright: ignore[reportAttributeAccessIssue]
        watched.set_lr = step.set_lr  # pyright: ignore[reportFunctionMemberAccess]
        with trainer.feed:
            for _ in range(8):
                trainer._one_step()
        return given

    assert told(VAE(), 0) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert told(SoftIntroVAE(), 4) == [0, 0, 1, 1, 1, 1, 1, 1]
    assert told(SoftIntroVAE(), 0) == [1] * 8


def song(a: Tensor, b: Tensor) -> Tensor:
    """Unbiased HSIC of two kernel matrices, as Song et al. 2012, Eq. 5, write it."""
    n, ones = len(a), torch.ones(len(a), 1, dtype=a.dtype)
    a, b = a - a.diag().diag(), b - b.diag().diag()
    product = (ones.T @ a @ ones) * (ones.T @ b @ ones) / ((n - 1) * (n - 2))
    return ((a @ b).trace() + product - 2 / (n - 2) * (ones.T @ a @ b @ ones)).squeeze() / (n * (n - 3))


def test_dependence_is_the_unbiased_hsic_over_that_of_the_groups() -> None:
    z = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    squared = torch.cdist(z, z).square()
    alike = 0.5 * (0.9 / (0.9 + squared) + 3 / (3 + squared))
    same = (GROUPS[:, None] == GROUPS[None]).double()
    torch.testing.assert_close(dependence(z, GROUPS), song(alike, same) / song(same, same))


def test_dependence_is_nothing_on_average_for_independent_latents_whatever_the_sizes_of_the_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    unequal = torch.tensor([0.6, 0.3, 0.1])
    found = []
    for _ in range(400):
        groups = torch.multinomial(unequal, 32, replacement=True, generator=generator)
        z = torch.randn(32, 2, generator=generator)
        spread = z * torch.tensor([0.5, 1.0, 2.0])[groups][:, None]  # equal means: only the shape tells
        found.append(torch.stack([dependence(z, groups), dependence(spread, groups)]))
    free, told = torch.stack(found).T
    error = float(free.std()) / 400**0.5
    assert abs(float(free.mean())) < 4 * error
    assert float(told.mean()) > 8 * error


@pytest.mark.parametrize("groups", [[1] * 32, list(range(32)), [0, 1, 1]], ids=["one", "each", "few"])
def test_dependence_is_nothing_where_nothing_can_be_compared(groups: list[int]) -> None:
    z = torch.randn(len(groups), 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = dependence(z, torch.tensor(groups))
    found.backward()
    assert abs(float(found.detach())) < 1e-3
    assert z.grad is not None
    assert z.grad.abs().max() < 1e-3


@pytest.mark.parametrize("case", ["vae", "warm-up", "introvae", "soft", "as-real"])
def test_independence_adds_its_gradient_to_the_content_encoder_s_alone(case: str) -> None:
    adversarial = CASES[case][0](**CASES[case][2]) if case in CASES else SoftIntroVAE(beta_neg=1.0)
    objective = VAE() if case == "vae" else adversarial
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(6, 1, 8, 8, generator=generator, dtype=torch.float64)
    noise = Noise.draw(6, 3, generator, dtype=torch.float64)
    gradients = []
    for weight in (0.0, 7.0):
        model = build((1, 8, 8), latent_dim=3, class_dim=1, channels=[4], hidden=8).double()
        values = {name: torch.tensor(v, dtype=torch.float64) for name, v in objective.values().items()}
        # The encoder rests, so that the decoder's phase is the same.
        step = IntrospectiveStep(model, objective, warmup=Warmup(1), lr=1e-300, lent=1, independence=weight)
        seen = capture(step)
        step(x, noise, values, warming=case == "warm-up", condition=GROUPS)
        gradients.append(seen)
    content = lent_within(model.encode(x), GROUPS, 1)[0].sample(noise.real)[:, 1:]
    told = 7 * objective.scale_of(x) * dependence(content, GROUPS)
    expected = torch.autograd.grad(told, list(model.encoder.parameters()), allow_unused=True, materialize_grads=True)
    moved = 0.0
    for (name, _), before, after, more in zip(
        model.encoder.named_parameters(), gradients[0]["encoder"], gradients[1]["encoder"], expected, strict=True
    ):
        torch.testing.assert_close(after - before, more, rtol=1e-6, atol=1e-12)
        if name.startswith("class"):
            assert torch.equal(after, before)
        moved += float(more.abs().sum())
    assert moved > 1e-3
    for before, after in zip(gradients[0]["decoder"], gradients[1]["decoder"], strict=True):
        assert torch.equal(after, before)


def test_independence_is_of_latents_that_are_not_lent() -> None:
    with pytest.raises(ConfigError, match="lend some, or leave it out"):
        IntrospectiveStep(build(), VAE(), independence=1.0)
    with pytest.raises(ConfigError, match="independence is -1"):
        IntrospectiveStep(build(), VAE(), lent=2, independence=-1.0)
    with pytest.raises(ConfigError, match="take paired, or leave it out"):
        FitConfig(independence=1.0)
    with pytest.raises(ConfigError, match="independence is -1"):
        FitConfig(paired=True, independence=-1.0)


def test_a_run_s_independence_reaches_its_step() -> None:
    settings: dict[str, Any] = {"network": "tiny-disentangled", "latent_dim": 4, "batch_size": 16, "steps": 1}
    trainer = Trainer(FitConfig(**settings, paired=True, independence=3.0), pictures())
    assert trainer.players.independence == 3.0  # pyright: ignore[reportAttributeAccessIssue]


def test_lending_needs_groups_and_whole_batches() -> None:
    model = build()
    with pytest.raises(DataError, match="give the step the group of each sample"):
        IntrospectiveStep(model, SoftIntroVAE(), lent=2)(images(6))
    two = Alone()
    two.count = 2  # pyright: ignore[reportAttributeAccessIssue]
    for settings in ({"accumulation": 2}, {"peers": two}):
        with pytest.raises(ConfigError, match="take accumulation 1 and one process"):
            IntrospectiveStep(model, SoftIntroVAE(), lent=2, **settings)  # pyright: ignore[reportArgumentType]


def test_the_log_tells_all_of_the_kl() -> None:
    model, noise = build(), Noise.draw(6, 5, torch.Generator().manual_seed(3))
    full = model.encode(images(6)).kl().mean().detach()
    record = IntrospectiveStep(model, SoftIntroVAE(beta_neg=1.0), lent=2)(images(6), noise, condition=GROUPS)
    torch.testing.assert_close(record["kl_real"], full)


# --- training


def pictures(n: int = 240) -> ArrayData:
    """Red (class 1) and blue squares at the top left or the bottom right (the content) of black images."""
    generator = np.random.default_rng(0)
    red, top = generator.integers(0, 2, n), generator.integers(0, 2, n)
    x = np.zeros((n, 8, 8, 3), dtype=np.uint8)
    for i in range(n):
        at = slice(0, 4) if top[i] else slice(4, 8)
        x[i, at, at, 0 if red[i] else 2] = 200 + generator.integers(0, 40)
    return from_array(x, labels=red)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as files, in a folder for each class."""
    folder, data = tmp_path_factory.mktemp("squares"), pictures()
    assert data.train.labels is not None
    for i, (image, label) in enumerate(zip(data.train.tensor(), data.train.labels.tolist(), strict=True)):
        path = folder / ("red" if label else "blue") / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        to_pil(image).save(path)
    return folder


@pytest.fixture(scope="module")
def paired(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = FitConfig(
        data=str(folder),
        objective=VAE(beta_kl=0.3),
        network="disentangled",
        network_options={"channels": [16], "hidden": 32, "class_dim": 2},
        latent_dim=4,
        paired=True,
        batch_size=32,
        steps=400,
        lr=3e-3,
        ema=0.9,
        out=str(tmp_path_factory.mktemp("paired") / "run"),
    )
    return fit(config, progress=False)


def test_a_paired_run_puts_the_class_into_the_class_latents_and_nothing_else(paired: Run) -> None:
    model, train = paired.model(), pictures().train
    assert model.classes is None
    red, blue = (train.tensor()[train.labels == label][:12] for label in (1, 0))
    at_top = (blue[:, 2, :4, :4].mean(dim=(1, 2)) > 0.5).tolist()
    assert 0 < sum(at_top) < 12
    seen = translate(model, red, blue).mean(dim=0)  # all red ones, shown as each blue one
    for image, top in zip(seen, at_top, strict=True):
        at, other = (slice(0, 4), slice(4, 8)) if top else (slice(4, 8), slice(0, 4))
        assert image[0, at, at].mean() > 0.6  # red, where the blue square was
        assert image[2, at, at].mean() < 0.2
        assert image[:, other, other].mean() < 0.2


def test_a_paired_run_is_repeated_and_resumed_exactly(tmp_path: Path) -> None:
    def trainer() -> Trainer:
        settings: dict[str, Any] = {"network": "tiny-disentangled", "latent_dim": 4, "batch_size": 16, "steps": 8}
        return Trainer(FitConfig(**settings, paired=True), pictures())

    def on(of: Trainer, steps: int) -> Trainer:
        with of.feed:
            for _ in range(steps):
                of._one_step()
        return of

    whole, again, half = on(trainer(), 8), on(trainer(), 8), on(trainer(), 4)
    rest = trainer()
    rest.load_state_dict({**half.state_dict(), "step": half.step_index}, tmp_path)
    on(rest, 4)
    for other in (again, rest):
        for a, b in zip(whole.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"network": "tiny-conv"}, "does not tell class from content"),
        ({"conditional": True}, "paired and conditional do not go together"),
        ({"accumulation": 2}, "paired and accumulation do not go together"),
        ({"objective": "WGANGP"}, "WGANGP cannot lend latents: leave paired out"),
        ({"data": "density:rings", "network": "mlp"}, "has no classes: leave paired out"),
    ],
)
def test_what_paired_does_not_go_with(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    base: dict[str, Any] = {"network": "tiny-disentangled", "latent_dim": 4, "steps": 2, "out": str(tmp_path / "run")}
    data = None if "data" in settings else pictures()

    def start() -> None:
        fit(FitConfig(**{**base, "paired": True, **settings}), data=data, progress=False)

    with pytest.raises((ConfigError, DataError), match=message):
        start()


def test_unlabelled_data_are_told_so(tmp_path: Path) -> None:
    config = FitConfig(network="tiny-disentangled", paired=True, steps=2, out=str(tmp_path / "run"))
    with pytest.raises(DataError, match="or leave paired out"):
        fit(config, data=from_array(np.zeros((100, 8, 8, 3), dtype=np.uint8)), progress=False)


# --- translation


def test_translated_images_have_the_class_of_the_row_and_the_content_of_the_column() -> None:
    model = build().eval()
    a, b = images(2), images(3).flip(0)
    found = translate(model, a, b)
    first = class_dim(model.encoder)
    with torch.no_grad():
        for i in range(2):
            for j in range(3):
                z = torch.cat(
                    [model.encode(a[i : i + 1]).mean[:, :first], model.encode(b[j : j + 1]).mean[:, first:]], 1
                )
                torch.testing.assert_close(found[i, j], model.decode(z)[0])
    same = translate(model, a, a)
    torch.testing.assert_close(torch.stack([same[0, 0], same[1, 1]]), model.reconstruct(a))


def test_models_that_cannot_translate() -> None:
    with pytest.raises(ConfigError, match="does not tell class from content"):
        translate(IntrospectiveVAE.build((3, 8, 8), "tiny-conv", 4), images(1, (3, 8, 8)), images(1, (3, 8, 8)))
    told = IntrospectiveVAE.build((3, 8, 8), "tiny-disentangled", 4, classes=3)
    with pytest.raises(ConfigError, match="introvae sample --label"):
        translate(told, images(1, (3, 8, 8)), images(1, (3, 8, 8)))
    with pytest.raises(DataError, match="no samples"):
        translate(build(), images(0), images(1))


def test_the_command_draws_a_sheet_of_files_and_folders(
    paired: Run, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    red = shutil.copytree(folder / "red", tmp_path / "red")
    names = sorted(path.name for path in red.iterdir())
    (red / "0 broken.png").write_bytes(b"no image")
    run, single = str(paired.folder), str(next((folder / "blue").iterdir()))
    cli_explore.translate([run, single, str(red), "-n", "2", "-o", str(tmp_path / "x.npy")])
    assert f"shown as {names[0]}, {names[1]}" in capsys.readouterr().out
    found = torch.from_numpy(np.load(tmp_path / "x.npy")).unflatten(0, (2, 3))
    (a, _), (b, _) = (read_samples(paired.model(), files) for files in ([single], [str(red / n) for n in names[:2]]))
    assert torch.equal(found[0, 1:], b)
    assert torch.equal(found[1, 0], a[0])
    torch.testing.assert_close(found[1, 1:], translate(paired.model(), a, b)[0])
    cli_explore.translate([run, str(red), single, "-o", str(tmp_path / "x.png")])
    with Image.open(tmp_path / "x.png") as sheet:
        assert sheet.height > 9 * 8  # the head and 8 of the folder
    for path in red.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"red has no sample that can be read \(0 broken.png: .*\): give another"):
        cli_explore.translate([run, str(red), single, "-o", str(tmp_path / "y.png")])


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli_explore.translate(["--help"])
    assert stop.value.code == 0
    assert "introvae translate runs/" in capsys.readouterr().out
