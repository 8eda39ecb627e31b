"""Memory of large tensors on a CPU: kept by the process between operations, not fetched from the system each time.

glibc returns every large piece of memory to the system as soon as it is freed, and the system hands out fresh
memory page by page, zeroed. For maps of tens of megabytes this takes several times as long as the operation itself:
at the published size a quarter of a training step.
"""

import ctypes
import platform
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MIB = 2**20
LARGEST = 2**31 - 1  # what mallopt takes


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is glibc."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def keep_freed_memory(largest: int = LARGEST) -> bool:
    """Let the whole process keep freed memory for its next tensors, in pieces of up to `largest` bytes.

    Larger pieces go back to the system: they are few, and kept ones lie about in parts that nothing else fits in.
    Returns whether the system could be asked: glibc only, elsewhere nothing changes. No number depends on it.
    """
    return _set(trim=-1, mapped=max(32 * MIB, min(largest, LARGEST)))


def return_freed_memory() -> bool:
    """Return freed memory to the system, as glibc does by default."""
    return _set(trim=64 * MIB, mapped=32 * MIB, now=True)


def _set(trim: int, mapped: int, now: bool = False) -> bool:
    """Set from how many bytes on free memory is returned (-1: never; `now`: at once), and a piece is the system's."""
    if glibc := _glibc():
        glibc.mallopt(M_TRIM_THRESHOLD, trim)
        glibc.mallopt(M_MMAP_THRESHOLD, mapped)
        if now:
            glibc.malloc_trim(0)
    return bool(glibc)
