"""Freed memory that the C library would keep.

glibc takes tensors of up to 32 MB from heaps, one for each thread, and keeps what is freed between
others: up to a fifth of a model of 1 GB. Called by `apply`, and by `disk` after each block.
"""

import ctypes
import sys
from typing import Any

M_MMAP_THRESHOLD = -3
LARGE = 1 << 20
"""Bytes of a tensor that is taken from the system, and given back when it is freed."""


def keep_nothing_large() -> None:
    """From now on large tensors are not taken from heaps, where the C library can."""
    set_option = _glibc("mallopt")
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, LARGE)


def give_back() -> None:
    """Give freed memory back to the system, where the C library can."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc(name: str) -> Any:
    """A function of the C library; None where there is another one, as musl, without it."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
