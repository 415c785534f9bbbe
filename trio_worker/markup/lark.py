"""Writes grammars in llguidance's Lark: rules, literals, marks and texts up to a mark."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

TokenOf: TypeAlias = Callable[[str], int | None]
"""The token that stands for just this text, if one was added to the vocabulary for it."""
Prepare: TypeAlias = Callable[[dict[str, Any]], dict[str, Any]]
"""From a schema to the one that is written into the grammar."""
ANY_TEXT = "(?s:.*)"


class NotEnforceable(Exception):
    """No grammar says what is wanted; the message says why."""


class Rules:
    """Rules and terminals that are named `call_…` and `CALL_…`. Its state: those so far."""

    def __init__(self, token_of: TokenOf, prepare: Prepare) -> None:
        self._token_of = token_of
        self._prepare = prepare
        self.lines: list[str] = []

    def rule(self, definition: str, *, options: str = "") -> str:
        """A new rule; returns its name."""
        name = f"call_{len(self.lines)}"
        self.lines.append(f"{name}{options}: {definition}")
        return name

    def terminal(self, definition: str) -> str:
        name = f"CALL_{len(self.lines)}"
        self.lines.append(f"{name}: {definition}")
        return name

    def any_of(self, definitions: Iterable[str]) -> str:
        return self.rule(" | ".join(self.rule(each) for each in definitions))

    def text(self, first: str) -> str:
        """All rules, this one before the others."""
        return "\n".join([first, *self.lines]) + "\n"

    def is_token(self, mark: str) -> bool:
        return self._token_of(mark) is not None

    def mark(self, mark: str) -> str:
        """A mark as its token, if it is one.

        Spelled out it would be no mark to the model, and llguidance would refuse it half-way.
        """
        token = self._token_of(mark)
        return literal(mark) if token is None else f"<[{token}]>"

    def json(self, schema: dict[str, Any]) -> str:
        return self.rule(f"%json {json.dumps(self._prepare(schema))}")

    def before(
        self,
        mark: str,
        text: str = ANY_TEXT,
        *,
        never: Sequence[str] = (),
        without: Sequence[str] = (),
    ) -> str:
        """A text that matches, then `mark`, the first there is.

        The text matches nothing of `never`, and has nothing of `without` in it.
        """
        if self.is_token(mark):
            unlike = [*never, *(containing(each) for each in (mark, *without))]
            return f"{self.terminal(both(text, unlike))} {self.mark(mark)}"
        end = escaped(mark)
        unlike = [
            *(f"{each}{end}" for each in never),
            *(containing(each) for each in without),
            f"{ANY_TEXT}{end}(?s:.+)",
        ]
        # Lazy, so that it ends with the mark.
        return self.rule(self.terminal(both(text + end, unlike)), options="[lazy]")


def both(pattern: str, unlike: Sequence[str]) -> str:
    """A terminal's definition: it matches, and nothing of `unlike` does."""
    return " & ~".join(f"/{each}/" for each in (pattern, *unlike))


def literal(text: str) -> str:
    """Raises NotEnforceable for what is no Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise NotEnforceable(f"{text!r} is not Unicode") from None
    return json.dumps(text, ensure_ascii=False)


def escaped(text: str) -> str:
    """For a pattern between slashes."""
    return re.sub(r"([^\w\s<>\"'=:,])", r"\\\1", text).replace("\n", r"\n")


def containing(text: str) -> str:
    return f"{ANY_TEXT}{escaped(text)}{ANY_TEXT}"
