"""LPIPS: how different two images look to a trained network; in the extra `lpips`, and only where asked for."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from introvae.errors import DataError, first_line
from introvae.extras import import_extra

SIDE = 64
"""Smaller images are enlarged to it: the network halves them five times."""


def lpips_distance() -> Callable[[Tensor, Tensor], Tensor]:
    """The function from two sets of images `[N, C, H, W]` in [0, 1] to their distances `[N]`: 0 for equal ones.

    AlexNet's features, version 0.1, as the authors' library computes them; grey images count as three equal channels.

    Raises:
        MissingExtraError: the extra is not installed.
        DataError: the network's weights cannot be fetched.

    Source: Zhang et al. 2018.
    """
    library = import_extra("lpips")
    try:
        network = library.LPIPS(net="alex", version="0.1", verbose=False).eval().requires_grad_(False)
    except OSError as error:
        raise DataError(
            f"the weights of LPIPS cannot be fetched ({first_line(error)}): give this machine a connection once"
        ) from error

    def prepared(x: Tensor) -> Tensor:
        x = x.float().expand(-1, 3, -1, -1)
        if (side := min(x.shape[2:])) < SIDE:
            x = F.interpolate(x, scale_factor=SIDE / side, mode="bilinear")
        return 2 * x - 1

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return network.to(x.device)(prepared(x), prepared(y)).flatten()

    return distance
