"""Writes a folder and a table to try the commands on: `pictures`, as somebody's folder looks, and `wine.csv`.

The pictures are scikit-learn's digits, one PNG each, in a folder for each class; among them lie a text file, an empty
file and a cut picture, as they do in real folders.

    python examples/own_data.py --out .
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_wine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=".", help="where to write pictures/ and wine.csv (default: here)")
    out = Path(parser.parse_args().out)
    digits, folder = load_digits(), out / "pictures"
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):  # pyright: ignore
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8))
        picture.resize((32, 32), Image.Resampling.BICUBIC).save(folder / str(label) / f"{index:04d}.png")
    (folder / "notes.txt").write_text("where these pictures are from\n")
    (folder / "empty.jpg").touch()
    whole = (folder / "0" / "0000.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    load_wine(as_frame=True).frame.to_csv(out / "wine.csv", index=False)  # pyright: ignore
    print(f"wrote {folder} ({len(digits.images)} pictures and 3 other files) and {out / 'wine.csv'}")  # pyright: ignore


if __name__ == "__main__":
    main()
