"""What a model has learned: ways between images, single latent dimensions, neighbours, mixed styles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from introvae.apps.scores import evaluating, parts
from introvae.data import Part
from introvae.errors import ConfigError, DataError, positive, whole
from introvae.measures.entries import BATCH, at_once
from introvae.metrics.features import feature_space
from introvae.metrics.neighbours import Neighbours, nearest
from introvae.model import IntrospectiveVAE, slerp
from introvae.networks.conditional import ConditionalDecoder
from introvae.networks.style import StyleDecoder

Condition = Tensor | int | str | None
"""The class of each sample, as in `IntrospectiveVAE`; models without classes take None."""


class Batch(NamedTuple):
    """Some samples `[N, ...]` and their classes, where the model takes them."""

    x: Tensor
    condition: Condition = None


def batches(model: IntrospectiveVAE, part: Part, names: Sequence[str] = ()) -> Iterator[Batch]:
    """All samples of data in their order, as many at a time as fit the memory, with their classes.

    Arguments:
        part: of data in memory or of a stream.
        names: of the data's classes; see `Classes.indices`.

    Raises:
        DataError: a sample has no class and the model takes one.
    """
    size = _size(model)
    for start in range(0, len(part), size):
        rows = part[start : start + size]
        yield Batch(rows.tensor(), model.condition_for(rows.labels, names))


def latents(model: IntrospectiveVAE, x: Tensor | Iterable[Batch], condition: Condition = None) -> Tensor:
    """Posterior means `[N, Z]`, on the CPU.

    Arguments:
        x: samples `[N, ...]`, or batches of them, which need not fit in memory together.
        condition: classes of a tensor of samples.

    Raises:
        DataError, ConfigError: no samples, or as in `IntrospectiveVAE.encode`.
    """
    if isinstance(x, Tensor):
        x = map(Batch._make, parts(model, x, condition, _size(model)))
    with evaluating(model), torch.no_grad():
        found = [model.encode(part.to(model.device), of).mode.cpu() for part, of in x]
    if not sum(map(len, found)):
        raise DataError("there are no samples: give at least one")
    return torch.cat(found)


def decoded(model: IntrospectiveVAE, z: Tensor, condition: Condition = None) -> Tensor:
    """The samples of latents `[N, Z]`, on the CPU; a bounded number is decoded at a time.

    Raises:
        DataError, ConfigError: no latents, or as in `IntrospectiveVAE.decode`.
    """
    if not len(z):
        raise DataError("there are no latents: give at least one")
    with evaluating(model), torch.no_grad():
        return torch.cat([model.decode(part, of).cpu() for part, of in parts(model, z, condition, _size(model))])


def ways(
    model: IntrospectiveVAE, images: Tensor, steps: int = 9, spherical: bool = False, condition: Condition = None
) -> Tensor:
    """A chain of interpolations: row r goes from image r to image r + 1; `[R, steps, ...]`, ends included.

    Arguments:
        images: `[R + 1, ...]`, at least two.
        steps: points of each row, at least 2.
        spherical: as in `IntrospectiveVAE.interpolate`.
        condition: classes of the images; on the way they are mixed.

    Raises:
        ConfigError: fewer than two steps.
        DataError: fewer than two images, or as in `IntrospectiveVAE.encode`.

    Example:
        >>> model = IntrospectiveVAE.build((1, 8, 8), "tiny-conv", latent_dim=4)
        >>> ways(model, torch.rand(3, 1, 8, 8), steps=5).shape
        torch.Size([2, 5, 1, 8, 8])
    """
    whole(steps=steps)
    if steps < 2:
        raise ConfigError(f"steps is {steps}: give at least 2")
    if len(images) < 2:
        raise DataError(f"{len(images)} image is no way: give at least two")
    given = condition if model.classes is None else model.classes.given(condition, len(images))
    of = (given[:-1], given[1:]) if isinstance(given, Tensor) else (given, given)
    start, end = (latents(model, x, c)[:, None] for x, c in zip((images[:-1], images[1:]), of, strict=True))
    t = torch.linspace(0, 1, steps, dtype=start.dtype)[None, :, None]
    z = slerp(start, end, t) if spherical else torch.lerp(start, end, t)
    mixed = None
    if model.classes is not None:
        first, last = (model.classes.mixture(c, start)[:, None] for c in of)
        mixed = torch.lerp(first, last, t).flatten(0, 1)
    return decoded(model, z.flatten(0, 1), mixed).unflatten(0, (len(images) - 1, steps))


class Active(NamedTuple):
    """Latent dimensions `[k]`, the most active first, and the variance of each one's posterior mean `[k]`."""

    dimensions: Tensor
    variance: Tensor


def active_dimensions(
    model: IntrospectiveVAE, x: Tensor | Iterable[Batch], k: int, condition: Condition = None
) -> Active:
    """The k latent dimensions that tell samples apart most: whose posterior mean varies most over them.

    Dimensions below `metrics.posterior.ACTIVE_VARIANCE` are hardly in use.

    Arguments:
        x, condition: at least two samples, as in `latents`.

    Raises:
        ConfigError: k is not from 1 to Z.
        DataError: fewer than two samples.

    Source: Burda et al. 2016, Sec. 2, for this measure of activity.

    Example:
        >>> model = IntrospectiveVAE.build((2,), "tiny-mlp", latent_dim=3)
        >>> active_dimensions(model, torch.randn(50, 2), k=3).dimensions.sort().values
        tensor([0, 1, 2])
    """
    whole(dimensions=k)
    if not 1 <= k <= model.latent_dim:
        raise ConfigError(f"dimensions is {k} and the model has {model.latent_dim}: give 1 to {model.latent_dim}")
    mean = latents(model, x, condition)
    if len(mean) < 2:
        raise DataError("one sample does not tell which dimensions vary: give at least two")
    variance, order = mean.var(dim=0).sort(descending=True, stable=True)
    return Active(order[:k], variance[:k])


def traverse(
    model: IntrospectiveVAE,
    z: Tensor,
    dimensions: Sequence[int] | Tensor,
    reach: float = 3.0,
    steps: int = 9,
    condition: Condition = None,
) -> Tensor:
    """One dimension of a latent at a time set to values from -reach to reach, and decoded: `[dimensions, steps, ...]`.

    The values are in standard deviations of the prior, which all dimensions share, so rows can be compared. The others
    stay as they are in `z`.

    Arguments:
        z: the latent to start from, `[Z]`.
        dimensions: those to be changed, one row each.
        reach: the largest value.
        steps: values in a row, at least 2.
        condition: class of the sample.

    Raises:
        ConfigError: no such dimension, a reach or number of steps that is not possible, another number of latents.

    Source: Higgins et al. 2017 (beta-VAE), whose figures traverse single latents from -3 to 3.

    Example:
        >>> model = IntrospectiveVAE.build((1, 8, 8), "tiny-conv", latent_dim=4)
        >>> traverse(model, torch.zeros(4), [2, 0], steps=5).shape
        torch.Size([2, 5, 1, 8, 8])
    """
    positive(reach=reach)
    whole(steps=steps)
    if steps < 2:
        raise ConfigError(f"steps is {steps}: give at least 2")
    if z.shape != (model.latent_dim,):
        raise ConfigError(f"the latent has shape {tuple(z.shape)}: give one of ({model.latent_dim},)")
    chosen = torch.as_tensor(dimensions, dtype=torch.int64)
    if not len(chosen) or int(chosen.min()) < 0 or int(chosen.max()) >= model.latent_dim:
        raise ConfigError(f"there are no dimensions {chosen.tolist()}: give some of 0 to {model.latent_dim - 1}")
    values = torch.linspace(-reach, reach, steps, dtype=z.dtype, device=z.device)
    changed = z.detach().repeat(len(chosen), steps, 1)
    for row, dimension in enumerate(chosen.tolist()):
        changed[row, :, dimension] = values
    if isinstance(condition, Tensor):
        condition = condition.expand(len(chosen) * steps, *condition.shape[1:])
    return decoded(model, changed.flatten(0, 1), condition).unflatten(0, (len(chosen), steps))


def nearest_images(
    model: IntrospectiveVAE,
    query: Tensor,
    images: Iterable[Batch],
    k: int = 8,
    by: str = "latents",
    condition: Condition = None,
) -> Neighbours:
    """The k samples of a set that are nearest to each query, in one pass.

    Arguments:
        query: `[N, ...]`.
        images: the set, for instance from `batches`.
        by: "latents" (Euclidean, of posterior means), "pixels" (Euclidean), or the name of a feature space, there by
            the cosine; see `metrics.features.feature_space`.
        condition: classes of the query.

    Raises:
        ConfigError: an unknown space, or a set of fewer than k.

    Example:
        >>> model = IntrospectiveVAE.build((1, 8, 8), "tiny-conv", latent_dim=4)
        >>> x = torch.rand(5, 1, 8, 8)
        >>> nearest_images(model, x[2:3], [Batch(x[:3]), Batch(x[3:])], k=1).rows
        tensor([[2]])
    """
    if by == "pixels":
        return nearest(query, (batch.x for batch in images), k)
    if by == "latents":
        return nearest(latents(model, query, condition), (latents(model, [batch]) for batch in images), k)
    space = feature_space(by)
    features = torch.cat([space(part.to(model.device)).cpu() for part in query.split(_size(model))])
    return nearest(features, (space(batch.x.to(model.device)) for batch in images), k, distance="cosine")


def mix_styles(
    model: IntrospectiveVAE,
    coarse: Tensor,
    fine: Tensor,
    levels: int,
    condition: Condition = None,
    fine_condition: Condition = None,
) -> Tensor:
    """Images whose first levels are drawn in the styles of one image each, and the others in those of another.

    Arguments:
        coarse, fine: `[N, C, S, S]`, pair by pair.
        levels: how many levels, from the smallest side up, are `coarse`'s: 1 to all but one.
        condition, fine_condition: classes of the two.

    Returns:
        `[N, C, S, S]`, on the CPU.

    Raises:
        ConfigError: the decoder has no styles, or not so many levels.
        DataError: unequal numbers of images.

    Source: Karras et al. 2019 (StyleGAN), Sec. 3.1.

    Example:
        >>> model = IntrospectiveVAE.build((1, 16, 16), "tiny-style", latent_dim=4)
        >>> mix_styles(model, torch.rand(2, 1, 16, 16), torch.rand(2, 1, 16, 16), levels=1).shape
        torch.Size([2, 1, 16, 16])
    """
    decoder = model.decoder
    network = decoder.network if isinstance(decoder, ConditionalDecoder) else decoder
    if not isinstance(network, StyleDecoder):
        raise ConfigError(f"{type(network).__name__} has no styles to be mixed: take a run of --network style")
    whole(levels=levels)
    sides = network.sides[: network.level + 1]
    if not 1 <= levels < len(sides):
        listed = ", ".join(map(str, sides))
        raise ConfigError(f"levels is {levels} and the model has those of {listed} pixels: give 1 to {len(sides) - 1}")
    if len(coarse) != len(fine):
        raise DataError(f"{len(coarse)} coarse and {len(fine)} fine images are no pairs: give as many of each")
    drawn = []
    sets = [
        parts(model, latents(model, x, of), of, _size(model)) for x, of in ((coarse, condition), (fine, fine_condition))
    ]
    with evaluating(model), torch.no_grad():
        for pair in zip(*sets, strict=True):
            z = [part for part, _ in pair]
            if isinstance(decoder, ConditionalDecoder) and model.classes is not None:
                rows = [decoder.rows(model.classes.given(of, len(part), model.device)) for part, of in pair]
                z = [torch.cat(both, dim=1) for both in zip(z, rows, strict=True)]
            drawn.append(network(z[0], fine=z[1], coarse=levels).cpu())
    return torch.cat(drawn)


def _size(model: IntrospectiveVAE) -> int:
    return BATCH if model.shape is None else at_once(model.shape)
