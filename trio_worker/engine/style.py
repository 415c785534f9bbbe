"""How a model's family writes what it thinks and calls, as mlx-lm has found out."""

from __future__ import annotations

from typing import Any

from trio_worker.markup.style import CallStyle, Marks, Style


def style_of(tokenizer: Any) -> Style:
    """What to look for in the answers of mlx-lm's `tokenizer`'s model."""
    reasoning = calls = None
    if tokenizer.has_thinking:
        reasoning = Marks(start=tokenizer.think_start, end=tokenizer.think_end)
    if tokenizer.has_tool_calling:
        parse = tokenizer.tool_parser
        calls = CallStyle(
            # Each format has a module, and one that only names another has that one's function.
            format=parse.__module__.rpartition(".")[2],
            start=tokenizer.tool_call_start,
            end=tokenizer.tool_call_end,
            parse=parse,
        )
    return Style(reasoning=reasoning, calls=calls)
