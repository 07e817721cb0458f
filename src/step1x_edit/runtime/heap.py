"""Freed memory that the C library would keep.

glibc takes tensors of up to 32 MB from heaps, one for each thread, and keeps what is freed between
others. Called by `apply` after loading and after the language model has run, and by `disk` after
each block.
"""

import ctypes
import sys


def give_back() -> None:
    """Give freed memory back to the system, where the C library can."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    if trim is not None:
        trim(0)
