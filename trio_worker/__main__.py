"""`trio-worker`, and `python -m trio_worker`: see cli/command_line.py."""

from __future__ import annotations

import sys

from trio_worker.cli.command_line import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
