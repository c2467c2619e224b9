"""The settings of a run: one frozen dataclass, from Python, YAML or the command line."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import introvae.baselines  # noqa: F401 - the parser knows the objectives that were imported
from introvae.augment import Augmentation
from introvae.data import DATA_OPTIONS, DataOptions, holds_vectors, is_table
from introvae.errors import ConfigError, checked_seed, not_negative, one_of, positive, unknown, whole
from introvae.networks import import_network
from introvae.objectives import Objective, SoftIntroVAE, Warmup, get_objective, list_objectives
from introvae.precision import PRECISIONS
from introvae.training.growing import Growth

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

GUARDS = ("act", "warn", "off")
COMPILERS = ("none", "cudagraph", "inductor")
TRACKERS = ("tensorboard", "wandb", "mlflow")
RECIPES = Path(__file__).parent.parent / "recipes"
DEFAULT_STEPS = 10_000


@dataclass(frozen=True)
class FitConfig(DataOptions):
    """Everything that decides what a training run computes: these settings and those of `DataOptions`.

    Arguments:
        data: digits, density:NAME, the path of a folder of images, scans or Parquet files, of a .parquet, .npy, .npz or
            .csv file, or owner/name on the hub.
        objective: what the two players want; any setting of it can be given as --objective.NAME.
        network: conv, mlp and others; auto (conv for images, mlp for vectors); or the import path of a builder of one's
            own (docs/own-network.md).
        network_options: settings of the network, such as --network_options.channels "[32, 64]".
        latent_dim: dimensions of the latent space; by default that of vectors, 32 for grey images up to 32 pixels, 128
            for others.
        batch_size: samples in a step, over all processes.
        steps: length of the run, warm-up included (default 10,000).
        epochs: its length in passes over the training part, instead of steps.
        lr: Adam's learning rate of both players.
        lr_schedule: constant, cosine (down to 0 at the end) or milestones (times 0.1 at each of lr_milestones).
        lr_milestones: shares of the run, in [0, 1), at which the rate falls.
        lr_warmup: steps over which the rate grows from 0.
        adam_betas: Adam's decay rates.
        ema: decay of the averaged weights, which are the ones that are saved and measured; 0 for none.
        warmup: the VAE steps at the start.
        growing: training from small images to large ones, for network style, such as --growing.samples 600000; without
            steps or epochs the run ends when the last level has seen its samples (docs/style.md).
        seed: of the weights, the order of the data and all noise.
        log_every: steps between two lines of log.jsonl.
        image_every: steps between two pictures; 0 for only one at the end.
        checkpoint_every: steps between two checkpoints; 0 for only one at the end.
        device: auto, cpu, cuda, cuda:1, mps ...
        precision: auto (bf16 for images where the hardware multiplies in it, else float32, on NVIDIA GPUs with TF32),
            float32, tf32 or bf16. auto keeps vectors in float32.
        compile: none, cudagraph (a step as one launch, on NVIDIA GPUs) or inductor (torch.compile of both networks).
        gradient_checkpointing: keep only the inputs of the networks' stages and compute the rest again in the backward
            pass: about a third more time, a fraction of the memory.
        accumulation: parts in which a batch goes through each phase of a step, for less memory, with the same result;
            not for objectives that compare the samples of a batch.
        flip: mirror images at random.
        augment: change images at random, real and decoded ones alike: color, translation, cutout, or several with
            commas between; for small sets (docs/data.md). rec, kl_* and the losses in log.jsonl are then of changed
            images; pictures and measures are of images as they are.
        augment_probability: share of the images that `augment` changes.
        conditional: tell both networks the class of each sample; all samples must be labelled (docs/conditional.md).
        paired: let the images of a class in a batch lend each other their class latents, so that these hold what the
            class has in common (network disentangled, labelled data, one process; docs/translate.md).
        independence: with paired, weight of what the other latents tell of the class, which the encoder minimises.
        guard: act (recognise a training that goes wrong, go back to a good state, change one thing), warn (only say it)
            or off; docs/training.md tells what it recognises.
        gradient_every: steps between two lines of the log that tell the norm of the decoder's adversarial gradient, a
            multiple of log_every; 0 for none.
        tracker: where the log goes besides log.jsonl: tensorboard (into the run folder), wandb, mlflow, or several with
            commas between (an extra of the same name each). The trackers' own variables hold, such as WANDB_PROJECT
            and MLFLOW_TRACKING_URI.
        out: the run folder; by default runs/DATE-DATA-OBJECTIVE.

    Raises:
        ConfigError: a setting is out of range, or steps and epochs are both given.

    Example:
        >>> FitConfig(data="density:rings", steps=100).objective
        SoftIntroVAE(beta_rec=1.0, ...)
    """

    data: str = "digits"
    objective: Objective = field(default_factory=SoftIntroVAE)
    network: str = "auto"
    network_options: dict[str, Any] = field(default_factory=dict)
    latent_dim: int | None = None
    batch_size: int = 64
    steps: int | None = None
    epochs: float | None = None
    lr: float = 2e-4
    lr_schedule: str = "constant"
    lr_milestones: tuple[float, ...] = ()
    lr_warmup: int = 0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    ema: float = 0.999
    warmup: Warmup = field(default_factory=Warmup)
    growing: Growth = field(default_factory=Growth)
    seed: int = 0
    log_every: int = 50
    image_every: int = 1000
    checkpoint_every: int = 1000
    device: str = "auto"
    precision: str = "auto"
    compile: str = "none"
    gradient_checkpointing: bool = False
    accumulation: int = 1
    flip: bool = False
    augment: str = ""
    augment_probability: float = 0.8
    conditional: bool = False
    paired: bool = False
    independence: float = 0.0
    guard: str = "act"
    gradient_every: int = 0
    tracker: str = ""
    out: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        import_network(self.network)
        if isinstance(self.objective, str):  # for Python, as on the command line
            object.__setattr__(self, "objective", get_objective(self.objective)())
        if isinstance(self.warmup, dict):
            object.__setattr__(self, "warmup", Warmup(**self.warmup))
        if isinstance(self.growing, dict):
            object.__setattr__(self, "growing", Growth(**self.growing))
        if not isinstance(self.objective, Objective):
            raise ConfigError(f"objective is {self.objective!r}: give SoftIntroVAE(), another one, or its name")
        positive(batch_size=self.batch_size, lr=self.lr, log_every=self.log_every)
        positive(accumulation=self.accumulation)
        counts = ("gradient_every", "batch_size", "accumulation", "log_every", "lr_warmup")
        counts = (*counts, "image_every", "checkpoint_every")
        whole(**{name: getattr(self, name) for name in counts})
        not_negative(**{name: getattr(self, name) for name in (*counts, "augment_probability")})
        checked_seed(self.seed)
        if self.gradient_every % self.log_every:
            raise ConfigError(
                f"gradient_every {self.gradient_every} is no multiple of log_every {self.log_every}: take one"
            )
        for name in ("steps", "epochs", "latent_dim"):
            if getattr(self, name) is not None:
                positive(**{name: getattr(self, name)})
                if name != "epochs":
                    whole(**{name: getattr(self, name)})
        if len(self.adam_betas) != 2:
            raise ConfigError(f"adam_betas is {self.adam_betas}: give two numbers")
        if self.steps is not None and self.epochs is not None:
            raise ConfigError("steps and epochs are both given: give one of them")
        one_of(("constant", "cosine", "milestones"), lr_schedule=self.lr_schedule)
        one_of(PRECISIONS, precision=self.precision)
        one_of(COMPILERS, compile=self.compile)
        one_of(GUARDS, guard=self.guard)
        for name in self.trackers:
            one_of(TRACKERS, tracker=name)
        if self.augmentation is not None and self.compile == "cudagraph":
            raise ConfigError("compile 'cudagraph' records steps without augmentation: take none, or leave augment out")
        if self.paired and (self.conditional or self.accumulation > 1):
            other = "conditional" if self.conditional else "accumulation"
            raise ConfigError(f"paired and {other} do not go together: leave one of them out")
        not_negative(independence=self.independence)
        if self.independence and not self.paired:
            raise ConfigError("independence is of the class that paired images share: take paired, or leave it out")
        if self.growing.on and self.compile != "none":
            raise ConfigError(f"compile {self.compile!r} is for networks that do not grow: take none, or no growing")
        if bool(self.lr_milestones) != (self.lr_schedule == "milestones"):
            raise ConfigError("lr_milestones and lr_schedule='milestones' go together: give both or neither")
        shares = {f"lr_milestones[{i}]": share for i, share in enumerate(self.lr_milestones)}
        shares |= {f"adam_betas[{i}]": beta for i, beta in enumerate(self.adam_betas)}
        for name, share in {**shares, "ema": self.ema}.items():
            if not 0 <= share < 1:
                raise ConfigError(f"{name} is {share}: it must be at least 0 and below 1")

    @property
    def augmentation(self) -> Augmentation | None:
        """What changes the images of the steps; None for nothing."""
        found = Augmentation(self.augment, self.augment_probability)
        return found if found.names else None

    @property
    def trackers(self) -> tuple[str, ...]:
        """Names of the trackers that `tracker` names."""
        return tuple(dict.fromkeys(name.strip() for name in self.tracker.split(",") if name.strip()))

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of step `step` (from 0) of a run of `steps`."""
        progress = step / steps
        factor = min(1.0, (step + 1) / (self.lr_warmup + 1))
        if self.lr_schedule == "cosine":
            factor *= 0.5 * (1 + math.cos(math.pi * progress))
        elif self.lr_schedule == "milestones":
            factor *= 0.1 ** sum(progress >= share for share in self.lr_milestones)
        return self.lr * factor

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in config.yaml; without `out`, so that the file is a recipe."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in (*DATA_OPTIONS, "data", "out")]
        settings = {name: getattr(self, name) for name in ("data", *DATA_OPTIONS, *names)}
        cls = type(self.objective)
        known = cls.__name__ in list_objectives() and cls.__module__.startswith("introvae.")
        settings["objective"] = {
            "class_path": cls.__name__ if known else f"{cls.__module__}.{cls.__qualname__}",
            "init_args": {f.name: getattr(self.objective, f.name) for f in dataclasses.fields(self.objective)},  # pyright: ignore
        }
        settings["warmup"] = dataclasses.asdict(self.warmup)
        settings["growing"] = self.growing.to_dict()
        for name in ("lr_milestones", "adam_betas", "window", "columns", "drop"):
            settings[name] = list(settings[name])
        return settings

    def to_yaml(self) -> str:
        """The text of config.yaml."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


@cache
def config_parser() -> ArgumentParser:
    """The parser that reads a `FitConfig` from options, YAML or both."""
    from jsonargparse import ActionConfigFile, ArgumentParser  # pyright: ignore[reportPrivateImportUsage]

    parser = ArgumentParser(exit_on_error=False, default_env=False)
    parser.add_argument("--settings", action=ActionConfigFile, help="a YAML file of these settings, as --recipe")
    parser.add_class_arguments(FitConfig, nested_key=None, as_group=False)
    return parser


def parse_config(
    arguments: Sequence[str], files: Sequence[Path] = (), source: str = "", resuming: bool = False
) -> FitConfig:
    """A `FitConfig` from command-line words, on top of YAML files.

    Arguments:
        arguments: such as ["--steps", "100"].
        files: YAML files, the later ones over the earlier; the words come last.
        source: named in errors.
        resuming: the words repeat a run's settings, so none of the file's gives way.

    Raises:
        ConfigError: an unknown or unreadable setting, in one line.
    """
    from jsonargparse import ArgumentError

    words = [word for file in files for word in ("--settings", str(file))]
    try:
        parser = config_parser()
        settings = parser.instantiate(parser.parse_args([*words, *giving_way(arguments, files, resuming)])).as_dict()
        return FitConfig(**{f.name: settings[f.name] for f in dataclasses.fields(FitConfig)})
    except (ArgumentError, TypeError, ValueError) as error:
        message = str(error) if isinstance(error, ConfigError) else _one_line(str(error))
        raise ConfigError(f"{source}: {message}" if source else message) from error


def recipe_files(name: str, words: Sequence[str]) -> list[Path]:
    """The recipe's file: the named one, or ("auto") the recommended one for the data and objective among `words`.

    Raises:
        ConfigError: an unknown recipe, or what is wrong in its file.
    """
    if name == "auto":
        bare = parse_config(words)
        name = recommended_recipe(bare.data, type(bare.objective).__name__) or "none"
    if name == "none":
        return []
    load_config(path := recipe_path(name))  # what is wrong in the file is said of the file
    return [path]


def underscored(word: str) -> str:
    """--checkpoint-every=5 as --checkpoint_every=5."""
    name, equals, value = word.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def config_from_words(words: Sequence[str]) -> FitConfig:
    """The settings that the words of an `introvae fit` command stand for, with the recipe that they name or imply.

    Raises:
        ConfigError: an unknown or unreadable setting or recipe.

    Example:
        >>> config_from_words(["--data", "density:rings", "--batch-size", "32"]).batch_size
        32
    """
    recipe, rest = _recipe_of(words)
    return parse_config(rest, recipe_files(recipe, rest))


def words_give(words: Sequence[str], name: str) -> bool:
    """Whether the words of an `introvae fit` command, or the files that they name or imply, give a setting.

    Raises:
        ConfigError: an unknown or unreadable setting or recipe.

    Example:
        >>> words = ["--data", "density:rings", "--batch-size", "32"]
        >>> words_give(words, "batch_size"), words_give(words, "latent_dim"), words_give(words, "image_every")
        (True, True, False)
    """
    recipe, rest = _recipe_of(words)
    files, left = recipe_files(recipe, rest), rest
    while (file := _asked(left, "--settings"))[0] is not None:
        files, left = [*files, Path(file[0])], file[1]
    given = {word.partition("=")[0] for word in rest}
    return f"--{name}" in given or any(name in _content(file) for file in files)


def _recipe_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """The recipe that words name, "auto" where they name none, and the other words."""
    recipe, rest = "auto", []
    given = iter([underscored(word) for word in words])
    for word in given:
        if word == "--recipe":
            recipe = next(given, "")
        elif word.startswith("--recipe="):
            recipe = word.partition("=")[2]
        else:
            rest.append(word)
    return recipe, rest


def giving_way(words: Sequence[str], files: Sequence[Path] = (), resuming: bool = False) -> list[str]:
    """The words of a command, arranged so that a given setting replaces what it excludes in a recipe.

    Steps and epochs exclude each other, so do the two lengths of the warm-up; another network than the recipe's does
    not take its network options; and the objective comes before its settings, whole: another objective takes nothing of
    the file's.
    """
    words = list(words)
    given = {word.split("=")[0] for word in words}
    first = []
    for one, other, none in (
        ("--steps", "--epochs", "null"),
        ("--epochs", "--steps", "null"),
        ("--warmup.share", "--warmup.steps", "0"),
        ("--warmup.steps", "--warmup.share", "0"),
    ):
        if one in given and other not in given:
            first.append(f"{other}={none}")
    if "--growing.samples" in given and not resuming and not given & {"--steps", "--epochs"}:
        first += ["--steps=null", "--epochs=null"]  # it ends when the last level has seen its samples
    contents = [_content(file) for file in files]
    network, _ = _asked(words, "--network")
    known = [content["network"] for content in contents if "network" in content]
    if network is not None and not resuming and known[-1:] != [network]:
        first.append("--network_options={}")
    asked, words = _asked(words, "--objective")
    return [*first, *_whole_objective(asked, contents), *words]


def _content(file: Path) -> dict[str, Any]:
    """The settings of a file as they stand there; empty where the parser will say what is wrong."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _asked(words: Sequence[str], option: str) -> tuple[str | None, list[str]]:
    """What the words give an option, None where they don't, and the words without it."""
    for index, word in enumerate(words):
        if word == option:
            return "".join(words[index + 1 : index + 2]), [*words[:index], *words[index + 2 :]]
        if word.startswith(option + "="):
            return word.partition("=")[2], [*words[:index], *words[index + 1 :]]
    return None, list(words)


def _whole_objective(asked: str | None, contents: Sequence[Mapping[str, Any]]) -> list[str]:
    """The objective with all its settings, as one word: the parser alone would let it inherit those that another
    objective, even the default one, has under the same name.
    """
    name, settings = SoftIntroVAE.__name__, {}
    for content in contents:
        block = content.get("objective")
        if isinstance(block, str):
            block = {"class_path": block}
        if isinstance(block, dict) and isinstance(block.get("class_path"), str):
            name, settings = block["class_path"], block.get("init_args") or {}
    if asked is not None and asked != name:
        name, settings = asked, {}
    cls = _objective_class(name)
    if cls is None or not isinstance(settings, dict):
        return [] if asked is None else [f"--objective={asked}"]
    defaults = {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
    return ["--objective=" + json.dumps({"class_path": name, "init_args": {**defaults, **settings}})]


def _objective_class(name: str) -> Any:
    """The class of an objective, one of the package's or a user's own by its import path; None where the parser will
    say what is wrong.
    """
    if name in list_objectives():
        return get_objective(name)
    module, _, own = name.rpartition(".")
    try:
        found = getattr(import_module(module), own)
    except Exception:  # whatever a user's module does: the parser says it
        return None
    return found if dataclasses.is_dataclass(found) else None


def _one_line(message: str) -> str:
    """A parser's message for somebody who knows no Python."""
    message = " ".join(message.split()).removeprefix("Parser ")
    name = ".".join(re.findall(r'key "([\w.]+)"', message)) or "a setting"
    if match := re.search(r"import path string: (\S+)", message):
        return str(unknown("objective", match.group(1), list_objectives()))
    if match := re.search(r"class_path '(?:\w+\.)*(\w+)':.*Option '([^']*)' is not accepted", message):
        objective, option = match.groups()
        known = [f.name for f in dataclasses.fields(get_objective(objective))] if objective in list_objectives() else []  # pyright: ignore
        listed = f": choose one of {', '.join(known)}" if known else f" (see introvae fit --objective.help {objective})"
        return f"unknown setting {option!r} of {objective}{listed}"
    if match := re.search(r"(?:unrecognized arguments: (.*)|Option '([^']*)' is not accepted)", message):
        return f"unknown setting {match.group(1) or match.group(2)!r} (see introvae fit --help)"
    if match := re.search(r"(?:Got value|Given value): (.*?)(?: Given| Does| -|$)", message):
        kind = re.search(r"Expected an? <class '(\w+)'>", message)
        kinds = {
            "int": "a whole number",
            "float": "a number",
            "tuple": "a list of numbers",
            "dict": "NAME: VALUE pairs",
        }
        wanted = kinds.get(kind.group(1), kind.group(1)) if kind else "another kind of value"
        return f"{name} is {match.group(1)}: give {wanted}"
    if "Problems parsing config" in message:
        return f"this is no YAML ({message.split(': ', 1)[-1]}): mend it or start from a run's config.yaml"
    return f"{message} (see introvae fit --help)"


def load_config(path: Path) -> FitConfig:
    """Read a config.yaml or a recipe.

    Raises:
        ConfigError: the file is missing, or a setting in it is unknown or out of range.
    """
    if not path.is_file():
        raise ConfigError(f"no settings file at {path}: give the path of a recipe or of a run's config.yaml")
    return parse_config([], [path], source=str(path))


NAMED = {"mnist": "mnist", "fashionmnist": "mnist"}
"""Sets of images with recipes of their own, by their names' letters and digits."""


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a recipe, from its name or its path.

    Raises:
        ConfigError: there is none.
    """
    if name in list_recipes():
        return RECIPES / f"{name}.yaml"
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return Path(name)
    raise unknown("recipe", name, [*list_recipes(), "a .yaml file"])


def recommended_recipe(data: str, objective: str) -> str | None:
    """Name of the recommended recipe for this data and objective, or None: that of a density, of a set of images that
    is called as in `NAMED` (a folder, a file or on the hub), or "images-..." for other images, "table-..." for tables.

    Example:
        >>> recommended_recipe("density:8gaussians", "SoftIntroVAE"), recommended_recipe("data/MNIST", "VAE")
        ('8gaussians-softintrovae', 'mnist-vae')
    """
    if is_table(data):
        kinds = ["table"]
    elif holds_vectors(data) or data == "digits":
        kinds = [data.removeprefix("density:")]
    else:
        called = re.sub(r"[^a-z0-9]", "", Path(data.partition(":")[0]).stem.lower())
        kinds = [*([NAMED[called]] if called in NAMED else []), "images"]
    found = [f"{kind}-{objective.lower()}" for kind in kinds]
    return next((name for name in found if name in list_recipes()), None)
