"""Memory that was freed and is still held."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Return freed memory to the system.

    The C library of Linux keeps what lies between blocks in use, after a segment as much again as
    the segment took. Elsewhere there is nothing to do.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
