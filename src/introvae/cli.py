"""The commands. Thin: each reads its words, calls one function and prints; torch is imported inside commands only."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from introvae.commands import parser_for
from introvae.errors import ConfigError, IntrovaeError
from introvae.machine import speaks

if TYPE_CHECKING:
    from introvae.training.config import FitConfig
    from introvae.training.loop import Trainer
    from introvae.training.run import Run

HELP = """usage: introvae COMMAND [OPTIONS]

Introspective variational autoencoders: train, measure and use them.

commands:
  fit           train a model and leave everything in a run folder
  evaluate      measure a run: report.html with pictures, report.json, a table
  sample        draw new images, rows or points from a run's model
  reconstruct   encode images or rows and decode them again
  interpolate   the way between images through the latent space
  traverse      what single latent dimensions change
  edit          images with more or less of what two folders differ in
  neighbours    the samples of a data set nearest to images
  latents       a map of the latent space of a data set
  mix           coarse styles of one image, fine styles of another
  translate     the class of one image, shown as another is
  detect        score images: what does not belong, and where
  studio        look at runs and models on a web page, on this machine only
  push          put a run's model on the Hugging Face hub, with a card written from the run
  export        the model as ONNX or torch files that run without introvae
  compare       objectives x data x seeds, or finished runs, in one table with spreads
  recipes       list the settings that come with the package
  doctor        what this machine has, and what will be used; clears the cache
  completion    the shell's completion of commands and options

introvae COMMAND --help explains each; introvae --version prints the version.

example:
  introvae fit --data FOLDER --size 64 --out runs/mine
  introvae evaluate runs/mine
  introvae sample runs/mine -n 64 -o samples.png
"""

FIT_EXAMPLE = """example:
  introvae fit --data digits --objective SoftIntroVAE --objective.beta_neg 32 --steps 2000 --out runs/digits
  introvae fit --data FOLDER --size 64 --fit crop --out runs/mine
  introvae fit --data wine.csv --drop id,name --out runs/wine
  introvae fit --resume runs/mine
  accelerate launch -m introvae fit --data FOLDER --batch_size 256      (on several GPUs)

--data: a folder of images (sub-folders are classes) or of NIfTI scans, a .parquet file or a folder of them, a .npy or
.npz file, a .csv table, owner/name on the hub, digits, density:8gaussians|2spirals|checkerboard|rings.
Settings come from the recommended recipe of the data and objective, where there is one; those given here override it.
Words in option names may be joined by - or _. --objective.help NAME lists the settings of an objective.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 2 after one clear line on standard error."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _speaking():
            _run(words)
        sys.stdout.flush()
    except IntrovaeError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted; a run that had begun goes on with introvae fit --resume RUN, others start anew")
    except BrokenPipeError:  # `introvae ... | head`: nothing more can be said there, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


@contextmanager
def _speaking() -> Iterator[None]:
    """What the package has to say goes to standard output, as plain lines."""
    log = logging.getLogger("introvae")
    handler = logging.StreamHandler(sys.stdout) if speaks() else logging.NullHandler()
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before[0])
        log.propagate = before[1]


def _run(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP, end="")
    elif words[0] == "--version":
        from introvae import __version__

        print(f"introvae {__version__}")
    elif words[0] in COMMANDS:
        COMMANDS[words[0]](words[1:])
    else:
        raise ConfigError(f"unknown command {words[0]!r}: choose one of {', '.join(COMMANDS)}")


def _fail(message: str) -> int:
    name = "introvae" if speaks() else f"introvae, process {os.environ.get('RANK')}"
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _fit(words: list[str]) -> None:
    from introvae.training import config as settings
    from introvae.training.fit import fit, resumable, resume_fit
    from introvae.training.loop import Trainer
    from introvae.training.run import Run

    words = [settings.underscored(word) for word in words]
    parser = parser_for("fit", "Train a model and leave everything in a run folder.", FIT_EXAMPLE)
    parser.add_argument("--recipe", default="auto", help="a recipe's name or file, auto (the recommended one) or none")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run from its newest checkpoint")
    parser.add_argument("--dry_run", action="store_true", help="show the settings and networks, train nothing")
    parser.add_argument("--evaluate", action="store_true", help="measure the model at the end")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    if {"-h", "--help"} & set(words):
        print(parser.format_help())
        print(settings.config_parser().format_help().split("\n\n", 1)[1])
        return None
    own, rest = parser.parse_known_args(words)
    if own.resume:
        started = Run.open(own.resume)
        started.config()  # what is wrong in the file is said of the file
        if own.recipe not in ("auto", "none"):
            raise ConfigError("a resumed run keeps its settings: give --resume without --recipe")
        wanted = settings.parse_config(rest, [started.config_path], resuming=True)
        if own.dry_run:
            trainer = resumable(started, wanted)
            return _show(trainer) if speaks() else None
        run = resume_fit(own.resume, wanted, progress=not own.quiet)
    else:
        wanted = settings.parse_config(rest, settings.recipe_files(own.recipe, rest))
        note = _without_recipe(wanted) if own.recipe == "auto" else ""
        if own.dry_run:
            trainer = Trainer(wanted)
            return _show(trainer, note) if speaks() else None
        if note:
            logging.getLogger("introvae").info(note)
        run = fit(wanted, progress=not own.quiet)
    if not speaks():  # of processes that trained together, the first measures and tells
        return None
    print(f"run      {run.folder}\nmodel    {run.model_folder}\npictures {run.images}")
    return _report(run, device=wanted.device) if own.evaluate else None


def _without_recipe(config: FitConfig) -> str:
    """What to know where no recipe is recommended for data and objective; empty where one is."""
    from introvae.training.config import recommended_recipe

    objective = type(config.objective).__name__
    near = recommended_recipe(config.data, "VAE") or recommended_recipe(config.data, "SoftIntroVAE")
    if near is None or recommended_recipe(config.data, objective):
        return ""
    return (
        f"no recipe is recommended for {objective} on {config.data}, so what is not given has the defaults of fit; "
        f"--recipe {near} lends its network, batch, rate and length"
    )


def _show(trainer: Trainer, note: str = "") -> None:
    print(trainer.config.to_yaml(), end="")
    print(f"\ndevice: {trainer.device}, precision {trainer.precision}")
    if note:
        print(note)
    print("\n".join(trainer.plan().sentences()))
    print(f"data: {trainer.data.name}, samples of shape {trainer.data.shape}")
    for name in ("encoder", "decoder"):
        module = getattr(trainer.model, name)
        print(f"\n{name}: {sum(p.numel() for p in module.parameters()):,} parameters\n{module}")


def _evaluate(words: list[str]) -> None:
    from introvae.training.run import Run

    example = (
        "example:\n  introvae evaluate runs/digits --metrics psnr_db,ssim\n"
        "  introvae evaluate runs/faces --features inception,mine.pt2\n"
        "  introvae evaluate runs/faces --features inception --samples 50000 --reference 1000000 --device cuda"
    )
    parser = parser_for("evaluate", "Measure a run: writes report.html, report.json and pictures into it.", example)
    parser.add_argument("run", help="the run folder")
    parser.add_argument("--data", help="other data, all measured (or their own test part), prepared as the run's")
    parser.add_argument("--metrics", default="", help="names of the ones to report, joined by commas (default: all)")
    parser.add_argument(
        "--features",
        default="",
        help="further spaces to compare samples in, joined by commas: thumb, randconv, pixels, mnist, cifar10, "
        "inception, or files of exported networks",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default: 0)")
    parser.add_argument("--samples", type=int, help="for Fréchet distances (default: 5000, or the held-out images)")
    parser.add_argument("--reference", type=int, help="training images they are compared with (default: 10000)")
    parser.add_argument("--pairs", type=int, help="of samples, for MS-SSIM (default: 1000, or half the samples)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    own = parser.parse_args(words)
    if not speaks():  # of processes that were launched together, the first measures and writes
        return
    _report(
        Run.open(own.run),
        data=own.data,
        metrics=[m.strip() for m in own.metrics.split(",") if m.strip()],
        features=[f.strip() for f in own.features.split(",") if f.strip()],
        seed=own.seed,
        samples=own.samples,
        reference=own.reference,
        pairs=own.pairs,
        device=own.device,
    )


def _report(run: Run, **options: Any) -> None:
    from introvae.evaluation import evaluate, table

    if options.get("data") is None:
        logging.getLogger("introvae").setLevel(logging.WARNING)  # fit said it all of these data
    report = evaluate(run, **options)
    if report["training_seconds"] is not None:
        print(f"training took {report['training_seconds']:.0f} s for {report['steps']} steps")
    print(table(report, options.get("metrics", ())))
    page = run.folder / report["page"]
    print(f"report   {page.with_suffix('.json')}\npage     {page}")
    if "picture" in report:
        print(f"picture  {run.folder / report['picture']}")


def _sample(words: list[str]) -> None:
    import torch

    from introvae.classes import samples_of
    from introvae.errors import checked_seed, positive
    from introvae.exchange import write_samples
    from introvae.training.run import Run

    example = (
        "example:\n  introvae sample runs/digits -n 64 -o samples.png\n  introvae sample runs/digits -n 64 -o folder\n"
        "  introvae sample runs/wine -n 1000 -o samples.csv\n"
        "  introvae sample runs/pets -n 16 --label cat -o cats.png            (of a class-conditional model)"
    )
    parser = parser_for("sample", "Draw new images, rows or points from a run's model.", example)
    parser.add_argument("run", help="the run folder")
    parser.add_argument("-n", "--number", type=int, default=64, help="how many (default: 64)")
    parser.add_argument(
        "-o", "--output", required=True, help="FILE.png (one sheet), FILE.npy, FILE.csv, or a folder for single images"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the latents (default: 0)")
    parser.add_argument("--label", help="class of all samples, its name or index (default: every class in turn)")
    own = parser.parse_args(words)
    positive(n=own.number)
    model = Run.open(own.run).model()
    generator = torch.Generator().manual_seed(checked_seed(own.seed))
    asked = samples_of(model.classes, own.label, own.number)
    drawn = [model.sample(count, generator, of) for count, of in asked.parts(256)]
    print(write_samples(torch.cat(drawn), Path(own.output), asked.names, asked.columns, model))


def _reconstruct(words: list[str]) -> None:
    import torch

    from introvae.classes import named, parts_of
    from introvae.commands import with_latents
    from introvae.exchange import read_samples, write_samples
    from introvae.pictures import stack_columns
    from introvae.training.run import Run

    example = (
        "example:\n  introvae reconstruct runs/mine a.png b.png -o pairs.png\n"
        "  introvae reconstruct runs/wine table.csv -o again.csv"
    )
    parser = parser_for("reconstruct", "Encode images or the rows of a table and decode them again.", example)
    parser.add_argument("run", help="the run folder")
    parser.add_argument("images", nargs="+", help="image files or scans, prepared as the run's were; or a table")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        help="FILE.png (image and reconstruction side by side), FILE.npy, FILE.csv, a folder",
    )
    parser.add_argument(
        "--label", nargs="+", default=[], help="class of all samples, or of each, for a model of classes"
    )
    own = parser.parse_args(words)
    model = with_latents(Run.open(own.run)).model()
    x, found = read_samples(model, own.images)
    conditions = parts_of(named(model.classes, own.label, len(x)), len(x), 256)
    y = torch.cat([model.reconstruct(part, of) for part, of in zip(x.split(256), conditions, strict=True)])
    output = Path(own.output)
    if output.suffix == ".png":
        print(write_samples(stack_columns([x, y]), output, [], columns=2 * max(1, min(8, round(len(x) ** 0.5)))))
    else:
        names = [f"{i:05d}_{Path(name).stem}.png" for i, name in enumerate(found)]
        print(write_samples(y, output, names, model=model))


def _elsewhere(module: str, name: str) -> Callable[..., None]:
    """A command in a module of its own, imported when it is called."""
    return lambda *words: getattr(import_module(f"introvae.{module}"), name)(*words)


def _compare(words: list[str]) -> None:
    example = (
        "example:\n  introvae compare --objectives VAE,SoftIntroVAE --data density:8gaussians --seeds 3 --steps 2000\n"
        "  introvae compare --recipe table-2d --out runs/table-2d\n  introvae compare runs/a runs/b\n\n"
        "Other options are those of introvae fit, such as --steps and --lr, and go to every run.\n"
        "The same command again goes on with the rest."
    )
    from introvae.comparison.compare import compare
    from introvae.training.config import underscored

    folders = []
    while words and not words[0].startswith("-"):
        folders.append(words.pop(0))
    parser = parser_for(
        "compare", "Train objectives on data with several seeds, or take finished RUNS, and compare.", example
    )
    parser.usage = "introvae compare [RUNS ...] [OPTIONS] [SETTINGS OF FIT]"
    parser.add_argument("--objectives", default="", help="names, joined by commas")
    parser.add_argument("--data", help="what to train on, joined by commas (default: digits)")
    parser.add_argument("--recipe", help="a comparison by name (introvae recipes lists them) or a YAML file")
    parser.add_argument("--seeds", type=int, help="runs of each objective on each data (default: 3)")
    parser.add_argument(
        "--out", default="runs/comparison", help="folder of runs and results (default: runs/comparison)"
    )
    parser.add_argument("--workers", type=int, help="runs at a time (default: one for each GPU or core)")
    parser.add_argument("--hours", type=float, help="run only what fits into so many hours, the first ones first")
    parser.add_argument("--known", metavar="FILE", help="an earlier comparison.json: its runs are not made again")
    parser.add_argument("--local", metavar="FOLDER", help="take a recipe's data sets from FOLDER/NAME where they are")
    parser.add_argument("--dry_run", action="store_true", help="say what would be run and how long it takes")
    own, settings = parser.parse_known_args([underscored(word) for word in words])
    compare(
        [name for name in own.objectives.split(",") if name],
        None if own.data is None else [name for name in own.data.split(",") if name],
        recipe=own.recipe,
        runs=folders,
        seeds=own.seeds,
        settings=settings,
        out=own.out,
        workers=own.workers,
        hours=own.hours,
        known=own.known,
        local=own.local,
        dry_run=own.dry_run,
    )
    if not own.dry_run:
        print(f"\nresults  {Path(own.out) / 'comparison.md'}")


def _doctor(words: list[str]) -> None:
    parser = parser_for(
        "doctor",
        "What this machine has, and what will be used.",
        "example:\n  introvae doctor\n  introvae doctor --clear-cache",
    )
    parser.add_argument(
        "--clear_cache",
        "--clear-cache",
        action="store_true",
        help="drop decoded images and copied files, while nothing trains",
    )
    own = parser.parse_args(words)
    from introvae.data import cache

    if own.clear_cache:
        print(f"freed {cache.clear_cache() / 1e6:,.1f} MB in {cache.cache_folder()}")
        return
    from introvae.extras import missing_extras
    from introvae.machine import hardware, versions
    from introvae.precision import pick_precision
    from introvae.training.devices import pick_device

    precision = pick_precision("auto", pick_device("auto"), (3, 32, 32))
    chosen = [
        ("--device auto", str(pick_device("auto"))),
        ("--network auto", "conv for images, mlp for points, vectors and tables"),
        ("--recipe auto", "the recommended settings for data and objective (introvae recipes lists them)"),
        ("--precision auto", f"{precision} for images, float32 for points and tables"),
    ]
    kept = [
        ("folder", str(cache.cache_folder())),
        ("size", f"{cache.cache_bytes() / 1e6:,.1f} MB, introvae doctor --clear-cache frees it"),
    ]
    for title, rows in (
        ("machine", hardware()),
        ("versions", versions()),
        ("what auto chooses", chosen),
        ("extras", missing_extras()),
        ("cache of decoded images", kept),
    ):
        print(f"{title}\n" + "".join(f"  {name:<20} {value}\n" for name, value in rows))


def _recipes(words: list[str]) -> None:
    from introvae.training import config as settings

    parser = parser_for("recipes", "List the settings that come with the package.", "example:\n  introvae recipes")
    parser.parse_args(words)
    for name in settings.list_recipes():
        head = settings.recipe_path(name).read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        print(f"{name:<28} {head}")
    from introvae.comparison.plan import COMPARISONS, list_comparisons

    print("\nfor introvae compare --recipe:")
    for name in list_comparisons():
        head = (COMPARISONS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        print(f"{name:<28} {head}")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "fit": _fit,
    "evaluate": _evaluate,
    "sample": _sample,
    "reconstruct": _reconstruct,
    "interpolate": _elsewhere("cli_explore", "interpolate"),
    "traverse": _elsewhere("cli_explore", "traverse"),
    "edit": _elsewhere("cli_explore", "edit"),
    "neighbours": _elsewhere("cli_explore", "neighbours"),
    "latents": _elsewhere("cli_explore", "latents"),
    "mix": _elsewhere("cli_explore", "mix"),
    "translate": _elsewhere("cli_explore", "translate"),
    "detect": _elsewhere("cli_detect", "detect"),
    "studio": _elsewhere("cli_share", "studio"),
    "push": _elsewhere("cli_share", "push"),
    "export": _elsewhere("cli_share", "export"),
    "compare": _compare,
    "recipes": _recipes,
    "doctor": _doctor,
    "completion": lambda words: _elsewhere("cli_completion", "completion")(words, COMMANDS),
}
"""The functions behind the commands, in the order in which the help lists them."""
