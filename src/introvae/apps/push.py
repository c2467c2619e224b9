"""A run's model on the Hugging Face hub, with a card that is written from the run."""

from __future__ import annotations

import json
import math
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from introvae.data import TablePreparation, preparation_from
from introvae.errors import ConfigError, first_line
from introvae.files import write_atomically
from introvae.model import IntrospectiveVAE
from introvae.networks import SHIPPED
from introvae.pictures import plane_figure, save_picture
from introvae.report import figures
from introvae.report.page import MEANING, number
from introvae.training.config import list_recipes, recipe_path
from introvae.training.run import Run

CARD, MODEL_FILES = "README.md", ("config.json", "model.safetensors")
PAPERS = {
    "VAE": ("Auto-Encoding Variational Bayes", "1312.6114"),
    "IntroVAE": ("IntroVAE: Introspective Variational Autoencoders for Photographic Image Synthesis", "1807.06358"),
    "SoftIntroVAE": ("Soft-IntroVAE: Analyzing and Improving the Introspective Variational Autoencoder", "2012.13253"),
    "ASIntroVAE": ("AS-IntroVAE: Adversarial Similarity Distance Makes Robust IntroVAE", "2206.13903"),
    "WGANGP": ("Improved Training of Wasserstein GANs", "1704.00028"),
    "AGE": ("It Takes (Only) Two: Adversarial Generator-Encoder Networks", "1704.02304"),
}
"""Title and arXiv number of each objective's paper."""
COUNTED = {"processes": "process", "threads": "thread"}
"""What the log counts of a machine, and the word for one of it."""


def package(run: Run, folder: str | Path, name: str = "", license: str | None = None) -> Path:
    """Write what `push` puts on the hub into a folder: model, card, settings, numbers, a picture of samples.

    Nothing of the data is in it: no image, no file name, and of their place the last part only. But a table's model
    knows the columns' names, means and spreads, and a model of classes their names.

    Arguments:
        run: a finished one; its numbers are those of `introvae evaluate`, if it was called.
        folder: is made.
        name: on the hub, for the card's example; by default the run's.
        license: of the model, as the hub names it ("apache-2.0", "cc-by-4.0"); the card has none without.

    Returns:
        The folder.

    Raises:
        RunError: the run has no model, or was evaluated with another one.
        ConfigError: the folder cannot be written.
    """
    folder, model = Path(folder), run.model()
    report = _numbers(run)
    try:
        for file in MODEL_FILES:
            write_atomically(folder / file, (run.model_folder / file).read_bytes())
        write_atomically(folder / "settings.yaml", yaml.safe_dump(_settings(run, model), sort_keys=False).encode())
        if report:
            write_atomically(folder / "report.json", (json.dumps(report, indent=2) + "\n").encode())
        pictured = _samples(model, folder / "samples.png")
        write_atomically(folder / CARD, model_card(run, name or run.folder.name, license, pictured, model).encode())
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error}): choose another folder") from error
    return folder


def push(
    run: Run,
    name: str,
    *,
    private: bool = False,
    license: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Put a run's model on the hub; `IntrospectiveVAE.from_pretrained(name)` loads it.

    Arguments:
        run, license: as in `package`.
        name: "owner/model"; the repository is made where there is none.
        private: a new repository is shown to its owner only.
        revision: branch to write to, which must be there; the main one by default.
        token: of the hub; by default the one that `hf auth login` or HF_TOKEN left.

    Returns:
        The commit's address.

    Raises:
        ConfigError: a name that the hub does not take, or what the hub said against it.
        RunError: as in `package`.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"the hub takes no name {name!r} ({first_line(error)}): give OWNER/MODEL") from error
    if name.count("/") != 1:
        raise ConfigError(f"the hub takes no name {name!r}: give OWNER/MODEL")
    api = HfApi(token=token, library_name="introvae")
    with tempfile.TemporaryDirectory() as scratch:
        folder = package(run, scratch, name, license)
        try:
            api.create_repo(name, private=private or None, exist_ok=True)
            done = api.upload_folder(
                repo_id=name, folder_path=folder, revision=revision, commit_message=f"introvae run {run.folder.name}"
            )
        except LocalTokenNotFoundError as error:
            raise ConfigError("the hub wants to know who you are: give HF_TOKEN, or use hf auth login") from error
        except HfHubHTTPError as error:
            code = getattr(error.response, "status_code", None)
            remedy = "give HF_TOKEN of someone who may write there, or choose another name"
            raise ConfigError(f"the hub refuses {name} ({code}: {first_line(error)}): {remedy}") from error
        except Exception as error:  # of whatever library the hub's client asks with
            raise ConfigError(f"the hub cannot be reached ({first_line(error)}): start again later") from error
    return str(done.commit_url)


def model_card(
    run: Run, name: str, license: str | None = None, pictured: bool = True, model: IntrospectiveVAE | None = None
) -> str:
    """The card: metadata as the hub reads them, then what the model is, how it was made and is made again, its numbers
    with their protocols, what it is for, and its limits.

    Arguments:
        run, name, license: as in `package`.
        pictured: whether `samples.png` is beside it.
        model: the run's, where it is loaded already.

    Raises:
        RunError: as in `package`.
    """
    from huggingface_hub import ModelCardData

    config, report = run.config(), _numbers(run)
    model = run.model() if model is None else model
    objective, shape = type(config.objective).__name__, model.shape or ()
    images, latents = len(shape) == 3, config.objective.encodes != "nothing"
    names = list(model.classes.names) if model.classes is not None else []
    metadata = ModelCardData(
        library_name="introvae",
        license=license,
        pipeline_tag="unconditional-image-generation" if images else None,
        tags=[
            "introvae",
            objective,
            *(["vae"] if latents else []),
            *(["anomaly-detection"] if latents and not names else []),
        ],
    )
    parts = [f"---\n{metadata.to_yaml()}\n---", f"# {name}"]
    kind = f"vectors of {math.prod(shape)} values"
    if len(shape) == 3:
        channels, height, width = shape
        kind = f"{'grey' if channels == 1 else 'colour'} images of {width} x {height} pixels"
    networks = f"an encoder to {model.latent_dim} latent dimensions and a decoder"
    if not latents:
        networks = f"a generator from {model.latent_dim} latent dimensions and its critic"
    title, arxiv = PAPERS.get(objective, (objective, ""))
    paper = f" ([{title}](https://arxiv.org/abs/{arxiv}))" if arxiv else ""
    parts.append(
        f"A {objective}{paper} of {kind}, trained on {_data_name(run)}: {networks}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters."
        + (f" It is told the class of each sample: {', '.join(names)}." if names else "")
    )
    if pictured:
        parts.append("![Samples](samples.png)\n\nSamples, none selected.")
    parts.append(f"## Use\n\n{_example(model, name, names, latents)}\n\n{_input(model)}")
    parts.append(f"## Training\n\n{_training(run, report)}\n\n{_again(run, model)}")
    parts.append(f"## Numbers\n\n{_table(report)}")
    parts.append(f"## Intended use\n\n{_uses(images, latents, bool(names))}")
    parts.append(f"## Limits\n\n{_limits(images, latents)}")
    return "\n\n".join(parts) + "\n"


def _numbers(run: Run) -> dict[str, Any]:
    """The run's metrics, where it was evaluated, without what tells of files."""
    if not run.report_path.is_file():
        return {}
    report = run.report()
    kept = ("objective", "seed", "steps", "training_seconds", "machine", "train", "heldout", "metrics")
    return {"data": _data_name(run), **{name: report[name] for name in kept if name in report}}


def _settings(run: Run, model: IntrospectiveVAE) -> dict[str, Any]:
    """The run's settings without columns and names that the model does not know."""
    settings, preparation = run.config().to_dict(), preparation_from((model.config or {}).get("data", {}))
    told = {"data": _data_name(run), "drop": [], "group": None, "label": None}
    if settings["label"] == "none":  # no column's name
        told.pop("label")
    if isinstance(preparation, TablePreparation):
        told["columns"] = list(preparation.columns)  # so that those without a name stay left out
    return settings | told


def _data_name(run: Run) -> str:
    """What the data are called: a set of the recipes by its name on the hub, of all else, which may be a path, the last
    part.
    """
    data = run.config().data
    return data if data in _hub_sets() else Path(data).name


@cache
def _hub_sets() -> frozenset[str]:
    """Names on the hub of the recipes' data sets."""
    named = (yaml.safe_load(recipe_path(name).read_text(encoding="utf-8")).get("data") for name in list_recipes())
    return frozenset(name for name in named if name and "/" in name)


def _samples(model: IntrospectiveVAE, path: Path) -> bool:
    """Draw samples; whether there is a picture of such."""
    shape = model.shape or ()
    if len(shape) == 3:
        save_picture(figures.samples(model, seed=0), path)
    elif shape == (2,) and not isinstance(preparation_from((model.config or {}).get("data", {})), TablePreparation):
        x = figures.draw(model, 2000, seed=0)
        save_picture(plane_figure({"samples": x}, {}, float(x.abs().max()) * 1.05), path)
    else:
        return False
    return True


def _example(model: IntrospectiveVAE, name: str, names: list[str], latents: bool) -> str:
    """Code that loads the model, of classes `names`, and uses it; a network of one's own is registered first."""
    given = f", {names[0]!r}" if names else ""
    lines = [
        f'model = IntrospectiveVAE.from_pretrained("{name}")',
        f"samples = model.sample(16, condition={names[0]!r})" if names else "samples = model.sample(16)",
    ]
    if latents:
        lines.append(f"posterior = model.encode(samples{given}); again = model.reconstruct(samples{given})")
    network, said = (model.config or {}).get("network", ""), ""
    if network in SHIPPED:
        lines = ["from introvae import IntrospectiveVAE", "", *lines]
    else:
        module, _, builder = network.rpartition(".") if "." in network else ("MODULE", "", "BUILDER")
        imported = [f"from {module} import {builder}  # not in this repository", ""]
        imported.insert(module < "introvae", "from introvae import IntrospectiveVAE, register_network")
        lines = [*imported, f'register_network("{network}", {builder})', *lines]
        said = (
            f"The network, `{network}`, does not come with introvae, and its code is not in this repository: get its "
            "module from whoever made it, and register it before the model is loaded.\n\n"
        )
    return said + "```python\n" + "\n".join(lines) + "\n```"


def _input(model: IntrospectiveVAE) -> str:
    preparation = preparation_from((model.config or {}).get("data", {}))
    if isinstance(preparation, TablePreparation):
        return f"What goes in are rows of the columns {', '.join(preparation.columns)}, prepared as `config.json` says."
    if preparation is None:
        return "What goes in has the shape that `config.json` says, images in [0, 1]."
    height, width = preparation.size
    how = f"{width} x {height} pixels by {preparation.fit}, {'grey' if preparation.channels == 1 else 'colour'}"
    return (
        f"What goes in are images in [0, 1], prepared as the training data were: {how}, and what else `config.json` "
        "says. Every command of the package does that."
    )


def _training(run: Run, report: dict[str, Any]) -> str:
    """How long, on how much data, on what machine."""
    config, rows = run.config(), run.log()
    said = f"{config.steps:,} steps of {config.batch_size}" if config.steps else f"steps of {config.batch_size}"
    said += f", seed {config.seed}"
    if rows and "seconds" in rows[-1]:
        said += f", {rows[-1]['seconds']:,.0f} s"
    if starts := run.events("start"):
        machine = starts[-1]
        counts = [f"{machine[name]} {name if machine[name] > 1 else one}" for name, one in COUNTED.items()]
        said += f" on {machine['device']} ({', '.join([machine['precision'], *counts])})"
    said += "."
    if "train" in report:
        return f"{said} {report['train']:,} samples to train on, {report['heldout']:,} held out."
    if found := run.events("data"):  # it was not evaluated, which would have told them apart
        said += f" {found[-1]['used']:,} samples, held-out ones among them."
    return said


def _again(run: Run, model: IntrospectiveVAE) -> str:
    """The command that trains it once more, and what has to be filled in."""
    config, name = run.config(), (model.config or {}).get("network", "")
    words = ["introvae fit --recipe settings.yaml"]
    if not (config.data in {"digits", *_hub_sets()} or config.data.startswith("density:")):
        words.append("--data DATA")
    if config.group is not None:
        words.append("--group GROUP")
    if config.label not in (None, "none"):
        words.append("--label COLUMN")
    said = ["All settings are in `settings.yaml`."]
    if len(words) > 1:
        said[0] = "All settings are in `settings.yaml` but those in capitals, which would tell of the data."
    own = [type(config.objective).__module__, name.rpartition(".")[0]]
    needed = [f"`{module}`" for module in dict.fromkeys(own) if module and not module.startswith("introvae.")]
    if needed:
        said.append(f"It imports {' and '.join(needed)}, which must be where Python finds modules (PYTHONPATH).")
    if name not in SHIPPED and "." not in name:
        said.append(f'With `register_network("{name}", ...)` before, so in Python: `introvae.fit(recipe=...)`.')
    return f"```sh\n{' '.join(words)}\n```\n\n{' '.join(said)}"


def _table(report: dict[str, Any]) -> str:
    if not report:
        return "Not measured: `introvae evaluate` was not called before."
    lines = ["| measure | value | spread | real data score | protocol |", "|---|---|---|---|---|"]
    for name, entry in report["metrics"].items():
        value, std, floor = (number(entry.get(key)) for key in ("value", "std", "floor"))
        meaning = (MEANING.get(name) or name).split(";")[0]
        protocol = str(entry.get("protocol", "")).replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {meaning} (`{name}`) | {value} | {std} | {floor} | {protocol} |")
    return "\n".join(lines)


def _uses(images: bool, latents: bool, classes: bool) -> str:
    said = ["Research and teaching on generative models: samples from the prior"]
    if latents:
        said.append(
            "reconstructions, ways through the latent space, and scores of how little a sample belongs to the data"
        )
    what = ", ".join(said) + "."
    if not (images and latents):
        return what
    return what + (
        " `introvae studio` shows them." if classes else " `introvae detect` and `introvae studio` are made for it."
    )


def _limits(images: bool, latents: bool) -> str:
    said = [
        "- It knows its training data only: what they lack or overdo, samples lack or overdo. Nobody has looked for "
        "bias in them.",
        "- Samples may come near to single training examples; the page that `introvae evaluate` writes shows the "
        "nearest ones.",
    ]
    if latents:
        said.append(
            "- A score says how unusual an input is to this model, not what is wrong with it. It is no diagnosis; a "
            "threshold must be found on data like those that it is used on."
        )
    if images:
        said.append(
            "- Numbers in other feature spaces, of other sizes or numbers of samples are not comparable with these."
        )
    return "\n".join(said)
