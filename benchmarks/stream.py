"""A million made-up images through the loader: `python benchmarks/stream.py --json stream.json`.

Written once into a temporary folder: as Parquet shards (PNG files of 32 pixels, grey, some hundred bytes each, in row
groups of 1,000), and as a folder of files (links to a few). Then one epoch through the loop's own `Feed` in batches of
256, in a process of its own: how much memory it takes over its start, which images came and how often, and how fast. A
few state at random are loaded into another stream afterwards, which must give the very next batch.
"""

from __future__ import annotations

import io
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Contestant, compete, parser, peak_bytes, progress, report
from PIL import Image

from introvae import DataOptions, load_data
from introvae.data.stream import StreamBatches, StreamData
from introvae.machine import resident_bytes
from introvae.training.feed import Feed

BATCH, SIDE = 256, 32
HELDOUT = 10_000
ROWS = 1000
"""Of a row group."""
FEW = 256
"""Different pictures; the million are these again and again."""
CPU = torch.device("cpu")


class Noted(StreamBatches):
    """A stream that notes how often it gave out each image, by its label or the number in its name."""

    seen: np.ndarray

    def labelled(self, share: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        x, labels = super().labelled(share)
        np.add.at(self.seen, labels.numpy(), 1)
        return x, labels


def pictures() -> list[bytes]:
    """Small grey PNG files."""
    rng, found = np.random.default_rng(0), []
    for _ in range(FEW):
        small = Image.fromarray(rng.integers(0, 256, (4, 4), dtype=np.uint8))
        file = io.BytesIO()
        small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).quantize(16).convert("L").save(file, "PNG")
        found.append(file.getvalue())
    return found


def parquet(folder: Path, count: int, shard: int = 50_000) -> Path:
    """Shards as Hugging Face writes them; an image's label is its number."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    few = pictures()
    folder.mkdir()
    for start in range(0, count, shard):
        numbers = range(start, min(start + shard, count))
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        images = pa.array([{"bytes": few[number % FEW], "path": None} for number in numbers], kind)
        content = pa.table({"image": images, "label": numbers}, schema=features.arrow_schema)
        pq.write_table(content, folder / f"train-{start:07d}.parquet", row_group_size=ROWS)
    return folder


def files(folder: Path, count: int) -> Path:
    """Files in folders of a thousand, linked from a few."""
    (folder.parent / "few").mkdir()
    few = []
    for number, content in enumerate(pictures()):
        few.append(folder.parent / "few" / f"{number}.png")
        few[-1].write_bytes(content)
    for start in range(0, count, 1000):
        inner = folder / f"{start // 1000:04d}"
        inner.mkdir(parents=True)
        for number in range(start, min(start + 1000, count)):
            os.link(few[number % FEW], inner / f"{number:07d}.png")
    return folder


def contestant(setting: dict[str, Any]) -> None:
    """An epoch, and what it took."""
    torch.set_num_threads(1)
    before, begun = resident_bytes(), time.perf_counter()
    data = load_data(setting["source"], DataOptions(stream="always"))
    assert isinstance(data, StreamData)
    loaded = time.perf_counter() - begun
    batches = Noted(data.train, BATCH, 0)  # pyright: ignore[reportArgumentType]
    batches.seen = np.zeros(setting["count"] if setting["labels"] else 10_000, np.uint16)
    steps, states, memory = data.steps_per_epoch(BATCH), {}, []
    noted = np.random.default_rng(0).choice(steps, 3, replace=False).tolist()
    with Feed(batches, 2, 0, CPU, slice(0, BATCH)) as feed:
        start = time.perf_counter()
        for step in range(steps):
            if step in noted:
                states[step] = feed.state_dict()
            x = feed.next().x
            if step in noted:
                states[step] = (states[step], x)
            if step % (steps // 10) == 0:
                memory.append(round((resident_bytes() - before) / 2**20))
        seconds = time.perf_counter() - start
    taken = peak_bytes() - before
    exact = True
    for state, expected in states.values():
        other = Feed(data.batches(BATCH, 0), 2, 0, CPU, slice(0, BATCH))
        other.load_state_dict(state)
        exact &= torch.equal(other.next().x, expected)
    facts: dict[str, Any] = {
        "images": steps * BATCH,
        "heldout": len(data.heldout),
        "buffer": data.train.buffer if setting["labels"] else None,  # pyright: ignore[reportAttributeAccessIssue]
        "seconds_to_load": round(loaded, 1),
        "images_per_second": round(steps * BATCH / seconds),
        "mib_over_start": round(taken / 2**20),
        "mib_along_the_way": memory,
        "under_1.5_GiB": taken < 1.5 * 2**30,
        "resumed_exactly": exact,
    }
    if setting["labels"]:  # what was read ahead of the last step is not of this epoch
        ahead = int(batches.seen.sum()) - steps * BATCH
        facts["different_images"] = int((batches.seen > 0).sum())
        facts["given_out_twice"] = max(0, int((batches.seen > 1).sum()) - ahead)
    compete(lambda: None, CPU, facts)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--count", type=int, help="images that an epoch has (default: a million; short: 20,000)")
    own = options.parse_args()
    if own.contestant:
        return contestant(own.contestant)
    count = own.count or (20_000 if own.short else 1_000_000)
    count = -(-count // BATCH) * BATCH  # a whole number of batches, beside the held-out part
    total = count + (HELDOUT if count >= 9 * HELDOUT else round(count / 9))
    cases = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, write in (("Parquet shards", parquet), ("folder of files", files)):
            begun = time.perf_counter()
            source = write(Path(temporary, name.split()[0].lower()), total)
            progress(f"{name}: {total:,} images written in {time.perf_counter() - begun:.0f} s")
            one = Contestant({"source": str(source), "count": total, "labels": write is parquet})
            cases.append({"case": f"{name}, batch {BATCH}", "device": "cpu", **one.facts})
            one.end()
            progress(f"{name}: {cases[-1]}")
    return report(cases, own.json)


if __name__ == "__main__":
    main()
