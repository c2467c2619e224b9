"""Samples against real data, in each feature space: both are read once, a batch at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from introvae.data import ArrayData, Part
from introvae.measures.entries import Metrics, at_once, entry
from introvae.measures.reference import Reference
from introvae.metrics import classifier, diversity, kernel
from introvae.metrics.collect import Collected, Found, Wanted, collect
from introvae.metrics.features import FeatureSpace, default_spaces, feature_space
from introvae.metrics.frechet import frechet_distance
from introvae.metrics.manifold import DENSITY_NEIGHBOUR, NEIGHBOUR, Manifold, Neighbourhoods, neighbourhoods
from introvae.model import IntrospectiveVAE

TRAIN = 10_000
"""So many images stand for the training part, unless another number is asked for."""
FEW, MANY = 2000, 5000
"""Samples, as far as there are held-out images: in `CHEAP` spaces, and in all others. No more than MANY images of each
set go into neighbourhoods and kernel distances, which need all features at once."""
COMPARED = 1000
"""On so many held-out images, and as many samples, variants of the model are compared."""
PAIRS = 1000
"""Pairs of samples, as far as there are samples, and of held-out images, unless another number is asked for."""
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
UNLABELLED = "; the data have no labels: whether they are of its classes is not known"
CHEAP = ("thumb", "randconv", "values")
NEIGHBOURS = ("precision", "recall", "density", "coverage")


def spaces_of(data: ArrayData, asked: Sequence[FeatureSpace]) -> dict[str, tuple[FeatureSpace, bool]]:
    """The spaces to compare in by name, and whether by all metrics (or by the Fréchet distance alone).

    Of the usual ones that is the last alone, the richest, so that a report says it once; neither `thumb`, which sees no
    detail (of images under 8 pixels it is the pixels), nor `values`.

    Arguments:
        asked: spaces that the user asked for besides the usual ones.
    """
    usual = default_spaces(data.name, data.shape)
    fully = {usual[-1]} & {*classifier.CLASSIFIERS, "randconv"}
    found = {name: (feature_space(name), name in fully) for name in usual}
    return found | {space.name: (space, True) for space in asked}


@dataclass(frozen=True)
class Sets:
    """Training part, held-out part and samples of a model, and what was found of each.

    Arguments:
        spaces: as `spaces_of` gives them.
        asked: names of those that the user asked for.
        rows: of the held-out part, in random order, since a test part may be sorted.
        unseen: the first MANY of those rows.
        latents: of the samples, or the first MANY of them.
        condition: their classes, where the model takes one.
        labels: of the first training images.
        train, heldout, samples: what was found.
        early: of the first samples alone, for comparisons with variants of the model.
        compared: how many samples and held-out images those comparisons take.
        device: where features are compared by all distances between them.
    """

    spaces: dict[str, tuple[FeatureSpace, bool]]
    asked: frozenset[str]
    rows: Tensor
    unseen: Part
    latents: Tensor
    condition: Tensor | None
    labels: Tensor | None
    train: Collected
    heldout: Collected
    samples: Collected
    early: Collected
    compared: int
    device: torch.device

    def features(self, space: str) -> tuple[Tensor, Tensor, Tensor]:
        """What was kept of the training part, the held-out part and the samples, on the device."""
        train, heldout, samples = (of.spaces[space].features for of in (self.train, self.heldout, self.samples))
        return train.to(self.device), heldout.to(self.device), samples.to(self.device)

    @property
    def judges(self) -> dict[str, str]:
        """The spaces of classifiers whose classes are the data's, and what a reader of their numbers must know.

        Without labels nobody knows it, and a classifier speaks only where it was asked for.
        """
        found = {}
        for name, (space, _) in self.spaces.items():
            if space.judge is not None:
                agrees = _agrees(self.heldout.spaces[name], self.unseen.labels)
                if agrees or (agrees is None and name in self.asked):
                    found[name] = "" if agrees else UNLABELLED
        return found


def collect_sets(
    model: IntrospectiveVAE,
    data: ArrayData,
    seed: int,
    features: Sequence[Any] = (),
    samples: int | None = None,
    reference: int | None = None,
    pairs: int | None = None,
) -> Sets:
    """Read the sets, draw the samples. All draws are made on the CPU, so that no device changes them.

    Arguments:
        features, samples, reference, pairs: as in `examine`.
    """
    generator = torch.Generator().manual_seed(seed)
    asked = [space if isinstance(space, FeatureSpace) else feature_space(space) for space in features]
    spaces = spaces_of(data, asked)
    part = Reference(data.train, TRAIN if reference is None else reference, generator)
    held = Reference(data.heldout, max(MANY, samples or 0, 2 * (pairs or 0)), generator)
    unseen = held[:MANY]
    images = len(data.shape) == 3
    pixels = images and small(data)
    wanted = _wanted(spaces, len(part), len(held), samples, pixels)
    if not has_pairs(data):
        pairs = 0
    elif pairs is None:
        pairs = min(PAIRS, (len(held) if samples is None else samples) // 2)
    first, batch = min(COMPARED, len(unseen), samples or COMPARED), at_once(data.shape)
    # Further samples are only summed: their latents are drawn when they are decoded. Those that only the pairs take are
    # drawn after all others, which then do not depend on the number of pairs.
    drawn = max(max(want.images, want.kept) for want in wanted.samples)
    ready = min(drawn, max(MANY, SAMPLES * REPEATS))
    latents = torch.randn(ready, model.latent_dim, generator=generator)
    condition = model.draw_condition(ready, generator)
    read = decoded(model, latents, condition)
    early = collect(read, wanted.samples, first, batch=batch, pairs=pairs)
    fakes = Collected()
    fakes.merge(early)
    more = further(model, generator)
    for source, start, stop in ((read, first, ready), (more, ready, drawn), (more, drawn, 2 * pairs)):
        rest = collect(source, wanted.samples, stop, start=start, batch=batch, pairs=pairs, waiting=fakes.waiting)
        fakes.merge(rest)
    return Sets(
        spaces,
        frozenset(space.name for space in asked),
        held.rows,
        unseen,
        latents,
        condition,
        part[:REFERENCE].labels if pixels else None,
        train=collect(stored(model, part), wanted.train, len(part), batch=batch),
        heldout=collect(stored(model, held), wanted.heldout, len(held), batch=batch, pairs=min(pairs, len(held) // 2)),
        samples=fakes,
        early=early,
        compared=first,
        device=model.device,
    )


def has_pairs(data: ArrayData) -> bool:
    """Whether MS-SSIM tells how alike images are: not of rows, nor of images under 5 pixels."""
    return len(data.shape) == 3 and diversity.ms_ssim_scales(min(data.shape[1:])) > 0


def small(data: ArrayData) -> bool:
    """Whether images are few pixels, so that they are compared by them too."""
    return math.prod(data.shape) <= MAX_PIXELS


class _WantedOf(NamedTuple):
    """What is looked at of each set."""

    train: list[Wanted]
    heldout: list[Wanted]
    samples: list[Wanted]


def _wanted(
    spaces: dict[str, tuple[FeatureSpace, bool]], train: int, heldout: int, samples: int | None, pixels: bool
) -> _WantedOf:
    """What is looked at of sets of those sizes; where no number of samples was asked for, as many as held-out images.

    Arguments:
        pixels: whether images are compared by them too.
    """
    wanted = _WantedOf([], [], [])
    looked = {**spaces} if not pixels or "pixels" in spaces else {**spaces, "pixels": (feature_space("pixels"), False)}
    for name, (space, fully) in looked.items():
        usual = FEW if name in CHEAP else MANY
        most = 0 if name not in spaces else usual if samples is None else samples
        kept = MANY if fully else 0
        least = (REFERENCE, REFERENCE, SAMPLES * REPEATS) if pixels and name == "pixels" else (0, 0, 0)
        counts = (train, min(most, heldout), min(most, heldout) if samples is None else most)
        for want, count, few in zip(wanted, counts, least, strict=True):
            want.append(Wanted(space, count if most else 0, max(min(kept, count), few)))
    return wanted


def decoded(model: IntrospectiveVAE, latents: Tensor, condition: Tensor | None = None) -> Callable[[int, int], Tensor]:
    """Reads the samples of latents `[N, Z]`, of classes `[N]` where the model takes them."""

    def read(first: int, last: int) -> Tensor:
        classes = None if condition is None else condition[first:last]
        return model.decode(latents[first:last].to(model.device), classes)

    return read


def further(model: IntrospectiveVAE, generator: torch.Generator) -> Callable[[int, int], Tensor]:
    """Reads samples whose latents are drawn then, one batch after another."""
    return lambda first, last: model.sample(last - first, generator)


def stored(model: IntrospectiveVAE, part: Part | Reference) -> Callable[[int, int], Tensor]:
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
            f"training part; floor: {heldout.sums.count} held-out {kind} in the samples' place"
        )
        distance, floor = (frechet_distance(s.sums, train.sums) for s in (samples, heldout) if s.sums is not None)
        found[f"frechet_{name}"] = entry([distance], n, protocol, floor)
        if fully:
            found[f"kid_{name}"] = _kernel_distance(name, sets, seed)
        if fully and not (name == "pixels" and small(data)):
            found |= _neighbours(name, sets)
        if space.judge is not None and (remark := sets.judges.get(name)) is not None:
            judged, shares[name] = _classes(name, space.judge, remark, train, heldout, samples)
            found |= judged
    if len(data.shape) == 3 and small(data):
        found |= _pixels(sets)
    if sets.samples.alike and sets.heldout.alike:
        found["msssim_pairs"] = _alike(sets, data.shape)
    return found, shares


def _kernel_distance(name: str, sets: Sets, seed: int) -> dict[str, Any]:
    train, heldout, samples = sets.features(name)
    ours, floor = (
        kernel.kernel_distances(points, train, torch.Generator().manual_seed(seed)) for points in (samples, heldout)
    )
    n, whole = len(samples), len(ours) == 1
    sizes = [min(kernel.SUBSET, len(points)) for points in (samples, train)]
    how = "all of them at once" if whole else f"mean and std of {len(ours)} random subsets of {sizes[0]} and {sizes[1]}"
    protocol = (
        f"features {name}: {n} samples against {len(train)} of the training part, unbiased squared MMD, "
        f"kernel (x·y / F + 1)^3, {how}; floor: {len(heldout)} held-out images in the samples' place"
    )
    return entry(ours, n, protocol, sum(floor) / len(floor))


def _neighbours(name: str, sets: Sets) -> Metrics:
    """Precision, recall, density and coverage in a space, of one draw."""
    train, heldout, samples = sets.features(name)
    # No more than the real ones, and as many training images: the more points, the more of the real ones they cover.
    samples = samples[: len(heldout)]
    stand_in = train[: len(samples)]
    if min(len(train), len(heldout), len(samples)) <= DENSITY_NEIGHBOUR:
        return {}
    real = Manifold(heldout, [NEIGHBOUR, DENSITY_NEIGHBOUR])
    ours, floor = (neighbourhoods(real, Manifold(x, [NEIGHBOUR])) for x in (samples, stand_in))
    protocol = (
        f"features {name}: {len(samples)} samples, {len(heldout)} held-out images, {{}}; floor: {len(stand_in)} "
        "training images in the samples' place"
    )
    return _named(name, [ours], floor, len(samples), protocol)


def _named(name: str, draws: list[Neighbourhoods], floor: Neighbourhoods, n: int, protocol: str) -> Metrics:
    found = {}
    for metric in NEIGHBOURS:
        values = [getattr(draw, metric) for draw in draws]
        if None not in values:
            k = NEIGHBOUR if metric in ("precision", "recall") else DENSITY_NEIGHBOUR
            text = protocol.format(f"k = {k} neighbours")
            found[f"{metric}_{name}"] = entry(values, n, text, getattr(floor, metric))
    return found


def _agrees(heldout: Found, labels: Tensor | None) -> bool | None:
    """Whether a classifier's classes are the data's; None where no label tells."""
    if labels is None:
        return None
    classes = torch.cat(heldout.classes)[: len(labels)]
    labels = labels[: len(classes)]
    known = labels >= 0  # -1: not labelled
    return bool((classes[known] == labels[known]).double().mean() >= AGREES) if known.any() else None


def _classes(
    name: str, judge: classifier.Shipped, remark: str, train: Found, heldout: Found, samples: Found
) -> tuple[Metrics, dict[str, Any]]:
    k = len(judge.classes)
    n, real = len(torch.cat(samples.sure)), len(torch.cat(heldout.sure))
    of_heldout, of_samples = heldout.shares(k), samples.shares(k)
    of_train = train.shares(k, first=n)  # as many as samples: the shares of fewer are further off by chance
    how = f"the package's classifier of {name} ({100 * judge.accuracy:.1f} % right on its test images){remark}"
    protocol = f"{n} samples, {how}; floor: {real} held-out images in the samples' place"
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
        "n": n,
        "protocol": f"shares of the likeliest class of {n} samples and of {real} held-out images, {how}",
    }


def _alike(sets: Sets, shape: tuple[int, ...]) -> dict[str, Any]:
    ours, real = torch.cat(sets.samples.alike), torch.cat(sets.heldout.alike)
    side = min(shape[1:])
    protocol = (
        f"MS-SSIM of {len(ours)} pairs of samples with {diversity.ms_ssim_scales(side)} of 5 scales, Gaussian window "
        f"of {diversity.ms_ssim_window(side)} pixels; mean and std over pairs; floor: {len(real)} pairs of held-out "
        "images"
    )
    return entry(ours.tolist(), len(ours), protocol, real.mean().item())


def _pixels(sets: Sets) -> Metrics:
    """What pixels tell: neighbourhoods, and what a classifier fitted on them says where the images are labelled."""
    train, real, fakes = sets.features("pixels")
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
