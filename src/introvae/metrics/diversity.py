"""How alike the samples of a set are: MS-SSIM of pairs, which is high where a model makes few different images."""

from __future__ import annotations

import torch
from torch import Tensor

from introvae.metrics.reconstruction import ssim_sigma

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of the scales, the finest first; where an image is too small for all, those of the ones there are, to a sum of 1."""


def ms_ssim_window(side: int) -> int:
    """Width in pixels of the Gaussian window for images of that shorter side: 11, or 5 where they are under 16."""
    return 2 * int(3.5 * ssim_sigma(side) + 0.5) + 1


def ms_ssim_scales(side: int) -> int:
    """How many scales images of that shorter side have: each halves it, and the window must fit into the coarsest.

    Five scales need 176 pixels, four 99; images under 5 pixels have none.

    Example:
        >>> [ms_ssim_scales(side) for side in (4, 8, 28, 64, 128, 256)]
        [0, 1, 2, 3, 4, 5]
    """
    window = ms_ssim_window(side)
    # The second condition is torchmetrics' own, a little stricter at four scales.
    fitting = [
        scales
        for scales in range(1, len(WEIGHTS) + 1)
        if side // 2 ** (scales - 1) >= window and side // max(1, scales - 1) ** 2 >= window
    ]
    return max(fitting, default=0)


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Multi-scale structural similarity of each pair of images `[N, C, H, W]` in [0, 1], `[N]`, at most 1.

    Of the coarsest scale the whole similarity counts (with a mirrored border), of the others contrast and structure
    (without the border); those below 0 count as 0.

    Source: Wang et al. 2003, Eq. 7, as computed by torchmetrics; as a measure of diversity Odena et al. 2017, Sec. 4.2.

    Example:
        >>> x = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> ms_ssim(x, x)
        tensor([1., 1.])
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    side = min(x.shape[2:])
    weights = WEIGHTS[: ms_ssim_scales(side)]
    values = multiscale_structural_similarity_index_measure(
        x.float(),
        y.float(),
        sigma=ssim_sigma(side),
        kernel_size=ms_ssim_window(side),
        betas=tuple(weight / sum(weights) for weight in weights),
        data_range=1.0,
        reduction="none",
    )
    assert isinstance(values, Tensor)
    return torch.atleast_1d(values)
