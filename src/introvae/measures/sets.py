"""Samples against real data, in each feature space: both are read once, a batch at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from introvae.data import ArrayData, Part
from introvae.measures.entries import Metrics, at_once, entry
from introvae.metrics import classifier, diversity, kernel
from introvae.metrics.collect import Collected, Found, Wanted, collect
from introvae.metrics.features import FeatureSpace, default_spaces, feature_space
from introvae.metrics.frechet import frechet_distance
from introvae.metrics.manifold import DENSITY_NEIGHBOUR, NEIGHBOUR, Manifold, Neighbourhoods, neighbourhoods
from introvae.model import IntrospectiveVAE

TRAIN = 10_000
"""So many images stand for the training part."""
FEW, MANY = 2000, 5000
"""Samples, as far as there are held-out images: in `CHEAP` spaces, and in all others. No more than MANY training and
held-out images go into neighbourhoods and kernel distances."""
COMPARED = 1000
"""On so many held-out images, and as many samples, variants of the model are compared."""
PAIRS = 1000
SAMPLES, REPEATS, REFERENCE = 500, 5, 2000
"""For the metrics of pixels: samples in each of REPEATS draws, real images."""
MAX_PIXELS = 32 * 32 * 3
"""Largest image that the pixel classifier and the pixel manifold are used on."""
FEWEST = 50
"""With fewer real images in a part, the metrics of pixels say nothing."""
MAX_CLASSES = 50
"""With more classes (persons, say) the pixel classifier says nothing."""
SURE = 0.9
"""A classifier is sure of an image whose likeliest class has at least this probability."""
AGREES = 0.5
"""A classifier's classes are those of the data if it is right about so many of the labelled held-out images."""
CHEAP = ("thumb", "randconv", "values")
NEIGHBOURS = ("precision", "recall", "density", "coverage")


def spaces_of(data: ArrayData, features: Sequence[Any]) -> dict[str, tuple[FeatureSpace, bool]]:
    """The spaces to compare in by name, and whether by all metrics (or by the Fréchet distance alone).

    Arguments:
        features: spaces that the user asked for besides the usual ones; see `feature_space`.
    """
    usual = default_spaces(data.name, data.shape)
    found = {name: (feature_space(name), name in classifier.CLASSIFIERS) for name in usual}
    asked = [space if isinstance(space, FeatureSpace) else feature_space(space) for space in features]
    return found | {space.name: (space, True) for space in asked}


@dataclass(frozen=True)
class Sets:
    """Training part, held-out part and samples of a model, and what was found of each.

    Arguments:
        spaces: as `spaces_of` gives them.
        rows: of the held-out part, in random order, since a test part may be sorted.
        unseen: those rows.
        latents: of the samples.
        condition: their classes, where the model takes one.
        labels: of the training images.
        train, heldout, samples: what was found.
        early: of the first samples alone, for comparisons with variants of the model.
    """

    spaces: dict[str, tuple[FeatureSpace, bool]]
    rows: Tensor
    unseen: Part
    latents: Tensor
    condition: Tensor | None
    labels: Tensor | None
    train: Collected
    heldout: Collected
    samples: Collected
    early: Collected

    @property
    def compared(self) -> int:
        """How many samples and held-out images variants of the model are compared on."""
        return min(COMPARED, len(self.unseen))

    @property
    def known_classes(self) -> set[str]:
        """The spaces that are a classifier's whose classes are the data's."""
        judges = [name for name, (space, _) in self.spaces.items() if space.judge is not None]
        return {name for name in judges if _agrees(self.heldout.spaces[name], self.unseen.labels)}


def collect_sets(model: IntrospectiveVAE, data: ArrayData, seed: int, features: Sequence[Any] = ()) -> Sets:
    """Read the sets, draw the samples."""
    generator = torch.Generator().manual_seed(seed)
    spaces = spaces_of(data, features)
    reference = data.train.some(TRAIN, generator)
    rows = torch.randperm(len(data.heldout), generator=generator)[:MANY]
    unseen = data.heldout[rows]
    images = len(data.shape) == 3
    of_train, of_unseen, of_samples = _wanted(spaces, len(reference), len(unseen), images and small(data))
    drawn = max(max(want.images, want.kept) for want in of_samples)
    latents = torch.randn(drawn, model.latent_dim, generator=generator)
    condition = model.draw_condition(drawn, generator)
    read = decoded(model, latents, condition)
    pairs = min(PAIRS, len(unseen) // 2) if images and diversity.ms_ssim_scales(min(data.shape[1:])) else 0
    first, batch = min(COMPARED, len(unseen)), at_once(data.shape)
    early = collect(read, of_samples, first, batch=batch, pairs=pairs)
    samples = Collected()
    samples.merge(early)
    samples.merge(collect(read, of_samples, drawn, start=first, batch=batch, pairs=pairs))
    train = collect(stored(model, reference), of_train, len(reference), batch=batch)
    heldout = collect(stored(model, unseen), of_unseen, len(unseen), batch=batch, pairs=pairs)
    return Sets(spaces, rows, unseen, latents, condition, reference.labels, train, heldout, samples, early)


def small(data: ArrayData) -> bool:
    """Whether images are few pixels, so that they are compared by them too."""
    return math.prod(data.shape) <= MAX_PIXELS


def _wanted(
    spaces: dict[str, tuple[FeatureSpace, bool]], train: int, heldout: int, pixels: bool
) -> tuple[list[Wanted], list[Wanted], list[Wanted]]:
    """What is looked at of the training part, the held-out part and the samples."""
    wanted: tuple[list[Wanted], list[Wanted], list[Wanted]] = ([], [], [])
    looked = {**spaces} if not pixels or "pixels" in spaces else {**spaces, "pixels": (feature_space("pixels"), False)}
    for name, (space, fully) in looked.items():
        summed = 0 if name not in spaces else FEW if name in CHEAP else MANY
        kept = MANY if fully else 0
        least = (REFERENCE, REFERENCE, SAMPLES * REPEATS) if pixels and name == "pixels" else (0, 0, 0)
        counts = (train, min(summed, heldout), min(summed, heldout))
        for want, count, few in zip(wanted, counts, least, strict=True):
            want.append(Wanted(space, count if summed else 0, max(min(kept, count), few)))
    return wanted


def decoded(model: IntrospectiveVAE, latents: Tensor, condition: Tensor | None = None) -> Callable[[int, int], Tensor]:
    """Reads the samples of latents `[N, Z]`, of classes `[N]` where the model takes them."""

    def read(first: int, last: int) -> Tensor:
        classes = None if condition is None else condition[first:last]
        return model.decode(latents[first:last].to(model.device), classes)

    return read


def stored(model: IntrospectiveVAE, part: Part) -> Callable[[int, int], Tensor]:
    """Reads real data."""
    return lambda first, last: part[slice(first, last)].tensor(model.device)


def set_metrics(sets: Sets, data: ArrayData, seed: int) -> tuple[Metrics, dict[str, Any]]:
    """All metrics of samples; and, where a classifier knows the data's classes, how often each occurs."""
    found: Metrics = {}
    shares: dict[str, Any] = {}
    kind = "images" if len(data.shape) == 3 else "rows"
    for name, (space, fully) in sets.spaces.items():
        train, heldout, samples = (s.spaces[name] for s in (sets.train, sets.heldout, sets.samples))
        assert train.sums is not None
        assert heldout.sums is not None
        assert samples.sums is not None
        n = samples.sums.count
        protocol = (
            f"features {name}{f' ({space.note})' if fully else ''}: {n} samples against {train.sums.count} of the "
            f"training part; floor: {n} held-out {kind} in the samples' place"
        )
        distance, floor = (frechet_distance(s.sums, train.sums) for s in (samples, heldout) if s.sums is not None)
        found[f"frechet_{name}"] = entry([distance], n, protocol, floor)
        if fully:
            found[f"kid_{name}"] = _kernel_distance(name, train, heldout, samples, seed)
        if fully and not (name == "pixels" and small(data)):
            found |= _neighbours(name, train, heldout, samples)
        if space.judge is not None and name in sets.known_classes:
            judged, shares[name] = _classes(name, space.judge, train, heldout, samples)
            found |= judged
    if len(data.shape) == 3 and small(data):
        found |= _pixels(sets)
    if sets.samples.alike and sets.heldout.alike:
        found["msssim_pairs"] = _alike(sets, data.shape)
    return found, shares


def _kernel_distance(name: str, train: Found, heldout: Found, samples: Found, seed: int) -> dict[str, Any]:
    ours, floor = (
        kernel.kernel_distances(found.features, train.features, torch.Generator().manual_seed(seed))
        for found in (samples, heldout)
    )
    n, whole = len(samples.features), len(ours) == 1
    sizes = [min(kernel.SUBSET, len(of.features)) for of in (samples, train)]
    how = "all of them at once" if whole else f"mean and std of {len(ours)} random subsets of {sizes[0]} and {sizes[1]}"
    protocol = (
        f"features {name}: {n} samples against {len(train.features)} of the training part, unbiased squared MMD, "
        f"kernel (x·y / F + 1)^3, {how}; floor: {len(heldout.features)} held-out images in the samples' place"
    )
    return entry(ours, n, protocol, sum(floor) / len(floor))


def _neighbours(name: str, train: Found, heldout: Found, samples: Found) -> Metrics:
    """Precision, recall, density and coverage in a space, of one draw."""
    counts = [len(found.features) for found in (train, heldout, samples)]
    if min(counts) <= DENSITY_NEIGHBOUR:
        return {}
    real = Manifold(heldout.features, [NEIGHBOUR, DENSITY_NEIGHBOUR])
    # As many as samples: the more points, the more of the real ones they cover.
    stand_in = train.features[: counts[2]]
    ours, floor = (neighbourhoods(real, Manifold(x, [NEIGHBOUR])) for x in (samples.features, stand_in))
    protocol = (
        f"features {name}: {counts[2]} samples, {counts[1]} held-out images, {{}}; floor: {len(stand_in)} training "
        "images in the samples' place"
    )
    return _named(name, [ours], floor, counts[2], protocol)


def _named(name: str, draws: list[Neighbourhoods], floor: Neighbourhoods, n: int, protocol: str) -> Metrics:
    found = {}
    for metric in NEIGHBOURS:
        values = [getattr(draw, metric) for draw in draws]
        if None not in values:
            k = NEIGHBOUR if metric in ("precision", "recall") else DENSITY_NEIGHBOUR
            text = protocol.format(f"k = {k} neighbours")
            found[f"{metric}_{name}"] = entry(values, n, text, getattr(floor, metric))
    return found


def _agrees(heldout: Found, labels: Tensor | None) -> bool:
    """Whether a classifier's classes are the data's, as far as can be known."""
    if labels is None:
        return True
    classes = torch.cat(heldout.classes)
    labels = labels[: len(classes)]
    known = labels >= 0  # -1: not labelled
    return not known.any() or bool((classes[known] == labels[known]).double().mean() >= AGREES)


def _classes(
    name: str, judge: classifier.Shipped, train: Found, heldout: Found, samples: Found
) -> tuple[Metrics, dict[str, Any]]:
    k = len(judge.classes)
    n, real = len(torch.cat(samples.sure)), len(torch.cat(heldout.sure))
    of_heldout, of_samples = heldout.shares(k), samples.shares(k)
    of_train = train.shares(k, first=n)  # as many as samples: the shares of fewer are further off by chance
    protocol = (
        f"{n} samples, the package's classifier of {name} ({100 * judge.accuracy:.1f} % right on its test images); "
        f"floor: {real} held-out images in the samples' place"
    )
    found = {
        f"confident_share_{name}": entry(
            [samples.confident(SURE)], n, f"class probability >= {SURE}; {protocol}", heldout.confident(SURE)
        ),
        f"class_entropy_nats_{name}": entry(
            [classifier.entropy_nats(of_samples)],
            n,
            f"at most {math.log(k):.3f}; {protocol}",
            classifier.entropy_nats(of_heldout),
        ),
        f"class_distance_{name}": entry(
            [float((of_samples - of_heldout).abs().sum() / 2)],
            n,
            f"half the sum of the differences of the {k} classes' shares among samples and held-out images; "
            + protocol.replace(f"{real} held-out", f"{min(n, len(torch.cat(train.sure)))} training"),
            float((of_train - of_heldout).abs().sum() / 2),
        ),
    }
    return found, {
        "classes": list(judge.classes),
        "samples": [round(share, 6) for share in of_samples.tolist()],
        "heldout": [round(share, 6) for share in of_heldout.tolist()],
    }


def _alike(sets: Sets, shape: tuple[int, ...]) -> dict[str, Any]:
    ours, real = torch.cat(sets.samples.alike), torch.cat(sets.heldout.alike)
    side = min(shape[1:])
    protocol = (
        f"MS-SSIM of {len(ours)} pairs of samples with {diversity.ms_ssim_scales(side)} of 5 scales, Gaussian window "
        f"of {diversity.ms_ssim_window(side)} pixels; mean and std over pairs; floor: {len(real)} pairs of real ones"
    )
    return entry(ours.tolist(), len(ours), protocol, real.mean().item())


def _pixels(sets: Sets) -> Metrics:
    """What pixels tell: neighbourhoods, and what a classifier fitted on them says where the images are labelled."""
    train, real, fakes = (s.spaces["pixels"].features for s in (sets.train, sets.heldout, sets.samples))
    train, real, draws = train[:REFERENCE], real[:REFERENCE], list(fakes[: SAMPLES * REPEATS].split(SAMPLES))
    if min(len(train), len(real)) < FEWEST:
        return {}
    known = Manifold(real, [NEIGHBOUR, DENSITY_NEIGHBOUR])
    scores = [neighbourhoods(known, Manifold(x, [NEIGHBOUR])) for x in draws]
    floor = neighbourhoods(known, Manifold(train[:SAMPLES], [NEIGHBOUR]))
    protocol = (
        f"{SAMPLES} samples, {REPEATS} draws, {len(real)} held-out images, {{}} in pixel space; "
        f"floor: {len(train[:SAMPLES])} training images in the samples' place"
    )
    found = _named("pixels", scores, floor, SAMPLES, protocol)
    if sets.labels is None:
        return found
    labels = sets.labels[: len(train)]
    train, labels = train[labels >= 0], labels[labels >= 0]  # -1: not labelled
    if not 2 <= len(labels.unique()) <= MAX_CLASSES:
        return found
    judge = classifier.PixelClassifier.fit(train, labels)
    protocol = (
        f"{SAMPLES} samples, {REPEATS} draws, logistic regression on the pixels of {len(train)} training images; "
        f"floor: {len(real)} held-out images in the samples' place"
    )
    shares = [judge.confident_share(x) for x in draws]
    entropies = [judge.class_entropy_nats(x) for x in draws]
    text = f"class probability >= {classifier.CONFIDENT}; {protocol}"
    found["confident_share"] = entry(shares, SAMPLES, text, judge.confident_share(real))
    text = f"at most {judge.max_entropy_nats:.3f}; {protocol}"
    found["class_entropy_nats"] = entry(entropies, SAMPLES, text, judge.class_entropy_nats(real))
    return found
