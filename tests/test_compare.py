"""Comparisons: what is planned, that it is run once and can be gone on with, and that the tables tell the truth."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from PIL import Image

from commands import Command, Refused, call, one_line
from introvae import VAE, ConfigError, FitConfig, Run, SoftIntroVAE, evaluation, fit, measures
from introvae.cli import main
from introvae.comparison import compare as comparison
from introvae.comparison import execute
from introvae.comparison.compare import compare
from introvae.comparison.execute import FAILURE, Job, estimate, jobs, run_all, within
from introvae.comparison.figures import moments, stability
from introvae.comparison.plan import Cell, Comparison, from_file, from_words, list_comparisons
from introvae.comparison.summary import collect, labels_of, run_result, to_markdown, to_text, verdict
from introvae.errors import DataError, InterruptedRunError
from introvae.networks import build_network, network_for
from introvae.training import loop
from introvae.training.checkpoint import list_checkpoints
from introvae.training.config import load_config, recipe_path
from introvae.training.signals import stop_on_signal

OBJECTIVES, DATA = ["VAE", "SoftIntroVAE"], ["density:rings", "density:8gaussians"]
SMALL = [
    *("--network", "tiny-mlp", "--batch-size", "16", "--steps", "12", "--warmup.steps", "4", "--lr-warmup", "0"),
    *("--log-every", "1", "--gradient-every", "4", "--checkpoint-every", "8", "--image-every", "0"),
]
WORDS = ["compare", "--objectives", ",".join(OBJECTIVES), "--data", ",".join(DATA), "--seeds", "2", *SMALL]


@pytest.fixture(scope="module", autouse=True)
def one_core() -> Iterator[None]:
    """One run at a time with one thread: more threads than free cores make tiny steps a hundred times slower."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "default_workers", lambda: 1)
        yield


# --- what is planned


def described(plan: Comparison) -> list[tuple[str, str, str, tuple[int, ...]]]:
    return [(cell.section, cell.data, cell.label, cell.seeds) for cell in plan.cells]


def test_words_make_a_row_of_each_objective_on_each_data() -> None:
    plan = from_words(["VAE", "IntroVAE"], DATA, seeds=2, settings=["--steps", "7", "--lr", "0.01"])
    assert described(plan) == [
        ("comparison", data, objective, (0, 1)) for data in DATA for objective in ("VAE", "IntroVAE")
    ]
    for cell in plan.cells:
        config = cell.config(1)
        found = (config.data, type(config.objective).__name__, config.seed, config.steps, config.lr)
        assert found == (cell.data, cell.label, 1, 7, 0.01)
    # Rows have the recommended recipe of their data and objective, where there is one.
    configs = [cell.config(0) for cell in plan.cells]
    configs += [cell.config(0) for cell in from_words(["VAE", "IntroVAE"], ["digits"], 1).cells]
    assert [config.batch_size for config in configs] == [256, 256, 256, 256, 64, 64]
    assert [config.network for config in configs] == ["mlp", "mlp", "mlp", "mlp", "mlp", "auto"]


def written(folder: Path, content: Any) -> str:
    path = folder / "plan.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return str(path)


ROWS = {"VAE": "--objective VAE --steps 3 --network tiny-mlp"}
SECTION = {"data": "density:rings", "rows": ROWS}
TINY = "--recipe none --network tiny-mlp --steps 3"


def test_a_file_s_sections_rows_data_and_seeds(tmp_path: Path) -> None:
    content = {
        "title": "All",
        "sections": {
            "first": {
                "title": "One",
                "note": "A note.",
                "data": DATA,
                "seeds": [7, 3],
                "rows": {"plain": "--objective VAE", "of {data}": "--recipe {data}-softintrovae --steps 9"},
            },
            "second": {"data": "density:rings", "seeds": 3, "rows": {"VAE, slow": "--objective VAE --lr 1e-5"}},
            "third": SECTION,
        },
    }
    plan = from_file(written(tmp_path, content))
    assert plan.title == "All"
    assert [(section.key, section.title, section.note) for section in plan.sections] == [
        ("first", "One", "A note."),
        ("second", "second", ""),
        ("third", "third", ""),
    ]
    assert [(cell.section, cell.data, cell.seeds) for cell in plan.cells] == [
        *[("first", data, (7, 3)) for data in DATA for _ in range(2)],
        ("second", "density:rings", (0, 1, 2)),
        ("third", "density:rings", (0,)),
    ]
    rings, gaussians = plan.sections[0].cells[1], plan.sections[0].cells[3]
    assert "rings-softintrovae" in rings.words
    assert "8gaussians-softintrovae" in gaussians.words
    published = [cell.config(7).objective for cell in (rings, gaussians)]
    assert [getattr(objective, "beta_kl", None) for objective in published] == [0.1, 0.3]  # each its recipe's
    assert [cell.config(3).steps for cell in (rings, gaussians)] == [9, 9]
    assert plan.sections[1].cells[0].config(2).lr == 1e-5


def test_every_section_s_first_seeds_are_run_first(tmp_path: Path) -> None:
    content = {"sections": {"a": {**SECTION, "data": DATA, "seeds": 2}, "b": {**SECTION, "seeds": [5, 6, 7]}}}
    found = jobs(from_file(written(tmp_path, content)), tmp_path)
    assert [(job.cell.section, job.cell.data.removeprefix("density:"), job.seed) for job in found] == [
        *[("a", data, seed) for seed in (0, 1) for data in ("rings", "8gaussians")],
        *[("b", "rings", seed) for seed in (5, 6, 7)],
    ]
    assert len({job.folder for job in found}) == len(found)
    assert all(job.config.seed == job.seed for job in found)
    assert all(tmp_path in job.folder.parents for job in found)


def test_folders_differ_for_every_data_row_and_seed() -> None:
    plan = from_words(["VAE", "IntroVAE"], ["density:rings", "digits"], seeds=3)
    folders = [job.folder for job in jobs(plan, Path("out"))]
    assert len(folders) == len(set(folders)) == 12


def broken(section: Any, name: str = "sec") -> dict[str, Any]:
    return {"sections": {name: section}}


def defect(*values: Any, reason: str, id: str) -> Any:
    return pytest.param(*values, id=id, marks=())


REFUSED = [
    pytest.param("[1, 2]", "has no sections", id="list"),
    pytest.param("", "has no sections", id="empty"),
    pytest.param("sections: {}", "has no sections", id="no-section"),
    pytest.param("sections: {s: {data: digits, rows: {V: ''}, order: [W]}}", "order is", id="order"),
    pytest.param(broken("x"), "section sec", id="section-text"),
    pytest.param(broken({"data": "digits"}), "section sec", id="no-rows"),
    pytest.param(broken({"rows": ROWS}), "section sec", id="no-data"),
    pytest.param(broken({**SECTION, "sedes": 3}), "section sec", id="unknown-key"),
    pytest.param(broken({**SECTION, "rows": ["--objective VAE"]}), "section sec", id="rows-list"),
    pytest.param(broken({**SECTION, "rows": {"VAE": 3}}), "section sec", id="row-number"),
    *[
        pytest.param(broken({**SECTION, "seeds": seeds}), "section sec", id=f"seeds-{seeds}")
        for seeds in (0, -1, "3", True, None, 2.5, [])
    ],
    pytest.param(broken({**SECTION, "seeds": ["x"]}), "seed is x", id="seed-text"),
    pytest.param(broken({**SECTION, "rows": {"odd": "--stepz 3"}}), r"'odd'.*stepz", id="unknown-setting"),
    pytest.param(broken({**SECTION, "rows": {"odd": "--lr -3"}}), r"'odd'.*lr is -3", id="out-of-range"),
    pytest.param(broken({**SECTION, "rows": {"odd": "--objective GAN"}}), r"'odd'.*'GAN'", id="objective"),
    pytest.param(broken({**SECTION, "rows": {"odd": "--recipe nope"}}), r"'odd'.*'nope'", id="recipe"),
    pytest.param(broken({**SECTION, "rows": {"odd": "--resume x"}}), r"'odd'.*resume", id="resume"),
    pytest.param(broken({**SECTION, "rows": {"A b": "--steps 1", "a-B": "--steps 2"}}), "sec.*share", id="one-folder"),
    pytest.param(broken({**SECTION, "data": ["density:rings"] * 2}), "sec.*share", id="data-twice"),
    pytest.param(broken({**SECTION, "data": "density:nope"}), r"'nope'.*8gaussians", id="unknown-data"),
    pytest.param(broken({**SECTION, "seeds": [0, -1]}), "seed is -1", id="seed-negative"),
    defect(broken({**SECTION, "data": 5}), "section sec", reason="TypeError: 'int' is not iterable", id="data-5"),
    defect(broken({**SECTION, "data": []}), "section sec", reason="an empty section is taken", id="no-datum"),
    defect(broken({**SECTION, "rows": {}}), "section sec", reason="an empty section is taken", id="no-row"),
    defect(
        broken({**SECTION, "rows": {"odd": "--objective 'VAE"}}),
        "'odd'",
        reason="ValueError of shlex: No closing quotation",
        id="quotation",
    ),
    defect(broken({**SECTION, "seeds": [1, 1]}), "sec", reason="two jobs in one folder", id="seeds-twice"),
    defect(broken({**SECTION, "rows": {"odd": f"{TINY} --out x"}}), "'odd'.*out", reason="overridden", id="out"),
    defect(
        broken({**SECTION, "rows": {"odd": f"{TINY} --data density:8gaussians"}}),
        "'odd'.*data",
        reason="the row is trained on other data than the table says",
        id="data-of-a-row",
    ),
    defect(broken({**SECTION, "rows": {"odd": f"{TINY} --seed 7"}}), "'odd'.*seed", reason="overridden", id="seed"),
    defect(
        {"sections": {"A b": SECTION, "a-b": {**SECTION, "rows": {"VAE": f"--objective SoftIntroVAE {TINY}"}}}},
        "share",
        reason="rows of two sections share a folder: the second shows the first's result",
        id="sections-share-a-folder",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("content", "said"), REFUSED)
def test_what_is_wrong_in_a_file_is_said_in_one_line(tmp_path: Path, refused: Refused, content: Any, said: str) -> None:
    path, out = written(tmp_path, content), tmp_path / "out"
    line = refused("compare", "--recipe", path, "--dry-run", "--out", out)
    assert re.search(said, line), line
    if "density:nope" not in str(content) and "-1]" not in json.dumps(content):
        assert path in line
    assert not out.exists()


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\x00", b"\x00"])
def test_a_file_that_is_no_yaml_is_said_in_one_line(tmp_path: Path, command: Command, content: bytes) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(content)
    said = command("compare", "--recipe", path, "--out", tmp_path / "out")
    assert said.code == 2
    assert one_line(said.err), said.err
    assert f"{path} cannot be read" in said.err


def test_rows_take_the_words_of_fit_as_fit_does(tmp_path: Path) -> None:
    rows = {"a": "--recipe none --objective VAE --batch_size 32"}
    assert from_file(written(tmp_path, broken({**SECTION, "rows": rows}))).cells[0].config(0).batch_size == 32


@pytest.mark.parametrize("words", ["--batch-size 32", "--recipe=none --batch_size 32"])
def test_rows_take_options_in_all_spellings_of_fit(tmp_path: Path, words: str) -> None:
    plan = from_file(written(tmp_path, broken({**SECTION, "rows": {"a": words}})))
    assert plan.cells[0].config(0).batch_size == 32


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--objectives"),
        (["--objectives", "VAE", "--data", ""], "--data"),
        (["--objectives", "GAN"], "unknown objective 'GAN'"),
        (["--objectives", "VAE", "--seeds", "0"], "seeds is 0"),
        (["--objectives", "VAE", "--seeds", "x"], "--seeds"),
        (["--objectives", "VAE", "--workers", "0"], "workers is 0"),
        (["--objectives", "VAE", "--hours", "-1"], "hours is -1"),
        (["--objectives", "VAE", "--seed", "3"], "--seed is set by compare"),
        (["--objectives", "VAE", "--resume", "x"], "--resume"),
        (["--objectives", "VAE", "--evaluate"], "--evaluate"),
        (["--objectives", "VAE", "--quiet"], "--quiet"),
        (["--objectives", "VAE", "--stepz", "3"], "stepz"),
        (["--recipe", "nope"], "table-2d"),
        (["--recipe", "table-2d", "--objectives", "VAE"], "either"),
        (["--recipe", "table-2d", "--steps", "3"], "either"),
        (["some/run", "--objectives", "VAE"], "either"),
        (["no/run"], "no run at no/run"),
        (["--objectives", "VAE", "--known", "nowhere.json"], "comparison.json"),
        (["--objectives", "VAE", "--data", "density:nope"], "'nope'"),
    ],
)
def test_words_that_will_not_do_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused("compare", *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"sections": [{"key": "comparison"}]}', '{"sections": 3}'])
def test_known_results_that_are_none_are_refused(tmp_path: Path, refused: Refused, text: str) -> None:
    known, out = tmp_path / "known.json", tmp_path / "out"
    known.write_text(text)
    words = ["--objectives", "VAE", "--data", "density:rings", "--steps", "3", "--dry-run", "--out", out]
    assert "comparison.json" in refused("compare", *words, "--known", known)


def test_an_objective_among_the_settings_is_refused(tmp_path: Path, refused: Refused) -> None:
    words = ["--objectives", "VAE,SoftIntroVAE", "--data", "density:rings", "--objective", "IntroVAE"]
    refused("compare", *words, "--dry-run", "--out", tmp_path)


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path, refused: Refused, here: Here) -> None:
    (tmp_path / "file").touch()
    words = ["--objectives", "VAE", "--data", "density:rings", "--steps", "3", "--hours", "1e-4"]
    assert "file" in refused("compare", *words, "--out", tmp_path / "file")


# --- a comparison from its first word to its tables


@dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    returncode: int
    err: str

    def poll(self) -> int:
        return self.returncode

    def communicate(self) -> tuple[str, str]:
        return "", self.err


class Here:
    """In the place of `subprocess.Popen`: the same command in this process, which spares torch's import."""

    def __init__(self) -> None:
        self.words: list[list[str]] = []

    def __getitem__(self, _: Any) -> Here:  # Popen[str]
        return self

    def __call__(self, words: Sequence[str], stderr: Any = None, **_: Any) -> Any:
        assert list(words[:3]) == [sys.executable, "-m", "introvae"]
        self.words.append(list(words[3:]))
        err = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            code = main(words[3:])
        if hasattr(stderr, "write"):
            stderr.write(err.getvalue().encode())
        return Ended(code, err.getvalue())


@contextlib.contextmanager
def in_this_process(full: bool = False) -> Iterator[Here]:
    """Runs are made here, one after the other, and measured with few points; `full` draws and takes the time too."""
    popen = Here()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            execute, "subprocess", SimpleNamespace(Popen=popen, DEVNULL=-3, PIPE=-1, TimeoutExpired=TimeoutError)
        )
        patch.setattr(execute, "time", SimpleNamespace(sleep=lambda seconds: None, perf_counter=time.perf_counter))
        for name in ("POINTS", "NATS_POINTS", "ENERGY_POINTS", "GNELBO_POINTS"):
            patch.setattr(measures, name, 512)
        patch.setattr(loop, "preview", lambda *_: None)  # the runs' own pictures are tested elsewhere
        patch.setattr(evaluation, "_draw", lambda *_: {"pictures": {}})
        if not full:
            patch.setattr(comparison, "_draw", lambda *_: [])
            patch.setattr(execute, "_step_seconds", lambda trainer: (0.01, 0.02))
        yield popen


@pytest.fixture
def here() -> Iterator[Here]:
    with in_this_process() as popen:
        yield popen


@dataclass
class Compared:
    """A comparison on disk, and what its command printed and ran."""

    out: Path
    printed: str
    ran: list[list[str]]

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.out / "comparison.json").read_text())

    @property
    def cells(self) -> list[dict[str, Any]]:
        return [cell for section in self.result["sections"] for cell in section["cells"]]

    @property
    def table(self) -> str:
        return (self.out / "comparison.md").read_text()

    def runs_of(self, cell: dict[str, Any]) -> list[Run]:
        name = f"{cell['data'].removeprefix('density:')}--{cell['label'].lower()}"
        return [Run(self.out / "runs" / "comparison" / f"{name}--{seed}") for seed in (0, 1)]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """Two objectives on two densities with two seeds; not to be changed."""
    out = tmp_path_factory.mktemp("compared") / "out"
    said = io.StringIO()
    with in_this_process(full=True) as popen, contextlib.redirect_stdout(said):
        assert call(*WORDS, "--out", out) == 0
    return Compared(out, said.getvalue(), popen.words)


@pytest.fixture
def copied(compared: Compared, tmp_path: Path) -> Compared:
    """A copy, to be changed."""
    shutil.copytree(compared.out, tmp_path / "out")
    return Compared(tmp_path / "out", "", [])


def weights(run: Run) -> bytes:
    return (run.model_folder / "model.safetensors").read_bytes()


def test_every_run_is_made_once_with_its_own_settings(compared: Compared) -> None:
    assert len(compared.ran) == 8
    assert all(words[0] == "fit" and "--evaluate" in words for words in compared.ran)
    assert [(cell["data"], cell["label"]) for cell in compared.cells] == [(d, o) for d in DATA for o in OBJECTIVES]
    seen = set()
    for cell in compared.cells:
        for seed, run in enumerate(compared.runs_of(cell)):
            config = run.config()
            found = (config.data, type(config.objective).__name__, config.seed, config.steps, config.network)
            assert found == (cell["data"], cell["label"], seed, 12, "tiny-mlp")
            seen.add(weights(run))
    assert len(seen) == 8
    assert {path.parent.parent.parent for path in compared.out.glob("runs/*/*/config.yaml")} == {compared.out / "runs"}


def test_means_and_spreads_are_those_of_the_runs_reports(compared: Compared) -> None:
    for cell in compared.cells:
        reports = [run.report() for run in compared.runs_of(cell)]
        assert (cell["done"], cell["failed"], cell["not_run"], cell["cost_seconds"]) == (2, 0, 0, 0)
        own = {"gap_training_mode"} | ({"adversary_awake"} if cell["label"] != "VAE" else set())
        assert cell["metrics"].keys() == reports[0]["metrics"].keys() | own
        assert len(cell["metrics"]) >= 5
        for name, spread in cell["metrics"].items():
            if name in own:
                continue
            values = np.array([report["metrics"][name]["value"] for report in reports], np.float64)
            assert spread["mean"] == pytest.approx(values.mean(), rel=1e-12)
            assert spread["std"] == pytest.approx(values.std(ddof=1), rel=1e-9, abs=1e-15)
            assert spread["n"] == 2
            floors = [r["metrics"][name]["floor"] for r in reports if "floor" in r["metrics"][name]]
            assert (name in cell["floors"]) == bool(floors)
            if floors:
                assert cell["floors"][name] == pytest.approx(np.mean(floors))
        assert cell["seconds"]["mean"] == pytest.approx(np.mean([report["training_seconds"] for report in reports]))
        assert [run["seed"] for run in cell["runs"]] == [0, 1]
        for run, folder in zip(cell["runs"], compared.runs_of(cell), strict=True):
            assert run["status"] == "done"
            assert run["last"]["rec"] == folder.log()[-1]["rec"]
            assert ("guard" in run) == bool(folder.events("guard"))


def test_how_long_the_adversary_was_awake_and_how_far_training_mode_differs(tmp_path: Path) -> None:
    kls = [(9.0, 1.0, 1.0)] * 5 + [(2.0, 1.9, 2.1), (2.0, 3.0, 3.0), (2.0, 1.0, 2.0), (2.0, 2.1, 2.1), (2.0, 0.0, 5.0)]
    names = ("kl_real", "kl_reconstruction", "kl_sample")
    rows = [
        {"step": step, "phase": "train", **dict(zip(names, values, strict=True))} for step, values in enumerate(kls, 1)
    ]
    run = Run(tmp_path)
    run.log_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    variants = {
        "training mode": {"psnr_db": {"gap": -0.3}, "mse": {"gap": 0.1}, "modes": {"value": 1.0}},
        "raw weights": {"psnr_db": {"gap": 9.0}},
    }
    report: dict[str, Any] = {"training_seconds": 1.0, "machine": {}, "metrics": {}, "variants": variants}
    run.report_path.write_text(json.dumps(report))
    config = FitConfig(data="digits", objective=SoftIntroVAE())
    metrics = run_result(run, config, 0)["metrics"]
    assert metrics == {"adversary_awake": 0.8, "gap_training_mode": 0.3}  # a hair above or equal is awake
    report["variants"] = {"training mode": "not finite"}
    run.report_path.write_text(json.dumps(report))
    assert run_result(run, dataclasses.replace(config, objective=VAE()), 0)["metrics"] == {}


def test_a_mode_is_lost_where_fewer_are_found_than_there_are(compared: Compared) -> None:
    for cell in compared.cells:
        if cell["data"] == "density:rings":
            assert cell["lost_modes"] == 0
            assert not any("lost_modes" in run for run in cell["runs"])
        else:
            found = [run.report()["metrics"]["modes"]["value"] for run in compared.runs_of(cell)]
            assert cell["lost_modes"] == sum(modes < 8 for modes in found) == 2  # 12 steps find none


def rows_of(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    return [[word.strip() for word in line.strip("|").split("|")] for line in lines]


def test_the_tables_show_the_numbers(compared: Compared) -> None:
    assert "## comparison: density:rings" in compared.table
    assert "## comparison: density:8gaussians" in compared.table
    heads = [row for row in rows_of(compared.table) if row[1] == "runs"]
    assert heads[0] == ["", "runs", "KL", "JSD", "failed", "lost modes", "guard", "seconds"]
    assert heads[1] == ["", "runs", "KL", "JSD", "modes", "within 3 sigma", *heads[0][4:]]
    bodies = [row for row in rows_of(compared.table) if row[0] in OBJECTIVES]
    for row, cell in zip(bodies, compared.cells, strict=True):
        names = ["kl_soft_introvae", "jsd_soft_introvae"]
        names += ["modes", "share_within_3_sigma"] if cell["data"] == "density:8gaussians" else []
        reports = [run.report()["metrics"] for run in compared.runs_of(cell)]
        shown = []
        for name in names:
            values = [report[name]["value"] for report in reports]
            shown.append(f"{statistics.fmean(values):.3g} ± {statistics.stdev(values):.2g}")
        lost = "" if cell["data"] == "density:rings" else "2 of 2"
        assert row == [cell["label"], "2", *shown, "0 of 2", lost, f"{cell['changed']} of 2", row[-1]]
        assert float(row[-1]) == pytest.approx(cell["seconds"]["mean"], abs=0.5)
    floors = [row for row in rows_of(compared.table) if row[0] == "floor"]
    assert len(floors) == 2
    for row, cells in zip(floors, (compared.cells[:2], compared.cells[2:]), strict=True):
        assert float(row[2]) == pytest.approx(np.mean([c["floors"]["kl_soft_introvae"] for c in cells]), rel=0.01)


def test_the_terminal_shows_the_same_table(compared: Compared) -> None:
    shown = [re.split(r" {2,}", line.strip()) for line in compared.printed.splitlines()]
    for row in rows_of(compared.table):
        words = [word for word in row if word]
        if set("".join(words)) != {"-"}:
            assert words in shown, words
    assert compared.printed.count("done     ") == 8
    assert f"results  {compared.out / 'comparison.md'}" in compared.printed


def test_the_pictures_show_something(compared: Compared) -> None:
    names = compared.result["pictures"]
    kinds = ("gradients", "samples", "stability")
    assert set(names) == {f"comparison-{data}-{kind}.png" for data in ("rings", "8gaussians") for kind in kinds}
    assert len(names) == 6
    for name in names:
        assert f"]({name})" in compared.table
        pixels = np.asarray(Image.open(compared.out / name).convert("RGB"))
        assert min(pixels.shape[:2]) > 150
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
        assert (pixels != 255).any(axis=2).mean() > 0.01


def test_more_rows_than_fit_beside_one_another_go_on_below() -> None:
    logs = {
        f"row {n}": [[{"step": s, "phase": "train", "rec": n + s, "kl_real": n + 0.5 * s} for s in range(1, 9)]]
        for n in range(19)
    }
    figure = stability(logs)
    shown = [axis for axis in figure.axes if axis.axison]
    assert len(shown) == 2 * 19
    assert len(figure.axes) == 2 * 3 * 8
    for n in range(19):
        above, below = figure.axes[16 * (n // 8) + n % 8], figure.axes[16 * (n // 8) + 8 + n % 8]
        assert above.get_title() == f"row {n}"
        assert above.lines[0].get_ydata()[0] == n + 0.5
        assert below.lines[0].get_ydata()[0] == n + 1
    assert len({axis.get_ylim() for axis in shown}) == 2  # the same scale in all


def test_runs_on_images_are_shown_at_three_moments(tmp_path: Path) -> None:
    found = {}
    for label, shade in (("A", 40), ("B", 200)):
        for step in (10, 20, 30, 45, 100):
            path = tmp_path / f"{label}-{step}.png"
            Image.new("L", (60, 20), shade + step // 2).save(path)
            found.setdefault(label, []).append((step, path))
    figure = moments({**found, "C": found["A"][-1:], "D": []})  # C kept only its last, D none
    assert figure is not None
    titles = [f"{label}, step {step}" for label in "AB" for step in (20, 45, 100)]
    assert [axis.get_title() for axis in figure.axes] == [*titles, "", "", "C, step 100"]
    shown = [int(np.asarray(axis.images[0].get_array())[0, 0, 0]) for axis in figure.axes if axis.images]
    assert shown == [50, 62, 90, 210, 222, 250, 90]
    assert moments({"D": []}) is None


def test_moments_lie_after_the_warm_up(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.new("L", (8, 8)).save(path)
    figure = moments({"A": [(step, path) for step in range(100, 1100, 100)]}, warm=500)
    assert figure is not None
    assert [axis.get_title() for axis in figure.axes] == ["A, step 600", "A, step 700", "A, step 1,000"]


@pytest.mark.parametrize(
    ("steps", "warm", "shown"),
    [
        ([1000, 2000, 3000, 4000, 5000], 2400, [3000, 4000, 5000]),  # 2,920, 3,440 and 5,000 are meant
        ([1000, 2000, 3000], 2900, [1000, 2000, 3000]),
        ([1000, 2000], 0, [1000, 2000]),
        ([2000], 0, [2000]),
    ],
)
def test_no_picture_is_shown_twice(steps: list[int], warm: int, shown: list[int], tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.new("L", (8, 8)).save(path)
    figure = moments({"A": [(step, path) for step in steps]}, warm=warm)
    assert figure is not None
    assert [axis.get_title() for axis in figure.axes] == [f"A, step {step:,}" for step in shown]


@pytest.mark.parametrize(
    ("steps", "warmup"),
    [(5, 2), (12, 4), (400, 100), (1000, 0), (1500, 300), (1500, 1400), (5000, 2400), (20000, 4000)],
)
def test_pictures_lie_near_the_moments_that_are_meant(steps: int, warmup: int, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.new("L", (8, 8)).save(path)
    every = execute.picture_every(steps, warmup)
    drawn = [*range(every, steps, every), steps]
    assert 3 <= len(drawn) <= 61
    figure = moments({"A": [(step, path) for step in drawn]}, warmup)
    assert figure is not None
    shown = [int(axis.get_title().removeprefix("A, step ").replace(",", "")) for axis in figure.axes]
    meant = [warmup + share * (steps - warmup) for share in (0.2, 0.4, 1.0)]
    for step, wanted in zip(shown, meant, strict=True):
        assert abs(step - wanted) <= max(1, 0.13 * (steps - warmup), steps / 50)


LENGTHS = [*("--network", "tiny-mlp", "--latent_dim", "2", "--batch_size", "8"), "--lr-warmup", "0", "--log-every", "2"]


@pytest.mark.parametrize(
    ("more", "every"),
    [
        (["--steps", "20", "--warmup.steps", "5"], 3),
        (["--steps", "20", "--warmup.share", "0.5"], 2),
        (["--steps", "20", "--image-every", "8"], None),
        (["--steps", "20", "--image_every=1000"], None),
        (["--epochs", "1", "--warmup.share", "0"], 35),  # 1,437 of the 1,797 digits are trained on: 179 steps
    ],
)
def test_how_often_a_run_on_images_is_drawn_follows_from_its_length(
    more: list[str], every: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "_step_seconds", lambda trainer: (0.01, 0.02))
    (job,) = jobs(from_words(["SoftIntroVAE"], ["digits"], 1, [*LENGTHS, *more]), tmp_path)
    asked = job.config
    estimate([job], 1)
    assert job.image_every == every
    words = job.command()
    assert words.count("--image_every") == (every is not None)
    if every is not None:
        assert words[words.index("--image_every") + 1] == str(every)
    assert job.config is asked


@pytest.mark.parametrize("option", ["--recipe", "--settings"])
def test_a_file_that_says_how_often_a_run_is_drawn_is_followed(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "_step_seconds", lambda trainer: (0.01, 0.02))
    for name, content in (("silent", {"steps": 20}), ("told", {"steps": 20, "image_every": 1000})):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    rows = {name: f"--network tiny-mlp --warmup.share 0 {option} {tmp_path / name}.yaml" for name in ("silent", "told")}
    plan = from_file(written(tmp_path, {"sections": {"s": {"data": "digits", "rows": rows}}}))
    found = jobs(plan, tmp_path / "out")
    estimate(found, 1)
    assert [job.image_every for job in found] == [4, None]


def test_points_in_the_plane_are_drawn_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "_step_seconds", lambda trainer: (0.01, 0.02))
    (job,) = jobs(from_words(["SoftIntroVAE"], ["density:rings"], 1, LENGTHS), tmp_path)
    estimate([job], 1)
    assert "--image_every" not in job.command()
    assert job.config.image_every == 1000


def test_short_runs_on_images_show_three_moments_and_stay_the_same_runs(
    tmp_path: Path, command: Command, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first comparison is as it was made before compare chose how often a run is drawn."""
    shown = list[list[str]]()

    def drawn(folder: Path, plan: Comparison, every: Sequence[Job]) -> list[str]:
        figure = moments({job.cell.label: Run(job.folder).pictures() for job in every}, 5)
        shown.append([] if figure is None else [axis.get_title() for axis in figure.axes if axis.images])
        return []

    def pictured(model: Any, data: Any, path: Path, encodes: str) -> None:
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(path)

    monkeypatch.setattr(loop, "preview", pictured)
    monkeypatch.setattr(comparison, "_draw", drawn)
    words = ["compare", "--objectives", "VAE,SoftIntroVAE", "--data", "digits", "--seeds", "1", *LENGTHS]
    words += ["--steps", "20", "--warmup.steps", "5", "--checkpoint_every", "8"]
    old, new = tmp_path / "old", tmp_path / "new"
    with monkeypatch.context() as patch:
        patch.setattr(execute, "picture_every", lambda steps, warmup: FitConfig.image_every)
        assert command(*words, "--out", old).code == 0
    assert shown.pop() == ["VAE, step 20", "SoftIntroVAE, step 20"]
    made = len(here.words)
    finished, begun = (Run(old / "runs" / "comparison" / f"digits--{name}--0") for name in ("vae", "softintrovae"))
    begun.report_path.unlink()
    shutil.rmtree(begun.model_folder)
    list_checkpoints(begun.checkpoints)[-1].unlink()
    said = command(*words, "--out", old)
    assert (said.code, said.err) == (0, "")
    assert [words[:3] for words in here.words[made:]] == [["fit", "--resume", str(begun.folder)]]
    assert finished.config().image_every == 1000
    made = len(here.words)
    assert command(*words, "--out", new, "--known", old / "comparison.json").code == 0
    assert len(here.words) == made
    shown.clear()
    assert command(*words, "--out", new).code == 0
    assert len(here.words) == made + 2
    vae, soft = (f"VAE, step {s}" for s in (8, 12, 20)), (f"SoftIntroVAE, step {s}" for s in (9, 12, 20))
    assert shown == [[*vae, *soft]]
    runs = [Run(folder / "runs" / "comparison" / "digits--softintrovae--0") for folder in (old, new)]
    assert weights(runs[0]) == weights(runs[1])
    assert command("compare", *(run.folder for run in runs), "--out", tmp_path / "both").code == 0
    assert [cell["done"] for cell in Compared(tmp_path / "both", "", []).cells] == [2]  # one row


def test_a_run_s_pictures_have_their_steps(tmp_path: Path) -> None:
    run = fit(
        data="digits", network="tiny-mlp", latent_dim=2, steps=4, image_every=2, recipe="none", out=tmp_path / "r"
    )
    assert [(step, path.name) for step, path in run.pictures()] == [(2, "step_00000002.png"), (4, "final.png")]


def test_the_same_command_again_runs_nothing(copied: Compared, command: Command, here: Here) -> None:
    before, stamps = copied.result, [path.stat().st_mtime_ns for path in sorted(copied.out.glob("runs/**/*.*"))]
    said = command(*WORDS, "--out", copied.out)
    assert (said.code, said.err) == (0, "")
    assert here.words == []
    assert "8 runs: 8 are there, 0 to do now" in said.out
    assert copied.result["sections"] == before["sections"]
    assert [path.stat().st_mtime_ns for path in sorted(copied.out.glob("runs/**/*.*"))] == stamps


def test_runs_of_other_settings_in_the_folder_are_not_taken_for_these(
    copied: Compared, command: Command, here: Here
) -> None:
    said = command(*WORDS, "--lr", "0.05", "--hours", "1e-4", "--out", copied.out)
    for cell in copied.cells if said.code == 0 else []:
        assert cell["settings"]["lr"] == 0.05
        assert all(run["status"] == "not run" for run in cell["runs"]) or all(
            run.config().lr == 0.05 for run in copied.runs_of(cell)
        )


def test_partial_runs_are_gone_on_with(compared: Compared, copied: Compared, command: Command, here: Here) -> None:
    """One without its report, one at a checkpoint, one that is not there, and one whose folder is empty."""
    before = {cell["label"] + cell["data"]: cell["metrics"] for cell in copied.cells}
    (unmeasured, checkpointed), (gone, empty) = (copied.runs_of(cell) for cell in copied.cells[:2])
    unmeasured.report_path.unlink()
    checkpointed.report_path.unlink()
    shutil.rmtree(checkpointed.model_folder)
    list_checkpoints(checkpointed.checkpoints)[-1].unlink()
    assert [path.stem for path in list_checkpoints(checkpointed.checkpoints)] == ["step_00000008"]
    for run in (gone, empty):
        shutil.rmtree(run.folder)
    empty.folder.mkdir()
    said = command(*WORDS, "--out", copied.out)
    assert (said.code, said.err) == (0, "")
    assert "8 runs: 4 are there, 4 to do now" in said.out
    assert sorted((words[0], "--resume" in words) for words in here.words) == [
        ("evaluate", False),
        ("fit", False),
        ("fit", False),
        ("fit", True),
    ]
    for cell in copied.cells:
        assert cell["metrics"] == before[cell["label"] + cell["data"]]
        for ours, theirs in zip(copied.runs_of(cell), compared.runs_of(cell), strict=True):
            assert weights(ours) == weights(theirs)


def test_a_run_that_was_killed_before_its_first_checkpoint_is_begun_anew(
    copied: Compared, command: Command, here: Here
) -> None:
    run = copied.runs_of(copied.cells[0])[1]
    for path in (run.report_path, run.log_path, *list_checkpoints(run.checkpoints)):
        path.unlink()
    shutil.rmtree(run.model_folder)
    command(*WORDS, "--out", copied.out)
    assert copied.cells[0]["done"] == 2


def test_a_row_that_fails_does_not_stop_the_rest(tmp_path: Path, command: Command, here: Here) -> None:
    small = shlex.join([word.replace("-", "_") if word.startswith("--") else word for word in SMALL])
    small = small.replace("__", "--")
    rows = {"odd": f"--objective SoftIntroVAE {small} --lr 1e20", "plain": f"--objective VAE {small}"}
    path, out = written(tmp_path, broken({**SECTION, "rows": rows, "seeds": 2})), tmp_path / "out"
    said = command("compare", "--recipe", path, "--out", out)
    assert (said.code, said.err) == (0, "")
    odd, plain = Compared(out, "", []).cells
    assert (odd["done"], odd["failed"], odd["metrics"]) == (0, 2, {})
    assert (plain["done"], plain["failed"]) == (2, 0)
    for run in odd["runs"]:
        assert run["status"] == "failed"
        assert re.search(r"not finite at step \d+ of 12.*lr", run["reason"])
        assert f"FAILED   sec: odd on density:rings, seed {run['seed']}: {run['reason']}" in said.out
        assert f"- odd on density:rings, seed {run['seed']}: {run['reason']}" in (out / "comparison.md").read_text()
    (row,) = [row for row in rows_of((out / "comparison.md").read_text()) if row[0] == "odd"]
    assert row == ["odd", "0", "", "", "2 of 2", "", "0 of 2", ""]
    first = here.words[:]
    assert len(first) == 4
    again = command("compare", "--recipe", path, "--out", out)
    assert (again.code, here.words) == (0, first)  # failed stays failed
    shutil.rmtree(out / "runs" / "sec" / "rings--odd--1")
    command("compare", "--recipe", path, "--out", out)
    assert len(here.words) == 5


def test_what_does_not_fit_into_the_hours_is_told_with_its_cost(tmp_path: Path, command: Command, here: Here) -> None:
    out = tmp_path / "out"
    said = command(*WORDS, "--hours", "0.0001", "--out", out)
    assert (said.code, said.err, here.words) == (0, "", [])
    found = Compared(out, said.out, [])
    assert not (out / "runs").exists() or not list((out / "runs").rglob("config.yaml"))
    for cell in found.cells:
        assert (cell["not_run"], cell["done"], cell["metrics"]) == (2, 0, {})
        assert [run["status"] for run in cell["runs"]] == ["not run"] * 2
        assert all(8 <= run["cost_seconds"] < 60 for run in cell["runs"])
        assert cell["cost_seconds"] == sum(run["cost_seconds"] for run in cell["runs"])
        cost = f"not run, about {cell['cost_seconds'] / 60:.0f} min"
        assert [cell["label"], cost] in [row[:2] for row in rows_of(found.table)]
    assert found.result["pictures"] == []


def test_a_dry_run_writes_nothing(tmp_path: Path, command: Command, here: Here) -> None:
    out = tmp_path / "out"
    said = command(*WORDS, "--out", out, "--dry-run", "--workers", 2)
    assert (said.code, said.err, here.words) == (0, "", [])
    assert not out.exists()
    assert "8 runs: 0 are there, 8 to do now" in said.out
    assert "2 at a time with 1 threads each" in said.out
    assert "results" not in said.out


def test_known_results_are_taken_where_settings_are_equal(
    compared: Compared, tmp_path: Path, command: Command, here: Here
) -> None:
    words = [*WORDS, "--known", compared.out / "comparison.json", "--hours", "0.0001"]
    taken = Compared(tmp_path / "same", "", [])
    assert command(*words, "--out", taken.out).code == 0
    assert [cell["runs"] for cell in taken.cells] == [cell["runs"] for cell in compared.cells]
    assert [cell["metrics"] for cell in taken.cells] == [cell["metrics"] for cell in compared.cells]
    other = Compared(tmp_path / "other", "", [])
    assert command(*words, "--lr", "0.01", "--out", other.out).code == 0
    assert [cell["not_run"] for cell in other.cells] == [2] * 4
    assert command(*words, "--seeds", 3, "--objectives", "SoftIntroVAE,VAE", "--out", other.out).code == 0
    assert [(cell["label"], cell["done"], cell["not_run"]) for cell in other.cells] == [
        (objective, 2, 1) for _ in DATA for objective in ("SoftIntroVAE", "VAE")
    ]
    assert here.words == []
    assert ["VAE", "2 of 3"] in [row[:2] for row in rows_of(other.table)]


def test_a_row_can_be_run_again_by_its_command(tmp_path: Path) -> None:
    plan = from_words(["VAE"], ["density:rings"], 1, ["--steps", "5", "--lr", "0.01"])
    (cell,) = collect(plan, jobs(plan, tmp_path))["sections"][0]["cells"]
    assert cell["command"] == "introvae fit --data density:rings --objective VAE --steps 5 --lr 0.01"


def test_a_row_s_command_keeps_its_quotes(tmp_path: Path) -> None:
    words = ["--objective", "VAE", "--network_options", '{"hidden": 8, "depth": 1}']
    plan = from_words(["VAE"], ["density:rings"], 1, words[2:])
    (cell,) = collect(plan, jobs(plan, tmp_path))["sections"][0]["cells"]
    assert shlex.split(cell["command"]) == ["introvae", "fit", "--data", "density:rings", *words]


def test_a_metric_that_is_infinite_does_not_cost_the_table(copied: Compared, command: Command, here: Here) -> None:
    path = copied.runs_of(copied.cells[0])[0].report_path
    report = json.loads(path.read_text())
    report["metrics"]["kl_nats"]["value"] = math.inf
    path.write_text(json.dumps(report))
    assert command(*WORDS, "--out", copied.out).code == 0


# --- finished runs


@pytest.fixture(scope="module")
def other_rate(compared: Compared, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that differs from the comparison's Soft-IntroVAE runs on the rings in its rate; not measured."""
    run = Run(tmp_path_factory.mktemp("other") / "run")
    recipe = compared.runs_of(compared.cells[1])[0].config_path
    with contextlib.redirect_stdout(io.StringIO()):
        assert call("fit", "--recipe", recipe, "--lr", "0.004", "--seed", 9, "--quiet", "--out", run.folder) == 0
    return run


def test_finished_runs_are_put_into_rows_by_their_settings(
    compared: Compared, other_rate: Run, tmp_path: Path, command: Command, here: Here
) -> None:
    vae, soft = compared.runs_of(compared.cells[0]), compared.runs_of(compared.cells[1])
    elsewhere = compared.runs_of(compared.cells[3])[0]
    out = tmp_path / "out"
    runs = [run.folder for run in (soft[0], elsewhere, vae[1], other_rate, soft[1], vae[0])]
    said = command("compare", *runs, "--out", out)
    assert (said.code, said.err) == (0, "")
    assert here.words == []  # nothing is trained
    assert f"measuring {other_rate.folder}" in said.out
    assert other_rate.report_path.is_file()
    rate = soft[0].config().lr
    found = {(cell["data"], cell["label"]): cell for cell in Compared(out, "", []).cells}
    assert {key: cell["done"] for key, cell in found.items()} == {
        ("density:8gaussians", "SoftIntroVAE"): 1,
        ("density:rings", "SoftIntroVAE, lr 0.004"): 1,
        ("density:rings", f"SoftIntroVAE, lr {rate}"): 2,
        ("density:rings", "VAE"): 2,
    }
    ours, theirs = found["density:rings", "VAE"], compared.cells[0]
    assert ours["metrics"] == theirs["metrics"]
    assert found["density:rings", "SoftIntroVAE, lr 0.004"]["runs"][0]["seed"] == 9
    assert "std" not in found["density:rings", "SoftIntroVAE, lr 0.004"]["metrics"]["kl_nats"]
    assert "SoftIntroVAE, lr 0.004" in said.out


def test_labels_name_what_differs_from_runs_of_the_same_objective_and_data() -> None:
    def config(*words: str) -> Any:
        return Cell("s", "density:rings", "x", ("--data", "density:rings", "--recipe", "none", *words), (0,)).config(0)

    soft, slow = config("--objective", "SoftIntroVAE"), config("--objective", "SoftIntroVAE", "--lr", "0.001")
    wide = config("--objective", "SoftIntroVAE", "--objective.beta_neg", "9", "--latent_dim", "3")
    seeded, vae = config("--objective", "SoftIntroVAE", "--seed", "5"), config("--objective", "VAE", "--lr", "0.5")
    assert labels_of([soft, vae, seeded]) == ["SoftIntroVAE", "VAE", "SoftIntroVAE"]
    assert labels_of([soft, slow, vae]) == ["SoftIntroVAE, lr 0.0002", "SoftIntroVAE, lr 0.001", "VAE"]
    assert labels_of([soft, wide]) == [
        "SoftIntroVAE, beta_neg 256.0, latent_dim None",
        "SoftIntroVAE, beta_neg 9.0, latent_dim 3",
    ]


def test_a_run_that_is_not_finished_is_named(copied: Compared, tmp_path: Path, refused: Refused) -> None:
    run = copied.runs_of(copied.cells[0])[0]
    shutil.rmtree(run.model_folder)
    assert f"--resume {run.folder}" in refused("compare", run.folder, "--out", tmp_path / "table")


def test_a_dry_run_of_finished_runs_writes_nothing(compared: Compared, tmp_path: Path, command: Command) -> None:
    folders = [run.folder for run in compared.runs_of(compared.cells[0])]
    command("compare", *folders, "--dry-run", "--out", tmp_path / "table")
    assert not (tmp_path / "table").exists()


def test_settings_for_finished_runs_are_refused(compared: Compared, tmp_path: Path, refused: Refused) -> None:
    folders = [run.folder for run in compared.runs_of(compared.cells[0])]
    refused("compare", *folders, "--steps", 50, "--out", tmp_path / "table")


# --- tables of hand-made results


def test_a_table_of_hand_made_cells() -> None:
    done = {"status": "done", "lost_modes": True}
    event = {"step": 1200, "cause": "it was wrong", "change": "lr lowered", "attempt": 1}
    cell = {
        "data": "density:8gaussians",
        "label": "A",
        "runs": [
            {**done, "seed": 0},
            {"status": "failed", "seed": 1, "reason": "it was odd"},
            {**done, "seed": 2, "guard": [event]},
        ],
        "done": 2,
        "failed": 1,
        "changed": 1,
        "lost_modes": 2,
        "not_run": 0,
        "cost_seconds": 0,
        "seconds": {"mean": 61.6, "n": 2, "std": 1.0},
        "metrics": {"modes": {"mean": 7.5, "n": 2, "std": 0.7071}, "kl_soft_introvae": {"mean": 0.12345, "n": 1}},
        "floors": {"modes": 8.0},
    }
    waiting = {**cell, "label": "B", "runs": [{"status": "not run", "seed": 0, "cost_seconds": 125}], "not_run": 1}
    waiting |= {"cost_seconds": 125, "metrics": {}, "floors": {}, "seconds": {}, "done": 0}
    result = {
        "title": "T",
        "date": "2024-01-01",
        "machine": {"processor": "p"},
        "sections": [{"key": "s", "title": "S", "note": "N.", "cells": [cell, waiting]}],
    }
    markdown = to_markdown(result, ["a.png"])
    assert rows_of(markdown) == [
        ["", "runs", "KL", "modes", "failed", "lost modes", "guard", "seconds"],
        ["A", "2", "0.123", "7.5 ± 0.71", "1 of 3", "2 of 2", "1 of 3", "62"],
        ["B", "not run, about 2 min", "", "", "", "", "", ""],
        ["floor", "", "", "8", "", "", "", ""],
    ]
    assert "N." in markdown
    assert "- A on density:8gaussians, seed 1: it was odd" in markdown
    assert "- S, A on density:8gaussians, seed 2, step 1,200: it was wrong; lr lowered" in markdown
    assert "![a](a.png)" in markdown
    text = to_text(result)
    assert text.startswith("S: density:8gaussians\nN.\n")
    assert len({len(line[: line.index("2 of 2")]) for line in text.splitlines() if "2 of 2" in line}) == 1


def test_a_table_says_whether_the_published_order_holds() -> None:
    distances = {"A": 3.0, "B": 1.0, "C": 2.0, "D": 0.5}
    cells = [{"label": label, "metrics": {"frechet_mnist": {"mean": mean}}} for label, mean in distances.items()]
    cells.append({"label": "E", "metrics": {}})
    assert verdict(cells, ["B", "C", "E", "A"]) == (
        "The published order of Fréchet (mnist), B, C, A, holds: B 1, C 2, A 3."
    )
    assert "A, B, does not hold: B 1, A 3" in verdict(cells, ["A", "B"])
    assert verdict(cells, []) == verdict(cells, ["A", "E"]) == ""


# --- what it costs


def test_the_cost_is_that_of_the_steps_that_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm-up step takes 1 second here, another one 3."""
    monkeypatch.setattr(execute, "_step_seconds", lambda trainer: (1.0, 3.0))
    words = ["--steps", "100", "--network", "tiny-mlp"]
    soft = jobs(from_words(["SoftIntroVAE"], ["density:rings"], 2, [*words, "--warmup.share", "0.1"]), tmp_path)
    vae = jobs(from_words(["VAE"], ["density:rings"], 1, words), tmp_path)
    (soft[1].folder / "checkpoints").mkdir(parents=True)
    (soft[1].folder / "checkpoints" / "step_00000050.pt").touch()
    found = estimate([*soft, *vae], 1)
    assert found[soft[0]] - execute.EVALUATION_SECONDS == pytest.approx(10 * 1 + 90 * 3)
    assert found[soft[1]] - execute.EVALUATION_SECONDS == pytest.approx((10 * 1 + 90 * 3) / 2)
    assert found[vae[0]] - execute.EVALUATION_SECONDS == pytest.approx(100 * 3)


@pytest.mark.parametrize(("length", "steps"), [([], 10_000), (["--epochs", "2", "--batch_size", "64"], 2 * 22)])
def test_the_cost_of_epochs_and_of_the_default_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: list[str], steps: int
) -> None:
    monkeypatch.setattr(execute, "_step_seconds", lambda trainer: (1.0, 3.0))
    (job,) = jobs(from_words(["IntroVAE"], ["digits"], 1, [*length, "--network", "tiny-mlp"]), tmp_path)
    assert estimate([job], 1)[job] - execute.IMAGES_SECONDS == pytest.approx(3 * steps)


def test_runs_whose_data_are_not_there_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(execute, "_step_seconds", lambda trainer: (1.0, 3.0))
    here, gone = (
        jobs(from_words(["VAE", "SoftIntroVAE"], [data], 1, ["--steps", "3", "--network", "tiny-mlp"]), tmp_path)
        for data in ("density:rings", str(tmp_path / "nowhere"))
    )
    with caplog.at_level("WARNING", "introvae"):
        assert list(estimate([*gone, *here], 1)) == here
    assert f"left out: VAE on {tmp_path}/nowhere: unknown data" in caplog.text
    with pytest.raises(DataError, match="nowhere"):
        estimate(gone, 1)


@pytest.mark.parametrize("name", sorted({*list_comparisons()} - {"table-2d"}))  # hundreds of rows with one network
def test_every_row_of_the_comparisons_that_come_with_the_package_builds_its_networks(name: str) -> None:
    """Of the shape that the row gives, or its data have."""
    built = set()
    for cell in from_file(name).cells:
        config = cell.config(0)
        shape = (1, 28, 28) if cell.data in ("mnist", "fashion-mnist") else (2,)
        if config.size and config.channels:
            shape = (config.channels, config.size, config.size)
        network = network_for(shape) if config.network == "auto" else config.network
        kind = (network, shape, config.latent_dim, str(config.network_options))
        if kind not in built:
            built.add(kind)
            encoder, decoder = build_network(network, shape, config.latent_dim or 2, config.network_options)
            assert decoder(encoder(torch.rand(2, *shape))[0]).shape == (2, *shape), cell


def test_rows_without_a_recipe_beside_ones_with_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "introvae"):
        from_words(["VAE", "SoftIntroVAE"], ["pictures"], 1)
        from_words(["AGE", "WGANGP"], ["pictures"], 1)
    assert not caplog.records
    with caplog.at_level("WARNING", "introvae"):
        from_words(["VAE", "AGE"], ["pictures"], 1)
    assert "pictures: no recommended recipe for AGE" in caplog.text


def test_the_baseline_of_mnist_is_the_row_of_the_comparison() -> None:
    (row, *_) = [cell for cell in from_file("images").cells if (cell.section, cell.label) == ("mnist", "WGAN-GP")]
    assert row.config(0) == load_config(recipe_path("mnist-wgangp"))


def test_the_first_runs_that_fit_into_the_hours_are_chosen(tmp_path: Path) -> None:
    found = jobs(from_words(["VAE"], ["density:rings"], 4, ["--steps", "3"]), tmp_path)
    times = dict(zip(found, (3600.0, 1800.0, 3600.0, 1.0), strict=True))
    assert within(times, None, 1) == found
    assert within(times, 0.9, 1) == []
    assert within(times, 1.0, 1) == found[:1]
    assert within(times, 1.6, 1) == found[:2]  # the last one would fit, but comes after one that does not
    assert within(times, 1.25, 2) == found[:3]
    assert within(times, 10, 1) == found


# --- processes


@dataclass(eq=False)
class Script(Job):
    """A run whose process is a few lines of Python, which start at once."""

    text: str = ""

    def command(self) -> list[str]:
        return ["-c", self.text, str(self.folder)]


def scripts(tmp_path: Path, *texts: str) -> list[Script]:
    found = jobs(from_words(["VAE"], ["density:rings"], len(texts), ["--steps", "3"]), tmp_path)
    return [Script(j.cell, j.seed, j.folder, j.config, text) for j, text in zip(found, texts, strict=True)]


def test_processes_end_in_their_own_ways(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "introvae")
    say = "import sys; print('noise', file=sys.stderr); print('introvae: it was odd: mend it', file=sys.stderr); "
    texts = ["", say + "sys.exit(2)", "raise KeyError(3)", "import os; os.kill(os.getpid(), 9)", ""]
    its = scripts(tmp_path, *texts)
    ended = []
    run_all(its, 2, 1, lambda: ended.append(len(ended)))
    assert len(ended) == 5
    assert (its[1].folder / FAILURE).read_text() == "it was odd: mend it\n"
    assert [job.status for job in its] == ["new", "failed", "new", "new", "new"]  # a crash is tried again
    assert caplog.text.count("done     ") == 2
    assert "seed 1: it was odd: mend it" in caplog.text
    assert "seed 2: KeyError: 3" in caplog.text
    assert "seed 3: exit code -9" in caplog.text


def test_a_run_that_was_stopped_and_saved_its_state_has_not_failed(tmp_path: Path) -> None:
    said = "introvae: stopped after step 5 of 9, state saved: go on with introvae fit --resume x"
    (job,) = scripts(tmp_path, f"import sys; print({said!r}, file=sys.stderr); sys.exit(2)")
    run_all([job], 1, 1, lambda: None)
    assert job.status != "failed"


SAVING = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1]); folder.mkdir(parents=True, exist_ok=True)
told = []
def handle(number, frame):
    told.append(number)
    if len(told) > 1:
        os._exit(1)
signal.signal(signal.SIGTERM, handle); signal.signal(signal.SIGINT, handle)
(folder / "pid.tmp").write_text(str(os.getpid())); os.rename(folder / "pid.tmp", folder / "pid")
while not told:
    time.sleep(0.01)
end = time.monotonic() + 0.4
while time.monotonic() < end:
    time.sleep(0.01)
(folder / "saved").write_text("state")
sys.exit(2)
"""
"""A run's process as far as signals go: the first makes it save its state, which takes a while, the second ends it."""


def pids(its: Sequence[Script]) -> list[int]:
    """Of the processes, once all have begun."""
    deadline = time.monotonic() + 20
    while not all((job.folder / "pid").exists() for job in its):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return [int((job.folder / "pid").read_text()) for job in its]


def told(its: Sequence[Script], how: Callable[[list[int]], None]) -> tuple[list[int], list[str]]:
    """Run these, tell them to end when all have begun; their process ids, and what was left open."""
    found: list[int] = []

    def tell() -> None:
        found.extend(pids(its))
        how(found)

    thread = threading.Thread(target=tell)
    thread.start()
    with warnings.catch_warnings(record=True) as left:
        warnings.simplefilter("always")
        try:
            with pytest.raises(InterruptedRunError, match="2 runs saved their state: give the same command again"):
                run_all([*its, *scripts(its[0].folder / "never", SAVING)], 2, 1, lambda: None)
        finally:
            thread.join()
        gc.collect()
    return found, [str(warning.message) for warning in left]


def test_a_termination_signal_lets_the_runs_save_their_state(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    its = scripts(tmp_path, SAVING, SAVING)
    found, _ = told(its, lambda found: os.kill(os.getpid(), signal.SIGTERM))
    assert all((job.folder / "saved").exists() for job in its)
    assert not any(psutil.pid_exists(pid) for pid in found)
    assert all(job.status == "new" for job in its)  # not failed
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_while_a_process_is_being_started_tells_that_one_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    its = scripts(tmp_path, SAVING, SAVING)
    start, begun = subprocess.Popen.__init__, []

    def slow(process: Any, *args: Any, **kwargs: Any) -> None:
        start(process, *args, **kwargs)
        begun.append(process)
        if len(begun) == 2:
            pids(its)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)

    monkeypatch.setattr(subprocess.Popen, "__init__", slow)
    with pytest.raises(InterruptedRunError, match="2 runs saved"):
        run_all(its, 2, 1, lambda: None)
    assert all((job.folder / "saved").exists() for job in its)


def test_an_interruption_leaves_nothing_open(tmp_path: Path) -> None:
    _, left = told(scripts(tmp_path, SAVING, SAVING), lambda found: os.kill(os.getpid(), signal.SIGTERM))
    assert left == []


def test_ctrl_c_in_a_terminal_lets_the_runs_save_their_state(tmp_path: Path) -> None:
    def press(found: list[int]) -> None:
        for pid in found:
            if os.getpgid(pid) == os.getpgrp():  # a terminal tells the whole group
                os.kill(pid, signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    its = scripts(tmp_path, SAVING, SAVING)
    told(its, press)
    assert all((job.folder / "saved").exists() for job in its)


def test_a_second_signal_interrupts_at_once_and_what_is_ignored_stays_ignored() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with stop_on_signal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert not stop.is_set()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.wait(5)
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is before[signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_no_process_outlives_an_error(tmp_path: Path) -> None:
    its, found, outlived = scripts(tmp_path, SAVING, ""), [], []

    def full() -> None:
        found.extend(pids(its[:1]))
        raise OSError("no space left")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        with contextlib.suppress(OSError):
            run_all(its, 2, 1, full)
        gc.collect()
        for pid in found:
            try:
                psutil.Process(pid).wait(1)
            except psutil.NoSuchProcess:
                continue
            except psutil.TimeoutExpired:
                outlived.append(pid)
                psutil.Process(pid).kill()
                psutil.Process(pid).wait(10)
        subprocess._cleanup()  # what nobody waited for is kept there  # pyright: ignore
        gc.collect()
    assert found
    assert outlived == []


def test_compare_works_outside_the_main_thread(tmp_path: Path, here: Here) -> None:
    found: list[BaseException | dict[str, Any]] = []

    def work() -> None:
        try:
            words = ["--steps", "2", "--network", "tiny-mlp", "--image_every", "0"]
            found.append(compare(["VAE"], ["density:rings"], seeds=1, settings=words, out=tmp_path / "out"))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(found[0], dict), found


def test_a_comparison_that_was_stopped_is_completed_by_the_same_command(
    tmp_path: Path, command: Command, here: Here
) -> None:
    out = tmp_path / "out"
    words = ["compare", "--objectives", "VAE", "--data", "density:rings", "--seeds", 1, "--workers", 1, "--out", out]
    words += ["--network", "tiny-mlp", "--batch-size", 16, "--steps", 1500, "--log-every", 10, "--checkpoint-every", 0]
    words += ["--image-every", 0]
    run = Run(out / "runs" / "comparison" / "rings--vae--0")
    pinned = "import os, sys; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
    start = "from introvae.cli import main; sys.exit(main(sys.argv[1:]))"
    started = [sys.executable, "-c", pinned + start, *map(str, words)]
    with subprocess.Popen(started, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as parent:
        try:
            deadline = time.monotonic() + 60
            while not run.log():
                assert parent.poll() is None, parent.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            children = psutil.Process(parent.pid).children()
            parent.send_signal(signal.SIGTERM)
            err = parent.communicate(timeout=60)[1]
        finally:
            parent.kill()
    assert parent.returncode == 2
    assert re.fullmatch(r"introvae: interrupted, 1 runs saved their state: give the same command again to go on\n", err)
    assert len(children) == 1
    assert not any(child.is_running() for child in children)
    stopped = torch.load(list_checkpoints(run.checkpoints)[-1], weights_only=True)["step"]
    assert 0 < stopped < 1500
    assert not run.model_folder.exists()
    assert json.loads((out / "comparison.json").read_text())["sections"][0]["cells"][0]["not_run"] == 1
    said = command(*words)
    assert (said.code, said.err) == (0, "")
    assert here.words == [["fit", "--resume", str(run.folder), "--evaluate", "--quiet"]]
    assert json.loads((out / "comparison.json").read_text())["sections"][0]["cells"][0]["done"] == 1
    assert [row["step"] for row in run.log()] == list(range(10, 1501, 10))


def test_from_python_the_result_is_what_stands_in_the_file(compared: Compared, copied: Compared, here: Here) -> None:
    settings = [word if not word.startswith("--") else "--" + word[2:].replace("-", "_") for word in SMALL]
    found = compare(OBJECTIVES, DATA, seeds=2, settings=settings, out=copied.out)
    assert json.loads(json.dumps(found)) == copied.result
    assert [cell["metrics"] for cell in copied.cells] == [cell["metrics"] for cell in compared.cells]
    with pytest.raises(ConfigError, match="either"):
        compare(["VAE"], runs=[copied.out])


def test_two_comparisons_do_not_share_a_folder(tmp_path: Path, here: Here, refused: Refused) -> None:
    fcntl = pytest.importorskip("fcntl")
    words = ["compare", "--objectives", "VAE", "--data", "density:rings", "--steps", "2", "--network", "tiny-mlp"]
    out = tmp_path / "out"
    out.mkdir()
    with open(out / ".running", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another comparison" in refused(*words, "--seeds", "1", "--out", out)
    assert here.words == []
    assert call(*words, "--seeds", "1", "--out", out) == 0  # as soon as it is free
    assert len(here.words) == 1


def test_a_process_that_died_is_told_and_tried_again(tmp_path: Path) -> None:
    (job,) = scripts(tmp_path, "import os; os.kill(os.getpid(), 9)")
    run_all([job], 1, 1, lambda: None)
    assert job.status == "new"
    plan = from_words(["VAE"], ["density:rings"], 1, ["--steps", "3"])
    result = collect(plan, jobs(plan, tmp_path))
    (run,) = result["sections"][0]["cells"][0]["runs"]
    assert (run["status"], run["crashed"]) == ("not run", "exit code -9")
    assert "seed 0: exit code -9" in to_markdown(result)
    (again,) = scripts(tmp_path, "")
    run_all([again], 1, 1, lambda: None)
    assert "crashed" not in collect(plan, jobs(plan, tmp_path))["sections"][0]["cells"][0]["runs"][0]
