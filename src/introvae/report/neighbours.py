"""Samples beside the training images that are nearest to them: does the model draw, or copy?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from introvae.data import ArrayData, Part
from introvae.data.stream import StreamedPart
from introvae.metrics.features import FeatureSpace, default_spaces, feature_space
from introvae.metrics.neighbours import nearest
from introvae.model import IntrospectiveVAE
from introvae.pictures import labelled_rows, stack_columns
from introvae.report.figures import draw

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN, BESIDE, MEASURED, BATCH = 8, 3, 200, 500
"""Samples in the picture, neighbours of each, samples that are measured, and training images at a time."""
MOST, BYTES = 60_000, 2**28
"""Training images of a stream that are searched at most, and what they take in memory at most."""
LOW = 0.05
"""The quantile that tells of the nearest few: a model may copy some images and draw most."""


@torch.no_grad()
def neighbours(
    model: IntrospectiveVAE, data: ArrayData, seed: int = 1, space: FeatureSpace | None = None
) -> tuple[Image, dict[str, Any]]:
    """A picture of samples with their nearest training images, and how far they are.

    Near is meant twice: by pixels (Euclidean), and by the cosine in a feature space, the last of the data's usual ones.

    Arguments:
        model: draws the samples.
        data: images; all of the training part are searched, but of a stream at most `MOST` and `BYTES`, and copies of
            the others are not found.
        seed: of the samples; without classes they are those that the report's sheet of samples begins with.
        space: instead of that feature space.

    Returns:
        The picture; and for "pixels" and "features" the median distance of samples to their nearest training image
        ("samples") and that of as many held-out images, if there are, ("heldout"), and the 5 % quantiles of both
        ("samples_5", "heldout_5"), which fall first where only some samples are copies. Where all ("train") were
        searched, copies are much nearer than held-out images; blurred samples are somewhat nearer too. "n" is the
        number of samples, "protocol" says how all of it was measured.

    Source: IntroVAE (2018), Sec. 4.3.
    """
    space = feature_space(default_spaces(data.name, data.shape)[-1]) if space is None else space
    train = _in_memory(data.train, seed)
    samples = draw(model, MEASURED, seed)
    heldout = data.heldout.some(MEASURED, torch.Generator().manual_seed(seed)).tensor()
    queries = torch.cat([samples, heldout])
    batch = max(1, min(BATCH, BYTES // 8 // math.prod(data.shape)))  # distances are computed in float64
    parts = [slice(start, start + batch) for start in range(0, len(train), batch)]

    def features(x: Tensor) -> Tensor:
        return space.function(x.to(model.device)).cpu()

    beside = min(BESIDE, len(train))
    found = {
        "pixels": nearest(queries, (train[part].tensor() for part in parts), beside),
        "features": nearest(
            torch.cat([features(part) for part in queries.split(batch)]),
            (features(train[part].tensor()) for part in parts),
            beside,
            distance="cosine",
        ),
    }
    facts: dict[str, Any] = {
        "space": space.name,
        "searched": len(train),
        "train": len(data.train),
        "n": len(samples),
        "protocol": (
            f"{len(samples)} samples and {len(heldout)} held-out images, each to the nearest of {len(train)} of "
            f"{len(data.train)} training images; pixels: Euclidean distance, values in [0, 1]; features: 1 - cosine in "
            f"{space.name}{f' ({space.note})' if space.note else ''}; median and {100 * LOW:.0f} % quantile over "
            "samples, and over held-out images"
        ),
    }
    columns = [samples[:SHOWN]]
    for name, its in found.items():
        distances = {"samples": its.distance[: len(samples), 0], "heldout": its.distance[len(samples) :, 0]}
        facts[name] = {whose: float(found.median()) for whose, found in distances.items()}
        facts[name] |= {f"{whose}_{100 * LOW:.0f}": float(found.quantile(LOW)) for whose, found in distances.items()}
        columns += [train[its.rows[:SHOWN, k]].tensor() for k in range(beside)]
    title = f"sample, its {beside} nearest by pixels, by {space.name}"
    return labelled_rows({title: stack_columns(columns)}, columns=len(columns)), facts


def _in_memory(train: Part, seed: int) -> Part:
    """The training part; of a stream, random images that do fit."""
    if not isinstance(train, StreamedPart):
        return train
    fit = max(1, BYTES // math.prod(train.x.shape[1:]))
    return train.some(min(MOST, fit), torch.Generator().manual_seed(seed))
