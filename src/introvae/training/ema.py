"""Exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from introvae.model import IntrospectiveVAE


class Average:
    """A copy of a model that follows its weights; `model` is the averaged model.

    The decay grows with the number t of updates, min(decay, (1 + t) / (10 + t)), so that the random start is soon
    forgotten. Buffers (the statistics of a batch normalisation) are copied. The count is a plain number: one on a GPU
    (as torch's AveragedModel has) would make every step wait for it.

    Arguments:
        model: followed by `update(model)`.
        decay: in [0, 1); 0 keeps the newest weights.
    """

    def __init__(self, model: IntrospectiveVAE, decay: float) -> None:
        self.model, self.decay, self.updates = copy.deepcopy(model).requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the model's newest weights."""
        ours, theirs = self.model.parameters(), model.parameters()
        t = self.updates
        if t == 0:
            torch._foreach_copy_(list(ours), list(theirs))  # pyright: ignore[reportPrivateImportUsage]
        else:
            decay = min(self.decay, (1 + t) / (10 + t))
            torch._foreach_lerp_(list(ours), list(theirs), 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        for buffer, new in zip(self.model.buffers(), model.buffers(), strict=True):
            buffer.copy_(new)
        self.updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights and how many updates they have seen."""
        state = {f"module.{name}": tensor for name, tensor in self.model.state_dict().items()}
        return {"n_averaged": torch.tensor(self.updates), **state}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        self.updates = int(state["n_averaged"])
        self.model.load_state_dict(averaged_weights(state))


def averaged_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's weights in what `Average.state_dict` gave, by the names that they have in the model."""
    return {name.removeprefix("module."): x for name, x in state.items() if name != "n_averaged"}
