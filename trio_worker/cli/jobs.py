"""`trio-worker jobs`: many requests from a file, done whenever there is room, and their answers."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from trio_worker.cli.arguments import Commands, add_config, caller_name, loaded_config
from trio_worker.cli.exit_statuses import ANSWERED_WITH_AN_ERROR
from trio_worker.cli.job_files import JobFile, Place, read_job_file, with_jetstream
from trio_worker.cli.job_results import collect_file, show_one
from trio_worker.cli.job_status import show_file_status, show_streams
from trio_worker.cli.job_submission import submit_file
from trio_worker.core.priority import NAMES
from trio_worker.errors import ExitStatus
from trio_worker.logs import set_up_logging

_BATCH = re.compile(r"\A[A-Za-z0-9_-]{1,96}\Z")
"""With the number of a line it is the id of a request."""


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "jobs", help="put a file of requests into the queue, and get their answers"
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    submit = actions.add_parser(
        "submit",
        help="put the requests of a file into the queue; again: what is missing of them",
    )
    _add_file(submit)
    submit.add_argument(
        "--priority", choices=NAMES, default="low", help="of requests that name none (low)"
    )
    submit.add_argument(
        "--caller", type=caller_name, metavar="NAME", help="in whose name; the server may demand it"
    )
    submit.add_argument(
        "--wait", action="store_true", help="go on as `jobs results` does; takes -o, too"
    )
    _add_output(submit)
    submit.set_defaults(command=partial(_jobs, _submit))
    results = actions.add_parser(
        "results", help="write the answers as they come, until all are there"
    )
    results.add_argument(
        "what",
        metavar="FILE|ID",
        type=_file_or_id,
        help="the file that was submitted; or the id of one job, as `ask --durable` says it",
    )
    _add_batch(results)
    _add_output(results)
    results.set_defaults(command=partial(_jobs, _results))
    status = actions.add_parser(
        "status", help="how many wait, run and are answered: of a file, or of all"
    )
    status.add_argument("file", metavar="FILE", nargs="?", type=Path)
    _add_batch(status)
    status.set_defaults(command=partial(_jobs, _status))
    for each in (submit, results, status):
        _add_server(each)


def _add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE", type=Path, help="JSON lines in the format of OpenAI's batch API"
    )
    _add_batch(parser)


def _add_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch",
        type=_batch,
        metavar="ID",
        help="instead of one made from the file's content; another one runs the same file again",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="is asked, whatever model the lines of the file name"
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        help="a file for the answers, which is gone on with if it is there; those that failed go "
        "beside it, to OUT with .errors before its ending; without it all go to standard output",
    )


def _add_server(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--url", help="where NATS listens, instead of the configuration's")
    parser.add_argument(
        "--timeout", type=float, metavar="S", default=30.0, help="seconds to find the server (30)"
    )
    parser.add_argument(
        "--inbox-prefix",
        metavar="PREFIX",
        default="_INBOX",
        help="replies come below this subject (_INBOX); for accounts with inboxes of their own",
    )


def _jobs(
    action: Callable[[argparse.Namespace, Place], Awaitable[int]], args: argparse.Namespace
) -> int:
    set_up_logging(log_format="human", level="error")
    config = loaded_config(args)
    return with_jetstream(args, config, args.url or config.nats.url, partial(action, args))


async def _submit(args: argparse.Namespace, place: Place) -> int:
    file = _read(args)
    if file is None:
        return ANSWERED_WITH_AN_ERROR
    status = await submit_file(place, file, priority=args.priority, caller=args.caller)
    if status == ExitStatus.OK and args.wait:
        return await collect_file(place, file, args.output)
    return status


async def _results(args: argparse.Namespace, place: Place) -> int:
    if isinstance(args.what, str):
        return await show_one(place, args.what)
    args.file = args.what
    file = _read(args)
    if file is None:
        return ANSWERED_WITH_AN_ERROR
    return await collect_file(place, file, args.output)


async def _status(args: argparse.Namespace, place: Place) -> int:
    if args.file is None:
        return await show_streams(place)
    file = _read(args)
    if file is None:
        return ANSWERED_WITH_AN_ERROR
    return await show_file_status(place, file)


def _read(args: argparse.Namespace) -> JobFile | None:
    """None where it cannot be read, which has been said."""
    try:
        return read_job_file(args.file, batch_id=args.batch, model=args.model)
    except OSError as exc:
        sys.stderr.write(f"{args.file} cannot be read: {exc.strerror or exc}\n")
        return None


def _batch(text: str) -> str:
    if not _BATCH.match(text):
        raise argparse.ArgumentTypeError("expected 1 to 96 of A-Z a-z 0-9 _ -")
    return text


def _file_or_id(text: str) -> Path | str:
    """The id of a job, which is text, where there is no such file and it can be one."""
    path = Path(text)
    return text if _BATCH.match(text) and not path.exists() else path
