"""What this machine has, and what the package makes of it."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LIBRARIES = (
    "torch",
    "accelerate",
    "numpy",
    "pillow",
    "datasets",
    "pandas",
    "torchmetrics",
    "matplotlib",
    "scikit-learn",
    "jsonargparse",
)


def versions() -> list[tuple[str, str]]:
    """Names and versions of the package, Python and the libraries under it."""
    found = [("introvae", _version("introvae")), ("Python", platform.python_version())]
    return found + [(name, _version(name)) for name in LIBRARIES]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def hardware() -> list[tuple[str, str]]:
    """Processor, memory and accelerators."""
    import torch

    from introvae.precision import multiplies_bf16

    found = [
        ("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        ("processor", f"{_processor()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"),
        ("vector instructions", torch.backends.cpu.get_cpu_capability()),
        ("bf16", "in hardware" if multiplies_bf16(torch.device("cpu")) else "not in hardware"),
    ]
    if (memory := memory_bytes()) is not None:
        found.append(("memory", f"{memory / 2**30:.0f} GiB"))
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return [*found, ("accelerator", "none that torch can use")]
    names = [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    if accelerator.type == "cuda":
        properties = [torch.cuda.get_device_properties(i) for i in range(len(names))]
        names = [f"{n} ({p.name}, {p.total_memory / 2**30:.0f} GiB)" for n, p in zip(names, properties, strict=True)]
    return [*found, ("accelerator", ", ".join(names))]


def memory_bytes() -> int | None:
    """Main memory, or None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def resident_bytes() -> int:
    """Main memory that this process holds now; 0 where the system does not say."""
    import psutil

    return psutil.Process().memory_info().rss


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device, or None where nothing says."""
    import psutil
    import torch

    if device.type == "cpu":
        return psutil.virtual_memory().available
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return None


def launched() -> bool:
    """Whether a launcher (accelerate launch, torchrun) started this process as one of several."""
    several = os.environ.get("WORLD_SIZE", "1").strip() not in ("", "0", "1")
    return several and all(name in os.environ for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR"))  # not a batch system's


def local_processes() -> int:
    """How many processes of this run share this machine's memory: as many as the launcher started here."""
    if not launched():
        return 1
    told = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]).strip()  # of which the first is the launcher's
    return max(1, int(told)) if told.isdecimal() else 1


def speaks() -> bool:
    """Whether this process is the one that speaks: the only one or the first of those launched together."""
    return not launched() or os.environ.get("RANK", "0") == "0"


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Let this process reuse freed memory instead of giving it back to the system, where the C library is glibc.

    A training step frees and takes the same large blocks again and again; by default each comes fresh from the system,
    page by page and zeroed, which takes a tenth to a quarter of a convolutional step on the CPU. At the end what is
    free is given back.
    """
    try:
        library = ctypes.CDLL(None)
        mallopt, malloc_trim = library.mallopt, library.malloc_trim
    except (OSError, TypeError, AttributeError):  # no glibc
        yield
        return
    max_mapped, trim_threshold, mmap_threshold = -4, -1, -3  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    mallopt(max_mapped, 0)
    mallopt(trim_threshold, 2**31 - 1)
    try:
        yield
    finally:
        mallopt(max_mapped, 65536)
        mallopt(mmap_threshold, 32 * 2**20)  # where glibc's own adjustment ends
        mallopt(trim_threshold, 64 * 2**20)
        malloc_trim(0)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
