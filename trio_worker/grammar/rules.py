"""What a caller asks an answer to be, as rules of llguidance's Lark, the first called `answer`."""

from __future__ import annotations

import json

from trio_worker.grammar import GrammarRefused, schema
from trio_worker.protocol.prompt import Choice, Constraint, JsonSchema, Lark, Regex

PATTERN_BYTES_MAX = 16 * 1024
CHOICES_BYTES_MAX = 64 * 1024
LARK_BYTES_MAX = 64 * 1024


def answer_rules(constraint: Constraint) -> str:
    """Raises `GrammarRefused` for what is no schema, or too big, or no choice."""
    match constraint:
        case JsonSchema(schema=text):
            return f"answer: {schema.lark(schema.read(text))}\n"
        case Regex(pattern=pattern):
            return f"answer: {_regex(pattern)}\n"
        case Choice(options=options):
            return f"answer: {_choice(options)}\n"
        case Lark(grammar=grammar):
            _bound("grammar", grammar, LARK_BYTES_MAX)
            # Within braces its names are its own.
            return f"answer: %lark {{\n{grammar}\n}}\n"


def quoted(text: str) -> str:
    """A text as a string of Lark."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def slashed(pattern: str) -> str:
    """A regular expression as Lark has it, between slashes."""
    parts, escaped = [], False
    for char in pattern:
        # A backslash before it stands already.
        parts.append("\\/" if char == "/" and not escaped else char)
        escaped = char == "\\" and not escaped
    return "/" + "".join(parts) + "/"


def _regex(pattern: str) -> str:
    _bound("pattern", pattern, PATTERN_BYTES_MAX)
    # Two slashes with nothing between them would begin a comment.
    return slashed(pattern) if pattern else '""'


def _choice(options: tuple[str, ...]) -> str:
    if not any(options):
        raise GrammarRefused("there is nothing to choose from")
    _bound("choice", "".join(options), CHOICES_BYTES_MAX)
    return " | ".join(quoted(option) for option in dict.fromkeys(options))


def _bound(what: str, text: str, most: int) -> None:
    if len(text.encode()) > most:
        raise GrammarRefused(f"the {what} is longer than {most} bytes")
