"""The engine's end of a line: what comes together is answered together."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from trio_worker.engine import sockets
from trio_worker.engine.frame_socket import FrameSocket
from trio_worker.engine.sockets import Line
from trio_worker.protocol.frames import (
    FromEngine,
    ToEngine,
    Tokenise,
    Tokenised,
    decode_from_engine,
    encode,
)
from trio_worker.protocol.prompt import Prompt


class Asked(Exception):
    """Ends the loop of a test's line, which nothing else does."""


@pytest.fixture
def pair() -> Iterator[tuple[Line, socket.socket]]:
    ours, theirs = socket.socketpair()
    line = Line(ours.detach())
    with theirs:
        theirs.settimeout(10.0)
        yield line, theirs
    line._socket.close()


def ask(theirs: socket.socket, *prompts: str) -> None:
    theirs.sendall(b"".join(encode(Tokenise(prompt=each, messages=None)) for each in prompts))


def serve(line: Line, *, takes_s: float = 0.0) -> threading.Thread:
    def answer(asked: ToEngine) -> FromEngine:
        assert isinstance(asked, Tokenise)
        if asked.prompt == "stop":
            raise Asked
        time.sleep(takes_s)
        return Tokenised(prompt=Prompt(tokens=(int(asked.prompt or 0),)))

    def run() -> None:
        with pytest.raises(Asked):
            line.answer(answer)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_what_has_come_together_is_answered_in_order_and_at_once(
    pair: tuple[Line, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "TOGETHER_S", 60.0)
    line, theirs = pair
    ask(theirs, "1", "2", "3")
    thread = serve(line)
    received = theirs.recv(2**16)
    expected = b"".join(encode(Tokenised(prompt=Prompt(tokens=(number,)))) for number in (1, 2, 3))
    assert received == expected, "in one piece"
    ask(theirs, "stop")
    thread.join(10)


def test_an_answer_does_not_wait_for_those_behind_it_that_take_their_time(
    pair: tuple[Line, socket.socket],
) -> None:
    line, theirs = pair
    ask(theirs, "1", "2", "stop")
    thread = serve(line, takes_s=2 * sockets.TOGETHER_S)
    # The loop ends in the middle of the third: what had been answered is there all the same.
    thread.join(10)
    frames = FrameSocket(theirs)
    assert [decode_from_engine(frames.receive()) for _ in range(2)] == [
        Tokenised(prompt=Prompt(tokens=(1,))),
        Tokenised(prompt=Prompt(tokens=(2,))),
    ]
