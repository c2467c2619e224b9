"""All metrics of a model on data, each with its protocol."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from introvae.data import ArrayData, Data, Density, DensityData
from introvae.errors import ConfigError, whole
from introvae.measures.entries import Metrics, entry
from introvae.measures.heldout import Heldout, class_posteriors, heldout_metrics, look_at_heldout
from introvae.measures.sets import NEIGHBOURS, collect_sets, has_pairs, set_metrics
from introvae.measures.variants import ENERGY_POINTS, PlaneYardstick, SetYardstick, Yardstick, measure_variants
from introvae.metrics import histogram
from introvae.metrics.classifier import CLASSIFIERS
from introvae.metrics.features import SPACES
from introvae.metrics.posterior import ACTIVE_VARIANCE
from introvae.model import IntrospectiveVAE
from introvae.training.preview import negative_elbo

__all__ = [
    "ACTIVE_VARIANCE",
    "METRICS",
    "Findings",
    "Heldout",
    "Metrics",
    "check_numbers",
    "class_metrics_in",
    "class_posteriors",
    "examine",
    "look_at_heldout",
    "measure",
    "measure_variants",
    "metrics_in",
]

POINTS, NATS_POINTS, REPEATS = 5000, 100_000, 5
GNELBO_POINTS = 100 * 512


def metrics_in(space: str) -> list[str]:
    """Names of all metrics in a feature space.

    Example:
        >>> metrics_in("vgg")[:3]
        ['frechet_vgg', 'kid_vgg', 'precision_vgg']
    """
    judged = class_metrics_in(space) if space in CLASSIFIERS else []
    return [*(f"{metric}_{space}" for metric in ("frechet", "kid", *NEIGHBOURS)), *judged]


def class_metrics_in(classifier: str) -> list[str]:
    """Names of the metrics of a classifier's classes."""
    return [f"{metric}_{classifier}" for metric in ("confident_share", "class_entropy_nats", "class_distance")]


METRICS = [
    *("kl_soft_introvae", "jsd_soft_introvae", "kl_nats", "jsd_nats", "energy_distance", "modes"),
    *("share_within_3_sigma", "gnelbo", "mse", "psnr_db", "ssim", "lpips", "kl_real_nats"),
    *("active_units", "kl_aggregate_nats", "msssim_pairs", "confident_share", "class_entropy_nats"),
    *(name for space in SPACES for name in metrics_in(space)),
]


class Findings(NamedTuple):
    """What was found of a model.

    Arguments:
        metrics: all that apply.
        class_shares: by classifier, how often samples and held-out images are of each class.
        yardstick: to measure variants of the model by; None where there are too few data.
    """

    metrics: Metrics
    class_shares: dict[str, Any]
    yardstick: Yardstick | None


def measure(model: IntrospectiveVAE, data: Data, seed: int = 0, heldout: Heldout | None = None) -> Metrics:
    """All metrics that apply to this data, of a model in evaluation mode; see `examine`."""
    return examine(model, data, seed, heldout).metrics


def examine(
    model: IntrospectiveVAE,
    data: Data,
    seed: int = 0,
    heldout: Heldout | None = None,
    features: Sequence[Any] = (),
    encodes: str = "posterior",
    samples: int | None = None,
    reference: int | None = None,
    pairs: int | None = None,
) -> Findings:
    """All metrics that apply to this data, of a model in evaluation mode, and what belongs to them.

    Models, features and distances are computed on the model's device; sums in float64 on the CPU.

    Arguments:
        seed: of all draws.
        heldout: from `look_at_heldout`, where it was called already.
        features: spaces to compare samples in besides the usual ones: names, files, modules.
        encodes: what the encoder gives: "posterior", "mode" alone, or "nothing" (`Objective.encodes`).
        samples: how many go into Fréchet distances and shares of classes, in memory for a batch of them; where no
            number is given 5,000 (2,000 in spaces that are there for all images), and no more than held-out images.
            What needs all features at once takes the first 5,000 of them at most.
        reference: how many training images they are compared with (or all there are), 10,000 where no number is given.
        pairs: how many pairs of samples, and of held-out images as far as there are so many, MS-SSIM compares; 1,000
            where no number is given, and no more than samples have. Where `samples` is not given, as many as the pairs
            take are drawn for them alone.

    Raises:
        ConfigError: an unknown feature space; a number under 2, or one that does not apply to the data; fewer samples
            than the pairs take.
        DataError: the model makes values that are not finite.
    """
    check_numbers(data, samples=samples, reference=reference, pairs=pairs)
    if isinstance(data, DensityData):
        metrics = _plane(model, data.density, torch.Generator().manual_seed(seed), encodes == "posterior")
        return Findings(metrics, {}, PlaneYardstick(model, data.density, POINTS, seed))
    if encodes == "nothing":
        heldout, metrics = None, {}
    else:
        heldout = heldout or look_at_heldout(model, data)
        metrics = heldout_metrics(model, heldout, encodes == "posterior")
    if min(len(data.train), len(data.heldout)) < 2:
        return Findings(metrics, {}, None)
    sets = collect_sets(model, data, seed, features, samples, reference, pairs)
    more, shares = set_metrics(sets, data, seed)
    return Findings(metrics | more, shares, SetYardstick(data, sets, heldout, encodes == "posterior"))


def check_numbers(data: Data, **numbers: int | None) -> None:
    """Raise `ConfigError` unless every number of images or pairs that is given can be one."""
    for name, number in numbers.items():
        if number is None:
            continue
        whole(**{name: number})
        if number < 2:
            raise ConfigError(f"{name} is {number}: it must be at least 2")
        if isinstance(data, DensityData):
            raise ConfigError(f"{name} does not apply to {data.name}: leave it out, protocols fix the number of points")
    pairs, samples = numbers.get("pairs"), numbers.get("samples")
    if pairs is None:
        return
    if isinstance(data, ArrayData) and not has_pairs(data):
        raise ConfigError(f"pairs does not apply to {data.name}: leave it out, MS-SSIM is of images from 5 pixels")
    if samples is not None and samples < 2 * pairs:
        raise ConfigError(
            f"pairs is {pairs}, which takes {2 * pairs} samples, not {samples}: give as many, or leave "
            "one of the two out"
        )


def _plane(model: IntrospectiveVAE, density: Density, generator: torch.Generator, posteriors: bool) -> Metrics:
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
            name: entry([o[i] for o in ours], n, protocol, floor=statistics.fmean(p[i] for p in perfect))
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
    if posteriors:
        value = histogram.gnelbo(lambda x: negative_elbo(model, x), real(GNELBO_POINTS), density.extent)
        protocol = f"soft_introvae: betas 1, z = mean, 1024 x 1024 grid and {GNELBO_POINTS} data points"
        found["gnelbo"] = entry([value], GNELBO_POINTS, protocol)
    return found
