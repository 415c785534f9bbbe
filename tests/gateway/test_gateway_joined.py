"""A whole answer is the same whether a worker writes it or a gateway joins a stream."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_worker.errors import InternalError
from trio_worker.gateway.joined import JoinedAnswer
from trio_worker.protocol.prompt import CallArguments, CallBegun, Piece, Reasoning
from trio_worker.protocol.turn import FinishReason, Output, RequestId, TokenLogprob
from trio_worker.wire import native

TEXTS = st.text(st.characters(codec="utf-8"), max_size=5)
NUMBERS = st.floats(max_value=0, allow_nan=False, allow_infinity=False)


@st.composite
def spoken(draw: st.DrawFn, *, chat: bool, top: int | None) -> list[Output]:
    """The tokens of a choice; `top` likely ones are told with each, or no log-probability."""
    begun = 0
    tokens = []
    for _ in range(draw(st.integers(1, 6))):
        text = draw(TEXTS)
        beside: list[Piece] = []
        for _ in range(draw(st.integers(0, 2)) if chat else 0):
            kind = draw(st.sampled_from(["thinks", "calls", "goes on"]))
            if kind == "thinks":
                beside.append(Reasoning(text=draw(TEXTS)))
            elif kind == "calls":
                own_id = draw(st.none() | st.just("own"))
                beside.append(CallBegun(index=begun, name=draw(TEXTS), id=own_id))
                begun += 1
            elif begun:
                index = draw(st.integers(0, begun - 1))
                beside.append(CallArguments(index=index, text=draw(TEXTS)))
        # In a chat those of a token wait, now and then, for what it turns out to be.
        told = 0 if top is None else draw(st.integers(0, 2)) if chat else 1
        logprobs = tuple(
            TokenLogprob(
                token=draw(TEXTS),
                logprob=draw(NUMBERS),
                top=tuple((draw(TEXTS), draw(NUMBERS)) for _ in range(top or 0)),
            )
            for _ in range(told)
        )
        tokens.append(output(text, logprobs, tuple(beside)))
    finish = draw(st.sampled_from(FinishReason))
    return [*tokens[:-1], msgspec.structs.replace(tokens[-1], finish=finish)]


def output(
    text: str = "", logprobs: tuple[TokenLogprob, ...] = (), beside: tuple[Piece, ...] = ()
) -> Output:
    return Output(request_id=RequestId("r"), token=0, text=text, logprobs=logprobs, beside=beside)


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


def writer(*, chat: bool, choices: int = 1) -> native.AnswerWriter:
    return native.AnswerWriter(
        request_id=RequestId("r"), model='m"\\ü', created=1_700_000_000, chat=chat, choices=choices
    )


@given(data=st.data(), chat=st.booleans())
def test_joined_chunks_are_what_a_worker_writes_as_a_whole(
    data: st.DataObject, *, chat: bool
) -> None:
    top = data.draw(st.none() | st.integers(0, 3))
    said = data.draw(st.lists(spoken(chat=chat, top=top), min_size=1, max_size=3))
    wholes = [native.WholeChoice() for _ in said]
    worker = writer(chat=chat, choices=len(said))
    joined = JoinedAnswer(is_chat=chat, has_logprobs=top is not None, choices=len(said))
    for choice in range(len(said)):
        joined.add(worker.opening(choice))
    for step in zip_longest(*said):
        joined.add(worker.keep_alive())
        for choice, token in enumerate(step):
            if token is None:
                continue
            wholes[choice].add(token)
            if token.text or token.beside or token.logprobs:
                joined.add(worker.chunk(token.text, token.logprobs, token.beside, choice=choice))
            if token.finish is not None and len(said) > 1:
                joined.add(worker.ending(token.finish, choice=choice))
    assert joined.text == "".join(token.text for token in said[0])
    finish = said[0][-1].finish
    assert finish is not None
    last = (
        worker.closing(finish, usage(), note())
        if len(said) == 1
        else worker.summary(usage(), note())
    )
    assert joined.closing(last) == writer(chat=chat, choices=len(said)).whole(
        wholes, usage(), note(), with_logprobs=top is not None
    )


@pytest.mark.parametrize("chat", [True, False])
def test_log_probabilities_of_no_token_are_there_where_they_were_asked_for(*, chat: bool) -> None:
    nothing = native.WholeChoice()
    nothing.finish = FinishReason.STOP
    expected = writer(chat=chat).whole([nothing], usage(), note(), with_logprobs=True)
    joined = JoinedAnswer(is_chat=chat, has_logprobs=True)
    body = joined.closing(writer(chat=chat).closing(FinishReason.STOP, usage(), note()))
    assert body == expected


def test_calls_in_the_place_of_a_text_have_no_log_probabilities() -> None:
    called = output(beside=(CallBegun(index=0, name="f"), CallArguments(index=0, text="{}")))
    whole = native.WholeChoice()
    whole.add(msgspec.structs.replace(called, finish=FinishReason.TOOL_CALLS))
    worker = writer(chat=True)
    joined = JoinedAnswer(is_chat=True, has_logprobs=True)
    joined.add(worker.chunk("", (), called.beside))
    body = joined.closing(worker.closing(FinishReason.TOOL_CALLS, usage(), note()))
    assert body == writer(chat=True).whole([whole], usage(), note(), with_logprobs=True)
    (choice,) = msgspec.json.decode(body)["choices"]
    assert (choice["message"]["content"], choice["logprobs"]) == (None, None)


def test_an_answer_that_ends_before_all_its_choices_is_none() -> None:
    worker = writer(chat=True, choices=2)
    joined = JoinedAnswer(is_chat=True, has_logprobs=False, choices=2)
    joined.add(worker.ending(FinishReason.STOP, choice=1))
    with pytest.raises(InternalError):
        joined.closing(worker.summary(usage(), note()))


@pytest.mark.parametrize(
    "choice",
    [
        '{"index":1,"delta":{"content":"a"}}',
        '{"index":-1,"delta":{"content":"a"}}',
        '{"delta":{"tool_calls":[{"index":1,"function":{"arguments":"{}"}}]}}',
        '{"delta":{"tool_calls":[{"index":-1,"function":{"arguments":"{}"}}]}}',
    ],
)
def test_more_of_what_has_not_begun_is_no_chunk(choice: str) -> None:
    joined = JoinedAnswer(is_chat=True, has_logprobs=False)
    with pytest.raises(InternalError):
        joined.add(f'{{"choices":[{choice}]}}'.encode())


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
