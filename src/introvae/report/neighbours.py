"""Samples beside the training images that are nearest to them: does the model draw, or copy?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from introvae.data import ArrayData
from introvae.metrics.features import default_spaces, feature_space
from introvae.metrics.neighbours import Neighbours, nearest
from introvae.model import IntrospectiveVAE
from introvae.pictures import labelled_rows, stack_columns
from introvae.report.figures import draw

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN, BESIDE, MEASURED, MOST, BATCH = 8, 3, 200, 20_000, 500
"""Samples in the picture, neighbours of each, samples that are measured, training images that are searched at most, and
how many of them at a time."""


@torch.no_grad()
def neighbours(model: IntrospectiveVAE, data: ArrayData, seed: int = 1) -> tuple[Image, dict[str, Any]]:
    """A picture of samples with their nearest training images, and how far they are.

    Near is meant twice: by pixels (Euclidean), and by the cosine in a feature space, the last of the data's usual ones.

    Arguments:
        model: draws the samples.
        data: images; at most `MOST` of the training part are searched, and copies of the others are not found.
        seed: of the samples; without classes they are those that the report's sheet of samples begins with.

    Returns:
        The picture; and for "pixels" and "features" the median distance of samples to their nearest training image
        ("samples") and that of as many held-out images, if there are, ("heldout"). Where all ("train") were searched,
        copies are much nearer than held-out images; blurred samples are somewhat nearer too.

    Source: IntroVAE (2018), Sec. 4.3.
    """
    space = feature_space(default_spaces(data.name, data.shape)[-1])
    train = data.train.some(MOST, torch.Generator().manual_seed(seed))
    samples = draw(model, MEASURED, seed)
    heldout = data.heldout.some(MEASURED, torch.Generator().manual_seed(seed)).tensor()
    queries = torch.cat([samples, heldout])
    parts = [slice(start, start + BATCH) for start in range(0, len(train), BATCH)]

    def features(x: Tensor) -> Tensor:
        return space.function(x.to(model.device)).cpu()

    beside = min(BESIDE, len(train))
    found = {
        "pixels": nearest(queries, (train[part].tensor() for part in parts), beside),
        "features": nearest(
            torch.cat([features(part) for part in queries.split(BATCH)]),
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
    }
    rows = {}
    for name, its in found.items():
        facts[name] = {"samples": _median(its, slice(len(samples))), "heldout": _median(its, slice(len(samples), None))}
        by = "pixels" if name == "pixels" else f"the cosine in {space.name}"
        columns = [samples[:SHOWN], *(train[its.rows[:SHOWN, k]].tensor() for k in range(beside))]
        rows[f"sample, then its nearest training images by {by}"] = stack_columns(columns)
    return labelled_rows(rows, columns=2 * (1 + beside)), facts


def _median(found: Neighbours, rows: slice) -> float:
    return float(found.distance[rows, 0].median())
