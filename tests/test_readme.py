"""The README's commands run as they are printed, from an empty folder (with fewer steps)."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from commands import Command

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = {kind: re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL) for kind in ("sh", "python")}
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS["sh"] for line in block.splitlines() if line.strip()]


def run(words: list[str], folder: Path) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder with what examples/own_data.py writes."""
    where = tmp_path_factory.mktemp("user")
    assert "python examples/own_data.py" in README
    run([sys.executable, str(ROOT / "examples" / "own_data.py"), "--out", "."], where)
    return where


def test_every_introvae_command_runs_in_the_order_of_the_readme(
    folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    commands = [shlex.split(command) for command in COMMANDS if command.startswith("introvae ")]
    assert {words[1] for words in commands} >= {"fit", "evaluate", "sample", "reconstruct", "interpolate", "doctor"}
    for words in commands:
        fresh = words[1] == "fit" and "--resume" not in words
        several = words[1] == "compare" and "--objectives" in words
        fewer = ["--steps", "6", *(["--quiet"] if fresh else [])] if fresh or several else []
        fewer += ["--seeds", "1", "--network", "tiny-mlp"] if several else []
        said = command(*words[1:], *fewer)
        assert said.code == 0, (words, said)
    for made in ("runs/mine/report.html", "samples.png", "pairs.png", "way.png", "more-wine.csv"):
        assert (folder / made).stat().st_size > 500, made


def test_the_studio_is_not_tested_without_a_browser_unless_that_is_asked_for(tmp_path: Path) -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is missing")
    tools = tmp_path / "bin"  # no browser, and nothing that installs one
    tools.mkdir()
    python = tools / "python"
    python.write_text("#!/bin/sh\necho tested\n")
    python.chmod(0o755)
    words = [make, "-o", ".venv/.ready", f"BIN={tools}", "test-studio"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "INTROVAE_NO"))}
    environment["PATH"] = str(tools)
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert "tested" not in done.stdout
    (line,) = (line for line in done.stderr.splitlines() if "make" not in line)
    assert "no chromium" in line
    assert "INTROVAE_NO_BROWSER=1" in line
    environment["INTROVAE_NO_BROWSER"] = "1"
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.endswith("tested\n")


def test_the_table_of_8_gaussians_is_that_of_the_results() -> None:
    result = json.loads((ROOT / "benchmarks/results/table-2d/comparison.json").read_text())
    cells = {cell["label"]: cell for cell in result["sections"][0]["cells"]}
    names = {"`": "", " auto": " auto", ", beta_neg: auto": ", beta_neg auto", ", margin: auto": ", margin auto"}
    table = README[README.index("| objective | seeds | KL") :].split("\n\n")[0].splitlines()[2:]
    assert len(table) == len(cells)
    for line in table:
        label, seeds, kl, jsd, modes, near, changed = (part.strip() for part in line.strip("|").split("|"))
        for old, new in names.items():
            label = label.replace(old, new)
        cell = cells[re.sub(r"(Intro|AS|Soft)(?=Intro|VAE)", lambda m: m.group() + "-" * (m.group() != "Intro"), label)]
        metrics = cell["metrics"]
        for said, name in ((kl, "kl_soft_introvae"), (jsd, "jsd_soft_introvae")):
            assert said == f"{metrics[name]['mean']:.1f} ± {metrics[name]['std']:.1f}", label
        assert int(seeds) == cell["done"] == len(cell["runs"])
        assert modes == f"{cell['done'] - cell['lost_modes']} of {cell['done']}"
        assert near == f"{100 * metrics['share_within_3_sigma']['mean']:.1f} %"
        assert int(changed) == cell["changed"]


def test_the_table_of_mnist_is_that_of_the_results() -> None:
    result = json.loads((ROOT / "benchmarks/results/images/comparison.json").read_text())
    cells = {cell["label"].replace("-", ""): cell for cell in result["sections"][0]["cells"]}
    table = README[README.index("| | PSNR, dB | Fréchet distance, `mnist`") :].split("\n\n")[0].splitlines()[2:]
    *objectives, real = ([part.strip() for part in line.strip("|").split("|")] for line in table)
    assert {label.strip("`") for label, *_ in objectives} == cells.keys()
    for label, psnr, frechet, sure, recall, changed, seconds in objectives:
        cell = cells[label.strip("`")]
        spread = {name: (found["mean"], found.get("std", 0.0)) for name, found in cell["metrics"].items()}
        assert cell["done"] == len(cell["runs"]) == 2
        assert psnr == ("{:.1f} ± {:.1f}".format(*spread["psnr_db"]) if "psnr_db" in spread else ""), label
        assert frechet == "{:.2f} ± {:.2f}".format(*spread["frechet_mnist"]), label
        assert sure == f"{100 * spread['confident_share_mnist'][0]:.1f} %", label
        assert recall == f"{spread['recall_mnist'][0]:.2f}", label
        assert (int(changed), seconds) == (cell["changed"], f"{cell['seconds']['mean']:,.0f}"), label
        assert spread.get("adversary_awake", (1.0,))[0] == 1, label
        assert spread["gap_training_mode"][0] < 1e-6, label
    floors = cells["SoftIntroVAE"]["floors"]
    shown = (floors["frechet_mnist"], 100 * floors["confident_share_mnist"], floors["recall_mnist"])
    assert real[2:5] == [f"{shown[0]:.2f}", f"{shown[1]:.1f} %", f"{shown[2]:.2f}"]


def test_the_table_of_the_other_images_is_that_of_the_results() -> None:
    result = json.loads((ROOT / "benchmarks/results/images/comparison.json").read_text())
    sections = {section["key"]: section["cells"] for section in result["sections"]}
    head, _, *table = README[README.index("| | `VAE` | `SoftIntroVAE`") :].split("\n\n")[0].splitlines()
    labels = [label.strip(" `") for label in head.strip("|").split("|")[1:-1]]
    for line, (key, space) in zip(table, {"fashion-mnist": "mnist", "cifar10": "cifar10"}.items(), strict=True):
        cells = {cell["label"].replace("-", ""): cell for cell in sections[key]}
        *values, floor = (value.strip() for value in line.strip("|").split("|")[1:])
        assert values == [f"{cells[label]['metrics'][f'frechet_{space}']['mean']:.1f}" for label in labels]
        assert floor == f"{cells['VAE']['floors'][f'frechet_{space}']:.1f}"


def test_the_faces_are_those_of_the_results() -> None:
    result = json.loads((ROOT / "docs/results/faces.json").read_text())
    (line,) = [line for line in README.splitlines() if "(`make faces`) |" in line]
    data, steps, seconds, psnr, frechet = (part.strip() for part in line.strip("|").split("|"))
    metrics = result["metrics"]
    assert f"{result['train']:,} to train on" in data
    assert (steps, seconds.split()[0]) == (f"{result['steps']:,}", f"{result['training_seconds']:,.0f}")
    assert psnr == f"{metrics['psnr_db']['value']:.1f}"
    assert frechet == "{value:.1f} ({floor:.3f})".format(**metrics["frechet_randconv"])
    named = [part["name"] for part in (*result["intake"]["skipped"], *result["intake"]["converted"], *result["worst"])]
    assert not [name for name in named if name.startswith(("images/", "checkpoints/", "model/"))]  # of no run there


def test_fakes_are_told_from_real_images_through_the_last_half_on_all_sets() -> None:
    result = json.loads((ROOT / "benchmarks/results/images/comparison.json").read_text())
    awake = {
        (section["key"], cell["label"]): [run["metrics"]["adversary_awake"] for run in cell["runs"]]
        for section in result["sections"]
        for cell in section["cells"]
        if cell["label"] in ("Soft-IntroVAE", "AS-IntroVAE")
    }
    assert len(awake) == 10
    assert {share for shares in awake.values() for share in shares} == {1.0}


def test_make_s_targets_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [command.split()[1] for command in COMMANDS if command.startswith("make ")]
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_python_blocks_run(folder: Path) -> None:
    assert BLOCKS["python"]
    for block in BLOCKS["python"]:
        script, replaced = re.subn(r"steps=\d+", "steps=6", block)
        assert replaced, "the block trains for as long as it says"
        run([sys.executable, "-c", script], folder)


def test_what_the_readme_points_at_exists() -> None:
    assert not re.search(r"\b(TODO|FIXME|REPLACE)_?", README)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target
    for option in set(re.findall(r"`(--[a-z_-]+)", README)):
        assert known_option(option), f"{option} is no option"


def known_option(option: str) -> bool:
    from introvae.training.config import config_parser

    names = {name for action in config_parser()._actions for name in action.option_strings}
    own = {
        "--help",
        "--dry-run",
        "--resume",
        "--recipe",
        "--clear-cache",
        "--hours",
        "--known",
        "--workers",
        "--features",
    }
    return option.replace("-", "_").replace("__", "--", 1) in names or option in own
