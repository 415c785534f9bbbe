"""`trio-worker fleet`: which workers there are on NATS, and how full, in the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from functools import partial

import msgspec
import trio
import trio_util
from rich.console import Console
from rich.live import Live

from trio_worker.cli.arguments import Commands, add_config, loaded_config
from trio_worker.cli.exit_statuses import INTERRUPTED, NOBODY_THERE, status_without_reader
from trio_worker.cli.fleet_rows import gone_line, json_line, picture_of
from trio_worker.cli.interrupting import until_interrupted
from trio_worker.config import Config, FleetConfig
from trio_worker.errors import BrokerUnavailable, ExitStatus
from trio_worker.flow.live_set import LiveSet
from trio_worker.launch_nats import connect
from trio_worker.logs import set_up_logging
from trio_worker.monitoring.readings import member_of
from trio_worker.monitoring.snapshot import MemberReading
from trio_worker.ports import Broker, Message
from trio_worker.wire import beats, subjects

REDRAW_S = 0.25
"""From one picture of the fleet to the next."""
PIPE_WIDTH = 500
LEAVE_S = 1.0
"""At most, for the subscription to end."""
LATE = 1.25
"""Of the interval between beats: within it everybody who is there has been heard."""


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser("fleet", help="show which workers there are, and how full")
    add_config(parser)
    parser.add_argument("--url", help="where NATS listens, instead of the configuration's")
    parser.add_argument(
        "--once",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="listen for a little over one beat, print who was heard and end; without a terminal "
        "it does so by itself",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="an object a line, of each worker; with --no-once again whenever it is heard, and "
        "when it is gone",
    )
    parser.set_defaults(command=_fleet)


def _fleet(args: argparse.Namespace) -> int:
    set_up_logging(log_format="human", level="error")
    config = loaded_config(args)
    if args.url is not None:
        nats = msgspec.structs.replace(config.nats, url=args.url)
        config = msgspec.structs.replace(config, nats=nats)
    once = not sys.stdout.isatty() if args.once is None else args.once
    try:
        return trio.run(partial(_watch_until_interrupted, config, once=once, as_json=args.json))
    except BrokenPipeError:
        return status_without_reader()


async def _watch_until_interrupted(config: Config, *, once: bool, as_json: bool) -> int:
    """The exit status. Ctrl-C is how a live view ends, and cuts one short that ends by itself."""
    status: int = INTERRUPTED if once else ExitStatus.OK

    async def watch_it() -> None:
        nonlocal status
        async with connect(config.nats, name="trio-worker fleet") as broker:
            status = await show(broker, config, once=once, as_json=as_json)

    await until_interrupted(watch_it)
    return status


async def show(broker: Broker, config: Config, *, once: bool, as_json: bool) -> int:
    """Show the fleet until it has been shown, for as long as there is a connection."""
    status: int = ExitStatus.OK
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch_broker, broker)
        if once:
            status = await show_once(broker, config, as_json=as_json)
        elif as_json:
            await follow(broker, config.fleet)
        else:
            await show_live(broker, config.fleet, Console())
        nursery.cancel_scope.cancel(reason="shown")
    return status


async def _watch_broker(broker: Broker) -> None:
    reason = await broker.wait_lost()
    raise BrokerUnavailable(f"the connection to NATS has ended for good: {reason}")


# --- who there is ----------------------------------------------------------------------------


class Watched:
    """The workers that are heard of while the block of `watch` lasts. Its state: their beats."""

    def __init__(self, fleet: FleetConfig) -> None:
        # An id that no worker can have: nobody is passed over.
        self._live = LiveSet(own_id="", model="", forget_after_s=fleet.forget_after_ms / 1000)

    def take(self, message: Message) -> None:
        if (beat := beats.decode(message.subject, message.body)) is not None:
            self._live.heard(beat, trio.current_time())

    def latest(self) -> dict[str, tuple[beats.Beat, float]]:
        """By id, in their order: the last beat of each, and its age in seconds."""
        others = self._live.others(trio.current_time())
        return {beat.id: (beat, age_s) for beat, age_s in sorted(others, key=lambda one: one[0].id)}

    def rows(self) -> list[MemberReading]:
        return [member_of(beat, age_s) for beat, age_s in self.latest().values()]


@asynccontextmanager
async def watch(broker: Broker, fleet: FleetConfig) -> AsyncIterator[Watched]:
    """Listen to all beats for as long as the block.

    Raises `ConfigError` if the server does not let this account.
    """
    watched = Watched(fleet)
    subscription = await broker.subscribe(subjects.beat("*"), watched.take)
    try:
        yield watched
    finally:
        with trio.move_on_after(LEAVE_S, shield=True):
            await subscription.drain()


# --- how they are shown ----------------------------------------------------------------------


async def show_once(broker: Broker, config: Config, *, as_json: bool) -> int:
    """Listen for a little over a beat and print who was heard; the exit status."""
    async with watch(broker, config.fleet) as watched:
        await trio.sleep(LATE * config.fleet.beat_interval_ms / 1000)
        rows = watched.rows()
    if not rows:
        sys.stderr.write(
            f"No worker was heard on {config.nats.url}. `trio-worker run` starts one; it is heard "
            "once its model is loaded.\n"
        )
        return NOBODY_THERE
    if as_json:
        _write_lines(map(json_line, rows))
    else:
        # Where there is no terminal there is no edge to cut a long name at.
        width = None if sys.stdout.isatty() else PIPE_WIDTH
        console = Console(width=width)
        # The library would end the process by itself where nobody reads on.
        with console.capture() as drawn:
            console.print(picture_of(rows))
        _write_lines([drawn.get().removesuffix("\n")])
    return ExitStatus.OK


async def show_live(broker: Broker, fleet: FleetConfig, console: Console) -> None:
    """A table that changes in place, until cancelled."""
    # Drawn here and not by the library's own thread: one place decides what stands there.
    with Live(console=console, auto_refresh=False) as live:
        async with watch(broker, fleet) as watched:
            async for _ in trio_util.periodic(REDRAW_S):
                is_connected = broker.statistics().connected
                live.update(picture_of(watched.rows(), is_connected=is_connected), refresh=True)


async def follow(broker: Broker, fleet: FleetConfig) -> None:
    """A line for each worker when it is heard again, and one when it is gone, until cancelled."""
    told: dict[str, beats.Beat] = {}
    async with watch(broker, fleet) as watched:
        async for _ in trio_util.periodic(REDRAW_S):
            here = watched.latest()
            _write_lines(
                json_line(member_of(beat, age_s))
                for worker_id, (beat, age_s) in here.items()
                if told.get(worker_id) is not beat
            )
            _write_lines(gone_line(worker_id) for worker_id in sorted(told.keys() - here.keys()))
            told = {worker_id: beat for worker_id, (beat, _) in here.items()}


def _write_lines(lines: Iterable[str]) -> None:
    sys.stdout.writelines(f"{line}\n" for line in lines)
    sys.stdout.flush()
