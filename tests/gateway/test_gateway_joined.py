"""A whole answer is the same whether a worker writes it or a gateway joins a stream."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_worker.errors import InternalError
from trio_worker.gateway.joined import JoinedAnswer
from trio_worker.protocol.turn import FinishReason, RequestId, TokenLogprob
from trio_worker.wire import native

TEXTS = st.text(st.characters(codec="utf-8"), max_size=5)
NUMBERS = st.floats(max_value=0, allow_nan=False, allow_infinity=False)


@st.composite
def spoken(draw: st.DrawFn) -> list[tuple[str, TokenLogprob | None]]:
    """What each token shows, with its log-probability or none at all; as many likely ones each."""
    top = draw(st.none() | st.integers(0, 3))

    def logprob() -> TokenLogprob | None:
        if top is None:
            return None
        likely = tuple((draw(TEXTS), draw(NUMBERS)) for _ in range(top))
        return TokenLogprob(token=draw(TEXTS), logprob=draw(NUMBERS), top=likely)

    return [(draw(TEXTS), logprob()) for _ in range(draw(st.integers(1, 6)))]


def usage() -> native.Usage:
    return native.Usage.of(prompt=2, completion=3, cached=1)


def note() -> native.WorkerNote:
    return native.WorkerNote(
        id="w1",
        request_id="r",
        seed=7,
        queue_ms=0.5,
        prefill_ms=20.1,
        decode_ms=40.0,
        priority="medium",
        resumed=0,
        degraded=("prefix_cache",),
    )


def writer(*, chat: bool) -> native.AnswerWriter:
    return native.AnswerWriter(
        request_id=RequestId("r"), model='m"\\ü', created=1_700_000_000, chat=chat
    )


@given(said=spoken(), chat=st.booleans(), finish=st.sampled_from(FinishReason))
def test_joined_chunks_are_what_a_worker_writes_as_a_whole(
    said: list[tuple[str, TokenLogprob | None]], *, chat: bool, finish: FinishReason
) -> None:
    wanted = said[0][1] is not None
    logprobs = [each for _, each in said if each is not None]
    texts = [text for text, _ in said]
    expected = writer(chat=chat).whole(texts, logprobs if wanted else None, finish, usage(), note())
    worker = writer(chat=chat)
    joined = JoinedAnswer(is_chat=chat, has_logprobs=wanted)
    joined.add(worker.opening())
    for text, logprob in said:
        joined.add(worker.keep_alive())
        if text or logprob is not None:
            joined.add(worker.chunk(text, () if logprob is None else (logprob,)))
    assert joined.text == "".join(texts)
    assert joined.closing(worker.closing(finish, usage(), note())) == expected


@pytest.mark.parametrize("chat", [True, False])
def test_log_probabilities_of_no_token_are_there_where_they_were_asked_for(*, chat: bool) -> None:
    expected = writer(chat=chat).whole([], [], FinishReason.STOP, usage(), note())
    joined = JoinedAnswer(is_chat=chat, has_logprobs=True)
    body = joined.closing(writer(chat=chat).closing(FinishReason.STOP, usage(), note()))
    assert body == expected


def test_a_field_that_is_not_known_here_is_kept() -> None:
    body = b'{"id":"a","object":"x","choices":[{"finish_reason":"stop"}],"new":{"a": 1}}'
    answer: Any = msgspec.json.decode(JoinedAnswer(is_chat=True, has_logprobs=False).closing(body))
    assert answer["new"] == {"a": 1}


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b"\xff", b"{}", b'{"choices":[]}', b'{"a":' * 100_000]
)
def test_what_is_no_chunk_is_said_to_be_none(body: bytes) -> None:
    joined = JoinedAnswer(is_chat=True, has_logprobs=False)
    with pytest.raises(InternalError):
        joined.add(body)
    with pytest.raises(InternalError):
        joined.closing(body)
