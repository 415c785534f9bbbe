"""Arguments that several commands take, and what is read with them."""

from __future__ import annotations

import argparse
import os
import socket
from pathlib import Path
from typing import TypeAlias

from trio_worker.config import Config, Loaded, load_with_sources
from trio_worker.gateway.keys import CALLER
from trio_worker.logs import FORMATS, LEVELS

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001
"""What each command adds its parser to."""


def add_config(parser: argparse.ArgumentParser) -> None:
    """`--config` and `--set`, which `loaded_config` reads."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="a cluster.yaml")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="override one key, such as worker.model=models/mine; may be repeated",
    )


def loaded_config(args: argparse.Namespace) -> Config:
    """The configuration of this process. Raises `ConfigError` with every problem found."""
    return loaded_with_sources(args).config


def loaded_with_sources(args: argparse.Namespace) -> Loaded:
    """As `loaded_config`, with where each value came from."""
    return load_with_sources(
        args.config,
        environ=os.environ,
        overrides=args.overrides,
        hostname=socket.gethostname(),
    )


def caller_name(text: str) -> str:
    """An argument that names a caller."""
    if not CALLER.match(text):
        raise argparse.ArgumentTypeError("expected 1 to 64 of A-Z a-z 0-9 _ -")
    return text


def add_engine(parser: argparse.ArgumentParser, *, explanation: str | None = None) -> None:
    """`--engine`, as `trio_worker.launch` takes it."""
    parser.add_argument("--engine", choices=("mlx", "simulated"), default="mlx", help=explanation)


def add_logging(parser: argparse.ArgumentParser) -> None:
    """`--log-format` and `--log-level`, as `set_up_logging` takes them."""
    parser.add_argument(
        "--log-format",
        choices=FORMATS,
        default="auto",
        help="auto: JSON under systemd and launchd, for people otherwise",
    )
    parser.add_argument("--log-level", choices=LEVELS, default="info")
