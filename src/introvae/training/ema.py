"""Exponential moving average of a model's weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from introvae.model import IntrospectiveVAE


def averaged(model: IntrospectiveVAE, decay: float) -> AveragedModel:
    """A copy of the model that follows its weights; `.module` is the averaged model.

    The decay grows with the number t of updates, min(decay, (1 + t) / (10 + t)), so that the random start is soon
    forgotten. Buffers (the statistics of a batch normalisation) are copied.

    Arguments:
        model: followed by `averaged(...).update_parameters(model)`.
        decay: in [0, 1); 0 keeps the newest weights.
    """

    def move(
        average: list[Tensor] | tuple[Tensor, ...], new: list[Tensor] | tuple[Tensor, ...], updates: Tensor | int
    ) -> None:
        t = int(updates)
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            list(average), list(new), 1 - min(decay, (1 + t) / (10 + t))
        )

    follower = AveragedModel(model, multi_avg_fn=move)
    follower.module.requires_grad_(False)
    return follower
