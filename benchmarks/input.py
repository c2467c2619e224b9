"""How fast images of 32 px come: `python benchmarks/input.py --json input.json`.

From a memory-mapped file, as the cache keeps decoded images, through the loop's own `Feed`, with the anonymous memory
that it takes (the mapped pages are the system's to drop). And what `load_data` does before: decoding a Parquet file of
PNG images, as Hugging Face writes them, and a folder of JPEG files, then finding the same in the cache.
"""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import device_option, parser, progress, report
from PIL import Image

from introvae import DataOptions, load_data
from introvae.data.arrays import ArrayBatches
from introvae.training.feed import Feed

SHAPE = (3, 32, 32)


def anonymous_bytes() -> int | None:
    """Memory that is not a mapped file's, where the system tells."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return None


def mapped(folder: Path, count: int) -> Path:
    """A file of decoded images."""
    path, pixels = folder / "pixels.bin", np.random.default_rng(0).integers(0, 256, (1000, *SHAPE), dtype=np.uint8)
    with path.open("wb") as file:
        for _ in range(count // 1000):
            file.write(pixels.tobytes())
    return path


def feed(path: Path, count: int, batch: int, images: int, device: torch.device) -> dict[str, Any]:
    """Batches one after the other, as fast as they come."""
    before = anonymous_bytes()
    x = torch.from_numpy(np.memmap(path, np.uint8, mode="c", shape=(count, *SHAPE)))
    inputs = Feed(ArrayBatches(x, batch, 0), 128, 0, device, slice(0, batch), flip=True)
    with inputs:
        for _ in range(20):
            inputs.next()
        start = time.perf_counter()
        for _ in range(images // batch):
            inputs.next()
        seconds = time.perf_counter() - start
    after = anonymous_bytes()
    row = {
        "case": f"mapped file of {x.numel() / 1e6:.0f} MB through Feed, flipped, batch {batch}",
        "device": str(device),
        "images_per_second": round(images // batch * batch / seconds),
        "anonymous_mb": None if before is None or after is None else round((after - before) / 1e6, 1),
    }
    progress(f"{row['case']}: {row['images_per_second']}")
    return row


def pictures(count: int, kind: str) -> Iterator[bytes]:
    """Files of smooth colours with a little noise: about as hard to pack as photographs."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize(SHAPE[1:], Image.Resampling.BICUBIC)).astype(np.int16)
        pixels = (smooth + rng.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind, **({"quality": 90} if kind == "JPEG" else {}))
        yield file.getvalue()


def parquet(path: Path, count: int) -> Path:
    """PNG images in a column, as Hugging Face writes it."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.array(
        [{"bytes": content, "path": f"{index}.png"} for index, content in enumerate(pictures(count, "PNG"))],
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    )
    schema = datasets.Features({"image": datasets.Image()}).arrow_schema
    pq.write_table(pa.table({"image": column}, schema=schema), path)
    return path


def photographs(folder: Path, count: int) -> Path:
    """JPEG files."""
    folder.mkdir()
    for index, content in enumerate(pictures(count, "JPEG")):
        (folder / f"{index:06d}.jpg").write_bytes(content)
    return folder


def load(name: str, source: Path) -> list[dict[str, Any]]:
    """Decoding, then the cache."""
    rows = []
    for turn in ("decoded", "again, from the cache"):
        start = time.perf_counter()
        data: Any = load_data(source, DataOptions())
        seconds, images = time.perf_counter() - start, len(data.train) + len(data.heldout)
        row = {
            "case": f"{name}, {turn}",
            "device": "cpu",
            "images": images,
            "seconds": round(seconds, 3),
            "images_per_second": round(images / seconds),
        }
        progress(f"{row['case']}: {row['images_per_second']}")
        rows.append(row)
    return rows


def main() -> None:
    options = parser(__doc__)
    device_option(options)
    own = options.parse_args()
    count, images, files = (100_000, 20_000, 3_000) if own.short else (400_000, 40_000, 20_000)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["INTROVAE_CACHE"] = f"{temporary}/cache"
        folder = Path(temporary)
        path = mapped(folder, count)
        cases = [feed(path, count, batch, images, own.device) for batch in (32, 256)]
        for name, source in (  # a few of each before, for what is imported and started on the first call
            ("Parquet file of PNG images", lambda name, count: parquet(folder / f"{name}.parquet", count)),
            ("folder of JPEG files", lambda name, count: photographs(folder / name, count)),
        ):
            load_data(source("few", 20), DataOptions())
            cases += load(name, source("many", files))
    report(cases, own.json)


if __name__ == "__main__":
    main()
