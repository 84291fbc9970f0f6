"""Memory that one training step frees, kept for the next one.

glibc gives a large freed block back to the kernel at once, and the next step's activations are then mapped and zeroed
again, page by page: of a GPT-2 step on a CPU a tenth or more of the time went there. Nothing grows but the part of the
peak that is lost to fragmentation.
"""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Let this process's C allocator keep what is freed; returns whether it could be told to (glibc only)."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library, such as musl
        return False
    # No block has a mapping of its own, and the heap never shrinks: -1, as a size_t, is more than its end ever holds.
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
