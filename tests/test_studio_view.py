"""What the studio shows, without its page: pictures are those of the model, bad input is said."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from introvae import ConfigError, DataError, IntrospectiveVAE, RunError, cli_share, fit
from introvae.apps.directions import direction
from introvae.apps.scores import score_images
from introvae.pictures import image_grid, to_uint8
from introvae.studio import view as studio
from introvae.studio.view import Source, View
from introvae.training.run import Run

SIDE = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of a folder of grey images, four steps long, with the checkpoint of its second."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(60):
        pixels = rng.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    out = tmp_path_factory.mktemp("run") / "mine"
    return fit(
        data=str(folder), network="tiny-conv", latent_dim=4, steps=4, batch_size=8, out=str(out), checkpoint_every=2
    )


@pytest.fixture(scope="module")
def view(run: Run) -> View:
    return View(run.folder)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture)


# --- samples


def test_samples_are_those_of_the_model(view: View, run: Run) -> None:
    expected = run.model().sample(9, torch.Generator().manual_seed(5))
    assert (pixels(view.samples(5, 9)) == pixels(image_grid(expected))).all()


def test_truncation_shrinks_the_latents(view: View) -> None:
    middle = view.samples(1, 4, truncation=0.0)
    assert (pixels(middle) == pixels(view.samples(2, 4, truncation=0.0))).all()
    assert (pixels(middle) != pixels(view.samples(1, 4))).any()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"number": 0}, "number is 0"),
        ({"number": studio.MOST_SAMPLES + 1}, "give at most"),
        ({"seed": -1}, "seed is -1"),
        ({"truncation": -0.1}, "truncation is -0.1"),
        ({"truncation": 2.1}, "give 0 to 2"),
        ({"truncation": float("nan")}, "truncation is nan"),
        ({"label": "cat"}, "knows no classes"),
    ],
)
def test_samples_that_cannot_be(view: View, words: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        view.samples(**words)  # pyright: ignore[reportArgumentType]


# --- single images


def test_held_out_images_are_the_runs_own(view: View, run: Run) -> None:
    from introvae import load_data

    heldout = load_data(run.config().data, run.config()).heldout.tensor()  # pyright: ignore
    for number in (0, len(heldout) - 1):
        assert torch.equal(view.image(Source("held-out", number=number)), heldout[number])
    assert view.heldout_count == len(heldout)
    with pytest.raises(ConfigError, match=f"give 0 to {len(heldout) - 1}"):
        view.image(Source("held-out", number=len(heldout)))
    with pytest.raises(ConfigError, match="no held-out image -1"):
        view.image(Source("held-out", number=-1))


def test_an_upload_is_prepared_as_the_data_were(view: View, tmp_path: Path) -> None:
    wide = np.zeros((20, 40), np.uint8)
    wide[:, 10:30] = 200
    Image.fromarray(wide).convert("RGB").save(tmp_path / "wide.png")
    x = view.image(Source("upload", str(tmp_path / "wide.png")))
    assert x.shape == (1, SIDE, SIDE)
    assert 0 <= float(x.min()) < float(x.max()) <= 1


def test_what_is_seen_is_what_the_model_does(view: View, run: Run) -> None:
    source = Source("held-out", number=3)
    found, model = view.seen(source), run.model()
    x = view.image(source)[None]
    side = found.image.width // SIDE
    again = to_uint8(model.reconstruct(x))[0, ..., 0]
    assert (pixels(found.reconstruction)[::side, ::side] == again).all()
    assert found.image.size == found.reconstruction.size == found.heat.size
    assert found.heat.mode == "RGB"
    config = run.config().objective
    expected = score_images(model, x, studio.SHOWN_SCORES, beta_rec=config.beta_rec, beta_kl=config.beta_kl)  # pyright: ignore
    assert [(score.name, value) for score, value, _ in found.scores] == [(k, v.item()) for k, v in expected.items()]
    assert found.compared == f"{view.heldout_count} held-out images"
    assert len(found.latent.axes[0].patches) == 4


def test_shares_of_usual_images_count_them(view: View) -> None:
    """Over the held-out images themselves, the shares with less are 0, 1/n, ... in the order of the score."""
    n = view.heldout_count
    shares = sorted(view.seen(Source("held-out", number=i)).scores[0][2] for i in range(n))
    assert shares == pytest.approx([i / n for i in range(n)])


@pytest.mark.parametrize("heat", ["local", "residual", "latent", "combined"])
def test_every_heat_map_is_drawn(view: View, heat: str) -> None:
    assert view.seen(Source("sample", number=3), heat).heat.mode == "RGB"


def test_nearest_training_images(view: View, run: Run) -> None:
    from introvae import load_data

    train = load_data(run.config().data, run.config()).train.tensor()  # pyright: ignore
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view, "image", lambda source: train[5])
        sheet, distances = view.nearest(Source(), number=3, by="pixels")
    assert distances[0] == 0
    assert distances == sorted(distances)
    zoom = 48 // SIDE
    assert (
        pixels(sheet)[2 : 2 + SIDE * zoom : zoom, 2 : 2 + SIDE * zoom : zoom] == to_uint8(train[5:6])[0, ..., 0]
    ).all()
    assert view.nearest(Source(), number=3)[1] != distances


@pytest.mark.parametrize("kind", ["text", "cut", "empty", "huge", "none", "gone", "scan", "odd"])
def test_uploads_that_are_no_images(view: View, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "evil.png"
    content = {"text": b"Hello, I am a text.", "empty": b"", "gone": None, "none": None}.get(kind, b"")
    if kind == "cut":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
        content = path.read_bytes()[:2000]
    if kind == "huge":
        Image.new("L", (6000, 5000)).save(path)
    elif kind == "odd":  # a picture of a kind that Pillow knows by name only: it raises NotImplementedError
        path.write_bytes(b"DDS " + (124).to_bytes(4, "little") + bytes(60) + (32).to_bytes(4, "little") + bytes(60))
    elif kind == "scan":
        path = tmp_path / "brain.nii.gz"
        path.write_bytes(b"")
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as error:
        view.image(Source("upload", None if kind == "none" else str(path)))
    message = str(error.value)
    assert "\n" not in message
    assert str(tmp_path) not in message  # folders of this machine are nobody's business
    assert ("6,000 x 5,000" in message) == (kind == "huge")


def test_of_an_encoder_without_a_posterior_nothing_is_shown_that_needs_one(tmp_path: Path) -> None:
    words = {"network": "tiny-conv", "latent_dim": 4, "steps": 2, "batch_size": 8, "out": str(tmp_path / "age")}
    view = View(fit(data="digits", objective="AGE", **words).folder)
    seen = view.seen(Source("held-out", number=3))
    assert [score.name for score, _, _ in seen.scores] == ["error"]
    for heat in ("latent", "combined"):
        with pytest.raises(ConfigError, match=f"the map {heat} means nothing of age, which trains no posterior"):
            view.seen(Source("held-out", number=3), heat)


def test_an_unknown_kind_of_image(view: View) -> None:
    with pytest.raises(ConfigError, match="kind"):
        view.image(Source("moon"))


# --- ways through the latent space


def test_the_way_between_two_images_has_them_at_its_ends(view: View) -> None:
    ends = Source("held-out", number=0), Source("held-out", number=1)
    sheet = pixels(view.between(*ends, steps=5))
    zoom, cell = 48 // SIDE, 48 + 2
    for column, source in ((0, ends[0]), (6, ends[1])):
        left = 2 + column * cell
        shown = sheet[2 : 2 + 48 : zoom, left : left + 48 : zoom]
        assert (shown == to_uint8(view.image(source)[None])[0, ..., 0]).all()
    assert (pixels(view.between(*ends, steps=5, spherical=True)) != sheet).any()


def test_moving_without_a_change_shows_the_sample_itself(view: View, run: Run) -> None:
    latent = view.latent(Source("sample", number=7))
    assert (pixels(view.moved(latent, {})) == pixels(studio.enlarged(view.image(Source("sample", number=7))))).all()
    changed = list(latent)
    changed[2] = 3.0
    assert (pixels(view.moved(latent, {2: 3.0})) == pixels(view.moved(changed, {}))).all()
    assert sorted(view.active) == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="no dimension 4"):
        view.moved(latent, {4: 0.0})
    with pytest.raises(ConfigError, match="3 dimensions"):
        view.moved(latent[:3], {})


def test_saved_directions_move(run: Run, tmp_path: Path) -> None:
    model = run.model()
    way = direction(model, torch.rand(9, 1, SIDE, SIDE), torch.rand(9, 1, SIDE, SIDE) / 2)
    path = way.save(tmp_path / "bright.safetensors")
    view = View(run.folder, [path])
    assert list(view.directions) == ["bright"]
    latent = view.latent(Source())
    moved = [value + 2 * step for value, step in zip(latent, way.vector.tolist(), strict=True)]
    assert (pixels(view.moved(latent, {}, None, "bright", 2.0)) == pixels(view.moved(moved, {}))).all()
    with pytest.raises(ConfigError, match="direction"):
        view.moved(latent, {}, None, "smile")


# --- what is opened


def test_a_model_without_its_run(run: Run) -> None:
    view = View(run.model_folder)
    assert view.finished
    assert "samples of the model" in view.seen(Source()).compared
    with pytest.raises(DataError, match="without its data"):
        view.image(Source("held-out"))
    with pytest.raises(RunError, match="no log"):
        view.curves()
    assert view.logged == 0
    assert view.progress() == "A saved model, without its run."


def test_a_run_that_trains_shows_its_newest_checkpoint(run: Run, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "training"
    shutil.copytree(run.folder, folder)
    hidden = folder / "hidden"
    (folder / "model").rename(hidden)
    newest = sorted((folder / "checkpoints").glob("*.pt"))
    newest[-1].rename(folder / "later.pt")
    view = View(folder)
    assert (view.finished, view.step) == (False, 2)
    assert "still training" in view.facts()
    assert "the model is that of step 2" in view.progress()
    before, active = pixels(view.samples()), view.active
    view.refresh()
    assert view.step == 2
    (folder / "later.pt").rename(newest[-1])
    view.refresh()
    assert view.step == 4
    assert (pixels(view.samples()) != before).any()
    hidden.rename(folder / "model")
    view.refresh()
    assert view.finished
    assert (pixels(view.samples()) == pixels(View(run.folder).samples())).all()
    assert sorted(view.active) == sorted(active)


def test_a_run_without_a_checkpoint_or_with_an_old_one(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((run.folder / "config.yaml").read_text())
    with pytest.raises(RunError, match="wait for the next one"):
        View(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    torch.save({"format": 1, "step": 2}, tmp_path / "checkpoints" / "step_00000002.pt")
    with pytest.raises(RunError, match="no checkpoint that tells its model"):
        View(tmp_path)


def test_a_run_that_still_grows_is_not_shown(tmp_path: Path) -> None:
    """Its levels above are as they were drawn: what they make is noise."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png")
    words = {
        "network": "tiny-style",
        "latent_dim": 4,
        "steps": 20,
        "batch_size": 4,
        "growing": {"samples": 16, "start": 4},
    }
    run = fit(data=str(images), **words, checkpoint_every=4, out=str(tmp_path / "run"))  # pyright: ignore
    assert View(run.folder).finished
    (run.model_folder / "config.json").unlink()
    View(run.folder)
    (run.checkpoints / "step_00000020.pt").rename(run.checkpoints / "step_00000004.pt")
    state = torch.load(run.checkpoints / "step_00000004.pt", weights_only=True)
    torch.save({**state, "step": 4}, run.checkpoints / "step_00000004.pt")
    (run.checkpoints / "step_00000016.pt").unlink()
    with pytest.raises(RunError, match="still grows"):
        View(run.folder)


def test_other_files_in_the_run_folder_do_no_harm(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    (folder / "mine.safetensors").write_bytes(b"something else")
    assert View(folder).directions == {}
    assert "mine.safetensors" in caplog.text


def test_models_of_points_are_refused(tmp_path: Path) -> None:
    IntrospectiveVAE.build((2,), "tiny-mlp", latent_dim=2).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no images"):
        View(tmp_path)


def test_the_curves_and_how_far_the_run_is(view: View, run: Run) -> None:
    assert len(view.curves().axes) >= 2
    assert type(view.curves()) is Figure  # gradio takes no other
    assert view.progress().startswith("step 4 of 4")
    assert view.logged == run.log_path.stat().st_size


def test_models_of_classes_take_one(tmp_path: Path) -> None:
    model = IntrospectiveVAE.build((1, SIDE, SIDE), "tiny-conv", latent_dim=4, classes=["cat", "dog"])
    model.save_pretrained(tmp_path)
    view = View(tmp_path)
    assert view.labels == ["cat", "dog"]
    assert (pixels(view.samples(label="cat")) != pixels(view.samples(label="dog"))).any()
    cat = Source("sample", number=0, label="cat")
    assert view.seen(cat).scores
    assert view.between(cat, Source("sample", number=1, label="dog")).width > 0
    assert view.moved(view.latent(cat), {}, "cat").width > 0
    with pytest.raises(ConfigError, match="give --label"):
        view.image(Source("sample"))


def test_what_takes_time_is_found_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    view, calls = View(run.folder), []
    monkeypatch.setattr(view, "_find_usual", lambda found=view._find_usual: calls.append(0) or found())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: view.seen(Source("sample", number=seed)), range(8)))
    assert len(calls) == 1


def test_the_view_knows_no_web_library() -> None:
    libraries = {"gradio", "fastapi", "uvicorn", "starlette"}
    code = f"import sys, introvae.studio.view; print(sorted({libraries!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_without_gradio_the_extra_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from introvae import MissingExtraError

    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingExtraError, match=r"introvae\[studio\]"):
        cli_share.studio([str(run.folder)])
