"""How a family of models writes what it thinks, and its calls of tools."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

Parse: TypeAlias = Callable[[str, list[dict[str, Any]]], Any]
"""From what stands between a format's marks, and the tools as OpenAI writes them, to a call or a
list of calls: `{"name": …, "arguments": {…}}`, perhaps with an `id`. It may raise anything and
return anything: what is no call is text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """What stands before and after."""

    start: str
    end: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CallStyle:
    """How calls are written."""

    format: str
    """mlx-lm's name of it, by which `formats.py` knows how it is streamed."""
    start: str
    end: str
    """"" where nothing ends a call but the end of its arguments."""
    parse: Parse


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """What to look for in a model's answers; None: it writes no such thing."""

    reasoning: Marks | None = None
    calls: CallStyle | None = None


PLAIN = Style()
