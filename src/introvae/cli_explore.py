"""The commands that explore a trained model, thin as those in `cli`: torch is imported inside them only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from introvae.commands import parser_for, with_latents
from introvae.errors import ConfigError, DataError

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from torch import Tensor

    from introvae.apps.explore import Batch
    from introvae.data import ArrayData, Part
    from introvae.model import IntrospectiveVAE
    from introvae.training.run import Run

SHEETS = "FILE.png (one sheet), FILE.npy, FILE.csv (of a table's model) or a folder for single images"


def interpolate(words: list[str]) -> None:
    """Ways between two images and more; as a sheet, an array, single pictures or moving ones."""
    import torch

    from introvae.apps.animation import SUFFIXES, write_animation
    from introvae.apps.explore import ways
    from introvae.classes import named
    from introvae.errors import positive
    from introvae.exchange import read_samples, write_samples

    parser = _parser(
        "interpolate",
        "The way between images (or scans) through the latent space, decoded; of several, from each to the next.",
        "example:\n  introvae interpolate runs/mine a.png b.png -o way.png\n"
        "  introvae interpolate runs/mine a.png b.png --steps 16 --spherical -o folder\n"
        "  introvae interpolate runs/mine a.png b.png c.png d.png a.png --steps 16 -o round.gif --seconds 8",
    )
    parser.add_argument("start", help="the image to start from")
    parser.add_argument("end", help="the image to end at, or the next one of several")
    parser.add_argument("more", nargs="*", help="further images: a row of the sheet from each to the next")
    parser.add_argument("--steps", type=int, default=9, help="images of a row, both ends included (default: 9)")
    parser.add_argument("--spherical", action="store_true", help="along the great circle instead of the straight line")
    output = "FILE.png (one sheet), FILE.npy, a folder, or FILE.gif or FILE.mp4 (there and back)"
    parser.add_argument("-o", "--output", required=True, help=output)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one loop of a GIF or MP4 (default: 4)")
    _label(parser, "class of all images, or of each, for a model of classes")
    own = parser.parse_args(words)
    positive(steps=own.steps)
    model = _model(_open(own.run))
    names = [own.start, own.end, *own.more]
    files = [read_samples(model, [name])[0] for name in names]
    for name, x in zip(names, files, strict=True):
        if len(x) != len(files[0]):
            raise DataError(f"{own.start} has {len(files[0])} samples and {name} {len(x)}: give as many of each")
    of = named(model.classes, own.label, len(files))
    chains = torch.stack([ways(model, chain, own.steps, own.spherical, of) for chain in torch.stack(files, dim=1)])
    path, rows = Path(own.output), chains.flatten(0, 1)
    if path.suffix in SUFFIXES:
        if rows.ndim != 5:
            raise ConfigError(f"cannot write {path}: give FILE.csv or FILE.npy, the model's samples are no images")
        # The first image of each further row was the last one of the row before it.
        chains = torch.cat([chains[:, 0], chains[:, 1:, 1:].flatten(1, 2)], dim=1)
        print(write_animation(torch.cat(list(chains), dim=-1), path, own.seconds))
        return
    pictures = [f"way_{i:03d}_{j:03d}.png" for i in range(len(rows)) for j in range(own.steps)]
    print(write_samples(rows.flatten(0, 1), path, pictures, columns=own.steps, model=model))


def traverse(words: list[str]) -> None:
    """What the most active latent dimensions change, a row each."""
    import torch

    from introvae.apps import explore
    from introvae.classes import named
    from introvae.exchange import read_samples

    parser = _parser(
        "traverse",
        "What single latent dimensions change: each row sets one to values from -reach to reach, in standard\n"
        "deviations of the prior, all others as in the image (or 0). The dimensions that vary most come first.",
        "example:\n  introvae traverse runs/faces -o sheet.png\n"
        "  introvae traverse runs/faces face.png --dimensions 16 --reach 2 --steps 11 -o sheet.png\n"
        "  introvae traverse runs/faces face.png --which 3,17,40 -o sheet.png",
    )
    parser.add_argument("image", nargs="?", help="the image to start from (default: the prior's mean, all zero)")
    parser.add_argument("--dimensions", type=int, help="how many, the most active ones (default: 8, or all)")
    parser.add_argument("--which", help="these instead, by number from 0 and joined by commas")
    parser.add_argument("--reach", type=float, default=3.0, help="the largest value (default: 3)")
    parser.add_argument("--steps", type=int, default=9, help="values in a row (default: 9)")
    parser.add_argument("--data", help="samples that tell which are active (default: up to 2,000 held-out ones)")
    _label(parser, "class of the image, for a model of classes")
    parser.add_argument("-o", "--output", required=True, help=SHEETS)
    own = parser.parse_args(words)
    if own.which is not None and own.dimensions is not None:
        raise ConfigError("--which and --dimensions are both given: give one of them")
    run = _open(own.run)
    model = _model(run)
    of = named(model.classes, own.label, 1)
    z = torch.zeros(model.latent_dim)
    if own.image is not None:
        x, _ = read_samples(model, [own.image])
        if len(x) != 1:
            raise DataError(f"{own.image} has {len(x)} samples: give a file of one")
        z = explore.latents(model, x, of)[0]
    if own.which is not None:
        if not all(part.strip().isdecimal() for part in own.which.split(",")):
            raise ConfigError(f"--which is {own.which!r}: give numbers such as 3,17")
        chosen = [int(part) for part in own.which.split(",")]
        titles = [f"dimension {dimension}" for dimension in chosen]
    else:
        part, names = _some(run, model, own.data, 2000, seed=0)
        k = min(8, model.latent_dim) if own.dimensions is None else own.dimensions
        found = explore.active_dimensions(model, explore.batches(model, part, names), k)
        chosen = found.dimensions.tolist()
        titles = [
            f"dimension {dimension}, variance of its posterior mean {variance:.3g}"
            for dimension, variance in zip(chosen, found.variance.tolist(), strict=True)
        ]
    rows = explore.traverse(model, z, chosen, own.reach, own.steps, of)
    print(f"columns: the dimension's value from {-own.reach:g} to {own.reach:g} in {own.steps} steps")
    _sheet(rows, own.output, titles, model)


def edit(words: list[str]) -> None:
    """Images moved along what two folders differ in."""
    import torch

    from introvae.apps import directions
    from introvae.classes import named
    from introvae.exchange import read_samples

    parser = _parser(
        "edit",
        "Move images along a direction of the latent space: what the samples of two folders differ in.",
        "example:\n  introvae edit runs/faces a.png b.png --with smiling/ --without serious/ -o sheet.png\n"
        "  introvae edit runs/faces --with smiling/ --without serious/ --save smile.safetensors\n"
        "  introvae edit runs/faces a.png --direction smile.safetensors --strength -1 0 1 2 -o sheet.png",
    )
    parser.add_argument("images", nargs="*", help="what is to be changed")
    parser.add_argument("--with", dest="with_", metavar="DATA", help="samples that have it, all of them used")
    parser.add_argument("--without", metavar="DATA", help="samples that do not, alike in all else")
    parser.add_argument("--direction", metavar="FILE", help="one that --save wrote, instead of two folders")
    method = "mean, the difference of the mean latents (default), or classifier, a logistic regression's normal"
    parser.add_argument("--method", default="mean", help=method)
    strength = "one or several: 1 leads from the average without to the average with, -1 back (default: 1)"
    parser.add_argument("--strength", type=float, nargs="+", default=[1.0], help=strength)
    parser.add_argument("--save", metavar="FILE", help="keep the direction as FILE.safetensors")
    _label(parser, "class of all images, or of each, for a model of classes")
    parser.add_argument("-o", "--output", help=SHEETS)
    own = parser.parse_args(words)
    both = own.with_ is not None and own.without is not None
    if both == (own.direction is not None) or (own.with_ is None) != (own.without is None):
        raise ConfigError("what is the direction? give --with DATA and --without DATA, or --direction FILE")
    if bool(own.images) != (own.output is not None) or not (own.images or own.save):
        raise ConfigError("give images and -o FILE for them, or --save FILE to keep the direction, or all of these")
    run = _open(own.run)
    model = _model(run)
    if both:
        with_, without = (_every(_data(run, model, source), model) for source in (own.with_, own.without))
        found = directions.direction(model, with_, without, own.method)
        if found.agreement is not None:
            print(f"direction: {own.method}; those of two halves of the samples have cosine {found.agreement:.2f}")
    else:
        found = directions.Direction.load(own.direction, model)
    if own.save:
        print(found.save(own.save))
    if own.images:
        x, names = read_samples(model, own.images)
        strengths = sorted({0.0, *own.strength})
        edited = directions.edit(model, x, found, strengths, named(model.classes, own.label, len(x)))
        print(f"columns: the image, then strengths {', '.join(f'{s:g}' for s in strengths)}; 0 is its reconstruction")
        _sheet(torch.cat([x[:, None], edited], dim=1), own.output, [Path(name).name for name in names], model)


def neighbours(words: list[str]) -> None:
    """The samples of a data set that are nearest to images."""
    import torch

    from introvae.apps.explore import nearest_images
    from introvae.classes import named
    from introvae.exchange import read_samples

    parser = _parser(
        "neighbours",
        "The samples of a data set that are nearest to images: what the model takes for alike, and whether it copies.",
        "example:\n  introvae neighbours runs/faces a.png b.png -o sheet.png\n"
        "  introvae neighbours runs/faces a.png --data FOLDER -k 12 --by pixels -o sheet.png",
    )
    parser.add_argument("images", nargs="+", help="what is looked for")
    parser.add_argument("--data", help="where, all of it (default: what the run was trained on)")
    parser.add_argument("-k", type=int, default=8, help="how many (default: 8)")
    by = "latents or pixels (Euclidean), or a feature space: thumb, randconv, mnist, ... or a file (cosine)"
    parser.add_argument("--by", default="latents", help=f"{by} (default: latents)")
    _label(parser, "class of all images, or of each, for a model of classes")
    parser.add_argument("-o", "--output", required=True, help=SHEETS)
    own = parser.parse_args(words)
    run = _open(own.run)
    model = _model(run)
    x, names = read_samples(model, own.images)
    data = _data(run, model, own.data)
    parts = [data.train] if own.data is None else [data.train, data.heldout]
    of = named(model.classes, own.label, len(x))
    found = nearest_images(model, x, _every(data, model, parts), own.k, own.by, of)
    taken = [_row(parts, row) for row in found.rows.flatten().tolist()]
    beside = torch.cat([part.tensor() for part in taken]).unflatten(0, found.rows.shape)
    places = iter(zip(taken, found.rows.flatten().tolist(), found.distance.flatten().tolist(), strict=True))
    for name in names:
        near = [next(places) for _ in range(own.k)]
        said = [f"{(part.names or [f'row {row}'])[0]} {distance:.4g}" for part, row, distance in near]
        print(f"{name}: {', '.join(said)}")
    print(f"columns: the image, then its {own.k} nearest in {data.name} by {own.by}, nearest first")
    _sheet(torch.cat([x[:, None], beside], dim=1), own.output, [Path(name).name for name in names], model)


def latents(words: list[str]) -> None:
    """A map of the latent space of a data set."""
    from introvae.apps import explore
    from introvae.apps.maps import draw_map, latent_map
    from introvae.errors import checked_seed, positive
    from introvae.pictures import save_picture

    parser = _parser(
        "latents",
        "A map of the latent space: the posterior means of samples in two dimensions, coloured by class.",
        "example:\n  introvae latents runs/digits -o map.png\n"
        "  introvae latents runs/faces --data FOLDER --method tsne --thumbnails -o map.png",
    )
    parser.add_argument("--data", help="the samples (default: the run's held-out ones)")
    parser.add_argument("-n", "--number", type=int, default=2000, help="at most so many, at random (default: 2000)")
    method = "pca, principal axes (default), or tsne, which keeps neighbours together and no distances"
    parser.add_argument("--method", default="pca", help=method)
    parser.add_argument("--thumbnails", action="store_true", help="small images instead of points")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of samples and of t-SNE (default: 0)")
    parser.add_argument("-o", "--output", required=True, help="FILE.png, or FILE.csv: name, x, y and label of each")
    own = parser.parse_args(words)
    positive(n=own.number)
    path = Path(own.output)
    if path.suffix not in (".png", ".csv"):
        raise ConfigError(f"cannot write {path}: give FILE.png or FILE.csv")
    run = _open(own.run)
    model = _model(run)
    if own.thumbnails and len(model.shape or ()) != 3:
        raise ConfigError("the model's samples are no images: leave --thumbnails out")
    part, names = _some(run, model, own.data, own.number, checked_seed(own.seed))
    found = latent_map(model, explore.batches(model, part, names), own.method, own.seed)
    axes = ("t-SNE, first", "t-SNE, second")
    if found.shares is not None:
        first, second = (f"{100 * share:.0f} % of the variance" for share in found.shares)
        axes = (f"first principal axis, {first}", f"second principal axis, {second}")
    print(f"axes: {axes[0]}; {axes[1]}")
    try:
        if path.suffix == ".csv":
            _table(found.points, part, names, path)
        else:
            picture = draw_map(found.points, part.labels, names, part.tensor() if own.thumbnails else None, axes)
            save_picture(picture, path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error}): choose another -o") from error
    print(path)


def mix(words: list[str]) -> None:
    """The coarse styles of some images with the fine styles of others."""
    import torch

    from introvae.apps.explore import mix_styles
    from introvae.classes import named
    from introvae.exchange import read_samples

    parser = _parser(
        "mix",
        "Style mixing, for a run of --network style: what is coarse of one image, what is fine of another.",
        "example:\n  introvae mix runs/faces --coarse a.png b.png --fine c.png d.png e.png --levels 3 -o sheet.png",
    )
    parser.add_argument("--coarse", nargs="+", required=True, help="images of the first levels' styles, a row each")
    parser.add_argument("--fine", nargs="+", required=True, help="images of the others' styles, a column each")
    parser.add_argument("--levels", type=int, default=2, help="levels from the smallest side up (default: 2)")
    _label(parser, "class of all images, or of each (coarse ones first), for a model of classes")
    parser.add_argument("-o", "--output", required=True, help=SHEETS)
    own = parser.parse_args(words)
    model = _model(_open(own.run))
    (a, names), (b, fine) = (read_samples(model, files) for files in (own.coarse, own.fine))
    of = named(model.classes, own.label, len(a) + len(b))
    rows, columns = torch.arange(len(a)).repeat_interleave(len(b)), torch.arange(len(b)).repeat(len(a))
    conditions = (None, None) if of is None else (of[rows], of[len(a) + columns])
    mixed = mix_styles(model, a[rows], b[columns], own.levels, *conditions).unflatten(0, (len(a), len(b)))
    listed = ", ".join(Path(name).name for name in fine)
    print(f"columns: the coarse image, whose styles levels 1 to {own.levels} have, then with the fine ones of {listed}")
    _crossed(a, b, mixed, ["fine", *names], own.output, model)


def translate(words: list[str]) -> None:
    """What some images are of, shown as others are."""
    from introvae.apps.translate import translate as translated
    from introvae.errors import positive
    from introvae.networks.disentangled import class_dim

    parser = _parser(
        "translate",
        "Image translation, for a run of --network disentangled: the class latents of some images with the other\n"
        "latents of others. Rows keep what is seen, columns how.",
        "example:\n  introvae translate runs/objects cow.png car.png -o sheet.png\n"
        "  introvae translate runs/objects cows/ cars/ -n 6 -o sheet.png",
    )
    parser.add_argument("a", help="a file or folder (or other data) of images whose class is kept, a row each")
    parser.add_argument("b", help="one of images that tell how it is shown, a column each")
    parser.add_argument("-n", "--number", type=int, default=8, help="at most so many of a folder (default: 8)")
    parser.add_argument("-o", "--output", required=True, help=SHEETS)
    own = parser.parse_args(words)
    positive(number=own.number)
    model = _model(_open(own.run))
    class_dim(model.encoder)  # what is wrong with the run is said before its images are read
    (a, names), (b, shown) = (_images(model, source, own.number) for source in (own.a, own.b))
    swapped = translated(model, a, b)
    print(f"columns: the image whose class is kept, then shown as {', '.join(Path(name).name for name in shown)}")
    _crossed(a, b, swapped, ["shown as", *names], own.output, model)


def _crossed(a: Tensor, b: Tensor, cells: Tensor, names: Sequence[str], output: str, model: IntrospectiveVAE) -> None:
    """Write a sheet of `cells: [N, M, ...]`, made of rows `a: [N, ...]` and columns `b: [M, ...]`, which stand beside
    and above them; `names` are of the head and the rows.
    """
    import torch

    head = torch.cat([torch.ones_like(a[:1]), b])[None]
    rows = torch.cat([head, torch.cat([a[:, None], cells], dim=1)])
    _sheet(rows, output, [Path(name).name for name in names], model)


def _images(model: IntrospectiveVAE, source: str, number: int) -> tuple[Tensor, list[str]]:
    """The samples of a file, or the first ones of a folder or other data that can be read, in their order."""
    import torch

    from introvae.data import preparation_from
    from introvae.data.each import each
    from introvae.exchange import read_samples

    preparation = preparation_from(model.config["data"]) if model.config else None
    if preparation is None and Path(source).is_file():
        return read_samples(model, [source])
    reasons, found = [], []
    for reading in each(source, preparation):
        if reading.x is None:
            reasons.append(f"{reading.name}: {reading.reason}")
        else:
            found.append((reading.x, reading.name))
        if len(found) == number:
            break
    if not found:
        raise DataError(f"{source} has no sample that can be read ({(reasons or ['it is empty'])[0]}): give another")
    x, names = zip(*found, strict=True)
    return torch.stack(x), list(names)


def _parser(command: str, description: str, epilog: str) -> ArgumentParser:
    parser = parser_for(command, description, epilog)
    parser.add_argument("run", help="the run folder")
    return parser


def _label(parser: ArgumentParser, text: str) -> None:
    parser.add_argument("--label", nargs="+", default=[], help=text)


def _open(folder: str) -> Run:
    from introvae.training.run import Run

    return with_latents(Run.open(folder))


def _model(run: Run) -> IntrospectiveVAE:
    return run.model()


def _data(run: Run, model: IntrospectiveVAE, source: str | None = None) -> ArrayData:
    """Named data, or the run's own, prepared as the run's."""
    import dataclasses

    from introvae.data import DATA_OPTIONS, ArrayData, DataOptions, load_data, preparation_from

    config = run.config()
    options = DataOptions(**{name: getattr(config, name) for name in DATA_OPTIONS})
    if source is not None:  # a pattern or column of the run's data need not be there
        options = dataclasses.replace(options, group=None, label=None, columns=(), drop=())
    prepared = preparation_from(model.config["data"]) if model.config else None
    data = load_data(config.data if source is None else source, options, prepared)
    if not isinstance(data, ArrayData):
        raise DataError(f"{data.name} is an endless supply of points: give --data FILE.npy or FILE.csv")
    known = model.config["data"].get("fingerprint") if model.config else None
    if source is None and known is not None and data.fingerprint() != known:
        raise DataError(
            f"{data.name} is not what the run was trained on (files were changed): restore it or give --data"
        )
    if data.shape != model.shape:
        raise DataError(f"{data.name} has samples of shape {data.shape}, the model takes {model.shape}: give such data")
    return data


def _every(data: ArrayData, model: IntrospectiveVAE, parts: Sequence[Part] = ()) -> Iterator[Batch]:
    """All samples of data, or of some parts of them, in batches."""
    from itertools import chain

    from introvae.apps.explore import batches

    return chain.from_iterable(
        batches(model, part, data.class_names) for part in parts or (data.train, data.heldout) if len(part)
    )


def _some(run: Run, model: IntrospectiveVAE, source: str | None, n: int, seed: int) -> tuple[Part, tuple[str, ...]]:
    """At most n random samples: held-out ones of the run's own data, or any of other data; and the classes' names."""
    import torch

    data = _data(run, model, source)
    part = data.heldout if source is None else data.whole()
    return part.some(n, torch.Generator().manual_seed(seed)), data.class_names


def _row(parts: Sequence[Part], row: int) -> Part:
    for part in parts:
        if row < len(part):
            return part[slice(row, row + 1)]
        row -= len(part)
    raise IndexError(row)


def _table(points: Tensor, part: Part, names: Sequence[str], path: Path) -> None:
    import pandas as pd

    from introvae.files import write_atomically

    labels = [-1] * len(part) if part.labels is None else part.labels.tolist()
    said = ["" if index < 0 else names[index] if index < len(names) else str(index) for index in labels]
    columns = {"name": list(part.names) or list(range(len(part))), "x": points[:, 0], "y": points[:, 1], "label": said}
    write_atomically(path, pd.DataFrame(columns).to_csv(index=False).encode())


def _sheet(rows: Tensor, output: str, titles: Sequence[str], model: IntrospectiveVAE) -> None:
    """Write samples `[rows, columns, ...]`: a sheet has a title above each row, which is printed too."""
    from introvae.exchange import write_samples
    from introvae.pictures import labelled_rows, save_picture

    for i, title in enumerate(titles):
        print(f"row {i + 1}: {title}")
    path, columns = Path(output), rows.shape[1]
    if rows.ndim == 5 and path.suffix == ".png":
        titled = {f"{i + 1}. {title}": row for i, (title, row) in enumerate(zip(titles, rows, strict=True))}
        try:
            print(save_picture(labelled_rows(titled, columns), path))
        except OSError as error:
            raise ConfigError(f"{path} cannot be written ({error}): choose another -o") from error
        return
    names = [f"row_{i:03d}_{j:03d}.png" for i in range(len(rows)) for j in range(columns)]
    print(write_samples(rows.flatten(0, 1), path, names, columns, model))
