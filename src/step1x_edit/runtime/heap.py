"""What becomes of freed memory, which is the C library's to decide.

glibc takes tensors of up to 32 MB from heaps, one for each thread, and keeps what is freed between
others: up to a fifth of a model of 1 GB. Larger ones it maps anew each time, and the kernel fills
them with zeros page by page. Nothing happens beside another C library.
"""

import ctypes
import sys
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's ``mallopt`` (malloc.h)."""
LARGE = 2**20
"""Bytes of a tensor that goes back to the system where memory is saved."""
LARGEST_KEPT = 2**30


def keep_nothing_large() -> None:
    """Give freed tensors of 1 MiB and more back at once from now on. Called by `apply`."""
    _set_option(_MMAP_THRESHOLD, LARGE)


def keep_freed_memory() -> None:
    """Keep freed tensors of up to 1 GiB from now on.

    A training step asks for the same ones as the step before. Called by `training.trainer`.
    """
    _set_option(_MMAP_THRESHOLD, LARGEST_KEPT)
    _set_option(_TRIM_THRESHOLD, 2 * LARGEST_KEPT - 1)


def give_back() -> None:
    """Give freed memory back to the system. Called by `apply`, and by `disk` after each block."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _set_option(number: int, value: int) -> None:
    set_option = _of_glibc("mallopt")
    if set_option is not None:
        set_option(number, value)


def _of_glibc(name: str) -> Any:
    """A function of the C library; None where there is another one, as musl, without it."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
