"""What a caller asked for."""

from __future__ import annotations

from support.factories import make_request

from trio_worker.protocol.prompt import Message


def test_a_request_is_a_chat_if_it_has_no_prompt() -> None:
    assert not make_request(prompt="").is_chat
    hello = Message(role="user", content="hello")
    assert make_request(prompt=None, messages=(hello,)).is_chat
