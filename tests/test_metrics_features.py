"""Feature spaces, the classifiers that come with the package, and what is said where an extra is missing."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from introvae.data import ArrayData, load_data
from introvae.errors import ConfigError, DataError, MissingExtraError
from introvae.metrics.classifier import CLASSIFIERS, WEIGHTS, ConvClassifier, entropy_nats, load_classifier
from introvae.metrics.features import SPACES, FeatureSpace, default_spaces, feature_space, thumb
from introvae.metrics.perceptual import lpips_distance

SHARED = Path(__file__).parents[2] / "shared" / "data"
OURS = [name for name in SPACES if name != "inception"]


def images(count: int, channels: int, side: int, seed: int = 0) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


# --- the classifiers


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_weights_are_small_and_say_what_they_are(name: str):
    path = WEIGHTS / f"{name}.safetensors"
    assert path.stat().st_size <= 2_000_000
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    assert facts["made_by"] == "scripts/train_classifiers.py"
    assert float(facts["accuracy"]) >= {"mnist": 0.99, "cifar10": 0.75}[name]
    assert len(json.loads(facts["classes"])) == 10


@pytest.mark.parametrize(("name", "channels", "side"), [("mnist", 1, 28), ("cifar10", 3, 32)])
def test_classifiers_give_features_and_probabilities(name: str, channels: int, side: int):
    network = load_classifier(name).network
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    x = images(5, channels, side)
    features = network.features(x)
    p = network.probabilities(features)
    assert features.shape == (5, network.head.in_features)
    assert p.shape == (5, 10)
    assert features.isfinite().all()
    np.testing.assert_allclose(p.sum(dim=1), 1, rtol=1e-5)
    np.testing.assert_allclose(network(x).softmax(dim=1), p, rtol=1e-5)
    alone = torch.cat([network.features(part) for part in x.split(1)])
    np.testing.assert_allclose(features, alone, atol=1e-4)
    assert len(features.unique(dim=0)) == 5


def stroke(points: list[tuple[float, float]]) -> Tensor:
    """A digit drawn by hand: a line of 2.5 pixels through points of a unit square, right and down."""
    y, x = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    image = torch.zeros(28, 28)
    for (ax, ay), (bx, by) in pairwise(points):
        for t in torch.linspace(0, 1, 30):
            cx, cy = 4 + 20 * (ax + t * (bx - ax)), 4 + 20 * (ay + t * (by - ay))
            image = torch.maximum(image, (2.2 - ((x - cx) ** 2 + (y - cy) ** 2).sqrt()).clamp(0, 1))
    return image[None]


def test_the_digit_classifier_reads_digits_drawn_by_hand():
    circle = [(0.5 + 0.32 * math.sin(a), 0.5 - 0.48 * math.cos(a)) for a in np.linspace(0, 2 * math.pi, 30)]
    drawn = {
        0: circle,
        1: [(0.55, 0.0), (0.5, 1.0)],
        7: [(0.15, 0.05), (0.85, 0.05), (0.4, 1.0)],
    }
    p = load_classifier("mnist").network(torch.stack([stroke(points) for points in drawn.values()])).softmax(dim=1)
    assert p.argmax(dim=1).tolist() == list(drawn)
    assert (p.amax(dim=1) > 0.9).all()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_are_as_good_as_they_say(name: str):
    if not (SHARED / name / "test.parquet").is_file():
        pytest.skip(f"no {name} at {SHARED}")
    data, shipped = load_data(SHARED / name / "test.parquet"), load_classifier(name)
    assert isinstance(data, ArrayData)
    part = data.whole()[slice(2000)]
    assert part.labels is not None
    p = torch.cat([shipped.network(some).softmax(dim=1) for some in part.tensor().split(250)])
    right = (p.argmax(dim=1) == part.labels).double().mean().item()
    error = math.sqrt(shipped.accuracy * (1 - shipped.accuracy) / len(part))
    assert abs(right - shipped.accuracy) < 4 * error


def test_classifiers_take_images_of_any_size_and_colour():
    network = load_classifier("mnist").network
    grey = images(3, 1, 28)
    np.testing.assert_allclose(network.features(grey.expand(-1, 3, -1, -1)), network.features(grey), atol=1e-4)
    digit = stroke([(0.15, 0.05), (0.85, 0.05), (0.4, 1.0)])[None]
    for side in (20, 40, 100):
        resized = nn.functional.interpolate(digit, (side, side), mode="bilinear", antialias=True)
        assert network(resized).argmax(dim=1).item() == 7
    colour = ConvClassifier(3, 16, (4, 8, 16), classes=5).eval()
    other = images(3, 1, 16)
    with torch.no_grad():
        wanted = colour.features(other.expand(-1, 3, -1, -1))
        np.testing.assert_allclose(colour.features(other), wanted, atol=1e-5)


def test_entropy():
    assert entropy_nats(torch.tensor([3, 3, 3, 3])) == pytest.approx(math.log(4), rel=1e-12)
    assert entropy_nats(torch.tensor([7, 0])) == 0


# --- the spaces


@pytest.mark.parametrize("name", OURS)
def test_every_space_makes_finite_vectors_of_images(name: str):
    space = feature_space(name)
    assert space.name == name
    for x in (images(4, 1, 28), images(4, 3, 32)):
        features = space(x)
        assert features.ndim == 2
        assert len(features) == 4
        assert features.isfinite().all()
        assert not features.requires_grad


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("digits", (1, 8, 8), ["thumb", "randconv"]),
        ("tiny", (1, 4, 4), ["thumb"]),
        ("wine.csv", (13,), ["values"]),
        ("/data/mnist", (1, 28, 28), ["thumb", "randconv", "mnist"]),
        ("/data/fashion-mnist/train.parquet", (1, 64, 64), ["thumb", "randconv", "mnist"]),
        ("scans", (1, 28, 28), ["thumb", "randconv", "mnist"]),
        ("/home/mnist/a/faces", (1, 64, 64), ["thumb", "randconv"]),
        ("faces", (3, 28, 28), ["thumb", "randconv"]),
        ("ufldl-stanford/svhn", (3, 32, 32), ["thumb", "randconv", "cifar10"]),
    ],
)
def test_default_spaces(name: str, shape: tuple[int, ...], wanted: list[str]):
    assert default_spaces(name, shape) == wanted


class Noisy(nn.Module):
    """Features that are another thing in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(1), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(x)).mean(dim=3)


def test_a_module_is_used_in_evaluation_mode_and_left_as_it_was():
    network, x = Noisy().train(), images(6, 1, 8)
    space = feature_space(network)
    assert space.name == "noisy"
    np.testing.assert_allclose(space(x), x.mean(dim=3).flatten(1), rtol=1e-4)
    assert torch.equal(space(x), space(x))
    assert network.training
    assert torch.equal(network.norm.running_mean, torch.zeros(1))  # pyright: ignore


def traced(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(Noisy().eval(), images(2, 1, 8)).save(str(path))  # pyright: ignore


def exported(path: Path, dynamic: bool = True) -> None:
    shapes = ({0: torch.export.Dim("n")},) if dynamic else None
    torch.export.save(torch.export.export(Noisy().eval(), (images(2, 1, 8),), dynamic_shapes=shapes), path)


@pytest.mark.parametrize(("name", "write"), [("mine.pt", traced), ("my net-2.pt2", exported)])
def test_a_file_of_an_exported_network_is_a_space(tmp_path: Path, name: str, write: Callable[[Path], None]):
    write(tmp_path / name)
    space, x = feature_space(tmp_path / name), images(7, 1, 8)
    assert space.name == {"mine.pt": "mine", "my net-2.pt2": "my_net_2"}[name]
    assert name in space.note
    np.testing.assert_allclose(space(x), x.mean(dim=3).flatten(1), rtol=1e-4)


def test_a_network_that_does_not_take_the_images_is_named(tmp_path: Path):
    exported(tmp_path / "fixed.pt2", dynamic=False)
    space = feature_space(tmp_path / "fixed.pt2")
    assert space(images(2, 1, 8)).shape == (2, 8)
    with pytest.raises(DataError, match=r"features fixed of images \(3, 1, 8, 8\) cannot be computed .* with any N"):
        space(images(3, 1, 8))


@pytest.mark.parametrize(
    ("function", "found"), [(lambda x: x.mean(), r"\(\)"), (lambda x: x[1:], r"\(3, 1, 8, 8\)"), (list, "list")]
)
def test_features_that_are_no_vectors_are_refused(function: Callable[[Tensor], Tensor], found: str):
    with pytest.raises(DataError, match=rf"features odd of 4 images are {found}: give a network that makes \[N, F\]"):
        FeatureSpace("odd", function)(images(4, 1, 8))


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_files_that_are_no_networks_are_refused(tmp_path: Path, suffix: str):
    path = tmp_path / f"bad{suffix}"
    with pytest.raises(DataError, match="there is no file"):
        feature_space(path)
    path.write_bytes(b"no network")
    with pytest.raises(DataError, match="no exported network that can be read"):
        feature_space(path)


def test_unknown_and_taken_names_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"unknown feature space 'mnits': choose one of thumb, .* or the path"):
        feature_space("mnits")
    traced(tmp_path / "mnist.pt")
    with pytest.raises(ConfigError, match="mnist would be taken for ours: give it another name"):
        feature_space(tmp_path / "mnist.pt")
    with pytest.raises(ConfigError, match="cannot be called 'a b': give letters"):
        FeatureSpace("a b", thumb)


# --- the extras


@pytest.mark.parametrize(
    ("module", "extra", "use"),
    [("torch_fidelity", "fid", lambda: feature_space("inception")), ("lpips", "lpips", lpips_distance)],
)
@pytest.mark.parametrize("broken", [False, True])
def test_a_missing_or_broken_extra_is_named_in_one_line(
    module: str, extra: str, use: Callable[[], object], broken: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    if broken:  # as where torchvision is installed and does not fit torch
        (tmp_path / f"{module}.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, module, raising=False)
    else:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        MissingExtraError, match=rf"{module} cannot be imported .*pip install 'introvae\[{extra}\]'"
    ) as e:
        use()
    assert "\n" not in str(e.value)


class Extractor(nn.Module):
    """What torch-fidelity's extractor takes and gives, without its network."""

    def __init__(self, name: str, features: list[str]) -> None:
        super().__init__()
        assert features == ["2048"]

    def forward(self, x: Tensor) -> tuple[Tensor]:
        assert x.dtype == torch.uint8
        assert x.shape[1] == 3
        return (x.float().mean(dim=(2, 3)),)


def test_inception_gets_8_bits_and_three_channels(monkeypatch: pytest.MonkeyPatch):
    library, part = ModuleType("torch_fidelity"), ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    part.FeatureExtractorInceptionV3 = Extractor  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, library.__name__, library)
    monkeypatch.setitem(sys.modules, part.__name__, part)
    x = torch.tensor([0.0, 0.5, 1.2])[:, None, None, None].expand(3, 1, 8, 8)
    np.testing.assert_allclose(feature_space("inception")(x), np.repeat([[0.0], [128.0], [255.0]], 3, axis=1))


def test_lpips_gets_three_channels_of_64_pixels_in_its_range(monkeypatch: pytest.MonkeyPatch):
    class Network(nn.Module):
        def __init__(self, net: str, version: str, verbose: bool) -> None:
            super().__init__()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            assert x.shape == y.shape == (2, 3, 64, 64)
            return (x - y).abs().amax(dim=(1, 2, 3), keepdim=True)

    library = ModuleType("lpips")
    library.LPIPS = Network  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "lpips", library)
    found = lpips_distance()(torch.zeros(2, 1, 28, 28), torch.ones(2, 1, 28, 28))
    np.testing.assert_allclose(found, [2.0, 2.0])  # from [0, 1] to [-1, 1]
