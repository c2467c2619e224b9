"""The pages of the documentation: their commands and cells run, their links lead somewhere, and none is left out."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

import introvae
from commands import Command
from introvae import networks
from introvae.data import load_data
from introvae.metrics.features import feature_space
from introvae.metrics.frechet import GaussianStatistics, frechet_distance
from introvae.networks.conv import build_conv
from test_readme import known_option, run

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
START = (DOCS / "start.md").read_text()
FEW = "6"


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"```{re.escape(kind)}\n(.*?)```", text, re.DOTALL)


def cells(page: str) -> list[str]:
    return blocks((DOCS / page).read_text(), "{code-cell} ipython3")


def test_the_commands_and_the_python_of_the_first_page_run_in_their_order_from_an_empty_folder(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path
    monkeypatch.chdir(folder)
    lines = [line.strip() for block in blocks(START, "sh") for line in block.splitlines()]
    ours = [shlex.split(line) for line in lines if line.startswith(("introvae ", "python examples/"))]
    called = {words[1] for words in ours}
    assert called >= {"fit", "evaluate", "sample", "reconstruct", "interpolate", "detect", "export"}
    elsewhere = set(re.findall(r"^introvae (\w+)", START, re.MULTILINE)) - called
    assert elsewhere == {"studio"}, "it answers until Ctrl-C; all others run here"
    for words in ours:
        if words[0] == "python":
            run([sys.executable, str(ROOT / words[1]), *words[2:]], folder)
            continue
        steps = ["--steps", FEW, "--quiet"] if words[1] == "fit" and "--resume" not in words else []
        said = command(*words[1:], *steps)
        assert said.code == 0, (words, said)
    made = ("runs/first/report.html", "samples.png", "pairs.png", "way.png", "dimensions.png", "more-wine.csv")
    made = (*made, "runs/first/export/encoder.onnx", "runs/first/export/decoder.onnx")
    for name in (*made, "runs/first/detect/pictures/scores.csv"):
        assert (folder / name).stat().st_size > 500, name

    (block,) = blocks(START, "python")
    assert "kl_real" in run([sys.executable, "-c", block], folder)


def test_the_cells_about_an_own_network_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTROVAE_DOCS_STEPS", FEW)
    monkeypatch.setattr(networks, "_NETWORKS", dict(networks._NETWORKS))  # what the page registers is forgotten
    page = ModuleType("own_network")
    for cell in cells("own-network.md"):
        exec(compile(cell, "own-network.md", "exec"), page.__dict__)
    assert page.__dict__["run"].model().sample(2).shape == (2, 1, 8, 8)
    page.__dict__["folder"].cleanup()


def test_the_own_network_trains_by_its_import_path(tmp_path: Path) -> None:
    parts = cells("own-network.md")
    (tmp_path / "folding.py").write_text("\n".join(["import introvae", parts[0], parts[2]]))
    lines = re.findall(r"^PYTHONPATH=\. introvae (.*)$", (DOCS / "own-network.md").read_text(), re.MULTILINE)
    assert [line.split()[0] for line in lines] == ["fit", "sample"]
    for line, more in zip(lines, (["--steps", FEW, "--quiet"], []), strict=True):
        run([sys.executable, "-m", "introvae", *shlex.split(line), *more], tmp_path)
    assert (tmp_path / "samples.png").is_file()
    assert "network: folding.build_folding" in (tmp_path / "runs/folding/config.yaml").read_text()


def test_the_cells_about_an_own_objective_run(tmp_path: Path) -> None:
    (tmp_path / "page.py").write_text("\n".join(cells("own-objective.md")))
    environment = {**os.environ, "INTROVAE_DOCS_STEPS": FEW}
    words = [sys.executable, "page.py"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "own {'modes'" in done.stdout


def test_the_own_objective_is_short_and_trains_by_its_import_path(tmp_path: Path) -> None:
    own = cells("own-objective.md")[0]
    assert len(own.splitlines()) < 60
    (tmp_path / "relative.py").write_text(own)
    (line,) = re.findall(r"^PYTHONPATH=\. introvae (fit .*)$", (DOCS / "own-objective.md").read_text(), re.MULTILINE)
    run([sys.executable, "-m", "introvae", *shlex.split(line), "--steps", FEW, "--quiet"], tmp_path)
    settings = (tmp_path / "runs/relative/config.yaml").read_text()
    assert "class_path: relative.RelativeIntroVAE" in settings
    assert "beta: 4.0\n    alpha: 0.8\n    margin: 2.0" in settings  # the alpha of its own, not that of another one


def test_the_distance_over_several_processes_is_that_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (DOCS / "metrics.md").read_text()
    (own,) = blocks(text, "python")
    (line,) = re.findall(r"^`(torchrun .* distance\.py)`", text, re.MULTILINE)
    (tmp_path / "distance.py").write_text(own)
    settings = {"data": "digits", "network": "tiny-conv", "steps": 3, "recipe": "none", "progress": False}
    trained = introvae.fit(**settings, out=str(tmp_path / "runs" / "digits"))
    model, space = trained.model(), feature_space("thumb")
    latents = torch.randn(5000, model.latent_dim, generator=torch.Generator().manual_seed(0))
    sums = [GaussianStatistics(64), GaussianStatistics(64)]
    with torch.no_grad():
        for found, x in zip(sums, (model.decode(latents), load_data("digits").train.tensor()), strict=True):  # pyright: ignore
            found.update(space(x))
    monkeypatch.chdir(tmp_path)
    exec(compile(own, "distance.py", "exec"), {})
    for told in (capsys.readouterr().out, run(shlex.split(line), tmp_path)):
        (said,) = told.splitlines()  # of several processes the first speaks
        assert said.endswith(": 5000 samples, 1437 training images")
        assert float(said.split()[1].rstrip(":")) == pytest.approx(frechet_distance(*sums), rel=1e-5)


def test_every_page_is_in_the_table_of_contents_once() -> None:
    index = (DOCS / "index.md").read_text()
    trees = re.findall(r"```\{toctree\}\n(.*?)```", index, re.DOTALL)
    listed = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    assert sorted(listed) == sorted(page.stem for page in PAGES if page.stem != "index")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_what_a_page_points_at_exists(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"\b(TODO|FIXME)\b", text)
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]+)", text):
        assert (page.parent / target).is_file(), target
        if page.parent == DOCS and target.endswith(".md"):
            assert "/" not in target, f"{target} is no page of the documentation: its build refuses the link"
    if page.stem in ("images", "numbers", "scaling"):  # the others name options of other commands, too
        for option in set(re.findall(r"`(--[a-z_-]+)", text)):
            assert known_option(option), f"{option} is no option"


def test_the_table_of_normalisers_is_that_of_the_results() -> None:
    results = ROOT / "benchmarks" / "results"
    sections = json.loads((results / "normalisers" / "comparison.json").read_text())["sections"]
    cells = {(cell["data"], cell["label"]): cell for section in sections for cell in section["cells"]}
    times = {case["norm"]: case["of_layer"] for case in json.loads((results / "normalisers.json").read_text())["cases"]}
    page = (DOCS / "networks.md").read_text()
    lines = page[page.index("| `norm` | set |") :].split("\n\n")[0].splitlines()[2:]
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in lines]
    assert {(data, label) for label, data, *_ in rows} == cells.keys()
    for label, data, frechet, recall, psnr, gap, time in rows:
        cell = cells[data, label]
        spread = {name: (found["mean"], found["std"]) for name, found in cell["metrics"].items()}
        assert cell["done"] == len(cell["runs"]) == 2
        assert frechet == "{:.1f} ± {:.1f}".format(*spread["frechet_mnist"]), (label, data)
        assert recall == "{:.2f} ± {:.2f}".format(*spread["recall_mnist"]), (label, data)
        assert psnr == "{:.1f} ± {:.1f}".format(*spread["psnr_db"]), (label, data)
        worst = spread["gap_training_mode"][0]
        assert gap == (f"{100 * worst:.0f} %" if worst > 1e-3 else "0"), (label, data)
        assert time == f"{times[label.partition(',')[0]]:.2f}", label
        assert worst > 1e-3 or worst < 1e-6, "a gap that is neither nothing nor shown"
    best = min(cells.values(), key=lambda cell: cell["metrics"]["frechet_mnist"]["mean"])
    assert best["label"] == inspect.signature(build_conv).parameters["norm"].default == "pixel"


def test_names_that_pages_mention_are_there() -> None:
    texts = [page.read_text() for page in (*PAGES, ROOT / "README.md")]
    named = {name for text in texts for name in re.findall(r"(?<!/)\bintrovae(?:\.[A-Za-z_]\w*)+", text)}
    assert {"introvae.fit", "introvae.apps.detect.detect", "introvae.studio.view.View"} <= named
    missing = [name for name in sorted(named - {"introvae.NAME"}) if not there(name)]
    assert missing == []


def there(name: str) -> bool:
    """Whether a dotted name leads to a module or to something in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        return all((found := getattr(found, part, None)) is not None for part in parts[length:])
    return False


def test_the_api_page_lists_every_public_name() -> None:
    listed = set(re.findall(r"^\.\. auto\w+:: introvae\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE))
    assert listed == set(introvae.__all__) - {"__version__"}


def test_every_failure_that_is_shown_can_be_made_again(tmp_path: Path) -> None:
    script = ROOT / "examples" / "failures.py"
    shown = set(re.findall(r"failures/(\w+)\.png", (DOCS / "numbers.md").read_text()))
    assert shown == set(re.findall(r'^    "(\w+)": \{\*\*', script.read_text(), re.MULTILINE)) | {"rate"}
    run([sys.executable, str(script), "asleep", "--steps", FEW, "--out", str(tmp_path)], tmp_path)
    assert (tmp_path / "asleep.png").stat().st_size > 5000
    for name in shown:
        assert (DOCS / "failures" / f"{name}.png").stat().st_size < 150_000


def test_what_builds_the_pages_is_pinned() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {re.split(r"[>=<]", name)[0] for name in extras["docs"]} <= pinned
