"""All metrics of a model on data, each with its protocol."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from introvae.data import ArrayData, Data, Density, DensityData
from introvae.gaussian import DiagonalGaussian
from introvae.metrics import classifier, features, histogram, manifold, reconstruction
from introvae.metrics.frechet import GaussianStatistics, frechet_distance
from introvae.model import IntrospectiveVAE
from introvae.training.preview import negative_elbo

POINTS, NATS_POINTS, ENERGY_POINTS, REPEATS = 5000, 100_000, 2000, 5
SAMPLES, REFERENCE, NEIGHBOURS = 500, 2000, 3
GNELBO_POINTS = 100 * 512
FRECHET_IMAGES, FRECHET_REFERENCE = 2000, 10_000
ACTIVE_VARIANCE = 0.01
"""A latent dimension is in use where its posterior's mean varies by more than this (Burda et al. 2016)."""
MAX_CLASSES = 50
"""With more classes (persons, say) the pixel classifier says nothing."""
BATCH = 256
MAX_PIXELS = 32 * 32 * 3
"""Largest image that the pixel classifier and the pixel manifold are used on."""

METRICS = [
    *("kl_soft_introvae", "jsd_soft_introvae", "kl_nats", "jsd_nats", "energy_distance", "modes"),
    *("share_within_3_sigma", "gnelbo", "mse", "psnr_db", "ssim", "kl_real_nats"),
    *("active_units", "frechet_thumb", "frechet_randconv", "frechet_values"),
    *("precision_pixels", "recall_pixels", "confident_share", "class_entropy_nats"),
]

Metrics = dict[str, dict[str, Any]]


def measure(model: IntrospectiveVAE, data: Data, seed: int = 0, heldout: Heldout | None = None) -> Metrics:
    """All metrics that apply to this data, of a model in evaluation mode.

    Arguments:
        seed: of all draws.
        heldout: from `look_at_heldout`, where it was called already.

    Raises:
        DataError: the model makes values that are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(data, DensityData):
        return _plane(model, data.density, generator)
    found = _reconstruction(model, heldout or look_at_heldout(model, data))
    if min(len(data.train), len(data.heldout)) > 1:
        found |= _frechet(model, data, torch.Generator().manual_seed(seed))
    enough = min(len(data.train), len(data.heldout)) > NEIGHBOURS
    if len(data.shape) == 3 and enough and data.train.x[0].numel() <= MAX_PIXELS:
        found |= _samples(model, data, generator)
    return found


def _plane(model: IntrospectiveVAE, density: Density, generator: torch.Generator) -> Metrics:
    def real(n: int) -> Tensor:
        return density.sample(n, generator)

    def fake(n: int) -> Tensor:
        return torch.cat([model.sample(min(n - start, 10_000), generator) for start in range(0, n, 10_000)]).cpu()

    def compared(
        metric: Callable[[Tensor, Tensor], tuple[float, ...]],
        names: tuple[str, ...],
        n: int,
        repeats: int,
        protocol: str,
    ) -> Metrics:
        ours = [metric(real(n), fake(n)) for _ in range(repeats)]
        perfect = [metric(real(n), real(n)) for _ in range(repeats)]
        return {
            name: _entry([o[i] for o in ours], n, protocol, floor=statistics.fmean(p[i] for p in perfect))
            for i, name in enumerate(names)
        }

    def square(metric: Callable[[Tensor, Tensor, float], tuple[float, ...]]) -> Callable[..., tuple[float, ...]]:
        return lambda a, b: metric(a, b, density.extent)

    bins = f"{histogram.BINS} x {histogram.BINS} bins on [-{density.extent:g}, {density.extent:g}]^2"
    found = compared(
        square(histogram.soft_introvae_kl_jsd),
        ("kl_soft_introvae", "jsd_soft_introvae"),
        POINTS,
        REPEATS,
        f"soft_introvae: {bins}, {POINTS} real and {POINTS} generated points, {REPEATS} draws, in no unit",
    )
    found |= compared(
        square(histogram.kl_jsd_nats),
        ("kl_nats", "jsd_nats"),
        NATS_POINTS,
        1,
        f"normalised histograms, {bins} and one outside, {NATS_POINTS} points each; half a point added to each of the "
        "samples' bins for the KL",
    )
    found |= compared(
        lambda a, b: (histogram.energy_distance(a, b),),
        ("energy_distance",),
        ENERGY_POINTS,
        REPEATS,
        f"unbiased two-sample energy distance, {ENERGY_POINTS} points each, {REPEATS} draws",
    )
    if density.modes is not None and density.sigma is not None:
        modes, sigma = density.modes, density.sigma
        found |= compared(
            lambda a, b: histogram.mode_coverage(b, modes, sigma),
            ("modes", "share_within_3_sigma"),
            POINTS,
            REPEATS,
            f"{POINTS} samples, {REPEATS} draws; of {len(modes)} modes, found when a tenth of a mode's fair share lies "
            "within 3 sigma",
        )
    value = histogram.gnelbo(lambda x: negative_elbo(model, x), real(GNELBO_POINTS), density.extent)
    protocol = f"soft_introvae: betas 1, z = mean, 1024 x 1024 grid and {GNELBO_POINTS} data points"
    found["gnelbo"] = _entry([value], GNELBO_POINTS, protocol)
    return found


class Heldout(NamedTuple):
    """The held-out part and what a model makes of it, on the CPU."""

    x: Tensor
    reconstruction: Tensor
    posterior: DiagonalGaussian


@torch.no_grad()
def look_at_heldout(model: IntrospectiveVAE, data: ArrayData) -> Heldout:
    """Encode the held-out part and decode the modes, once for all that is measured and drawn."""
    x = data.heldout.tensor()
    posteriors = [model.encode(part.to(model.device)) for part in x.split(BATCH)]
    reconstruction = torch.cat([model.decode(posterior.mode).cpu() for posterior in posteriors])
    mean, logvar = (torch.cat([getattr(p, name).cpu() for p in posteriors]) for name in ("mean", "logvar"))
    return Heldout(x, reconstruction, DiagonalGaussian(mean, logvar))


def _reconstruction(model: IntrospectiveVAE, heldout: Heldout) -> Metrics:
    x, y = heldout.x, heldout.reconstruction
    images = x.ndim == 4
    kind, mode = ("images", "evaluation mode, ") if images else ("vectors", "")
    protocol = f"{len(x)} held-out {kind}, z = mode, {mode}averaged weights; mean and std over {kind}"
    values = {"mse": (reconstruction.mse(x, y), protocol)}
    if images:
        sigma = reconstruction.ssim_sigma(min(x.shape[2:]))
        window = f"Gaussian window with sigma {sigma}, all pixels, mirrored border"
        values["psnr_db"] = reconstruction.psnr_db(x, y), protocol
        values["ssim"] = reconstruction.ssim(x, y), f"{protocol}; {window}"
    values["kl_real_nats"] = heldout.posterior.kl(), protocol
    found = {name: _entry(value.tolist(), len(x), text) for name, (value, text) in values.items()}
    if len(x) > 1:
        active = int((heldout.posterior.mean.var(dim=0) > ACTIVE_VARIANCE).sum())
        text = (
            f"of {model.latent_dim} latent dimensions, those whose posterior mean varies by more than {ACTIVE_VARIANCE}"
        )
        found["active_units"] = _entry([active], len(x), f"{text} over the held-out {kind}")
    return found


def _frechet(model: IntrospectiveVAE, data: ArrayData, generator: torch.Generator) -> Metrics:
    """Fréchet distances of samples, and of held-out data in their place, to the training part."""
    n = min(FRECHET_IMAGES, len(data.heldout))
    images = len(data.shape) == 3
    spaces = features.FEATURES if images else {"values": features.values}
    if images and min(data.shape[1:]) < 8:
        spaces = {"thumb": features.thumb}
    reference = data.train[torch.randperm(len(data.train), generator=generator)[:FRECHET_REFERENCE]]
    latents = torch.randn(n, model.latent_dim, generator=generator)
    found: Metrics = {}
    # One pass over each set, a batch at a time: 10,000 images of 128 pixels as floats would be gigabytes.
    sets: dict[str, Callable[[int, int], Tensor]] = {
        "train": lambda a, b: reference[slice(a, b)].tensor(model.device),
        "heldout": lambda a, b: data.heldout[slice(a, b)].tensor(model.device),
        "samples": lambda a, b: model.decode(latents[a:b].to(model.device)),
    }
    statistics_of: dict[str, dict[str, GaussianStatistics]] = {}
    for name, read in sets.items():
        count = len(reference) if name == "train" else n
        statistics_of[name] = {}
        for start in range(0, count, BATCH):
            with torch.no_grad():
                x = read(start, min(start + BATCH, count))
            for space, function in spaces.items():
                values = function(x)
                sums = statistics_of[name].setdefault(space, GaussianStatistics(values.shape[1]))
                sums.update(values)
    for space in spaces:
        real, held, fake = (statistics_of[name][space] for name in ("train", "heldout", "samples"))
        protocol = (
            f"features {space}: {n} samples against {len(reference)} of the training part; floor: {n} held-out "
            f"{'images' if images else 'rows'} in the samples' place"
        )
        found[f"frechet_{space}"] = _entry([frechet_distance(fake, real)], n, protocol, frechet_distance(held, real))
    return found


def _samples(model: IntrospectiveVAE, data: ArrayData, generator: torch.Generator) -> Metrics:
    heldout, train = data.heldout[slice(REFERENCE)], data.train
    reference = train[torch.randperm(len(train), generator=generator)[:REFERENCE]]
    n = SAMPLES
    draws = [
        batched(model.decode, torch.randn(n, model.latent_dim, generator=generator), model) for _ in range(REPEATS)
    ]
    real = heldout.tensor()
    others = reference.tensor()[:n]
    scores = [manifold.precision_recall(real, x, NEIGHBOURS) for x in draws]
    floor = manifold.precision_recall(real, others, NEIGHBOURS)
    protocol = (
        f"{n} samples, {REPEATS} draws, {len(real)} held-out images, k = {NEIGHBOURS} neighbours in pixel space; "
        f"floor: {len(others)} training images in the samples' place"
    )
    found = {
        name: _entry([score[i] for score in scores], n, protocol, floor=floor[i])
        for i, name in enumerate(("precision_pixels", "recall_pixels"))
    }
    if reference.labels is None:
        return found
    reference = reference[reference.labels >= 0]  # -1: not labelled
    if reference.labels is None or not 2 <= len(reference.labels.unique()) <= MAX_CLASSES:
        return found
    judge = classifier.PixelClassifier.fit(reference.tensor(), reference.labels)
    protocol = (
        f"{n} samples, {REPEATS} draws, logistic regression on the pixels of {len(reference)} training images; "
        f"floor: {len(real)} held-out images in the samples' place"
    )
    shares = [judge.confident_share(x) for x in draws]
    entropies = [judge.class_entropy_nats(x) for x in draws]
    found["confident_share"] = _entry(
        shares, n, f"class probability >= {classifier.CONFIDENT}; {protocol}", floor=judge.confident_share(real)
    )
    found["class_entropy_nats"] = _entry(
        entropies, n, f"at most {judge.max_entropy_nats:.3f}; {protocol}", floor=judge.class_entropy_nats(real)
    )
    return found


@torch.no_grad()
def batched(function: Callable[[Tensor], Tensor], x: Tensor, model: IntrospectiveVAE, size: int = BATCH) -> Tensor:
    """`function` of each part of `x` on the model's device, joined on the CPU."""
    return torch.cat([function(part.to(model.device)).cpu() for part in x.split(size)])


def _entry(values: list[float], n: int, protocol: str, floor: float | None = None) -> dict[str, Any]:
    entry: dict[str, Any] = {"value": statistics.fmean(values), "n": n, "protocol": protocol}
    if len(values) > 1:
        entry["std"] = statistics.stdev(values)
    if floor is not None:
        entry["floor"] = floor
    return entry
