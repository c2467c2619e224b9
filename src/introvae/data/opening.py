"""Whether images stream, and the stream of those that do."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator

import numpy as np
import psutil
import torch

from introvae.data.arrays import HELDOUT_MAX, Intake, heldout_count
from introvae.data.cache import affordable_bytes, cost_of
from introvae.data.options import DataOptions
from introvae.data.pictures import Pictures
from introvae.data.preparation import KEPT_SIDE, Preparation
from introvae.data.row_groups import MissingDataError, ParquetShards
from introvae.data.shards import FolderShards, Shards, largest_block, mean_bytes
from introvae.data.sources import HELDOUT_SPLITS, Item
from introvae.data.stream import StreamData, StreamedPart
from introvae.data.survey import Survey, look_at
from introvae.errors import DataError
from introvae.machine import local_processes

WINDOW_BYTES = 128 * 2**20
"""What a window's encoded images take in memory at most, unless one block takes more; up to three are kept. Several
processes keep their rows of a window alone, so this is for all of them."""
BLOCK_SHARE = 0.1
"""A block that takes more of the machine's memory, divided by the processes on it, is refused."""
HELDOUT_BYTES = 256 * 2**20
"""What the held-out part takes at most: it is kept decoded, by every process. It decides what is held out, so it cannot
depend on the number of processes, for which results are the same."""
LOOKED_AT, LOOKED_INTO = 512, 32
"""Pictures from which size, colour and window are chosen, and row groups that they are taken from."""

log = logging.getLogger("introvae")


def load_stream(
    open_shards: Callable[[], Shards], options: DataOptions, preparation: Preparation | None = None
) -> StreamData | None:
    """The data as a stream; None where decoding all of them at the start is the better choice, or was asked for.

    Files on the hub that stream unasked are copied into the cache first, where there is room for them: they would be
    read anew in every epoch, by every process.

    Raises:
        DataError: files that cannot be read or that cannot be streamed.
        ConfigError: a column or pattern that is not there.
    """
    if options.stream == "never":
        return None
    always = options.stream == "always"
    try:
        shards = open_shards()
    except MissingDataError:
        raise
    except DataError:
        if always:
            raise
        return None  # who reads them will say what is wrong
    count = int(shards.starts[-1])
    if isinstance(shards, FolderShards) and shards.scans:
        if always:
            raise DataError(f"{shards.name} holds scans, which cannot be streamed: take --stream never")
        return None
    survey = None
    if not always:
        limit = affordable_bytes(options.cache)
        likely = (preparation.channels, *preparation.size) if preparation else _largest(options)
        if count * math.prod(likely) <= limit:
            return None
        survey = None if preparation else _look(shards, options)
        shape = survey.preparation(options) if survey and survey.pictures else preparation
        cost = (count, shape.channels, *shape.size) if shape else (0, 0)
        if math.prod(cost) <= limit:
            return None
        most = f"{limit / 1e6:,.0f} MB"
        log.info("stream   %s if they were kept decoded; more than %s is not kept unasked", cost_of(cost), most)
        if isinstance(shards, ParquetShards):
            shards.copy_files()
    return _stream(shards, options, preparation, survey or _look(shards, options))


def _largest(options: DataOptions) -> tuple[int, int, int]:
    """The largest shape that the images may get."""
    side = options.size or KEPT_SIDE
    return options.channels or 3, side, side


def _look(shards: Shards, options: DataOptions) -> Survey:
    """A survey of pictures from all over the source."""
    blocks = len(shards.starts) - 1
    wanted = min(blocks, LOOKED_AT if shards.block_bytes is None else LOOKED_INTO)
    each = -(-LOOKED_AT // max(1, wanted))

    def items() -> Iterator[Item]:
        for block in np.unique(np.linspace(0, max(0, blocks - 1), wanted).astype(np.int64)).tolist():
            first, last = int(shards.starts[block]), int(shards.starts[block + 1]) - 1
            find = shards.fetch([block])
            spread = np.linspace(first, last, min(each, last - first + 1)).astype(np.int64)
            yield from (find(row) for row in spread.tolist())

    return look_at(items(), min(LOOKED_AT, int(shards.starts[-1])), options)


def _stream(shards: Shards, options: DataOptions, preparation: Preparation | None, survey: Survey) -> StreamData:
    total = int(shards.starts[-1])
    if not survey.pictures or total < 2:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(survey.skipped.items())[:3])
        named = f" among those looked at ({reasons})" if reasons else ""
        raise DataError(f"{shards.name} has no two readable images{named}: give PNG, JPEG or other image files")
    if (block := largest_block(shards)) > BLOCK_SHARE * psutil.virtual_memory().total / local_processes():
        raise DataError(
            f"{shards.name} has a row group of {block / 1e6:,.0f} MB, which must be read at once: write the files with "
            "smaller ones, as Dataset.to_parquet(batch_size=1000) does, or start fewer processes here"
        )
    prepare = preparation or survey.preparation(options)
    pictures = Pictures(shards, options, prepare)
    rows, own = shards.parts.get("train"), next((part for part in HELDOUT_SPLITS if part in shards.parts), None)
    if rows is None:
        rows, own = range(total), None
    most = min(HELDOUT_MAX, max(1, HELDOUT_BYTES // math.prod(pictures.shape)))
    if own is None:
        n = min(most, heldout_count(len(rows), options.heldout))
        left_out, held = _held(shards, rows, options.heldout_seed, n)
        if len(left_out) == len(rows):
            raise DataError(f"all {total:,} samples belong to one group: give data of two groups at least")
    else:
        n = min(most, len(shards.parts[own]))
        left_out, (_, held) = np.empty(0, np.int64), _held(shards, shards.parts[own], options.heldout_seed, n)
    heldout = pictures.part(held)
    if not len(heldout):
        raise DataError(f"{shards.name}: none of the {n:,} held-out pictures can be read: restore them")
    buffer = min(options.stream_buffer, int(WINDOW_BYTES / max(1.0, mean_bytes(shards))))
    train = StreamedPart(
        torch.empty((len(rows) - len(left_out), *pictures.shape), dtype=torch.uint8, device="meta"),
        pictures=pictures,
        rows=rows,
        left_out=left_out,
        buffer=max(1, buffer),
    )
    remarks = _remarks(shards, train, survey, options, prepare)
    skipped = tuple({**survey.skipped, **pictures.skipped}.items())
    intake = Intake(total, len(train) + len(heldout), skipped, tuple(remarks))
    return StreamData(shards.name, train, heldout, shards.class_names, prepare, intake, own_parts=own is not None)


def _held(shards: Shards, rows: range, seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to be left out, sorted (groups are whole), and n of them in random order."""
    if n == len(rows):
        left_out = np.arange(rows.start, rows.stop)
    else:
        keys = shards.keys(rows, seed, n)
        left_out = np.flatnonzero(keys <= np.partition(keys, n - 1)[n - 1]) + rows.start
    order = torch.randperm(len(left_out), generator=torch.Generator().manual_seed(seed)).numpy()
    return left_out, left_out[order[:n]]


def _remarks(
    shards: Shards, train: StreamedPart, survey: Survey, options: DataOptions, prepare: Preparation
) -> list[str]:
    if shards.block_bytes is None:
        how = "in random order"
    else:
        how = f"row groups in random order, then among {train.buffer:,} images"
    said = [
        f"decoded anew in every epoch, {how}",
        "what cannot be read is named when it is met; another takes its place",
    ]
    found = survey.remarks(options, prepare)
    return [*said, *(f"of {survey.pictures:,} that were looked at: {text}" for text in found), *shards.remarks()]
