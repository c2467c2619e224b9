"""All metrics of a model on data, each with its protocol."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from introvae.data import Data, Density, DensityData
from introvae.measures.entries import Metrics, entry
from introvae.measures.heldout import Heldout, heldout_metrics, look_at_heldout
from introvae.measures.sets import NEIGHBOURS, collect_sets, set_metrics
from introvae.measures.variants import PlaneYardstick, SetYardstick, Yardstick, measure_variants
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
    "examine",
    "look_at_heldout",
    "measure",
    "measure_variants",
    "metrics_in",
]

POINTS, NATS_POINTS, ENERGY_POINTS, REPEATS = 5000, 100_000, 2000, 5
GNELBO_POINTS = 100 * 512


def metrics_in(space: str) -> list[str]:
    """Names of all metrics in a feature space.

    Example:
        >>> metrics_in("vgg")[:3]
        ['frechet_vgg', 'kid_vgg', 'precision_vgg']
    """
    judged = ("confident_share", "class_entropy_nats", "class_distance") if space in CLASSIFIERS else ()
    return [f"{metric}_{space}" for metric in ("frechet", "kid", *NEIGHBOURS, *judged)]


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
) -> Findings:
    """All metrics that apply to this data, of a model in evaluation mode, and what belongs to them.

    Arguments:
        seed: of all draws.
        heldout: from `look_at_heldout`, where it was called already.
        features: spaces to compare samples in besides the usual ones: names, files, modules.
        encodes: what the encoder gives: "posterior", "mode" alone, or "nothing" (`Objective.encodes`).

    Raises:
        ConfigError: an unknown feature space.
        DataError: the model makes values that are not finite.
    """
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
    sets = collect_sets(model, data, seed, features)
    more, shares = set_metrics(sets, data, seed)
    return Findings(metrics | more, shares, SetYardstick(data, sets, heldout, encodes == "posterior"))


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
