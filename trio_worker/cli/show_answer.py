"""An answer on standard output, while it is made."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from trio_worker.client import Client


async def show_answer(client: Client, request: Mapping[str, Any], worker_id: str | None) -> None:
    """The text as it comes, and a line about it at its end. Raises as `Client.ask` does.

    What the model thinks goes to standard error.
    """
    async with client.ask({"stream": True, **request}, worker_id=worker_id) as answer:
        is_thinking = False
        async for chunk in answer:
            if chunk.reasoning:
                is_thinking = True
                sys.stderr.write(chunk.reasoning)
                sys.stderr.flush()
            elif is_thinking and chunk.text:
                is_thinking = False
                sys.stderr.write("\n\n")
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
    assert chunk.usage is not None
    assert chunk.worker is not None
    seconds = (chunk.worker["prefill_ms"] + chunk.worker["decode_ms"]) / 1000
    sys.stdout.write(
        f"\n({chunk.usage['completion_tokens']} tokens in {seconds:.1f} s, "
        f"seed {chunk.worker['seed']}, worker {chunk.worker['id']})\n"
    )


async def show_messages(client: Client, request: Mapping[str, Any], worker_id: str | None) -> None:
    """Every message as it came, one line of JSON each. Raises as `Client.ask` does."""
    async with client.ask(request, worker_id=worker_id) as answer:
        async for chunk in answer:
            sys.stdout.write(json.dumps(chunk.body, ensure_ascii=False) + "\n")
            sys.stdout.flush()
