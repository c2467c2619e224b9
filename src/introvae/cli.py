"""The commands. Thin: each reads its words, calls one function and prints; torch is imported inside commands only."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from introvae.errors import ConfigError, DataError, IntrovaeError

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from introvae.training.loop import Trainer
    from introvae.training.run import Run

HELP = """usage: introvae COMMAND [OPTIONS]

Introspective variational autoencoders: train, measure and use them.

commands:
  fit           train a model and leave everything in a run folder
  evaluate      measure a run: report.json and a table
  sample        draw new images or points from a run's model
  reconstruct   encode images and decode them again
  recipes       list the settings that come with the package

introvae COMMAND --help explains each; introvae --version prints the version.

example:
  introvae fit --data digits --out runs/digits
  introvae evaluate runs/digits
  introvae sample runs/digits -n 64 -o samples.png
"""

FIT_EXAMPLE = """example:
  introvae fit --data digits --objective SoftIntroVAE --objective.beta_neg 32 --steps 2000 --out runs/digits
  introvae fit --resume runs/digits

--data: digits, density:8gaussians|2spirals|checkerboard|rings, a .parquet or .npy file, a folder of Parquet files.
Settings come from the recommended recipe of the data and objective, where there is one; those given here override it.
Words in option names may be joined by - or _. --objective.help NAME lists the settings of an objective.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 2 after one clear line on standard error."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _run(words)
        sys.stdout.flush()
    except IntrovaeError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted; a run keeps its newest checkpoint: introvae fit --resume RUN goes on from there")
    except BrokenPipeError:  # `introvae ... | head`: nothing more can be said there, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


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
    print(f"introvae: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _fit(words: list[str]) -> None:
    from introvae.training import config as settings
    from introvae.training.fit import fit, resumable, resume_fit
    from introvae.training.loop import Trainer
    from introvae.training.run import Run

    words = [_underscored(word) for word in words]
    parser = _parser("fit", "Train a model and leave everything in a run folder.", FIT_EXAMPLE)
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
            return _show(resumable(started, wanted))
        run = resume_fit(own.resume, wanted, progress=not own.quiet)
    else:
        config = settings.parse_config(rest, _recipe(own.recipe, rest))
        if own.dry_run:
            return _show(Trainer(config))
        run = fit(config, progress=not own.quiet)
    print(f"run      {run.folder}\nmodel    {run.model_folder}\npictures {run.images}")
    return _report(run) if own.evaluate else None


def _recipe(name: str, words: list[str]) -> list[Path]:
    """The recipe's file: the named one, or the recommended one for the data and objective among `words`."""
    from introvae.training import config as settings

    if name == "auto":
        bare = settings.parse_config(words)
        name = settings.recommended_recipe(bare.data, type(bare.objective).__name__) or "none"
    if name == "none":
        return []
    settings.load_config(path := settings.recipe_path(name))  # what is wrong in the file is said of the file
    return [path]


def _show(trainer: Trainer) -> None:
    print(trainer.config.to_yaml(), end="")
    print(f"\ndevice: {trainer.device}")
    print(f"data: {trainer.data.name}, samples of shape {trainer.data.shape}")
    for name in ("encoder", "decoder"):
        module = getattr(trainer.model, name)
        print(f"\n{name}: {sum(p.numel() for p in module.parameters()):,} parameters\n{module}")


def _evaluate(words: list[str]) -> None:
    from introvae.training.run import Run

    example = "example:\n  introvae evaluate runs/digits --metrics psnr_db,ssim"
    parser = _parser("evaluate", "Measure a run: writes report.json and a picture into it.", example)
    parser.add_argument("run", help="the run folder")
    parser.add_argument("--data", help="other data of the same shape")
    parser.add_argument("--metrics", default="", help="names of the ones to report, joined by commas (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default: 0)")
    own = parser.parse_args(words)
    _report(
        Run.open(own.run),
        data=own.data,
        metrics=[m.strip() for m in own.metrics.split(",") if m.strip()],
        seed=own.seed,
    )


def _report(run: Run, **options: Any) -> None:
    from introvae.evaluation import evaluate, table

    report = evaluate(run, **options)
    if report["training_seconds"] is not None:
        print(f"training took {report['training_seconds']:.0f} s for {report['steps']} steps")
    print(table(report, options.get("metrics", ())))
    picture = run.folder / report["picture"]
    report_path = run.folder / picture.with_suffix(".json").name.replace("evaluation", "report", 1)
    print(f"report   {report_path}\npicture  {picture}")


def _sample(words: list[str]) -> None:
    import torch

    from introvae.errors import checked_seed, positive
    from introvae.training.run import Run

    example = (
        "example:\n  introvae sample runs/digits -n 64 -o samples.png\n  introvae sample runs/digits -n 64 -o folder"
    )
    parser = _parser("sample", "Draw new images or points from a run's model.", example)
    parser.add_argument("run", help="the run folder")
    parser.add_argument("-n", "--number", type=int, default=64, help="how many (default: 64)")
    parser.add_argument(
        "-o", "--output", required=True, help="FILE.png (one sheet), FILE.npy, or a folder for single images"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the latents (default: 0)")
    own = parser.parse_args(words)
    positive(n=own.number)
    model = Run.open(own.run).model()
    generator = torch.Generator().manual_seed(checked_seed(own.seed))
    parts = [model.sample(min(256, own.number - start), generator) for start in range(0, own.number, 256)]
    print(_write(torch.cat(parts), Path(own.output), [f"sample_{i:05d}.png" for i in range(own.number)]))


def _reconstruct(words: list[str]) -> None:
    import torch

    from introvae.pictures import stack_columns
    from introvae.training.run import Run

    example = "example:\n  introvae reconstruct runs/mnist a.png b.png -o pairs.png"
    parser = _parser("reconstruct", "Encode images and decode them again.", example)
    parser.add_argument("run", help="the run folder")
    parser.add_argument("images", nargs="+", help="image files of the model's size")
    parser.add_argument(
        "-o", "--output", required=True, help="FILE.png (image and reconstruction side by side), FILE.npy or a folder"
    )
    own = parser.parse_args(words)
    model = Run.open(own.run).model()
    x = torch.stack([_read_image(Path(name), model.shape or ()) for name in own.images])
    y = torch.cat([model.reconstruct(part) for part in x.split(256)])
    output = Path(own.output)
    if output.suffix == ".png":
        print(_write(stack_columns([x, y]), output, [], columns=2 * max(1, min(8, round(len(x) ** 0.5)))))
    else:
        names = [f"{i:05d}_{Path(name).stem}.png" for i, name in enumerate(own.images)]
        print(_write(y, output, names))


def _read_image(path: Path, shape: tuple[int, ...]) -> Any:
    import numpy as np
    import torch
    from PIL import Image

    from introvae.data.images import to_eight_bit

    if len(shape) != 3:
        raise DataError(f"the model takes vectors of shape {shape}, not images: use a model of images")
    try:
        with Image.open(path) as image:
            array = np.asarray(to_eight_bit(image, str(path)).convert("L" if shape[0] == 1 else "RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # PIL: SyntaxError for a broken PNG
        raise DataError(f"{path} cannot be read as an image ({error}): give a PNG or JPEG file") from error
    if array.shape[:2] != shape[1:]:
        raise DataError(
            f"{path} is {array.shape[1]} x {array.shape[0]} pixels, the model takes {shape[2]} x {shape[1]}: resize it"
        )
    x = torch.from_numpy(array.copy())
    return (x[None] if x.ndim == 2 else x.permute(2, 0, 1)).float() / 255


def _write(x: Any, output: Path, names: list[str], columns: int | None = None) -> Path:
    """Samples as one picture, as an array, or as one picture each in a folder; returns where."""
    import io

    import numpy as np

    from introvae.files import write_atomically
    from introvae.pictures import image_grid, plane_figure, save_picture, to_pil

    if not str(output).strip("."):
        raise ConfigError("the output has no name: give FILE.png, FILE.npy or a folder")
    try:
        if output.suffix == ".npy":
            buffer = io.BytesIO()
            np.save(buffer, x.numpy())
            write_atomically(output, buffer.getvalue())
        elif x.ndim == 4 and output.suffix == ".png":
            save_picture(image_grid(x, columns), output)
        elif x.ndim == 4 and (not output.suffix or output.is_dir()):
            for image, name in zip(x, names, strict=True):
                save_picture(to_pil(image), output / name)
        elif x.ndim == 2 and x.shape[1] == 2 and output.suffix == ".png":
            save_picture(plane_figure({"sample": x}, {}, float(x.abs().max()) * 1.05), output)
        else:
            kinds = "FILE.png, FILE.npy or a folder" if x.ndim == 4 else "FILE.npy (or FILE.png in the plane)"
            raise ConfigError(f"cannot write {output}: give {kinds}")
    except OSError as error:
        raise ConfigError(f"{output} cannot be written ({error}): choose another -o") from error
    return output


def _recipes(words: list[str]) -> None:
    from introvae.training import config as settings

    parser = _parser("recipes", "List the settings that come with the package.", "example:\n  introvae recipes")
    parser.parse_args(words)
    for name in settings.list_recipes():
        head = settings.recipe_path(name).read_text().splitlines()[0].lstrip("# ")
        print(f"{name:<28} {head}")


def _parser(command: str, description: str, epilog: str) -> ArgumentParser:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise ConfigError(f"{message} (see introvae {command} --help)")

    return Parser(
        prog=f"introvae {command}",
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _underscored(word: str) -> str:
    """--checkpoint-every=5 as --checkpoint_every=5."""
    name, equals, value = word.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "fit": _fit,
    "evaluate": _evaluate,
    "sample": _sample,
    "reconstruct": _reconstruct,
    "recipes": _recipes,
}
"""The functions behind the commands, in the order in which the help lists them."""
