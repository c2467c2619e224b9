"""A run in, a report out."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from introvae.data import ArrayData, Data, Density, DensityData, load_data
from introvae.errors import ConfigError, DataError, RunError, checked_seed, unknown
from introvae.files import write_atomically
from introvae.metrics import classifier, histogram, manifold, reconstruction
from introvae.model import IntrospectiveVAE
from introvae.training.preview import negative_elbo, preview
from introvae.training.run import Run

POINTS, NATS_POINTS, ENERGY_POINTS, REPEATS = 5000, 100_000, 2000, 5
SAMPLES, REFERENCE, NEIGHBOURS = 500, 2000, 3
GNELBO_POINTS = 100 * 512
MAX_PIXELS = 32 * 32 * 3
"""Largest image that the pixel classifier and the pixel manifold are used on."""

METRICS = [
    *("kl_soft_introvae", "jsd_soft_introvae", "kl_nats", "jsd_nats", "energy_distance", "modes"),
    *("share_within_3_sigma", "gnelbo", "mse", "psnr_db", "ssim", "kl_real_nats"),
    *("precision_pixels", "recall_pixels", "confident_share", "class_entropy_nats"),
]

Metrics = dict[str, dict[str, Any]]


def evaluate(
    run: Run | str | Path, *, data: str | Path | Data | None = None, metrics: str | Sequence[str] = (), seed: int = 0
) -> dict[str, Any]:
    """Measure a finished run's model, write `report.json` and `images/evaluation.png` into its folder.

    With other data, the files are `report-DATA.json` and `images/evaluation-DATA.png`.

    Arguments:
        run: the run or its folder.
        data: other data of the same shape than the run was trained on.
        metrics: names of the ones to report; all that apply by default. The others of an earlier report stay in it.
        seed: of all draws.

    Returns:
        `{"run": folder, "data": name, "picture": file, "metrics": {name: {"value", "std", "n", "protocol", "floor"}}}`;
        keys that do not apply are left out. "floor" is what a perfect sampler, or held-out real images in the samples'
        place, score.

    Raises:
        RunError: no finished run there.
        DataError: data of another shape.
        ConfigError: an unknown metric, or one that does not apply to the data.

    Example:
        >>> evaluate("runs/digits")["metrics"]["psnr_db"]["value"]  # doctest: +SKIP
        18.1
    """
    run = run if isinstance(run, Run) else Run.open(run)
    metrics = [metrics] if isinstance(metrics, str) else list(metrics)
    for name in metrics:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
    checked_seed(seed)
    config, model = run.config(), run.model()
    loaded = load_data(config.data if data is None else data)
    if loaded.shape != model.shape:
        raise DataError(
            f"{loaded.name} has samples of shape {loaded.shape}, the model takes {model.shape}: give data of that shape"
        )
    found = measure(model, loaded, seed)
    for name in metrics:
        if name not in found:
            raise ConfigError(f"{name} does not apply to {loaded.name}: choose from {', '.join(found)}")
    stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(loaded.name).stem).strip("-") or "data"
    suffix = "" if loaded.name == config.data else f"-{stem}"
    path = run.report_path.with_stem(run.report_path.stem + suffix)
    before = json.loads(path.read_text())["metrics"] if metrics and path.is_file() else {}
    rows = run.log()
    report = {
        "run": str(run.folder),
        "data": loaded.name,
        "objective": type(config.objective).__name__,
        "seed": config.seed,
        "steps": config.steps,
        "training_seconds": rows[-1]["seconds"] if rows else None,
        "picture": f"images/evaluation{suffix}.png",
        "metrics": {**before, **{name: found[name] for name in metrics or found}},
    }
    try:
        write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())
        preview(model, loaded, run.folder / report["picture"])
    except OSError as error:
        raise RunError(f"the report of {run.folder} cannot be written ({error}): give it room or rights") from error
    return report


def measure(model: IntrospectiveVAE, data: Data, seed: int = 0) -> Metrics:
    """All metrics that apply to this data, of a model in evaluation mode.

    Raises:
        DataError: the model makes values that are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(data, DensityData):
        return _plane(model, data.density, generator)
    found = _reconstruction(model, data)
    if len(data.shape) == 3 and len(data.heldout) > NEIGHBOURS and data.train.x[0].numel() <= MAX_PIXELS:
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


def _reconstruction(model: IntrospectiveVAE, data: ArrayData) -> Metrics:
    x = data.heldout.tensor()
    y = _batched(model.reconstruct, x, model)
    kl = _batched(lambda part: model.encode(part).kl(), x, model)
    images = x.ndim == 4
    kind, mode = ("images", "evaluation mode, ") if images else ("vectors", "")
    protocol = f"{len(x)} held-out {kind}, z = mode, {mode}averaged weights; mean and std over {kind}"
    values = {"mse": (reconstruction.mse(x, y), protocol)}
    if images:
        sigma = reconstruction.ssim_sigma(min(x.shape[2:]))
        window = f"Gaussian window with sigma {sigma}, all pixels, mirrored border"
        values["psnr_db"] = reconstruction.psnr_db(x, y), protocol
        values["ssim"] = reconstruction.ssim(x, y), f"{protocol}; {window}"
    values["kl_real_nats"] = kl, protocol
    return {name: _entry(value.tolist(), len(x), text) for name, (value, text) in values.items()}


def _samples(model: IntrospectiveVAE, data: ArrayData, generator: torch.Generator) -> Metrics:
    heldout, train = data.heldout[slice(REFERENCE)], data.train
    reference = train[torch.randperm(len(train), generator=generator)[:REFERENCE]]
    n = SAMPLES
    draws = [
        _batched(model.decode, torch.randn(n, model.latent_dim, generator=generator), model) for _ in range(REPEATS)
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
    if reference.labels is None or len(reference.labels.unique()) < 2:
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
def _batched(function: Callable[[Tensor], Tensor], x: Tensor, model: IntrospectiveVAE, size: int = 256) -> Tensor:
    return torch.cat([function(part.to(model.device)).cpu() for part in x.split(size)])


def _entry(values: list[float], n: int, protocol: str, floor: float | None = None) -> dict[str, Any]:
    entry: dict[str, Any] = {"value": statistics.fmean(values), "n": n, "protocol": protocol}
    if len(values) > 1:
        entry["std"] = statistics.stdev(values)
    if floor is not None:
        entry["floor"] = floor
    return entry


def table(report: dict[str, Any], names: Sequence[str] = ()) -> str:
    """The report's numbers, all or those of the given names, as lines of text: name, value, std, floor."""
    lines = [f"{'metric':<22}{'value':>11}{'std':>11}{'floor':>11}"]
    for name in names or report["metrics"]:
        entry = report["metrics"][name]
        cells = [f"{entry[key]:>11.4g}" if key in entry else f"{'':>11}" for key in ("value", "std", "floor")]
        lines.append(f"{name:<22}{''.join(cells)}".rstrip())
    return "\n".join(lines)
