"""The target decoder of the bootstrap variant: what it decodes, whom gradients reach, when it is renewed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import textbook
from introvae import ConfigError, FitConfig, IntrospectiveStep, IntrospectiveVAE, SoftIntroVAE, fit
from introvae.training.checkpoint import list_checkpoints
from introvae.training.loop import Trainer
from test_runs import assert_same_run, last_state, rewound, small, vectors
from test_step import LR, NETWORKS, SOFT, assert_close, batch, build, capture

GAMMA = 0.8


def transcription(
    encoder: nn.Module, decoder: nn.Module, target: nn.Module, x: Tensor, noise: Any
) -> tuple[Tensor, Tensor, dict[str, list[Tensor]]]:
    """Both losses and the gradients that the players get; `target` decodes what is made of fakes."""
    s, (beta_rec, beta_kl, beta_neg) = 1 / x[0].numel(), (SOFT["beta_rec"], SOFT["beta_kl"], SOFT["beta_neg"])
    kl, rec, latent = textbook.kl, textbook.rec, textbook.latent
    optimizer = torch.optim.Adam(encoder.parameters(), lr=LR)
    mu, logvar = encoder(x)
    z = latent(mu, logvar, noise.real)
    x_r, x_p = decoder(z), decoder(noise.prior)
    loss_e = s * (beta_rec * rec(x, x_r).mean() + beta_kl * kl(mu, logvar).mean())
    for fake, eps in zip((x_r.detach(), x_p.detach()), noise.fakes.chunk(2), strict=True):
        q = encoder(fake)
        error = rec(fake, target(latent(*q, eps)))
        loss_e = loss_e + 0.25 * torch.exp(-2 * s * (beta_rec * error + beta_neg * kl(*q))).mean()
    loss_e.backward()
    found = {"encoder": textbook.gradients(encoder)}
    optimizer.step()

    textbook.freeze(decoder, False)
    x_r, x_p = decoder(z.detach()), decoder(noise.prior)
    loss_d = s * beta_rec * rec(x, x_r).mean()
    for fake, eps in zip((x_r, x_p), noise.again.chunk(2), strict=True):
        q = encoder(fake)
        error = rec(fake, target(latent(*q, eps)))
        loss_d = loss_d + 0.5 * s * (beta_kl * kl(*q).mean() + GAMMA * beta_rec * error.mean())
    loss_d.backward()
    found["decoder"] = textbook.gradients(decoder)
    return loss_e.detach(), loss_d.detach(), found


@pytest.mark.parametrize("network", list(NETWORKS))
@pytest.mark.parametrize("variant", ["paper", "official_code"])
@pytest.mark.parametrize("share", [True, False], ids=["shared", "recomputed"])
def test_losses_and_gradients_equal_the_authors_game(network: str, variant: str, share: bool) -> None:
    model = build(network)
    x, noise = batch(model)
    objective = SoftIntroVAE(**SOFT, gamma_r=GAMMA, target_every=5, variant=variant)
    step = IntrospectiveStep(model, objective, lr=LR, share=share)
    assert step.target is not None
    for weight in step.target.parameters():  # another than the decoder, as it is when it lags behind
        weight.data.mul_(0.9)
    theirs, target = copy.deepcopy(model), copy.deepcopy(step.target)
    kept = copy.deepcopy(step.target)
    seen = capture(step)
    record = step(x, noise)
    loss_e, loss_d, gradients = transcription(theirs.encoder, theirs.decoder, target, x, noise)
    assert_close(record["loss_encoder"], loss_e, 0.0)
    assert_close(record["loss_decoder"], loss_d, 0.0)
    for player, expected in gradients.items():
        largest = max(float(g.abs().max()) for g in expected)
        for ours, g in zip(seen[player], expected, strict=True):
            assert_close(ours, g, 1e-3 * largest)
        assert seen[f"foreign to {player}"] == []
    for weight, before in zip(step.target.parameters(), kept.parameters(), strict=True):
        assert weight.grad is None
        assert torch.equal(weight, before)


def test_a_target_that_is_the_decoder_changes_the_encoder_s_gradient_in_nothing() -> None:
    seen = []
    for settings in ({}, {"target_every": 1}):
        model = build("conv")
        step = IntrospectiveStep(model, SoftIntroVAE(**SOFT, **settings))  # pyright: ignore[reportArgumentType]
        found = capture(step)
        step(*batch(model))
        seen.append(found["encoder"])
    for ours, theirs in zip(*seen, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("network", ["mlp", "conv-batch"])
def test_the_target_stays_until_it_is_renewed(network: str) -> None:
    model = build(network)
    step = IntrospectiveStep(model, SoftIntroVAE(**SOFT, target_every=2))
    assert step.target is not None
    before = copy.deepcopy(model.decoder)
    step(*batch(model))
    for ours, old, new in zip(step.target.parameters(), before.parameters(), model.decoder.parameters(), strict=True):
        assert torch.equal(ours, old)
        assert not torch.equal(ours, new)
    places = [weight.data_ptr() for weight in step.target.parameters()]
    step.renew_target()
    ours, theirs = step.target.state_dict(), model.decoder.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert places == [weight.data_ptr() for weight in step.target.parameters()]
    assert not any(weight.requires_grad for weight in step.target.parameters())


@pytest.mark.slow
def test_a_step_with_a_target_at_the_published_widths_at_128_pixels() -> None:
    torch.manual_seed(0)
    model = IntrospectiveVAE.build((3, 128, 128), "conv", 128)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    objective = SoftIntroVAE(beta_kl=0.5, beta_neg=256.0, gamma_r=0.5, target_every=1)
    step = IntrospectiveStep(model, objective)
    record = step(torch.rand(2, 3, 128, 128))
    assert all(value.isfinite() for value in record.values())
    assert step.target is not None
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
        assert (p != before[name]).any(), name
    for name, kept in step.target.named_parameters():
        assert torch.equal(kept, before[f"decoder.{name}"]), name
    step.renew_target()
    for ours, theirs in zip(step.target.parameters(), model.decoder.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_without_a_target_nothing_is_kept_for_it() -> None:
    step = IntrospectiveStep(build("mlp"), SoftIntroVAE(**SOFT))
    assert step.target is None
    assert "target" not in step.state_dict()
    step.renew_target()


@pytest.mark.parametrize("every", [6, "epoch"])
def test_a_run_renews_the_target_in_time_and_resumes_bit_for_bit(tmp_path: Path, every: Any) -> None:
    """36 vectors to train on: an epoch has 3 batches of 10, so both targets are renewed after 6 steps."""
    objective = SoftIntroVAE(**SOFT, gamma_r=0.5, target_every=every)
    whole = small(tmp_path / "whole", objective=objective, steps=8, checkpoint_every=2)
    states = {state["step"]: state["players"] for state in map(load, list_checkpoints(whole.checkpoints))}
    names = [name for name in states[8]["model"] if name.startswith("decoder.")]
    assert names
    for name in names:
        target = states[8]["target"][name.removeprefix("decoder.")]
        assert torch.equal(target, states[6]["model"][name])
        assert not torch.equal(target, states[8]["model"][name])
        assert not torch.equal(target, states[6]["target"][name.removeprefix("decoder.")])
    resumed = rewound(whole, tmp_path / "resumed", checkpoint=-2)
    assert last_state(resumed)["step"] == 6
    fit(resume=resumed.folder, data=vectors(), progress=False)
    assert_same_run(resumed, whole)


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def test_epochs_of_endless_data_and_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="is endless and has no epochs: give target_every a number of steps"):
        Trainer(FitConfig(data="density:rings", network="tiny-mlp", objective=SoftIntroVAE(target_every="epoch")))
    for value, message in ((-1, "target_every is -1"), (1.5, "whole number"), ("day", "a number of steps, or epoch")):
        with pytest.raises(ConfigError, match=message):
            SoftIntroVAE(target_every=value)  # pyright: ignore[reportArgumentType]


def test_the_planner_counts_the_target() -> None:
    def bytes_of(every: int) -> int:
        # Many latents: the copy of the decoder must outweigh what its passes without gradients save.
        config = FitConfig(network="tiny-conv", latent_dim=64, objective=SoftIntroVAE(target_every=every))
        return Trainer(config).plan().step_bytes(4)

    assert bytes_of(10) > bytes_of(0)
