"""Memory that one training step frees, kept for the next one; and given back where shapes vary.

glibc gives a large freed block back to the kernel at once, and the next step's activations are then mapped and zeroed
again, page by page: of a GPT-2 step on a CPU a tenth or more of the time went there. Training steps, whose blocks have
the same sizes again and again, keep them. Where sizes change from batch to batch (HellaSwag, sampling), a kept hole
is seldom one that fits, and memory would grow by the gigabyte: there glibc's own ways hold.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4


def keep_freed_memory(keep: bool = True) -> bool:
    """Let this process's C allocator keep what is freed, or not; returns whether it could be told to (glibc only)."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library, such as musl
        return False
    if keep:  # No block has a mapping of its own, and the heap never shrinks: -1, as a size_t, is more than it holds.
        return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
    # The values that glibc's own, which adapt to what is freed, end at; once one was set, they no longer adapt.
    settings = ((_M_MMAP_MAX, 65_536), (_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 64 << 20))
    return all([bool(mallopt(name, value)) for name, value in settings])


@contextmanager
def giving_back_memory(on: bool) -> Iterator[None]:
    """Within a process that keeps freed memory: give it back in this block, whose shapes vary.

    Args:
        on: False: this process does not keep it, and nothing changes.
    """
    if on:
        keep_freed_memory(False)
    try:
        yield
    finally:
        if on:
            keep_freed_memory()
