"""What networks do in place or compute twice changes no value and no gradient, and saves the memory it is for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from introvae import (
    VAE,
    ASIntroVAE,
    ConfigError,
    IntrospectiveStep,
    IntrospectiveVAE,
    IntroVAE,
    Noise,
    Objective,
    Run,
    SoftIntroVAE,
    fit,
    register_network,
)
from introvae.networks import list_networks, use_gradient_checkpointing
from introvae.networks.blocks import NORM_PLACES, NORMS, ResidualBlock, Stages, activated, make_norm

SOFT: dict[str, Any] = {"beta_rec": 0.7, "beta_kl": 0.4, "beta_neg": 1.9}
OBJECTIVES: dict[str, Objective] = {
    "vae": VAE(beta_kl=0.5),
    "introvae": IntroVAE(beta=0.6, margin=2.0),
    "soft": SoftIntroVAE(**SOFT),
    "soft-gamma": SoftIntroVAE(**SOFT, gamma_r=1.0),
    "soft-gamma-official": SoftIntroVAE(**SOFT, gamma_r=1.0, variant="official_code"),
    "as-real": ASIntroVAE(**SOFT, contrast="real-sample"),
}


def build(seed: int = 0, side: int = 16, **options: Any) -> IntrospectiveVAE:
    torch.manual_seed(seed)
    return IntrospectiveVAE.build((1, side, side), "conv", 3, **{"channels": [6, 8], **options})


def checkpointed(model: IntrospectiveVAE) -> IntrospectiveVAE:
    twin = copy.deepcopy(model)
    use_gradient_checkpointing(twin.encoder)
    use_gradient_checkpointing(twin.decoder)
    return twin


def batch(side: int = 16, n: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Noise]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 1, side, side, generator=generator).to(dtype), Noise.draw(n, 3, generator, dtype=dtype)


def gradients(step: IntrospectiveStep) -> dict[str, list[Tensor]]:
    """Each player's at the moment its optimiser steps."""
    seen: dict[str, list[Tensor]] = {}
    players = {
        "encoder": (step.encoder_optimizer, step.encoder_params),
        "decoder": (step.decoder_optimizer, step.decoder_params),
    }
    for name, (optimizer, params) in players.items():

        def hook(*_: Any, name: str = name, params: list[nn.Parameter] = params) -> None:
            seen[name] = [p.grad.clone() for p in params if p.grad is not None]
            assert len(seen[name]) == len(params)

        optimizer.register_step_pre_hook(hook)
    return seen


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-12) -> None:
    assert ours.dtype == theirs.dtype
    assert (ours - theirs).detach().abs().max() <= tolerance * max(1.0, float(theirs.detach().abs().max()))


# --- in place


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_activated_equals_its_formula(norm: str, channels_last: bool, skipped: bool, training: bool) -> None:
    torch.manual_seed(0)
    layer = make_norm(norm, 6).double().train(training)
    for p in layer.parameters():
        nn.init.normal_(p)
    for buffer in layer.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    plain = copy.deepcopy(layer)
    form = torch.channels_last if channels_last else torch.contiguous_format
    x, skip, weight = (torch.randn(4, 6, 5, 5, dtype=torch.float64).to(memory_format=form) for _ in range(3))

    def outcome(compute: Any, layer: nn.Module) -> tuple[Tensor, list[Tensor]]:
        leaves = [x.clone().requires_grad_(), skip.clone().requires_grad_()]
        given = [2 * leaf for leaf in leaves]  # as from a layer before: a leaf cannot be overwritten
        kept = given[1].detach().clone()
        y = compute(layer, given[0], given[1] if skipped else None)
        assert torch.equal(given[1], kept)
        wanted = [leaves[0], *([leaves[1]] if skipped else []), *layer.parameters()]
        return y, list(torch.autograd.grad((weight * y).sum(), wanted))

    def formula(layer: nn.Module, x: Tensor, skip: Tensor | None) -> Tensor:
        h = layer(x)
        return F.leaky_relu(h if skip is None else h + skip, 0.2)

    (y, ours), (expected, theirs) = outcome(activated, layer), outcome(formula, plain)
    assert (y < 0).any()
    assert (y > 0).any()
    assert_close(y, expected)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert b.any()
        assert_close(a, b)
    for a, b in zip(layer.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("place", NORM_PLACES)
@pytest.mark.parametrize("widths", [(6, 6), (6, 4)])
def test_a_block_leaves_its_input_alone_and_has_its_numeric_gradients(
    norm: str, place: str, widths: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    block = ResidualBlock(*widths, norm, place).double()
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    before = x.detach().clone()
    with torch.no_grad():
        block(x)
    assert torch.equal(x, before)
    assert torch.autograd.gradcheck(block, (x,))


def stored(run: Any) -> int:
    """Bytes that the forward pass `run()` keeps for the backward pass, beside leaves (weights and inputs)."""
    kept: dict[int, int] = {}
    leaves: set[int] = set()

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if x.is_leaf:
            leaves.add(storage.data_ptr())
        kept[storage.data_ptr()] = storage.nbytes()
        alive.append(x)  # so that no address is used twice
        return x

    alive: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        alive.append(run())
    return sum(size for address, size in kept.items() if address not in leaves)


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_in_place_activations_are_not_kept_twice(norm: str) -> None:
    layer = make_norm(norm, 8)
    x = torch.randn(4, 8, 16, 16).to(memory_format=torch.channels_last).requires_grad_()
    skip = torch.randn_like(x)

    def plain() -> Tensor:
        return F.leaky_relu(layer(x * 1.0) + skip, 0.2)

    one = x.nbytes
    kept = stored(lambda: activated(layer, x * 1.0, skip))
    assert 2 * one <= kept <= 2.3 * one  # the normalisation's input and the activation
    assert stored(plain) >= kept  # a sum's result is kept in place of the activation: as much, but one more was made


# --- computed twice


@pytest.mark.parametrize("share", [True, False], ids=["shared", "recomputed"])
@pytest.mark.parametrize("options", [{}, {"norm": "group", "stride": 2, "coarse": 4}, {"norm": "none"}], ids=str)
@pytest.mark.parametrize("case", [*OBJECTIVES, "warming"])
def test_checkpointing_changes_no_loss_and_no_gradient(case: str, options: dict[str, Any], share: bool) -> None:
    model = build(**options).double()
    objective = OBJECTIVES.get(case, SoftIntroVAE(**SOFT))
    values = {name: torch.tensor(value).double() for name, value in objective.values(0.06).items()}
    found = []
    for used in (checkpointed(model), model):
        step = IntrospectiveStep(used, objective, share=share)
        seen = gradients(step)
        records = [step(*batch(), values, warming=case == "warming") for _ in range(2)]
        found.append((records[0], records[1], seen))
    for ours, theirs in zip(found[0][:2], found[1][:2], strict=True):
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            assert_close(ours[name], value)
    for player in ("encoder", "decoder"):
        for a, b in zip(found[0][2][player], found[1][2][player], strict=True):
            assert_close(a, b)


def test_checkpointing_in_bf16_changes_nothing_either() -> None:
    finals = []
    model = build()
    for used in (checkpointed(model), model):
        step = IntrospectiveStep(used, SoftIntroVAE(**SOFT, gamma_r=1.0), precision="bf16")
        for _ in range(3):
            step(*batch(dtype=torch.float32))
        finals.append(torch.cat([p.detach().flatten() for p in step.model.parameters()]))
    assert_close(*finals, tolerance=1e-6)


def test_checkpointing_updates_a_batch_normalisation_s_statistics_once() -> None:
    model = build(norm="batch").double()
    twin = checkpointed(model)
    for used in (model, twin):
        IntrospectiveStep(used, VAE(), lr=1e-3)(*batch())
    for (name, ours), theirs in zip(twin.named_buffers(), model.buffers(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12), name


def test_checkpointing_keeps_a_fraction() -> None:
    model = build(side=32, channels=[8, 8, 8])
    twin = checkpointed(model)
    x = torch.rand(4, 1, 32, 32)
    z = torch.randn(4, 3)
    for one, other, given in ((twin.encoder, model.encoder, x), (twin.decoder, model.decoder, z)):
        ours, theirs = (
            stored(lambda network=network, given=given: network(given.clone().requires_grad_()))
            for network in (one, other)
        )
        assert 0 < ours < 0.4 * theirs


def test_checkpointing_computes_stages_again_only_where_there_are_gradients() -> None:
    model = checkpointed(build())
    calls: list[int] = []
    model.encoder.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))  # pyright: ignore
    with torch.no_grad():
        model.encode(batch(dtype=torch.float32)[0])
    assert len(calls) == 1
    model.encode(batch(dtype=torch.float32)[0]).kl().sum().backward()
    assert len(calls) == 3


def test_networks_without_stages_are_refused() -> None:
    for name, shape in (("mlp", (2,)), ("tiny-mlp", (1, 8, 8))):
        model = IntrospectiveVAE.build(shape, name, 2)
        with pytest.raises(ConfigError, match="MLPEncoder has no stages to forget: take gradient_checkpointing false"):
            use_gradient_checkpointing(model.encoder)
    use_gradient_checkpointing(model := nn.Sequential(Stages(), nn.Linear(2, 2)))
    assert model[0].gradient_checkpointing
    assert not Stages().gradient_checkpointing


def digits(out: Path, **settings: Any) -> Run:
    base: dict[str, Any] = {"data": "digits", "network": "tiny-conv", "batch_size": 16, "steps": 6, "log_every": 1}
    base |= {"objective": SoftIntroVAE(**SOFT), "precision": "float32", "recipe": "none", "progress": False}
    return fit(**{**base, "out": str(out), **settings})


def test_a_run_with_checkpointing_equals_one_without(tmp_path: Path) -> None:
    plain = digits(tmp_path / "plain")
    run = digits(tmp_path / "run", gradient_checkpointing=True)
    assert run.config().gradient_checkpointing
    for ours, theirs in zip(run.model().parameters(), plain.model().parameters(), strict=True):
        assert_close(ours, theirs, tolerance=1e-6)
    for ours, theirs in zip(run.log(), plain.log(), strict=True):
        numbers = {k: v for k, v in theirs.items() if isinstance(v, float) and not k.startswith("seconds")}
        assert {k: ours[k] for k in numbers} == pytest.approx(numbers, rel=1e-5)
    with pytest.raises(ConfigError, match="no stages"):
        digits(tmp_path / "mlp", network="mlp", gradient_checkpointing=True)
    assert not (tmp_path / "mlp").exists()


def test_a_network_of_one_s_own_with_stages_can_forget_them() -> None:
    class Encoder(Stages):
        def __init__(self, shape: tuple[int, ...], latent_dim: int) -> None:
            super().__init__()
            self.layer = nn.Linear(shape[0], 2 * latent_dim)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.stage(self.layer, x).chunk(2, 1)

    def builder(shape: tuple[int, ...], latent_dim: int) -> tuple[nn.Module, nn.Module]:
        return Encoder(shape, latent_dim), nn.Linear(latent_dim, shape[0])

    if "stages-for-this-test" not in list_networks():
        register_network("stages-for-this-test", builder)
    model = IntrospectiveVAE.build((4,), "stages-for-this-test", 2)
    use_gradient_checkpointing(model.encoder)
    model.encode(torch.rand(3, 4)).kl().sum().backward()
    assert model.encoder.layer.weight.grad.any()  # pyright: ignore


# --- large images


@pytest.mark.parametrize(
    ("side", "widths"),
    [
        (256, [64, 128, 256, 512, 512, 512]),
        (512, [32, 64, 128, 256, 512, 512, 512]),
        (1024, [16, 32, 64, 128, 256, 512, 512, 512]),
    ],
)
def test_conv_widens_large_images_from_their_published_start(side: int, widths: list[int]) -> None:
    with torch.device("meta"):
        model = IntrospectiveVAE.build((3, side, side), "conv", 512)
    encoder, decoder = model.encoder, model.decoder
    assert encoder.stem.weight.shape == (widths[0], 3, 5, 5)  # pyright: ignore
    assert decoder.head.weight.shape == (3, widths[0], 5, 5)  # pyright: ignore
    assert [block.conv2.out_channels for block in encoder.blocks] == [*widths[1:], 512]  # pyright: ignore
    assert [block.conv1.in_channels for block in decoder.blocks] == [512, *reversed(widths)]  # pyright: ignore
    assert encoder.head.weight.shape == (2 * 512, 512 * 4 * 4)  # pyright: ignore
    assert decoder.stem.weight.shape == (512 * 4 * 4, 512)  # pyright: ignore


def test_conv_refuses_images_beyond_those() -> None:
    with pytest.raises(ConfigError, match=r"a square side of .*512, .*1024, .*1792 pixels; resize with --size"):
        IntrospectiveVAE.build((3, 2048, 2048), "conv", 2)
    with torch.device("meta"):
        halved = IntrospectiveVAE.build((3, 2048, 2048), "conv", 2, stride=2)
    assert halved.encoder.stem.out_channels == 16  # pyright: ignore
