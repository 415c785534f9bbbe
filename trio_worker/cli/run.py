"""`trio-worker run`: a worker, until it is told to stop."""

from __future__ import annotations

import argparse
import faulthandler
import signal
import sys
from functools import partial

import psutil
import trio
from loguru import logger

from trio_worker.cli.arguments import Commands, add_config, add_engine, add_logging, loaded_config
from trio_worker.cli.ask_over_http import how_to_ask_over_http
from trio_worker.cli.show_answer import show_answer
from trio_worker.client import Client
from trio_worker.config import Config, warnings_about
from trio_worker.errors import ExitStatus, WorkerError
from trio_worker.launch import launch
from trio_worker.launch_gateway import gateway_beside
from trio_worker.logs import Terminal, set_up_logging
from trio_worker.ports import Broker
from trio_worker.supervisor.gateway_process import GatewayProcess

HELLO = "What is the capital of France?"


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser("run", help="run a worker until it is told to stop")
    add_config(parser)
    add_engine(
        parser,
        explanation="the model, or an engine that needs none and answers with made-up words",
    )
    parser.add_argument(
        "--hello", action="store_true", help="ask one question over NATS once the worker is ready"
    )
    add_logging(parser)
    parser.set_defaults(command=_run)


def _run(args: argparse.Namespace) -> int:
    # A watchdog ends a worker that hangs with SIGABRT: this says where it was.
    faulthandler.enable()
    terminal = set_up_logging(log_format=args.log_format, level=args.log_level)
    config = loaded_config(args)
    for warning in warnings_about(config, total_memory_bytes=psutil.virtual_memory().total):
        logger.warning("{}", warning)
    gateway = gateway_beside(config, log_level=args.log_level)
    trio.run(_serve, config, args, terminal, gateway)
    return ExitStatus.OK


async def _serve(
    config: Config, args: argparse.Namespace, terminal: Terminal, gateway: GatewayProcess | None
) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        try:
            await launch(
                config,
                engine=args.engine,
                stops=signals,
                on_progress=terminal.progress,
                on_ready=lambda _: terminal.end_progress(),
                gateway=gateway,
                greet=partial(_hello, config, gateway) if args.hello else None,
            )
        finally:
            terminal.end_progress()


async def _hello(config: Config, gateway: GatewayProcess | None, broker: Broker) -> None:
    """Ask one question as any caller would, show the answer, and say how to ask more."""
    request = {"messages": [{"role": "user", "content": HELLO}], "max_tokens": 64}
    sys.stdout.write(f"\n> {HELLO}\n")
    try:
        await show_answer(Client(broker), request, config.worker.id)
    except WorkerError as error:
        sys.stdout.write(f"{error.code}: {error.message}\n")
    sys.stdout.write(
        "\nAsk from another terminal:\n"
        '  uv run just ask "Why is the sky blue?"    or    '
        f'trio-worker ask --url {config.nats.url} "…"\n'
    )
    if gateway is not None:
        sys.stdout.write(how_to_ask_over_http(config, gateway.address))
    sys.stdout.write("Ctrl-C stops the worker.\n\n")
    sys.stdout.flush()
