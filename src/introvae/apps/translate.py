"""Image translation: the class of one image, the content of another."""

from __future__ import annotations

import torch
from torch import Tensor

from introvae.apps.explore import decoded, latents
from introvae.errors import ConfigError
from introvae.model import IntrospectiveVAE
from introvae.networks.disentangled import class_dim


def translate(model: IntrospectiveVAE, of_class: Tensor, of_content: Tensor) -> Tensor:
    """Every image of one set shown as every image of another: `[N, M, C, S, S]`, on the CPU.

    Row n has the class latents of image n of the first set, column m the other latents of image m of the second.

    Arguments:
        model: of network disentangled, without classes.
        of_class: `[N, C, S, S]`, what is to be seen.
        of_content: `[M, C, S, S]`, how.

    Raises:
        ConfigError: the model's encoder does not tell class from content.
        DataError: no images, or as in `IntrospectiveVAE.encode`.

    Source: Soft-IntroVAE (2021), Sec. 6 (image translation).

    Example:
        >>> model = IntrospectiveVAE.build((3, 8, 8), "tiny-disentangled", latent_dim=4)
        >>> translate(model, torch.rand(2, 3, 8, 8), torch.rand(5, 3, 8, 8)).shape
        torch.Size([2, 5, 3, 8, 8])
    """
    if model.classes is not None:
        raise ConfigError("the model is told the class of each image: draw other classes with introvae sample --label")
    first = class_dim(model.encoder)
    rows, columns = latents(model, of_class)[:, :first], latents(model, of_content)[:, first:]
    n, m = len(rows), len(columns)
    swapped = torch.cat([rows.repeat_interleave(m, dim=0), columns.repeat(n, 1)], dim=1)
    return decoded(model, swapped).unflatten(0, (n, m))
