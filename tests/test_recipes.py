"""Every recipe is the command in its head, says what the papers say, builds at full size and trains."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import re
import statistics
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from commands import Command
from introvae import VAE, ASIntroVAE, FitConfig, IntrospectiveVAE, IntroVAE, SoftIntroVAE, from_array
from introvae.baselines import WGANGP
from introvae.data.arrays import heldout_count
from introvae.networks.style import levels_of
from introvae.training.config import (
    RECIPES,
    config_from_words,
    list_recipes,
    load_config,
    recipe_path,
    recommended_recipe,
)
from introvae.training.growing import Growth, Schedule
from introvae.training.loop import Trainer
from introvae.training.planner import Plan

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs" / "recipes.md"

ALL = list_recipes()
OF_PAPERS = [name for name in ALL if name.endswith(("-baseline", "-published")) and name != "images-published"]
PLANE = [name for name in OF_PAPERS if name.startswith("density-")]
"""The papers' rows in the plane."""
PAPERS = [name for name in OF_PAPERS if name not in PLANE]
"""The rows of the papers' tables on images; each names its data set on the hub."""

SETS = {
    "mnist": ("ylecun/mnist", (1, 28, 28), 60_000),
    "fashionmnist": ("zalando-datasets/fashion_mnist", (1, 28, 28), 60_000),
    "cifar10": ("uoft-cs/cifar10", (3, 32, 32), 50_000),
    "svhn": ("ufldl-stanford/svhn:cropped_digits", (3, 32, 32), 73_257),
    "celeba128": ("flwrlabs/celeba", (3, 128, 128), 162_770),
    "celeba256": ("flwrlabs/celeba", (3, 256, 256), 162_770),
    "celebahq256": ("eurecom-ds/celeba-hq-256", (3, 256, 256), 29_000),
    "celebahq1024": ("bitmind/celeb-a-hq", (3, 1024, 1024), 29_000),
    "ffhq256": ("merkol/ffhq-256", (3, 256, 256), 60_000),
    "lsunbedroom256": ("pcuenq/lsun-bedrooms", (3, 256, 256), 287_968),
}
"""Name on the hub, shape and training images."""
HUB_WHOLE = {"celebahq256": 30_000, "celebahq1024": 30_000, "ffhq256": 70_000}
"""Images of the sets that have no test part there."""

SHAPES = {
    "images-asintrovae": (3, 64, 64),
    "images-introvae": (3, 64, 64),
    "images-published": (3, 32, 32),
    "images-softintrovae": (3, 64, 64),
    "images-vae": (3, 64, 64),
    "mnist-asintrovae": (1, 28, 28),
    "mnist-introvae": (1, 28, 28),
    "mnist-softintrovae": (1, 28, 28),
    "mnist-vae": (1, 28, 28),
    "mnist-wgangp": (1, 28, 28),
    "scans-softintrovae": (1, 128, 128),
    "table-softintrovae": (6,),
}
OBJECTIVES = {
    "VAE": "vae",
    "IntroVAE": "introvae",
    "Soft-IntroVAE": "softintrovae",
    "AS-IntroVAE": "asintrovae",
    "WGAN-GP": "wgangp",
}
PLANE_METRICS = ("kl_soft_introvae", "jsd_soft_introvae", "modes", "share_within_3_sigma")
MEASURED = {
    "mnist": ("images", ("psnr_db", "frechet_mnist", "confident_share_mnist")),
    **dict.fromkeys(("8gaussians", "2spirals", "checkerboard", "rings"), ("table-2d", PLANE_METRICS)),
}
"""The committed table whose figures stand in the heads of recommended recipes, and its metrics there."""
HUB = re.compile(r"[\w-]+(\.[\w-]+)*/[\w.-]+(:[\w+.-]+)?")
WHICH = re.compile(r"introvae fit( --\S+ \S+)+$")


@cache
def config(name: str) -> FitConfig:
    return load_config(recipe_path(name))


def kind(name: str) -> str:
    return name.partition("-")[0]


def head(name: str) -> list[str]:
    lines = recipe_path(name).read_text(encoding="utf-8").splitlines()
    return lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]


def facts(name: str) -> dict[str, str]:
    """The head below its first line: `# word  text`, text going on in lines without a word."""
    found: dict[str, str] = {}
    for line in head(name)[1:]:
        word, text = re.match(r"# (\S*) +(.*)", line).groups()  # pyright: ignore[reportOptionalMemberAccess]
        if word:
            found[word] = text
        else:
            found[list(found)[-1]] += " " + text
    return found


# --- the head


def test_there_is_a_recipe_for_every_row() -> None:
    assert {kind(name) for name in PAPERS} == set(SETS)
    of_published = {(kind(name), type(config(name).objective)) for name in PAPERS}
    for data in ("mnist", "cifar10", "celeba128", "celeba256"):  # AS-IntroVAE's table
        assert {(data, cls) for cls in (SoftIntroVAE, ASIntroVAE, IntroVAE, WGANGP)} <= of_published
    for data in ("celebahq256", "celebahq1024", "lsunbedroom256"):
        assert (data, IntroVAE) in of_published
    for data in ("fashionmnist", "svhn", "celebahq256", "ffhq256"):
        assert (data, SoftIntroVAE) in of_published


@pytest.mark.parametrize("name", ALL)
def test_the_command_in_the_head_is_the_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FOLDER").mkdir()
    Path("FILE.csv").write_text("a,b\n1,2\n")
    command = WHICH.search(head(name)[0])
    assert command, f"no command at the end of {head(name)[0]!r}"
    words = command.group().split()[2:]
    found = config_from_words(words)
    if "--recipe" in words:
        assert words[words.index("--recipe") + 1] == name
    else:
        assert recommended_recipe(found.data, type(found.objective).__name__) == name
    wanted = config(name)
    if "--data" in words:
        wanted = dataclasses.replace(wanted, data=words[words.index("--data") + 1])
    assert found == wanted


def test_nothing_but_recipes_lies_in_the_folder() -> None:
    assert {path.stem for path in RECIPES.iterdir() if path.is_file()} == set(ALL)


@pytest.mark.parametrize("name", PAPERS)
def test_the_head_of_a_paper_s_row_tells_data_figure_length_and_cost(name: str) -> None:
    hub, shape, images = SETS[kind(name)]
    ours, told = config(name), facts(name)
    assert HUB.fullmatch(hub)
    assert ours.data == hub
    assert told["data"].startswith(f"{hub}: ")
    assert "--data FOLDER" in told["data"]
    assert (ours.channels, ours.size, ours.size) == shape
    assert {"expect", "length", "cost"} <= told.keys()
    steps = ours.steps or round((ours.epochs or 0) * (images // ours.batch_size))
    if ours.growing.on:
        steps = Schedule(ours.growing, shape, ours.batch_size).steps_for((ours.epochs or 0) * images)
    if ours.steps is None:
        assert f"{steps:,} steps" in told["length"]
        assert f"{ours.epochs:.0f} epochs" in told["length"]
    if name.endswith("-published"):
        assert any("[0, 1]" in text for text in told.values()), "in which range of pixels the betas hold"
    assert ("published" in told["length"]) == (name not in STATED), "who chose the length"


@pytest.mark.parametrize("name", PLANE)
def test_the_head_of_a_row_in_the_plane_tells_figure_floor_length_and_cost(name: str) -> None:
    ours, told = config(name), facts(name)
    floor = {"8gaussians": "0.66/0.32", "2spirals": "6.80/3.14", "checkerboard": "17.06/8.10", "rings": "7.82/3.65"}
    assert f"A perfect sampler has {floor[name.split('-')[1]]} (protocol soft_introvae" in told["expect"]
    assert f"{ours.steps:,} steps" in told["length"]
    assert (f"{ours.warmup.steps:,} of them as a VAE" in told["length"]) == (not isinstance(ours.objective, VAE))
    assert f"{(ours.steps or 0) * ours.batch_size / 1e6:.0f} million points" in told["cost"]


@pytest.mark.parametrize("name", ALL)
def test_every_head_tells_what_to_expect_and_the_cost(name: str) -> None:
    told = facts(name)
    assert re.search(r"\d|not measured|no figure is published", told["expect"])
    assert re.search(r"minute|second|hour|not measured", told["cost"])


@pytest.mark.parametrize("name", [name for name in PAPERS if config(name).network_options.get("norm") == "batch"])
def test_heads_advise_the_norm_that_docs_advise(name: str) -> None:
    advised = re.findall(r"--network_options\.norm (\w+)", DOCS.read_text(encoding="utf-8"))
    assert set(advised) == {"pixel"}
    assert "(--network_options.norm pixel: the same)" in facts(name)["norm"]
    options = {**config(name).network_options, "norm": "pixel"}
    with torch.device("meta"):
        model = IntrospectiveVAE.build(SETS[kind(name)][1], config(name).network, 8, **options)
    assert not [layer for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)]


@cache
def rows_of(table: str) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of a committed comparison with recommended settings, by data and objective."""
    text = (ROOT / "benchmarks" / "results" / table / "comparison.json").read_text(encoding="utf-8")
    named = {f"{kind}-{name}" for kind in MEASURED for name in OBJECTIVES.values()}
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for section in json.loads(text)["sections"]:
        for row in section["cells"] if section["key"] in ("mnist", "8gaussians", "others") else ():
            key = row["data"].removeprefix("density:"), OBJECTIVES.get(row["label"], "")
            if "-".join(key) in named:
                found[key] = row
    return found


def figure(row: dict[str, Any], metric: str) -> str:
    """Mean ± standard deviation, as in comparison.md."""
    values = [run["metrics"][metric] for run in row["runs"]]
    return f"{statistics.fmean(values):.3g} ± {statistics.stdev(values):.2g}"


@pytest.mark.parametrize("name", [name for name in ALL if kind(name) in MEASURED and name not in PAPERS])
def test_a_measured_recipe_s_head_has_the_figures_of_the_committed_table(name: str, tmp_path: Path) -> None:
    data, objective = name.split("-")
    table, metrics = MEASURED[data]
    row, told = rows_of(table)[data, objective], facts(name)["expect"]
    (tmp_path / "settings.yaml").write_text(json.dumps(row["settings"]))
    measured = load_config(tmp_path / "settings.yaml")
    assert dataclasses.replace(measured, data=config(name).data) == config(name), "measured with other settings"
    if {run["status"] for run in row["runs"]} == {"not run"}:
        assert told == "not measured."
        return
    assert {run["status"] for run in row["runs"]} == {"done"}
    for metric in metrics:
        if metric in row["runs"][0]["metrics"]:
            assert figure(row, metric) in told, metric
        if metric in row["runs"][0]["floors"] and metric != "modes":
            assert f"{row['runs'][0]['floors'][metric]:.3g}" in told, f"floor of {metric}"
    assert f"mean ± standard deviation of {len(row['runs'])} seeds (benchmarks/results/{table})" in told


@pytest.mark.parametrize(
    ("name", "file", "metrics"),
    [
        *((f"digits-{run}", "digits", ("psnr_db", "precision_pixels", "recall_pixels", "confident_share"))
          for run in ("softintrovae", "vae")),
        *(("table-softintrovae", file, ("mse", "frechet_values")) for file in ("wine", "breast-cancer")),
    ],
)  # fmt: skip
def test_heads_of_digits_and_tables_have_the_committed_figures(name: str, file: str, metrics: tuple[str, ...]) -> None:
    found = json.loads((ROOT / "docs" / "results" / f"{file}.json").read_text(encoding="utf-8"))
    wanted = type(config(name).objective).__name__
    run = next(run for run in found.get("runs", [found]) if run["objective"] == wanted)
    assert run["steps"] == config(name).steps
    told = facts(name)["expect"]
    for metric in metrics:
        assert f"{run['metrics'][metric]['value']:.3g}" in told
        if "floor" in run["metrics"][metric]:
            assert f"{run['metrics'][metric]['floor']:.3g}" in told
    assert f"{file}.json" in told
    assert "one seed" in told


@pytest.mark.parametrize("name", [f"images-{objective}" for objective in OBJECTIVES.values() if objective != "wgangp"])
def test_heads_of_the_recipes_for_images_have_the_committed_figures(name: str) -> None:
    text = (ROOT / "benchmarks" / "results" / "images" / "comparison.json").read_text(encoding="utf-8")
    told, compared = facts(name)["expect"], 0
    for section in json.loads(text)["sections"]:
        for row in section["cells"] if section["key"] in ("faces", "scenes") else ():
            if OBJECTIVES[row["label"]] == name.removeprefix("images-"):
                found = row["runs"][0]["metrics"]
                assert f"{found['psnr_db']:.1f} dB" in told
                assert re.search(rf"\b{found['frechet_randconv']:.1f}\b", told)
                compared += 1
    assert compared


@pytest.mark.parametrize("data", HUB_WHOLE)
def test_as_many_images_are_held_out_as_in_the_papers(data: str) -> None:
    for name in [name for name in PAPERS if kind(name) == data]:
        assert HUB_WHOLE[data] - heldout_count(HUB_WHOLE[data], config(name).heldout) == SETS[data][2]


# --- the papers' numbers

SOFT = {
    "mnist-softintrovae-published": (1, 1, 256, 32, 128, 200),
    "fashionmnist-softintrovae-published": (1, 1, 256, 32, 128, 250),
    "cifar10-softintrovae-published": (1, 1, 256, 128, 32, 250),
    "svhn-softintrovae-published": (1, 1, 256, 128, 32, 250),
    "celebahq256-softintrovae-published": (0.5, 1, 1024, 256, 8, 250),
    "celeba128-softintrovae-published": (0.5, 1, 256, 128, 32, 150),
    "celeba256-softintrovae-published": (0.5, 1, 1024, 256, 16, 150),
    "mnist-asintrovae-published": (1, 1, 256, 32, 128, 100),
    "cifar10-asintrovae-published": (1, 1, 256, 128, 64, 150),
    "celeba128-asintrovae-published": (0.5, 1, 256, 256, 32, 150),
    "celeba256-asintrovae-published": (0.5, 1, 1024, 256, 32, 150),
}
"""beta_kl, beta_rec, beta_neg, z, batch, epochs: README and commands of Soft-IntroVAE, commands of AS-IntroVAE."""
CHANNELS = {
    28: [64, 128],
    32: [64, 128, 256],
    128: [64, 128, 256, 512, 512],
    256: [64, 128, 256, 512, 512, 512],
}
INTRO = {
    "celebahq256-introvae-published": (120, 0.05, 0.5, 512, 16, 500),
    "celebahq1024-introvae-published": (500, 0.01, 1.0, 512, 12, 500),
    "lsunbedroom256-introvae-published": (120, 0.05, 0.5, 512, 16, None),
    "mnist-introvae-published": (10, 0.05, 0.5, 32, 128, 50),
    "cifar10-introvae-published": (10, 0.05, 0.5, 64, 64, 100),
    "celeba128-introvae-published": (100, 0.05, 0.5, 128, 32, 150),
    "celeba256-introvae-published": (120, 0.05, 0.5, 256, 16, 150),
}
"""m, weight_rec, weight_neg, z, batch, epochs: scripts of IntroVAE, commands of AS-IntroVAE for its baseline."""
INTRO_CHANNELS = {256: [32, 64, 128, 256, 512, 512], 1024: [16, 32, 64, 128, 256, 512, 512, 512]}
STYLE = {
    "celebahq256-softintrovae-style-published": (0.2, 0.1, 30, 29_000),
    "ffhq256-softintrovae-style-published": (0.2, 0.05, 16, 60_000),
}
"""beta_kl, beta_rec, epochs for each level, images: README and settings of the style-based Soft-IntroVAE."""
STATED = {*SOFT, *INTRO, *STYLE} - {
    "fashionmnist-softintrovae-published",
    "svhn-softintrovae-published",
    "celebahq256-softintrovae-published",
    "lsunbedroom256-introvae-published",
}
"""The rows whose length is stated by their authors."""


def test_all_published_rows_are_in_the_tables() -> None:
    assert {name for name in PAPERS if name.endswith("-published")} == {*SOFT, *INTRO, *STYLE}


@pytest.mark.parametrize("name", PAPERS)
def test_published_runs_are_plain_adam_with_raw_weights(name: str) -> None:
    ours = config(name)
    if ours.network != "style" and not isinstance(ours.objective, WGANGP):
        assert (ours.lr, ours.adam_betas, ours.ema) == (2e-4, (0.9, 0.999), 0.0)
        assert ours.network_options["norm"] == "batch"
    assert (ours.lr_schedule, ours.guard, ours.seed) == ("constant", "warn", 0)
    assert ours.flip == (kind(name) in ("celeba128", "celeba256", "celebahq256", "celebahq1024", "ffhq256"))


@pytest.mark.parametrize("name", SOFT)
def test_soft_and_as_introvae_s_numbers(name: str) -> None:
    ours, (beta_kl, beta_rec, beta_neg, z, batch, epochs) = config(name), SOFT[name]
    cls = ASIntroVAE if "asintrovae" in name else SoftIntroVAE
    assert ours.objective == cls(beta_kl=beta_kl, beta_rec=beta_rec, beta_neg=beta_neg)
    assert (ours.latent_dim, ours.batch_size, ours.epochs) == (z, batch, epochs)
    assert ours.network == "conv"
    assert ours.network_options["channels"] == CHANNELS[ours.size or 0]
    assert ours.warmup.steps == ours.warmup.share == 0


@pytest.mark.parametrize("name", INTRO)
def test_introvae_s_numbers(name: str) -> None:
    ours, (m, weight_rec, weight_neg, z, batch, epochs) = config(name), INTRO[name]
    own = name in (
        "celebahq256-introvae-published",
        "celebahq1024-introvae-published",
        "lsunbedroom256-introvae-published",
    )
    assert ours.objective == IntroVAE(margin=m, beta=2 * weight_rec, alpha=weight_neg / 2)  # AE is rec / 2
    assert (ours.latent_dim, ours.batch_size, ours.epochs) == (z, batch, epochs)
    assert ours.network == ("residual" if own else "conv")
    assert ours.network_options["channels"] == (INTRO_CHANNELS if own else CHANNELS)[ours.size or 0]
    if own:
        assert ours.network_options["norm_place"] == "after"
    if "1024" in name:  # 4 epochs with rec + KL
        assert (ours.warmup.steps, ours.warmup.beta_rec, ours.warmup.beta_kl) == (math.ceil(4 * 29_000 / 12), 1, 1)
    else:
        assert ours.warmup.steps == ours.warmup.share == 0


@pytest.mark.parametrize("name", STYLE)
def test_the_style_network_s_numbers(name: str) -> None:
    ours, (beta_kl, beta_rec, epochs, images) = config(name), STYLE[name]
    beta_rec = 4 * beta_rec  # published for images in [-1, 1]
    assert ours.objective == SoftIntroVAE(beta_kl=beta_kl, beta_rec=beta_rec, beta_neg=512, scale=5e-6)
    assert (ours.latent_dim, ours.lr, ours.adam_betas, ours.epochs) == (512, 0.0015, (0.0, 0.99), 300)
    assert ours.ema == pytest.approx(0.5 ** (4 / 10_000), abs=5e-5)
    assert ours.growing == Growth(
        samples=epochs * images // 2,
        fade=epochs * images // 2,
        batch={4: 128, 8: 128, 16: 128, 32: 32, 64: 16, 128: 8, 256: 4},
        beta_neg={4: 2048, 8: 2048, 16: 2048, 32: 1024},
    )
    warmup = ours.warmup  # one epoch at 4 px
    assert (warmup.steps, warmup.beta_rec, warmup.beta_kl) == (math.ceil(images / 128), beta_rec, beta_kl)


@pytest.mark.parametrize("name", [name for name in PAPERS if "baseline" in name])
def test_baselines_have_the_network_of_the_row_beside_them(name: str) -> None:
    ours, beside = config(name), config(f"{kind(name)}-softintrovae-published")
    assert (ours.network, ours.network_options["channels"]) == (beside.network, beside.network_options["channels"])
    assert ours.latent_dim == beside.latent_dim or "celeba256" in name
    if isinstance(ours.objective, WGANGP):  # Gulrajani et al. 2017, Algorithm 1
        assert ours.objective == WGANGP(penalty=10, n_critic=5)
        assert (ours.lr, ours.adam_betas, ours.network_options["norm"]) == (1e-4, (0.0, 0.9), "layer")
    else:
        assert ours.objective == VAE()
        assert (ours.batch_size, ours.epochs) == (beside.batch_size, beside.epochs)


# --- at full size, without content


def weights(shape: tuple[int, ...], z: int, channels: list[int]) -> tuple[int, int]:
    """Of IntroVAE's table: 5x5 and pairs of 3x3 convolutions without biases, 1x1 where the width changes, two for each
    channel that is normalised; the last convolution and the linear layers have biases."""

    def block(inputs: int, outputs: int) -> int:
        return 9 * inputs * outputs + 9 * outputs**2 + 4 * outputs + (inputs * outputs if inputs != outputs else 0)

    features = channels[-1] * (shape[1] >> len(channels)) ** 2
    encoder = 25 * shape[0] * channels[0] + 2 * channels[0] + sum(block(a, b) for a, b in pairwise(channels))
    encoder += block(channels[-1], channels[-1]) + (features + 1) * 2 * z
    down = [channels[-1], *reversed(channels), channels[0]]
    decoder = (z + 1) * features + sum(block(a, b) for a, b in pairwise(down))
    return encoder, decoder + 25 * channels[0] * shape[0] + shape[0]


@pytest.mark.parametrize("name", PAPERS)
def test_the_networks_have_the_published_size(name: str) -> None:
    ours, (_, shape, _) = config(name), SETS[kind(name)]
    z = ours.latent_dim or 0
    with torch.device("meta"):
        model = IntrospectiveVAE.build(shape, ours.network, z, **ours.network_options)
        x = torch.empty(2, *shape)
        mean, logvar = model.encoder(x)
        assert mean.shape == logvar.shape == (2, z)
        assert model.decoder(mean).shape == x.shape
    counted = tuple(sum(p.numel() for p in net.parameters()) for net in (model.encoder, model.decoder))
    if ours.network == "style":
        assert counted == (29_413_440, 26_080_725)  # docs/style.md
    else:
        assert counted == weights(shape, z, ours.network_options["channels"])


QUICK = ("mnist-softintrovae-published", "cifar10-vae-baseline", "mnist-wgangp-baseline")
"""Of which the planner is asked in every test; of the others in the slow ones."""


@cache
def recipe_cost() -> ModuleType:
    """benchmarks/recipe_cost.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS.parents[1] / "benchmarks"))
        return importlib.import_module("recipe_cost")


COSTS = re.compile(
    r"([\d.,]+) million images, ([\d.,]+) EFLOP \(([\d.,]+) hours at 30 TFLOP/s\), ([\d.,]+) million weights; "
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in PAPERS])
def test_the_cost_in_the_head_is_the_script_s(name: str) -> None:
    told = COSTS.match(facts(name)["cost"])
    assert told, facts(name)["cost"]
    row = recipe_cost().row(name)
    assert config(name).steps or f"{row['steps']} steps" in facts(name)["length"]
    assert told.groups() == tuple(row[key] for key in ("million images", "EFLOP", "hours", "million weights"))


def test_the_script_counts_what_the_layers_multiply(tmp_path: Path) -> None:
    """A step of a VAE is three products of each layer, less the gradient by the data; a run is the sum of its steps."""

    def flops(objective: str, steps: int, warmup: int = 0) -> float:
        path = tmp_path / "mine.yaml"
        path.write_text(
            f"data: density:rings\nobjective: {objective}\nnetwork: tiny-mlp\nlatent_dim: 2\nbatch_size: 8\n"
            f"steps: {steps}\nwarmup: {{steps: {warmup}}}\n"
        )
        return recipe_cost().cost(str(path)).flops

    model = IntrospectiveVAE.build((2,), "tiny-mlp", 2)
    layers = [p.numel() for p in (*model.encoder.parameters(), *model.decoder.parameters()) if p.ndim == 2]
    assert flops("VAE", 10) == 10 * 2 * 8 * (3 * sum(layers) - layers[0])
    assert flops("SoftIntroVAE", 10, warmup=4) == pytest.approx(flops("VAE", 4) + flops("SoftIntroVAE", 6))
    assert flops("SoftIntroVAE", 6) > 3 * flops("VAE", 6)


def planned(name: str, precision: str) -> float:
    ours, (_, shape, _) = config(name), SETS[kind(name)]
    model = IntrospectiveVAE.build(shape, ours.network, ours.latent_dim or 0, **ours.network_options)
    return Plan(ours, shape, model, precision).step_bytes(ours.batch_size) / 2**30


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in PAPERS])
def test_the_memory_in_the_head_is_the_planner_s(name: str) -> None:
    told = re.search(r"([\d.]+) and ([\d.]+) GiB of tensors in bf16 and float32", facts(name)["cost"])
    assert told
    for said, precision in zip(told.groups(), ("bf16", "float32"), strict=True):
        assert planned(name, precision) == pytest.approx(float(said), rel=0.05, abs=0.051)


# --- steps


def shape_of(name: str) -> tuple[int, ...]:
    return SHAPES[name] if name in SHAPES else SETS[kind(name)][1]


def made_up(shape: tuple[int, ...]) -> np.ndarray:
    generator = np.random.default_rng(0)
    if len(shape) == 1:
        return generator.normal(size=(10, *shape)).astype(np.float32)
    return generator.integers(0, 256, (10, *shape), dtype=np.uint8)


def shortened(name: str, **changed: Any) -> FitConfig:
    """A step, after one of the warm-up where there is one; of growing networks one or two on each level."""
    ours = config(name)
    side = shape_of(name)[-1] if name in (*PAPERS, *SHAPES) else 0
    # An automatic margin reads two looks, ten steps apart.
    warm = 20 if "margin" in ours.objective.automatic else int(bool(ours.warmup.steps or ours.warmup.share))
    settings: dict[str, Any] = {"steps": max(2, warm + 1), "epochs": None, "batch_size": 2, "precision": "float32"}
    settings |= {"device": "cpu", "warmup": dataclasses.replace(ours.warmup, steps=warm, share=0)}
    if isinstance(ours.objective, WGANGP):
        settings["objective"] = dataclasses.replace(ours.objective, n_critic=1)
    if ours.growing.on:
        batch = dict.fromkeys(ours.growing.batch, 2)
        settings |= {"growing": dataclasses.replace(ours.growing, samples=2, fade=2, batch=batch), "steps": None}
        settings["network_options"] = {"width": 1 / 32, "style_dim": 16}
    elif "width" in ours.network_options:
        settings["network_options"] = {**ours.network_options, "width": 1 / 16}
    elif side > 64:
        narrow = [max(1, width // 16) for width in ours.network_options["channels"]]
        settings["network_options"] = {**ours.network_options, "channels": narrow}
    return dataclasses.replace(ours, **{**settings, **changed})


def trained(short: FitConfig, name: str) -> Trainer:
    data = from_array(made_up(shape_of(name))) if name in (*PAPERS, *SHAPES) else None
    trainer = Trainer(short, data)
    before = {key: p.detach().clone() for key, p in trainer.model.named_parameters()}
    with trainer.feed:
        for _ in range(trainer.steps):
            trainer._one_step()
            assert all(torch.isfinite(value).all() for value in trainer._record.values())
    # WGAN-GP's loss is of differences of scores, so no gradient reaches what adds the same to all of them.
    without = {"encoder.head.bias"} if isinstance(short.objective, WGANGP) else set()
    for key, p in trainer.model.named_parameters():
        assert torch.isfinite(p).all(), key
        assert bool((p != before[key]).any()) != (key in without), key
    return trainer


@pytest.mark.parametrize("name", ALL)
def test_every_recipe_trains(name: str) -> None:
    trainer = trained(shortened(name), name)
    model = trainer.averaged_model()
    assert model.sample(2).shape == (2, *trainer.data.shape)
    if name in STYLE:
        assert [level.side for level in trainer.schedule.levels] == list(levels_of(256))
        assert trainer.steps == 1 + 6 * 2


def test_a_folder_stands_in_for_the_data_set(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for i, pixels in enumerate(made_up((20, 20, 3))):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    words = ["--data", folder, "--steps", 1, "--batch-size", 4, "--network_options.norm", "layer", "--quiet"]
    said = command("fit", "--recipe", "mnist-softintrovae-published", *words, "--out", tmp_path / "run")
    assert said.code == 0, said.err
    run = load_config(tmp_path / "run" / "config.yaml")
    assert (run.data, run.size, run.channels, run.latent_dim) == (str(folder), 28, 1, 32)
    assert run.network_options == {"channels": [64, 128], "norm": "layer"}


@pytest.mark.slow
def test_a_step_at_1024_pixels_with_the_published_widths() -> None:
    name = "celebahq1024-introvae-published"
    full = config(name).network_options
    assert trained(shortened(name, network_options=full), name).model.sample(1).shape == (1, 3, 1024, 1024)


# --- the page


def test_the_page_lists_every_recipe() -> None:
    text = DOCS.read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]
    assert sorted(row[0].strip("`") for row in rows) == ALL
    for row in rows:
        name = row[0].strip("`")
        if name in PAPERS:
            ours = config(name)
            length = f"{ours.epochs:.0f} epochs" if ours.epochs else f"{ours.steps:,} steps"
            assert row[1:5] == [f"`{ours.data}`", str(ours.latent_dim), str(ours.batch_size), length]
            for figure in re.findall(r"\d+\.\d+", row[5]):
                assert figure in facts(name)["expect"], f"{name}: {figure}"
            told = COSTS.match(facts(name)["cost"])
            assert told
            assert row[7:] == list(told.groups())
