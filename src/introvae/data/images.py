"""Image data: looked through once, decoded once into the cache, split."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from introvae.data.arrays import ArrayData, Intake, Part, heldout_rows, set_apart
from introvae.data.cache import Entry, Writer, key_of, known_digest, read_entry, remember_digest
from introvae.data.options import DataOptions
from introvae.data.preparation import (
    Preparation,
    window_of,
)
from introvae.data.scans import is_scan
from introvae.data.sources import HELDOUT_SPLITS, Item, Source, opened
from introvae.data.survey import Survey, big_enough, look_through, progress, reason_of
from introvae.errors import DataError, MissingExtraError


def load_images(source: Source, options: DataOptions, preparation: Preparation | None = None) -> ArrayData:
    """Images of a source: decoded, or from the cache, and split.

    Arguments:
        source: where they come from.
        options: how to read them.
        preparation: a model's, to be used instead of one made for these data.

    Raises:
        DataError: no two readable images, or data that have no held-out part.
    """
    entry = decoded(source, options, preparation)
    return _assemble(source.name, entry, options)


def decoded(source: Source, options: DataOptions, preparation: Preparation | None = None) -> Entry:
    """All images of a source as one array, with names, labels and groups; from the cache where they are in it.

    Raises:
        DataError: fewer than two readable images.
    """
    if preparation is not None:
        options = replace(options, axis=preparation.axis, slices=preparation.slices)
    key = None
    if options.cache:
        signature = source.signature()
        digest = known_digest(source.name, signature)
        if digest is None:
            digest = source.digest()
            remember_digest(source.name, signature, digest)
        key = key_of(digest, {**options.of_data(), "preparation": preparation and preparation.to_dict()})
        if (entry := read_entry(key)) is not None:
            return entry
    with strict_pillow():
        survey = look_through(source, options)
        if survey.pictures < 2:
            raise _too_few(source.name, survey.pictures, survey.skipped)
        prepare = preparation or survey.preparation(options)
        return _decode(source, options, prepare, survey, None if survey.elsewhere else key)


def _too_few(name: str, found: int, skipped: dict[str, str]) -> DataError:
    reasons = [f"{file}: {reason}" for file, reason in list(skipped.items())[:3]]
    named = f" ({len(skipped)} files were skipped: {'; '.join(reasons)})" if skipped else ""
    count = "no readable image" if not found else "one readable image only"
    return DataError(f"{name} has {count}{named}: give at least two PNG, JPEG or other image files")


@contextmanager
def strict_pillow() -> Iterator[None]:
    """Pillow refuses pictures of enormous size, and keeps its other warnings for itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


Result = list[tuple[str, np.ndarray | str]]


def _decode(source: Source, options: DataOptions, prepare: Preparation, survey: Survey, key: str | None) -> Entry:
    known = survey.skipped

    def read(items: Sequence[Item]) -> list[Result]:
        return [read_item(item, options, prepare) for item in items]

    writer = Writer(key, (survey.pictures, prepare.channels, *prepare.size))
    columns: dict[str, list[Any]] = {name: [] for name in ("names", "labels", "groups", "splits", "digests")}
    skipped = dict(known)
    try:
        wanted = (item for item in source.items() if item.name not in known)
        todo = progress(wanted, survey.found - len(known), "decoding")
        for item, result in ordered(read, todo):
            for name, image in result:
                if isinstance(image, str):
                    skipped[name] = image
                    continue
                if writer.count == len(writer.x):
                    raise DataError(f"{source.name} changed while it was read: start again")
                writer.add(image)
                digest = blake2b(image.tobytes(), digest_size=8).hexdigest()
                found = (name, item.label, item.group, item.split, digest)
                for column, value in zip(columns.values(), found, strict=True):
                    column.append(value)
        if writer.count < 2:
            raise _too_few(source.name, writer.count, skipped)
        return writer.finish(
            {
                **columns,
                "class_names": list(source.class_names),
                "found": survey.found,
                "skipped": list(skipped.items()),
                "converted": survey.unusual(prepare),
                "remarks": survey.remarks(options, prepare),
                "preparation": prepare.to_dict(),
            }
        )
    finally:
        writer.drop()


def read_item(item: Item, options: DataOptions, prepare: Preparation) -> Result:
    """Every picture of an item, prepared, or the reason why there is none."""
    result: Result = []
    try:
        if isinstance(item.content, Path) and is_scan(item.content.name):
            with opened(item, options) as pictures:
                slices = list(pictures)
            window = None
            if prepare.percentiles is not None:
                window = window_of(np.stack([np.asarray(picture) for _, picture in slices]), prepare.percentiles)
            for name, picture in slices:
                low, high = picture.getextrema()
                result.append((name, "one value only" if low == high else prepare(picture, window)))
            return result
        with opened(item, options) as pictures:
            for name, picture in pictures:
                big_enough(picture.size)
                result.append((name, prepare(picture)))
            return result
    except MissingExtraError:
        raise
    except Exception as error:  # as in `look_through`
        return [(item.name, reason_of(error))]


def ordered(
    function: Callable[[Sequence[Item]], list[Result]], items: Iterator[Item], size: int = 32
) -> Iterator[tuple[Item, Result]]:
    """Every item with its result, in order, from a few threads (Pillow's decoders let others run), few in flight."""
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[Sequence[Item], Any]] = deque()
        while batch := list(islice(items, size)):
            waiting.append((batch, pool.submit(function, batch)))
            if len(waiting) > 2 * workers:
                done, results = waiting.popleft()
                yield from zip(done, results.result(), strict=True)
        for done, results in waiting:
            yield from zip(done, results.result(), strict=True)


def _assemble(name: str, entry: Entry, options: DataOptions) -> ArrayData:
    """The two parts of an entry; the first rows are the training part's where the data bring their own."""
    facts = entry.facts
    labels, class_names = _labels(facts["labels"], tuple(facts["class_names"]))
    whole = Part(torch.from_numpy(entry.x), labels, facts["names"])
    splits, groups, remarks = facts["splits"], facts["groups"], list(facts["remarks"])
    held = next((split for split in HELDOUT_SPLITS if split in splits), None) if "train" in splits else None
    if held is None:
        rows = heldout_rows(len(whole), options.heldout, options.heldout_seed, groups)
        train, heldout = set_apart(whole, rows)
        pairs = _duplicates(facts, set(rows))
        grouped = sum(group is None for group in groups)
        if options.group is not None and grouped:
            remarks.append(f"{grouped:,} of {len(groups):,} names do not match the group pattern: each stands alone")
    else:
        count, first = splits.count("train"), splits.index(held)
        if unused := len(splits) - count - splits.count(held):
            remarks.append(f"{unused:,} validation pictures beside a test part are not used")
        train, heldout = whole[slice(0, count)], whole[slice(first, first + splits.count(held))]
        pairs = _duplicates(facts, set(range(first, first + len(heldout))), range(count))
        both = {g for g in groups[:count] if g is not None} & set(groups[first : first + len(heldout)])
        if both:
            remarks.append(f"{len(both):,} groups are in the training and in the held-out part, as the data bring them")
    if pairs:
        remarks.append(
            f"held-out images that are in the training part too: {len(pairs):,} (such as {pairs[0][0]} = "
            f"{pairs[0][1]}); numbers on the held-out part flatter"
        )
    skipped = tuple((file, reason) for file, reason in facts["skipped"])
    converted = tuple((file, what) for file, what in facts["converted"])
    intake = Intake(facts["found"], len(whole), skipped, tuple(remarks), tuple(pairs), converted)
    preparation = Preparation.from_dict(facts["preparation"])
    return ArrayData(name, train, heldout, class_names, preparation, intake, own_parts=held is not None)


def _labels(labels: list[Any], class_names: tuple[str, ...]) -> tuple[torch.Tensor | None, tuple[str, ...]]:
    """Class indices, -1 where unknown, and the classes' names."""
    if all(label is None for label in labels):
        return None, ()
    words = {label for label in labels if isinstance(label, str)}
    if words:  # of the pictures that were used: a folder without one is no class
        class_names = tuple(sorted(words))
        if len(words) == 1:
            return None, ()
        index = {name: i for i, name in enumerate(class_names)}
        labels = [index.get(label, -1) for label in labels]
    return torch.tensor([-1 if label is None else label for label in labels]), class_names


def _duplicates(facts: dict[str, Any], held: set[int], train: range | None = None) -> list[tuple[str, str]]:
    """Names of held-out images and of the first equal image in the training part."""
    names, digests = facts["names"], facts["digests"]
    rows = train if train is not None else range(len(names))
    first: dict[str, str] = {}
    for row in rows:
        if row not in held:
            first.setdefault(digests[row], names[row])
    return [(names[row], first[digests[row]]) for row in sorted(held) if digests[row] in first]


def read_one(path: Path, prepare: Preparation) -> list[tuple[str, np.ndarray]]:
    """The picture of a file, or the slices of a scan, prepared.

    Raises:
        DataError: it cannot be read.
    """
    options = DataOptions(axis=prepare.axis, slices=prepare.slices)
    with strict_pillow():
        result = read_item(Item(str(path), path), options, prepare)
    pictures = [(name, image) for name, image in result if isinstance(image, np.ndarray)]
    if not pictures:
        reason = next((reason for _, reason in result if isinstance(reason, str)), "no slices")
        raise DataError(f"{path} cannot be read as an image: {reason}; give a PNG or JPEG file")
    return pictures
