"""Memory of large tensors on a CPU: kept by the process between operations, not fetched from the system each time.

glibc returns every large piece of memory to the system as soon as it is freed, and the system hands out fresh
memory page by page, zeroed. For maps of tens of megabytes this takes several times as long as the operation itself:
at the published size a quarter of a training step.
"""
import ctypes
import platform
from functools import cache

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4  # malloc.h
MIB = 2**20


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is glibc."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def keep_freed_memory(keep: bool = True) -> bool:
    """Let the whole process keep freed memory for its next tensors, or (False) return it as glibc does by default.

    Returns whether the system could be told: glibc only, elsewhere nothing changes. No number depends on it.
    """
    if _glibc() is None:
        return False
    tell = _glibc().mallopt
    tell(M_MMAP_MAX, 0 if keep else 65536)
    tell(M_TRIM_THRESHOLD, -1 if keep else 64 * MIB)  # -1: never; else what glibc adapts itself to
    tell(M_MMAP_THRESHOLD, 32 * MIB)
    if not keep:
        _glibc().malloc_trim(0)
    return True
