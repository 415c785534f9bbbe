"""What a fleet gains by handing requests on, against what the queue group does by itself.

Each world is a process of its own in virtual time (`fleet_world.py`): as many at a time as there
are processors.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence

import msgspec
import trio

from trio_worker.bench.figures import say
from trio_worker.bench.fleet_world import FleetFigures, FleetLoad
from trio_worker.bench.programs import open_program
from trio_worker.bench.setup import Setup

WORKERS = 4
TURNS = 10
SLOW = 0.4
"""The speed of the slow one."""
POINTS = 15
"""More of the prompts' tokens cached, at least; of a hundred."""
WAIT_SHARE = 0.5
"""Of the wait to the first token at the 95th percentile, at most."""


async def alike(setup: Setup) -> None:
    """Four workers of one speed."""
    title = f"{WORKERS} workers alike"
    await compare(title, (1.0,) * WORKERS, setup.conversations, setup.rounds, required=True)


async def unlike(setup: Setup) -> None:
    """The same with one of them slow; of one seed, for what it shows is no matter of percents."""
    speeds = (*(1.0,) * (WORKERS - 1), SLOW)
    title = f"one of {WORKERS} workers at {SLOW:g} speed"
    await compare(title, speeds, setup.conversations, 1, required=False)


async def compare(
    title: str, speeds: tuple[float, ...], conversations: int, seeds: int, *, required: bool
) -> None:
    """Print what comes of the load by the queue group alone, by handing on, and the difference."""
    loads = [
        FleetLoad(
            hand_on=hand_on,
            seed=seed,
            speeds=speeds,
            conversations=conversations,
            turns=TURNS,
        )
        for seed in range(1, seeds + 1)
        for hand_on in (False, True)
    ]
    figures = await in_processes(loads)
    say(
        f"{title}, {conversations} conversations of {TURNS} turns, "
        f"{seeds} seed{'s' * (seeds > 1)}, virtual time:"
    )
    random, handed_on = (mean_of(figures[at::2]) for at in (0, 1))
    _say_row("queue group alone", random)
    _say_row("handing on", handed_on)
    points = 100 * (handed_on.cached_share - random.cached_share)
    share = handed_on.first_token_p95_s / random.first_token_p95_s
    say(
        f"  difference: {points:+.1f} points cached"
        + (f" (+{POINTS} required)" if required else "")
        + f", first token p95 {share:.2f} of it"
        + (f" ({WAIT_SHARE:g} required)" if required else "")
    )


async def in_processes(loads: Sequence[FleetLoad]) -> list[FleetFigures]:
    """What comes of each, in their order. Cancelled: the processes are killed."""
    figures: dict[int, FleetFigures] = {}
    processors = trio.CapacityLimiter(os.cpu_count() or 1)

    async def one(number: int, load: FleetLoad) -> None:
        async with processors, open_program("trio_worker.bench.fleet_world") as program:
            await program.write(msgspec.to_builtins(load))
            figures[number] = msgspec.convert(await program.read(), FleetFigures)

    async with trio.open_nursery() as nursery:
        for number, load in enumerate(loads):
            nursery.start_soon(one, number, load)
    return [figures[number] for number in range(len(loads))]


def mean_of(figures: Sequence[FleetFigures]) -> FleetFigures:
    """Of each figure."""
    columns = zip(*map(msgspec.structs.astuple, figures), strict=True)
    return FleetFigures(
        **dict(zip(FleetFigures.__struct_fields__, map(statistics.mean, columns), strict=True))
    )


def _say_row(name: str, figures: FleetFigures) -> None:
    say(
        f"  {name:17}: {100 * figures.cached_share:.1f} % of the prompts' tokens cached, "
        f"first token p50 {figures.first_token_p50_s:.2f} s, "
        f"p95 {figures.first_token_p95_s:.2f} s, "
        f"{figures.workers_per_conversation:.2f} workers a conversation"
    )
