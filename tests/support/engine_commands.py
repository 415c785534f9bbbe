"""The engine process's own commands, each in a process."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any


def engine_command(*arguments: Any, cache: Any) -> Any:
    return subprocess.Popen(
        [sys.executable, "-m", "trio_worker.engine", *arguments],
        env={**os.environ, "TRIO_WORKER_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: Any) -> Any:
    out, err = process.communicate(timeout=120)
    return process.returncode, out.strip(), err.strip()
