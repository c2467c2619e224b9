"""The page of an evaluated run: complete, right, of one file, and fit to be looked at and printed."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from introvae import ConfigError, IntrospectiveVAE, Run, evaluate, fit, from_array
from introvae.data import ArrayData, Part, load_data, preparation_from
from introvae.measures import ACTIVE_VARIANCE, METRICS, measure, metrics_in
from introvae.metrics.features import values
from introvae.metrics.frechet import GaussianStatistics, frechet_distance
from introvae.report import figures
from introvae.report.page import CAPTIONS, MEANING, number, render
from introvae.training.curves import curves
from unprepared import USED, write_odd_files

ODD_NAME = "<b>&.png"
KINDS = ("digits", "folder", "table", "plane", "vectors")
IMAGES = {"overview", "samples", "neighbours", "ranked", "interpolation", "errors", "latent", "curves"}
PICTURES = {
    "digits": IMAGES,
    "folder": IMAGES,
    "table": {"columns", "errors", "latent", "curves"},
    "vectors": {"columns", "errors", "latent", "curves"},
    "plane": {"overview", "curves"},
}
VECTOR_METRICS = {"mse", "kl_real_nats", "active_units", "kl_aggregate_nats", "frechet_values"}
IMAGE_METRICS = {
    *("mse", "psnr_db", "ssim", "kl_real_nats", "active_units", "kl_aggregate_nats"),
    *("frechet_thumb", *metrics_in("randconv"), "msssim_pairs"),
}
PIXEL_METRICS = {"precision_pixels", "recall_pixels", "density_pixels", "coverage_pixels"}
METRICS_OF = {
    "digits": {*IMAGE_METRICS, *PIXEL_METRICS, "confident_share", "class_entropy_nats"},
    "folder": IMAGE_METRICS,  # too few held-out images for those of pixels
    "table": VECTOR_METRICS,
    "vectors": VECTOR_METRICS,
    "plane": {"kl_soft_introvae", "jsd_soft_introvae", "kl_nats", "jsd_nats", "energy_distance", "gnelbo"},
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, side: int = 64, seed: int = 0) -> np.ndarray:
    """Grey discs at random places: pictures that survive resizing, each another one."""
    draws = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    centre, radius, light = draws.uniform(0.3, 0.7, (count, 2)), draws.uniform(0.1, 0.3, count), draws.uniform(
        100, 255, count
    )  # fmt: skip
    inside = (x - centre[:, 0, None, None]) ** 2 + (y - centre[:, 1, None, None]) ** 2 < radius[:, None, None] ** 2
    return (inside * light[:, None, None]).astype(np.uint8)


def write_pictures(folder: Path, array: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(array):
        Image.fromarray(pixels).save(folder / f"disc_{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def unprepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder with good pictures and odd files, one of an odd name; and what is to become of the odd ones."""
    folder = write_pictures(tmp_path_factory.mktemp("unprepared") / "my faces", pictures(60))
    rough = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)  # a file long enough to be cut
    fate = write_odd_files(folder, Image.fromarray(rough))
    (folder / ODD_NAME).write_text("no picture")
    return folder, {**fate, ODD_NAME: "no image that Pillow can read"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, unprepared: tuple[Path, dict[str, str]]) -> dict[str, Run]:
    """An evaluated run of each kind of data; not to be changed."""
    home = tmp_path_factory.mktemp("runs")
    draws = np.random.default_rng(0)
    rows = draws.normal(size=(150, 4)) @ draws.normal(size=(4, 6)) * [1, 10, 100, 1, 1, 1] + 5
    lines = [f"{','.join(f'{v:.6g}' for v in row)},{'ab'[i % 2]}" for i, row in enumerate(rows)]
    (home / "wine.csv").write_text("\n".join(["acid,sugar,ash,hue,<i>,f & g,class", *lines]) + "\n")
    np.save(home / "vectors.npy", draws.normal(size=(120, 5)).astype(np.float32))
    sources = {
        "digits": {"data": "digits", "network": "tiny-conv", "warmup": {"steps": 2}},
        "folder": {"data": str(unprepared[0]), "network": "tiny-conv", "size": 16},
        "table": {"data": str(home / "wine.csv"), "network": "tiny-mlp", "latent_dim": 3},
        "plane": {"data": "density:rings", "network": "tiny-mlp"},
        "vectors": {"data": str(home / "vectors.npy"), "network": "tiny-mlp", "objective": "VAE"},
    }
    made = {}
    for kind, settings in sources.items():
        common = {"steps": 4, "batch_size": 16, "log_every": 1, "recipe": "none", "progress": False}
        made[kind] = fit(**{**common, **settings}, out=str(home / kind))
        evaluate(made[kind])
    return made


@pytest.fixture(params=KINDS)
def run(request: pytest.FixtureRequest, runs: dict[str, Run]) -> Run:
    return runs[request.param]


@pytest.fixture
def copy(runs: dict[str, Run], tmp_path: Path) -> Run:
    """A copy of the run on the folder, to be changed."""
    return Run(Path(shutil.copytree(runs["folder"].folder, tmp_path / "copy")))


def test_a_table_of_a_run_whose_own_is_gone_has_a_report(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    for name in ("a", "b"):
        pd.DataFrame(draws.normal(size=(60, 3)), columns=pd.Index(["x", "y", "z"])).to_csv(
            tmp_path / f"{name}.csv", index=False
        )
    options: dict[str, Any] = {"network": "tiny-mlp", "latent_dim": 2, "recipe": "none", "batch_size": 16}
    run = fit(data=str(tmp_path / "a.csv"), steps=2, out=str(tmp_path / "run"), progress=False, **options)
    (tmp_path / "a.csv").unlink()
    found = evaluate(run, data=str(tmp_path / "b.csv"))
    assert found["metrics"]["mse"]["n"] == 60
    assert (run.folder / "report-b.html").is_file()


@dataclass
class Page(HTMLParser):
    """What stands in a page."""

    source: str
    tags: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    text: str = ""
    stack: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        HTMLParser.__init__(self)
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "link", "img", "br", "hr"):
            self.stack.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag, f"<{tag}> is closed but was not the innermost"

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.stack) and "small" not in self.stack:
            self.rows[-1][-1] += data

    def images(self) -> dict[str, bytes]:
        """The pictures in the page, by the id of their figure."""
        names = [attributes["id"] for tag, attributes in self.tags if tag == "figure"]
        sources = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        return {
            name: base64.b64decode(source.partition(",")[2], validate=True)
            for name, source in zip(names, sources, strict=True)
        }


def page_of(run: Run, name: str = "report.html") -> Page:
    return Page((run.folder / name).read_text(encoding="utf-8"))


def kind_of(run: Run) -> str:
    return run.folder.name


# --- the page


def test_the_page_is_beside_the_report(run: Run) -> None:
    page = page_of(run)
    assert page.source.startswith("<!doctype html>")
    assert page.stack == [], "every tag is closed"
    assert {"html", "head", "body", "title", "h1", "table", "figure"} <= {tag for tag, _ in page.tags}


def test_the_page_embeds_the_pictures_of_the_run_folder(run: Run) -> None:
    report, shown = run.report(), page_of(run).images()
    assert set(report["pictures"]) == set(shown) == PICTURES[kind_of(run)]
    assert list(shown) == [name for name in CAPTIONS if name in shown]
    for name, content in shown.items():
        path = run.folder / report["pictures"][name]
        assert path.is_relative_to(run.images)
        assert path.read_bytes() == content
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert min(picture.size) > 50
            low, high = np.asarray(picture.convert("L")).min(), np.asarray(picture.convert("L")).max()
            assert low < high, f"{name} is blank"


def test_every_picture_has_words(run: Run) -> None:
    page = page_of(run)
    for tag, attributes in page.tags:
        if tag == "img":
            assert len(attributes["alt"]) > 10
            assert page.text.count(attributes["alt"]) == 1


def test_the_page_needs_nothing_from_outside(run: Run) -> None:
    page = page_of(run)
    assert not {"script", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"<{tag} {name}>"
            if name in ("src", "href", "srcset", "action", "poster", "data"):
                assert value.startswith("data:"), f"<{tag} {name}={value[:40]!r}>"
    bare = re.sub(r'src="data:image/png;base64,[^"]+"', "", page.source)
    assert "http:" not in bare
    assert "https:" not in bare
    assert "//" not in bare
    assert "@import" not in bare
    assert "url(" not in bare


def test_the_table_has_every_metric_with_its_numbers(run: Run) -> None:
    report, page = run.report(), page_of(run)
    assert set(report["metrics"]) == METRICS_OF[kind_of(run)]
    rows = {row[0]: row for row in page.rows if row}
    for name, entry in report["metrics"].items():
        _, value, std, floor, n, protocol = rows[name]
        assert value == number(entry["value"])
        assert (std, floor) == (number(entry.get("std")), number(entry.get("floor")))
        assert (n, protocol) == (f"{entry['n']:,}", entry["protocol"])
        assert math.isfinite(entry["value"])
        assert MEANING[name] in page.text
    assert "Floor: what real data score in the samples' place (held-out ones; for precision to coverage" in page.text
    assert "averaged weights" not in page.text


def test_classes_and_neighbours_have_their_protocol_on_the_page(runs: dict[str, Run]) -> None:
    run = runs["digits"]
    report, page = run.report(), page_of(run)
    assert len(report["class_posteriors"]) == 10
    (protocol,) = {row["protocol"] for row in report["class_posteriors"]}
    assert protocol.startswith("n held-out images of the class, z = mode, evaluation mode, saved weights;")
    assert f"varies by more than {ACTIVE_VARIANCE} over them" in protocol
    assert f"{protocol}." in page.text
    assert f"Protocol: {report['neighbours']['protocol']}." in page.text
    shares = {"classes": ["one", "two"], "samples": [0.25, 0.75], "heldout": [0.5, 0.5]}
    told = {"n": 40, "protocol": "of 40 & 9"}
    more = {"intake": None, "guard": [], **report, "class_shares": {"mnist": {**shares, **told}}}
    page = Page(render(more, run.folder, "", []))
    assert ["one", "0.25", "0.5"] in page.rows
    assert "of 40 & 9." in page.text


def test_every_metric_has_a_meaning() -> None:
    assert set(MEANING) == set(METRICS)


def test_the_page_tells_the_settings_and_versions(run: Run) -> None:
    page = page_of(run)
    assert run.config_path.read_text() in page.text
    found = {row[0]: row[1] for row in page.rows if len(row) == 2}
    assert found["torch"] == torch.__version__
    assert found["Python"].startswith("3.")
    assert found["introvae"] not in ("", "missing")


def test_the_page_names_each_skipped_file_and_its_reason(
    runs: dict[str, Run], unprepared: tuple[Path, dict[str, str]]
) -> None:
    wanted = {name: reason for name, reason in unprepared[1].items() if reason != USED}
    page, intake = page_of(runs["folder"]), runs["folder"].report()["intake"]
    skipped = {entry["name"]: entry["reason"] for entry in intake["skipped"]}
    assert skipped.keys() == wanted.keys()
    rows = {row[0]: row[1] for row in page.rows if len(row) == 2}
    for name, reason in skipped.items():
        assert rows[name] == reason
        assert reason.startswith(wanted[name])
    for remark in intake["remarks"]:
        assert remark in page.text
    assert f"{intake['found']:,} files" in page.text
    assert intake["found"] == 60 + len(unprepared[1])
    assert intake["used"] == intake["found"] - len(skipped)


def test_names_are_text_and_no_tags(runs: dict[str, Run]) -> None:
    page = page_of(runs["folder"])
    assert "b" not in {tag for tag, _ in page.tags}
    assert "<b>" not in page.source
    assert "&lt;b&gt;&amp;.png" in page.source
    table = page_of(runs["table"])
    assert "i" not in {tag for tag, _ in table.tags}
    assert "f & g" in table.text
    assert "f & g" not in table.source


def test_data_without_files_have_no_intake(runs: dict[str, Run]) -> None:
    for kind in ("digits", "plane", "vectors"):
        assert "intake" not in runs[kind].report()
        assert "What became of the data" not in page_of(runs[kind]).text
    for kind in ("folder", "table"):
        assert "What became of the data" in page_of(runs[kind]).text


def test_the_picture_of_a_report_is_there_where_one_is_named(run: Run) -> None:
    report = run.report()
    if "overview" in report["pictures"]:
        assert report["picture"] == report["pictures"]["overview"]
    if report.get("picture") is not None:
        assert (run.folder / report["picture"]).is_file()


# --- the numbers behind it


def of_features(x: Tensor) -> GaussianStatistics:
    found = GaussianStatistics(x.shape[1])
    found.update(x)
    return found


@pytest.mark.parametrize("kind", ["digits", "folder", "table", "vectors"])
def test_the_kl_of_the_dimensions_adds_up(runs: dict[str, Run], kind: str) -> None:
    report, model = runs[kind].report(), runs[kind].model()
    assert len(report["kl_nats_per_dimension"]) == model.latent_dim
    total = sum(report["kl_nats_per_dimension"])
    assert total == pytest.approx(report["metrics"]["kl_real_nats"]["value"], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("kind", ["digits", "folder", "table", "vectors"])
def test_the_worst_reconstructions_are_the_worst_in_order(runs: dict[str, Run], kind: str) -> None:
    run = runs[kind]
    data = load_data(run.config().data, run.config())
    assert isinstance(data, ArrayData)
    model = run.model()
    x = data.heldout.tensor()
    errors = (x - model.reconstruct(x)).square().flatten(1).mean(dim=1)
    names = list(data.heldout.names) or [f"held-out {i}" for i in range(len(x))]
    wanted = errors.argsort(descending=True)[:10].tolist()
    found = run.report()["worst"]
    assert [entry["name"] for entry in found] == [names[i] for i in wanted]
    assert [entry["mse"] for entry in found] == pytest.approx(errors[wanted].tolist(), rel=1e-4)
    assert [entry["mse"] for entry in found] == sorted((entry["mse"] for entry in found), reverse=True)
    shown = [row for row in page_of(run).rows if len(row) == 2 and row[0] in {entry["name"] for entry in found}]
    assert shown[: len(found)] == [[entry["name"], number(entry["mse"])] for entry in found]


def test_the_worst_of_a_folder_are_files_of_the_held_out_part(
    runs: dict[str, Run], unprepared: tuple[Path, dict[str, str]]
) -> None:
    for entry in runs["folder"].report()["worst"]:
        assert (unprepared[0] / entry["name"]).is_file()


@pytest.mark.parametrize(("kind", "space"), [("table", "values"), ("digits", "thumb")])
def test_frechet_distances_and_their_floors(runs: dict[str, Run], kind: str, space: str) -> None:
    from introvae.metrics.features import thumb

    function = {"values": values, "thumb": thumb}[space]
    run = runs[kind]
    data = load_data(run.config().data, run.config())
    assert isinstance(data, ArrayData)
    model, held = run.model(), data.heldout.tensor()
    real, entry = of_features(function(data.train.tensor())), run.report()["metrics"][f"frechet_{space}"]
    assert entry["n"] == len(held)
    assert entry["floor"] == pytest.approx(frechet_distance(of_features(function(held)), real), rel=1e-5)
    samples = model.sample(4000, generator(1))
    assert entry["value"] == pytest.approx(frechet_distance(of_features(function(samples)), real), rel=0.2)
    assert entry["value"] > entry["floor"]


class Columns(nn.Module):
    """An encoder whose means are the columns times factors, and a decoder that gives them back."""

    def __init__(self, factors: list[float]) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.tensor(factors), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x * self.factors
        return mean, torch.full_like(mean, -1.0)


def test_active_units_are_counted_right() -> None:
    x = torch.randn(400, 5, generator=generator())
    factors = [1.0, 0.05, 0.0, 0.2, 0.09]  # variances 1, 0.0025, 0, 0.04, 0.0081
    assert ACTIVE_VARIANCE == 0.01
    found = measure(IntrospectiveVAE(Columns(factors), nn.Identity(), 5).eval(), from_array(x))
    assert found["active_units"]["value"] == 2
    assert found["active_units"]["n"] == 40


def test_a_sampler_of_the_data_s_own_distribution_scores_as_held_out_data_do() -> None:
    x = torch.randn(4000, 3, generator=generator())
    found = measure(IntrospectiveVAE(Columns([1.0] * 3), nn.Identity(), 3).eval(), from_array(x))["frechet_values"]
    assert found["value"] < 0.1
    assert found["floor"] < 0.1


@pytest.mark.parametrize("side", [4, 6])
def test_images_of_few_pixels_are_measured_too(side: int) -> None:
    data = from_array(torch.rand(60, 1, side, side, generator=generator()))
    model = IntrospectiveVAE.build(data.shape, "mlp", 2).eval()
    found = measure(model, data)
    assert "frechet_thumb" in found
    assert "frechet_randconv" not in found
    assert all(math.isfinite(entry["value"]) for entry in found.values())


def test_one_held_out_image_is_enough_for_a_page(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "few", pictures(6, 16))
    run = fit(data=str(data), network="tiny-conv", steps=2, batch_size=4, out=str(tmp_path / "run"), recipe="none",
              progress=False)  # fmt: skip
    report = evaluate(run)
    assert report["heldout"] == 1
    assert report["metrics"]["mse"]["n"] == len(report["worst"]) == 1
    assert set(report["pictures"]) == set(page_of(run).images()) >= {"overview", "ranked", "samples"}


@pytest.mark.parametrize("written", ["FOLDER/", "FOLDER/.", "~/faces"])
def test_the_run_s_own_data_are_known_however_their_path_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    """As the shell's completion writes it, say."""
    folder = write_pictures(tmp_path / "faces", pictures(20, 16))
    monkeypatch.setenv("HOME", str(tmp_path))
    run = fit(data=written.replace("FOLDER", str(folder)), network="tiny-conv", steps=2, batch_size=4,
              out=str(tmp_path / "run"), recipe="none", progress=False)  # fmt: skip
    report = evaluate(run)
    assert {path.name for path in run.folder.glob("report*")} == {"report.json", "report.html"}
    assert report["picture"] == "images/evaluation.png"
    assert "curves" in report["pictures"]


@pytest.mark.parametrize("name", ["$_{", "cost $a^$", "a\nb", "x" * 300, "größe", "身長", "_hidden"])
def test_columns_of_odd_names_are_drawn(tmp_path: Path, name: str) -> None:
    """Also without a warning, which a user would read on the terminal."""
    draws = np.random.default_rng(0)
    pd.DataFrame(draws.normal(size=(40, 2)), columns=pd.Index([name, "b"])).to_csv(tmp_path / "t.csv", index=False)
    run = fit(data=str(tmp_path / "t.csv"), network="tiny-mlp", steps=2, batch_size=4, out=str(tmp_path / "run"),
              recipe="none", progress=False)  # fmt: skip
    assert "columns" in evaluate(run)["pictures"]
    assert "columns" in page_of(run).images()


def test_names_that_are_no_unicode_are_shown_somehow(tmp_path: Path) -> None:
    """On Linux a file's name is any bytes; Python reads those that are no UTF-8 as lone surrogates."""
    folder = write_pictures(tmp_path / "faces", pictures(12, 16))
    try:
        for path in list(folder.iterdir()):
            os.rename(path, os.fsencode(path.with_suffix("")) + b"\xff.png")
        Path(os.fsdecode(os.fsencode(folder) + b"/no picture\xfe.png")).write_text("hello")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    run = fit(
        data=str(folder), network="tiny-conv", steps=2, batch_size=4, out=str(tmp_path / "run"), recipe="none",
        progress=False,
    )  # fmt: skip
    evaluate(run)
    rows = [row[0] for row in page_of(run).rows if len(row) == 2]
    assert any(name.startswith("no picture") for name in rows)
    assert any(name.startswith("disc_") for name in rows)


def test_the_page_does_not_depend_on_the_locale(copy: Run) -> None:
    """As on Windows, where files are not read as UTF-8 unless one says so."""
    before = page_of(copy)
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [Path(sys.executable).parent / "introvae", "evaluate", copy.folder]
    done = subprocess.run(words, env=plain, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert page_of(copy).rows == before.rows
    assert "\N{EN DASH}" in page_of(copy).source


# --- evaluated again


def test_the_report_is_the_same_when_made_again(copy: Run) -> None:
    before = copy.report()
    again = evaluate(copy)
    assert again == {**before, "run": str(copy.folder)}


def test_named_metrics_are_made_anew_and_the_others_kept(copy: Run) -> None:
    before = copy.report()
    before["metrics"]["psnr_db"]["value"] = before["metrics"]["mse"]["value"] = -123.0
    copy.report_path.write_text(json.dumps(before))
    report = evaluate(copy, metrics=["mse"])
    assert report["metrics"].keys() == before["metrics"].keys()
    assert report["metrics"]["psnr_db"]["value"] == -123.0
    assert report["metrics"]["mse"]["value"] > 0
    assert copy.report() == report
    rows = {row[0]: row for row in page_of(copy).rows if row}
    assert rows["psnr_db"][1] == "-123"
    assert rows["mse"][1] == number(report["metrics"]["mse"]["value"])


def test_an_unknown_metric_changes_nothing(copy: Run) -> None:
    before = {path: path.read_bytes() for path in copy.folder.rglob("*") if path.is_file()}
    for name in ("psnr", "modes"):
        with pytest.raises(ConfigError, match=name):
            evaluate(copy, metrics=name)
    assert {path: path.read_bytes() for path in copy.folder.rglob("*") if path.is_file()} == before


def test_other_data_have_a_report_of_their_own(copy: Run, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in copy.folder.rglob("*") if path.is_file()}
    other = write_pictures(tmp_path / "other discs", pictures(30, 40, seed=1))
    report = evaluate(copy, data=other)
    assert {path: path.read_bytes() for path in before} == before
    assert json.loads((copy.folder / "report-other-discs.json").read_text()) == report
    page = page_of(copy, "report-other-discs.html")
    assert str(other) in page.text
    assert set(page.images()) == IMAGES - {"curves"}, "the curves are of the training"
    assert all("evaluation-other-discs" in path for path in report["pictures"].values())
    data = load_data(other, copy.config(), preparation_from(copy.model().config["data"]))  # pyright: ignore
    assert data.shape == (3, 16, 16), "prepared as the run's"
    assert report["heldout"] == len(data.whole()) == 30, "all of them are unseen"  # pyright: ignore
    assert report["train"] == len(load_data(copy.config().data, copy.config()).train)  # pyright: ignore


def test_a_run_stopped_and_resumed_has_one_line_of_its_data(
    unprepared: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    run = fit(data=str(unprepared[0]), network="tiny-conv", size=16, steps=3, batch_size=8, out=str(tmp_path / "run"),
              recipe="none", progress=False)  # fmt: skip
    for path in sorted(run.checkpoints.glob("*.pt"))[1:]:
        path.unlink()  # as if it had been killed in its first steps
    shutil.rmtree(run.model_folder)
    fit(resume=run.folder, progress=False)
    assert len(run.events("data")) == 1
    assert [row["step"] for row in run.log()] == [3]


# --- the figures


def test_a_sheet_of_ranks_has_best_middle_and_worst_in_order() -> None:
    count, side = 9, 48
    greys = torch.arange(count) * 25 / 255
    x = greys[:, None, None, None].expand(-1, 1, side, side)
    order = [3, 1, 4, 0, 5, 8, 2, 6, 7]
    sheet = np.asarray(figures.ranked(x, 1 - x, order).convert("L"))
    assert sheet.shape == (3 * (18 + 52), 6 * 50 + 2)
    cells = [[int(sheet[70 * block + 44, 50 * column + 26]) for column in range(6)] for block in range(3)]
    for block, rows in enumerate((order[:3], order[3:6], order[6:])):
        assert cells[block][0::2] == [25 * row for row in rows], "the images"
        assert cells[block][1::2] == [255 - 25 * row for row in rows], "their reconstructions"
    assert cells[2][4] == 25 * order[-1], "the worst comes last"


@pytest.mark.parametrize("count", [1, 2, 3, 25])
def test_ranks_of_any_number_of_images(count: int) -> None:
    x = torch.rand(count, 3, 16, 16, generator=generator())
    shown = min(8, max(1, count // 3))
    assert figures.ranked(x, x, list(range(count))).size[0] == 2 * shown * 50 + 2


def test_latent_use_is_sorted_from_the_most_to_the_least() -> None:
    kl = torch.tensor([0.5, 3.0, 0.0, 1.25])
    before = kl.clone()
    axis = figures.latent_use(kl).axes[0]
    assert [bar.get_height() for bar in axis.patches] == [3.0, 1.25, 0.5, 0.0]  # pyright: ignore
    assert torch.equal(kl, before)


def test_latent_use_of_many_dimensions_shows_the_most_used() -> None:
    axis = figures.latent_use(torch.arange(1000.0)).axes[0]
    heights = [bar.get_height() for bar in axis.patches]  # pyright: ignore
    assert heights == [float(v) for v in range(999, 999 - figures.BARS, -1)]


def test_curves_draw_what_the_log_says() -> None:
    log = [
        {"step": 10, "phase": "warmup", "rec": 9.0, "kl_real": 1.0, "kl_sample": 2.0, "kl_reconstruction": 3.0},
        {"step": 20, "phase": "train", "rec": 7.0, "kl_real": 1.5, "kl_sample": 2.5, "kl_reconstruction": None},
        {"step": 30, "phase": "train", "rec": 5.0, "kl_real": 1.75},
    ]
    left, right = curves(log, images=True).axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in left.lines}  # pyright: ignore
    assert lines == {
        "real": ([10, 20, 30], [1.0, 1.5, 1.75]),
        "reconstruction": ([10], [3.0]),
        "sample": ([10, 20], [2.0, 2.5]),
    }
    assert list(right.lines[0].get_ydata()) == [9.0, 7.0, 5.0]  # pyright: ignore
    assert "warm-up" in [text.get_text() for text in left.texts]
    assert "pixels" in right.get_title()
    assert "values" in curves(log[1:], images=False).axes[1].get_title()
    assert not curves(log[1:], images=False).axes[0].texts


def a_table(columns: int) -> tuple[ArrayData, Tensor]:
    """Columns of variance 1 whose reconstructions miss by more from one to the next."""
    x = torch.randn(200, columns, generator=generator())
    data = ArrayData("table", Part(x[:100]), Part(x[100:]), column_names=tuple(f"c{i}" for i in range(columns)))
    noise = torch.randn(100, columns, generator=generator(1))
    return data, x[100:] + noise * torch.linspace(0.05, 0.9, columns)


def test_columns_are_sorted_and_the_worst_comes_last() -> None:
    data, y = a_table(5)
    before = data.heldout.x.clone(), y.clone()
    left, right = figures.columns_figure(data, y, torch.randn(30, 5, generator=generator(2))).axes
    widths = [bar.get_width() for bar in right.patches]  # pyright: ignore
    names = [label.get_text() for label in right.get_yticklabels()]
    from_the_top = list(zip(names, widths, strict=True))[::-1]
    assert [name for name, _ in from_the_top] == ["c0", "c1", "c2", "c3", "c4"]
    kept = figures.explained(data.heldout.x, y, data.train.x.mean(dim=0))
    np.testing.assert_allclose([width for _, width in from_the_top], kept, atol=1e-6)
    assert [len(points.get_offsets()) for points in left.collections] == [100, 100, 30]  # pyright: ignore
    assert torch.equal(data.heldout.x, before[0])
    assert torch.equal(y, before[1])


def test_columns_whose_long_names_begin_alike_have_a_bar_each() -> None:
    """As original_glcm_ClusterProminence_mean and original_glcm_ClusterProminence_sd do."""
    data, y = a_table(3)
    alike = dataclasses.replace(data, column_names=tuple(f"original_glcm_ClusterProminence_{i}" for i in range(3)))
    right = figures.columns_figure(alike, y, y).axes[1]
    assert len({round(bar.get_y(), 3) for bar in right.patches}) == 3  # pyright: ignore


@pytest.mark.parametrize("columns", [1, 2, 40])
def test_columns_of_any_number(columns: int) -> None:
    data, y = a_table(columns)
    left, right = figures.columns_figure(data, y, y).axes
    assert len(right.patches) == min(columns, 20)
    assert len(left.collections) == 3


def test_explained_variance_by_hand() -> None:
    real = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    centre = real.mean(dim=0)
    assert figures.explained(real, real, centre).tolist() == [1.0, 1.0]
    assert figures.explained(real, centre.expand(3, -1), centre).tolist() == [0.0, 0.0]
    off = real + torch.tensor([1.0, 0.0])
    assert figures.explained(real, off, centre).tolist() == pytest.approx([1 - 3 / 8, 1.0])


def test_a_histogram_counts_every_sample() -> None:
    axis = figures.error_histogram(torch.rand(123, generator=generator()), "title").axes[0]
    assert sum(bar.get_height() for bar in axis.patches) == 123  # pyright: ignore
    assert axis.get_title() == "title"


def test_ways_start_and_end_at_the_images_themselves(runs: dict[str, Run]) -> None:
    model = runs["digits"].model()
    x = torch.rand(4, 1, 8, 8, generator=generator())
    sheet = np.asarray(figures.interpolations(model, x))
    cell, columns = 48 + 2, figures.STEPS + 2
    assert sheet.shape == (2 * cell + 2, columns * cell + 2)

    def at(row: int, column: int) -> np.ndarray:
        return sheet[2 + row * cell :, 2 + column * cell :][:48:6, :48:6]

    y = model.reconstruct(x)
    for row, (a, b) in enumerate(((0, 1), (2, 3))):
        for column, image in ((0, x[a]), (1, y[a]), (columns - 2, y[b]), (columns - 1, x[b])):
            np.testing.assert_allclose(at(row, column), image[0] * 255, atol=1)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0, "0"), (3, "3"), (0.123456, "0.1235"), (12345.6, "12,346"), (-0.5, "-0.5"), (1e-9, "1e-09")],
)
def test_numbers_of_a_page(value: float | None, text: str) -> None:
    assert number(value) == text


# --- in a browser


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_a_browser_shows_the_page(browser: Any, runs: dict[str, Run], kind: str) -> None:
    address = (runs[kind].folder / "report.html").as_uri()
    complaints: list[str] = []
    asked: list[str] = []
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    try:
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(address, wait_until="load", timeout=30_000)
        shown = tab.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.alt])")
        assert len(shown) == len(PICTURES[kind])
        assert all(complete and width > 0 and alt for complete, width, alt in shown)
        for width in (1280, 400):
            tab.set_viewport_size({"width": width, "height": 900})
            wide = tab.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, f"the page is {wide} pixels wide in a window of {width}"
            right = tab.evaluate("Math.max(...[...document.images].map(i => i.getBoundingClientRect().right))")
            assert right <= width
        assert tab.title().endswith("introvae")
        assert complaints == []
        assert [url for url in asked if url != address and not url.startswith("data:")] == []
    finally:
        tab.close()


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_the_page_can_be_printed(browser: Any, runs: dict[str, Run], kind: str, tmp_path: Path) -> None:
    width, height, margin = 210 / 25.4 * 96, 297 / 25.4 * 96, 14 / 25.4 * 96  # A4 and the page's own margins
    room = width - 2 * margin
    tab = browser.new_page(viewport={"width": int(room), "height": 900})
    try:
        tab.goto((runs[kind].folder / "report.html").as_uri(), wait_until="load", timeout=30_000)
        tab.emulate_media(media="print")
        boxes = tab.evaluate(
            "[...document.images].map(i => i.getBoundingClientRect()).map(b => [b.left, b.right, b.height])"
        )
        assert len(boxes) == len(PICTURES[kind])
        for left, right, tall in boxes:
            assert left >= 0
            assert right <= room + 1
            assert 10 < tall <= height - 2 * margin, "a picture fits on one page"
        content = tab.pdf(format="A4", print_background=True)
    finally:
        tab.close()
    assert content.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", content)) >= 2
    assert content.count(b"/Subtype /Image") >= len(PICTURES[kind])
