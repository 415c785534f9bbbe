"""`trio-worker check-config`: whether a configuration is valid, and what holds by it."""

from __future__ import annotations

import argparse
import sys

import psutil

from trio_worker.cli.arguments import Commands, add_config, loaded_with_sources
from trio_worker.config import effective_yaml, quoted, warnings_about
from trio_worker.errors import ExitStatus


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "check-config",
        help="check the configuration and print it whole, with where each value comes from",
    )
    add_config(parser)
    parser.set_defaults(command=_check_config)


def _check_config(args: argparse.Namespace) -> int:
    loaded = loaded_with_sources(args)
    worker = loaded.config.worker
    for warning in warnings_about(loaded.config, total_memory_bytes=psutil.virtual_memory().total):
        sys.stderr.write(f"warning: {warning}\n")
    source = quoted(str(args.config)) if args.config else "the defaults"
    # A comment, so that the whole can be kept as a file.
    sys.stdout.write(
        f"# {source}: valid. Worker {worker.id} would serve {quoted(worker.model)} "
        f"as {worker.model_name}.\n{effective_yaml(loaded)}"
    )
    return ExitStatus.OK
