"""What one HTTP server allows its callers, as one value."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much, and how long. The defaults are for an address that many callers use at a time."""

    connections: int = 1000
    """At a time; another one gets the place of an idle one, or is answered 503 and closed."""
    head_bytes: int = 32 * 1024
    """Request line and headers; what is one read longer may still be taken."""
    body_bytes: int = 1_000_000
    """Of one request, after chunked encoding is undone."""
    idle_s: float = 75.0
    """Until the first byte of the next request; longer than proxies and clients keep theirs."""
    head_s: float = 10.0
    """From the first byte of a request to the end of its headers."""
    body_s: float = 30.0
    """From asking for a body to its end."""
    send_s: float = 10.0
    """The longest that a caller may leave unread what it is sent."""
    half_closed_s: float = 0.0
    """How long a caller that has closed its side is still taken to listen."""
    life_s: float = math.inf
    """A connection lives no longer, whatever happens on it."""
    drain_s: float = 30.0
    """What a drain gives to the answers that are under way."""
