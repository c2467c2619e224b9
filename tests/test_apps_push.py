"""Pushing to a stand-in for the hub, loading from it, and what the card tells and does not tell."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import hub as stand_in
from commands import Command, Refused, one_line
from introvae import IntrospectiveVAE, evaluate, fit, networks
from introvae.apps.push import PAPERS, model_card, package
from introvae.networks.conv import build_conv
from introvae.objectives import list_objectives
from introvae.training.run import Run

SECRET = "secret-person"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An evaluated run of a folder whose files have a name that is nobody's business."""
    base = tmp_path_factory.mktemp(SECRET)
    folder = base / "faces"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{SECRET}-{i:02d}.png")
    (folder / f"{SECRET}-broken.png").write_bytes(b"no image")
    run = fit(data=str(folder), network="tiny-conv", latent_dim=4, steps=2, batch_size=8, out=str(base / "mine"))
    evaluate(run)
    return run


def test_the_package_is_a_model_with_its_card(run: Run, tmp_path: Path) -> None:
    folder = package(run, tmp_path / "card", "me/mine", "apache-2.0")
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "config.json", "model.safetensors", "settings.yaml", "report.json", "samples.png")
    }
    model, z = IntrospectiveVAE.from_pretrained(folder), torch.randn(2, 4)
    assert torch.equal(model.decode(z), run.model().decode(z))
    card = (folder / "README.md").read_text()
    for said in (
        "license: apache-2.0",
        "library_name: introvae",
        'from_pretrained("me/mine")',
        "arxiv.org/abs/2012.13253",
    ):
        assert said in card
    report = run.report()
    for name, entry in report["metrics"].items():
        assert f"`{name}`" in card
        assert entry["protocol"].replace("|", "\\|") in card
    assert json.loads((folder / "report.json").read_text())["metrics"] == report["metrics"]


SECTIONS = ["Use", "Training", "Numbers", "Intended use", "Limits"]


def test_the_card_has_its_sections_and_tells_how_the_model_was_made(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, model = [], Run.model
    monkeypatch.setattr(Run, "model", lambda self: loaded.append(self) or model(self))
    card = (package(run, tmp_path / "card") / "README.md").read_text()
    assert len(loaded) == 1
    assert re.findall(r"^## (.*)$", card, re.MULTILINE) == SECTIONS
    training = card.split("## Training\n")[1].split("\n## ")[0]
    (started,) = run.events("start")
    assert f"2 steps of 8, seed 0, {run.log()[-1]['seconds']:.0f} s on {started['device']}" in training
    assert f"({started['precision']}, 1 process, {torch.get_num_threads()} thread" in training
    assert "36 samples to train on, 4 held out" in training
    (command,) = re.findall(r"```sh\n(.*)\n```", training)
    assert command == "introvae fit --recipe settings.yaml --data DATA"


def test_nothing_tells_of_the_data(run: Run, tmp_path: Path) -> None:
    assert SECRET in run.report_path.read_text()  # so it would be seen
    for path in package(run, tmp_path / "card").iterdir():
        assert SECRET.encode() not in path.read_bytes(), path.name


def test_the_cards_example_runs(run: Run, tmp_path: Path) -> None:
    folder = package(run, tmp_path / "card", str(tmp_path / "card"))
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["again"].shape == (16, 1, 8, 8)


def test_the_settings_train_again(run: Run, tmp_path: Path) -> None:
    folder = package(run, tmp_path / "card")
    again = fit(recipe=str(folder / "settings.yaml"), data=run.config().data, out=str(tmp_path / "again"))
    weights = again.model().state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in run.model().state_dict().items())


@pytest.mark.parametrize("data", ["density:8gaussians", "table"])
@pytest.mark.parametrize("objective", ["VAE", "WGANGP"])
def test_cards_of_points_and_tables(data: str, objective: str, tmp_path: Path) -> None:
    if data == "table":
        rows = np.random.default_rng(0).normal(size=(50, 3))
        data = str(tmp_path / "wine.csv")
        Path(data).write_text("acid,sugar,colour\n" + "\n".join(",".join(map(str, row)) for row in rows))
    run = fit(data=data, objective=objective, network="tiny-mlp", steps=2, batch_size=8, out=str(tmp_path / "run"))
    folder = package(run, tmp_path / "card")
    card = (folder / "README.md").read_text()
    assert re.findall(r"^## (.*)$", card, re.MULTILINE) == SECTIONS
    assert ("settings.yaml --data DATA\n" in card) == ("50 samples, held-out" in card) == ("wine" in data)
    assert "Not measured" in card
    assert ("acid, sugar, colour" in card) == ("wine" in data)
    assert (folder / "samples.png").exists() == ("![Samples]" in card) == ("wine" not in data)
    assert ("diagnosis" in card) == (objective == "VAE")
    assert "unconditional-image-generation" not in card


def test_every_objective_has_its_paper() -> None:
    assert set(list_objectives()) <= set(PAPERS)


def test_the_card_of_a_model_of_classes(tmp_path: Path) -> None:
    run = fit(data="digits", network="tiny-conv", conditional=True, steps=2, batch_size=8, out=str(tmp_path / "run"))
    folder = package(run, tmp_path / "card", str(tmp_path / "card"))
    card = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["again"].shape == (16, 1, 8, 8)
    assert "0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in card
    assert "introvae detect" not in card
    assert "anomaly-detection" not in card


OWN = """
from introvae.networks.conv import build_conv

def build_mine(shape, latent_dim):
    return build_conv(shape, latent_dim, channels=(4,))
"""


def test_the_card_of_an_own_network_registers_it_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_of_cards.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(networks, "_NETWORKS", dict(networks._NETWORKS))
    settings: dict[str, Any] = {"network": "mine_of_cards.build_mine", "steps": 2, "batch_size": 8}
    run = fit(data="digits", **settings, out=str(tmp_path / "run"))
    folder = package(run, tmp_path / "card", str(tmp_path / "card"))
    card = (folder / "README.md").read_text()
    assert "its code is not in this repository" in card
    assert "It imports `mine_of_cards`" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    # A program that knows nothing of the run.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


def test_the_card_of_a_network_that_was_registered_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "_NETWORKS", dict(networks._NETWORKS))
    networks.register_network("folding", partial(build_conv, channels=(4,)))
    run = fit(data="digits", network="folding", steps=2, batch_size=8, out=str(tmp_path / "run"))
    card = (package(run, tmp_path / "card") / "README.md").read_text()
    assert "from MODULE import BUILDER  # not in this repository\n" in card
    assert 'register_network("folding", BUILDER)' in card
    assert "so in Python: `introvae.fit" in card


def test_columns_that_the_model_does_not_know_are_not_told(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(50, 3))
    path = tmp_path / "wine.csv"
    lines = [f"{row[0]},{row[1]},{row[2]},{i // 2},{i % 2}" for i, row in enumerate(rows)]
    path.write_text("acid,sugar,patient,family,diagnosed\n" + "\n".join(lines))
    private = {"drop": ["patient"], "group": "family", "label": "diagnosed"}
    settings: dict[str, Any] = {**private, "network": "tiny-mlp", "steps": 2, "batch_size": 8}
    run = fit(data=str(path), **settings, out=str(tmp_path / "run"))
    folder = package(run, tmp_path / "card")
    assert "settings.yaml --data DATA --group GROUP --label COLUMN\n" in (folder / "README.md").read_text()
    for file in folder.iterdir():
        for name in (b"patient", b"family", b"diagnosed"):
            assert name not in file.read_bytes(), file.name
    # The settings train on the same columns, though they do not say which were left out.
    recipe, again = str(folder / "settings.yaml"), str(tmp_path / "again")
    weights = fit(recipe=recipe, data=str(path), group="family", label="diagnosed", out=again).model().state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in run.model().state_dict().items())


def test_that_there_are_no_labels_is_told(tmp_path: Path) -> None:
    path = tmp_path / "wine.csv"
    path.write_text("acid,label\n" + "\n".join(f"{i / 7},{i % 5}" for i in range(50)))
    settings: dict[str, Any] = {"label": "none", "network": "tiny-mlp", "steps": 2, "batch_size": 8}
    run = fit(data=str(path), **settings, out=str(tmp_path / "run"))
    told = yaml.safe_load((package(run, tmp_path / "card") / "settings.yaml").read_text())
    assert (told["label"], told["columns"]) == ("none", ["acid", "label"])


def test_names_on_the_hub_stay_and_paths_do_not(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = run.config_path.read_text()
    other, model = Run(tmp_path / "other"), run.model()
    monkeypatch.setattr(Run, "model", lambda self: model)
    other.folder.mkdir()
    for data, name in (
        ("ylecun/mnist", "ylecun/mnist"),
        ("/home/me/faces", "faces"),
        ("../faces", "faces"),
        ("patients/smith", "smith"),
    ):
        other.config_path.write_text(re.sub(r"^data: .*$", f"data: {data}", text, flags=re.MULTILINE))
        assert f"trained on {name}:" in model_card(other, "me/other")


# --- the hub


@pytest.fixture
def hub() -> Iterator[stand_in.Hub]:
    with stand_in.hub() as found:
        yield found


def elsewhere(hub: stand_in.Hub, home: Path, *words: str, token: str | None = stand_in.TOKEN) -> Any:
    """A process of its own, for which the stand-in is the hub."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    return subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, check=False, timeout=180
    )


LOAD = """
import sys, torch, introvae
model = introvae.IntrospectiveVAE.from_pretrained(sys.argv[1])
print(model.decode(torch.ones(1, model.latent_dim)).sum().item())
"""


def test_a_pushed_model_is_loaded_by_its_name(run: Run, hub: stand_in.Hub, tmp_path: Path) -> None:
    words = ("-m", "introvae", "push", str(run.folder), "me/mine", "--private")
    done = elsewhere(hub, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{hub.address}/me/mine/commit/")
    assert hub.private == {"me/mine"}
    files = hub.repositories["me/mine"]
    assert files["model.safetensors"] == (run.model_folder / "model.safetensors").read_bytes()
    assert files["README.md"].startswith(b"---\n")
    loaded = elsewhere(hub, tmp_path, "-c", LOAD, "me/mine", token=None)
    assert loaded.returncode == 0, loaded.stderr
    expected = run.model().decode(torch.ones(1, 4)).sum().item()
    assert float(loaded.stdout) == pytest.approx(expected, rel=1e-6)
    # Once more, with what has changed.
    assert elsewhere(hub, tmp_path, *words, "--license", "cc-by-4.0").returncode == 0
    assert b"license: cc-by-4.0" in hub.repositories["me/mine"]["README.md"]


@pytest.mark.parametrize("token", [None, "hf_bad"])
def test_who_may_not_write_is_told(run: Run, hub: stand_in.Hub, tmp_path: Path, token: str | None) -> None:
    done = elsewhere(hub, tmp_path, "-m", "introvae", "push", str(run.folder), "me/mine", token=token)
    assert done.returncode == 2
    assert one_line(done.stderr), done.stderr
    assert "HF_TOKEN" in done.stderr
    assert hub.repositories == {}


def test_a_hub_that_is_not_there_is_said(run: Run, tmp_path: Path) -> None:
    nobody = stand_in.Hub(address="http://127.0.0.1:9")
    done = elsewhere(nobody, tmp_path, "-m", "introvae", "push", str(run.folder), "me/mine")
    assert done.returncode == 2
    assert one_line(done.stderr), done.stderr


@pytest.mark.parametrize("name", ["mine", "me/mine/too", "me/..", "me/a b", "-/x"])
def test_names_that_the_hub_does_not_take(run: Run, refused: Refused, name: str) -> None:
    assert "OWNER/MODEL" in refused("push", run.folder, name)


def test_a_look_before_anything_is_sent(run: Run, command: Command, tmp_path: Path) -> None:
    said = command("push", run.folder, "me/mine", "--folder", tmp_path / "look")
    assert said.code in (0, None)
    assert said.out.strip() == str(tmp_path / "look")
    assert (tmp_path / "look" / "README.md").is_file()


def test_a_run_without_a_model(run: Run, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(run.config_path.read_text())
    assert "no model yet" in refused("push", tmp_path, "me/mine")
