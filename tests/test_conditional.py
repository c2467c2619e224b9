"""Class-conditional models: both networks know each sample's class, from the data to what a user draws."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import textbook
from commands import Command, Refused
from introvae import (
    AGE,
    VAE,
    WGANGP,
    ASIntroVAE,
    ConfigError,
    DataError,
    FitConfig,
    IntrospectiveStep,
    IntrospectiveVAE,
    IntroVAE,
    Noise,
    Objective,
    Run,
    SoftIntroVAE,
    Warmup,
    evaluate,
    fit,
    from_array,
)
from introvae.capture import EAGER_STEPS, CapturedStep
from introvae.classes import Classes, named, samples_of
from introvae.data import ArrayData, DataOptions, load_data
from introvae.errors import CheckpointError
from introvae.networks import build_network, use_gradient_checkpointing
from introvae.networks.conditional import SIDE, Conditional, ConditionalEncoder
from introvae.parallel import Alone
from introvae.step import step_class
from introvae.training.feed import Feed
from introvae.training.growing import Growth
from introvae.training.loop import Trainer
from introvae.training.planner import Plan
from introvae.training.preview import preview
from introvae.training.resolve import classes_of
from lockstep import in_lockstep
from test_capture import Recorder, gpu
from test_runs import assert_same, assert_same_run, last_state, rewound
from test_step import AS_C, CASES, LR, assert_equals, capture, count_calls

K, Z, N = 3, 3, 4
NETWORKS: dict[str, tuple[tuple[int, ...], str, dict[str, Any]]] = {
    "mlp": ((2,), "tiny-mlp", {}),
    "conv": ((1, 8, 8), "tiny-conv", {}),
    "conv-batch": ((1, 8, 8), "tiny-conv", {"norm": "batch"}),
    "residual": ((3, 16, 16), "tiny-residual", {}),
    "dcgan": ((1, 8, 8), "tiny-dcgan", {}),
    "style": ((1, 8, 8), "tiny-style", {}),
}
OBJECTIVES: dict[str, Objective] = {
    "vae": VAE(beta_kl=0.5),
    "introvae": IntroVAE(margin=20.0),
    "soft": SoftIntroVAE(beta_neg=2.0, gamma_r=0.5),
    "bootstrap": SoftIntroVAE(beta_neg=2.0, gamma_r=0.5, target_every=2),
    "as": ASIntroVAE(beta_neg=2.0, contrast="real-sample"),
    "age": AGE(),
    "wgan-gp": WGANGP(n_critic=1),
}
GIVEN = torch.tensor([2, 0, 0, 2])
"""Classes of a batch; the second one is not in it."""
TINY: dict[str, Any] = {"batch_size": 8, "steps": 6, "log_every": 1, "image_every": 0, "progress": False}


def build(network: str = "mlp", classes: int | list[str] | None = K, seed: int = 0) -> IntrospectiveVAE:
    shape, name, options = NETWORKS[network]
    torch.manual_seed(seed)
    model = IntrospectiveVAE.build(shape, name, Z, classes=classes, **options).double()
    for p in model.parameters():
        p.data.mul_(1.0 if network == "style" else 1.5)  # whose log-variances would leave their bounds
    return model


def table(player: nn.Module) -> Tensor:
    """The learned rows of the classes, `[K, D]`."""
    assert isinstance(player, Conditional)
    return player.labels.weight


def inner(player: nn.Module) -> nn.Module:
    """The network that knows of no classes."""
    assert isinstance(player, Conditional)
    return player.network


def unlike(model: IntrospectiveVAE) -> IntrospectiveVAE:
    """The same with images of the classes that are no longer equal."""
    rows = table(model.encoder)
    rows.data.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(4), dtype=rows.dtype))
    return model


def batch(model: IntrospectiveVAE, n: int = N) -> tuple[Tensor, Noise]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, *(model.shape or ()), generator=generator, dtype=torch.float64)
    return x, Noise.draw(n, Z, generator, dtype=torch.float64)


def labelled(n: int = 40, classes: int = K) -> ArrayData:
    """Small vectors with labels, without a picture at the end of a run."""
    generator = np.random.default_rng(0)
    return from_array(generator.normal(size=(n, 5)).astype(np.float32), np.arange(n) % classes)


def write_folder(folder: Path, count: int = 12) -> Path:
    """Dark cats and bright dogs."""
    for name, light in (("cat", 40), ("dog", 200)):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.full((8, 8), light, np.uint8)
            pixels[index % 8] += 20
            Image.fromarray(pixels).save(folder / name / f"{index:02d}.png")
    return folder


# --- the model


@pytest.mark.parametrize("network", list(NETWORKS))
def test_shapes_and_a_batch_of_one_equals_a_batch_of_many(network: str) -> None:
    model = unlike(build(network)).eval()
    x, noise = batch(model)
    posterior, decoded = model.encode(x, GIVEN), model.decode(noise.prior, GIVEN)
    assert posterior.mean.shape == posterior.logvar.shape == (N, Z)
    assert decoded.shape == model.reconstruct(x, GIVEN).shape == x.shape
    assert model.sample(5).shape == model.sample(5, condition=1).shape == (5, *x.shape[1:])
    assert model.interpolate(x, x, steps=3, condition=GIVEN).shape == (N, 3, *x.shape[1:])
    assert model.elbo(x, noise=noise.real, condition=GIVEN).shape == (N,)
    for i in range(N):
        one = slice(i, i + 1)
        assert torch.allclose(model.encode(x[one], GIVEN[one]).mean, posterior.mean[one], atol=1e-10)
        assert torch.allclose(model.decode(noise.prior[one], int(GIVEN[i])), decoded[one], atol=1e-10)


@pytest.mark.parametrize("network", list(NETWORKS))
def test_the_class_matters_to_both_networks(network: str) -> None:
    model = unlike(build(network)).eval()
    x, noise = batch(model)
    assert (model.encode(x, 0).mean - model.encode(x, 1).mean).abs().max() > 1e-4
    assert (model.decode(noise.prior, 0) - model.decode(noise.prior, 1)).abs().max() > 1e-4


@pytest.mark.parametrize("network", list(NETWORKS))
def test_without_classes_nothing_has_changed(network: str) -> None:
    shape, name, options = NETWORKS[network]
    torch.manual_seed(0)
    model = IntrospectiveVAE.build(shape, name, Z, **options)
    torch.manual_seed(0)
    encoder, decoder = build_network(name, shape, Z, options)
    assert_same(dict(model.encoder.state_dict()), dict(encoder.state_dict()))
    assert_same(dict(model.decoder.state_dict()), dict(decoder.state_dict()))
    assert model.config is not None
    assert "classes" not in model.config
    assert model.draw_condition(3) is model.condition_for(None) is None


def test_a_new_encoder_takes_all_classes_alike() -> None:
    model = build("conv")
    x, _ = batch(model)
    assert torch.equal(model.encode(x, 0).mean, model.encode(x, 2).mean)


@pytest.mark.parametrize("side", [4, SIDE, 24])
def test_the_image_of_a_class_fits_images_of_any_side(side: int) -> None:
    encoder = ConditionalEncoder(nn.Identity(), K, (1, 32, 32)).double()
    encoder.labels.weight.data.copy_(torch.arange(K)[:, None].expand(K, SIDE**2))
    found = encoder(x := torch.rand(N, 1, side, side, dtype=torch.float64), GIVEN)
    assert torch.allclose(found, x + GIVEN[:, None, None, None], atol=1e-12)
    found.sum().backward()
    rows = encoder.labels.weight.grad
    assert rows is not None
    assert (rows[[0, 2]] > 0).all()  # every value of a class that was there is seen, and none of the others
    assert (rows[1] == 0).all()


def test_shares_mix_classes() -> None:
    model = unlike(build())
    x, noise = batch(model)
    shares = torch.nn.functional.one_hot(GIVEN, K).double()
    assert torch.allclose(model.encode(x, shares).mean, model.encode(x, GIVEN).mean)
    assert torch.allclose(model.decode(noise.prior, shares), model.decode(noise.prior, GIVEN))
    half = inner(model.decoder)(torch.cat([noise.prior, table(model.decoder)[:2].mean(0).expand(N, -1)], 1))
    assert torch.allclose(model.decode(noise.prior, torch.tensor([[0.5, 0.5, 0.0]]).expand(N, K)), half)


def test_a_way_from_one_class_to_another_begins_and_ends_at_reconstructions() -> None:
    model = unlike(build("conv"))
    a, b = batch(model)[0].split(2)
    ways = model.interpolate(a, b, steps=3, condition=0, end_condition=2)
    assert torch.allclose(ways[:, 0], model.reconstruct(a, 0))
    assert torch.allclose(ways[:, 2], model.reconstruct(b, 2))
    z = (model.encode(a, 0).mode + model.encode(b, 2).mode) / 2
    assert torch.allclose(ways[:, 1], model.decode(z, torch.tensor([[0.5, 0.0, 0.5]] * 2)))


def test_samples_have_classes_as_often_as_the_data() -> None:
    torch.manual_seed(0)
    model = IntrospectiveVAE.build((2,), "tiny-mlp", 2, classes=Classes(("a", "b", "c"), (0, 10, 30)))
    drawn = model.draw_condition(4000, torch.Generator().manual_seed(0))
    assert drawn is not None
    shares = torch.bincount(drawn, minlength=3) / 4000
    assert shares[0] == 0
    assert abs(shares[1] - 0.25) < 0.03  # four standard deviations
    same = torch.Generator().manual_seed(1)
    z, condition = torch.randn(6, 2, generator=same), model.draw_condition(6, same)
    assert torch.equal(model.sample(6, torch.Generator().manual_seed(1)), model.decode(z, condition))
    assert torch.equal(model.sample(6, torch.Generator().manual_seed(1), "b"), model.decode(z, 1))


@pytest.mark.parametrize("network", list(NETWORKS))
def test_save_and_load(network: str, tmp_path: Path) -> None:
    model = unlike(build(network, ["cat", "dog", "bird"])).float().eval()
    model.save_pretrained(tmp_path)
    loaded = IntrospectiveVAE.from_pretrained(tmp_path)
    assert loaded.classes == Classes(("cat", "dog", "bird"), (1, 1, 1))
    x = torch.rand(2, *(model.shape or ()))
    assert torch.equal(loaded.reconstruct(x, "dog"), model.reconstruct(x, 1))
    assert torch.equal(
        loaded.sample(5, torch.Generator().manual_seed(0)), model.sample(5, torch.Generator().manual_seed(0))
    )
    config = json.loads((tmp_path / "config.json").read_text())
    for damaged in ({"names": ["a"]}, {"names": ["a", "b"], "counts": [1]}, [], {"names": "ab", "counts": [1, -1]}):
        (tmp_path / "config.json").write_text(json.dumps({**config, "classes": damaged}))
        with pytest.raises(CheckpointError, match="classes are damaged"):
            IntrospectiveVAE.from_pretrained(tmp_path)


def test_bad_conditions_are_refused() -> None:
    model, plain = build("mlp"), build("mlp", classes=None)
    x, _ = batch(model)
    for call in (model.encode, model.reconstruct, model.decode, model.elbo):
        with pytest.raises(ConfigError, match=r"knows 3 classes: give the condition"):
            call(x)
    with pytest.raises(ConfigError, match="knows no classes"):
        plain.encode(x, GIVEN)
    with pytest.raises(ConfigError, match="knows no classes"):
        plain.sample(2, condition=1)
    for condition in (GIVEN[:2], GIVEN.int(), GIVEN.double(), torch.ones(N, K + 1)):
        with pytest.raises(DataError, match="give a class index for each"):
            model.encode(x, condition)
    for condition in (torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, -1])):
        with pytest.raises(DataError, match="outside of 0 to 2"):
            model.encode(x, condition)
    for name in ("cat", 3, -1):
        with pytest.raises(ConfigError, match="unknown class"):
            model.sample(1, condition=name)
    for classes, message in ((1, "1 class"), ([], "0 class"), ("ab", "their number"), ([1, 2], "list of their names")):
        with pytest.raises(ConfigError, match=message):
            IntrospectiveVAE.build((2,), "tiny-mlp", 2, classes=classes)  # pyright: ignore[reportArgumentType]


def test_labels_of_other_data_find_the_model_s_classes() -> None:
    classes = Classes(("cat", "dog", "bird"), (1, 1, 1))
    labels = torch.tensor([0, 1, 1])
    assert classes.indices(labels).tolist() == [0, 1, 1]
    assert classes.indices(labels, ("bird", "cat", "whale")).tolist() == [2, 0, 0]
    with pytest.raises(DataError, match="no class whale"):
        classes.indices(torch.tensor([2]), ("bird", "cat", "whale"))
    with pytest.raises(DataError, match="1 samples without a class"):
        classes.indices(torch.tensor([0, -1]))
    with pytest.raises(DataError, match="no class labels"):
        classes.indices(None)
    with pytest.raises(DataError, match="go up to 3"):
        classes.indices(torch.tensor([3]))


# --- the step


class Told(nn.Module):
    """A network that knows the classes of every batch of a step."""

    def __init__(self, network: nn.Module, condition: Tensor) -> None:
        super().__init__()
        self.network, self.condition = network, condition

    def forward(self, x: Tensor) -> Any:
        return self.network(x, self.condition.repeat(len(x) // len(self.condition)))


@pytest.mark.parametrize("share", [True, False], ids=["shared", "recomputed"])
@pytest.mark.parametrize(
    ("case", "network"), [*((case, "mlp") for case in CASES), ("soft-gamma1", "conv-batch"), ("as-real", "style")]
)
def test_losses_and_gradients_equal_the_pseudo_code_with_the_class_given(case: str, network: str, share: bool) -> None:
    objective_class, transcription, settings = CASES[case]
    model = unlike(build(network))
    x, noise = batch(model)
    theirs = copy.deepcopy(model)
    objective = objective_class(**settings)
    values = {name: torch.tensor(v, dtype=torch.float64) for name, v in objective.values().items()}
    if "c" in values:
        values["c"] = torch.tensor(AS_C, dtype=torch.float64)
        settings = {**settings, "c": AS_C}
    step = IntrospectiveStep(model, objective, lr=LR, share=share)
    seen = capture(step)
    record = step(x, noise, values, condition=GIVEN)
    told = (Told(theirs.encoder, GIVEN), Told(theirs.decoder, GIVEN))
    expected = textbook.textbook(*told, x, noise, transcription, settings, lr=LR, adam_betas=(0.9, 0.999))
    assert_equals(record, seen, expected)


def trained(
    model: IntrospectiveVAE, objective: Objective, peers: Alone | None = None, parts: int = 1, steps: int = 3
) -> list[Tensor]:
    """The weights after a few steps on this process' rows."""
    model, peers = copy.deepcopy(model), peers or Alone()
    step = step_class(objective)(model, objective, lr=1e-3, peers=peers, accumulation=parts)
    generator, rows = torch.Generator().manual_seed(5), peers.rows(N)
    for _ in range(steps):
        x = torch.rand(N, *(model.shape or ()), generator=generator, dtype=torch.float64)
        noise = Noise.draw(N, Z, generator, dtype=torch.float64)
        condition = torch.randint(K, (N,), generator=generator)
        step(x[rows], noise.rows(rows), condition=condition[rows])
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("network", ["mlp", "conv", "residual", "style"])
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_gradients_reach_the_classes_of_the_batch_and_no_others(name: str, network: str) -> None:
    model = build(network)
    step = step_class(OBJECTIVES[name])(model, OBJECTIVES[name])
    rows = {"encoder": table(model.encoder), "decoder": table(model.decoder)}
    found: dict[str, Tensor] = {}
    for player, optimizer in (("encoder", step.encoder_optimizer), ("decoder", step.decoder_optimizer)):

        def look(*_: Any, player: str = player) -> None:
            gradient = rows[player].grad
            found[player] = torch.zeros_like(rows[player]) if gradient is None else gradient.clone()

        optimizer.register_step_pre_hook(look)
    x, noise = batch(model)
    record = step(x, noise, condition=GIVEN)
    assert all(value.isfinite() for value in record.values())
    for gradient in found.values():
        assert (gradient[[0, 2]].abs().sum(dim=1) > 0).all()
        assert (gradient[1] == 0).all()


def test_a_conditional_step_makes_no_pass_more() -> None:
    model = build("mlp")
    encodes, decodes = count_calls(inner(model.encoder)), count_calls(inner(model.decoder))
    IntrospectiveStep(model, SoftIntroVAE(gamma_r=1.0))(*batch(model), condition=GIVEN)
    assert (encodes, decodes) == ([4, 8, 8], [8, 8, 8])


def test_a_warm_up_is_told_the_classes_too() -> None:
    model = build("conv")
    step = IntrospectiveStep(model, SoftIntroVAE(beta_neg=1.0), warmup=Warmup(1))
    record = step(*batch(model), warming=True, condition=GIVEN)
    assert set(record) == {"rec", "kl_real", "loss_encoder", "loss_decoder"}
    with pytest.raises(ConfigError, match="give the condition"):
        step(*batch(model))


@pytest.mark.parametrize("name", ["vae", "soft", "bootstrap", "wgan-gp"])
def test_parts_of_a_batch_equal_the_whole(name: str) -> None:
    model = unlike(build("conv"))
    for ours, whole in zip(*(trained(model, OBJECTIVES[name], parts=parts) for parts in (2, 1)), strict=True):
        assert (ours - whole).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["soft", "as", "age", "wgan-gp"])
def test_two_processes_train_the_model_that_one_trains(name: str) -> None:
    model = unlike(build("mlp"))
    ours, others = in_lockstep(lambda peers: trained(model, OBJECTIVES[name], peers))
    for weight, other, alone in zip(ours, others, trained(model, OBJECTIVES[name]), strict=True):
        assert torch.equal(weight, other)
        assert (weight - alone).abs().max() < 1e-9


@pytest.mark.parametrize("network", ["conv", "residual", "style"])
def test_forgetful_networks_have_the_same_gradients(network: str) -> None:
    model = unlike(build(network))
    other = copy.deepcopy(model)
    for player in (other.encoder, other.decoder):
        use_gradient_checkpointing(player)
    kept, forgotten = (trained(m, OBJECTIVES["soft"], steps=2) for m in (model, other))
    for ours, theirs in zip(kept, forgotten, strict=True):
        assert (ours - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["vae", "soft", "as"])
def test_a_captured_step_is_told_the_classes_of_each_batch(name: str) -> None:
    recorder, steps = Recorder(), []
    for _ in range(2):
        model = unlike(build("mlp")).float()
        steps.append(IntrospectiveStep(model, OBJECTIVES[name], lr=1e-3, capturable=True))
    plain, captured = steps[0], CapturedStep(steps[1], capture=recorder)
    generator = torch.Generator().manual_seed(0)
    for _ in range(EAGER_STEPS + 4):
        x, noise = torch.rand(N, 2, generator=generator), Noise.draw(N, Z, generator)
        condition = torch.randint(K, (N,), generator=generator)
        kept = condition.clone()
        assert_same(captured(x, noise, condition=condition), plain(x, noise, condition=condition), "record")
        assert torch.equal(condition, kept)
        assert_same(captured.state_dict(), plain.state_dict())
    assert recorder.plays == 4


@gpu
@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_a_gpu_s_graph_reads_the_classes_of_each_batch(network: str) -> None:
    steps = [
        IntrospectiveStep(unlike(build(network)).float().cuda(), OBJECTIVES["soft"], lr=1e-5, capturable=True)
        for _ in range(2)
    ]
    plain, captured = steps[0], CapturedStep(steps[1])
    generator = torch.Generator().manual_seed(0)
    for _ in range(EAGER_STEPS + 6):
        x = torch.rand(N, *NETWORKS[network][0], generator=generator).cuda()
        noise = Noise.draw(N, Z, generator, device="cuda")
        condition = torch.randint(K, (N,), generator=generator).cuda()
        ours, theirs = captured(x, noise, condition=condition), plain(x, noise, condition=condition)
        for name, value in theirs.items():
            assert ours[name].item() == pytest.approx(value.item(), rel=1e-4), name
    assert all(kind.play is not None for kind in captured._kinds.values())


@pytest.mark.parametrize("network", ["conv", "residual", "style"])
def test_a_class_is_not_rounded_where_layers_compute_in_bf16(network: str) -> None:
    model = unlike(build(network)).float()
    step = IntrospectiveStep(model, OBJECTIVES["soft"], precision="bf16")
    x, noise = batch(model)
    record = step(x.float(), noise.map(Tensor.float), condition=GIVEN)
    assert all(value.isfinite() for value in record.values())
    with torch.autocast("cpu", torch.bfloat16):
        shares = torch.nn.functional.one_hot(GIVEN, K).float()
        for player in (model.encoder, model.decoder):
            assert isinstance(player, Conditional)
            assert torch.equal(player.rows(shares), player.rows(GIVEN))
            assert torch.equal(player.rows(GIVEN), table(player)[GIVEN])


def test_a_memory_plan_counts_a_conditional_model() -> None:
    config = FitConfig(network="tiny-conv", latent_dim=Z, batch_size=8, warmup=Warmup(1))
    with_classes, without = (IntrospectiveVAE.build((1, 8, 8), "tiny-conv", Z, classes=c) for c in (1000, None))
    plans = [Plan(config, (1, 8, 8), model, "float32").step_bytes(8) for model in (with_classes, without)]
    assert plans[0] > plans[1] + 4 * 1000 * 64 * 4  # weights, their average and Adam's two moments


@pytest.mark.slow
def test_a_conditional_step_with_the_published_widths_at_128_pixels() -> None:
    torch.manual_seed(0)
    model = IntrospectiveVAE.build((3, 128, 128), "conv", 128, classes=10)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = IntrospectiveStep(model, SoftIntroVAE(beta_kl=0.5, beta_neg=256.0))
    record = step(torch.rand(2, 3, 128, 128), condition=torch.tensor([7, 2]))
    assert all(value.isfinite() for value in record.values())
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
        assert (p != before[name]).any(), name
    z = torch.randn(1, 128).expand(2, -1)
    of_seven, of_two = model.decode(z, torch.tensor([7, 2]))
    assert (of_seven - of_two).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["vae", "soft"])
def test_it_learns_what_the_classes_are(name: str) -> None:
    """Two Gaussians a hand's breadth apart: after 400 small steps nearly all samples are of the class asked for."""
    torch.manual_seed(0)
    objective = {"vae": VAE(beta_kl=0.2), "soft": SoftIntroVAE(beta_kl=0.2, beta_neg=1.0)}[name]
    means = torch.tensor([[-1.0, 0.5], [1.0, -0.5]])
    model = IntrospectiveVAE.build((2,), "tiny-mlp", 2, classes=2)
    step, generator = IntrospectiveStep(model, objective, lr=2e-3), torch.Generator().manual_seed(1)

    def right() -> float:
        asked = torch.arange(1000) % 2
        samples = model.sample(1000, torch.Generator().manual_seed(2), asked)
        return (torch.cdist(samples, means).argmin(dim=1) == asked).double().mean().item()

    before = right()
    for _ in range(400):
        condition = torch.randint(2, (64,), generator=generator)
        x = means[condition] + 0.4 * torch.randn(64, 2, generator=generator)
        step(x, Noise.draw(64, 2, generator), condition=condition)
    assert before < 0.7
    assert right() > 0.9


# --- data and runs


@pytest.mark.parametrize("stream", ["never", "always"])
@pytest.mark.parametrize("rows", [slice(0, 6), slice(3, 6)])
def test_labels_come_with_their_images(tmp_path: Path, stream: str, rows: slice) -> None:
    data = load_data(write_folder(tmp_path / "pets"), DataOptions(stream=stream))
    assert isinstance(data, ArrayData)
    feed = Feed(data.batches(6, seed=0), Z, 1, torch.device("cpu"), rows, flip=True, classes=2)
    plain = Feed(data.batches(6, seed=0), Z, 1, torch.device("cpu"), rows, flip=True)
    with feed:
        for _ in range(7):  # into the third epoch
            x, noise, condition = feed.next()
            assert condition is not None
            assert torch.equal(condition, (x.mean(dim=(1, 2, 3)) > 0.5).long())
            other = plain.next()
            assert torch.equal(x, other.x)
            assert torch.equal(noise.prior, other.noise.prior)
            assert other.condition is None


def test_an_unknown_label_in_a_stream_is_met_before_the_run(tmp_path: Path) -> None:
    """Also a single one, which the held-out part does not show."""
    folder = write_folder(tmp_path / "pets", 30)
    (folder / "cat/00.png").rename(folder / "00.png")  # beside the folders of the classes
    settings = {"conditional": True, "stream": "always", "network": "tiny-conv", "recipe": "none", **TINY}
    with pytest.raises(DataError, match=r"1 samples of .* have no class: label them"):
        fit(data=folder, out=str(tmp_path / "run"), **settings)
    assert not (tmp_path / "run").exists()


def test_a_strange_label_that_a_feed_meets_has_its_reason(tmp_path: Path) -> None:
    data = load_data(write_folder(tmp_path / "pets"), DataOptions(stream="always"))
    assert isinstance(data, ArrayData)
    feed = Feed(data.batches(20, seed=0), Z, 1, torch.device("cpu"), slice(0, 20), classes=1)
    with pytest.raises(DataError, match="class 1, and the model knows 0 to 0"):
        feed.next()


def test_classes_of_a_stream_are_as_frequent_as_in_its_training_part(tmp_path: Path) -> None:
    """Thrice as many cats as dogs, and but two pictures held out."""
    folder = write_folder(tmp_path / "pets", 30)
    for path in sorted((folder / "dog").iterdir())[10:]:
        path.unlink()
    config = FitConfig(conditional=True)
    kept, data = (load_data(folder, DataOptions(stream=s, heldout=0.05, cache=False)) for s in ("never", "always"))
    assert isinstance(data, ArrayData)
    assert data.heldout.labels is not None
    cats = 30 - int((data.heldout.labels == 0).sum())
    found, whole = classes_of(config, data), classes_of(config, kept)
    assert found == Classes(("cat", "dog"), (cats, 38 - cats))
    assert whole is not None
    assert sum(whole.counts) == 38
    assert classes_of(FitConfig(), data) is None


def test_classes_of_the_data() -> None:
    config = FitConfig(conditional=True)
    data = labelled(41)
    found = classes_of(config, data)
    assert data.train.labels is not None
    assert found == Classes(("0", "1", "2"), tuple(torch.bincount(data.train.labels).tolist()))
    assert classes_of(FitConfig(), data) is None
    digits = classes_of(config, load_data("digits"))
    assert digits is not None
    assert digits.names == tuple("0123456789")
    assert abs(sum(digits.shares) - 1) < 1e-12


def test_data_without_classes_are_refused(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    y = np.arange(20) % 2
    cases: list[tuple[Any, str]] = [
        ("density:rings", "has no classes"),
        (from_array(x), "have no classes: .* --label"),
        (from_array(x, np.where(y == 0, -1, 0)), "have no class: label them"),
        (from_array(x, 0 * y), "label two at least"),
        (from_array(x, y * 10**9), "number the classes from 0"),
    ]
    for data, message in cases:
        with pytest.raises((ConfigError, DataError), match=message):
            fit(data=data, conditional=True, network="tiny-mlp", recipe="none", out=str(tmp_path / "run"), **TINY)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": SoftIntroVAE(beta_neg=4.0), "warmup": Warmup(2), "flip": False},
        {"objective": WGANGP(n_critic=2)},
        {"objective": VAE(), "accumulation": 2},
    ],
    ids=lambda settings: type(settings["objective"]).__name__,
)
def test_resuming_equals_going_on(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = {**TINY, "network": "tiny-mlp", "recipe": "none", "conditional": True, "checkpoint_every": 4, **settings}
    whole = fit(data=labelled(), out=str(tmp_path / "whole"), **base)
    resumed = rewound(whole, tmp_path / "resumed", checkpoint=-2)
    assert last_state(resumed)["step"] == 4
    fit(resume=resumed.folder, data=labelled(), progress=False)
    assert_same_run(resumed, whole)
    model = whole.model()
    assert model.classes == classes_of(whole.config(), labelled())
    moved = table(model.decoder), table(model.encoder)
    assert all(rows.isfinite().all() and rows.abs().sum() > 0 for rows in moved)


def test_a_conditional_style_network_grows_and_resumes(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (24, 1, 16, 16), dtype=np.uint8)
    data = from_array(x, np.arange(24) % 2)
    settings: dict[str, Any] = {
        "network": "tiny-style",
        "latent_dim": Z,
        "batch_size": 4,
        "log_every": 1,
        "steps": None,
    }
    settings |= {"objective": SoftIntroVAE(beta_neg=4.0), "growing": Growth(samples=8, fade=4), "image_every": 0}
    settings |= {"conditional": True, "recipe": "none", "progress": False, "checkpoint_every": 4, "lr": 1e-3}
    whole = fit(data=data, out=str(tmp_path / "whole"), **settings)
    assert [row["side"] for row in whole.log()] == [4] * 2 + [8] * 3 + [16] * 3
    resumed = rewound(whole, tmp_path / "resumed", checkpoint=-2)
    assert last_state(resumed)["step"] == 4  # in the midst of the second level
    fit(resume=resumed.folder, data=data, progress=False)
    assert_same_run(resumed, whole)
    assert whole.model().sample(2, condition=1).shape == (2, 1, 16, 16)


def test_a_recipe_s_file_and_the_command_line_know_the_setting() -> None:
    assert "conditional: true" in FitConfig(conditional=True).to_yaml()
    trainer = Trainer(FitConfig(data="digits", network="tiny-conv", conditional=True, steps=2))
    assert trainer.model.classes is not None
    assert trainer.feed.next().condition is not None


# --- pictures and commands


@pytest.mark.parametrize(("classes", "columns"), [(2, 16), (3, 15), (10, 10), (16, 16), (20, 16)])
def test_every_column_of_a_picture_is_of_one_class(classes: int, columns: int) -> None:
    known = Classes.of(classes)
    assert known.columns(16) == columns
    order = known.in_turn(2 * columns)
    if classes <= 16:
        assert torch.equal(order[:columns], order[columns:])
    assert order[: min(classes, 32)].tolist() == list(range(min(classes, 32)))


def test_classes_that_do_not_occur_are_not_drawn_in_turn() -> None:
    known = Classes(("a", "b", "c"), (4, 0, 2))
    assert known.in_turn(5).tolist() == [0, 2, 0, 2, 0]
    assert known.columns(7) == 6


def test_the_preview_of_a_conditional_model(tmp_path: Path) -> None:
    """Samples that are as bright as their class is high: the picture shows them from left to right."""

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, z: Tensor, condition: Tensor) -> Tensor:
            return (condition / 9)[:, None, None, None].expand(-1, 1, 8, 8) + 0 * z.sum()

    encoder = ConditionalEncoder(build_network("tiny-conv", (1, 8, 8), Z)[0], 10, (1, 8, 8))
    model = IntrospectiveVAE(encoder, Decoder(), Z, classes=10)
    data = load_data("digits")
    path = preview(model, data, tmp_path / "picture.png")
    assert path is not None
    picture = np.asarray(Image.open(path).convert("L"))
    cell = 50
    assert picture.shape[1] == 10 * cell + 2
    last = picture[-cell // 2, cell // 2 :: cell][:10]
    assert np.allclose(last, np.arange(10) / 9 * 255, atol=1)


def test_labels_of_commands() -> None:
    classes = Classes.of(["cat", "dog", "0"])
    assert named(None, [], 3) is None
    assert named(classes, ["0"], 2).tolist() == [2, 2]  # pyright: ignore[reportOptionalMemberAccess] - names come first
    assert named(classes, ["1", "cat"], 2).tolist() == [1, 0]  # pyright: ignore[reportOptionalMemberAccess]
    asked = samples_of(classes, None, 5)
    assert asked.condition is not None
    assert asked.condition.tolist() == [0, 1, 2, 0, 1]
    assert asked.columns == 3
    assert asked.names[1] == "sample_00001_dog.png"
    assert [count for count, _ in asked.parts(2)] == [2, 2, 1]
    assert samples_of(None, None, 2) == (None, ["sample_00000.png", "sample_00001.png"], None)
    assert samples_of(Classes.of(["a/b", "c"]), "a/b", 1).names == ["sample_00000_a-b.png"]
    with pytest.raises(ConfigError, match="2 classes for 3 samples"):
        named(classes, ["cat", "dog"], 3)


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A conditional run on pictures of two classes."""
    folder = tmp_path_factory.mktemp("pets")
    settings = {"network": "tiny-conv", "conditional": True, "recipe": "none", **TINY}
    return fit(data=write_folder(folder / "pets"), out=str(folder / "run"), **settings)


def test_commands_of_a_conditional_run(pets: Run, tmp_path: Path, command: Command) -> None:
    run, cat = pets.folder, sorted((pets.folder.parent / "pets" / "cat").iterdir())[0]
    model = pets.model()
    assert command("sample", run, "-n", 6, "-o", tmp_path / "all.npy").code == 0
    x, generator = np.load(tmp_path / "all.npy"), torch.Generator().manual_seed(0)
    assert np.array_equal(x, model.sample(6, generator, torch.tensor([0, 1, 0, 1, 0, 1])).numpy())
    for label in ("dog", 1):
        assert command("sample", run, "-n", 3, "--label", label, "-o", tmp_path / "dogs.npy").code == 0
        expected = model.sample(3, torch.Generator().manual_seed(0), "dog")
        assert np.array_equal(np.load(tmp_path / "dogs.npy"), expected.numpy())
    assert command("sample", run, "-n", 2, "-o", tmp_path / "single").code == 0
    assert sorted(path.name for path in (tmp_path / "single").iterdir()) == [
        "sample_00000_cat.png",
        "sample_00001_dog.png",
    ]
    image = torch.from_numpy(np.array(Image.open(cat))).float()[None, None] / 255
    assert command("reconstruct", run, cat, cat, "--label", "cat", "dog", "-o", tmp_path / "again.npy").code == 0
    expected = model.reconstruct(image.repeat(2, 1, 1, 1), torch.tensor([0, 1]))
    assert np.array_equal(np.load(tmp_path / "again.npy"), expected.numpy())
    words = ("interpolate", run, cat, cat, "--steps", 3, "--label", "cat", "dog", "-o", tmp_path / "way.npy")
    assert command(*words).code == 0
    expected = model.interpolate(image, image, 3, condition="cat", end_condition="dog")[0]
    assert np.array_equal(np.load(tmp_path / "way.npy"), expected.numpy())


def test_commands_without_the_classes_that_they_need(pets: Run, tmp_path: Path, refused: Refused) -> None:
    run, cat = pets.folder, sorted((pets.folder.parent / "pets" / "cat").iterdir())[0]
    out = ("-o", tmp_path / "x.png")
    assert "give --label" in refused("reconstruct", run, cat, *out)
    assert "give --label" in refused("interpolate", run, cat, cat, *out)
    assert "unknown class 'whale'" in refused("sample", run, "--label", "whale", *out)
    words = ("--network", "tiny-mlp", "--steps", 2, "--out", tmp_path / "plane", "--quiet", "--recipe", "none")
    assert "has no classes" in refused("fit", "--data", "density:rings", "--conditional", "true", *words)
    plain = fit(data="density:rings", network="tiny-mlp", recipe="none", out=str(tmp_path / "plain"), **TINY)
    assert "knows no classes" in refused("sample", plain.folder, "--label", 1, *out)


def test_a_report_gives_held_out_images_their_own_classes(pets: Run) -> None:
    report = evaluate(pets)
    assert {"overview", "samples", "interpolation", "ranked"} <= report["pictures"].keys()
    model, data = pets.model(), load_data(pets.folder.parent / "pets")
    assert isinstance(data, ArrayData)
    x, labels = data.heldout.tensor(), data.heldout.labels
    error = (model.reconstruct(x, labels) - x).square().mean().item()
    assert report["metrics"]["mse"]["value"] == pytest.approx(error, rel=1e-5)
