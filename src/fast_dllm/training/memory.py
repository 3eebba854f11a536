"""What the C library does with memory that a training step frees."""

import ctypes
import os

# M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_OF_THE_USER = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_"}


def keep_freed_memory() -> bool:
    """Let glibc keep what a step frees for the next one, in this process from now on.

    By default it gives large pieces back to the system at once, and gets them anew page by page. The same settings of
    the user's own in the environment stand; other C libraries have no such call, and other allocators do not listen.

    Returns:
        Whether it was asked to.
    """
    if _OF_THE_USER & set(os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "") or os.name != "posix":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # No piece comes from the system on its own, and nothing goes back to it.
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
