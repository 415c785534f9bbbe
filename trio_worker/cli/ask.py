"""`trio-worker ask`: one request to a running worker."""

from __future__ import annotations

import argparse
import math
import signal
import sys
from typing import Any

import trio

from trio_worker.calling.attempts import check_caller
from trio_worker.cli.arguments import Commands, add_config, loaded_config
from trio_worker.cli.exit_statuses import (
    ANSWERED_WITH_AN_ERROR,
    INTERRUPTED,
    status_without_reader,
)
from trio_worker.cli.show_answer import show_answer, show_messages
from trio_worker.client import open_client
from trio_worker.config import Config
from trio_worker.errors import ExitStatus, NoWorker, WorkerError
from trio_worker.exception_groups import sole_exceptions
from trio_worker.launch_nats import login_of
from trio_worker.logs import set_up_logging


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser("ask", help="ask a running worker")
    parser.add_argument("prompt", metavar="PROMPT")
    add_config(parser)
    parser.add_argument("--url", help="where NATS listens, instead of the configuration's")
    parser.add_argument("--worker", metavar="ID", help="this worker, instead of any")
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show the answer while it is made",
    )
    parser.add_argument("--priority", help="high, medium, low, or the number of a level")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="the longest answer")
    parser.add_argument("--seed", type=int, metavar="N", help="makes the answer repeatable")
    parser.add_argument("--temperature", type=float, metavar="T", help="0…2; 0 is greedy")
    parser.add_argument(
        "--timeout", type=float, metavar="S", default=30.0, help="seconds until the end (30)"
    )
    parser.add_argument("--json", action="store_true", help="print every message as it came")
    parser.add_argument(
        "--inbox-prefix",
        metavar="PREFIX",
        default="_INBOX",
        help="answers come below this subject (_INBOX); for accounts with inboxes of their own",
    )
    parser.add_argument(
        "--caller",
        metavar="NAME",
        type=_caller,
        help="ask on the subject of this caller; for accounts that may use no other",
    )
    parser.set_defaults(command=_ask)


def _ask(args: argparse.Namespace) -> int:
    set_up_logging(log_format="human", level="error")
    config = loaded_config(args)
    url = args.url or config.nats.url
    try:
        if not trio.run(_ask_until_interrupted, args, config, url):
            sys.stderr.write("\nCancelled.\n")
            return INTERRUPTED
    except NoWorker as error:
        sys.stderr.write(
            f"No worker answered on {url}: {error.message}. `just run` starts one; it answers "
            "once its model is loaded.\n"
        )
        return ExitStatus.UNAVAILABLE
    except trio.TooSlowError:
        sys.stderr.write(
            f"No worker answered on {url} within {args.timeout:g} s: "
            "NATS could not be reached. `just run` starts it, and a worker.\n"
        )
        return ExitStatus.UNAVAILABLE
    except WorkerError as error:
        retry = f" (retry after {error.retry_after_ms} ms)" if error.retry_after_ms else ""
        sys.stderr.write(f"{error.code}: {error.message}{retry}\n")
        return ANSWERED_WITH_AN_ERROR
    except BrokenPipeError:
        return status_without_reader()
    return ExitStatus.OK


async def _ask_until_interrupted(args: argparse.Namespace, config: Config, url: str) -> bool:
    """Ask and show; False if Ctrl-C ended it. Leaving the answer cancels it at the worker."""
    answered = False
    with sole_exceptions(), trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def cancel_at_signal() -> None:
                async for _ in signals:
                    nursery.cancel_scope.cancel(reason="interrupted")

            nursery.start_soon(cancel_at_signal)
            await _ask_and_show(args, config, url)
            answered = True
            nursery.cancel_scope.cancel(reason="answered")
    return answered


async def _ask_and_show(args: argparse.Namespace, config: Config, url: str) -> None:
    show = show_messages if args.json else show_answer
    with trio.fail_after(args.timeout) as connecting:
        async with open_client(
            url,
            login=login_of(config.nats),
            inbox_prefix=args.inbox_prefix,
            caller=args.caller,
        ) as client:
            # From here on the request has its own deadline.
            connecting.deadline = math.inf
            await show(client, _request(args), args.worker)


def _request(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of the wire format; those that were not asked for are left out."""
    fields = {
        "messages": [{"role": "user", "content": args.prompt}],
        "max_tokens": args.max_tokens,
        "priority": _level(args.priority),
        "seed": args.seed,
        "temperature": args.temperature,
        "timeout_ms": max(1, round(1000 * args.timeout)),
        "stream": args.stream,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _caller(text: str) -> str:
    try:
        check_caller(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _level(text: str | None) -> str | int | None:
    return int(text) if text is not None and text.isdigit() else text
