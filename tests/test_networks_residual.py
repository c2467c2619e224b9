"""The residual pair is the published table's, and every normaliser and the strided pair keep what networks promise."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from introvae import ConfigError, IntrospectiveStep, IntrospectiveVAE, Noise, SoftIntroVAE
from introvae.networks import dcgan, use_gradient_checkpointing
from introvae.networks.blocks import (
    GAIN,
    NORM_PLACES,
    NORMS,
    PixelNorm,
    ResidualBlock,
    StandardizedConv2d,
    make_conv,
    make_linear,
    make_norm,
)
from introvae.networks.equalized import EqualizedConv2d, EqualizedLinear

CASES = [
    *(pytest.param("conv", {"norm": norm}, id=f"conv-{norm}") for norm in NORMS),
    *(
        pytest.param("residual", {"norm": norm, "norm_place": place}, id=f"residual-{norm}-{place}")
        for norm in NORMS
        for place in NORM_PLACES
    ),
    *(pytest.param("dcgan", {"norm": norm, "hidden": 24}, id=f"dcgan-{norm}") for norm in dcgan.NORMS),
]
SIDE, LATENTS = 16, 5


def build(network: str, shape: tuple[int, ...] = (3, SIDE, SIDE), **options: Any) -> IntrospectiveVAE:
    torch.manual_seed(0)
    return IntrospectiveVAE.build(shape, network, LATENTS, **{"channels": [8, 12], **options})


def images(n: int, shape: tuple[int, ...] = (3, SIDE, SIDE)) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(1))


def vae_loss(model: IntrospectiveVAE, x: Tensor) -> Tensor:
    q = model.encode(x)
    z = q.sample(generator=torch.Generator().manual_seed(2))
    return ((x - model.decode(z)) ** 2).sum() + q.kl().sum()


# --- laws


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize(("network", "options"), CASES)
def test_shapes_and_ranges(network: str, options: dict[str, Any], colours: int) -> None:
    shape = (colours, SIDE, SIDE)
    model = build(network, shape, **options)
    x = images(3, shape)
    mean, logvar = model.encoder(x)
    assert mean.shape == logvar.shape == (3, LATENTS)
    assert torch.isfinite(mean).all()
    assert torch.isfinite(logvar).all()
    y = model.decode(10 * torch.randn(3, LATENTS))
    assert y.shape == (3, *shape)
    assert y.dtype == torch.float32
    assert 0 <= y.min() < y.max() <= 1
    for p in model.parameters():
        assert p.dim() != 4 or p.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("network", "options"), CASES)
def test_one_image_gives_what_it_gives_among_many_and_training_mode_what_evaluation_mode_does(
    network: str, options: dict[str, Any]
) -> None:
    model = build(network, **options)
    for buffer in model.buffers():  # statistics that are not those of any batch
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    x = images(12)
    model.eval()
    together = [*model.encoder(x), model.reconstruct(x)]
    for index in (0, 11):
        alone = [*model.encoder(x[index : index + 1]), model.reconstruct(x[index : index + 1])]
        for one, many in zip(alone, together, strict=True):
            assert (one - many[index]).abs().max() <= 1e-5
    model.train()
    apart = [float((a - b).detach().abs().max()) for a, b in zip(model.encoder(x), together, strict=False)]
    assert (min(apart) > 1e-2) if options["norm"] == "batch" else (max(apart) <= 1e-6)


@pytest.mark.parametrize(("network", "options"), CASES)
def test_every_weight_has_a_gradient(network: str, options: dict[str, Any]) -> None:
    model = build(network, **options)
    vae_loss(model, images(4)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.any(), name


@pytest.mark.parametrize(("network", "options"), CASES)
def test_saved_is_loaded(network: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = build(network, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path)
    loaded = IntrospectiveVAE.from_pretrained(tmp_path)
    kept = json.loads((tmp_path / "config.json").read_text())["options"]
    given = {"channels": [8, 12], **options}
    assert kept == {**kept, **given}
    assert ("depth" if network == "dcgan" else "width") in kept  # what was not given, too
    assert list(loaded.state_dict()) == list(model.state_dict())
    x = images(3)
    assert torch.equal(loaded.reconstruct(x), model.eval().reconstruct(x))


@pytest.mark.parametrize("network", ["conv", "residual"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_step_in_bf16_is_close_to_one_in_float32(norm: str, network: str) -> None:
    # Wide enough for a normalisation over the channels to be well conditioned.
    model = build(network, (1, 8, 8), norm=norm, channels=[32])
    x, noise = images(32, (1, 8, 8)), Noise.draw(32, LATENTS, torch.Generator().manual_seed(3))
    wide = copy.deepcopy(model)
    ours = IntrospectiveStep(model, SoftIntroVAE(beta_neg=2.0), precision="bf16")(x, noise)
    theirs = IntrospectiveStep(wide, SoftIntroVAE(beta_neg=2.0))(x, noise)
    for name, value in theirs.items():
        assert ours[name].dtype == torch.float32
        assert float(ours[name]) == pytest.approx(float(value), rel=0.03, abs=1e-3), name
    for a, b in zip(model.parameters(), wide.parameters(), strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert torch.isfinite(a).all()


@pytest.mark.parametrize("norm", NORMS)
def test_checkpointing_changes_no_gradient(norm: str) -> None:
    model = build("residual", norm=norm).double()
    twin = copy.deepcopy(model)
    use_gradient_checkpointing(twin.encoder)
    use_gradient_checkpointing(twin.decoder)
    for used in (model, twin):
        vae_loss(used, images(3).double()).backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, 24, 24), {}, r"of shape \(3, 24, 24\).* 1 or 3 channels and a square side of 8, 16, 32, .*1024 pixels"),
        ((3, 2048, 2048), {}, "resize with --size"),
        ((3, 4, 4), {}, "a square side of 8"),
        ((3, 16, 32), {}, "a square side of 8"),
        ((2, 16, 16), {}, "1 or 3 channels"),
        ((16,), {}, "1 or 3 channels"),
        ((3, 32, 32), {"channels": [4, 4]}, "halves 32 pixels 3 times, down to 4: give 3 channels, not 2"),
        ((3, 8, 8), {"channels": [4, 4]}, "halves 8 pixels 1 times, down to 4: give 1 channels, not 2"),
        ((3, 16, 16), {"channels": []}, "channels is empty: give 1 to 4"),
        ((3, 16, 16), {"channels": [4, -1]}, r"channels\[1\] is -1"),
        ((3, 16, 16), {"channels": [4, 4], "width": 0.5}, "both given"),
        ((3, 16, 16), {"channels": 4}, "values of a wrong kind"),
        ((3, 16, 16), {"width": 0}, "width is 0"),
        ((3, 16, 16), {"norm": "spectral"}, "unknown norm 'spectral': choose one of layer, group, batch, none, pixel"),
        ((3, 16, 16), {"norm_place": "between"}, "unknown norm_place 'between': choose one of before, after"),
        ((3, 16, 16), {"stride": 2}, "unknown option of network 'residual' 'stride'"),
        ((3, 16, 16), {"norm": "weight", "channels": [1, 2]}, "1x1 filter of 1 channel: give 2 channels or more"),
    ],
)
def test_bad_settings_are_refused_in_one_line(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        IntrospectiveVAE.build(shape, "residual", 2, **options)
    assert len(str(refused.value).splitlines()) == 1


def test_the_place_is_the_residual_network_s_alone() -> None:
    with pytest.raises(ConfigError, match="unknown option of network 'conv' 'norm_place'"):
        IntrospectiveVAE.build((3, 16, 16), "conv", 2, norm_place="after")
    with pytest.raises(ConfigError, match="unknown norm 'Layer'"):
        make_conv("Layer", 2, 2, 3)


# --- the normalisers by their equations, in float64 and one value at a time


def test_pixel_norm_is_its_equation() -> None:
    norm = PixelNorm(3).double()
    gains = [0.5, -2.0, 3.0]
    norm.weight.data = torch.tensor(gains, dtype=torch.float64)
    x = torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1, :, 0, 0] = 0.0  # stays 0, no division by it
    y, given = norm(x), x.numpy()
    for n, c, i, j in np.ndindex(2, 3, 2, 4):
        size = math.sqrt(sum(given[n, k, i, j] ** 2 for k in range(3)) / 3 + 1e-8)
        assert float(y[n, c, i, j].detach()) == pytest.approx(gains[c] * given[n, c, i, j] / size, rel=1e-12)
    assert not y[1, :, 0, 0].any()
    assert y.dtype == torch.float64


def test_pixel_norm_keeps_bf16_and_sums_in_float32() -> None:
    norm, x = PixelNorm(512), 3 * torch.randn(2, 512, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x.bfloat16())
    assert y.dtype == torch.bfloat16
    exact = norm(x.bfloat16().float())
    assert (y.float() - exact).abs().max() <= 2**-7 * exact.abs().max()


def correlate(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """A convolution as deep learning has it, with zeros around, by its definition."""
    kernel = weight.shape[2]
    reach = kernel // 2
    padded = np.pad(x, ((0, 0), (0, 0), (reach, reach), (reach, reach)))
    y = np.empty((x.shape[0], weight.shape[0], *x.shape[2:]))
    for n, o, i, j in np.ndindex(*y.shape):
        y[n, o, i, j] = (padded[n, :, i : i + kernel, j : j + kernel] * weight[o]).sum() + bias[o]
    return y


@pytest.mark.parametrize("kernel", [1, 3])
def test_standardized_convolution_is_its_equation(kernel: int) -> None:
    torch.manual_seed(0)
    layer = StandardizedConv2d(4, 3, kernel, gain=0.7).double()
    assert layer.gain.tolist() == pytest.approx([0.7] * 3)
    with torch.no_grad():
        layer.weight.copy_(2 + 5 * torch.randn_like(layer.weight))
        layer.gain.copy_(torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64))
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    weight = layer.weight.detach().numpy()
    used = np.empty_like(weight)
    for o, gain in enumerate([0.3, -1.0, 2.0]):
        values = weight[o].ravel()
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
        used[o] = gain * (weight[o] - mean) / (deviation * math.sqrt(len(values)))
        assert np.square(used[o]).sum() == pytest.approx(gain**2)
    bias = layer.bias.detach().numpy() if layer.bias is not None else np.zeros(3)
    assert np.allclose(layer(x).detach().numpy(), correlate(x.numpy(), used, bias), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kernel", [1, 3])
def test_equalized_convolution_is_its_equation(kernel: int) -> None:
    torch.manual_seed(0)
    layer = EqualizedConv2d(4, 3, kernel, gain=1.3).double()
    nn.init.normal_(layer.bias)  # pyright: ignore[reportArgumentType]
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    used = layer.weight.detach().numpy() * 1.3 / math.sqrt(4 * kernel**2)
    bias = layer.bias.detach().numpy()  # pyright: ignore[reportOptionalMemberAccess]
    assert np.allclose(layer(x).detach().numpy(), correlate(x.numpy(), used, bias), rtol=1e-12)


def test_a_standardized_filter_sees_no_constant_which_is_why_edges_are_plain() -> None:
    flat = torch.full((1, 4, 7, 7), 3.0)
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    layer = make_conv("weight", 4, 6, 3, bias=False)
    assert layer(flat)[inner].abs().max() < 1e-5
    edge = make_conv("weight", 4, 6, 3, bias=False, edge=True)
    assert edge(flat)[inner].abs().min() > 1e-5
    model = build("residual", norm="weight")
    assert type(model.encoder.stem) is type(model.decoder.head) is nn.Conv2d


@pytest.mark.parametrize("network", ["conv", "residual"])
def test_every_layer_of_an_equalized_pair_is_equalized(network: str) -> None:
    coarse: dict[str, Any] = {"coarse": 4} if network == "conv" else {}
    model = build(network, norm="equalized", **coarse)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert all(isinstance(m, EqualizedConv2d | EqualizedLinear) for m in layers)
    assert sum(isinstance(m, nn.Linear) for m in layers) == (4 if network == "conv" else 2)
    assert not any(isinstance(m, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm) for m in model.modules())
    # The rate is all that differs from no normalisation: with one seed both are the same function at the start.
    x, plain = images(3), build(network, norm="none", **coarse)
    assert torch.allclose(model.reconstruct(x), plain.reconstruct(x), atol=1e-5)


@pytest.mark.parametrize(
    ("norm", "kind", "convolution", "shifts"),
    [
        ("layer", nn.LayerNorm, nn.Conv2d, False),
        ("group", nn.GroupNorm, nn.Conv2d, False),
        ("batch", nn.BatchNorm2d, nn.Conv2d, False),
        ("none", nn.Identity, nn.Conv2d, True),
        ("pixel", nn.RMSNorm, nn.Conv2d, True),
        ("weight", nn.Identity, StandardizedConv2d, True),
        ("equalized", nn.Identity, EqualizedConv2d, True),
    ],
)
def test_each_name_makes_its_layers_and_one_shift_for_each(
    norm: str, kind: type[nn.Module], convolution: type[nn.Module], shifts: bool
) -> None:
    assert isinstance(make_norm(norm, 8), kind)
    layer = make_conv(norm, 8, 4, 3)
    assert type(layer) is convolution
    assert (layer.bias is not None) == shifts
    assert make_conv(norm, 8, 4, 3, bias=False).bias is None
    assert ResidualBlock(8, 4, norm).skip.bias is None  # the other summand has one
    assert layer(torch.zeros(1, 8, 6, 5)).shape == (1, 4, 6, 5)
    assert isinstance(make_linear(norm, 4, 4), EqualizedLinear) == (norm == "equalized")


@pytest.mark.parametrize("channels", [16, 128])
def test_group_normalisation_in_bf16_is_the_wide_one_rounded(channels: int) -> None:
    norm = make_norm("group", channels)
    x = torch.randn(2, channels, 8, 8).to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, F.group_norm(x.float(), 8).to(torch.bfloat16))
    found.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def test_pixel_normalisation_in_bf16_is_near_the_wide_one_and_leaves_nothing_at_nothing() -> None:
    norm, x = PixelNorm(16), torch.randn(2, 16, 8, 8)
    x[0, :, 0, 0] = 0
    short = x.to(torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(short)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), norm(short.detach().float()), atol=0.0, rtol=2**-6)
    assert not found[0, :, 0, 0].any()
    found.float().square().sum().backward()
    assert short.grad is not None
    assert bool(short.grad.isfinite().all())


@pytest.mark.parametrize("place", NORM_PLACES)
def test_a_block_is_the_papers_formula(place: str) -> None:
    torch.manual_seed(0)
    block = ResidualBlock(4, 6, "layer", place).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)

    def norm(layer: nn.Module, h: Tensor) -> Tensor:
        centred = h - h.mean(1, keepdim=True)
        return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * layer.weight[:, None, None]  # pyright: ignore

    h = F.conv2d(x, block.conv1.weight, padding=1)
    h = F.conv2d(F.leaky_relu(norm(block.norm1, h), 0.2), block.conv2.weight, padding=1)
    skip = F.conv2d(x, block.skip.weight)  # pyright: ignore
    h = norm(block.norm2, h + skip) if place == "after" else norm(block.norm2, h) + skip
    assert torch.allclose(block(x), F.leaky_relu(h, 0.2), rtol=1e-10)


# --- the start: signals neither fade nor grow through many blocks


def photographs(n: int, side: int) -> Tensor:
    """Like photographs, mostly coarse: octaves of noise whose size falls with their frequency."""
    generator, x, octave = torch.Generator().manual_seed(1), torch.zeros(n, 3, side, side), 2
    while octave <= side:
        noise = torch.randn(n, 3, octave, octave, generator=generator)
        x, octave = x + F.interpolate(noise, size=side, mode="bilinear") / octave**0.75, 2 * octave
    return torch.sigmoid(1.5 * x)


@pytest.mark.parametrize(
    ("side", "width", "norm", "place"),
    [
        *((64, 1 / 4, norm, place) for norm in NORMS for place in NORM_PLACES),
        *((256, 1 / 8, norm, "after") for norm in ("layer", "none", "pixel", "weight", "equalized")),
    ],
)
def test_signals_and_gradients_at_the_start_have_a_sensible_size(
    side: int, width: float, norm: str, place: str
) -> None:
    torch.manual_seed(0)
    model = IntrospectiveVAE.build((3, side, side), "residual", 64, norm=norm, norm_place=place, width=width)
    sizes: list[float] = []
    for block in model.modules():
        if isinstance(block, ResidualBlock):
            block.register_forward_hook(lambda _, __, y: sizes.append(float(y.detach().square().mean().sqrt())))
    x = photographs(1, side)
    vae_loss(model, x).backward()
    assert len(sizes) == 2 * (side.bit_length() - 3) + 1
    # Measured over four seeds: 0.11 to 4.4. Without a normalisation PyTorch's own start goes down to 0.02.
    assert min(sizes) >= 0.1
    assert max(sizes) <= 5
    assert model.reconstruct(x).std() < 0.3  # a coin for each pixel would be 0.5
    # How far the loss moves when a layer's weights change by a given share of themselves: 20 to 410 times as far for
    # one layer as for another.
    moves = [float(p.detach().norm() * p.grad.norm()) for p in model.parameters() if p.dim() > 1 and p.grad is not None]
    assert min(moves) > 1
    assert max(moves) <= 500 * min(moves)


def test_the_gain_keeps_the_energy_through_leaky_relu() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    assert float((GAIN * F.leaky_relu(x, 0.2)).square().mean()) == pytest.approx(1, abs=0.02)


# --- the published table

WIDTHS = {
    64: [64, 128, 256, 512],
    128: [64, 128, 256, 512, 512],
    256: [64, 128, 256, 512, 512, 512],
    512: [32, 64, 128, 256, 512, 512, 512],
    1024: [16, 32, 64, 128, 256, 512, 512, 512],
}
"""The authors' settings, largest resolution first; the copy of App. B at hand lost its column of shapes."""

INFERENCE = ["Conv", *["AvgPool", "Res"] * 8, "FC"]
GENERATOR = ["FC", "Res", *["Up", "Res"] * 8, "Conv"]
"""Rows of IntroVAE's Tab. 1, for 1024 px; each resolution less takes a pair of rows away."""


def table(rows: list[str], side: int, start: tuple[int, int], widths: list[int]) -> list[tuple[str, int, int, int]]:
    """(row, channels in, channels out, side out) of every row that has weights; Res takes the next of `widths`."""
    (channels, size), rest, found = start, list(widths), []
    for row in rows:
        size = {"AvgPool": size // 2, "Up": 2 * size}.get(row, size)
        if row in ("Conv", "Res"):
            width = rest.pop(0)
            found.append((row, channels, width, size))
            channels = width
    assert not rest
    return found


def count(rows: list[tuple[str, int, int, int]]) -> int:
    """Weights of 5x5 and of pairs of 3x3 convolutions without biases, 1x1 where the width changes, two for each channel
    that is normalised; the generator's last layer has a bias and no norm."""
    total = 0
    for row, inputs, outputs, _ in rows:
        if row == "Conv":
            total += 25 * inputs * outputs + (outputs if outputs == 3 else 2 * outputs)
        else:
            total += 9 * inputs * outputs + 9 * outputs * outputs + 4 * outputs
            total += inputs * outputs if inputs != outputs else 0
    return total


@pytest.mark.parametrize("place", NORM_PLACES)
@pytest.mark.parametrize("side", list(WIDTHS))
def test_the_pair_is_the_published_table(side: int, place: str) -> None:
    latents, widths = (256 if side == 128 else 512), WIDTHS[side]
    less = 8 - len(widths)
    inference = INFERENCE[:1] + INFERENCE[1 + 2 * less :]
    generator = GENERATOR[: len(GENERATOR) - 1 - 2 * less] + GENERATOR[-1:]
    encoder_rows = table(inference, side, (3, side), [*widths, widths[-1]])
    decoder_rows = table(generator, side, (widths[-1], 4), [*reversed(widths), widths[0], 3])
    assert encoder_rows[-1][2:] == (512, 4)
    assert decoder_rows[-1][2:] == (3, side)

    with torch.device("meta"):
        model = IntrospectiveVAE.build((3, side, side), "residual", latents, norm="batch", norm_place=place)
        seen: list[tuple[int, int, int]] = []
        layers = [model.encoder.stem, *model.encoder.blocks, *model.decoder.blocks, model.decoder.head]  # pyright: ignore
        for layer in layers:
            layer.register_forward_hook(lambda _, __, y: seen.append(tuple(y.shape[1:])))  # pyright: ignore
        x = torch.empty(2, 3, side, side)
        mean, logvar = model.encoder(x)
        assert model.decoder(mean).shape == x.shape
    assert mean.shape == logvar.shape == (2, latents)
    assert seen == [(outputs, size, size) for _, _, outputs, size in [*encoder_rows, *decoder_rows]]
    linear = 8192 * 2 * latents + 2 * latents, latents * 8192 + 8192
    for network, rows, extra in zip((model.encoder, model.decoder), (encoder_rows, decoder_rows), linear, strict=True):
        assert sum(p.numel() for p in network.parameters()) == count(rows) + extra


def test_before_the_addition_it_is_the_conv_network() -> None:
    ours, theirs = build("residual", norm_place="before"), build("conv")
    for (name, a), (other, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    x = images(2)
    assert torch.equal(ours.reconstruct(x), theirs.reconstruct(x))
    assert (ours.reconstruct(x) - build("residual").reconstruct(x)).abs().max() > 1e-3


@pytest.mark.slow
def test_a_step_at_256_pixels_with_the_published_widths() -> None:
    torch.manual_seed(0)
    model = IntrospectiveVAE.build((3, 256, 256), "residual", 512)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = IntrospectiveStep(model, SoftIntroVAE(beta_rec=0.5, beta_kl=1.0, beta_neg=1024.0))
    record = step(photographs(2, 256))
    assert all(torch.isfinite(value) for value in record.values())
    for name, p in model.named_parameters():
        assert torch.isfinite(p).all(), name
        assert (p != before[name]).any(), name
    assert model.sample(1).shape == (1, 3, 256, 256)
