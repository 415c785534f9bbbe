"""The fleet as a terminal and a program see it: a row for each worker that is heard of."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from rich.console import Group
from rich.table import Table
from rich.text import Text

from trio_worker.monitoring.snapshot import MemberReading

NUMBERS = ("slots", "in flight", "queued", "heard")
COLUMNS = ("worker", "model", "slots", "in flight", "queued", "state", "version", "heard")
STYLES = {"accepting": "green", "not accepting": "yellow", "draining": "red"}


def state_of(row: MemberReading) -> str:
    """`not accepting` is full, or short of memory."""
    if row.leaving:
        return "draining"
    return "accepting" if row.accepting else "not accepting"


def json_line(row: MemberReading) -> str:
    return msgspec.json.encode(row).decode()


def gone_line(worker_id: str) -> str:
    return msgspec.json.encode({"id": worker_id, "gone": True}).decode()


def picture_of(rows: Sequence[MemberReading], *, is_connected: bool = True) -> Group:
    """For people: a table, and below it what it comes to."""
    table = Table(box=None, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in NUMBERS else "left", no_wrap=True)
    for row in rows:
        # As plain text: what a worker says of itself is no markup of ours.
        cells = (
            row.id,
            row.model,
            str(row.slots),
            str(row.in_flight),
            str(row.queued),
            Text(state_of(row), style=STYLES[state_of(row)]),
            row.version,
            f"{row.age_s:.1f} s",
        )
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))
    summary = summary_of(rows) if is_connected else "NATS is away: nobody can be heard."
    return Group(table, Text(summary)) if rows else Group(Text(summary))


def summary_of(rows: Sequence[MemberReading]) -> str:
    """One line: how many there are, and how full they are together."""
    if not rows:
        return "No worker has been heard of."
    slots = sum(row.slots for row in rows if row.accepting and not row.leaving)
    busy = sum(row.in_flight - row.queued for row in rows)
    queued = sum(row.queued for row in rows)
    workers = f"{len(rows)} worker{'s' if len(rows) > 1 else ''}"
    return f"{workers}: {busy} running, {queued} queued, {slots} slots that take requests"
