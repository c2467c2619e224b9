from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script: str, *words: str) -> str:
    result = subprocess.run([sys.executable, EXAMPLES / script, *words], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def picture_width(path: Path) -> int:
    with Image.open(path) as picture:
        return picture.width


def test_standalone_trains_without_the_package(tmp_path) -> None:
    source = (EXAMPLES / "standalone.py").read_text()
    assert "introvae" not in source.replace("Soft-IntroVAE", "").lower()
    run("standalone.py", "--steps", "24", "--out", str(tmp_path / "s.png"))
    assert picture_width(tmp_path / "s.png") > 300


def test_headline_draws_the_readme_s_figure(tmp_path) -> None:
    words = ("--steps", "20", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "h.png"))
    assert "Soft-IntroVAE on digits" in run("headline.py", *words)
    assert picture_width(tmp_path / "h.png") > 500
    assert "training" not in run("headline.py", *words)  # finished runs are used again
