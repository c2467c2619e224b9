"""Decoded images on disk: keyed by content and options, mapped into memory when used again; and what may be taken."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from introvae.errors import DataError
from introvae.files import write_atomically
from introvae.machine import local_processes

FORMAT = 2
"""Of the entries and of everything that decides pixels: raise it when `preparation` changes what it makes."""
LEFT_SECONDS = 24 * 3600
"""An unfinished entry that is older has been left."""
ROOM = 1.2
"""A disk, or the memory in its place, must have this many times an entry's size free."""
SMALL = 2**30
"""Images that take no more bytes when decoded are never streamed unasked."""
DISK_SHARE, MEMORY_SHARE = 0.25, 0.5
"""More than this of the disk's free space, or of the memory (beyond it, reading at random from a file crawls), is not
taken unasked."""

log = logging.getLogger("introvae")


def cache_folder() -> Path:
    """Where decoded images are kept: INTROVAE_CACHE, or introvae in the user's cache folder."""
    if own := os.environ.get("INTROVAE_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "introvae"


def cache_bytes() -> int:
    """What the cache takes on disk."""
    total = 0
    for folder, _, names in os.walk(cache_folder()):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # of a process that is just done with it
                total += os.stat(os.path.join(folder, name)).st_size
    return total


def clear_cache() -> int:
    """Drop everything in the cache; returns the bytes that it took."""
    before = cache_bytes()
    for name in ("entries", "sources", "downloads"):
        shutil.rmtree(cache_folder() / name, ignore_errors=True)
    return before - cache_bytes()


def affordable_bytes(cached: bool = True) -> int:
    """What decoded images may take before they are rather streamed.

    What the cache takes counts as free: else a set that a first start kept might stream at the second one.

    Arguments:
        cached: they are kept on disk, where all processes find them; else each has its own in memory.
    """
    memory = MEMORY_SHARE * psutil.virtual_memory().total
    if not cached:
        return max(SMALL, int(memory)) // local_processes()
    return max(SMALL, int(min(memory, disk_bytes())))


def disk_bytes() -> float:
    """What of the disk may be taken unasked, with what the cache takes already; any number where nothing says."""
    folder = cache_folder()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return DISK_SHARE * (shutil.disk_usage(folder).free + cache_bytes())
    except OSError:
        return math.inf


def cost_of(shape: tuple[int, ...]) -> str:
    """What decoded images (N, C, H, W) take, in words."""
    megabytes = int(np.prod(shape, dtype=np.int64)) / 1e6
    return f"{shape[0]:,} images of {' x '.join(map(str, shape[1:]))}: {megabytes:,.0f} MB"


def key_of(digest: str, settings: dict[str, Any]) -> str:
    """Name of the entry for a source's digest and the settings that it is read with."""
    return blake2b(json.dumps([FORMAT, digest, settings], sort_keys=True).encode(), digest_size=16).hexdigest()


def known_digest(name: str, signature: str) -> str | None:
    """The digest of a source whose files are untouched since it was last computed."""
    try:
        content = json.loads(_memo(name).read_text())
        return content["digest"] if content["signature"] == signature else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember_digest(name: str, signature: str, digest: str) -> None:
    """Keep a digest for `known_digest`; not at all where the cache cannot be written."""
    with contextlib.suppress(OSError):
        write_atomically(_memo(name), json.dumps({"signature": signature, "digest": digest}).encode())


def _memo(name: str) -> Path:
    path = blake2b(os.fsencode(Path(name).expanduser().absolute()), digest_size=16).hexdigest()
    return cache_folder() / "sources" / f"{path}.json"


@dataclass(frozen=True)
class Entry:
    """Decoded images `[N, C, H, W]` as uint8 and what is known about them."""

    x: np.ndarray
    facts: dict[str, Any]


def read_entry(key: str) -> Entry | None:
    """The entry of that name; None where there is none, or where it is damaged or of another version (it is said)."""
    folder = cache_folder() / "entries" / key
    if not folder.exists():
        return None
    try:
        facts = json.loads((folder / "facts.json").read_text())
        if facts["format"] != FORMAT:
            raise ValueError(f"format {facts['format']}, this version has {FORMAT}")
        shape, path = tuple(facts["shape"]), folder / "pixels.bin"
        if path.stat().st_size != int(np.prod(shape)):
            raise ValueError("its pixels are cut")
        return Entry(np.memmap(path, np.uint8, mode="c", shape=shape), facts)  # "c": changes stay in memory
    except PermissionError as error:
        log.info("the cached images cannot be read (%s): decoding anew", error)
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.info("the cached images are from another version or damaged (%s): decoding anew", error)
        shutil.rmtree(folder, ignore_errors=True)
        return None


def sweep(folder: Path) -> None:
    """Remove what processes that were killed while they wrote there have left."""
    for left in folder.glob(".new-*"):
        with contextlib.suppress(OSError):
            if left.stat().st_mtime < time.time() - LEFT_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
                left.unlink(missing_ok=True)


class Writer:
    """Room for N images, on disk where it can be and should, else in memory; `finish` makes it an entry.

    Arguments:
        key: name of the entry, or None to stay in memory.
        shape: (N, C, H, W), N at most.

    Raises:
        DataError: neither the disk nor the memory has room for them.
    """

    def __init__(self, key: str | None, shape: tuple[int, ...]) -> None:
        self.key, self.folder, self.count = key, None, 0
        size = int(np.prod(shape, dtype=np.int64))
        if key is not None:
            self.folder = self._make_room(size, shape)
        if self.folder is None:
            # The others come when the first one is done.
            copies = max(1, local_processes() - (os.environ.get("LOCAL_RANK", "0") != "0"))
            free = psutil.virtual_memory().available / copies
            if free < ROOM * size:
                each = f" for each of {copies} processes" if copies > 1 else ""
                raise DataError(
                    f"there is no room for {cost_of(shape)} decoded, and {free / 1e6:,.0f} MB of memory are free"
                    f"{each}: take --stream always, a smaller --size, or free the disk of the cache"
                )
            self.x = np.empty(shape, np.uint8)
        else:
            self.x = np.memmap(self.folder / "pixels.bin", np.uint8, mode="r+", shape=shape)

    def _make_room(self, size: int, shape: tuple[int, ...]) -> Path | None:
        entries = cache_folder() / "entries"
        cost = cost_of(shape)
        try:
            entries.mkdir(parents=True, exist_ok=True)
            sweep(entries)
            free = shutil.disk_usage(entries).free
            if free < ROOM * size:
                log.info(
                    "no cache: %s, and %s has %s MB free; they stay in memory", cost, entries, f"{free / 1e6:,.0f}"
                )
                return None
            log.info("cache    %s in %s (introvae doctor --clear-cache frees it)", cost, cache_folder())
            folder = Path(tempfile.mkdtemp(prefix=".new-", dir=entries))
        except OSError as error:
            log.info("no cache: %s cannot be written (%s); the images stay in memory", entries, error.strerror)
            return None
        try:
            with open(folder / "pixels.bin", "wb") as file:
                if size and hasattr(os, "posix_fallocate"):  # a disk that fills up later would kill the process
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    os.truncate(file.fileno(), size)
            return folder
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            log.info("no cache: %s cannot be written (%s); the images stay in memory", entries, error.strerror)
            return None

    def add(self, image: np.ndarray) -> None:
        """The next image `[C, H, W]`."""
        self.x[self.count] = image
        self.count += 1

    def finish(self, facts: dict[str, Any]) -> Entry:
        """What was added, as an entry."""
        shape = (self.count, *self.x.shape[1:])
        facts = {**facts, "format": FORMAT, "shape": list(shape)}
        if self.folder is None or self.key is None:
            return Entry(self.x[: self.count], facts)
        x = self.x[: self.count]  # stays mapped, whatever becomes of the file
        target = self.folder.parent / self.key
        try:
            write_atomically(self.folder / "facts.json", json.dumps(facts).encode())
            os.truncate(self.folder / "pixels.bin", int(np.prod(shape)))
            os.chmod(self.folder, 0o755)  # for whoever shares the cache
            if not target.exists():  # else another process was quicker, with the same content
                os.rename(self.folder, target)
        except OSError as error:
            log.info("no cache: %s cannot be written (%s); the images stay in memory", target, error.strerror)
        finally:
            self.drop()
        return read_entry(self.key) or Entry(x, facts)

    def drop(self) -> None:
        """Leave nothing behind of an entry that was not finished."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
