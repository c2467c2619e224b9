"""WGAN-GP: its losses, its gradient penalty's own derivative, whose turn it is, and runs on the shared loop."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributions import Normal

from introvae import WGANGP, ConfigError, IntrospectiveVAE, Noise, Run, SoftIntroVAE, Warmup, WGANGPStep, fit
from introvae.data.densities import get_density
from introvae.errors import DivergedError
from introvae.metrics.histogram import energy_distance
from introvae.networks import use_gradient_checkpointing
from introvae.networks.blocks import NORMS
from introvae.parallel import Alone
from introvae.step import step_class
from introvae.training.ema import Average
from lockstep import in_lockstep
from test_runs import assert_same_run, last_state, rewound, small, vectors
from test_step import assert_close, batch, build, capture

NETWORKS = ["mlp", "conv", "conv-group"]


def scores(encoder: nn.Module, x: Tensor) -> Tensor:
    return encoder(x)[0][:, 0]


def critic_loss(model: IntrospectiveVAE, x: Tensor, noise: Noise, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, distance and penalty of the critic; the gradients inside the penalty are cut off from the weights."""
    fake = model.decoder(noise.prior).detach()
    distance = scores(model.encoder, x).mean() - scores(model.encoder, fake).mean()
    epsilon = Normal(0.0, 1.0).cdf(noise.real[:, 0])
    penalty = torch.zeros((), dtype=x.dtype)
    for i in range(len(x)):  # each sample alone: nothing can leak from one to another
        between = (epsilon[i] * x[i] + (1 - epsilon[i]) * fake[i])[None].requires_grad_()
        (gradient,) = torch.autograd.grad(scores(model.encoder, between).sum(), between)
        penalty = penalty + ((gradient**2).sum().sqrt() - 1) ** 2 / len(x)
    return weight * penalty - distance, distance, penalty


def with_norm(norm: str) -> IntrospectiveVAE:
    torch.manual_seed(0)
    model = IntrospectiveVAE.build((1, 8, 8), "tiny-conv", latent_dim=3, norm=norm).double()
    for p in model.parameters():
        p.data.mul_(1.5)
    return model


# --- the losses


@pytest.mark.parametrize("network", NETWORKS)
def test_losses_equal_the_paper_s(network: str) -> None:
    model = build(network)
    x, noise = batch(model)
    expected = [part.item() for part in critic_loss(model, x, noise, 7.0)]
    step = WGANGPStep(model, WGANGP(penalty=7.0, n_critic=1), lr=0.01)
    record = step(x, noise)
    found = [record[name].item() for name in ("loss_critic", "wasserstein", "gradient_penalty")]
    assert found == pytest.approx(expected, rel=1e-10)

    model = build(network)  # the generator is judged by the critic that was just updated
    theirs = copy.deepcopy(model)
    step = WGANGPStep(model, WGANGP(n_critic=1), lr=0.01)
    seen = capture(step)
    record = step(x, noise)
    theirs.encoder.load_state_dict(model.encoder.state_dict())
    loss = -scores(theirs.encoder, theirs.decoder(noise.again[: len(x)])).mean()
    loss.backward(inputs=list(theirs.decoder.parameters()))
    assert record["loss_generator"].item() == pytest.approx(loss.item(), rel=1e-10)
    for ours, parameter in zip(seen["decoder"], theirs.decoder.parameters(), strict=True):
        assert parameter.grad is not None
        assert_close(ours, parameter.grad)


@pytest.mark.parametrize("forgetful", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("case", ["mlp", *(norm for norm in NORMS if norm != "batch")])
def test_the_critic_s_gradient_equals_differences_of_its_loss(case: str, forgetful: bool) -> None:
    """The blocks overwrite the normalisation's output: a derivative of a derivative must not read it."""
    if forgetful and case == "mlp":
        pytest.skip("it has no stages")
    model = build("mlp") if case == "mlp" else with_norm(case)
    x, noise = batch(model)
    theirs = copy.deepcopy(model)
    if forgetful:
        use_gradient_checkpointing(model.encoder)
    step = WGANGPStep(model, WGANGP(penalty=10.0))
    seen = capture(step)
    step(x, noise)
    weights = list(theirs.encoder.parameters())
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        ways = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]
        slope = sum(float((g * way).sum()) for g, way in zip(seen["encoder"], ways, strict=True))
        ends = []
        for h in (1e-8, -2e-8):  # so near that no unit's sign changes between
            for weight, way in zip(weights, ways, strict=True):
                weight.data.add_(way, alpha=h)
            ends.append(critic_loss(theirs, x, noise, 10.0)[0].item())
        for weight, way in zip(weights, ways, strict=True):
            weight.data.add_(way, alpha=1e-8)
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-8, rel=1e-5, abs=1e-4)
    assert max(float(g.abs().max()) for g in seen["encoder"]) > 0


def test_a_gradient_of_norm_nought_has_a_finite_penalty() -> None:
    model = build("mlp")
    for p in model.encoder.parameters():
        p.data.zero_()
    step = WGANGPStep(model, WGANGP())
    record = step(*batch(model))
    assert record["gradient_penalty"] == 1
    assert all(p.isfinite().all() for p in model.parameters())


# --- whose turn it is


def test_the_generator_is_updated_in_every_n_critic_th_step_and_the_critic_in_all() -> None:
    model = build("conv")
    step = WGANGPStep(model, WGANGP(n_critic=3))
    seen = capture(step)
    x, noise = batch(model)
    for index in range(1, 8):
        before = copy.deepcopy(model)
        seen.clear()
        record = step(x, noise)
        moved = {
            name: any(
                not torch.equal(ours, theirs)
                for ours, theirs in zip(
                    getattr(model, name).parameters(), getattr(before, name).parameters(), strict=True
                )
            )
            for name in ("encoder", "decoder")
        }
        assert moved == {"encoder": True, "decoder": index % 3 == 0}
        assert ("loss_generator" in record) == (index % 3 == 0)
        assert all(seen[name] == [] for name in seen if name.startswith("foreign"))


def test_only_the_first_component_of_the_mean_is_trained() -> None:
    model = build("mlp")
    seen = capture(step := WGANGPStep(model, WGANGP()))
    step(*batch(model))
    head = seen["encoder"][-2]
    assert head[0].abs().max() > 0
    assert head[1:].abs().max() == 0


def test_parts_of_a_batch_have_the_gradients_of_the_whole() -> None:
    found = []
    for parts in (1, 3):
        model = build("conv")
        step = WGANGPStep(model, WGANGP(n_critic=1), accumulation=parts)
        seen = capture(step)
        record = step(*batch(model, 6))
        found.append([*seen["encoder"], *seen["decoder"], *(record[name] for name in sorted(record))])
    for whole, ours in zip(*found, strict=True):
        assert_close(ours, whole, 1e-2)


def trained(model: IntrospectiveVAE, peers: Alone) -> list[Tensor]:
    model = copy.deepcopy(model)
    step = WGANGPStep(model, WGANGP(n_critic=2), lr=1e-3, peers=peers)
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
        assert (weight - alone).abs().max() < 1e-9  # without a first moment, Adam makes much of rounding


def test_a_state_goes_on_bit_for_bit_from_between_two_updates_of_the_generator() -> None:
    model = build("conv")
    step = WGANGPStep(model, WGANGP(n_critic=3))
    x, noise = batch(model)
    for done in (1, 4):
        while step.steps < done:
            step(x, noise)
        twin = WGANGPStep(build("conv", seed=9), WGANGP(n_critic=3))
        twin.load_state_dict(copy.deepcopy(step.state_dict()))
        for _ in range(3):
            step(x, noise)
            twin(x, noise)
        for ours, theirs in zip(model.parameters(), twin.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_a_few_hundred_steps_bring_samples_nearer() -> None:
    torch.manual_seed(0)
    density, generator = get_density("8gaussians"), torch.Generator().manual_seed(1)
    model = IntrospectiveVAE.build((2,), "mlp", latent_dim=2, hidden=64, depth=2)
    average = Average(model, 0.99)
    step = WGANGPStep(model, WGANGP(penalty=1.0, n_critic=2), lr=2e-3, adam_betas=(0.5, 0.9))

    def distance() -> float:
        draws = torch.Generator().manual_seed(2)
        return energy_distance(density.sample(1000, draws), average.model.sample(1000, draws))

    before = distance()
    for _ in range(400):
        step(density.sample(64, generator), Noise.draw(64, 2, generator))
        average.update(model)
    assert distance() < 0.2 * before


# --- what is refused


def test_what_a_wgan_gp_cannot_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch normalisation mixes with others': choose another norm"):
        WGANGPStep(with_norm("batch"), WGANGP())
    with pytest.raises(ConfigError, match="no VAE to warm up"):
        WGANGPStep(build("mlp"), WGANGP(), warmup=Warmup(2))
    with pytest.raises(ConfigError, match="take compile none"):
        WGANGPStep(build("mlp"), WGANGP(), capturable=True)
    compiled = build("mlp")
    compiled.encoder._compiled_call_impl = compiled.encoder.forward  # as its compile() leaves it
    with pytest.raises(ConfigError, match="take compile none"):
        WGANGPStep(compiled, WGANGP())
    for settings, message in (({"penalty": 0.0}, "penalty is 0"), ({"n_critic": 1.5}, "n_critic is 1.5")):
        with pytest.raises(ConfigError, match=message):
            WGANGP(**settings)


def test_its_step_is_chosen_by_the_objective() -> None:
    assert step_class(WGANGP()) is WGANGPStep
    assert step_class(SoftIntroVAE()) is not WGANGPStep


def test_the_objectives_know_it_before_anybody_imported_it() -> None:
    code = "from introvae.objectives import get_objective; print(get_objective('WGANGP')())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "WGANGP(penalty=10.0, n_critic=5)\n"


# --- runs


def digits() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)


def picture_size(run: Run) -> tuple[int, int]:
    with Image.open(run.images / "final.png") as image:
        return image.size


@pytest.mark.parametrize("saved", [4, 8], ids=["before the generator's first update", "after it"])
def test_resuming_equals_going_on(tmp_path: Path, saved: int) -> None:
    settings: dict[str, Any] = {"objective": "WGANGP", "steps": saved + 4, "checkpoint_every": saved}
    whole = small(tmp_path / "whole", **settings)
    resumed = rewound(whole, tmp_path / "resumed", checkpoint=-2)
    assert last_state(resumed)["step"] == saved
    fit(resume=resumed.folder, data=vectors(), progress=False)
    assert_same_run(resumed, whole)


def test_a_run_logs_what_a_wgan_gp_has_and_draws_no_reconstruction(tmp_path: Path) -> None:
    run = small(tmp_path / "gan", data=digits(), network="tiny-conv", objective=WGANGP(n_critic=2), batch_size=12)
    rows = run.log()
    assert all({"loss_critic", "wasserstein", "gradient_penalty", "penalty"} <= row.keys() for row in rows)
    assert [row["samples_seen"] for row in rows] == [12 * (i + 1) for i in range(6)]
    assert ["loss_generator" in row for row in rows] == [False, True] * 3
    assert not any("rec" in row or "kl_real" in row for row in rows)
    assert run.model().sample(3).shape == (3, 1, 8, 8)
    other = small(tmp_path / "vae", data=digits(), network="tiny-conv", objective="VAE", batch_size=12)
    assert picture_size(run)[1] < picture_size(other)[1]


def test_a_run_in_the_plane_draws_samples_only(tmp_path: Path) -> None:
    runs = {name: small(tmp_path / name, data="density:rings", objective=name) for name in ("WGANGP", "AGE", "VAE")}
    widths = [picture_size(run)[0] for run in runs.values()]
    assert widths[0] < widths[1] < widths[2]


def test_the_guard_sees_numbers_that_are_not_finite(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="not finite"):
        small(tmp_path / "run", objective="WGANGP", lr=1e30, steps=60)


def test_the_guard_lets_a_sound_run_alone(tmp_path: Path) -> None:
    run = small(tmp_path / "run", objective="WGANGP", steps=60, log_every=10)
    assert run.events("guard") == []
    assert len(run.log()) == 6
