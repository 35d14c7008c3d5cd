"""What glibc is told about memory, so that the peak does not grow with the number of blocks."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # from malloc.h


def keep_large_tensors_out_of_the_heap() -> None:
    """Have glibc give large tensors pages of their own, which go back to the system when they are freed.

    By default glibc raises that threshold to 32 MB as tensors are freed, and keeps smaller ones in a heap that
    fragments a little more with every block: the peak then grows with the number of blocks. Much below 8 MB the
    zeroing of fresh pages costs small models a quarter of their time. The top of the heap is kept for the next tensor
    and given back after each block.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library has no mallopt, and less need of it
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_THRESHOLD, 8 << 20)
            libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)


def give_back_freed_memory() -> None:
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
