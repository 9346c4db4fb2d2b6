"""Tell the C allocator to keep what it is given back.

A step frees and allocates the same few hundred megabytes; by default glibc returns every large block to the kernel and each new one is
paid for in page faults, up to a third of the CPU time of a step.
"""

from __future__ import annotations

import ctypes

# malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Serve all sizes from the heap and never trim it. Returns whether the C library understood (glibc does; others have no mallopt)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, 2**31 - 1), mallopt(_M_TOP_PAD, 64 << 20)])
