"""A gateway in a process of its own that tells what it has cost.

Its argument is the URL of a NATS server. It listens on a free port of the loopback address and
writes a line of JSON with its `url`; then, for whatever comes on standard input, one with the
processor time `cpu_s` that it has taken so far. It ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
import time

import trio

from trio_worker.config import GatewayConfig
from trio_worker.gateway.serve import serve_gateway
from trio_worker.http.drain import Drain
from trio_worker.http.listening import open_listeners
from trio_worker.logs import set_up_logging
from trio_worker.nats.broker import open_nats_broker


async def serve(nats_url: str) -> None:
    """Answer until standard input ends."""
    set_up_logging(log_format="human", level="warning")
    config = GatewayConfig(port=0)
    async with (
        open_nats_broker(nats_url, name="bench-gateway") as broker,
        trio.open_nursery() as nursery,
    ):
        listeners = await open_listeners(config.host, 0, section="bench")
        port = listeners[0].socket.getsockname()[1]

        async def serve_until_drained() -> None:
            await serve_gateway(broker, listeners, config=config, drain=drain)

        drain = Drain()
        nursery.start_soon(serve_until_drained)  # noqa: ASYNC113 - its port is open already
        _say({"url": f"http://{config.host}:{port}/v1/chat/completions"})
        async with trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())) as questions:
            while await questions.receive_some():
                _say({"cpu_s": time.process_time()})
        drain.begin()


def _say(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    trio.run(serve, sys.argv[1])
