"""mlx-lm's own HTTP server, without a worker: what `trio-worker bench tiny` compares a worker with.

As `mlx_lm.server` starts it, but with the BLAS that the engine has. It ends with its input.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import NoReturn

from mlx_lm import server


def run_http_server(model: str, port: int) -> NoReturn:
    """Serve on the loopback address until standard input ends."""
    threading.Thread(target=_leave_with_input, daemon=True).start()
    sys.argv = [
        *("mlx_lm.server", "--model", model, "--port", str(port)),
        *("--prompt-concurrency", "16", "--log-level", "WARNING"),
    ]
    server.main()
    raise AssertionError("it serves forever")


def _leave_with_input() -> NoReturn:
    sys.stdin.read()
    os._exit(0)
