"""The frames between the worker and its engine."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trio_worker.protocol.frames import (
    FromEngine,
    Hello,
    LoadFailed,
    Progress,
    ToEngine,
    Tokenise,
    Tokenised,
    TokeniseFailed,
    decode_from_engine,
    decode_to_engine,
    encode,
)
from trio_worker.protocol.framing import MAX_FRAME_BYTES, FrameError
from trio_worker.protocol.prompt import (
    CallArguments,
    CallBegun,
    Choice,
    Form,
    JsonSchema,
    Lark,
    Message,
    Prompt,
    Reasoning,
    Regex,
    Tool,
    ToolCall,
    ToolUse,
    Wanted,
)
from trio_worker.protocol.turn import (
    Admit,
    EngineInfo,
    EngineMemory,
    FinishReason,
    Output,
    Prefill,
    Report,
    RequestId,
    Sampling,
    SequenceFailure,
    TokenLogprob,
    Work,
)

HELLO = Hello(
    model="m",
    model_name=None,
    max_batch_size=8,
    prewarm=True,
    prewarm_prompt="Hello",
    prewarm_max_tokens=1,
    prefix_cache_bytes=0,
)
INFO = EngineInfo(
    model="m",
    context_length=1,
    cache_bytes_per_token=1,
    vocabulary_size=2,
    device="cpu",
)
numbers = st.integers(-(2**63), 2**63 - 1)
reals = st.floats(allow_nan=False)
names = st.text(max_size=8)
request_ids = names.map(RequestId)


def tuples_of(of: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(of, max_size=3).map(tuple)


samplings = st.builds(
    Sampling,
    temperature=reals,
    top_p=reals,
    top_k=numbers,
    min_p=reals,
    repetition_penalty=reals,
    presence_penalty=reals,
    frequency_penalty=reals,
    logit_bias=tuples_of(st.tuples(numbers, reals)),
    seed=st.integers(0, 2**53 - 1),
    logprobs=st.booleans(),
    top_logprobs=numbers,
)
tools = st.builds(
    Tool,
    name=names,
    description=st.none() | names,
    parameters=st.none() | names,
    strict=st.booleans(),
)
forms = st.builds(
    Form,
    grammar=names,
    finds_reasoning=st.booleans(),
    starts_in_reasoning=st.booleans(),
    max_reasoning_tokens=st.none() | numbers,
    tools=tuples_of(tools),
    is_general=st.booleans(),
    one_call=st.booleans(),
)
messages = st.builds(
    Message,
    role=names,
    content=names,
    name=st.none() | names,
    reasoning=st.none() | names,
    tool_calls=tuples_of(st.builds(ToolCall, id=names, name=names, arguments=names)),
    tool_call_id=st.none() | names,
)
wishes = st.builds(
    Wanted,
    constraint=st.none()
    | st.builds(JsonSchema, schema=names)
    | st.builds(Regex, pattern=names)
    | st.builds(Choice, options=tuples_of(names))
    | st.builds(Lark, grammar=names),
    tools=tuples_of(tools),
    tool_use=st.sampled_from(ToolUse),
    allowed_tools=tuples_of(names),
    parallel_calls=st.booleans(),
    max_reasoning_tokens=st.none() | numbers,
    template_variables=names,
)
admits = st.builds(
    Admit,
    request_id=request_ids,
    prompt=tuples_of(numbers),
    produced=tuples_of(numbers),
    max_tokens=numbers,
    sampling=samplings,
    stop=tuples_of(names),
    form=forms,
)
works = st.builds(
    Work,
    admit=tuples_of(admits),
    remove=tuples_of(request_ids),
    prefill_tokens=numbers,
    trim_caches=st.booleans(),
)
logprobs = st.builds(
    TokenLogprob, token=names, logprob=reals, top=tuples_of(st.tuples(names, reals))
)
pieces = (
    st.builds(Reasoning, text=names)
    | st.builds(CallBegun, index=numbers, name=names, id=st.none() | names)
    | st.builds(CallArguments, index=numbers, text=names)
)
outputs = st.builds(
    Output,
    request_id=request_ids,
    token=numbers,
    text=names,
    finish=st.none() | st.sampled_from(FinishReason),
    logprobs=tuples_of(logprobs),
    beside=tuples_of(pieces),
    is_reasoning=st.booleans(),
)
reports = st.builds(
    Report,
    outputs=tuples_of(outputs),
    prefills=tuples_of(
        st.builds(Prefill, request_id=request_ids, done=numbers, total=numbers, cached=numbers)
    ),
    failures=tuples_of(
        st.builds(
            SequenceFailure,
            request_id=request_ids,
            message=names,
            is_askers_fault=st.booleans(),
        )
    ),
    residents=st.frozensets(request_ids, max_size=3),
    memory=st.builds(EngineMemory, active=numbers, cache=numbers),
    seconds=reals,
    prefill_tokens=numbers,
    prefill_calls=numbers,
    prefill_seconds=reals,
)
to_engine = (
    works
    | st.just(HELLO)
    | st.builds(Tokenise, prompt=names, messages=st.none(), wanted=wishes)
    | st.builds(Tokenise, prompt=st.none(), messages=tuples_of(messages), wanted=wishes)
)
from_engine = (
    reports
    | st.just(INFO)
    | st.builds(Progress, step=names, done=numbers, total=numbers, unit=names)
    | st.builds(LoadFailed, message=names)
    | st.builds(
        Tokenised,
        prompt=st.builds(Prompt, tokens=tuples_of(numbers), form=forms, notes=tuples_of(names)),
    )
    | st.builds(TokeniseFailed, message=names, is_models_fault=st.booleans())
)


def body_of(frame: ToEngine | FromEngine) -> bytes:
    return encode(frame)[4:]


@given(to_engine)
def test_the_engine_gets_what_the_worker_sent(frame: Any) -> None:
    assert decode_to_engine(body_of(frame)) == frame


@given(from_engine)
def test_the_worker_gets_what_the_engine_sent(frame: Any) -> None:
    got = decode_from_engine(body_of(frame))
    assert got == frame
    assert type(got) is type(frame)


def test_the_end_of_an_answer_arrives_as_one_of_its_reasons() -> None:
    """Equal strings would not do: they are compared by identity."""
    output = Output(request_id=RequestId("a"), token=1, text="x", finish=FinishReason.LENGTH)
    report = Report(
        outputs=(output,),
        prefills=(),
        failures=(),
        residents=frozenset(),
        memory=EngineMemory(active=0, cache=0),
        seconds=0.0,
        prefill_tokens=0,
        prefill_calls=0,
        prefill_seconds=0.0,
    )
    got = decode_from_engine(body_of(report))
    assert isinstance(got, Report)
    assert got.outputs[0].finish is FinishReason.LENGTH
    with pytest.raises(FrameError):
        decode_from_engine(body_of(report).replace(b"length", b"weight"))


@given(st.binary())
@example(b"\x91\xa1\xff")
def test_bytes_that_are_no_frame_raise_a_frame_error_and_nothing_else(body: Any) -> None:
    for decode in (decode_to_engine, decode_from_engine):
        with suppress(FrameError):
            decode(body)


@given(to_engine | from_engine, st.data())
def test_a_frame_cut_short_or_changed_raises_a_frame_error_and_nothing_else(
    frame: Any, data: Any
) -> None:
    body = bytearray(body_of(frame))
    at = data.draw(st.integers(0, len(body) - 1))
    for decode in (decode_to_engine, decode_from_engine):
        with pytest.raises(FrameError):
            decode(bytes(body[:at]))
    body[at] ^= data.draw(st.integers(1, 255))
    for decode in (decode_to_engine, decode_from_engine):
        with suppress(FrameError):
            decode(bytes(body))


@pytest.mark.parametrize(
    "body",
    [
        ["Worm", [], [], 1, False],
        ["Work", [], [], "many", False],
        ["Work", [], [], 1, False, "one field more than there is"],
        ["Work", [["a", [1], []]], [], 1, False],
        [],
        ["Hello"],
        ["Tokenise", 1, None],
        {"type": "Tokenise", "prompt": "p", "messages": None},
    ],
    ids=str,
)
def test_what_is_unknown_or_ill_formed_is_no_frame(body: Any) -> None:
    with pytest.raises(FrameError):
        decode_to_engine(msgspec.msgpack.encode(body))


def test_a_frame_of_the_other_direction_is_refused() -> None:
    body = body_of(INFO)
    assert decode_from_engine(body) == INFO
    with pytest.raises(FrameError):
        decode_to_engine(body)


def test_a_frame_beyond_the_limit_is_not_sent() -> None:
    with pytest.raises(FrameError):
        encode(Tokenise(prompt="x" * MAX_FRAME_BYTES, messages=None))
