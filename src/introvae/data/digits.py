"""The images that come along: scikit-learn's handwritten digits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from introvae.data.arrays import ArrayData, Part


def load_digits() -> ArrayData:
    """The 1,797 handwritten digits that come with scikit-learn: 8 x 8 pixels, grey; every class gives a fifth to the
    held-out part.

    Source: UCI optical recognition of handwritten digits (test part).
    """
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    digits: Any = load()
    x = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[:, None]
    y = torch.from_numpy(digits.target).long()
    rows = train_test_split(np.arange(len(y)), test_size=0.2, stratify=digits.target, random_state=0)
    train, heldout = (Part(x, y)[torch.from_numpy(part)] for part in rows)
    return ArrayData("digits", train, heldout, tuple(map(str, range(10))))
