"""`trio-worker gateway`: OpenAI's API over HTTP in front of all workers on NATS."""

from __future__ import annotations

import argparse
import faulthandler
import signal

import trio

from trio_worker.cli.arguments import Commands, add_config, add_logging, loaded_config
from trio_worker.config import Config
from trio_worker.errors import ExitStatus
from trio_worker.launch_gateway import launch_gateway
from trio_worker.logs import set_up_logging


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "gateway", help="offer OpenAI's API over HTTP, in front of all workers on NATS"
    )
    add_config(parser)
    parser.add_argument("--url", help="where NATS listens, instead of the configuration's")
    parser.add_argument("--host", help="the address to listen on, instead of the configuration's")
    parser.add_argument("--port", help="the port, instead of the configuration's (8000)")
    add_logging(parser)
    parser.set_defaults(command=_gateway)


def _gateway(args: argparse.Namespace) -> int:
    # A watchdog ends a process that hangs with SIGABRT: this says where it was.
    faulthandler.enable()
    set_up_logging(log_format=args.log_format, level=args.log_level)
    named = {"nats.url": args.url, "gateway.host": args.host, "gateway.port": args.port}
    args.overrides += [f"{path}={value}" for path, value in named.items() if value is not None]
    trio.run(_serve, loaded_config(args))
    return ExitStatus.OK


async def _serve(config: Config) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        await launch_gateway(config, stops=signals)
