"""Scores of images and vectors: one number each, the higher the less it belongs to what a model was trained on."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from introvae.errors import ConfigError, DataError, checked_seed, not_negative, positive, unknown, whole
from introvae.gaussian import DiagonalGaussian
from introvae.measures.entries import at_once
from introvae.metrics.exact import exact
from introvae.metrics.features import FeatureSpace
from introvae.model import IntrospectiveVAE, squared_error
from introvae.pictures import to_pil
from introvae.precision import float32_multiplications, wide

LEVELS = 255
"""Images in [0, 1] with 8 bits lie 1/255 apart, so that a value's probability is its density over 255."""
LISTED = 5
"""So many rows a message names at most."""


class Fitted(Protocol):
    """What knows the latents of normal data."""

    def distances(self, latents: Tensor, /) -> Tensor:
        """How far each of `latents: [N, Z]` is from them, `[N]`."""
        ...


@dataclass(frozen=True)
class ScoreSettings:
    """What the scores depend on besides the model and the data.

    Arguments:
        beta_rec: weight of the squared error in the training objective.
        beta_kl: weight of the KL there.
        variance: of the decoder's Gaussian p(x|z) = N(D(z), variance I), for the likelihood. By default that for which
            the objective is the ELBO: beta_rec |x - D(z)|^2 / beta_kl = |x - D(z)|^2 / (2 variance), hence
            beta_kl / (2 beta_rec).
        draws: K, from each posterior, for the likelihood. Its estimate of -log p(x) is too high on average, the less so
            the larger K is, and its cost is K decodings an image.
        seed: of those draws.
        features: the space in which `perceptual` compares, such as `feature_space("randconv")`.
        latents: what knows normal images' latents: an object with `.distances(latents)`, such as `Mahalanobis`, or a
            function, from posterior means `[N, Z]` (float64, on the CPU) to `[N]`, higher for what is farther.

    Raises:
        ConfigError: a weight is negative; beta_rec, variance or draws is not above 0.

    Example:
        >>> ScoreSettings(beta_rec=1.0, beta_kl=0.5).sigma2
        0.25
    """

    beta_rec: float = 1.0
    beta_kl: float = 1.0
    variance: float | None = None
    draws: int = 64
    seed: int = 0
    features: FeatureSpace | None = None
    latents: Fitted | Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        positive(beta_rec=self.beta_rec, draws=self.draws)
        not_negative(beta_kl=self.beta_kl)
        whole(draws=self.draws)
        checked_seed(self.seed)
        if self.variance is not None:
            positive(variance=self.variance)

    @property
    def sigma2(self) -> float:
        """Variance of the decoder's Gaussian.

        Raises:
            ConfigError: beta_kl is 0, and no variance is given.
        """
        if self.variance is not None:
            return self.variance
        if self.beta_kl == 0:
            raise ConfigError("beta_kl is 0, for which the decoder's Gaussian has no variance: give variance")
        return self.beta_kl / (2 * self.beta_rec)


@dataclass
class Look:
    """What the scores read of some images or vectors: each part is computed once, when it is first asked for.

    Arguments:
        model: in evaluation mode.
        x: `[N, ...]`, on the model's device.
        settings: see there.
        condition: classes of x, where the model has classes.
    """

    model: IntrospectiveVAE
    x: Tensor
    settings: ScoreSettings
    condition: Tensor | int | str | None = None

    @cached_property
    def posterior(self) -> DiagonalGaussian:
        """q(z|x)."""
        return self.model.encode(self.x, self.condition)

    @cached_property
    def reconstruction(self) -> Tensor:
        """Decoded from the posterior's mode, as x."""
        return wide(self.model.decode(self.posterior.mode, self.condition))

    @cached_property
    def error(self) -> Tensor:
        """Squared error of the reconstruction, `[N]`, summed over pixels and channels."""
        return exact(squared_error(wide(self.x), self.reconstruction))

    @cached_property
    def kl(self) -> Tensor:
        """KL(q(z|x) || N(0, I)), `[N]`, in nats."""
        return DiagonalGaussian(exact(self.posterior.mean), exact(self.posterior.logvar)).kl()

    @cached_property
    def neg_log_likelihood(self) -> Tensor:
        """-log p(x), `[N]`, in nats."""
        noise = shared_noise(self.settings.draws, self.model.latent_dim, self.settings.seed)
        variance = self.settings.sigma2
        return -log_likelihood(self.model, self.x, self.posterior, noise, variance, condition=self.condition)


@dataclass(frozen=True)
class Score:
    """A score of single images or vectors, higher for what does not belong.

    Arguments:
        name: as in `SCORES`, in tables and on the command line.
        meaning: what it is, in one line.
        unit: what it is counted in.
        function: from a look at N images to their scores `[N]`.
        needs: what it cannot do without: "images" (no vectors), "features" or "latents" of the settings, "posterior"
            (an encoder whose log-variance is trained, see `Objective.encodes`).
    """

    name: str
    meaning: str
    unit: str
    function: Callable[[Look], Tensor]
    needs: tuple[str, ...] = ()


def _neg_elbo(look: Look) -> Tensor:
    return look.settings.beta_rec * look.error + look.settings.beta_kl * look.kl


def _perceptual(look: Look) -> Tensor:
    space = look.settings.features
    assert space is not None
    a, b = space(wide(look.x)), space(look.reconstruction.clamp(0, 1))
    return (exact(a) - exact(b)).square().mean(dim=1)


def _complexity(look: Look) -> Tensor:
    dimensions = math.prod(look.x.shape[1:])
    bits = look.neg_log_likelihood / math.log(2) + dimensions * math.log2(LEVELS)
    return bits.cpu() - png_bits(look.x)


def _latent(look: Look) -> Tensor:
    fitted = look.settings.latents
    assert fitted is not None
    latents = exact(look.posterior.mean).cpu()
    found = fitted(latents) if callable(fitted) else fitted.distances(latents)
    if found.shape != (len(latents),):
        raise DataError(f"the distances of {len(latents)} latents are {tuple(found.shape)}: give one for each")
    return found


_ALL = (
    Score(
        "neg_elbo",
        "-ELBO with z at the posterior's mode: beta_rec * error + beta_kl * KL",
        "loss",
        _neg_elbo,
        ("posterior",),
    ),
    Score(
        "error",
        "squared error of the reconstruction, summed over all values",
        "squared values",
        lambda look: look.error,
    ),
    Score("kl", "KL of the posterior from the prior N(0, I)", "nats", lambda look: look.kl, ("posterior",)),
    Score(
        "neg_log_likelihood",
        "-log p(x), importance-sampled from the posterior, with a Gaussian around the decoder's output",
        "nats",
        lambda look: look.neg_log_likelihood,
        ("posterior",),
    ),
    Score(
        "perceptual",
        "squared distance of image and reconstruction in a feature space, mean over features",
        "squared features",
        _perceptual,
        ("images", "features"),
    ),
    Score(
        "complexity",
        "-log2 p(x) of the 8-bit image less the length of its PNG file: likelihood against complexity",
        "bits",
        _complexity,
        ("images", "posterior"),
    ),
    Score("latent", "distance of the posterior's mean from normal data's latents", "distance", _latent, ("latents",)),
)
SCORES: dict[str, Score] = {score.name: score for score in _ALL}
"""The scores by name."""


def scores_for(shape: tuple[int, ...], encodes: str = "posterior") -> list[str]:
    """Names of the scores that data of a shape, (C, H, W) or (D,), can have.

    Arguments:
        shape: of one sample.
        encodes: what the encoder gives: a "posterior", or its "mode" alone (`Objective.encodes`).

    Example:
        >>> scores_for((2,))
        ['neg_elbo', 'error', 'kl', 'neg_log_likelihood', 'latent']
        >>> scores_for((2,), encodes="mode")
        ['error', 'latent']
    """
    missing = {*(["images"] if len(shape) != 3 else []), *(["posterior"] if encodes != "posterior" else [])}
    return [name for name, score in SCORES.items() if missing.isdisjoint(score.needs)]


@torch.no_grad()
def score_images(
    model: IntrospectiveVAE,
    x: Tensor,
    names: Sequence[str],
    *,
    beta_rec: float = 1.0,
    beta_kl: float = 1.0,
    variance: float | None = None,
    draws: int = 64,
    seed: int = 0,
    features: FeatureSpace | None = None,
    latents: Fitted | Callable[[Tensor], Tensor] | None = None,
    condition: Tensor | int | str | None = None,
) -> dict[str, Tensor]:
    """Scores of each image or vector by name, float64 `[N]` on the CPU; higher for what does not belong.

    The model works in evaluation mode and is left as it was; nothing is drawn for one image that is not drawn for all,
    so that one alone has the score that it has in any batch. Memory is bounded for any number of images and samples.

    Arguments:
        model: a trained one.
        x: images `[N, C, H, W]` in [0, 1], or vectors `[N, D]`, prepared as the training data were; on any device.
        names: of `SCORES`.
        beta_rec, beta_kl, variance, draws, seed, features, latents: as in `ScoreSettings`; the weights are those of the
            objective that the model was trained with.
        condition: classes of x, where the model has classes.

    Raises:
        ConfigError: no or unknown names; scores of images asked of vectors; features or latents are missing for a score
            that needs them; as in `ScoreSettings`.
        DataError: x is not finite, or has another shape than the model takes; a score is no number.

    Example:
        >>> model = IntrospectiveVAE.build(shape=(1, 8, 8), network="mlp", latent_dim=4)
        >>> found = score_images(model, torch.rand(5, 1, 8, 8), ["error", "kl"])
        >>> {name: tuple(values.shape) for name, values in found.items()}
        {'error': (5,), 'kl': (5,)}
    """
    settings = ScoreSettings(beta_rec, beta_kl, variance, draws, seed, features, latents)
    _check(x, names, settings)
    found: dict[str, list[Tensor]] = {name: [torch.empty(0, dtype=torch.float64)] for name in names}
    with evaluating(model):
        for part, classes in parts(model, x, condition, at_once(tuple(x.shape[1:]))):
            look = Look(model, part, settings, classes)
            for name in names:
                found[name].append(SCORES[name].function(look).detach().cpu().double())
    scores = {name: torch.cat(values) for name, values in found.items()}
    for name, values in scores.items():
        if values.isnan().any():
            rows = _rows(values.isnan())
            raise DataError(f"the score {name} of rows {rows} is no number: leave them out, or train the model again")
    return scores


def log_likelihood(
    model: IntrospectiveVAE,
    x: Tensor,
    posterior: DiagonalGaussian,
    noise: Tensor,
    variance: float,
    *,
    condition: Tensor | int | str | None = None,
) -> Tensor:
    """log p(x) of each sample, float64 `[N]`, in nats, of the model p(z) = N(0, I), p(x|z) = N(D(z), variance I).

    log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x) with z_k = mean + sigma noise_k, below log p(x) on average. All x share the
    noise. As many latents are decoded at a time as samples of that shape are given to a model.

    Arguments:
        model: in evaluation mode.
        x: `[N, ...]`, on the model's device.
        posterior: q(z|x), of the same x.
        noise: standard normal draws `[K, Z]`.
        variance: of each value of x given z.
        condition: as in `IntrospectiveVAE.decode`.

    Source: Burda et al. 2016, Eq. 8.

    Example:
        >>> model = IntrospectiveVAE.build(shape=(2,), latent_dim=3).eval()
        >>> x = torch.randn(4, 2)
        >>> with torch.no_grad():
        ...     log_likelihood(model, x, model.encode(x), shared_noise(16, 3, seed=0), variance=0.5).shape
        torch.Size([4])
    """
    mean, logvar, draws = exact(posterior.mean), exact(posterior.logvar), exact(noise).to(exact(posterior.mean).device)
    # log p(z)/q(z|x) = (|noise|^2 + sum logvar - |z|^2) / 2, and |z|^2 multiplied out, so that no [N, K, Z] is needed.
    cross = 2 * (mean * (0.5 * logvar).exp()) @ draws.T
    norms = mean.square().sum(dim=1, keepdim=True) + cross + logvar.exp() @ draws.square().T
    log_ratio = (draws.square().sum(dim=1) + logvar.sum(dim=1, keepdim=True) - norms) / 2
    constant = math.prod(x.shape[1:]) / 2 * math.log(2 * math.pi * variance)
    errors = _errors(model, x, posterior, noise.to(posterior.mean), condition)
    log_weights = log_ratio - exact(errors) / (2 * variance)
    return log_weights.logsumexp(dim=1) - math.log(len(noise)) - constant


def _errors(
    model: IntrospectiveVAE,
    x: Tensor,
    posterior: DiagonalGaussian,
    noise: Tensor,
    condition: Tensor | int | str | None,
) -> Tensor:
    """Squared errors of what is decoded from K draws of each posterior, `[N, K]`."""
    sigma, target, found = (0.5 * posterior.logvar).exp(), wide(x)[:, None], []
    for draws in noise.split(max(1, at_once(tuple(x.shape[1:])) // len(x))):
        z = posterior.mean[:, None] + draws * sigma[:, None]
        classes = condition.repeat_interleave(len(draws), dim=0) if isinstance(condition, Tensor) else condition
        y = wide(model.decode(z.flatten(0, 1), classes)).unflatten(0, z.shape[:2])
        found.append((target - y).square().flatten(2).sum(dim=2))
    return torch.cat(found, dim=1)


def shared_noise(samples: int, latent_dim: int, seed: int) -> Tensor:
    """Standard normal draws `[samples, latent_dim]`, the same on every machine."""
    return torch.randn(samples, latent_dim, generator=torch.Generator().manual_seed(seed))


def png_bits(x: Tensor) -> Tensor:
    """Length of each image as a PNG file of 8-bit values, float64 `[N]`, in bits: how complex it is.

    Arguments:
        x: images `[N, C, H, W]` in [0, 1], with one or three channels.

    Raises:
        DataError: another number of channels.

    Source: Serrà et al. 2020, where the length of a lossless code bounds the Kolmogorov complexity.

    Example:
        >>> flat, noise = png_bits(torch.stack([torch.zeros(1, 32, 32), torch.rand(1, 32, 32)])).tolist()
        >>> flat < noise / 5
        True
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise DataError(f"data of shape {tuple(x.shape)} are no PNG images: give [N, C, H, W] with 1 or 3 channels")
    lengths = []
    for image in x:
        buffer = io.BytesIO()
        to_pil(image).save(buffer, format="PNG", optimize=True)
        lengths.append(8 * buffer.tell())
    return torch.tensor(lengths, dtype=torch.float64)


@contextmanager
def evaluating(model: IntrospectiveVAE) -> Iterator[None]:
    """Evaluation mode and full float32 multiplications inside, every module's mode as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with float32_multiplications(tf32=False):
            yield
    finally:
        for module in training:
            module.training = True


def parts(
    model: IntrospectiveVAE, x: Tensor, condition: Tensor | int | str | None, size: int
) -> Iterator[tuple[Tensor, Tensor | int | str | None]]:
    """`x: [N, ...]`, at most `size` at a time on the model's device, and its condition as the model takes it."""
    known = condition if model.classes is None else model.classes.given(condition, len(x), model.device)
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        yield x[rows].to(model.device), known[rows] if isinstance(known, Tensor) else known


def _check(x: Tensor, names: Sequence[str], settings: ScoreSettings) -> None:
    if isinstance(names, str) or not names:
        raise ConfigError(f"names is {names!r}: give a list with some of {', '.join(SCORES)}")
    for name in names:
        if name not in SCORES:
            raise unknown("score", name, list(SCORES))
    if x.ndim not in (2, 4):
        raise DataError(f"the data have shape {tuple(x.shape)}: give images [N, C, H, W] or vectors [N, D]")
    applicable = scores_for(tuple(x.shape[1:]))
    for name in names:
        if name not in applicable:
            raise ConfigError(f"vectors have no score {name}: choose of {', '.join(applicable)}")
        if "features" in SCORES[name].needs and settings.features is None:
            raise ConfigError(f"the score {name} needs a feature space: give features=feature_space('randconv')")
        if "latents" in SCORES[name].needs and settings.latents is None:
            raise ConfigError(f"the score {name} needs normal images' latents: give latents, fitted to them")
    strange = ~torch.isfinite(x.flatten(1)).all(dim=1)
    if strange.any():
        raise DataError(f"rows {_rows(strange)} hold NaN or infinite values: mend them or leave them out")


def _rows(mask: Tensor) -> str:
    """The first of the rows that a mask names, counted from 0."""
    rows = mask.nonzero().flatten().tolist()
    return ", ".join(map(str, rows[:LISTED])) + (" …" if len(rows) > LISTED else "")
