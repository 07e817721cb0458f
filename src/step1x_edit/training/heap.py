"""How the C library hands memory out, set for a process that trains on a CPU."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's `mallopt` (malloc.h)."""
LARGEST_KEPT = 2**30


def keep_freed_memory() -> bool:
    """Have freed blocks up to 1 GiB kept by this process instead of given back to the system.

    A training step asks for the same blocks as the one before it. By default glibc maps a large one
    anew each time, and the kernel fills it with zeros page by page. Nothing happens beside another
    C library.

    Returns:
        Whether it was set.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(
        mallopt(_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(_TRIM_THRESHOLD, 2 * LARGEST_KEPT - 1)
    )
