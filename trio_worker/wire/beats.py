"""What a worker says of itself to the rest of the fleet: small, and often.

Readers pass over fields they do not know, so that a later version may say more.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from trio_worker.wire import subjects


class Beat(Struct, frozen=True, kw_only=True):
    """How one worker is, as of now."""

    id: str
    model: str
    """The model's name on the wire."""
    slots: int
    """How many sequences its batch holds."""
    in_flight: int
    """Sequences that it has taken in and that have not ended, those in the queue included."""
    queued: int
    """Of these, those that have not entered the batch."""
    accepting: bool
    """Whether callers should come here."""
    leaving: bool = False
    """It drains: for good."""
    version: str = ""


def encode(beat: Beat) -> bytes:
    return msgspec.json.encode(beat)


def decode(subject: str, body: bytes) -> Beat | None:
    """The beat that came on `subject`, or None for what is none, or says to be another's.

    Who may publish on a worker's subject is a matter of permissions; the body is not.
    """
    try:
        beat = msgspec.json.decode(body, type=Beat)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if subject != subjects.beat(beat.id) or beat.slots < 1 or beat.in_flight < 0:
        return None
    return beat
