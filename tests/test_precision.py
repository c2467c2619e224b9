"""bf16 steps: wide where it matters, close to float32, and really bf16."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
    Warmup,
    fit,
)
from introvae.precision import float32_multiplications, multiplies_bf16, pick_precision, unrounded, wide
from introvae.training.checkpoint import list_checkpoints

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))
IMAGE, VECTOR = (1, 8, 8), (2,)

SOFT: dict[str, Any] = {"beta_rec": 0.7, "beta_kl": 0.4, "beta_neg": 1.9}
OBJECTIVES: dict[str, Objective] = {
    "vae": VAE(beta_kl=0.5),
    "introvae": IntroVAE(beta=0.6, margin=2.0),
    "soft": SoftIntroVAE(**SOFT),
    "soft-gamma": SoftIntroVAE(**SOFT, gamma_r=1.0),
    "soft-gamma-official": SoftIntroVAE(**SOFT, gamma_r=1.0, variant="official_code"),
    "as": ASIntroVAE(**SOFT),
    "as-real": ASIntroVAE(**SOFT, contrast="real-sample"),
}
NETWORKS: dict[str, dict[str, Any]] = {
    "conv": {"network": "conv", "channels": [32]},  # a layer norm over fewer channels is badly conditioned
    "conv-none": {"network": "tiny-conv", "norm": "none"},
    "conv-batch": {"network": "tiny-conv", "norm": "batch"},
    "mlp": {"network": "mlp", "hidden": 32},
}


def build(network: str, seed: int = 0) -> IntrospectiveVAE:
    torch.manual_seed(seed)
    model = IntrospectiveVAE.build(IMAGE, latent_dim=3, **NETWORKS[network])
    for p in model.parameters():  # far enough from the start that no term is negligible
        p.data.mul_(1.5)
    return model


def batch(n: int = 64, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Noise]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, *IMAGE, generator=generator).to(dtype), Noise.draw(n, 3, generator, dtype=dtype)


def values_of(objective: Objective) -> dict[str, Tensor]:
    """Amid the annealing, where every term counts."""
    return {name: torch.tensor(value) for name, value in objective.values(0.06).items()}


def gradients(step: IntrospectiveStep) -> dict[str, Tensor]:
    """Each player's at the moment its optimiser steps, as one vector."""
    seen: dict[str, Tensor] = {}
    players = {
        "encoder": (step.encoder_optimizer, step.encoder_params),
        "decoder": (step.decoder_optimizer, step.decoder_params),
    }
    for name, (optimizer, params) in players.items():

        def hook(*_: Any, name: str = name, params: list[nn.Parameter] = params) -> None:
            assert all(p.grad is not None and p.grad.dtype == p.dtype for p in params)
            seen[name] = torch.cat([p.grad.flatten() for p in params if p.grad is not None])

        optimizer.register_step_pre_hook(hook)
    return seen


def tensors(x: Any) -> list[Tensor]:
    """All tensors of nested plain values."""
    if isinstance(x, Tensor):
        return [x]
    inner = x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else []
    return [tensor for value in inner for tensor in tensors(value)]


# --- choosing


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.int64, torch.int64),
    ],
)
def test_wide_widens_the_half_formats_only(dtype: torch.dtype, expected: torch.dtype) -> None:
    x = torch.tensor([1, -3], dtype=dtype)
    y = wide(x)
    assert y.dtype == expected
    assert y.tolist() == [1, -3]
    assert (y is x) == (dtype == expected)


def test_an_unrounded_layer_takes_no_part_in_autocast() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 4), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        whole = unrounded(layer, x)
        half = unrounded(layer, x.bfloat16())
        assert layer(x).dtype == torch.bfloat16
    assert whole.dtype == half.dtype == torch.float32
    assert torch.equal(whole, layer(x))
    assert torch.equal(half, layer(x.bfloat16().float()))
    assert unrounded(layer.double(), x.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "device", "shape", "hardware", "expected"),
    [
        ("auto", CPU, IMAGE, True, "bf16"),
        ("auto", CPU, IMAGE, False, "float32"),
        ("auto", CUDA, IMAGE, True, "bf16"),
        ("auto", CUDA, IMAGE, False, "tf32"),
        ("auto", MPS, IMAGE, False, "float32"),
        *(("auto", device, VECTOR, hardware, "float32") for device in (CPU, CUDA, MPS) for hardware in (True, False)),
        *((name, CUDA, IMAGE, hardware, name) for name in ("float32", "tf32", "bf16") for hardware in (True, False)),
        ("float32", CPU, IMAGE, True, "float32"),
        ("bf16", CPU, IMAGE, False, "bf16"),
    ],
)
def test_picked_precision(monkeypatch, name: str, device: torch.device, shape, hardware: bool, expected: str) -> None:
    monkeypatch.setattr("introvae.precision.multiplies_bf16", lambda asked: asked == device and hardware)
    assert pick_precision(name, device, shape) == expected


def test_impossible_and_unknown_precisions_are_refused() -> None:
    with pytest.raises(ConfigError, match="'tf32' is for NVIDIA GPUs, this run is on cpu: choose auto or float32"):
        pick_precision("tf32", CPU, IMAGE)
    with pytest.raises(ConfigError, match="unknown precision 'fp16': choose one of auto, float32, tf32, bf16"):
        pick_precision("fp16", CPU, IMAGE)
    with pytest.raises(ConfigError, match="unknown precision 'auto': choose one of float32, tf32, bf16"):
        IntrospectiveStep(build("mlp"), VAE(), precision="auto")


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True)])
def test_a_cpu_multiplies_bf16_with_either_unit(monkeypatch, avx512: bool, amx: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert multiplies_bf16(CPU) == (avx512 or amx)
    assert not multiplies_bf16(MPS)


def tf32_flags() -> tuple[Any, Any]:
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision


NAMES = pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this torch has only allow_tf32"
)


def test_float32_multiplications_may_be_left_in_another_order() -> None:
    """As threads and generators do: afterwards the setting is what it was."""

    def found() -> tuple[str, str]:
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision  # pyright: ignore

    before = found()
    first, second = float32_multiplications(tf32=False), float32_multiplications(tf32=True)
    first.__enter__()
    assert found() == ("ieee", "ieee")
    second.__enter__()
    first.__exit__(None, None, None)
    assert found() == ("tf32", "tf32")
    second.__exit__(None, None, None)
    assert found() == before


@NAMES
@pytest.mark.parametrize("before", [("none", "tf32"), ("tf32", "ieee")])
@pytest.mark.parametrize("tf32", [True, False])
def test_float32_multiplications_are_restored(before: tuple[str, str], tf32: bool) -> None:
    found = tf32_flags()
    try:
        torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = before
        with float32_multiplications(tf32):
            assert tf32_flags() == (("tf32", "tf32") if tf32 else ("ieee", "ieee"))
        assert tf32_flags() == before
        with pytest.raises(KeyError), float32_multiplications(tf32):
            raise KeyError
        assert tf32_flags() == before
    finally:
        torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = found


@NAMES
def test_a_user_s_choice_by_torch_s_newer_names_is_no_obstacle() -> None:
    """In a process of its own: torch cannot go back to where the newer names were not used."""
    code = """
import torch
torch.backends.cuda.matmul.fp32_precision = "tf32"
from introvae.precision import float32_multiplications
with float32_multiplications(False):
    pass
assert torch.backends.cuda.matmul.fp32_precision == "tf32"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


# --- the step


@pytest.mark.parametrize("network", list(NETWORKS))
@pytest.mark.parametrize("warming", [False, True])
def test_all_but_the_layers_stays_float32(network: str, warming: bool) -> None:
    model = build(network)
    posteriors, images = [], []
    layers: dict[str, set[torch.dtype]] = {}
    encode, decode = model.encode, model.decode
    model.encode = lambda x, condition=None: posteriors.append(encode(x, condition)) or posteriors[-1]
    model.decode = lambda z, condition=None: images.append((z, decode(z, condition))) or images[-1][1]
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            seen = layers[name] = set()
            module.register_forward_hook(lambda _module, _inputs, output, seen=seen: seen.add(output.dtype))
    step = IntrospectiveStep(model, SoftIntroVAE(**SOFT, gamma_r=0.5), precision="bf16")
    step(*batch(), warming=warming)
    record = step(*batch(), warming=warming)
    posterior = [name for name in layers if name.startswith("encoder.")][-1]
    assert layers.pop(posterior) == {torch.float32}
    assert all(seen == {torch.bfloat16} for seen in layers.values()), layers
    float32 = {torch.float32}
    assert {value.dtype for value in record.values()} == float32
    assert {p.dtype for q in posteriors for p in (q.mean, q.logvar)} == float32
    assert {tensor.dtype for pair in images for tensor in pair} == float32
    assert {tensor.dtype for tensor in tensors(step.state_dict()) if tensor.is_floating_point()} == float32
    moments = [m for o in (step.encoder_optimizer, step.decoder_optimizer) for m in o.state.values()]
    assert len(moments) == len(list(model.parameters()))
    assert {m[name].dtype for m in moments for name in ("exp_avg", "exp_avg_sq")} == float32
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("network", list(NETWORKS))
@pytest.mark.parametrize("case", [*OBJECTIVES, "warming"])
def test_losses_and_gradients_are_near_those_of_float32_and_not_the_same(case: str, network: str) -> None:
    objective = OBJECTIVES.get(case, SoftIntroVAE(**SOFT))
    values = values_of(objective)
    records, grads = [], []
    for precision in ("float32", "bf16"):
        step = IntrospectiveStep(build(network), objective, warmup=Warmup(1, 1.0, 0.3), precision=precision)
        grads.append(gradients(step))
        records.append(step(*batch(), values, warming=case == "warming"))
    for name, expected in records[0].items():
        assert records[1][name] != expected, name
        assert records[1][name].item() == pytest.approx(expected.item(), rel=0.02), name
    for player, expected in grads[0].items():
        found = grads[1][player]
        assert not torch.equal(found, expected)
        assert (found - expected).norm() <= 0.06 * expected.norm(), player


@pytest.mark.parametrize("share", [True, False], ids=["shared", "recomputed"])
@pytest.mark.parametrize("case", list(OBJECTIVES))
def test_every_weight_has_a_gradient_whoever_looked_first(case: str, share: bool) -> None:
    """Autocast keeps a phase's casts: one made without gradients must not serve a pass that needs them."""
    step = IntrospectiveStep(build("conv"), OBJECTIVES[case], precision="bf16", share=share)
    seen = gradients(step)  # whose hook asserts it
    step(*batch(8), values_of(step.objective))
    assert all(seen[player].any() for player in ("encoder", "decoder"))


def test_tf32_and_float32_leave_a_cpu_s_step_as_it_is() -> None:
    records = [
        IntrospectiveStep(build("conv"), SoftIntroVAE(**SOFT), precision=precision)(*batch(8))
        for precision in ("float32", "tf32")
    ]
    assert records[0] == records[1]


@pytest.mark.parametrize("precision", ["float32", "tf32"])
@pytest.mark.parametrize("network", ["conv", "mlp"])
def test_float64_stays_float64(network: str, precision: str) -> None:
    model = build(network).double()
    seen: set[torch.dtype] = set()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    step = IntrospectiveStep(model, SoftIntroVAE(**SOFT), precision=precision)
    found = step(*batch(8, torch.float64))
    assert seen == {value.dtype for value in found.values()} == {p.dtype for p in model.parameters()}
    assert seen == {torch.float64}
    x, _ = batch(2, torch.float64)
    assert model.encode(x).logvar.dtype == model.decode(model.encode(x).mode).dtype == torch.float64


def test_training_in_bf16_goes_where_float32_does() -> None:
    generator = torch.Generator().manual_seed(2)
    x = (torch.rand(32, 1, 1, 1, generator=generator) * torch.ones(IMAGE)).clamp(0.1, 0.9)
    noise = [Noise.draw(32, 3, generator) for _ in range(60)]
    for precision in ("float32", "bf16"):
        step = IntrospectiveStep(build("mlp"), VAE(beta_kl=0.05), lr=3e-3, precision=precision)
        errors = [step(x, draws)["rec"].item() for draws in noise]
        assert errors[-1] < 0.2 * errors[0], precision


# --- runs


def digits(out: Path, **settings: Any) -> Run:
    base: dict[str, Any] = {"data": "digits", "network": "tiny-conv", "batch_size": 16, "steps": 6, "log_every": 1}
    base |= {"checkpoint_every": 3, "image_every": 0, "recipe": "none", "progress": False}
    return fit(**{**base, "out": str(out), **settings})


def cut(run: Run, folder: Path) -> Run:
    """A copy that ended after its last checkpoint but one."""
    copied = Run(Path(shutil.copytree(run.folder, folder)))
    shutil.rmtree(copied.model_folder)
    list_checkpoints(copied.checkpoints)[-1].unlink()
    return copied


def test_a_run_in_bf16_says_so_and_may_go_on_in_another_format(tmp_path: Path) -> None:
    run = digits(tmp_path / "a", precision="bf16", objective=SoftIntroVAE(**SOFT))
    start = run.events("start")[0]
    assert (start["precision"], start["compile"], start["step"]) == ("bf16", "none", 0)
    assert {p.dtype for p in run.model().parameters()} == {torch.float32}
    state = torch.load(list_checkpoints(run.checkpoints)[-1], weights_only=True)
    halves = (torch.bfloat16, torch.float16)
    assert not [tensor.dtype for tensor in tensors(state) if tensor.dtype in halves]

    same, other = cut(run, tmp_path / "same"), cut(run, tmp_path / "other")
    fit(resume=same.folder, progress=False)
    fit(resume=other.folder, precision="float32", progress=False)
    assert [event["precision"] for event in same.events("start")] == ["bf16", "bf16"]
    assert [(event["step"], event["precision"]) for event in other.events("start")] == [(0, "bf16"), (3, "float32")]

    def untimed(run: Run) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in run.log()]

    assert untimed(same) == untimed(run)
    assert [row["step"] for row in other.log()] == list(range(1, 7))
    assert untimed(other)[:3] == untimed(run)[:3]
    for found, expected in zip(untimed(other)[3:], untimed(run)[3:], strict=True):
        assert found != expected
        assert found["rec"] == pytest.approx(expected["rec"], rel=0.02)


def test_auto_is_float32_for_vectors_in_a_run(tmp_path: Path) -> None:
    run = fit(data="density:rings", network="tiny-mlp", steps=2, out=str(tmp_path / "run"), progress=False)
    assert run.events("start")[0]["precision"] == "float32"


def test_a_model_that_trains_in_bf16_is_used_in_float32() -> None:
    model = build("conv")
    twin = copy.deepcopy(model)
    IntrospectiveStep(model, VAE(), lr=1e-9, precision="bf16")(*batch(8))
    x, _ = batch(8)
    assert (model.reconstruct(x) - twin.reconstruct(x)).abs().max() < 1e-5
