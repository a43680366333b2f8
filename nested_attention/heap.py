"""What becomes of freed memory on Linux: glibc hands large pieces back to the system at once, and the next step of a U-Net
pays for every page anew, several percent of its time. A program that draws keeps them instead; elsewhere nothing changes."""

import ctypes
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h; the last so that threads share what was freed
KEPT, LARGE = 1 << 30, 256 << 20  # bytes: free ones that are kept, and from where on a piece is still handed back at once


def keep_freed() -> None:
    """For a whole program, before it computes: freed memory is used again."""
    with suppress(AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((M_TRIM_THRESHOLD, KEPT), (M_MMAP_THRESHOLD, LARGE), (M_ARENA_MAX, 1)):
            mallopt(option, value)


def give_back_freed() -> None:
    """Hands back what is kept, for others or to count what is in use."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
