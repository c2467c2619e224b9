"""Evaluation on another device than the CPU, played by a made-up one: no machine with one is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from introvae import IntrospectiveVAE, Run, evaluate, evaluation, fit
from introvae.data import ArrayData, Part, load_data
from introvae.measures import examine, measure_variants, sets
from introvae.metrics import classifier, kernel
from introvae.metrics.exact import exact
from introvae.metrics.features import feature_space
from introvae.metrics.manifold import Manifold, neighbourhoods


class Elsewhere(Tensor):
    """A tensor that counts as one of the made-up device."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]


class MadeUp(TorchFunctionMode):
    """A device that computes as the CPU does and, like a real one, refuses what lies partly on the CPU.

    Arguments:
        name: of a kind of device that torch knows and this machine has not; "mps" has no float64.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.device = torch.device(name)
        self.passes = 0

    def wrapped(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, Elsewhere):
            return x
        if self.device.type == "mps" and x.dtype == torch.float64:
            raise TypeError("MPS has no float64")
        return x.as_subclass(Elsewhere)

    def parameter(self, x: Tensor) -> nn.Parameter:
        with torch._C.DisableTorchFunction():
            moved = x.detach().as_subclass(Elsewhere)
        moved._is_param = True  # pyright: ignore
        return moved  # pyright: ignore

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        flat = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        here = any(isinstance(x, Elsewhere) for x in flat)
        name = getattr(func, "__name__", "")
        if name == "__get__" and here:
            if func == Tensor.device.__get__:  # pyright: ignore
                return self.device
            if func == Tensor.is_cpu.__get__:  # pyright: ignore
                return False
        if name == "__deepcopy__" and here:
            copied = args[1][id(args[0])] = self.parameter(plain(args[0]).detach().clone())
            return copied
        asked = [d for d in (*args, *kwargs.values()) if isinstance(d, torch.device | str)]
        away = name in ("to", "cpu") and (name == "cpu" or any(torch.device(d).type == "cpu" for d in asked))
        to_here = any(torch.device(d) == self.device for d in asked if isinstance(d, torch.device))
        if name in ("numpy", "__array__") and here:
            raise TypeError(f"a tensor on {self.device} is no array")
        if here and name not in ("to", "copy_"):
            looked_up = name in ("__getitem__", "__setitem__") and isinstance(args[0], Elsewhere)
            strangers = [x for x in flat if not isinstance(x, Elsewhere) and x.ndim > 0]
            if strangers and not looked_up:
                raise RuntimeError(f"{name}: tensors on {self.device} and on the CPU")
            self.passes += name in ("conv2d", "linear")
        if to_here:
            args = tuple("cpu" if isinstance(a, torch.device) else a for a in args)
            kwargs = {k: "cpu" if isinstance(v, torch.device) else v for k, v in kwargs.items()}
        found = func(*tree_map(plain, tuple(args)), **tree_map(plain, kwargs))
        return tree_map(self.wrapped, found) if (here or to_here) and not away else found


def plain(x: Any) -> Any:
    return x.as_subclass(Tensor) if isinstance(x, Elsewhere) else x


@pytest.fixture(params=["xpu", "mps"])
def made_up(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[MadeUp]:
    mode, to = MadeUp(request.param), nn.Module.to

    def moved(module: nn.Module, *where: Any, **more: Any) -> nn.Module:
        if where != (mode.device,):
            return to(module, *where, **more)
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, x in tensors.items():
                    if x is not None and not isinstance(x, Elsewhere):
                        tensors[name] = mode.parameter(x)  # pyright: ignore
        return module

    monkeypatch.setattr(nn.Module, "to", moved)
    monkeypatch.setattr(evaluation, "pick_device", lambda name: mode.device)
    monkeypatch.setattr(sets, "SAMPLES", 20)
    classifier.load_classifier.cache_clear()
    with mode:
        yield mode
    classifier.load_classifier.cache_clear()


class Pool(nn.Sequential):
    """A module that a user brings."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 2, 4, stride=4), nn.AvgPool2d(2), nn.Flatten())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    home = tmp_path_factory.mktemp("device")
    rows = np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8)
    np.save(home / "images.npy", rows)
    run = fit(data=str(home / "images.npy"), network="tiny-conv", steps=2, batch_size=8, heldout=0.4, recipe="none",
              progress=False, out=str(home / "run"), network_options={"norm": "batch"})  # fmt: skip
    for path in run.checkpoints.glob("*.pt"):
        path.unlink()
    return run


def test_the_made_up_device_refuses_what_a_real_one_would(made_up: MadeUp):
    there, cpu = torch.ones(3).to(made_up.device), torch.ones(3)
    assert there.device == made_up.device
    assert (there + 1).device == torch.zeros(2, device=made_up.device).device == made_up.device
    assert there.cpu().device == there.to("cpu").device == torch.device("cpu")
    for mixed in (lambda: there + cpu, lambda: torch.cat([there, cpu]), lambda: cpu[there.long()]):
        with pytest.raises(RuntimeError, match="and on the CPU"):
            mixed()
    assert there[cpu.long() - 1].tolist() == [1, 1, 1]
    with pytest.raises(TypeError):
        there.numpy()
    layer = nn.Linear(3, 1).to(made_up.device)
    assert layer(there).device == made_up.device
    with pytest.raises(RuntimeError, match="and on the CPU"):
        layer(cpu)
    if made_up.device.type == "mps":
        with pytest.raises(TypeError, match="float64"):
            there.double()


def test_a_report_of_another_device_has_the_same_numbers(run: Run, made_up: MadeUp, monkeypatch: pytest.MonkeyPatch):
    options: dict[str, Any] = {"features": ["mnist", "randconv", Pool()], "samples": 30}
    with monkeypatch.context() as here:
        here.setattr(evaluation, "pick_device", lambda name: torch.device("cpu"))
        here.setattr(sets, "MANY", 20)
        wanted = evaluate(run, **options)
    assert made_up.passes == 0
    monkeypatch.setattr(sets, "MANY", 20)
    found = evaluate(run, **options)
    assert made_up.passes > 100
    assert found["evaluation"]["device"] == made_up.device.type
    assert {"kid_pool", "coverage_mnist", "confident_share_mnist", "ssim", "msssim_pairs"} <= set(found["metrics"])
    assert found["metrics"] == wanted["metrics"]
    assert "mse" in found["variants"]["training mode"]
    for key in ("variants", "class_shares", "neighbours", "worst", "kl_nats_per_dimension"):
        assert found[key] == wanted[key], key


def test_classes_are_told_on_the_device(made_up: MadeUp):
    labels = torch.arange(60) % 3
    draws = torch.Generator().manual_seed(0)
    train, heldout = (torch.randint(256, (60, 1, 8, 8), generator=draws, dtype=torch.uint8) for _ in range(2))
    data = ArrayData("mine", Part(train, labels), Part(heldout, labels))
    torch.manual_seed(0)
    model = IntrospectiveVAE.build((1, 8, 8), "tiny-conv", latent_dim=4, classes=3).eval()
    wanted = examine(model, data, samples=100)
    found = examine(model.to(made_up.device), data, samples=100)
    assert made_up.passes > 0
    assert "confident_share" in found.metrics
    assert found.metrics == wanted.metrics
    assert found.yardstick is not None
    assert wanted.yardstick is not None
    variants = measure_variants(model, found.yardstick, None, batch=16)
    assert variants["training mode"]["mse"]["saved"] == wanted.yardstick.saved["mse"]


def test_points_and_rows_are_measured_on_the_device(made_up: MadeUp, monkeypatch: pytest.MonkeyPatch):
    import introvae.measures as measures

    for name, number in (("POINTS", 200), ("NATS_POINTS", 300), ("ENERGY_POINTS", 50), ("GNELBO_POINTS", 100)):
        monkeypatch.setattr(measures, name, number)
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(0)
    train, heldout = (Part(torch.randn(60, 2, generator=draws)) for _ in range(2))
    table = ArrayData("rows", train, heldout)
    for data in (load_data("density:8gaussians"), table):
        model = IntrospectiveVAE.build((2,), "tiny-mlp", latent_dim=2).eval()
        wanted = examine(model, data).metrics
        assert examine(model.to(made_up.device), data).metrics == wanted


def test_distances_are_computed_where_the_features_are(made_up: MadeUp):
    x, y = torch.randn(30, 4), torch.randn(20, 4)
    there = [points.to(made_up.device) for points in (x, y)]
    exactly = torch.device("cpu") if made_up.device.type == "mps" else made_up.device
    assert exact(there[0]).device == Manifold(there[0], [3]).points.device == exactly
    found, wanted = (neighbourhoods(Manifold(a, [3, 5]), Manifold(b, [3, 5])) for a, b in (there, (x, y)))
    assert found == wanted
    draws = [torch.Generator().manual_seed(0) for _ in range(2)]
    ours = kernel.kernel_distances(there[0], there[1], draws[0], 10, 3)
    assert ours == kernel.kernel_distances(x, y, draws[1], 10, 3)


def test_small_patches_are_averaged_on_the_cpu_where_the_device_cannot(made_up: MadeUp):
    found = feature_space("thumb")(torch.rand(2, 1, 28, 28).to(made_up.device))
    assert found.device.type == ("cpu" if made_up.device.type == "mps" else made_up.device.type)
