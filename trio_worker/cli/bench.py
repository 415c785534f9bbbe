"""`trio-worker bench`: a worker is measured on this machine."""

from __future__ import annotations

import argparse
import itertools

import trio

from trio_worker.cli.arguments import Commands, add_config, add_engine, loaded_config
from trio_worker.cli.exit_statuses import status_without_reader
from trio_worker.errors import ExitStatus
from trio_worker.logs import set_up_logging

PARTS_OF = {
    "engine": ("batching", "bare", "prefix", "seeds", "newcomer", "mixing", "forms"),
    "scheduling": ("overhead", "priority", "preemption"),
    "ahead": ("device", "tiny", "requests"),
    "gateway": ("events", "calls", "fronts", "behind"),
    "fleet": ("alike", "unlike"),
}
"""What is measured together under one name."""


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser("bench", help="measure a worker on this machine")
    add_config(parser)
    parser.add_argument(
        "what",
        nargs="?",
        default="batching",
        choices=(*PARTS_OF, *itertools.chain(*PARTS_OF.values())),
        help="batching: eight requests together against one at a time; bare: against mlx-lm's own "
        "loop; prefix: with and without reuse; seeds: half of them against none; mixing: against "
        "greedy requests only; forms: held to a schema against free ones; "
        "newcomer: gaps beside a long prompt; engine: all of these; overhead: the core's "
        "operations; priority: an urgent request among many; preemption: what it costs; "
        "scheduling: these three; "
        "device: against what a device could do whose steps take a given time; "
        "tiny: a tiny model, against mlx-lm's loop and server; requests: of one token that costs "
        "nothing; ahead: these three, with engines of their own; "
        "events: streams through a gateway against its worker alone; calls: the same of requests "
        "of one token, and first bytes; fronts: a tiny model behind a gateway, against mlx-lm's "
        "server; behind: the model behind a gateway; gateway: these four; "
        "alike: four simulated workers that hand requests on, against the queue group alone, in "
        "virtual time; unlike: one of them slow; fleet: these two",
    )
    add_engine(parser)
    parser.add_argument("--max-tokens", type=int, metavar="N", default=64)
    parser.add_argument("--rounds", type=int, metavar="N", default=3)
    parser.add_argument(
        "--conversations",
        type=_at_least_one,
        metavar="N",
        default=200,
        help="with a fleet (200)",
    )
    parser.set_defaults(command=_bench)


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def _bench(args: argparse.Namespace) -> int:
    from trio_worker.bench.parts import PARTS  # noqa: PLC0415 - only here
    from trio_worker.bench.setup import Setup, run_parts  # noqa: PLC0415

    set_up_logging(log_format="human", level="warning")
    setup = Setup(
        config=loaded_config(args),
        engine=args.engine,
        max_tokens=args.max_tokens,
        rounds=args.rounds,
        conversations=args.conversations,
    )
    names = PARTS_OF.get(args.what, (args.what,))
    status: int = ExitStatus.OK
    try:
        trio.run(run_parts, setup, [PARTS[name] for name in names])
    except* BrokenPipeError:
        status = status_without_reader()
    return status
