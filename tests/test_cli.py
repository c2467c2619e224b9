"""The commands: what they make, and the one line they say when asked for what cannot be."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from commands import Command, Refused, Said, call, one_line
from introvae import IntrospectiveVAE, Run
from introvae.cli import COMMANDS
from introvae.comparison import plan as plan  # before a test moves the recipes' folder
from introvae.measures import metrics_in
from introvae.training import config as settings

SCRIPT = Path(sys.executable).parent / "introvae"
PLANE = ["--recipe", "none", "--quiet", "--data", "density:8gaussians", "--network", "tiny-mlp", "--steps", "3"]
DIGITS = ["--recipe", "none", "--quiet", "--data", "digits", "--network", "tiny-conv", "--steps", "3"]


@pytest.fixture
def refused_fit(refused: Refused, tmp_path: Path) -> Refused:
    """Run `fit` on a density with settings that will not do; it must not leave a run folder."""

    def run(*words: object) -> str:
        message = refused("fit", *PLANE, "--out", tmp_path / "run", *words)
        assert not (tmp_path / "run").exists()
        return message

    return run


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on 8 Gaussians; not to be changed."""
    folder = tmp_path_factory.mktemp("plane") / "run"
    assert call("fit", *PLANE, "--out", folder) == 0
    return Run(folder)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An evaluated run on digits; not to be changed."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    assert call("fit", *DIGITS, "--log-every", "2", "--out", folder, "--evaluate") == 0
    return Run(folder)


@pytest.fixture
def damaged(plane: Run, tmp_path: Path) -> Run:
    """A copy of the run in the plane, to be damaged."""
    return Run(Path(shutil.copytree(plane.folder, tmp_path / "damaged")))


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Three grey pictures of 8 x 8 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for path, array in zip(paths, pixels, strict=True):
        Image.fromarray(array).save(path)
    return paths


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def save(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


# --- help


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["help"]])
def test_help_lists_every_command_with_an_example(command: Command, words: list[str]) -> None:
    said = command(*words)
    assert (said.code, said.err) == (0, "")
    assert "example:" in said.out
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", said.out, re.MULTILINE)


def test_version(command: Command) -> None:
    from introvae import __version__

    assert command("--version") == Said(0, f"introvae {__version__}\n", "")


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_of_each_command_shows_an_example(command: Command, name: str, flag: str) -> None:
    said = command(name, flag)
    assert (said.code, said.err) == (0, "")
    example = said.out.partition("example:\n")[2].splitlines()[0]
    assert example.startswith(f"  introvae {name}")


def test_help_of_fit_names_and_explains_every_setting(command: Command) -> None:
    out = " ".join(command("fit", "--help").out.split())
    for setting in settings.FitConfig.__dataclass_fields__:
        assert f"--{setting}" in out
    assert "Adam's learning rate of both players" in out


def test_help_of_an_objective_lists_its_settings(command: Command) -> None:
    said = command("fit", "--objective.help", "ASIntroVAE")
    assert said.code == 0
    assert "--objective.annealing_rate" in said.out


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_in_help_use_options_that_exist(command: Command, name: str) -> None:
    """Each option in a command's example is one that its help lists."""
    out = command(name, "--help").out
    for line in re.findall(rf"^  introvae {name} .*$", out, re.MULTILINE):
        for option in re.findall(r" (--?[a-z]+)", line):
            assert re.search(rf"(?<!\S)\[?{option}\b", out.replace(line, "")), option


# --- fit


def test_fit_in_the_plane_fills_a_run_folder(plane: Run) -> None:
    assert files(plane.folder) == {
        "config.yaml",
        "log.jsonl",
        "images/final.png",
        "checkpoints/step_00000000.pt",
        "checkpoints/step_00000003.pt",
        "model/config.json",
        "model/model.safetensors",
    }
    assert plane.model().sample(5).shape == (5, 2)


def test_fit_on_digits_fills_a_run_folder_with_a_report(digits: Run) -> None:
    assert files(digits.folder) == {
        "config.yaml",
        "log.jsonl",
        "images/final.png",
        "images/evaluation.png",
        "images/evaluation-samples.png",
        "images/evaluation-neighbours.png",
        "images/evaluation-ranked.png",
        "images/evaluation-interpolation.png",
        "images/evaluation-errors.png",
        "images/evaluation-latent.png",
        "images/evaluation-curves.png",
        "checkpoints/step_00000000.pt",
        "checkpoints/step_00000003.pt",
        "model/config.json",
        "model/model.safetensors",
        "report.json",
        "report.html",
    }
    with Image.open(digits.images / "final.png") as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
    assert digits.model().sample(5).shape == (5, 1, 8, 8)


def test_the_report_follows_the_contract(digits: Run) -> None:
    report = json.loads(digits.report_path.read_text())
    assert report["run"] == str(digits.folder)
    assert report["data"] == "digits"
    assert report["steps"] == 3
    assert set(report) == {
        *(
            "run",
            "data",
            "objective",
            "evaluation",
            "seed",
            "steps",
            "training_seconds",
            "machine",
            "picture",
            "metrics",
            "train",
            "heldout",
        ),
        *("train", "heldout", "pictures", "page", "worst", "kl_nats_per_dimension", "variants", "neighbours"),
        "class_posteriors",
    }
    assert [row["class"] for row in report["class_posteriors"]] == [str(digit) for digit in range(10)]
    assert sum(row["n"] for row in report["class_posteriors"]) == report["heldout"]
    means = [row["n"] * row["kl_nats"] / report["heldout"] for row in report["class_posteriors"]]
    assert sum(means) == pytest.approx(report["metrics"]["kl_real_nats"]["value"], rel=1e-4)
    assert all("active units" in row["protocol"] for row in report["class_posteriors"])
    page = (digits.folder / report["page"]).read_text()
    assert "Held-out data by class" in page
    assert page.count('<td class="n">') > 40
    assert set(report["metrics"]) == {
        *("psnr_db", "ssim", "mse", "kl_real_nats", "active_units", "kl_aggregate_nats"),
        *("frechet_thumb", *metrics_in("randconv"), "msssim_pairs", "confident_share", "class_entropy_nats"),
        *("precision_pixels", "recall_pixels", "density_pixels", "coverage_pixels"),
    }
    for entry in report["metrics"].values():
        assert set(entry) <= {"value", "std", "n", "protocol", "floor"}
        assert entry["n"] > 0
        assert entry["protocol"]
        assert np.isfinite(entry["value"])


def test_the_log_has_a_line_every_so_often_and_at_the_end(digits: Run) -> None:
    start, *rows = [json.loads(line) for line in digits.log_path.read_text().splitlines()]
    assert start["event"] == "start"
    assert start["device"] in ("cpu", "cuda:0", "mps")
    assert start["precision"] in ("float32", "tf32", "bf16")
    assert (start["step"], start["processes"], start["compile"]) == (0, 1, "none")
    assert [row["step"] for row in rows] == [2, 3]
    assert [row["samples_seen"] for row in rows] == [128, 192]
    for name in ("seconds", "phase", "lr", "rec", "kl_real", "kl_reconstruction", "kl_sample", "beta_neg"):
        assert all(name in row for row in rows)


def test_fit_says_where_things_are(command: Command, tmp_path: Path) -> None:
    said = command("fit", *PLANE, "--out", tmp_path / "run")
    assert (said.code, said.err) == (0, "")
    for place in ("run", "run/model", "run/images"):
        assert f"{tmp_path / place}\n" in said.out


def test_dry_run_prints_settings_and_sizes_and_makes_nothing(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = command("fit", *DIGITS, "--dry-run")
    assert (said.code, said.err) == (0, "")
    head, _, tail = said.out.partition("\ndevice: ")
    resolved = yaml.safe_load(head)
    assert (resolved["data"], resolved["steps"], resolved["network"]) == ("digits", 3, "tiny-conv")
    assert resolved["objective"]["class_path"] == "SoftIntroVAE"
    assert isinstance(resolved["latent_dim"], int)
    model = IntrospectiveVAE.build((1, 8, 8), "tiny-conv", resolved["latent_dim"])
    for name in ("encoder", "decoder"):
        size = sum(p.numel() for p in getattr(model, name).parameters())
        assert f"{name}: {size:,} parameters" in tail
    assert "(1, 8, 8)" in tail
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sign", ["-", "_"])
def test_words_of_an_option_are_joined_by_either_sign(command: Command, sign: str) -> None:
    words = "--batch~size 16 --checkpoint~every=5 --lr~schedule cosine --objective.beta~neg 3 --warmup.beta~kl=0.5"
    said = command("fit", *PLANE, *words.replace("~", sign).split(), f"--dry{sign}run")
    assert said.code == 0
    resolved = yaml.safe_load(said.out.partition("\ndevice: ")[0])
    assert (resolved["batch_size"], resolved["checkpoint_every"], resolved["lr_schedule"]) == (16, 5, "cosine")
    assert resolved["objective"]["init_args"]["beta_neg"] == 3.0
    assert resolved["warmup"]["beta_kl"] == 0.5


def test_a_value_keeps_its_signs(command: Command, tmp_path: Path) -> None:
    data = save(tmp_path / "my-good_data.npy", np.zeros((99, 1, 8, 8), np.uint8))
    said = command("fit", "--recipe", "none", f"--data={data}", "--network", "tiny-conv", "--dry-run")
    assert yaml.safe_load(said.out.partition("\ndevice: ")[0])["data"] == str(data)


@pytest.mark.parametrize(
    ("objective", "setting", "value"),
    [
        ("VAE", "beta_kl", 0.5),
        ("IntroVAE", "margin", 7.0),
        ("SoftIntroVAE", "beta_neg", 9.0),
        ("ASIntroVAE", "annealing_rate", 2.0),
    ],
)
@pytest.mark.parametrize("named_first", [True, False])
def test_objectives_and_their_settings(
    command: Command, objective: str, setting: str, value: float, named_first: bool
) -> None:
    words = [("--objective", objective), (f"--objective.{setting}", str(value))]
    ordered = words if named_first else words[::-1]
    said = command("fit", *PLANE, "--dry-run", *(word for pair in ordered for word in pair))
    assert said.code == 0, said.err
    found = yaml.safe_load(said.out.partition("\ndevice: ")[0])["objective"]
    assert found["class_path"] == objective
    assert found["init_args"][setting] == value


# --- recipes


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipes folder with one recipe, the recommended one for a VAE on rings."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "rings-vae.yaml").write_text(
        "# A VAE on rings, for tests.\ndata: density:rings\nobjective: {class_path: VAE, init_args: {beta_kl: 0.25}}\n"
        "network: tiny-mlp\nsteps: 7\nlr: 0.125\n"
    )
    monkeypatch.setattr(settings, "RECIPES", folder)
    return folder


@pytest.mark.parametrize(
    ("words", "lr"),
    [
        ("--data density:rings --objective VAE", 0.125),
        ("--data density:rings --objective VAE --recipe auto", 0.125),
        ("--recipe rings-vae", 0.125),
        ("--recipe SHELF/rings-vae.yaml", 0.125),
        ("--recipe rings-vae --lr 0.5", 0.5),
        ("--data density:rings --objective VAE --recipe none", 2e-4),
        ("--data density:rings --objective IntroVAE", 2e-4),
        ("--data density:2spirals --objective VAE", 2e-4),
    ],
)
def test_a_recipe_by_name_by_file_recommended_or_none(command: Command, shelf: Path, words: str, lr: float) -> None:
    said = command("fit", *words.replace("SHELF", str(shelf)).split(), "--dry-run", "--network", "tiny-mlp")
    assert said.code == 0, said.err
    resolved = yaml.safe_load(said.out.partition("\ndevice: ")[0])
    assert resolved["lr"] == lr
    if lr == 0.125:
        assert (resolved["data"], resolved["steps"]) == ("density:rings", 7)
        assert resolved["objective"] == {"class_path": "VAE", "init_args": {"beta_rec": 1.0, "beta_kl": 0.25}}


@pytest.mark.parametrize("more", [["--dry-run"], ["--quiet", "--out", "run"]])
def test_where_no_recipe_is_recommended_one_to_borrow_from_is_named(
    command: Command, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--data", "density:rings", "--network", "tiny-mlp", "--steps", 2, *more]
    said = command(*words, "--objective", "AGE")
    assert (said.code, said.err) == (0, "")
    assert "no recipe is recommended for AGE on density:rings" in said.out
    assert "--recipe rings-vae lends" in said.out


def test_where_a_recipe_is_recommended_or_chosen_none_is_lent(command: Command, shelf: Path) -> None:
    for words in (["--objective", "VAE"], ["--objective", "AGE", "--recipe", "rings-vae"]):
        said = command("fit", "--data", "density:rings", "--network", "tiny-mlp", *words, "--dry-run")
        assert said.code == 0
        assert "no recipe" not in said.out


def test_recipes_lists_names_and_heads(command: Command, shelf: Path) -> None:
    said = command("recipes")
    assert (said.code, said.err) == (0, "")
    assert said.out.split(maxsplit=1)[0] == "rings-vae"
    assert "A VAE on rings, for tests." in said.out
    of_fit, _, of_compare = said.out.partition("\nfor introvae compare --recipe:\n")
    assert of_fit.count("\n") == 1
    assert [line.split()[0] for line in of_compare.splitlines()] == ["images", "normalisers", "table-2d"]


def test_an_unknown_recipe_lists_the_known_ones(refused_fit: Refused, shelf: Path) -> None:
    message = refused_fit("--recipe", "nope")
    assert "'nope'" in message
    assert "rings-vae" in message
    assert ".yaml" in message


def test_epochs_override_the_steps_of_a_recipe(command: Command, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data: digits\nnetwork: tiny-conv\nsteps: 500\n")
    said = command("fit", "--recipe", recipe, "--epochs", "2", "--batch-size", "100", "--dry-run")
    assert said.code == 0, said.err
    assert yaml.safe_load(said.out.partition("\ndevice: ")[0])["steps"] == 28  # 14 batches of 100 in 1,437 digits


def test_warmup_steps_override_the_share_of_a_recipe(command: Command, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data: density:rings\nnetwork: tiny-mlp\nsteps: 500\nwarmup: {share: 0.5, beta_kl: 0.125}\n")
    for words, steps in (([], 250), (["--warmup.steps", 3], 3), (["--warmup.share", 0.1], 50)):
        said = command("fit", "--recipe", recipe, *words, "--dry-run")
        assert said.code == 0, said.err
        warmup = yaml.safe_load(said.out.partition("\ndevice: ")[0])["warmup"]
        assert (warmup["steps"], warmup["beta_kl"]) == (steps, 0.125)


@pytest.mark.parametrize(
    ("words", "network", "options"),
    [
        (["--network", "tiny-conv"], "tiny-conv", {}),
        (["--network=conv", "--network_options.norm", "group"], "conv", {"norm": "group"}),
        (["--network", "mlp"], "mlp", {"hidden": 32}),
        (["--network", "mlp", "--network_options.waves", "8"], "mlp", {"hidden": 32, "waves": 8}),
        (["--network_options.waves", "8"], "mlp", {"hidden": 32, "waves": 8}),
        (["--network", "mlp", "--network_options", "{waves: 8}"], "mlp", {"waves": 8}),
    ],
)
def test_another_network_does_without_the_recipe_s_network_options(
    command: Command, tmp_path: Path, words: list[str], network: str, options: dict[str, Any]
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data: digits\nnetwork: mlp\nnetwork_options: {hidden: 32}\nsteps: 5\n")
    said = command("fit", "--recipe", recipe, *words, "--dry-run")
    assert said.code == 0, said.err
    resolved = yaml.safe_load(said.out.partition("\ndevice: ")[0])
    assert (resolved["network"], resolved["network_options"]) == (network, options)


def test_vectors_train_with_no_setting_but_their_file(command: Command, tmp_path: Path) -> None:
    data = save(tmp_path / "vectors.npy", np.random.default_rng(0).normal(size=(99, 5)).astype(np.float32))
    said = command("fit", "--data", data, "--dry-run")
    assert said.code == 0, said.err
    assert yaml.safe_load(said.out.partition("\ndevice: ")[0])["network"] == "mlp"


def test_the_config_of_a_run_is_a_recipe_that_repeats_it(command: Command, plane: Run, tmp_path: Path) -> None:
    said = command("fit", "--quiet", "--recipe", plane.config_path, "--out", tmp_path / "again")
    assert said.code == 0, said.err
    again = Run(tmp_path / "again")
    ours, theirs = (yaml.safe_load(run.config_path.read_text()) for run in (plane, again))
    assert ours | {"out": None} == theirs | {"out": None}
    for name in ("config.json", "model.safetensors"):
        assert (again.model_folder / name).read_bytes() == (plane.model_folder / name).read_bytes()


def test_a_broken_recipe_file_is_named(refused: Refused, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    for text in ("steps: [", "foo: 3\n", "- a\n", "steps: -1\n", "lr: fast\n"):
        recipe.write_text(text)
        assert "mine.yaml" in refused("fit", "--recipe", recipe, "--dry-run"), text


# --- sample


@pytest.mark.parametrize("kind", ["plane", "digits"])
def test_sample_as_an_array(command: Command, request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    run: Run = request.getfixturevalue(kind)
    said = command("sample", run.folder, "-n", 300, "-o", tmp_path / "x.npy", "--seed", 5)
    assert said == Said(0, f"{tmp_path / 'x.npy'}\n", "")
    found = np.load(tmp_path / "x.npy")
    model, generator = run.model(), torch.Generator().manual_seed(5)
    expected = torch.cat([model.sample(256, generator), model.sample(44, generator)])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.numpy())
    assert len(np.unique(found.reshape(300, -1), axis=0)) == 300


def test_sample_as_one_sheet(command: Command, digits: Run, tmp_path: Path) -> None:
    assert command("sample", digits.folder, "-n", 9, "-o", tmp_path / "x.png").code == 0
    with Image.open(tmp_path / "x.png") as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "L", (152, 152))  # 3 x (48 + 2) + 2


def test_sample_as_single_pictures(command: Command, digits: Run, tmp_path: Path) -> None:
    assert command("sample", digits.folder, "-n", 3, "-o", tmp_path / "folder" / "inner").code == 0
    assert command("sample", digits.folder, "-n", 3, "-o", tmp_path / "x.npy").code == 0
    pictures = sorted((tmp_path / "folder" / "inner").iterdir())
    assert [path.name for path in pictures] == ["sample_00000.png", "sample_00001.png", "sample_00002.png"]
    for path, x in zip(pictures, np.load(tmp_path / "x.npy"), strict=True):
        with Image.open(path) as picture:
            np.testing.assert_array_equal(np.asarray(picture), np.rint(x[0] * 255).astype(np.uint8))


def test_sample_of_points_as_a_picture(command: Command, plane: Run, tmp_path: Path) -> None:
    assert command("sample", plane.folder, "-n", 1, "-o", tmp_path / "x.png").code == 0
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize("name", ["x.png", "x.npy"])
@pytest.mark.parametrize("kind", ["plane", "digits"])
def test_the_same_seed_gives_the_same_bytes(
    command: Command, request: pytest.FixtureRequest, tmp_path: Path, kind: str, name: str
) -> None:
    folder = request.getfixturevalue(kind).folder
    contents = []
    for seed in (1, 1, 2):
        assert command("sample", folder, "-n", 16, "--seed", seed, "-o", tmp_path / name).code == 0
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


# --- reconstruct


def test_reconstruct_as_an_array(command: Command, digits: Run, images: list[Path], tmp_path: Path) -> None:
    said = command("reconstruct", digits.folder, *images, "-o", tmp_path / "y.npy")
    assert said == Said(0, f"{tmp_path / 'y.npy'}\n", "")
    x = torch.stack([torch.from_numpy(np.array(Image.open(path)))[None] / 255 for path in images])
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), digits.model().reconstruct(x).numpy())


def test_reconstruct_as_pairs_side_by_side(command: Command, digits: Run, images: list[Path], tmp_path: Path) -> None:
    assert command("reconstruct", digits.folder, images[0], "-o", tmp_path / "y.png").code == 0
    with Image.open(tmp_path / "y.png") as sheet, Image.open(images[0]) as image:
        assert (sheet.mode, sheet.size) == ("L", (102, 52))  # 2 x (48 + 2) + 2, 48 + 2 + 2
        left = np.asarray(sheet)[2:50:6, 2:50:6]
        np.testing.assert_array_equal(left, np.asarray(image))


def test_reconstruct_into_a_folder(command: Command, digits: Run, images: list[Path], tmp_path: Path) -> None:
    assert command("reconstruct", digits.folder, *images[:2], "-o", tmp_path / "out").code == 0
    assert command("reconstruct", digits.folder, *images[:2], "-o", tmp_path / "y.npy").code == 0
    pictures = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in pictures] == ["00000_a.png", "00001_b.png"]
    for path, y in zip(pictures, np.load(tmp_path / "y.npy"), strict=True):
        with Image.open(path) as picture:
            np.testing.assert_array_equal(np.asarray(picture), np.rint(y[0] * 255).astype(np.uint8))


def test_reconstruct_takes_colour_pictures_for_a_grey_model(command: Command, digits: Run, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    Image.new("L", (8, 8), 76).save(tmp_path / "grey.png")  # red's luma
    for name in ("red", "grey"):
        words = ("reconstruct", digits.folder, tmp_path / f"{name}.png", "-o", tmp_path / f"{name}.npy")
        assert command(*words).code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "red.npy"), np.load(tmp_path / "grey.npy"))


# --- evaluate


def test_evaluate_reports_only_the_named_metrics(command: Command, digits: Run, tmp_path: Path) -> None:
    run = Run(Path(shutil.copytree(digits.folder, tmp_path / "copy")))
    said = command("evaluate", run.folder, "--metrics", "psnr_db,mse")
    assert (said.code, said.err) == (0, "")
    assert run.report()["metrics"] == digits.report()["metrics"]  # the others of the earlier report stay
    run.report_path.unlink()
    assert command("evaluate", run.folder, "--metrics", "psnr_db,mse").code == 0
    assert list(run.report()["metrics"]) == ["psnr_db", "mse"]
    assert re.search(r"^psnr_db +[\d.]+", said.out, re.MULTILINE)
    assert "ssim" not in said.out


def test_evaluate_takes_other_data_of_the_same_shape(command: Command, digits: Run, tmp_path: Path) -> None:
    run = Run(Path(shutil.copytree(digits.folder, tmp_path / "copy")))
    data = save(tmp_path / "other.npy", np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8))
    reports = []
    for seed in (3, 3, 4):
        assert command("evaluate", run.folder, "--data", data, "--seed", seed).code == 0
        reports.append(json.loads((run.folder / "report-other.json").read_text()))
    assert run.report() == digits.report()  # the run's own report stays
    assert reports[0]["data"] == str(data)
    assert reports[0]["metrics"]["mse"]["n"] == 60  # none of them was trained on
    assert reports[0] == reports[1]
    assert reports[0]["metrics"]["mse"] == reports[2]["metrics"]["mse"]


# --- refused: settings


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--objective Foo", "'Foo' VAE, IntroVAE, SoftIntroVAE, ASIntroVAE"),
        ("--network foo", "'foo' mlp, conv"),
        ("--data foo", "'foo' digits, density:8gaussians .parquet .npy"),
        ("--data density:foo", "'foo' 8gaussians, 2spirals, checkerboard, rings"),
        ("--recipe foo", "'foo' .yaml"),
        ("--recipe foo.yaml", "foo.yaml"),
        ("--foo 3", "--foo introvae fit --help"),
        ("extra", "extra"),
        ("--network-options.foo 3", "'foo' tiny-mlp hidden, depth"),
        ("--objective.foo 3", "foo SoftIntroVAE"),
        ("--objective VAE --objective.beta_neg 3", "beta_neg VAE"),
        ("--warmup.foo 3", "warmup.foo"),
        ("--lr-schedule foo", "lr_schedule 'foo' constant, cosine, milestones"),
        ("--objective ASIntroVAE --objective.kernel foo", "kernel 'foo' marginal, joint"),
        ("--objective IntroVAE --objective.variant foo", "variant 'foo' paper, official_code"),
        ("--device foo", "'foo' cpu"),
        ("--steps 0", "steps 0"),
        ("--steps -1", "steps -1"),
        ("--batch-size 0", "batch_size 0"),
        ("--batch-size -8", "batch_size -8"),
        ("--lr 0", "lr 0"),
        ("--lr -0.1", "lr -0.1"),
        ("--lr nan", "lr nan"),
        ("--lr inf", "lr inf"),
        ("--latent-dim 0", "latent_dim 0"),
        ("--latent-dim -2", "latent_dim -2"),
        ("--objective.beta_rec 0", "beta_rec 0"),
        ("--objective.beta_kl -1", "beta_kl -1"),
        ("--objective.beta_neg -1", "beta_neg -1"),
        ("--objective VAE --objective.beta_rec -1", "beta_rec -1"),
        ("--objective IntroVAE --objective.margin -1", "margin -1"),
        ("--objective ASIntroVAE --objective.annealing_rate 0", "annealing_rate 0"),
        ("--network-options.hidden 0", "hidden 0"),
        ("--warmup.steps -1", "warmup.steps -1"),
        ("--warmup.beta_rec 0", "warmup.beta_rec 0"),
        ("--warmup.beta_kl -1", "warmup.beta_kl -1"),
        ("--seed -1", "seed -1"),
        ("--log-every 0", "log_every 0"),
        ("--checkpoint-every -1", "checkpoint_every -1"),
        ("--image-every -1", "image_every -1"),
        ("--lr-warmup -1", "lr_warmup -1"),
        ("--ema 1", "ema 1"),
        ("--adam-betas [0.9,1]", "adam_betas 1"),
        ("--adam-betas [0.9]", "adam_betas"),
        ("--lr-schedule milestones", "lr_milestones"),
        ("--lr-milestones [0.5]", "lr_schedule"),
        ("--lr-schedule milestones --lr-milestones [1.5]", "lr_milestones 1.5"),
        ("--epochs 2", "steps epochs"),
        ("--warmup.steps 3", "warmup.steps 3 lower"),
        ("--warmup.steps 100", "warmup.steps 100 lower"),
        ("--warmup.share 1", "warmup.share 1"),
        ("--warmup.share -0.1", "warmup.share -0.1"),
        ("--warmup.share 0.5 --warmup.steps 1", "warmup.share warmup.steps"),
        ("--objective ASIntroVAE --batch-size 1", "batch_size"),
        ("--network conv", "conv (2,) 1 or 3 channels"),
        ("--out", "--out"),
    ],
)
def test_settings_that_will_not_do(refused_fit: Refused, words: str, named: str) -> None:
    message = refused_fit(*words.split())
    for word in named.split(" "):
        assert word in message


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--steps many", "steps many"),
        ("--steps 3.5", "steps 3.5"),
        ("--batch-size x", "batch_size x"),
        ("--lr fast", "lr fast"),
        ("--latent-dim two", "latent_dim two"),
        ("--seed one", "seed one"),
        ("--objective.beta_neg big", "beta_neg big"),
        ("--warmup.steps few", "warmup.steps few"),
        ("--network-options.hidden wide", "hidden wide"),
        ("--objective.foo 3", "foo"),
    ],
)
def test_what_is_no_number_is_said_without_python(refused_fit: Refused, words: str, named: str) -> None:
    message = refused_fit(*words.split())
    for word in named.split():
        assert word in message
    for inside in ("<class", "Union", "NoneType", "instances of", "class_path", "arser key"):
        assert inside not in message, message


def test_an_unknown_setting_of_an_objective_says_which_there_are(refused_fit: Refused) -> None:
    message = refused_fit("--objective", "SoftIntroVAE", "--objective.foo", "3")
    assert "beta_neg" in message or "--objective.help" in message


def test_epochs_of_an_endless_density(refused: Refused, tmp_path: Path) -> None:
    message = refused("fit", "--recipe", "none", "--data", "density:rings", "--epochs", 2, "--out", tmp_path / "run")
    assert "density:rings" in message
    assert "steps" in message


@pytest.mark.parametrize("epochs", ["0", "-1", "few"])
def test_epochs_that_will_not_do(refused: Refused, tmp_path: Path, epochs: str) -> None:
    message = refused("fit", "--recipe", "none", "--data", "digits", "--epochs", epochs, "--out", tmp_path / "run")
    assert "epochs" in message


@pytest.mark.parametrize("more", [[], ["--warmup.steps", "1"], ["--dry-run"]])
def test_the_joint_kernel_is_refused_above_eight_latents_before_a_run_starts(
    refused_fit: Refused, more: list[str]
) -> None:
    message = refused_fit("--objective", "ASIntroVAE", "--objective.kernel", "joint", "--latent-dim", 9, *more)
    for word in ("joint", "9", "8", "marginal"):
        assert word in message


# --- refused: data


def test_a_batch_larger_than_the_data(refused: Refused, tmp_path: Path) -> None:
    message = refused("fit", *DIGITS, "--batch-size", 1438, "--out", tmp_path / "run")
    assert "1438" in message
    assert "1437" in message
    assert not (tmp_path / "run").exists()


FLOATS = np.full((20, 1, 8, 8), 0.5, np.float32)


def with_value(value: float) -> np.ndarray:
    array = FLOATS.copy()
    array[3, 0, 2, 1] = value
    return array


@pytest.mark.parametrize(
    ("array", "named"),
    [
        (with_value(np.nan), "1 NaN remove"),
        (with_value(-np.inf), "1 NaN infinite"),
        (FLOATS * 510, "images.npy 255 contrast"),
        (np.zeros((20, 1, 8, 8), np.int64), "images.npy 0 contrast"),
        (np.zeros((20, 1, 8, 8), np.complex64), "complex64 integers floats"),
        (np.zeros((1, 1, 8, 8), np.uint8), "(1, 1, 8, 8) at least two"),
        (np.zeros((0, 1, 8, 8), np.uint8), "(0, 1, 8, 8)"),
        (np.zeros(20, np.float32), "(20,) [N, C, H, W]"),
        (np.zeros((20, 1, 30, 20), np.uint8), "(1, 30, 20) 1 or 3 channels square 8 28 32 64"),
        (np.zeros((20, 2, 32, 32), np.uint8), "(2, 32, 32) 1 or 3 channels"),
        (np.zeros((20, 1, 9, 9), np.uint8), "(1, 9, 9) side 8"),
    ],
)
def test_arrays_that_will_not_do(refused: Refused, tmp_path: Path, array: np.ndarray, named: str) -> None:
    data = save(tmp_path / "images.npy", array)
    words = ("fit", "--recipe", "none", "--data", data, "--network", "conv", "--batch-size", 4, "--steps", 2)
    message = refused(*words, "--out", tmp_path / "run")
    for word in named.split(" "):
        assert word in message
    assert not (tmp_path / "run").exists()


def test_the_possible_sides_that_a_message_lists_are_possible(refused: Refused, tmp_path: Path) -> None:
    data = save(tmp_path / "images.npy", np.zeros((20, 1, 30, 20), np.uint8))
    message = refused("fit", "--recipe", "none", "--data", data, "--batch-size", 4, "--out", tmp_path / "run")
    sides = [int(side) for side in re.findall(r"\d+", message.partition("square side of")[2])]
    assert len(sides) > 5
    for side in sides[:3]:
        assert IntrospectiveVAE.build((1, side, side), latent_dim=2).sample(1).shape == (1, 1, side, side)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x93NUMPY\x01\x00"])
def test_a_file_that_is_no_array(refused: Refused, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "junk.npy").write_bytes(content)
    assert "junk.npy" in refused("fit", "--data", tmp_path / "junk.npy", "--out", tmp_path / "run")


def test_a_file_that_is_no_parquet_gives_one_line_too(tmp_path: Path) -> None:
    (tmp_path / "junk.parquet").write_text("hello")
    words = [SCRIPT, "fit", "--data", tmp_path / "junk.parquet", "--out", tmp_path / "run"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "junk.parquet" in done.stderr
    assert one_line(done.stderr), done.stderr


# --- refused: runs


def test_a_run_folder_in_use_is_left_alone(refused: Refused, plane: Run) -> None:
    before = {name: (plane.folder / name).read_bytes() for name in files(plane.folder)}
    message = refused("fit", *PLANE, "--out", plane.folder)
    assert str(plane.folder) in message
    assert "--resume" in message
    assert {name: (plane.folder / name).read_bytes() for name in files(plane.folder)} == before


@pytest.mark.parametrize("words", ["fit --resume", "evaluate", "sample -o x.png", "reconstruct -o x.png a.png"])
def test_a_run_that_is_not_there(refused: Refused, tmp_path: Path, words: str) -> None:
    name, *more = words.split()
    folder = tmp_path / "nothing"
    message = refused(name, *more, folder) if "--resume" in more else refused(name, folder, *more)
    assert str(folder) in message
    assert "introvae fit" in message


def test_resuming_a_finished_run_changes_nothing_of_the_model(command: Command, damaged: Run) -> None:
    before = (damaged.model_folder / "model.safetensors").read_bytes()
    said = command(
        "fit", "--resume", damaged.folder, "--quiet", "--steps", 3, "--out", damaged.folder, "--device", "cpu"
    )
    assert said.code == 0, said.err
    assert (damaged.model_folder / "model.safetensors").read_bytes() == before
    assert [row["step"] for row in damaged.log()] == [3]


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_resuming_with_other_settings_lists_each(refused: Refused, plane: Run, more: list[str]) -> None:
    words = ["--lr", 0.5, "--objective.beta_neg", 7, "--batch-size", 32, "--steps", 3, *more]
    message = refused("fit", "--resume", plane.folder, *words)
    for difference in ("lr is 0.0002 in the run, 0.5 here", "beta_neg is 256.0 in the run, 7.0 here"):
        assert difference in message
    assert "batch_size is 64 in the run, 32 here" in message
    assert "steps" not in message.partition("(")[2].partition(")")[0]


def test_the_words_that_started_a_run_resume_it(command: Command, tmp_path: Path) -> None:
    words = ["--quiet", "--recipe", "none", "--data", "digits", "--network", "tiny-conv", "--epochs", "0.1"]
    assert command("fit", *words, "--out", tmp_path / "run").code == 0
    said = command("fit", *words, "--resume", tmp_path / "run")
    assert said.code == 0, said.err


def test_a_run_without_a_checkpoint_can_be_started_as_its_message_says(
    refused: Refused, command: Command, damaged: Run
) -> None:
    for path in damaged.checkpoints.iterdir():
        path.unlink()
    message = refused("fit", "--resume", damaged.folder)
    assert str(damaged.folder) in message
    assert re.search("remove|another --out", message), "fit refuses a folder with a config.yaml: say what to do with it"


def newest(run: Run) -> Path:
    return sorted(run.checkpoints.glob("*.pt"))[-1]


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_cut_checkpoint(refused: Refused, command: Command, damaged: Run, kept: float) -> None:
    path = newest(damaged)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    message = refused("fit", "--resume", damaged.folder, "--quiet")
    assert str(path) in message
    assert "step_00000000.pt" in message
    path.unlink()  # the remedy
    assert command("fit", "--resume", damaged.folder, "--quiet").code == 0


CHANGES: dict[str, tuple[Callable[[dict], object], str]] = {
    "a weight fewer": (lambda state: state["players"]["model"].popitem(), "lacks"),
    "a weight more": (lambda state: state["players"]["model"].update(foo=torch.zeros(1)), "foo"),
    "an average fewer": (lambda state: state["average"].popitem(), "lacks"),
    "a shape": (lambda state: state["players"]["model"].update({"encoder.layers.0.bias": torch.zeros(17)}), "(17,)"),
    "a type": (
        lambda state: state["players"]["model"].update({"encoder.layers.0.bias": torch.ones(16).double()}),
        "64",
    ),
    "an optimiser fewer": (lambda state: state["players"].pop("encoder_optimizer"), "encoder_optimizer"),
    "no moments": (lambda state: state["players"]["encoder_optimizer"]["state"].clear(), ""),
    "another generator": (lambda state: state.update(noise=torch.zeros(3, dtype=torch.uint8)), ""),
    "no position": (lambda state: state.update(batches={}), ""),
    "another value": (lambda state: state.update(controller={"values": {"foo": 1.0}}), "foo"),
    "no step": (lambda state: state.update(step="three"), ""),
    "another format": (lambda state: state.update(format=99), "99"),
    "nothing": (lambda state: state.clear(), ""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_that_does_not_fit(refused: Refused, damaged: Run, change: str) -> None:
    path = newest(damaged)
    state = torch.load(path, weights_only=True)
    apply, named = CHANGES[change]
    apply(state)
    torch.save(state, path)
    message = refused("fit", "--resume", damaged.folder, "--quiet")
    assert str(path) in message
    assert named in message


def test_a_checkpoint_whose_optimiser_does_not_fit_is_refused_before_it_is_used(damaged: Run) -> None:
    path = newest(damaged)
    state = torch.load(path, weights_only=True)
    state["step"] = 1  # so that there are steps to take
    for moments in state["players"]["encoder_optimizer"]["state"].values():
        moments["exp_avg"] = torch.zeros(7)
    torch.save(state, path)
    words = [SCRIPT, "fit", "--resume", damaged.folder, "--quiet"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2, done
    assert one_line(done.stderr)
    assert str(path) in done.stderr


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_cut_model(refused: Refused, damaged: Run, tmp_path: Path, kept: float) -> None:
    path = damaged.model_folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    assert str(path) in refused("sample", damaged.folder, "-o", tmp_path / "x.npy")


def test_a_model_whose_weights_do_not_fit(refused: Refused, damaged: Run, digits: Run, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = damaged.model_folder / "model.safetensors"
    tensors = load_file(path)
    name = "encoder.layers.0.weight"
    for changed, named in (
        ({**tensors, "foo": torch.zeros(1)}, "unknown weights (foo)"),
        ({key: tensors[key] for key in tensors if key != name}, f"lacks weights ({name})"),
        ({**tensors, name: torch.zeros(16, 3)}, "(16, 3)"),
        ({**tensors, name: tensors[name].half()}, "float16"),
    ):
        save_file(changed, path)
        message = refused("sample", damaged.folder, "-o", tmp_path / "x.npy")
        assert str(path) in message
        assert named in message
    shutil.copy(digits.model_folder / "model.safetensors", path)
    assert "another network" in refused("evaluate", damaged.folder)
    path.unlink()
    assert str(path) in refused("sample", damaged.folder, "-o", tmp_path / "x.npy")


@pytest.mark.parametrize(
    "change",
    [
        '{"format": 99}',
        '{"network": "foo"}',
        '{"network": null}',
        '{"shape": [3]}',
        '{"shape": [-1]}',
        '{"shape": ["a"]}',
        '{"shape": "2"}',
        '{"latent_dim": 0}',
        '{"latent_dim": "two"}',
        '{"options": {"foo": 3}}',
        '{"options": {"shape": 3}}',
        '{"options": {"hidden": 1.5}}',
        '{"options": null}',
    ],
)
def test_a_model_description_with_a_wrong_entry(refused: Refused, damaged: Run, tmp_path: Path, change: str) -> None:
    path = damaged.model_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | json.loads(change)))
    message = refused("sample", damaged.folder, "-o", tmp_path / "x.npy")
    assert str(damaged.model_folder) in message


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_broken_model_description(refused: Refused, damaged: Run, tmp_path: Path, text: str) -> None:
    path = damaged.model_folder / "config.json"
    path.write_text(text)
    assert str(path) in refused("sample", damaged.folder, "-o", tmp_path / "x.npy")


@pytest.mark.parametrize("text", ["", "{", "[]", "foo: 3\n", "steps: -1\n", "objective: {class_path: Foo}\n", "\0"])
def test_a_broken_config_of_a_run_is_named(refused: Refused, damaged: Run, text: str) -> None:
    damaged.config_path.write_text(text)
    assert str(damaged.config_path) in refused("evaluate", damaged.folder)


@pytest.mark.parametrize("words", ["evaluate", "sample -o x.npy", "reconstruct a.png -o x.npy"])
def test_a_run_without_a_model(refused: Refused, damaged: Run, words: str) -> None:
    shutil.rmtree(damaged.model_folder)
    name, *more = words.split()
    message = refused(name, damaged.folder, *more)
    assert str(damaged.folder) in message
    assert "--resume" in message


# --- refused: evaluate, sample, reconstruct


def test_an_unknown_metric_lists_the_known_ones(refused: Refused, digits: Run) -> None:
    before = digits.report_path.read_bytes()
    message = refused("evaluate", digits.folder, "--metrics", "psnr_db,foo")
    for word in ("'foo'", "psnr_db", "ssim", "mse"):
        assert word in message
    assert digits.report_path.read_bytes() == before


def test_evaluate_refuses_data_of_another_shape(refused: Refused, digits: Run, plane: Run, tmp_path: Path) -> None:
    data = save(tmp_path / "images.npy", np.zeros((20, 1, 16, 16), np.uint8))
    for run, other, shapes in (
        (digits, data, ("(1, 16, 16)", "(1, 8, 8)")),
        (digits, "density:rings", ("(2,)", "(1, 8, 8)")),
        (plane, "digits", ("(1, 8, 8)", "(2,)")),
    ):
        message = refused("evaluate", run.folder, "--data", other)
        for word in (str(other), *shapes):
            assert word in message


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("evaluate", "run"),
        ("sample RUN", "-o"),
        ("sample RUN -o x.npy -n 0", "n 0 above 0"),
        ("sample RUN -o x.npy -n -3", "n -3 above 0"),
        ("sample RUN -o x.npy -n few", "-n few"),
        ("sample RUN -o x.npy --seed one", "--seed one"),
        ("sample RUN -o x.npy --foo", "--foo"),
        ("sample RUN -o x.jpg", "x.jpg .png .npy folder"),
        ("reconstruct RUN -o x.png", "images"),
        ("evaluate RUN --seed one", "--seed one"),
        ("evaluate RUN --data foo", "foo digits"),
        ("evaluate RUN more", "more"),
        ("recipes foo", "foo"),
        ("interpolate RUN a.png -o x.npy", "end"),
        ("interpolate RUN a.png b.png", "-o"),
        ("interpolate RUN a.png b.png -o x.npy --steps few", "--steps few"),
        ("doctor foo", "foo"),
        ("doctor --clear", "--clear"),
        ("nope", "nope fit, evaluate, sample, reconstruct, interpolate, detect, recipes, doctor"),
        ("--nope", "--nope fit, evaluate"),
    ],
)
def test_words_that_will_not_do(refused: Refused, digits: Run, words: str, named: str) -> None:
    message = refused(*(digits.folder if word == "RUN" else word for word in words.split()))
    for word in named.split(" "):
        assert word in message


def test_points_cannot_be_written_as_single_pictures(refused: Refused, plane: Run, tmp_path: Path) -> None:
    assert ".npy" in refused("sample", plane.folder, "-o", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_reconstruct_refuses_what_is_no_image_of_its_size(refused: Refused, digits: Run, tmp_path: Path) -> None:
    Image.new("L", (9, 7)).save(tmp_path / "wide.png")
    (tmp_path / "text.png").write_text("hello")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:80])
    for name, word in (("wide", "9 x 7"), ("text", "image"), ("cut", "cut.png"), ("missing", "missing.png")):
        path = tmp_path / f"{name}.png"
        message = refused("reconstruct", digits.folder, path, "-o", tmp_path / "y.npy")
        assert str(path) in message
        assert word in message
        assert not (tmp_path / "y.npy").exists()


def test_reconstruct_refuses_a_picture_of_16_bits(refused: Refused, digits: Run, tmp_path: Path) -> None:
    """Pillow would cut its values off at 255."""
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(tmp_path / "deep.png")
    message = refused("reconstruct", digits.folder, tmp_path / "deep.png", "-o", tmp_path / "y.npy")
    assert "deep.png" in message


def test_reconstruct_refuses_images_for_a_model_of_points(
    refused: Refused, plane: Run, images: list[Path], tmp_path: Path
) -> None:
    assert "(2,)" in refused("reconstruct", plane.folder, images[0], "-o", tmp_path / "y.npy")


def test_output_that_cannot_be_written(refused: Refused, digits: Run, images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.npy").mkdir()
    for output in ("file/x.png", "file/x.npy", "file", "file/folder", "folder.png", "folder.npy"):
        for command in (("sample", digits.folder, "-n", 2), ("reconstruct", digits.folder, images[0])):
            assert str(tmp_path / output) in refused(*command, "-o", tmp_path / output)
    assert files(tmp_path) == {"file", "a.png", "b.png", "c.png"}


def test_a_run_folder_that_cannot_be_made(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        message = refused("fit", *PLANE, "--out", out)
        assert str(out) in message
        assert "--out" in message


@pytest.mark.parametrize("taken", ["report.json", "images/evaluation.png"])
def test_a_report_that_cannot_be_written(refused: Refused, digits: Run, tmp_path: Path, taken: str) -> None:
    run = Run(Path(shutil.copytree(digits.folder, tmp_path / "copy")))
    (run.folder / taken).unlink()
    (run.folder / taken).mkdir()  # as good as a disk that is full or read-only
    assert taken in refused("evaluate", run.folder, "--metrics", "mse")


# --- as a program


def test_the_program_exits_with_the_code_and_says_one_line() -> None:
    done = subprocess.run([SCRIPT, "nope"], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert one_line(done.stderr)


@pytest.mark.parametrize("words", [["--help"], ["recipes"]])
def test_a_reader_that_has_gone_is_no_error(words: list[str]) -> None:
    """As in `introvae --help | head -0`."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [SCRIPT, *words], stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=60
        )
    finally:
        os.close(writer)
    assert "Traceback" not in done.stderr
    assert "BrokenPipeError" not in done.stderr


def test_the_program_draws_no_progress_bar_into_a_file(tmp_path: Path) -> None:
    words = [SCRIPT, "fit", *[word for word in PLANE if word != "--quiet"], "--out", tmp_path / "run"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert str(tmp_path / "run") in done.stdout
