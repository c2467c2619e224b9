"""What a classifier of real images says of samples: how sure it is, and whether all classes are there."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from introvae.errors import DataError

CONFIDENT = 0.8
"""The pixel classifier is sure of an image whose likeliest class has at least this probability."""
WEIGHTS = Path(__file__).with_name("weights")
"""Where the weights are that come with the package."""
CLASSIFIERS = ("mnist", "cifar10")
"""Names of the convolutional classifiers that come with the package."""


@dataclass(frozen=True)
class PixelClassifier:
    """Logistic regression on pixels in [0, 1], fitted on real images (scikit-learn, C = 1).

    Example:
        >>> x, labels = torch.eye(2).repeat(20, 1)[:, None, None], torch.arange(2).repeat(20)
        >>> PixelClassifier.fit(x, labels).confident_share(x)
        1.0
    """

    model: Any

    @classmethod
    def fit(cls, x: Tensor, labels: Tensor) -> PixelClassifier:
        """Fit on images `[N, C, H, W]` with class indices `[N]`.

        Raises:
            DataError: fewer than two classes.
        """
        from sklearn.linear_model import LogisticRegression

        if len(labels.unique()) < 2:
            raise DataError("a classifier needs labels of at least two classes")
        return cls(LogisticRegression(max_iter=5000).fit(x.flatten(1).cpu().numpy(), labels.cpu().numpy()))

    def probabilities(self, x: Tensor) -> Tensor:
        """Class probabilities `[N, K]` of images."""
        return torch.from_numpy(self.model.predict_proba(x.flatten(1).cpu().numpy()))

    def confident_share(self, x: Tensor, threshold: float = CONFIDENT) -> float:
        """Share of images whose likeliest class has at least that probability."""
        return (self.probabilities(x).amax(dim=1) >= threshold).double().mean().item()

    def class_entropy_nats(self, x: Tensor) -> float:
        """Entropy of the predicted classes over all images, in nats: ln K when all classes are equally frequent."""
        counts = torch.bincount(self.probabilities(x).argmax(dim=1), minlength=len(self.model.classes_))
        return entropy_nats(counts)

    @property
    def max_entropy_nats(self) -> float:
        """ln K."""
        return math.log(len(self.model.classes_))


def entropy_nats(counts: Tensor) -> float:
    """Entropy in nats of the shares that the counts `[K]` are.

    Example:
        >>> round(entropy_nats(torch.tensor([5, 5, 0])), 4)
        0.6931
    """
    p = counts.double() / counts.sum()
    return -torch.special.xlogy(p, p).sum().item()


class ConvClassifier(nn.Module):
    """A small residual network that classifies images: its last layer's input is a space to compare images in.

    Images of another size are brought to its own (bilinear, antialiased), colour to grey (mean of the channels) and
    grey to colour (equal channels), so that every set of images can be looked at.

    Arguments:
        channels: of its images, 1 or 3.
        side: of its images, in pixels.
        widths: channels of its three resolutions; the last is the number of features.
        classes: how many.

    Example:
        >>> network = ConvClassifier(1, 28, (4, 8, 16)).eval()
        >>> features = network.features(torch.rand(2, 3, 64, 64))
        >>> features.shape, network.probabilities(features).shape
        (torch.Size([2, 16]), torch.Size([2, 10]))
    """

    def __init__(self, channels: int, side: int, widths: tuple[int, int, int], classes: int = 10) -> None:
        super().__init__()
        self.channels, self.side = channels, side
        a, b, c = widths
        self.body = nn.Sequential(
            _layer(channels, a, kernel=4, stride=2),
            _layer(a, b, stride=2),
            _Residual(_layer(b, b)),
            _layer(b, c, stride=2),
            _Residual(_layer(c, c)),
        )
        self.head = nn.Linear(c, classes)

    def features(self, x: Tensor) -> Tensor:
        """The last layer's input `[N, F]` of images `[N, C, H, W]` in [0, 1]."""
        if x.shape[1] != self.channels:
            x = x.mean(dim=1, keepdim=True).expand(-1, self.channels, -1, -1)
        if tuple(x.shape[2:]) != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side), mode="bilinear", antialias=True)
        return self.body(2 * x - 1).mean(dim=(2, 3))

    def probabilities(self, features: Tensor) -> Tensor:
        """Class probabilities `[N, K]` of features `[N, F]`."""
        return self.head(features).softmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores `[N, K]` before the softmax, of images `[N, C, H, W]` in [0, 1]."""
        return self.head(self.features(x))


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def _layer(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


@dataclass(frozen=True)
class Shipped:
    """A classifier that comes with the package.

    Arguments:
        network: in evaluation mode, without gradients.
        classes: their names, in the order of the probabilities.
        accuracy: on the `tested` test images that it was measured on, none of which it was trained on.
        tested: how many.
    """

    network: ConvClassifier
    classes: tuple[str, ...]
    accuracy: float
    tested: int


@lru_cache
def load_classifier(name: str) -> Shipped:
    """One of `CLASSIFIERS`: `mnist` (grey, 28 pixels) or `cifar10` (colour, 32), made by scripts/train_classifiers.py.

    Example:
        >>> shipped = load_classifier("mnist")
        >>> shipped.accuracy >= 0.99, len(shipped.classes)
        (True, 10)
    """
    from safetensors import safe_open

    with safe_open(WEIGHTS / f"{name}.safetensors", "pt") as file:
        facts = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    settings = json.loads(facts["network"])
    with torch.random.fork_rng(devices=[]):
        network = ConvClassifier(settings["channels"], settings["side"], tuple(settings["widths"]))
    network.load_state_dict(tensors)
    return Shipped(
        network.eval().requires_grad_(False),
        tuple(json.loads(facts["classes"])),
        float(facts["accuracy"]),
        int(facts["tested"]),
    )
