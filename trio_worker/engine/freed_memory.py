"""Gives freed memory back to the system, which glibc keeps for itself otherwise."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Return free pages of the heap; does nothing where the C library cannot."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
