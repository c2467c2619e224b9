"""The style network obeys its equations, grows without a jump and is one network at every level."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from introvae import ConfigError, DataError, IntrospectiveStep, IntrospectiveVAE, Noise, SoftIntroVAE
from introvae.networks import use_gradient_checkpointing
from introvae.networks.equalized import EqualizedConv2d, EqualizedLinear
from introvae.networks.style import (
    EPS,
    DoublingConv2d,
    HalvingConv2d,
    StyleDecoder,
    StyleEncoder,
    adain,
    blurred,
    build_style,
    instance_norm,
    levels_of,
    pixel_norm,
)

NAME = "style"
SIDES, Z = (4, 8, 16), 3
SMALL: dict[str, Any] = {"channels": [4, 6, 8], "style_dim": 10, "mapping": 2}


def build(colours: int = 3, side: int = 16, double: bool = True, seed: int = 0, **options: Any) -> IntrospectiveVAE:
    """With random biases too: all of them are 0 at first, which would hide what is done with them."""
    torch.manual_seed(seed)
    model = IntrospectiveVAE.build((colours, side, side), NAME, Z, **{**SMALL, **options})
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model.double() if double else model


def pair(**options: Any) -> tuple[StyleEncoder, StyleDecoder]:
    model = build(**options)
    assert isinstance(model.encoder, StyleEncoder)
    assert isinstance(model.decoder, StyleDecoder)
    return model.encoder, model.decoder


def images(side: int, n: int = 3, channels: int = 3) -> Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(side), dtype=torch.float64)


def latents(n: int = 3) -> Tensor:
    return torch.randn(n, Z, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def share(alpha: float) -> Tensor:
    return torch.tensor(alpha)


def doubled(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def halved(x: Tensor) -> Tensor:
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-12) -> bool:
    assert ours.shape == theirs.shape
    return bool((ours - theirs).abs().max() <= tolerance * theirs.detach().abs().max().clamp(min=1.0))


# --- the equations, written anew in float64


def conv(layer: EqualizedConv2d, x: Tensor) -> Tensor:
    """A convolution with zeros around, pixel by pixel."""
    k = layer.weight.shape[-1]
    padded = F.pad(x, (k // 2,) * 4)
    weight = layer.weight * layer.scale
    out = torch.empty(len(x), len(weight), *x.shape[2:], dtype=x.dtype)
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            out[:, :, i, j] = torch.einsum("nckl,ockl->no", padded[:, :, i : i + k, j : j + k], weight)
    return out + layer.bias[None, :, None, None]  # pyright: ignore


def linear(layer: EqualizedLinear, x: Tensor) -> Tensor:
    return x @ (layer.weight * layer.scale).T + layer.lr_multiplier * layer.bias


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)


def soft(x: Tensor) -> Tensor:
    """The (1, 2, 1) / 4 filter, with the edge repeated outside."""
    for dim in (2, 3):
        n = x.shape[dim]
        before, after = ([max(i - 1, 0) for i in range(n)], [min(i + 1, n - 1) for i in range(n)])
        x = (x.index_select(dim, torch.tensor(before)) + 2 * x + x.index_select(dim, torch.tensor(after))) / 4
    return x


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each sample's channels, `[N, C]`."""
    found = [[(float(c.sum()) / c.numel(), c) for c in sample] for sample in x]
    means = torch.tensor([[mean for mean, _ in row] for row in found], dtype=torch.float64)
    stds = [[math.sqrt(float(((c - mean) ** 2).sum()) / c.numel() + EPS) for mean, c in row] for row in found]
    return means, torch.tensor(stds, dtype=torch.float64)


def normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = moments(x)
    return (x - mean[:, :, None, None]) / std[:, :, None, None], torch.cat([mean, std], dim=1)


def styled(x: Tensor, style: Tensor) -> Tensor:
    width = x.shape[1]
    return normalised(x)[0] * (1 + style[:, :width, None, None]) + style[:, width:, None, None]


def mapped(layers: nn.Sequential, x: Tensor) -> Tensor:
    for layer in layers:
        x = linear(layer, x) if isinstance(layer, EqualizedLinear) else leaky(x)
    return x


def encoded(encoder: Any, x: Tensor) -> Tensor:
    h = leaky(conv(encoder.from_rgb[-1], 2 * x - 1))
    style = torch.zeros(len(x), 10, dtype=torch.float64)
    for block in list(encoder.blocks)[:0:-1]:
        h, first = normalised(leaky(conv(block.conv1, h)))
        h, second = normalised(leaky(halved(conv(block.conv2, soft(h)))))
        style += linear(block.style1, first) + linear(block.style2, second)
    block = encoder.blocks[0]
    h, first = normalised(leaky(conv(block.conv, h)))
    style += linear(block.style1, first) + linear(block.style2, leaky(linear(block.dense, h.flatten(1))))
    return mapped(encoder.mapping, style)


def decoded(decoder: Any, z: Tensor) -> Tensor:
    w = mapped(decoder.mapping, z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt())
    h = decoder.constant.expand(len(z), -1, -1, -1)
    for block in decoder.blocks:
        h = leaky(h) if block.conv1 is None else leaky(soft(conv(block.conv1, doubled(h))))
        h = styled(h, linear(block.style1, w))
        h = styled(leaky(conv(block.conv2, h)), linear(block.style2, w))
    return 1 / (1 + (-conv(decoder.to_rgb[-1], h)).exp())


@torch.no_grad()
def test_the_networks_equal_their_equations() -> None:
    encoder, decoder = pair()
    mean, logvar = encoder(images(16))
    assert close(torch.cat([mean, logvar], dim=1), encoded(encoder, images(16)))
    assert close(decoder(latents()), decoded(decoder, latents()))


def test_styles_equal_their_equations() -> None:
    x = 2 + 3 * torch.randn(2, 4, 5, 5, dtype=torch.float64)
    style = torch.randn(2, 8, dtype=torch.float64)
    assert close(adain(x, style), styled(x, style))
    for ours, theirs in zip(instance_norm(x), normalised(x), strict=True):
        assert close(ours, theirs)
    z = torch.randn(5, 7, dtype=torch.float64)
    assert close(pixel_norm(z).square().mean(1), torch.ones(5, dtype=torch.float64), 1e-6)


def test_resampling_in_one_convolution_equals_two_steps() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for layer, two_steps in (
        (HalvingConv2d(3, 5).double(), lambda plain: halved(plain(x))),
        (DoublingConv2d(3, 5).double(), lambda plain: plain(doubled(x))),
    ):
        nn.init.normal_(layer.bias)  # pyright: ignore[reportArgumentType]
        plain = EqualizedConv2d(3, 5, 3).double()
        plain.load_state_dict(layer.state_dict())
        assert close(layer(x), two_steps(plain))
    bilinear = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    assert close(blurred(doubled(x)), bilinear)
    assert close(blurred(x), soft(x))


# --- levels


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("fading", [False, True])
def test_shapes_at_every_level(side: int, channels: int, fading: bool) -> None:
    model = build(channels)
    if fading and side == SIDES[0]:
        with pytest.raises(ConfigError, match="no level below 4 pixels"):
            model.grow(side, share(0.5))
        return
    model.grow(side, share(0.5) if fading else None)
    assert model.shape == (channels, side, side)
    x = images(side, 2, channels)
    posterior = model.encode(x)
    assert posterior.mean.shape == posterior.logvar.shape == (2, Z)
    y = model.decode(latents(2))
    assert y.shape == x.shape
    assert 0 < y.min() < y.max() < 1
    assert model.reconstruct(x).shape == x.shape
    with pytest.raises(DataError, match=rf"takes data of shape \({channels}, {side}, {side}\)"):
        model.encode(images(2 * side, 2, channels))


@pytest.mark.parametrize("side", SIDES[1:])
def test_a_level_begins_as_the_one_before_and_ends_as_itself(side: int) -> None:
    encoder, decoder = pair()
    found: dict[float | None, list[Tensor]] = {}
    for alpha in (0.0, 0.25, 1.0, None):
        for network in (encoder, decoder):
            network.grow(side, None if alpha is None else share(alpha))
        found[alpha] = [decoder(latents()), *encoder(images(side))]
    for network in (encoder, decoder):
        network.grow(side // 2)
    before = [doubled(decoder(latents())), *encoder(halved(images(side)))]
    for a, b in zip(found[0.0], before, strict=True):
        assert close(a, b, 1e-14)
    for a, b in zip(found[1.0], found[None], strict=True):
        assert torch.equal(a, b)
    assert not close(before[0], found[None][0], 1e-2)
    assert not close(before[1], found[None][1], 1e-2)
    assert close(found[0.25][0], 0.75 * before[0] + 0.25 * found[None][0])
    assert not any(close(found[0.25][1], other[1], 1e-3) for other in (found[0.0], found[1.0]))


def test_the_share_changes_in_place() -> None:
    _, decoder = pair()
    alpha = share(0.0)
    decoder.grow(16, alpha)
    first = decoder(latents())
    alpha.fill_(0.5)
    assert not torch.equal(decoder(latents()), first)


def used(network: nn.Module) -> set[str]:
    return {name for name, p in network.named_parameters() if p.grad is not None and bool(p.grad.any())}


@pytest.mark.parametrize(("side", "alpha"), [(16, None), (16, 0.5), (8, None), (8, 0.5), (4, None)])
def test_gradients_reach_every_weight_of_the_level(side: int, alpha: float | None) -> None:
    model = build(double=True)
    model.grow(side, None if alpha is None else share(alpha))
    posterior = model.encode(images(side))
    (model.decode(posterior.mean) * images(side)).sum().backward(retain_graph=True)
    posterior.kl().sum().backward()
    level = SIDES.index(side)
    colours = {level} if alpha is None else {level, level - 1}
    for network in (model.encoder, model.decoder):
        expected = set()
        for name, _ in network.named_parameters():
            group, _, rest = name.partition(".")
            seen = {"blocks": lambda k: k <= level, "from_rgb": colours.__contains__, "to_rgb": colours.__contains__}
            if group not in seen or seen[group](int(rest.split(".")[0])):
                expected.add(name)
        assert used(network) == expected


def test_levels_of_sides() -> None:
    assert levels_of(256) == (4, 8, 16, 32, 64, 128, 256)
    assert [levels_of(side) for side in (4, 7, 12, 20)] == [(4,), (7,), (6, 12), (5, 10, 20)]
    assert [levels_of(side) for side in (1, 3, 9, 30, 2 * 9)] == [()] * 5
    model = build(1, 28, channels=[3, 4, 5])
    assert model.encoder.sides == model.decoder.sides == (7, 14, 28)
    assert model.reconstruct(images(28, 2, 1)).shape == (2, 1, 28, 28)
    one = build(1, 4, channels=[5])
    assert one.sample(2).shape == (2, 1, 4, 4)


# --- one model


@pytest.mark.parametrize("fading", [False, True])
def test_a_batch_of_one_equals_a_batch_of_many(fading: bool) -> None:
    model = build()
    model.grow(16, share(0.3) if fading else None)
    x, z = images(16, 4), latents(4)
    together = [model.encode(x).mean, model.encode(x).logvar, model.decode(z)]
    alone = [
        torch.cat([model.encode(one).mean for one in x.split(1)]),
        torch.cat([model.encode(one).logvar for one in x.split(1)]),
        torch.cat([model.decode(one) for one in z.split(1)]),
    ]
    for a, b in zip(together, alone, strict=True):
        assert close(a, b, 1e-13)


def test_decoding_draws_nothing_and_training_mode_changes_nothing() -> None:
    model = build()
    state = torch.get_rng_state()
    first = [model.train().decode(latents()), model.encode(images(16)).mean]
    again = [model.eval().decode(latents()), model.encode(images(16)).mean]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_saved_is_the_whole_network_at_any_level(tmp_path: Path) -> None:
    model = build(double=False)
    x = images(16).float()
    expected = model.reconstruct(x)
    keys = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.grow(8, share(0.5))
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == keys
    model.save_pretrained(tmp_path)
    loaded = IntrospectiveVAE.from_pretrained(tmp_path)
    assert loaded.shape == (3, 16, 16)
    assert torch.equal(loaded.reconstruct(x), expected)


def test_images_of_one_colour_have_finite_gradients() -> None:
    model = build()
    flat = torch.full((2, 3, 16, 16), 0.5, dtype=torch.float64, requires_grad=True)
    model.encode(flat).kl().sum().backward()
    gradients = [g for g in (flat.grad, *(p.grad for p in model.encoder.parameters())) if g is not None]
    assert len(gradients) > 10
    assert all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_forgetting_stages_changes_no_gradient(alpha: float | None) -> None:
    model = build()
    twin = copy.deepcopy(model)
    use_gradient_checkpointing(twin.encoder)
    use_gradient_checkpointing(twin.decoder)
    noise = Noise.draw(3, Z, torch.Generator().manual_seed(0), dtype=torch.float64)
    records = []
    for each in (model, twin):
        each.grow(16, None if alpha is None else share(alpha))
        records.append(IntrospectiveStep(each, SoftIntroVAE(beta_neg=4.0))(images(16), noise))
    for name, value in records[0].items():
        assert close(records[1][name], value)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert close(a, b, 1e-9)


def test_it_computes_in_bf16() -> None:
    model = build(double=False)
    exact = model.encode(images(16).float())
    for alpha in (None, share(0.5)):
        model.grow(16, alpha)
        record = IntrospectiveStep(model, SoftIntroVAE(beta_neg=4.0), precision="bf16")(images(16).float())
        assert all(value.isfinite() for value in record.values())
    model = build(double=False)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.encode(images(16).float())
        assert model.decode(latents().float()).dtype == torch.float32
    assert rounded.mean.dtype == torch.float32
    assert 0 < (rounded.mean - exact.mean).abs().max() < 0.1 * exact.mean.abs().max()


def test_signals_keep_their_size_at_the_start() -> None:
    torch.manual_seed(0)
    model = IntrospectiveVAE.build((3, 32, 32), NAME, 64, width=1 / 16, style_dim=64)
    x = torch.rand(16, 3, 32, 32)
    posterior = model.encode(x)
    assert 0.1 < posterior.mean.std() < 3
    assert 0.1 < posterior.logvar.std() < 3
    w = model.decoder.mapping(pixel_norm(torch.randn(64, 64)))  # pyright: ignore
    assert 0.3 < w.square().mean() < 3
    assert 0.1 < model.sample(64).std() < 0.4


# --- what is built


def published_weights(side: int) -> tuple[int, int]:
    """Weights of encoder and decoder, counted from the layer table."""
    z = w = 512
    width = {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64}
    sides = [s for s in width if s <= side]

    def layer(inputs: int, outputs: int, kernel: int = 1) -> int:
        return inputs * outputs * kernel**2 + outputs

    encoder = sum(layer(3, width[s]) for s in sides) + 2 * layer(w, w) + layer(w, 2 * z)
    decoder = 8 * layer(z, w) + 512 * 16 + sum(layer(width[s], 3) for s in sides)
    encoder += layer(512, 512, 3) + layer(512 * 16, 512) + layer(2 * 512, w) + layer(512, w)
    decoder += layer(512, 512, 3) + 2 * layer(w, 2 * 512)
    for s in sides[1:]:
        large, small = width[s], width[s // 2]
        encoder += layer(large, large, 3) + layer(large, small, 3) + layer(2 * large, w) + layer(2 * small, w)
        decoder += layer(small, large, 3) + layer(large, large, 3) + 2 * layer(w, 2 * large)
    return encoder, decoder


def test_the_published_network_for_256_pixels() -> None:
    with torch.device("meta"):
        model = IntrospectiveVAE.build((3, 256, 256), NAME, 512)
    encoder, decoder = model.encoder, model.decoder
    assert [layer.out_channels for layer in encoder.from_rgb] == [512, 512, 512, 512, 256, 128, 64]  # pyright: ignore
    assert [layer.in_channels for layer in decoder.to_rgb] == [512, 512, 512, 512, 256, 128, 64]  # pyright: ignore
    assert decoder.constant.shape == (1, 512, 4, 4)
    assert sum(isinstance(layer, EqualizedLinear) for layer in decoder.mapping) == 8  # pyright: ignore
    counts = tuple(sum(p.numel() for p in network.parameters()) for network in (encoder, decoder))
    assert counts == published_weights(256) == (29_413_440, 26_080_725)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, 30, 30), {}, r"cannot take data of shape \(3, 30, 30\).* halves down to 4, 5, 6 or 7 pixels; resize with"),
        ((3, 16, 8), {}, "a square side"),
        ((2, 16, 16), {}, "1 or 3 channels"),
        ((16,), {}, "cannot take data of shape"),
        ((1, 16, 16), {"channels": [4, 8]}, "2 channel widths for 3 levels: give one for each of 16, 8, 4 pixels"),
        ((1, 16, 16), {"channels": [4, 8, 0]}, r"channels\[2\] is 0"),
        ((1, 16, 16), {"channels": [4, 8, 1.5]}, r"channels\[2\] is 1.5: it must be a whole number"),
        ((1, 16, 16), {"channels": [4, 8, 8], "width": 0.5}, "both given"),
        ((1, 16, 16), {"style_dim": 0}, "style_dim is 0"),
        ((1, 16, 16), {"mapping": 1.5}, "mapping is 1.5: it must be a whole number"),
        ((1, 16, 16), {"mapping_lr": -1}, "mapping_lr is -1"),
    ],
)
def test_what_cannot_be_built_is_said(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as found:
        IntrospectiveVAE.build(shape, NAME, 2, **options)
    assert "\n" not in str(found.value)


def test_what_cannot_grow_is_said() -> None:
    with pytest.raises(ConfigError, match="no level of 32 pixels: take one of 4, 8, 16"):
        build().grow(32)
    with pytest.raises(ConfigError, match="ConvEncoder cannot grow: take network style"):
        IntrospectiveVAE.build((1, 8, 8), "tiny-conv", 2).grow(8)


def test_width_is_a_factor_on_the_published_channels() -> None:
    half, tiny = (build_style((1, 64, 64), 2, width=width, style_dim=4)[0] for width in (0.5, 1 / 512))
    assert [layer.out_channels for layer in half.from_rgb] == [256, 256, 256, 256, 128]  # pyright: ignore
    assert [layer.out_channels for layer in tiny.from_rgb] == [1] * 5  # pyright: ignore


@pytest.mark.slow
def test_a_full_step_with_published_widths_at_64_pixels() -> None:
    torch.manual_seed(0)
    model = IntrospectiveVAE.build((3, 64, 64), NAME, 512)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = IntrospectiveStep(model, SoftIntroVAE(beta_rec=0.4, beta_kl=0.2, beta_neg=512, scale=5e-6), lr=1e-3)
    record = step(torch.rand(2, 3, 64, 64))
    assert all(value.isfinite() for value in record.values())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "_rgb." not in name or "_rgb.4." in name}  # colours of the full level


@pytest.mark.slow
def test_a_step_in_the_midst_of_a_blend_with_published_widths_at_256_pixels() -> None:
    torch.manual_seed(0)
    model = IntrospectiveVAE.build((3, 256, 256), NAME, 512)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.grow(256, torch.tensor(0.5))
    step = IntrospectiveStep(model, SoftIntroVAE(beta_rec=0.4, beta_kl=0.2, beta_neg=512, scale=5e-6), lr=1.5e-3)
    record = step(torch.rand(2, 3, 256, 256))
    assert all(value.isfinite() for value in record.values())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    blended = ("_rgb.5.", "_rgb.6.")  # colours of 128 and of 256 pixels
    assert moved == {name for name in before if "_rgb." not in name or any(level in name for level in blended)}


tiny = partial(build_style, width=1 / 128, style_dim=8, mapping=2)


def test_the_tiny_network_is_tiny() -> None:
    encoder, decoder = tiny((1, 16, 16), 2)
    assert sum(p.numel() for p in (*encoder.parameters(), *decoder.parameters())) < 5000
