"""Numbers in float64 where they are computed."""

from __future__ import annotations

from torch import Tensor


def exact(x: Tensor) -> Tensor:
    """The values in float64: on their own device, or on the CPU where that device has no such numbers (MPS).

    Example:
        >>> import torch
        >>> exact(torch.ones(1))
        tensor([1.], dtype=torch.float64)
    """
    return (x.cpu() if x.device.type == "mps" else x).double()
