"""Files at addresses that a stream reads in every epoch, copied once into the cache."""

from __future__ import annotations

import errno
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from introvae.data.cache import ROOM, cache_folder, disk_bytes, sweep
from introvae.errors import DataError, first_line
from introvae.progress import progress_bar

log = logging.getLogger("introvae")


def copy_of(address: str) -> Path:
    """Where the copy of the file at an address is, or would be; it keeps the file's name."""
    key = blake2b(address.encode(), digest_size=16).hexdigest()
    return cache_folder() / "downloads" / key / Path(address).name


def copied(addresses: Sequence[str], fetch: bool) -> list[str]:
    """The addresses, or the paths of the files' copies where all are in the cache; paths stay as they are.

    Arguments:
        addresses: that fsspec opens; what is at one never changes (those of the hub name a commit).
        fetch: make the copies that are missing, but only where all together take no more of the disk than may be taken
            unasked.

    Raises:
        DataError: a file cannot be fetched.
    """
    copies = [copy_of(address) if "://" in address else Path(address) for address in addresses]
    missing = [pair for pair in zip(addresses, copies, strict=True) if "://" in pair[0] and not pair[1].is_file()]
    if missing and (not fetch or not _room([address for address, _ in missing])):
        return list(addresses)
    for address, copy in progress_bar(missing, "copying", unit="file", delay=2, leave=False):
        if copy.is_file():  # another process was quicker
            continue
        try:
            _copy(address, copy)
        except OSError as error:
            log.info("no copy: %s cannot be written (%s); read anew in every epoch", cache_folder(), error.strerror)
            return list(addresses)
    return [str(copy) for copy in copies]


def _room(addresses: Sequence[str]) -> bool:
    """Whether the files there may be copied; says so."""
    size, folder = sum(_size(address) for address in addresses), cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        log.info("no copy: %s cannot be written (%s); read anew in every epoch", folder, error.strerror)
        return False
    if size > min(disk_bytes(), free / ROOM):
        log.info("hub      %s MB of files: too much for a copy, read anew in every epoch", f"{size / 1e6:,.0f}")
        return False
    log.info("hub      %s MB of files, copied to %s", f"{size / 1e6:,.0f}", folder)
    return True


def _size(address: str) -> float:
    """Bytes of the file at an address; any number where nobody says."""
    import fsspec

    try:
        system, path = fsspec.url_to_fs(address)
        size = system.size(path)
    except Exception as error:  # each file system raises its own
        raise _unreachable(address, error) from error
    return math.inf if size is None else int(size)


def _copy(address: str, copy: Path) -> None:
    """Whole or not at all: another process may be looking for it.

    Raises:
        OSError: it cannot be written.
        DataError: it cannot be fetched.
    """
    import fsspec

    copy.parent.mkdir(parents=True, exist_ok=True)
    sweep(copy.parent)
    handle, unfinished = tempfile.mkstemp(prefix=".new-", dir=copy.parent)
    os.close(handle)
    try:
        system, path = fsspec.url_to_fs(address)
        system.get_file(path, unfinished)
        os.chmod(unfinished, 0o644)  # for whoever shares the cache
        os.replace(unfinished, copy)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _unreachable(address, error) from error
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _unreachable(address: str, error: Exception) -> DataError:
    return DataError(f"{address} cannot be fetched ({first_line(error)}): try again, or give a folder or file")
