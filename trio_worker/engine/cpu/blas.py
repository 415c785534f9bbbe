"""Gives MLX's Linux CPU build a fast BLAS; must run before anything imports `mlx.core`.

The wheel links a reference BLAS some thirty times slower than the machine, but calls it by its
plain C names: a library loaded earlier into the global symbol scope answers instead.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import os
import platform
import sys
from collections.abc import MutableMapping
from pathlib import Path

MISSING = (
    "no fast BLAS was found, so the model runs some thirty times slower than this CPU can: "
    "install the package `mkl` into this environment (on x86-64), or OpenBLAS on the system"
)


@functools.cache
def preload_blas() -> str | None:
    """Load a BLAS if this machine needs one; its name, `none` if not found, None if not needed.

    The first call decides; later ones get its answer.
    """
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return None
    return _load_first()


def set_up_mkl(environ: MutableMapping[str, str], cpuinfo: str) -> None:
    """Have MKL share out products of a few rows among all cores, also on another maker's processor.

    There such a product takes about as long as on one core alone, unless results are to be
    reproducible (`MKL_CBWR`), which sends it another way. A variable that is set already stays.
    """
    if "GenuineIntel" not in cpuinfo:
        environ.setdefault("MKL_CBWR", "AUTO")


def _load_first() -> str:
    if platform.machine() in {"x86_64", "AMD64"}:
        # It reads its variables when it is loaded.
        set_up_mkl(os.environ, Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        for path in sorted(Path(sys.prefix, "lib").glob("libmkl_rt.so*")):
            if _load(str(path)):
                return "mkl"
    openblas = ctypes.util.find_library("openblas")
    if openblas is not None and _load(openblas):
        return "openblas"
    return "none"


def _load(path: str) -> bool:
    try:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True
