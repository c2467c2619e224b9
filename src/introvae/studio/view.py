"""What the studio shows of one model: pictures and numbers, from words and numbers; no web library is in here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from introvae.apps.directions import Direction
from introvae.apps.explore import Batch, Condition, active_dimensions, batches, decoded, latents, nearest_images, ways
from introvae.apps.heatmaps import MAPS, OF_POSTERIOR, overlay
from introvae.apps.judge import HEATMAPS, LOCAL, PLACES, betas_of
from introvae.apps.local_map import LocalMap
from introvae.apps.scores import SCORES, Score, score_images
from introvae.classes import named, samples_of
from introvae.data import ArrayData
from introvae.data.scans import is_scan
from introvae.errors import (
    ConfigError,
    DataError,
    IntrovaeError,
    RunError,
    checked_seed,
    first_line,
    not_negative,
    one_of,
    positive,
    whole,
)
from introvae.evaluation import load_for
from introvae.exchange import read_samples
from introvae.model import IntrospectiveVAE
from introvae.pictures import image_grid, to_pil
from introvae.report import figures
from introvae.training.checkpoint import checkpoint_path, list_checkpoints
from introvae.training.curves import curves
from introvae.training.run import Run

log = logging.getLogger("introvae")

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

MOST_PIXELS = 20_000_000
"""Uploads of more pixels are refused before they are decoded: decoded, 20 million are 60 MB, and a model sees few."""
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
"""Of uploads; Pillow reads many more, some by other programs."""
MOST_SAMPLES = 256
SHOWN_SCORES = ("neg_elbo", "error", "kl")
"""Scores that need nothing but the image, and take no time; where no posterior is trained, those that need none."""
COMPARED = 512
"""So many held-out images tell what is usual."""
HOT = 0.999
"""The quantile of their heat that has the last colour of a heat map."""
ROUNDING = 1e-5
"""Scores that differ by a smaller share are the same."""
SIDE = 288
"""Single pictures are enlarged by whole factors to about this side."""
KINDS = ("sample", "held-out", "upload")


class Source(NamedTuple):
    """Which image is meant: an uploaded file, a held-out one by its place, or a sample by its seed.

    Arguments:
        kind: of `KINDS`.
        path: of an upload.
        number: place or seed.
        label: class, for a model of classes.
    """

    kind: str = "sample"
    path: str | None = None
    number: int = 0
    label: str | None = None


class Usual(NamedTuple):
    """What the run's held-out images have, or samples of the model where the data are not there.

    Arguments:
        batch: these images.
        scores: by name, `[N]`.
        what: which images these are.
    """

    batch: Batch
    scores: dict[str, Tensor]
    what: str


@dataclass(frozen=True)
class Seen:
    """What a model makes of an image.

    Arguments:
        image, reconstruction, heat: pictures of one size.
        scores: each with its value and the share of usual images that have less.
        latent: the posterior mean of each dimension, as bars.
        compared: what the shares are of.
    """

    image: Image
    reconstruction: Image
    heat: Image
    scores: list[tuple[Score, float, float]]
    latent: Figure
    compared: str


def _steadily(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method all of which sees one model."""

    @wraps(method)
    def steady(self: View, *words: Any, **named: Any) -> Any:
        with self._steady():
            return method(self, *words, **named)

    return steady


class View:
    """A run, finished or not, or a saved model, and all that the studio asks of it.

    Every method is a function of its arguments, draws only from the seed that it is given, and may be called from
    several threads.

    Arguments:
        source: a run's folder, or what `IntrospectiveVAE.from_pretrained` takes.
        directions: files that `introvae edit --save` wrote, besides those in the run's folder.

    Raises:
        RunError, CheckpointError: nothing there that has a model.
        ConfigError: the model's samples are no images.

    Example:
        >>> View("runs/digits").samples(seed=0, number=36)  # doctest: +SKIP
        <PIL.Image.Image image mode=L size=302x302>
    """

    def __init__(self, source: str | Path, directions: Sequence[str | Path] = ()) -> None:
        folder = Path(source)
        self.run = Run.open(folder) if (folder / "config.yaml").is_file() else None
        self.name = folder.name or str(source)
        self.step: int | None = None
        self._found: dict[str, Any] = {}
        self._lock = RLock()
        if self.run is None:
            self.model = IntrospectiveVAE.from_pretrained(source)
        else:
            self.model, self.step = _newest(self.run)
        shape = self.model.shape
        if shape is None or len(shape) != 3:
            raise ConfigError(f"{source} has samples of shape {shape}, no images: look at them with introvae sample")
        self.shape = shape
        encodes = "posterior" if self.run is None else self.run.config().objective.encodes
        self.encodes, self.posterior = encodes != "nothing", encodes == "posterior"
        self.scores = [name for name in SHOWN_SCORES if self.posterior or "posterior" not in SCORES[name].needs]
        self.directions = {Path(path).stem: Direction.load(path, self.model) for path in directions}
        for path in sorted(folder.glob("*.safetensors")) if self.run is not None else []:
            try:
                self.directions.setdefault(path.stem, Direction.load(path, self.model))
            except IntrovaeError as error:
                log.warning("left out: %s", error)

    @property
    def finished(self) -> bool:
        """Whether the model is the one that the run ended with, or was saved."""
        return self.step is None

    def refresh(self) -> None:
        """Take the newest model of a run that trains; where there is no newer one, nothing is read.

        Raises:
            RunError, CheckpointError: the run's files are gone or damaged.
        """
        with self._lock:
            if self.run is None or self.finished:
                return
            ended = (self.run.model_folder / "config.json").is_file()
            newer = list_checkpoints(self.run.checkpoints)[-1:]
            if ended or (newer and newer[0] != checkpoint_path(self.run.checkpoints, self.step or 0)):
                self.model, self.step = _newest(self.run)
                for name in set(self._found) - {"data"}:  # all else is of the model
                    del self._found[name]

    def _steady(self) -> AbstractContextManager[Any]:
        """In which the model is one: that of a run that trains may be replaced in between."""
        return nullcontext() if self.finished else self._lock

    @property
    def labels(self) -> list[str]:
        """Names of the classes that the model knows."""
        return list(self.model.classes.names) if self.model.classes is not None else []

    def facts(self) -> str:
        """The model in one line."""
        channels, height, width = self.shape
        said = [f"{'grey' if channels == 1 else 'colour'} images of {width} x {height} pixels"]
        said.append(f"{self.model.latent_dim} latent dimensions")
        if self.run is not None:
            config = self.run.config()
            said[:0] = [type(config.objective).__name__, f"trained on {config.data}"]
        if self.step is not None:
            said.append("still training")
        return ", ".join(said)

    # --- samples

    @_steadily
    def samples(self, seed: int = 0, number: int = 36, truncation: float = 1.0, label: str | None = None) -> Image:
        """A sheet of samples; with the same seed, a larger number begins with the same ones.

        Arguments:
            seed: of the latents, as in `introvae sample`.
            number: 1 to `MOST_SAMPLES`.
            truncation: factor of the latents, 0 to 2: below 1 samples are more usual and less various.
            label: class of all; every class in turn without.

        Raises:
            ConfigError: a number out of its range, or no such class.
        """
        whole(number=number)
        positive(number=number)
        if number > MOST_SAMPLES:
            raise ConfigError(f"number is {number}: give at most {MOST_SAMPLES}")
        asked = samples_of(self.model.classes, label, number)
        z = self._drawn(seed, number, truncation)
        return image_grid(decoded(self.model, z, asked.condition), asked.columns)

    def _drawn(self, seed: int, number: int, truncation: float = 1.0) -> Tensor:
        not_negative(truncation=truncation)
        if truncation > 2:
            raise ConfigError(f"truncation is {truncation}: give 0 to 2")
        generator = torch.Generator().manual_seed(checked_seed(seed))
        return truncation * torch.randn(number, self.model.latent_dim, generator=generator)

    # --- single images

    @_steadily
    def image(self, source: Source) -> Tensor:
        """The image that is meant, `[C, H, W]` in [0, 1], prepared as the training data were.

        Raises:
            DataError: the upload is no image, or too large; there are no held-out images.
            ConfigError: no such image.
        """
        one_of(KINDS, kind=source.kind)
        if source.kind == "sample":
            return decoded(self.model, self._drawn(source.number, 1), self._condition(source.label, 1))[0]
        if source.kind == "held-out":
            count = self.heldout_count
            if not 0 <= source.number < count:
                raise ConfigError(f"there is no held-out image {source.number}: give 0 to {count - 1}")
            return self._data.heldout[source.number : source.number + 1].tensor()[0]
        if not source.path:
            raise DataError("there is no upload yet: choose a file, or another kind of image")
        return read_upload(self.model, Path(source.path))

    @property
    def heldout_count(self) -> int:
        """How many held-out images there are.

        Raises:
            DataError: the run's data are not there.
        """
        return len(self._data.heldout)

    @property
    def _data(self) -> ArrayData:
        return self._once("data", self._load)

    def _load(self) -> ArrayData:
        if self.run is None:
            raise DataError(f"{self.name} is a model without its data: open its run instead")
        data = load_for(self.run.config(), self.model, None)
        assert isinstance(data, ArrayData)  # of a shape that the model takes, so images
        return data

    def _once(self, name: str, find: Callable[[], Any]) -> Any:
        """What `find` gives, called once, whatever the number of threads that ask."""
        with self._lock:
            if name not in self._found:
                self._found[name] = find()
            return self._found[name]

    def _condition(self, label: str | None, count: int) -> Tensor | None:
        return named(self.model.classes, [label] if label else [], count)

    @_steadily
    def seen(self, source: Source, heat: str = HEATMAPS[0]) -> Seen:
        """What the model makes of an image, and how usual that is.

        Arguments:
            source: the image.
            heat: kind of heat map: "local", "residual", "latent" or "combined", as in `introvae detect`.

        Raises:
            ConfigError: the run's encoder gives no latents, or no posterior for a map that needs one; an unknown map or
                class.
            DataError: as in `image`.
        """
        one_of(HEATMAPS, heat=heat)
        self.check_encodes()
        if heat in OF_POSTERIOR and not self.posterior:
            raise ConfigError(f"the map {heat} means nothing of {self.name}, which trains no posterior: choose another")
        x, of = self.image(source)[None], self._condition(source.label, 1)
        z = latents(self.model, x, of)
        usual = self.usual
        scores = []
        for name, value in self._scores(x, of).items():
            less = value - ROUNDING * value.abs()  # an image alone is rounded otherwise than in a batch
            scores.append((SCORES[name], value.item(), float((usual.scores[name] < less).double().mean())))
        hot = overlay(x, self._heat(heat, x, of), self._once(f"hottest {heat}", partial(self._hottest, heat)))
        image, again, where = (enlarged(picture[0]) for picture in (x, decoded(self.model, z, of), hot))
        return Seen(image, again, where, scores, figures.latent_bars(z[0]), usual.what)

    def _scores(self, x: Tensor, condition: Condition) -> dict[str, Tensor]:
        beta_rec, beta_kl = betas_of(self.run.config().objective) if self.run is not None else (1.0, 1.0)
        return score_images(self.model, x, self.scores, beta_rec=beta_rec, beta_kl=beta_kl, condition=condition)

    @property
    def usual(self) -> Usual:
        """What usual images have; found once."""
        return self._once("usual", self._find_usual)

    def _find_usual(self) -> Usual:
        batch, what = self._some()
        return Usual(batch, self._scores(*batch), what)

    def _heat(self, name: str, x: Tensor, condition: Condition) -> Tensor:
        function = self._once(LOCAL, self._local_map) if name == LOCAL else partial(MAPS[name], self.model)
        return function(x, condition=condition)

    def _hottest(self, name: str) -> float:
        """The heat that few pixels of usual images exceed; the last colour has it."""
        heat = self._heat(name, *self.usual.batch).flatten().sort().values
        return max(heat[int(HOT * (len(heat) - 1))].item(), torch.finfo(heat.dtype).tiny)

    def _local_map(self) -> LocalMap:
        """What is usual at each place, from training images, or from samples where there are none."""
        fitted = LocalMap(self.model)
        try:
            data = self._data
            for batch in batches(self.model, data.train[:PLACES], data.class_names):
                fitted.update(*batch)
        except IntrovaeError:
            fitted = LocalMap(self.model)
            fitted.update(*self._made(2))
        return fitted

    def _some(self) -> tuple[Batch, str]:
        """Held-out images, or samples where there are none, and what they are."""
        try:
            data = self._data
            part = data.heldout[:COMPARED]
            of = self.model.condition_for(part.labels, data.class_names)
            return Batch(part.tensor(), of), f"{len(part):,} held-out images"
        except IntrovaeError:
            return self._made(1), f"{COMPARED:,} samples of the model, since its data are not here"

    def _made(self, seed: int) -> Batch:
        of = self.model.draw_condition(COMPARED, torch.Generator().manual_seed(seed))
        return Batch(decoded(self.model, self._drawn(seed, COMPARED), of), of)

    @_steadily
    def nearest(self, source: Source, number: int = 8, by: str = "latents") -> tuple[Image, list[float]]:
        """The training images that are nearest to an image, on one sheet, and their distances.

        Raises:
            ConfigError: an unknown space or class, fewer training images.
            DataError: as in `image`, or the run's data are not there.
        """
        if by == "latents":
            self.check_encodes()
        x, data = self.image(source)[None], self._data
        of = self._condition(source.label, 1)
        found = nearest_images(self.model, x, batches(self.model, data.train, data.class_names), number, by, of)
        return image_grid(data.train[found.rows[0]].tensor(), columns=number), found.distance[0].tolist()

    # --- ways through the latent space

    @_steadily
    def between(self, start: Source, end: Source, steps: int = 9, spherical: bool = False) -> Image:
        """The way between two images, decoded, on one sheet; the images themselves at its ends.

        Raises:
            ConfigError, DataError: as in `image` and `apps.explore.ways`.
        """
        self.check_encodes()
        ends = torch.stack([self.image(start), self.image(end)])
        of = None
        if self.labels:
            given = [self._condition(source.label, 1) for source in (start, end)]
            of = torch.cat([one for one in given if one is not None])
        way = ways(self.model, ends, steps, spherical, of)[0]
        return image_grid(torch.cat([ends[:1], way, ends[1:]]), columns=steps + 2)

    @property
    def active(self) -> list[int]:
        """All latent dimensions, those first that vary most over held-out images, or samples where there are none;
        found once.
        """
        return self._once("active", self._find_active)

    def _find_active(self) -> list[int]:
        batch, _ = self._some()
        return active_dimensions(self.model, [batch], self.model.latent_dim).dimensions.tolist()

    @_steadily
    def latent(self, source: Source) -> list[float]:
        """The latent of an image: the one that a sample was drawn from, the posterior mean of others.

        Raises:
            ConfigError, DataError: as in `image`.
        """
        if source.kind == "sample":
            return self._drawn(source.number, 1)[0].tolist()
        self.check_encodes()
        return latents(self.model, self.image(source)[None], self._condition(source.label, 1))[0].tolist()

    @_steadily
    def moved(
        self,
        latent: Sequence[float],
        values: Mapping[int, float],
        label: str | None = None,
        direction: str | None = None,
        strength: float = 0.0,
    ) -> Image:
        """The image of a latent of which some dimensions are set to other values, moved along a saved direction.

        Raises:
            ConfigError: another number of latent dimensions, no such dimension, class or direction.
        """
        z = torch.tensor(list(latent))
        if z.shape != (self.model.latent_dim,):
            raise ConfigError(f"the latent has {len(z)} dimensions and the model {self.model.latent_dim}")
        for dimension, value in values.items():
            if not 0 <= dimension < len(z):
                raise ConfigError(f"there is no dimension {dimension}: give 0 to {len(z) - 1}")
            z[dimension] = value
        if direction:
            one_of(tuple(self.directions), direction=direction)
            z = z + strength * self.directions[direction].vector
        return enlarged(decoded(self.model, z[None], self._condition(label, 1))[0])

    def check_encodes(self) -> None:
        """Raise `ConfigError` where the encoder gives no latents."""
        if not self.encodes:
            raise ConfigError(f"the encoder of {self.name} gives no latents: look at its samples")

    # --- training

    @property
    def logged(self) -> int:
        """Length of the log in bytes: it grows while the run trains."""
        path = self.run.log_path if self.run is not None else None
        return path.stat().st_size if path is not None and path.is_file() else 0

    def curves(self) -> Figure:
        """The run's curves, as far as they are logged.

        Raises:
            RunError: a model without its run, or a run that has logged nothing yet.
        """
        rows = self.run.log() if self.run is not None else []
        if not rows:
            raise RunError(f"{self.name} has no log: it is a model without its run, or has not begun")
        return curves(rows, images=True)

    def progress(self) -> str:
        """How far the run is, in one line."""
        if self.run is None:
            return "A saved model, without its run."
        rows, config = self.run.log(), self.run.config()
        if not rows:
            return "Nothing is logged yet."
        last = rows[-1]
        said = [f"step {last['step']:,}" + (f" of {config.steps:,}" if config.steps else "")]
        said += [f"{last['seconds']:,.0f} s of training"] if "seconds" in last else []
        said += [f"{name} {last[name]:.4g}" for name in ("rec", "kl_real", "kl_sample") if name in last]
        said += [f"the model is that of step {self.step:,}"] if self.step is not None else []
        guarded = len(self.run.events("guard"))
        said += [f"the guard acted {guarded} times"] if guarded else []
        return ", ".join(said) + "."


def _newest(run: Run) -> tuple[IntrospectiveVAE, int | None]:
    """The run's model, and the step that it is of where the run has not ended."""
    return (run.model(), None) if (run.model_folder / "config.json").is_file() else run.latest()


def read_upload(model: IntrospectiveVAE, path: Path) -> Tensor:
    """An uploaded file as the model takes it, `[C, H, W]`.

    Raises:
        DataError: it is no image, cut off, has more than `MOST_PIXELS` pixels, or holds several; the message names the
            file without its folder.
    """
    from PIL import Image

    if is_scan(path.name):
        raise DataError(f"{path.name} is a scan of many slices: give one slice as a PNG, or use introvae detect")
    try:
        with Image.open(path, formats=FORMATS) as picture:  # reads the head only
            width, height = picture.size
    except Exception:  # Pillow raises what it likes for a file that is made to break it
        raise DataError(f"{path.name} is no image that can be read: give a PNG or JPEG file") from None
    if width * height > MOST_PIXELS:
        raise DataError(
            f"{path.name} has {width:,} x {height:,} pixels, more than {MOST_PIXELS // 10**6} million: make it smaller"
        )
    try:
        x, _ = read_samples(model, [str(path)])
    except DataError as error:
        raise DataError(str(error).replace(str(path), path.name)) from None
    except Exception as error:
        raise DataError(f"{path.name} cannot be read ({first_line(error)}): give a PNG or JPEG file") from None
    if len(x) != 1:
        raise DataError(f"{path.name} holds {len(x)} images: give a file of one")
    return x[0]


def enlarged(image: Tensor) -> Image:
    """One image `[C, H, W]`, its pixels repeated to about `SIDE`."""
    picture = to_pil(image)
    factor = max(1, round(SIDE / max(picture.size)))
    return picture.resize((picture.width * factor, picture.height * factor), resample=0)
