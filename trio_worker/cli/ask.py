"""`trio-worker ask`: one request to a running worker."""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from typing import Any

import trio

from trio_worker.cli.arguments import Commands, add_config, caller_name, loaded_config
from trio_worker.cli.ask_durable import ask_durable
from trio_worker.cli.exit_statuses import (
    ANSWERED_WITH_AN_ERROR,
    INTERRUPTED,
    status_without_reader,
)
from trio_worker.cli.interrupting import until_interrupted
from trio_worker.cli.job_files import with_jetstream
from trio_worker.cli.show_answer import show_answer, show_messages
from trio_worker.client import open_client
from trio_worker.config import Config
from trio_worker.errors import ExitStatus, NoWorker, WorkerError
from trio_worker.gateway.batch_jobs import level_name
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
    parser.add_argument(
        "--durable",
        action="store_true",
        help="as a job that is kept and done even if its worker dies, or this command ends; needs "
        "nats.jetstream.enabled",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="a worker that serves this one; without it any worker, or with --durable one that "
        "serves the configuration's",
    )
    parser.add_argument(
        "--caller",
        type=caller_name,
        metavar="NAME",
        help="in whose name, and on the subject of that caller; for accounts that may use no other",
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
    parser.set_defaults(command=_ask)


def _ask(args: argparse.Namespace) -> int:
    set_up_logging(log_format="human", level="error")
    config = loaded_config(args)
    ask = _ask_durably if args.durable else _ask_now
    return ask(args, config, args.url or config.nats.url)


def _ask_now(args: argparse.Namespace, config: Config, url: str) -> int:
    try:
        # Leaving the answer cancels it at the worker.
        if not trio.run(until_interrupted, partial(_ask_and_show, args, config, url)):
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


def _ask_durably(args: argparse.Namespace, config: Config, url: str) -> int:
    if args.worker is not None:
        sys.stderr.write("--worker: a durable job is for whichever worker has room; leave it out\n")
        return ANSWERED_WITH_AN_ERROR
    model = args.model or config.worker.model_name
    priority = _level(args.priority) or "medium"
    request = {**_request(args), "model": model, "stream": False, "caller": args.caller}
    # The job's own time begins when it is done, and is the worker's to say.
    del request["timeout_ms"]
    ask = partial(
        ask_durable,
        request={name: value for name, value in request.items() if value is not None},
        level=level_name(priority, config.worker.request_queue.priority_levels),
        caller=args.caller,
        as_json=args.json,
    )
    return with_jetstream(args, config, url, ask)


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
        "model": args.model,
        "caller": args.caller,
        "max_tokens": args.max_tokens,
        "priority": _level(args.priority),
        "seed": args.seed,
        "temperature": args.temperature,
        "timeout_ms": max(1, round(1000 * args.timeout)),
        "stream": args.stream,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _level(text: str | None) -> str | int | None:
    return int(text) if text is not None and text.isdigit() else text
