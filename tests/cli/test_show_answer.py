"""What `ask` shows of an answer, and where."""

from __future__ import annotations

import pytest
from support.worker_rig import WORKER_ID, running_worker
from trio.testing import MockClock

from trio_worker.cli.show_answer import show_answer
from trio_worker.client import Client


async def test_what_the_model_thinks_goes_to_standard_error(
    autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    request = {
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 40,
        "seed": 7,
        "reasoning_effort": "low",
    }
    async with running_worker() as rig:
        client = Client(rig.caller)
        whole = await client.complete(request, worker_id=WORKER_ID)
        await show_answer(client, request, WORKER_ID)
    shown = capsys.readouterr()
    assert whole.reasoning
    assert shown.err == f"{whole.reasoning}\n\n"
    assert shown.out.startswith(f"{whole.text}\n(40 tokens in ")
