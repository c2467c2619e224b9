"""Feature spaces: what images are compared in. None but `inception` needs a download."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from introvae.errors import ConfigError, DataError, first_line
from introvae.extras import import_extra
from introvae.metrics import classifier

THUMB = 8
"""Side to which `thumb` brings images, in pixels."""
WIDTHS = (32, 64, 96)
"""Channels of the layers of `randconv`."""


def values(x: Tensor) -> Tensor:
    """Vectors `[N, D]` as they are."""
    return x.flatten(1)


def thumb(x: Tensor) -> Tensor:
    """Images `[N, C, H, W]` averaged to 8 x 8 pixels, `[N, 64 C]`: layout, light and colour, no detail.

    Example:
        >>> thumb(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 192])
    """
    x = x.cpu() if x.device.type == "mps" else x  # where patches must be equally large
    return F.adaptive_avg_pool2d(x.float(), (min(THUMB, x.shape[2]), min(THUMB, x.shape[3]))).flatten(1)


@torch.no_grad()
def randconv(x: Tensor) -> Tensor:
    """Mean and deviation over space of each channel of an untrained convolutional network, `[N, 384]`.

    Three layers of 4x4 convolutions with stride 2 and LeakyReLU; the weights are draws of numpy's RandomState(0), whose
    stream is promised to stay, with unit gain. Grey images count as three equal channels. It sees edges, texture and
    blur up to 22 pixels wide, not meaning: untrained features rank sets of one kind of image, no more.

    Source: for untrained features as a space to compare in, Naeem et al. 2020, Sec. 4.

    Example:
        >>> randconv(torch.rand(2, 1, 32, 32)).shape
        torch.Size([2, 384])
    """
    h = x.float().expand(-1, 3, -1, -1) * 2 - 1
    found = []
    for weight in _weights():
        h = F.leaky_relu(F.conv2d(F.pad(h, (1, 1, 1, 1), mode="replicate"), weight.to(h.device), stride=2), 0.2)
        found += [h.mean(dim=(2, 3)), h.flatten(2).std(dim=2, correction=0)]
    return torch.cat(found, dim=1)


@lru_cache
def _weights() -> list[Tensor]:
    generator = np.random.RandomState(0)
    weights, inputs = [], 3
    for outputs in WIDTHS:
        draw = generator.standard_normal((outputs, inputs, 4, 4)) * (2 / (inputs * 16)) ** 0.5
        weights.append(torch.from_numpy(draw.astype(np.float32)))
        inputs = outputs
    return weights


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {"thumb": thumb, "randconv": randconv}
"""Those that need neither weights nor a library."""


@dataclass(frozen=True)
class FeatureSpace:
    """A space to compare images in: what its metrics' names end in, and the function that leads into it.

    The function does its own resizing and is in evaluation mode; images `[N, C, H, W]` in [0, 1] become `[N, F]`.

    Arguments:
        name: letters, digits and _.
        function: from images to features.
        note: what a reader of a number must know of it.
        judge: a classifier whose features these are, where they are one's.

    Raises:
        ConfigError: a name of other characters.

    Example:
        >>> FeatureSpace("rows", lambda x: x.mean(dim=3))(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 8])
    """

    name: str
    function: Callable[[Tensor], Tensor]
    note: str = ""
    judge: classifier.Shipped | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w+", self.name, re.ASCII):
            raise ConfigError(f"a feature space cannot be called {self.name!r}: give letters, digits and _")

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Features `[N, F]`.

        Raises:
            DataError: the function fails at these images, or gives something else.
        """
        try:
            found = self.function(x)
        except (DataError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a network from outside may raise anything
            raise DataError(
                f"the features {self.name} of images {tuple(x.shape)} cannot be computed ({first_line(error)}): give a "
                "network that takes [N, C, H, W] in [0, 1] with any N"
            ) from error
        if not isinstance(found, Tensor) or found.ndim < 2 or len(found) != len(x):
            kind = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise DataError(f"the features {self.name} of {len(x)} images are {kind}: give a network that makes [N, F]")
        return found.flatten(1)


def feature_space(source: str | Path | nn.Module | FeatureSpace) -> FeatureSpace:
    """The space of a name, of a network, or of a file that holds one.

    Arguments:
        source: one of `SPACES`; a path that ends in .pt2 (torch.export, with a dynamic batch) or in .pt, .pts, .ts or
            .jit (TorchScript), named after the file; a module, used in evaluation mode and named after its class; or
            a space. A file is a program that is run: take only those of people you trust.

    Raises:
        ConfigError: an unknown name, or a file that has one of ours.
        DataError: a file that cannot be read.
        MissingExtraError: the library behind it is not installed.

    Example:
        >>> feature_space("thumb").name, feature_space(nn.Flatten()).name
        ('thumb', 'flatten')
    """
    if isinstance(source, FeatureSpace):
        space = source
    elif isinstance(source, nn.Module):
        network = copy.deepcopy(source).eval()
        note = f"the outputs of the module {type(source).__name__} in evaluation mode"
        space = FeatureSpace(type(source).__name__.lower(), lambda x: network.to(x.device)(x), note)
    elif str(source) in SPACES:
        return SPACES[str(source)]()
    elif Path(source).suffix in FILES:
        space = _of_file(Path(source))
    else:
        raise ConfigError(
            f"unknown feature space {str(source)!r}: choose one of {', '.join(SPACES)}, or the path of an exported "
            f"network ({', '.join(FILES)})"
        )
    if space.name in SPACES:
        raise ConfigError(f"the feature space {space.name} would be taken for ours: give it another name")
    return space


def default_spaces(name: str, shape: tuple[int, ...]) -> list[str]:
    """The spaces in which data of that name and shape are compared when nobody says otherwise.

    Vectors in `values`; images in `thumb` and, from 8 pixels, `randconv`. Grey images of 28 pixels, and others of up to
    64 whose name has "mnist" in it, in `mnist` too; colour images of 32 pixels in `cifar10`.

    Example:
        >>> default_spaces("faces", (3, 64, 64)), default_spaces("data/mnist", (1, 32, 32))
        (['thumb', 'randconv'], ['thumb', 'randconv', 'mnist'])
    """
    if len(shape) != 3:
        return ["values"]
    channels, height, width = shape
    spaces = ["thumb"] if min(height, width) < 8 else ["thumb", "randconv"]
    called = any("mnist" in part.lower() for part in Path(name).parts[-2:])
    if channels == 1 and ((height, width) == (28, 28) or (called and max(height, width) <= 64)):
        spaces.append("mnist")
    if (channels, height, width) == (3, 32, 32):
        spaces.append("cifar10")
    return spaces


def _shipped(name: str) -> FeatureSpace:
    found = classifier.load_classifier(name)
    network, side = found.network, found.network.side
    note = (
        f"{network.head.in_features} last features of the package's classifier of {name} ({100 * found.accuracy:.1f} % "
        f"right on {found.tested:,} test images), in evaluation mode, images brought to {side} x {side} pixels"
    )
    return FeatureSpace(name, lambda x: network.to(x.device).features(x.float()), note, found)


def _inception() -> FeatureSpace:
    import_extra("torch_fidelity")
    library = import_extra("torch_fidelity.feature_extractor_inceptionv3")
    try:
        network = library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).eval()
    except OSError as error:
        raise DataError(
            f"the weights of Inception cannot be fetched ({first_line(error)}): give this machine a connection once"
        ) from error

    def function(x: Tensor) -> Tensor:
        pixels = (x.clamp(0, 1) * 255).round().to(torch.uint8)
        return network.to(x.device)(pixels.expand(-1, 3, -1, -1))[0]

    note = "2048 features of torch-fidelity's InceptionV3 (of the TensorFlow FID), its resizing to 299 pixels, 8 bits"
    return FeatureSpace("inception", function, note)


def _of_file(path: Path) -> FeatureSpace:
    if not path.is_file():
        raise DataError(f"there is no file {path}: give the path of an exported network")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch would have TorchScript exported anew
            if path.suffix == ".pt2":
                network, kind = torch.export.load(path).module(), "torch.export"
            else:
                network, kind = torch.jit.load(path, map_location="cpu").eval(), "TorchScript"
    except Exception as error:  # what is wrong in such a file is said in many ways
        raise DataError(
            f"{path} is no exported network that can be read ({first_line(error)}): make it with torch.export.save or "
            "torch.jit.save"
        ) from error
    own = next(iter([*network.parameters(), *network.buffers()]), torch.empty(0)).device
    name = re.sub(r"\W+", "_", path.stem, flags=re.ASCII)
    return FeatureSpace(name, lambda x: network(x.to(own)), f"the outputs of {path.name} ({kind})")


FILES = (".pt2", ".pt", ".pts", ".ts", ".jit")
"""How the names of exported networks end."""

SPACES: dict[str, Callable[[], FeatureSpace]] = {
    "thumb": lambda: FeatureSpace("thumb", thumb, "averages of 8 x 8 patches"),
    "randconv": lambda: FeatureSpace("randconv", randconv, "384 statistics of an untrained convolutional network"),
    "pixels": lambda: FeatureSpace("pixels", values, "pixels in [0, 1]"),
    "values": lambda: FeatureSpace("values", values),
    "mnist": lambda: _shipped("mnist"),
    "cifar10": lambda: _shipped("cifar10"),
    "inception": _inception,
}
"""Feature spaces by name, each made when it is asked for."""
