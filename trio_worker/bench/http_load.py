"""Callers of an HTTP server in a process of their own, as `load.py` is of a worker.

Each request has a connection of its own, which the server closes when its answer has ended.
"""

from __future__ import annotations

import itertools
import re
import selectors
import socket
import sys
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

import msgspec

from trio_worker.bench.load import RECEIVE_BYTES, SILENT_S, Load, Measured

STARTED_S = 60.0
"""For the server to load its model."""
RETRY_S = 0.05
"""How often it is looked whether it has: nobody tells."""
CONTENT = b'"content": "'
COMPLETION_TOKENS = re.compile(rb'"completion_tokens": (\d+)')
USAGE_BYTES = 1024
"""Of the end of an answer, in which its usage stands."""


@dataclass(slots=True)
class _Answer:
    asked_at: float
    first_token_s: float | None = None
    tail: bytes = b""
    """The last that has come."""


def measure(load: Load) -> Measured:
    """Ask every prompt, so many at a time, to the end of the last answer."""
    url = urlsplit(load.url)
    assert url.hostname is not None
    assert url.port is not None
    address = url.hostname, url.port
    began_at, cpu_at = time.perf_counter(), time.process_time()
    prompts = iter(load.prompts)
    done: list[_Answer] = []
    with selectors.DefaultSelector() as selector:

        def ask() -> None:
            for prompt in itertools.islice(prompts, 1):
                connection = socket.create_connection(address)
                connection.sendall(_request(load, url.path, prompt))
                selector.register(
                    connection, selectors.EVENT_READ, _Answer(asked_at=time.perf_counter())
                )

        for _ in range(load.concurrent):
            ask()
        while selector.get_map():
            ready = selector.select(SILENT_S)
            if not ready:
                sys.exit("the server has fallen silent")
            for key, _ in ready:
                assert isinstance(key.fileobj, socket.socket)
                if _receive(key.fileobj, key.data):
                    continue
                selector.unregister(key.fileobj)
                key.fileobj.close()
                done.append(key.data)
                ask()
    return Measured(
        seconds=time.perf_counter() - began_at,
        cpu_seconds=time.process_time() - cpu_at,
        tokens=sum(_tokens(answer.tail) for answer in done),
        answers=len(done),
        first_token_s=tuple(each.first_token_s or 0.0 for each in done[: load.concurrent]),
    )


def _receive(connection: socket.socket, answer: _Answer) -> bool:
    """Take what has come; whether more may come."""
    data = connection.recv(RECEIVE_BYTES)
    if answer.first_token_s is None and CONTENT in data:
        answer.first_token_s = time.perf_counter() - answer.asked_at
    answer.tail = (answer.tail + data)[-USAGE_BYTES:]
    return bool(data)


def _tokens(tail: bytes) -> int:
    usage = COMPLETION_TOKENS.search(tail)
    if usage is None:
        sys.exit(f"not an answer: {tail.decode(errors='replace')}")
    return int(usage[1])


def _request(load: Load, path: str, prompt: str) -> bytes:
    fields = {
        "messages": [{"role": "user", "content": prompt}],
        "stream_options": {"include_usage": True},
        **load.request,
    }
    body = msgspec.json.encode(fields)
    head = f"POST {path} HTTP/1.0\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _wait_for_server(load: Load) -> None:
    url = urlsplit(load.url)
    give_up_at = time.monotonic() + STARTED_S
    while True:
        try:
            socket.create_connection((url.hostname or "", url.port or 0)).close()
        except OSError:
            if time.monotonic() > give_up_at:
                sys.exit("the server does not start")
            time.sleep(RETRY_S)
        else:
            return


def main() -> None:
    load = msgspec.json.decode(sys.stdin.readline(), type=Load)
    _wait_for_server(load)
    sys.stdout.write("{}\n")
    sys.stdout.flush()
    sys.stdout.write(msgspec.json.encode(measure(load)).decode() + "\n")


if __name__ == "__main__":
    main()
