"""Requests for the tiny model, and the model itself as the tests ask for it."""

from __future__ import annotations

from trio_worker.engine.models.tiny import (
    CHAT_TEMPLATE,
    CONTEXT,
    END,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    MERGES,
    SPECIAL,
    VOCABULARY,
    byte_token,
    write_tiny_model,
)
from trio_worker.engine.serve import GREEDY
from trio_worker.protocol.turn import Admit, RequestId

__all__ = [
    "CHAT_TEMPLATE",
    "CONTEXT",
    "END",
    "HEADS",
    "HIDDEN",
    "KV_HEADS",
    "LAYERS",
    "MERGES",
    "SPECIAL",
    "VOCABULARY",
    "admits",
    "byte_token",
    "write_tiny_model",
]


def admits(*lengths: int) -> tuple[Admit, ...]:
    """Greedy requests for 20 tokens, with prompts of these lengths, by which they are named."""
    return tuple(
        Admit(
            request_id=RequestId(str(length)),
            prompt=tuple(range(3, 3 + length)),
            produced=(),
            max_tokens=20,
            sampling=GREEDY,
            stop=(),
        )
        for length in lengths
    )
