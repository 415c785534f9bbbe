"""The command line as a whole: which commands there are, and what runs one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

from trio_worker import __version__
from trio_worker.cli import (
    ask,
    bench,
    check_config,
    fleet,
    gateway,
    jobs,
    model,
    run,
    schema,
    unit,
)
from trio_worker.cli.exit_statuses import exit_status_of

COMMANDS = (run, gateway, ask, jobs, fleet, check_config, schema, unit, model, bench)
"""In the order of `--help`. Each adds its parser, and sets there `command`, which runs it."""


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit status."""
    args = make_parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.command
    return exit_status_of(partial(command, args))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trio-worker",
        description="Serve a language model with Apple MLX to callers on NATS.",
    )
    parser.add_argument("--version", action="version", version=f"trio-worker {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for each in COMMANDS:
        each.add_parser(commands)
    return parser
