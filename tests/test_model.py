from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import nn

from introvae import DiagonalGaussian, FitConfig, IntrospectiveVAE, list_networks, networks, register_network
from introvae.errors import CheckpointError, ConfigError, DataError
from introvae.gaussian import LOGVAR_RANGE
from introvae.networks.conv import build_conv, possible_sides
from introvae.networks.mlp import build_mlp

SHAPES = {"mlp": (5,), "tiny-mlp": (2,), "conv": (3, 32, 32), "tiny-conv": (1, 8, 8)}


def build(network: str = "tiny-conv", **options) -> IntrospectiveVAE:
    torch.manual_seed(0)
    if network == "conv":
        options = {"channels": [4, 8, 8], **options}
    return IntrospectiveVAE.build(SHAPES[network], network, latent_dim=3, **options)


# --- the posterior


def test_kl_equals_its_integral_and_torch() -> None:
    q = DiagonalGaussian(torch.tensor([[0.7, -1.2]]).double(), torch.tensor([[0.3, -0.9]]).double())
    reference = torch.distributions.kl_divergence(
        torch.distributions.Normal(q.mean, q.variance.sqrt()), torch.distributions.Normal(0.0, 1.0)
    )
    assert q.kl().item() == pytest.approx(reference.sum().item(), rel=1e-12)
    total = 0.0
    for d in range(2):
        one = DiagonalGaussian(q.mean[:, d : d + 1], q.logvar[:, d : d + 1])
        prior = DiagonalGaussian(torch.zeros(1, 1).double(), torch.zeros(1, 1).double())

        def integrand(z: float, one=one, prior=prior) -> float:
            point = torch.tensor([[z]]).double()
            log_q = one.log_prob(point)
            return (log_q.exp() * (log_q - prior.log_prob(point))).item()

        total += integrate.quad(integrand, -15, 15, epsabs=1e-12)[0]
    assert q.kl().item() == pytest.approx(total, rel=1e-8)


def test_samples_have_the_posterior_s_moments_and_carry_gradients() -> None:
    mean = torch.tensor([[1.0, -2.0]]).repeat(200_000, 1).requires_grad_()
    q = DiagonalGaussian(mean, torch.tensor([[0.5, -1.0]]).expand_as(mean))
    z = q.sample(generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(z.detach().mean(0), [1, -2], atol=0.02)
    np.testing.assert_allclose(z.detach().var(0), np.exp([0.5, -1.0]), rtol=0.02)
    z.sum().backward()
    assert torch.equal(mean.grad, torch.ones_like(mean))  # pyright: ignore
    assert torch.equal(q.mode, mean)
    assert torch.equal(q.sample(torch.zeros_like(mean)), mean)


@pytest.mark.parametrize("network", list(SHAPES))
@pytest.mark.parametrize("gain", [1e4, 1e8])
def test_no_weights_or_inputs_make_nan_in_the_forward_pass(network: str, gain: float) -> None:
    model = build(network)
    head = list(model.encoder.parameters())[-2:]
    for p in head:
        p.data.mul_(gain)
    x = torch.rand(8, *SHAPES[network])
    x[0], x[1] = 0.0, 1.0
    q = model.encode(x)
    assert q.logvar.min() >= LOGVAR_RANGE[0]
    assert q.logvar.max() <= LOGVAR_RANGE[1]
    z = q.sample(generator=torch.Generator().manual_seed(0))
    for value in (q.kl(), z, model.decode(z), model.elbo(x)):
        assert not value.isnan().any()


def test_half_precision_outputs_become_float32_latents() -> None:
    q = DiagonalGaussian.bounded(torch.zeros(1, 2, dtype=torch.bfloat16), torch.full((1, 2), 99.0).bfloat16())
    assert q.mean.dtype == q.logvar.dtype == torch.float32
    assert q.logvar.max() == LOGVAR_RANGE[1]


# --- networks


@pytest.mark.parametrize("side", [8, 28, 32, 64, 96, 128])
@pytest.mark.parametrize("channels", [1, 3])
def test_conv_takes_the_usual_squares(side: int, channels: int) -> None:
    model = IntrospectiveVAE.build((channels, side, side), latent_dim=4, channels=[4] * (1 if side == 8 else 2))
    x = torch.rand(2, channels, side, side)
    y = model.reconstruct(x)
    assert y.shape == x.shape
    assert y.min() >= 0
    assert y.max() <= 1


def test_conv_has_the_published_widths() -> None:
    for side, widths in ((8, [64]), (28, [64, 128]), (32, [64, 128, 256]), (128, [64, 128, 256, 512, 512])):
        encoder = IntrospectiveVAE.build((1, side, side), "conv", 2).encoder
        assert [block.conv1.out_channels for block in encoder.blocks] == [*widths[1:], widths[-1]]  # pyright: ignore


@pytest.mark.parametrize("shape", [(1, 30, 30), (1, 28, 32), (2, 32, 32), (1, 4, 4), (7,)])
def test_conv_refuses_other_shapes_and_says_which_are_possible(shape) -> None:
    with pytest.raises(ConfigError, match=r"1 or 3 channels and a square side of 8, 10, .*28, 32"):
        IntrospectiveVAE.build(shape, "conv", 2)
    assert {8, 28, 32, 64, 128, 256} <= set(possible_sides())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": [4, 4, 4]}, "give 1 to 2 of them"),
        ({"channels": []}, "give 1 to 2"),
        ({"channels": [0]}, r"channels\[0\] is 0"),
        ({"norm": "spectral"}, "layer, group, batch, none"),
        ({"widths": [4]}, "unknown option of network 'conv' 'widths': choose one of channels, width, norm"),
    ],
)
def test_conv_refuses_bad_options(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        IntrospectiveVAE.build((1, 28, 28), "conv", 2, **options)


def test_unknown_networks_are_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="mlp, conv"):
        IntrospectiveVAE.build((2,), "transformer", 2)
    with pytest.raises(ConfigError, match="latent_dim is 0"):
        IntrospectiveVAE.build((2,), "mlp", 0)


@pytest.mark.parametrize("norm", ["layer", "group", "none"])
def test_one_image_gives_what_it_gives_in_a_batch_of_64(norm: str) -> None:
    model = build("conv", norm=norm).train()  # also in training mode: nothing depends on the batch
    x = torch.rand(64, 3, 32, 32)
    together = model.reconstruct(x)
    alone = torch.cat([model.reconstruct(image[None]) for image in x[:4]])
    assert (together[:4] - alone).abs().max() <= 1e-5
    assert (together - model.eval().reconstruct(x)).abs().max() <= 1e-6


def test_layer_norm_is_over_the_channels_of_each_position() -> None:
    from introvae.networks.blocks import make_norm

    norm = make_norm("layer", 6)
    y = norm(torch.randn(2, 6, 5, 5) * 3 + 1)
    assert y.mean(1).abs().max() < 1e-5
    assert (y.var(1, correction=0) - 1).abs().max() < 1e-3


# --- the model


def test_any_pair_of_modules_is_a_model() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 6)

        def forward(self, x):
            return self.linear(x).chunk(2, 1)

    model = IntrospectiveVAE(Encoder(), nn.Linear(3, 4), latent_dim=3)
    assert model.sample(5).shape == (5, 4)
    assert model.reconstruct(torch.rand(2, 4)).shape == (2, 4)
    with pytest.raises(ConfigError, match=r"only a model from IntrospectiveVAE\.build can be saved"):
        model.save_pretrained("nowhere")


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(DataError, match=r"takes data of shape \(1, 8, 8\), not \(1, 9, 9\)"):
        build().encode(torch.rand(2, 1, 9, 9))


def test_elbo_is_minus_weighted_error_and_kl() -> None:
    model, x = build().double(), torch.rand(4, 1, 8, 8).double()
    noise = torch.randn(4, 3).double()
    q = model.encode(x)
    error = ((x - model.decode(q.mean + noise * q.variance.sqrt())) ** 2).sum((1, 2, 3))
    expected = -(0.5 * error + 2.0 * q.kl())
    assert torch.allclose(model.elbo(x, beta_rec=0.5, beta_kl=2.0, noise=noise), expected, rtol=1e-12)


def test_sample_depends_on_the_generator_alone() -> None:
    model = build()
    a = model.sample(6, torch.Generator().manual_seed(1))
    assert torch.equal(a, model.sample(6, torch.Generator().manual_seed(1)))
    assert not torch.equal(a, model.sample(6, torch.Generator().manual_seed(2)))
    assert not a.requires_grad
    with pytest.raises(ConfigError, match="n is 0"):
        model.sample(0)


@pytest.mark.parametrize("spherical", [False, True])
def test_interpolation_starts_and_ends_at_the_reconstructions(spherical: bool) -> None:
    model = build().double()
    a, b = torch.rand(2, 3, 1, 8, 8).double()
    path = model.interpolate(a, b, steps=5, spherical=spherical)
    assert path.shape == (3, 5, 1, 8, 8)
    assert torch.allclose(path[:, 0], model.reconstruct(a), atol=1e-12)
    assert torch.allclose(path[:, -1], model.reconstruct(b), atol=1e-12)
    same = model.interpolate(a, a, steps=3, spherical=spherical)
    assert torch.allclose(same, model.reconstruct(a)[:, None].expand_as(same), atol=1e-12)
    with pytest.raises(ConfigError, match="at least 2"):
        model.interpolate(a, b, steps=1)


def test_spherical_interpolation_halves_the_angle_and_averages_the_length() -> None:
    class Straight(nn.Module):
        def forward(self, x):
            return x, torch.zeros_like(x)

    model = IntrospectiveVAE(Straight(), nn.Identity(), 2)
    middle = model.interpolate(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]), 3, spherical=True)[0, 1]
    assert torch.allclose(middle, 2 * torch.tensor([0.5, 0.5]).sqrt(), atol=1e-6)


# --- files


@pytest.mark.parametrize("network", list(SHAPES))
def test_save_and_load_give_the_same_outputs_bit_for_bit(network: str, tmp_path) -> None:
    model = build(network).eval()
    model.save_pretrained(tmp_path / "m")
    loaded = IntrospectiveVAE.from_pretrained(tmp_path / "m")
    x = torch.rand(3, *SHAPES[network])
    assert not loaded.training
    assert torch.equal(model.reconstruct(x), loaded.reconstruct(x))
    draws = [m.sample(4, torch.Generator().manual_seed(0)) for m in (model, loaded)]
    assert torch.equal(*draws)
    assert loaded.config == model.config
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]


def test_a_registered_network_can_be_saved_and_loaded(tmp_path) -> None:
    def builder(shape, latent_dim, *, width: int = 4):
        class Encoder(nn.Linear):
            def forward(self, input):
                return super().forward(input).chunk(2, 1)

        return Encoder(shape[0], 2 * latent_dim), nn.Linear(latent_dim, shape[0])

    register_network("linear-for-this-test", builder)
    assert "linear-for-this-test" in list_networks()
    model = IntrospectiveVAE.build((4,), "linear-for-this-test", 2, width=3)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        IntrospectiveVAE.from_pretrained(tmp_path).reconstruct(torch.ones(1, 4)), model.reconstruct(torch.ones(1, 4))
    )
    with pytest.raises(ConfigError, match="registered already"):
        register_network("linear-for-this-test", builder)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nosuch.build", "cannot be imported .*No module named 'nosuch'.*PYTHONPATH"),
        ("introvae.networks.nosuch", "cannot be imported .*nosuch"),
        ("os.getcwd", "no builder of networks"),
        ("subprocess.run", "no builder of networks"),
    ],
)
def test_what_is_no_import_path_of_a_builder(path: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        FitConfig(network=path)
    assert path not in list_networks()


def test_a_saved_model_imports_nothing_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But it is known once the settings of its run are read."""
    monkeypatch.setattr(networks, "_NETWORKS", dict(networks._NETWORKS))
    model = IntrospectiveVAE.build((4,), "tiny-mlp", 2)
    assert model.config is not None
    model.config["network"] = "introvae.networks.mlp.build_mlp"
    model.config["options"] = {"hidden": 16, "depth": 2}
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="register its network first"):
        IntrospectiveVAE.from_pretrained(tmp_path)
    FitConfig(network="introvae.networks.mlp.build_mlp")
    x = torch.rand(3, 4)
    assert torch.equal(IntrospectiveVAE.from_pretrained(tmp_path).reconstruct(x), model.reconstruct(x))


def test_a_saved_model_stays_what_it_was_under_other_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = IntrospectiveVAE.build((1, 8, 8), "conv", 2, channels=[4])
    model.save_pretrained(tmp_path)
    known = {**networks._NETWORKS, "conv": partial(build_conv, norm="none", upsample="bilinear")}
    monkeypatch.setattr(networks, "_NETWORKS", known)
    x = torch.rand(3, 1, 8, 8)
    loaded = IntrospectiveVAE.from_pretrained(tmp_path)
    assert torch.equal(loaded.reconstruct(x), model.eval().reconstruct(x))
    new = IntrospectiveVAE.build((1, 8, 8), "conv", 2, channels=[4])
    assert new.state_dict().keys() != model.state_dict().keys()


def test_a_default_that_json_does_not_know_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(shape: tuple[int, ...], latent_dim: int, *, layers: list[type] = [nn.Tanh], hidden: int = 16):  # noqa: B006
        return build_mlp(shape, latent_dim, hidden=hidden)

    monkeypatch.setattr(networks, "_NETWORKS", {**networks._NETWORKS, "mine": build})
    model = IntrospectiveVAE.build((4,), "mine", 2)
    assert model.config is not None
    assert model.config["options"] == {"hidden": 16}


def damage_cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def damage_missing(folder):
    (folder / "model.safetensors").unlink()


def damage_json(folder):
    (folder / "config.json").write_text('{"format": 1,')


def damage_key(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["latent_dim"]
    (folder / "config.json").write_text(json.dumps(config))


def damage_format(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "format": 99}))


def damage_network(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "network": "os.system"}))


def damage_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "latent_dim": 4}))


def damage_names(folder):
    build("tiny-mlp").save_pretrained(folder / "other")
    (folder / "other" / "model.safetensors").replace(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_cut, "model.safetensors cannot be read"),
        (damage_missing, "model.safetensors cannot be read"),
        (damage_json, "cannot be read as JSON"),
        (damage_key, "'latent_dim' is missing"),
        (damage_format, "format 99"),
        (damage_network, "unknown network 'os.system'"),
        (damage_shape, "belongs to another network"),
        (damage_names, "lacks weights"),
    ],
)
def test_damaged_files_are_refused(damage, message, tmp_path) -> None:
    build().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        IntrospectiveVAE.from_pretrained(tmp_path)


def test_a_missing_folder_is_no_hub_name() -> None:
    for name in ("nowhere", "./a/b", "/no/where", "a/b/c"):
        with pytest.raises(CheckpointError, match="no model folder at"):
            IntrospectiveVAE.from_pretrained(name)


def test_a_hub_name_loads_what_the_hub_gives(tmp_path, monkeypatch) -> None:
    import huggingface_hub

    model = build()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path))
    loaded = IntrospectiveVAE.from_pretrained("owner/model")
    assert torch.equal(loaded.reconstruct(torch.ones(1, 1, 8, 8)), model.reconstruct(torch.ones(1, 1, 8, 8)))

    def refuse(name, **_):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match="the hub does not give it: no route"):
        IntrospectiveVAE.from_pretrained("owner/model")


# --- random Fourier features


def test_waves_are_sines_and_cosines_of_fixed_projections_and_are_saved(tmp_path) -> None:
    torch.manual_seed(0)
    options = {"hidden": 8, "waves": 5, "encoder_frequency": 0.25, "decoder_frequency": 2.0}
    model = IntrospectiveVAE.build((3,), "mlp", latent_dim=2, **options)
    x = torch.randn(7, 3)
    projection = model.encoder.features.projection.numpy()
    angles = x.numpy() @ projection
    expected = np.concatenate([x.numpy(), np.sin(angles), np.cos(angles)], axis=1)
    np.testing.assert_allclose(model.encoder.features(x).numpy(), expected, atol=1e-6)
    assert not [name for name, _ in model.named_parameters() if "projection" in name]
    assert projection.shape == (3, 5)
    model.save_pretrained(tmp_path)
    loaded = IntrospectiveVAE.from_pretrained(tmp_path)
    assert torch.equal(loaded.encoder.features.projection, model.encoder.features.projection)
    assert torch.equal(loaded.reconstruct(x), model.eval().reconstruct(x))


def test_waves_have_the_stated_frequency_and_are_not_rounded_under_autocast() -> None:
    torch.manual_seed(0)
    model = IntrospectiveVAE.build((2,), "mlp", latent_dim=2, waves=20_000, hidden=1, decoder_frequency=2.0)
    for part, frequency in ((model.encoder, 0.3), (model.decoder, 2.0)):
        assert part.features.projection.std().item() == pytest.approx(2 * np.pi * frequency, rel=0.02)
    x = torch.randn(16, 2)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.decoder.features(x)
    assert torch.equal(rounded, model.decoder.features(x))
    with pytest.raises(ConfigError, match="encoder_frequency"):
        IntrospectiveVAE.build((2,), "mlp", latent_dim=2, waves=4, encoder_frequency=0.0)
