"""NATS without any client library."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import nats
import trio


async def raw_requests(url: str, *subjects: str) -> list[Any]:
    """What is answered to any NATS client, which knows nothing of ours."""

    async def ask() -> list[Any]:
        async with await nats.connect(url) as connection:
            answers = [await connection.request(subject, timeout=5) for subject in subjects]
            return [json.loads(answer.data) for answer in answers]

    return await trio.to_thread.run_sync(lambda: asyncio.run(ask()))
