"""Every objective's losses and gradients equal the papers' pseudo-code, and the laws of the two-player step hold."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import textbook
from introvae import VAE, ASIntroVAE, IntrospectiveStep, IntrospectiveVAE, IntroVAE, Noise, SoftIntroVAE, Warmup
from introvae.errors import ConfigError, DataError

LR, BETAS = 0.01, (0.9, 0.999)
SOFT = {"beta_rec": 0.7, "beta_kl": 0.4, "beta_neg": 1.9}
AS_C = 0.3

CASES = {
    "introvae": (IntroVAE, textbook.introvae, {"beta": 0.6, "alpha": 0.25, "margin": 2.0}),
    "introvae-official": (
        IntroVAE,
        textbook.introvae,
        {"beta": 0.6, "alpha": 0.25, "margin": 2.0, "variant": "official_code"},
    ),
    "soft": (SoftIntroVAE, textbook.soft_introvae, SOFT),
    "soft-gamma1": (SoftIntroVAE, textbook.soft_introvae, {**SOFT, "gamma_r": 1.0}),
    "soft-gamma1-official": (
        SoftIntroVAE,
        textbook.soft_introvae,
        {**SOFT, "gamma_r": 1.0, "variant": "official_code"},
    ),
    "soft-decoder-kl": (SoftIntroVAE, textbook.soft_introvae, {**SOFT, "decoder_kl": 0.3}),
    "as-decoder-kl": (ASIntroVAE, textbook.as_introvae, {**SOFT, "decoder_kl": 0.3}),
    "soft-consistency": (SoftIntroVAE, textbook.soft_introvae, {**SOFT, "consistency": 0.7}),
    "as": (ASIntroVAE, textbook.as_introvae, SOFT),
    "as-joint-weight": (ASIntroVAE, textbook.as_introvae, {**SOFT, "kernel": "joint", "distance_weight": 3.0}),
    "as-real": (ASIntroVAE, textbook.as_introvae, {**SOFT, "contrast": "real-sample"}),
    "as-official": (ASIntroVAE, textbook.as_introvae, {**SOFT, "variant": "official_code"}),
    "as-official-joint-real": (
        ASIntroVAE,
        textbook.as_introvae,
        {**SOFT, "variant": "official_code", "kernel": "joint", "contrast": "real-sample"},
    ),
}
NETWORKS = {
    "mlp": ((2,), "tiny-mlp", {}),
    "conv": ((1, 8, 8), "tiny-conv", {}),
    "conv-group": ((3, 8, 8), "tiny-conv", {"norm": "group"}),
    "conv-batch": ((1, 8, 8), "tiny-conv", {"norm": "batch"}),
}


def build(network: str, seed: int = 0) -> IntrospectiveVAE:
    shape, name, options = NETWORKS[network]
    torch.manual_seed(seed)
    model = IntrospectiveVAE.build(shape, name, latent_dim=3, **options).double()
    for p in model.parameters():  # far enough from the start that no term is negligible
        p.data.mul_(1.5)
    return model


def batch(model: IntrospectiveVAE, n: int = 5) -> tuple[Tensor, Noise]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, *(model.shape or ()), generator=generator, dtype=torch.float64)
    return x, Noise.draw(n, 3, generator, dtype=torch.float64)


def capture(step: IntrospectiveStep) -> dict[str, list[Tensor]]:
    """Gradients of each player at the moment its optimiser steps, and whether the other player had any."""
    seen: dict[str, list[Tensor]] = {}
    players = {"encoder": step.encoder_optimizer, "decoder": step.decoder_optimizer}
    params = {"encoder": step.encoder_params, "decoder": step.decoder_params}

    def hook_for(name: str):
        def hook(*_):
            other = "decoder" if name == "encoder" else "encoder"
            seen[name] = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params[name]]
            seen[f"foreign to {name}"] = [p.grad for p in params[other] if p.grad is not None]

        return hook

    for name, optimizer in players.items():
        optimizer.register_step_pre_hook(hook_for(name))
    return seen


def assert_close(ours: Tensor, theirs: Tensor, scale: Tensor | float = 1.0) -> None:
    """Equal to 1e-10 relative to the largest gradient of the network (or to the value itself)."""
    assert torch.isfinite(ours).all()
    assert (ours - theirs).abs().max() <= 1e-10 * max(float(theirs.abs().max()), float(scale))


def assert_equals(record: dict[str, Tensor], seen: dict[str, list[Tensor]], expected: textbook.Result) -> None:
    """A step's losses, and the gradients that `capture` saw, are the pseudo-code's; no player had the other's."""
    assert_close(record["loss_encoder"], expected.loss_encoder, 0.0)
    assert_close(record["loss_decoder"], expected.loss_decoder, 0.0)
    for player, gradients in (("encoder", expected.encoder), ("decoder", expected.decoder)):
        largest = max(float(g.abs().max()) for g in gradients)
        assert largest > 0
        for ours, g in zip(seen[player], gradients, strict=True):
            # A weight's own gradient, or for weights whose gradient is nearly nothing the network's largest.
            assert_close(ours, g, 1e-3 * largest)
        assert seen[f"foreign to {player}"] == []


@pytest.mark.parametrize("share", [True, False], ids=["shared", "recomputed"])
@pytest.mark.parametrize("network", list(NETWORKS))
@pytest.mark.parametrize("case", list(CASES))
def test_losses_and_gradients_equal_the_pseudo_code(case: str, network: str, share: bool) -> None:
    objective_class, transcription, settings = CASES[case]
    model = build(network)
    x, noise = batch(model)
    theirs = copy.deepcopy(model)
    objective = objective_class(**settings)
    values = {name: torch.tensor(v, dtype=torch.float64) for name, v in objective.values().items()}
    if "c" in values:
        values["c"] = torch.tensor(AS_C, dtype=torch.float64)
        settings = {**settings, "c": AS_C}

    step = IntrospectiveStep(model, objective, lr=LR, adam_betas=BETAS, share=share)
    seen = capture(step)
    record = step(x, noise, values)
    expected = textbook.textbook(
        theirs.encoder, theirs.decoder, x, noise, transcription, settings, lr=LR, adam_betas=BETAS
    )

    assert_equals(record, seen, expected)


@pytest.mark.parametrize("network", list(NETWORKS))
@pytest.mark.parametrize("warming", [True, False])
def test_vae_and_warmup_gradients_equal_their_equation(network: str, warming: bool) -> None:
    model = build(network)
    x, noise = batch(model)
    theirs = copy.deepcopy(model)
    objective = SoftIntroVAE(beta_neg=1.0) if warming else VAE(beta_rec=0.8, beta_kl=0.05)
    step = IntrospectiveStep(model, objective, warmup=Warmup(1, 0.8, 0.05), lr=LR)
    seen = capture(step)
    record = step(x, noise, warming=warming)

    mu, logvar = theirs.encoder(x)
    x_r = theirs.decoder(textbook.latent(mu, logvar, noise.real))
    scale = 1 / x[0].numel() if warming else 1.0
    loss = scale * (0.8 * textbook.rec(x, x_r).mean() + 0.05 * textbook.kl(mu, logvar).mean())
    loss.backward()
    assert_close(record["loss_encoder"], loss.detach())
    for player, module in (("encoder", theirs.encoder), ("decoder", theirs.decoder)):
        for ours, g in zip(seen[player], textbook.gradients(module), strict=True):
            assert_close(ours, g)


@pytest.mark.parametrize("case", list(CASES))
def test_sharing_passes_changes_no_weight_over_ten_steps(case: str) -> None:
    objective_class, _, settings = CASES[case]
    finals = []
    for share in (True, False):
        model = build("conv")
        step = IntrospectiveStep(model, objective_class(**settings), lr=1e-3, share=share)
        generator = torch.Generator().manual_seed(3)
        for _ in range(10):
            x = torch.rand(6, 1, 8, 8, generator=generator, dtype=torch.float64)
            step(x, Noise.draw(6, 3, generator, dtype=torch.float64))
        finals.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert (finals[0] - finals[1]).abs().max() < 1e-9


def count_calls(module: nn.Module) -> list[int]:
    sizes: list[int] = []
    module.register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
    return sizes


@pytest.mark.parametrize(
    ("objective", "encodes", "decodes"),
    [
        (VAE(), [4], [4]),
        (IntroVAE(margin=2.0), [4, 8, 8], [8]),
        (SoftIntroVAE(), [4, 8, 8], [8, 8]),
        (SoftIntroVAE(gamma_r=1.0), [4, 8, 8], [8, 8, 8]),
        (ASIntroVAE(), [4, 8, 8], [8, 8]),
        (ASIntroVAE(contrast="real-sample"), [4, 8, 4, 8], [8, 8]),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_step_makes_only_the_passes_its_objective_needs(objective, encodes, decodes) -> None:
    model = build("mlp")
    x, noise = batch(model, 4)
    seen_encodes, seen_decodes = count_calls(model.encoder), count_calls(model.decoder)
    IntrospectiveStep(model, objective)(x, noise)
    assert (seen_encodes, seen_decodes) == (encodes, decodes)


def test_the_objective_after_the_annealing_has_the_gradients_of_the_one_before() -> None:
    objective = ASIntroVAE(**SOFT)
    settled = objective.at(0.25)
    assert isinstance(settled, SoftIntroVAE)
    assert objective.at(0.1) is objective
    losses = []
    for used in (objective, settled):
        model = build("mlp")
        x, noise = batch(model)
        values = {k: torch.tensor(v, dtype=torch.float64) for k, v in objective.values(0.25).items()}
        seen = capture(step := IntrospectiveStep(model, used))
        record = step(x, noise, values)
        losses.append([record["loss_encoder"], record["loss_decoder"], *seen["encoder"], *seen["decoder"]])
    for ours, theirs in zip(*losses, strict=True):
        assert_close(ours, theirs)


def test_settings_that_change_reach_the_losses_through_values_only() -> None:
    model = build("mlp")
    x, noise = batch(model)
    doubled = {name: torch.tensor(2.0 * v, dtype=torch.float64) for name, v in SoftIntroVAE(**SOFT).values().items()}
    other = copy.deepcopy(model)
    a = IntrospectiveStep(model, SoftIntroVAE(**SOFT))(x, noise, doubled)
    b = IntrospectiveStep(other, SoftIntroVAE(**{name: 2 * v for name, v in SOFT.items()}))(x, noise)
    assert_close(a["loss_encoder"], b["loss_encoder"])
    assert_close(a["loss_decoder"], b["loss_decoder"])


def test_step_state_goes_on_bit_for_bit() -> None:
    model = build("conv")
    step = IntrospectiveStep(model, SoftIntroVAE(beta_neg=8.0))
    x, noise = batch(model)
    step(x, noise)
    twin = IntrospectiveStep(build("conv", seed=9), SoftIntroVAE(beta_neg=8.0))
    twin.load_state_dict(copy.deepcopy(step.state_dict()))
    for _ in range(2):
        step(x, noise)
        twin(x, noise)
    for a, b in zip(step.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_undeclared_term_is_refused_with_its_name() -> None:
    class Careless(SoftIntroVAE):
        reads_fake_rec_in_encoder = False

    model = build("mlp")
    with pytest.raises(RuntimeError, match=r"reads fake\.rec"):
        IntrospectiveStep(model, Careless())(*batch(model))


def test_bad_rates_and_batches_are_refused() -> None:
    model = build("mlp")
    with pytest.raises(ConfigError, match="lr is 0"):
        IntrospectiveStep(model, VAE(), lr=0)
    with pytest.raises(DataError, match="batch of at least 2"):
        IntrospectiveStep(model, ASIntroVAE())(*batch(model, 1))
