"""An answer on standard output, while it is made."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from trio_worker.cli.exit_statuses import ANSWERED_WITH_AN_ERROR
from trio_worker.client import Client
from trio_worker.errors import ExitStatus
from trio_worker.jetstream.api import Stored
from trio_worker.wire import native


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


def show_stored(answer: Stored) -> int:
    """A job's answer as it is stored; returns the status of the command.

    What the model thought goes to standard error, and so does the error that an answer may be.
    """
    body = json.loads(answer.body)
    if answer.headers.get(native.Header.TERMINAL) == "error":
        error = body["error"]
        sys.stderr.write(f"{error['code']}: {error['message']}\n")
        return ANSWERED_WITH_AN_ERROR
    for choice in body["choices"]:
        message = choice.get("message") or {}
        if reasoning := message.get("reasoning_content"):
            sys.stderr.write(f"{reasoning}\n\n")
        for call in message.get("tool_calls") or ():
            function = call["function"]
            sys.stdout.write(f"{function['name']}({function['arguments']})\n")
        text = choice.get("text") or message.get("content") or ""
        sys.stdout.write(f"{text}\n")
    tokens, worker = body["usage"]["completion_tokens"], body["worker"]
    sys.stdout.write(f"({tokens} tokens, seed {worker['seed']}, worker {worker['id']})\n")
    return ExitStatus.OK
