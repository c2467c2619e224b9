"""What a classifier of real images says of samples: how sure it is, and whether all classes are there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from introvae.errors import DataError

CONFIDENT = 0.8


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
        counts = torch.bincount(self.probabilities(x).argmax(dim=1), minlength=len(self.model.classes_)).double()
        p = counts / counts.sum()
        return -torch.special.xlogy(p, p).sum().item()

    @property
    def max_entropy_nats(self) -> float:
        """ln K."""
        return math.log(len(self.model.classes_))
