"""A folder as users have them: good pictures and thirty damaged or odd files among them.

`python tests/unprepared.py FACES.parquet FOLDER [COUNT]` writes the folder of the README.
"""

from __future__ import annotations

import io
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SKIPPED = "skipped"
USED = "used"


def write_odd_files(folder: Path, good: Image.Image) -> dict[str, str]:
    """Thirty files, 64 pixels or smaller but for one; name to "used" or the beginning of the reason it is skipped for.

    Arguments:
        folder: where to.
        good: a square grey picture to damage and convert.
    """
    rng = np.random.default_rng(0)
    good = good.convert("L").resize((64, 64))
    colour = Image.merge("RGB", [good, good.point(lambda v: v // 2), good])
    encoded = {kind: _encoded(good, kind) for kind in ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP")}
    fate: dict[str, str] = {}

    def put(name: str, content: bytes | Image.Image, becomes: str, **options: object) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content.save(path, **options)
        fate[name] = becomes

    # 14 that cannot be read
    put("odd/empty.jpg", b"", "empty file")
    put("odd/cut_after_the_head.jpg", encoded["JPEG"][:400], "")
    put("odd/cut_in_the_middle.jpg", encoded["JPEG"][: len(encoded["JPEG"]) // 2], "image file is truncated")
    put("odd/cut.png", encoded["PNG"][: len(encoded["PNG"]) // 2], "")
    put("odd/flipped_bytes.png", _flipped(encoded["PNG"], rng), "")
    put("odd/cut.webp", encoded["WEBP"][:100], "")
    put("odd/cut.tif", encoded["TIFF"][:200], "")
    put("odd/text.jpg", b"this is no picture\n", "no image that Pillow can read")
    put("odd/page.png", b"<!doctype html><html><body>404</body></html>", "no image that Pillow can read")
    put("odd/notes.txt", b"where these pictures are from\n", "no image that Pillow can read")
    put("odd/noise.jpg", rng.bytes(5000), "no image that Pillow can read")
    put("odd/one_pixel.png", Image.new("L", (1, 1)), "1 x 1 pixels, too small")
    put("odd/line.png", Image.new("L", (500, 1)), "500 x 1 pixels, too small")
    put("odd/enormous.png", _claims_to_be(30_000, 30_000), "enormous")
    (folder / "odd/nowhere.jpg").symlink_to(folder / "odd/is_not_there.jpg")
    fate["odd/nowhere.jpg"] = "cannot be opened"
    # 15 that can
    put("odd/wide.png", good.resize((64, 20)), USED)
    put("odd/tall.png", good.resize((10, 64)), USED)
    put("odd/small.png", good.resize((5, 5)), USED)
    put("odd/lying.jpg", good.rotate(90, expand=True), USED, exif=_lying())
    put("odd/broken_exif.jpg", good, USED, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    put("odd/colour.png", colour, USED)
    put("odd/palette.png", colour.quantize(16), USED)
    put("odd/transparent.png", Image.merge("RGBA", [*colour.split(), good]), USED)
    put("odd/grey_transparent.png", Image.merge("LA", [good, good]), USED)
    put("odd/print.jpg", colour.convert("CMYK"), USED)
    put("odd/black_and_white.png", good.convert("1"), USED)
    put("odd/deep.png", Image.fromarray(np.asarray(good).astype(np.uint16) * 200), USED)
    put("odd/float.tif", Image.fromarray(np.asarray(good).astype(np.float32) * 200), USED)
    put("odd/moving.gif", good, USED, save_all=True, append_images=[colour.convert("L").rotate(90)])
    put("odd/UPPER CASE (1) ü.JPG", encoded["JPEG"], USED)
    assert len(fate) == 30
    return fate


def write_faces(parquet: Path, folder: Path, count: int | None = None) -> dict[str, str]:
    """The grey faces as PERSON_NUMBER.jpg in `folder`, the odd files among them; returns what is to become of those."""
    import pyarrow.parquet as pq

    table = pq.read_table(parquet, columns=["image", "identity"]).slice(0, count)
    folder.mkdir(parents=True, exist_ok=True)
    images = table["image"].to_pylist()
    for row, (image, person) in enumerate(zip(images, table["identity"].to_pylist(), strict=True)):
        (folder / f"{person:05d}_{row:05d}.jpg").write_bytes(image["bytes"])
    return write_odd_files(folder, Image.open(io.BytesIO(images[0]["bytes"])))


def _encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def _flipped(png: bytes, rng: np.random.Generator) -> bytes:
    content = np.frombuffer(png, np.uint8).copy()
    places = rng.integers(60, len(content) - 20, 40)
    content[places] ^= 255
    return content.tobytes()


def _lying() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


def _claims_to_be(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose head says that it is enormous."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


if __name__ == "__main__":
    if (place := Path(sys.argv[2])).is_dir() and any(place.iterdir()):
        sys.exit(f"{place} is not empty, and what lies there would be among the faces: move it away first")
    fate = write_faces(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
    print(f"{len(os.listdir(sys.argv[2])) - 1} faces and {len(fate)} odd files in {sys.argv[2]}")
