"""The strided pair. What all image networks promise is tested in test_networks_residual.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from introvae import ConfigError, IntrospectiveStep, IntrospectiveVAE, Noise, SoftIntroVAE
from introvae.networks import dcgan, use_gradient_checkpointing


def images(n: int, shape: tuple[int, ...]) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("shape", "channels"),
    [
        ((1, 28, 28), [16, 32]),
        ((3, 32, 32), [16, 32, 64]),
        ((1, 64, 64), [16, 32, 64, 128]),
        ((3, 40, 40), [16, 32, 64]),
        ((3, 512, 512), [16, 32, 64, 128, 256, 512, 512]),
    ],
)
def test_channels_double_from_16_to_512_down_to_4_to_7_pixels(shape: tuple[int, ...], channels: list[int]) -> None:
    with torch.device("meta"):
        encoder, decoder = dcgan.build_dcgan(shape, 16, hidden=8)
    assert [conv.out_channels for conv in encoder.convs] == channels  # pyright: ignore
    assert [conv.in_channels for conv in decoder.convs] == channels[::-1]  # pyright: ignore
    assert decoder.side == shape[1] >> len(channels)
    assert len(encoder.layers) == 3  # pyright: ignore


def test_without_fully_connected_layers_it_is_dcgan() -> None:
    model = IntrospectiveVAE.build((1, 16, 16), "dcgan", 5, channels=[4, 8], depth=0)
    kinds = [type(m).__name__ for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
    assert kinds == ["Conv2d", "Conv2d", "Linear", "Linear", "ConvTranspose2d", "ConvTranspose2d"]
    assert model.reconstruct(images(2, (1, 16, 16))).shape == (2, 1, 16, 16)


@pytest.mark.parametrize("norm", dcgan.NORMS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 64)])
def test_signals_at_the_start_have_a_sensible_size(shape: tuple[int, ...], norm: str) -> None:
    torch.manual_seed(0)
    model = IntrospectiveVAE.build(shape, "dcgan", 16, norm=norm)
    sizes: list[float] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            module.register_forward_hook(lambda _, __, y: sizes.append(float(y.detach().square().mean().sqrt())))
    model.encoder(images(8, shape))
    model.decoder(torch.randn(64, 16, generator=torch.Generator().manual_seed(2)))
    assert len(sizes) == len([m for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)])
    assert min(sizes) >= 0.2
    assert max(sizes) <= 3
    assert model.sample(16).std() < 0.2  # grey, not black and white


def assert_checkpointing_changes_nothing(model: IntrospectiveVAE, x: Tensor) -> None:
    """A VAE's gradients are the same, and none is missing, where the stages are computed again."""
    twin = copy.deepcopy(model)
    use_gradient_checkpointing(twin.encoder)
    use_gradient_checkpointing(twin.decoder)
    for used in (model, twin):
        q = used.encode(x)
        z = q.sample(generator=torch.Generator().manual_seed(2))
        (((x - used.decode(z)) ** 2).sum() + q.kl().sum()).backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", dcgan.NORMS)
def test_checkpointing_changes_no_gradient(norm: str) -> None:
    torch.manual_seed(0)
    model = IntrospectiveVAE.build((3, 16, 16), "dcgan", 5, channels=[8, 12], hidden=24, norm=norm).double()
    assert_checkpointing_changes_nothing(model, images(4, (3, 16, 16)).double())


@pytest.mark.parametrize("norm", dcgan.NORMS)
def test_a_step_in_bf16_is_close_to_one_in_float32(norm: str) -> None:
    torch.manual_seed(0)
    model = IntrospectiveVAE.build((1, 8, 8), "dcgan", 5, channels=[32], hidden=32, norm=norm)
    x, noise = images(32, (1, 8, 8)), Noise.draw(32, 5, torch.Generator().manual_seed(3))
    wide = copy.deepcopy(model)
    ours = IntrospectiveStep(model, SoftIntroVAE(beta_neg=2.0), precision="bf16")(x, noise)
    theirs = IntrospectiveStep(wide, SoftIntroVAE(beta_neg=2.0))(x, noise)
    for name, value in theirs.items():
        assert ours[name].dtype == torch.float32
        assert float(ours[name]) == pytest.approx(float(value), rel=0.03, abs=1e-3), name


@pytest.mark.slow
def test_a_step_at_full_size() -> None:
    model = IntrospectiveVAE.build((3, 256, 256), "dcgan", 128)
    record = IntrospectiveStep(model, SoftIntroVAE(beta_neg=64.0))(images(2, (3, 256, 256)))
    assert all(value.isfinite() for value in record.values())


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, 44, 44), {}, r"network 'dcgan' cannot take data of shape \(3, 44, 44\): it takes .* resize with --size"),
        ((2, 16, 16), {}, "1 or 3 channels"),
        ((3, 16, 32), {}, "a square side of"),
        ((16,), {}, "a square side of"),
        ((1, 28, 28), {"channels": [4, 4, 4]}, "3 channel widths .* 28 pixels do not allow: give 1 to 2"),
        ((1, 28, 28), {"channels": []}, "channels is empty: give 1 to 2"),
        ((1, 28, 28), {"channels": [4, 0]}, r"channels\[1\] is 0"),
        ((1, 28, 28), {"hidden": 0}, "hidden is 0"),
        ((1, 28, 28), {"hidden": 1.5}, "hidden is 1.5"),
        ((1, 28, 28), {"depth": -1}, "depth is -1"),
        ((1, 28, 28), {"norm": "weight"}, "unknown norm 'weight': choose one of none, layer, pixel, group, batch"),
        ((1, 28, 28), {"width": 2}, "unknown option of network 'dcgan' 'width'"),
    ],
)
def test_bad_settings_are_refused_in_one_line(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        IntrospectiveVAE.build(shape, "dcgan", 2, **options)
    assert len(str(refused.value).splitlines()) == 1
