"""`trio-worker model`: a model is prepared or checked, before any worker serves it."""

from __future__ import annotations

import argparse
import subprocess
import sys
from functools import partial

from trio_worker.cli.arguments import Commands


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser("model", help="prepare or check a model")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for action, text in (
        ("prepare", "download and convert a model, and say where it is"),
        ("check", "compare a model's greedy answers alone and in a batch"),
    ):
        each = actions.add_parser(action, help=text)
        each.add_argument("name", metavar="NAME")
        each.set_defaults(command=partial(_model, action))


def _model(action: str, args: argparse.Namespace) -> int:
    """In the engine's own process: this one never imports mlx."""
    command = [sys.executable, "-P", "-m", "trio_worker.engine", action, args.name]
    return subprocess.run(command, check=False).returncode
