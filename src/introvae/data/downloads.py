"""Files at addresses that a stream reads in every epoch, copied once into the cache."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from introvae.data.cache import cache_folder, disk_bytes
from introvae.errors import DataError, first_line

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
    if missing and not fetch:
        return list(addresses)
    if missing:
        size, most = sum(_size(address) for address in addresses if "://" in address), disk_bytes()
        if size > most:
            log.info("hub      %s MB of files: too much for a copy, read anew in every epoch", f"{size / 1e6:,.0f}")
            return list(addresses)
        try:
            for _, copy in missing:
                copy.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            log.info("no copy: %s cannot be written (%s); read anew in every epoch", cache_folder(), error.strerror)
            return list(addresses)
        log.info("hub      %s MB of files, copied to %s", f"{size / 1e6:,.0f}", cache_folder())
    from tqdm import tqdm

    for address, copy in tqdm(missing, "copying", unit="file", disable=None, delay=2, leave=False):
        _copy(address, copy)
    return [str(copy) for copy in copies]


def _size(address: str) -> int:
    import fsspec

    try:
        system, path = fsspec.url_to_fs(address)
        return int(system.size(path) or 0)
    except Exception as error:  # each file system raises its own
        raise _unreachable(address, error) from error


def _copy(address: str, copy: Path) -> None:
    """Whole or not at all: another process may be looking for it."""
    import fsspec

    handle, unfinished = tempfile.mkstemp(prefix=".new-", dir=copy.parent)
    os.close(handle)
    try:
        system, path = fsspec.url_to_fs(address)
        system.get_file(path, unfinished)
        os.replace(unfinished, copy)
    except Exception as error:
        raise _unreachable(address, error) from error
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _unreachable(address: str, error: Exception) -> DataError:
    return DataError(f"{address} cannot be fetched ({first_line(error)}): try again, or give a folder or file")
