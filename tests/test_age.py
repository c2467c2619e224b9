"""AGE: the divergence is that of a fitted Gaussian, the step plays the paper's game and ignores the log-variance."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import textbook
from introvae import AGE, ConfigError, DataError, IntrospectiveStep, IntrospectiveVAE, Noise, Warmup, fit
from introvae.data.densities import get_density
from introvae.objectives.age import VARIANCE_FLOOR, divergence
from introvae.parallel import Alone
from lockstep import in_lockstep
from test_runs import assert_same_run, last_state, rewound, small, vectors
from test_step import LR, NETWORKS, assert_close, batch, build, capture, count_calls

MU, LAM = 3.0, 2.0


def delta(encodings: Tensor) -> Tensor:
    """The paper's form, dimension by dimension."""
    n, dimensions = encodings.shape
    total = torch.zeros((), dtype=encodings.dtype)
    for j in range(dimensions):
        column = encodings[:, j]
        m = column.sum() / n
        s2 = ((column - m) ** 2).sum() / n
        total = total - 0.5 + (s2 + m**2) / 2 - 0.5 * torch.log(s2 + VARIANCE_FLOOR)
    return total / dimensions


def transcription(
    encoder: nn.Module, decoder: nn.Module, x: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, dict[str, list[Tensor]]]:
    """Both losses and the gradients that the players get, everything computed anew in each phase."""
    optimizer = torch.optim.Adam(encoder.parameters(), lr=LR)
    encodings = encoder(x)[0]
    error = (x - decoder(encodings)).abs().sum() / x.numel()
    with torch.no_grad():
        fake = decoder(z)
    loss_e = delta(encodings) - delta(encoder(fake)[0]) + MU * error
    loss_e.backward()
    found = {"encoder": textbook.gradients(encoder)}
    optimizer.step()
    textbook.freeze(decoder, False)
    again = encoder(decoder(z))[0]
    loss_d = delta(again) + LAM * ((z - again) ** 2).sum() / z.numel()
    loss_d.backward()
    found["decoder"] = textbook.gradients(decoder)
    return loss_e.detach(), loss_d.detach(), found


def test_divergence_is_the_kl_of_the_fitted_gaussian() -> None:
    encodings = 3 + 2 * torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fitted = Normal(encodings.mean(dim=0), encodings.std(dim=0, correction=0))
    expected = kl_divergence(fitted, Normal(torch.zeros_like(fitted.loc), torch.ones_like(fitted.loc))).mean()
    assert divergence(encodings).item() == pytest.approx(expected.item(), rel=1e-6)  # up to the floor
    assert divergence(encodings).item() == pytest.approx(delta(encodings).item(), rel=1e-12)


def test_equal_encodings_have_a_finite_divergence_and_gradient() -> None:
    encodings = torch.ones(5, 2, requires_grad=True)
    found = divergence(encodings)
    found.backward()
    assert found.isfinite()
    assert encodings.grad is not None
    assert encodings.grad.isfinite().all()


@pytest.mark.parametrize("network", list(NETWORKS))
@pytest.mark.parametrize("share", [True, False], ids=["shared", "recomputed"])
def test_losses_and_gradients_equal_the_paper_s_game(network: str, share: bool) -> None:
    model = build(network)
    x, noise = batch(model)
    theirs = copy.deepcopy(model)
    step = IntrospectiveStep(model, AGE(mu=MU, lam=LAM), lr=LR, share=share)
    seen = capture(step)
    record = step(x, noise)
    loss_e, loss_d, gradients = transcription(theirs.encoder, theirs.decoder, x, noise.prior)
    assert_close(record["loss_encoder"], loss_e, 0.0)
    assert_close(record["loss_decoder"], loss_d, 0.0)
    for player, expected in gradients.items():
        largest = max(float(g.abs().max()) for g in expected)
        assert largest > 0
        for ours, g in zip(seen[player], expected, strict=True):
            assert_close(ours, g, 1e-3 * largest)
        assert seen[f"foreign to {player}"] == []


def test_a_step_draws_no_latent_and_its_log_variance_gets_no_gradient() -> None:
    model = build("mlp")
    x, noise = batch(model)
    other = noise._replace(real=noise.real + 1, fakes=-noise.fakes, again=2 * noise.again)
    twin = copy.deepcopy(model)
    seen = capture(step := IntrospectiveStep(model, AGE()))
    step(x, noise)
    IntrospectiveStep(twin, AGE())(x, other)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    head = seen["encoder"][-2]  # of means, then of log-variances
    assert head[:3].abs().max() > 0
    assert head[3:].abs().max() == 0


def test_a_step_makes_only_the_passes_that_the_game_needs() -> None:
    model = build("mlp")
    x, noise = batch(model, 4)
    encodes, decodes = count_calls(model.encoder), count_calls(model.decoder)
    record = IntrospectiveStep(model, AGE())(x, noise)
    assert (encodes, decodes) == ([4, 4, 4], [8])
    names = {"rec", "divergence_real", "divergence_sample", "latent_error", "loss_encoder", "loss_decoder"}
    assert record.keys() == names | {"apart_fakes", "apart_real"}


def test_the_decoder_s_gradient_is_all_of_the_game() -> None:
    model = build("mlp")
    record = IntrospectiveStep(model, AGE())(*batch(model), gradients=True)
    assert record["gradient_adversarial"] > 0
    assert record["gradient_reconstruction"].item() == pytest.approx(0, abs=1e-12)


def test_the_warm_up_is_a_vae_s() -> None:
    model = build("mlp")
    record = IntrospectiveStep(model, AGE(), warmup=Warmup(1))(*batch(model), warming=True)
    assert set(record) == {"rec", "kl_real", "loss_encoder", "loss_decoder"}


def test_batches_that_are_too_small_or_split_are_refused() -> None:
    model = build("mlp")
    with pytest.raises(DataError, match="at least 2"):
        IntrospectiveStep(model, AGE())(*batch(model, 1))
    with pytest.raises(ConfigError, match="batch_size must be above 1"):
        AGE().check(latent_dim=2, batch_size=1)
    with pytest.raises(ConfigError, match="compares the samples of a batch"):
        IntrospectiveStep(model, AGE(), accumulation=2)
    for settings, message in (({"mu": 0.0}, "mu is 0"), ({"lam": -1.0}, "lam is -1")):
        with pytest.raises(ConfigError, match=message):
            AGE(**settings)


def trained(model: IntrospectiveVAE, peers: Alone) -> list[Tensor]:
    model = copy.deepcopy(model)
    step = IntrospectiveStep(model, AGE(mu=MU, lam=LAM), lr=1e-3, peers=peers)
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        x = torch.rand(6, 1, 8, 8, generator=generator, dtype=torch.float64)
        noise, rows = Noise.draw(6, 3, generator, dtype=torch.float64), peers.rows(6)
        step(x[rows], noise.rows(rows))
    return [p.detach() for p in model.parameters()]


def test_two_processes_train_the_model_that_one_trains() -> None:
    model = build("conv")
    ours, others = in_lockstep(lambda peers: trained(model, peers))
    for weight, other, alone in zip(ours, others, trained(model, Alone()), strict=True):
        assert torch.equal(weight, other)
        assert (weight - alone).abs().max() < 1e-12 * max(1.0, float(alone.abs().max()))


def test_a_few_hundred_steps_bring_the_encodings_and_the_samples_to_the_prior() -> None:
    torch.manual_seed(0)
    density, generator = get_density("8gaussians"), torch.Generator().manual_seed(1)
    model = IntrospectiveVAE.build((2,), "tiny-mlp", latent_dim=2)
    step = IntrospectiveStep(model, AGE(), lr=2e-3)

    def both() -> tuple[float, float]:
        draws = torch.Generator().manual_seed(2)
        with torch.no_grad():
            real = divergence(model.encode(density.sample(1000, draws)).mode)
            return real.item(), divergence(model.encode(model.sample(1000, draws)).mode).item()

    before = both()
    for _ in range(500):
        step(density.sample(64, generator), Noise.draw(64, 2, generator))
    after = both()
    assert after[0] < 0.6 * before[0], (before, after)
    assert after[1] < 0.3 * before[1], (before, after)


@pytest.mark.parametrize("warmup", [0, 5])
def test_resuming_equals_going_on(tmp_path: Path, warmup: int) -> None:
    settings: dict[str, Any] = {"objective": AGE(), "steps": 12, "checkpoint_every": 8, "warmup": Warmup(warmup)}
    whole = small(tmp_path / "whole", **settings)
    resumed = rewound(whole, tmp_path / "resumed", checkpoint=-2)
    assert last_state(resumed)["step"] == 8
    fit(resume=resumed.folder, data=vectors(), progress=False)
    assert_same_run(resumed, whole)
    row = whole.log()[-1]
    assert {"divergence_real", "divergence_sample", "mu", "lam"} <= row.keys()
    assert "kl_sample" not in row


def test_a_run_in_the_plane_draws_no_density_estimate(tmp_path: Path) -> None:
    run = small(tmp_path / "run", data="density:rings", objective="AGE", batch_size=16)
    assert (run.images / "final.png").is_file()
    model = run.model()
    x = get_density("rings").sample(4, torch.Generator().manual_seed(0))
    assert torch.equal(model.reconstruct(x), model.decode(model.encode(x).mean))
