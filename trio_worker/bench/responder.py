"""Answers every message at once with what it holds: what a request costs at least with nats-py.

Its arguments are the server's URL and the subject. It writes an empty JSON object when it
listens, and ends with its input.
"""

from __future__ import annotations

import asyncio
import sys

import nats
from nats.aio.msg import Msg


async def respond(url: str, subject: str) -> None:
    """Until standard input ends."""
    connection = await nats.connect(url)

    async def answer(message: Msg) -> None:
        await message.respond(message.data)

    await connection.subscribe(subject, cb=answer)
    await connection.flush()
    sys.stdout.write("{}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await connection.close()


if __name__ == "__main__":
    asyncio.run(respond(*sys.argv[1:]))
