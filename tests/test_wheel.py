"""What is released: the wheel has all that the package needs, and works where the repository is not."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import introvae

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "introvae"
ALONE = """
import sys
sys.modules["introvae"] = sys.modules["torch"] = None  # neither may be imported
import numpy, onnxruntime
decoder = onnxruntime.InferenceSession("runs/wheel/export/decoder.onnx")
(wanted,) = decoder.get_inputs()
(images,) = decoder.run(None, {"z": numpy.zeros((3, wanted.shape[1]), numpy.float32)})
encoder = onnxruntime.InferenceSession("runs/wheel/export/encoder.onnx")
mean, logvar = encoder.run(["posterior_mean", "posterior_logvar"], {"x": images})
assert images.shape[0] == mean.shape[0] == 3 and numpy.isfinite(mean).all(), (images.shape, mean.shape)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `python -m build` builds it, without an environment of its own."""
    pytest.importorskip("hatchling", reason="hatchling is missing")
    folder = tmp_path_factory.mktemp("dist")
    words = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of the sources, with the wheel that is built from it beside it."""
    pytest.importorskip("hatchling", reason="hatchling is missing")
    folder = tmp_path_factory.mktemp("sdist")
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = folder.glob("*.tar.gz")
    return found


def commands(python: Sequence[str], folder: Path, environment: dict[str, str], steps: int) -> None:
    """The commands of someone who has the package and nothing else, in an empty folder."""
    for words in (
        ["fit", "--data", "digits", "--steps", str(steps), "--out", "runs/wheel", "--quiet"],
        ["evaluate", "runs/wheel"],
        ["sample", "runs/wheel", "-n", "9", "-o", "samples.png"],
        ["export", "runs/wheel"],
        ["recipes"],
    ):
        done = subprocess.run(
            [*python, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    assert (folder / "samples.png").is_file()
    assert (folder / "runs" / "wheel" / "report.html").is_file()


def test_the_wheel_has_everything_that_the_package_has(wheel: Path) -> None:
    there = {path.relative_to(SOURCE.parent).as_posix() for path in SOURCE.rglob("*") if path.is_file()}
    there = {name for name in there if "__pycache__" not in name}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (facts,) = (name for name in names if name.endswith("METADATA"))
        metadata = archive.read(facts).decode()
        (points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "introvae = introvae.cli:main" in archive.read(points).decode()
    assert there <= names
    assert "introvae/py.typed" in names
    assert any(name.endswith(".safetensors") for name in names)
    assert f"Version: {introvae.__version__}\n" in metadata
    assert all(name.startswith(("introvae/", "introvae-")) for name in names)


def test_the_archive_of_the_sources_has_what_the_tests_read_and_gives_the_same_wheel(wheel: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("tests", "docs", "examples", "benchmarks"):
        there = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert {name for name in there if "__pycache__" not in name} <= names
    assert {"README.md", "Makefile", "constraints.txt", "pyproject.toml"} <= names
    (other,) = sdist.parent.glob("*.whl")
    contents = []
    for path in (wheel, other):
        with zipfile.ZipFile(path) as archive:
            contents.append({name: archive.read(name) for name in archive.namelist()})
    assert contents[0] == contents[1]


def test_what_the_wheel_holds_works_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    """With the libraries that are installed here; `make test-wheel` installs them anew."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    folder = tmp_path / "empty"
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site), "INTROVAE_CACHE": str(tmp_path / "cache")}
    where = [sys.executable, "-c", "import introvae; print(introvae.__file__)"]
    said = subprocess.run(where, cwd=folder, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert Path(said.stdout.strip()).is_relative_to(site)
    commands([sys.executable, "-m", "introvae"], folder, environment, steps=20)
    subprocess.run([sys.executable, "-c", ALONE], cwd=folder, env=environment, check=True, timeout=120)


@pytest.mark.release
def test_the_wheel_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["INTROVAE_CACHE"] = str(tmp_path / "cache")
    install = [python, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt")]
    for what in ("torch", f"{wheel}[onnx]"):
        subprocess.run([*install, what], env=environment, check=True, timeout=1800)
    folder = tmp_path / "empty"
    folder.mkdir()
    commands([str(tmp_path / "venv" / "bin" / "introvae")], folder, environment, steps=200)
    # Where neither introvae nor torch can be imported, the files still run.
    subprocess.run([python, "-c", ALONE], cwd=folder, env=environment, check=True, timeout=120)
