"""Tiny models whose vocabularies and templates mark reasoning and calls as some families do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from support.tiny_model import write_tiny_model

TELLING = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}"
    "{% for tool_call in m.tool_calls or [] %}{% set tool_call = tool_call.function %}CALL"
    "{{ tool_call.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if thinking_budget is defined %}[{{ thinking_budget }}]{% endif %}"
    "{% if enable_thinking %}THINK{% endif %}{% endif %}"
)

MARKS: dict[str, tuple[bool, tuple[str, ...], str, str]] = {
    "hermes": (
        False,
        ("<think>", "</think>", "<tool_call>", "</tool_call>"),
        '<tool_call>{"name": "{{ tool_call.name }}", ',
        "<think>\n",
    ),
    "mistral": (True, ("[TOOL_CALLS]", "[ARGS]"), "[TOOL_CALLS]", ""),
    "gemma": (
        True,
        ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>'),
        "<|tool_call>call:<tool_call|>",
        "",
    ),
}
"""Whether the marks are special tokens, which they are, what tells mlx-lm of the calls' format,
and what begins reasoning."""


def write_marked_model(folder: Path, family: str) -> Path:
    """The tiny model with a family's marks in its vocabulary and in its template."""
    special, marks, calls, think = MARKS[family]
    write_tiny_model(folder)
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_tokens([AddedToken(mark, special=special, normalized=False) for mark in marks])
    tokenizer.save(str(file))
    file = folder / "tokenizer_config.json"
    template = TELLING.replace("CALL", calls).replace("THINK", think)
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    return folder


def saying(tokenizer: Any, text: str) -> str:
    """A grammar by which nothing but `text` can be said, its marks as their tokens."""
    added = {str(token.content): id_ for id_, token in tokenizer.added_tokens_decoder.items()}
    parts = re.split(f"({'|'.join(map(re.escape, added))})", text)
    said = [f"<[{added[part]}]>" if part in added else json.dumps(part) for part in parts if part]
    return f"start: {' '.join(said)}\n"
