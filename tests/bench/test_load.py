"""The callers that keep a worker busy: that they count what is answered, all of it and once."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import trio
from support.worker_rig import make_config

from trio_worker.bench import http_load
from trio_worker.bench.ahead import clocked
from trio_worker.bench.clocked_engine import TEXT
from trio_worker.bench.cost import cost_of
from trio_worker.bench.load import Callers, Load
from trio_worker.bench.measured_worker import MeasuredWorker
from trio_worker.bench.setup import Setup
from trio_worker.errors import WorkerFault

MANY = tuple(f"prompt {number}" for number in range(6))


def load(url: str = "", subject: str = "inference.w1", **fields: Any) -> Load:
    request = fields.pop("request", {"stream": True, "max_tokens": 5})
    given = {"prompts": MANY, "concurrent": 2, **fields}
    return Load(url=url, subject=subject, request=request, **given)


# --- a whole worker ---------------------------------------------------------------------------


def setup() -> Setup:
    config = make_config("worker.simulated.turn_ms=1", "worker.simulated.prefill_ms_per_token=0")
    return Setup(config=config, engine="simulated", max_tokens=2, rounds=1)


@asynccontextmanager
async def running(chosen: Setup) -> AsyncIterator[MeasuredWorker]:
    with trio.fail_after(60):
        async with chosen.worker() as worker:
            yield worker


@pytest.mark.nats
@pytest.mark.parametrize("stream", [True, False])
async def test_every_prompt_is_answered_once_and_its_tokens_are_counted(*, stream: bool) -> None:
    async with running(setup()) as worker:
        request = {"stream": stream, "max_tokens": 5}
        cost = await cost_of(load(worker.nats_url, worker.subject, request=request))
    assert (cost.got.answers, cost.got.tokens) == (6, 30)
    assert len(cost.got.first_token_s) == 6
    assert 0 < max(cost.got.first_token_s) < cost.got.seconds
    assert cost.cpu_s > 0


@pytest.mark.nats
async def test_streams_are_measured_while_all_run_and_are_cancelled_afterwards() -> None:
    """At most a token a step of the clock, and one step that was under way."""
    async with running(clocked(setup(), device_ms=5.0, host_ms=0.5)) as worker:
        request = {"stream": True, "max_tokens": 100_000}
        asked = load(
            *(worker.nats_url, worker.subject),
            request=request,
            token_text=TEXT,
            warmup_s=0.05,
            seconds=0.3,
        )
        cost = await cost_of(asked)
        again = await cost_of(asked)
        assert worker.largest_batch == 2, "the first two have left before the others came"
    for got in (cost.got, again.got):
        assert got.answers == 0
        assert 2 <= got.tokens <= 2 * (got.seconds / 0.005 + 2)
        assert len(got.first_token_s) == 2


@pytest.mark.nats
async def test_what_is_no_answer_ends_the_measurement(capfd: pytest.CaptureFixture[str]) -> None:
    async with running(setup()) as worker:
        for request, subject, said in (
            ({"stream": True, "max_tokens": -1}, worker.subject, "INVALID_REQUEST"),
            ({"stream": True}, "inference.nobody", "NATS/1.0 503"),
        ):
            with pytest.raises(WorkerFault, match="ended before"):
                await cost_of(load(worker.nats_url, subject, request=request))
            shown = capfd.readouterr().err
            assert "not an answer" in shown
            assert said in shown


# --- the bytes of a connection ------------------------------------------------------------------


class Server:
    """Says what was written beforehand, so many bytes at a time; a worker's end of the line."""

    def __init__(self, said: bytes, at_once: int) -> None:
        self._said = said
        self._at_once = at_once
        self.heard = b""

    def recv(self, _: int) -> bytes:
        part, self._said = self._said[: self._at_once], self._said[self._at_once :]
        return part

    def sendall(self, data: bytes) -> None:
        self.heard += data


def message(reply: str, body: str, *headers: str, control: str = " ctl.1") -> bytes:
    head = "".join(f"{line}\r\n" for line in ("NATS/1.0", *headers, "")).encode()
    whole = head + body.encode()
    line = f"HMSG {reply} 1{control} {len(head)} {len(whole)}\r\n".encode()
    return line + whole + b"\r\n"


@pytest.mark.parametrize("at_once", [1, 7, 200])
def test_a_message_is_counted_once_wherever_it_is_cut(at_once: int) -> None:
    """Also one with several tokens, and one that says what looks like protocol."""
    reply = "_INBOX.load.0"
    said = (
        b"INFO {}\r\nPING\r\n"
        + message(reply, '{"delta":{"role":"assistant"}}')
        + message(reply, '{"content":"tick tick "}')
        + message(reply, '{"content":"tick \r\nMSG _INBOX.load.0 1 4\r\n"}')
        + message(reply, '{"usage":{"completion_tokens":3}}', "Terminal: done")
    )
    for token_text in ("tick ", ""):
        server = Server(said, at_once)
        asked = load(prompts=("one",), concurrent=1, token_text=token_text)
        got = Callers(asked, server).measure(lambda: None)  # type: ignore[arg-type]
        assert (got.tokens, got.messages, got.answers) == (3, 4, 1)
        assert len(got.first_token_s) == 1
        connect, subscribe, publish, *_ = server.heard.split(b"\r\n")
        assert connect.startswith(b"CONNECT {")
        assert subscribe == b"SUB _INBOX.load.* 1"
        assert publish.startswith(b"PUB inference.w1 _INBOX.load.0 ")
        assert b"PONG\r\n" in server.heard


# --- HTTP ---------------------------------------------------------------------------------------


class Chats(BaseHTTPRequestHandler):
    """Answers as mlx-lm's server does, which closes each connection."""

    connections = 0
    """Of all servers, for tests to look at how many more there are."""

    def setup(self) -> None:
        Chats.connections += 1
        super().setup()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        usage = {"usage": {"completion_tokens": asked["max_tokens"]}}
        if not asked["stream"]:
            self.answer_whole(json.dumps(usage).encode())
            return
        assert asked["stream_options"] == {"include_usage": True}
        self.begin()
        for text in ("", *("a" * asked["max_tokens"])):
            self.write(f'data: {{"delta": {{"content": "{text}"}}}}\n\n'.encode())
        self.write(f"data: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode())
        self.finish_answer()

    def begin(self) -> None:
        self.send_response(200)
        self.end_headers()

    def write(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()

    def finish_answer(self) -> None:
        """That is what closing does."""

    def answer_whole(self, body: bytes) -> None:
        self.begin()
        self.write(body)

    def log_message(self, *_: Any) -> None:
        """Nobody reads it."""


class KeptChats(Chats):
    """Keeps its connections, and sends a byte at a time."""

    protocol_version = "HTTP/1.1"

    def begin(self) -> None:
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()

    def setup(self) -> None:
        super().setup()
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def write(self, data: bytes) -> None:
        for byte in b"%x\r\n%b\r\n" % (len(data), data):
            super().write(bytes([byte]))

    def finish_answer(self) -> None:
        self.wfile.write(b"0\r\n\r\n")

    def answer_whole(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def http_server(chats: type[Chats] = Chats) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), chats) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1/chat/completions"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(("chats", "connections"), [(Chats, 6), (KeptChats, 2)])
def test_the_callers_of_an_http_server_count_its_usage(
    chats: type[Chats], connections: int
) -> None:
    """Over as few connections as it lets them."""
    before = Chats.connections
    with http_server(chats) as url:
        got = http_load.measure(load(url), lambda: None)
    assert (got.answers, got.tokens) == (6, 30)
    assert got.messages == 6 * 7, "an empty one, the tokens, the usage"
    assert len(got.first_token_s) == 6
    assert min(got.first_token_s) > 0
    assert Chats.connections - before == connections


@pytest.mark.parametrize("chats", [Chats, KeptChats])
def test_whole_answers_end_where_they_say(chats: type[Chats]) -> None:
    with http_server(chats) as url:
        request = {"stream": False, "max_tokens": 5}
        got = http_load.measure(load(url, request=request), lambda: None)
    assert (got.answers, got.tokens, got.messages) == (6, 30, 0)


def test_the_callers_of_an_http_server_leave_when_the_time_is_over() -> None:
    began: list[bool] = []
    with http_server(KeptChats) as url:
        asked = load(url, request={"stream": True, "max_tokens": 5}, token_text='"a"', seconds=0.1)
        got = http_load.measure(asked, lambda: began.append(True))
    assert began == [True]
    assert 0.1 <= got.seconds < 5
    assert got.tokens <= 5 * (got.answers + 2)


def test_what_has_no_usage_is_no_answer() -> None:
    """As an error page has none."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def refuse() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(b"HTTP/1.0 404 Not Found\r\n\r\n")

        thread = threading.Thread(target=refuse)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        with pytest.raises(SystemExit, match="not an answer"):
            http_load.measure(load(url, prompts=("one",), concurrent=1), lambda: None)
        thread.join()
