"""From the name of a model to a model that computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

ProgressSink: TypeAlias = Callable[[str, int, int, str], None]
"""Is told the step, how much of it is done, of how much (0 if nobody knows), and in which unit."""


class CannotLoad(Exception):
    """Loading this model again would fail again; the message is for the person who named it."""
