"""Reading a request: any bytes are one, or a `WorkerError` that says what is wrong."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.wire_requests import LIMITS, read

from trio_worker.core.request import Request
from trio_worker.errors import (
    InvalidRequest,
    ModelNotFound,
    PayloadTooLarge,
    WorkerError,
)
from trio_worker.protocol.prompt import JsonSchema, Message, Tool, Wanted
from trio_worker.protocol.turn import RequestId, Sampling
from trio_worker.wire import native


def read_fields(**fields: Any) -> Request:
    return read(msgspec.json.encode({"prompt": "x", **fields}))


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
_names = [*native.FIELD_NAMES, "maxTokens", "requestId", "user", "store", "other"]
_near_requests = st.dictionaries(st.sampled_from(_names), _json, max_size=8)


@given(st.binary(max_size=200) | _near_requests.map(msgspec.json.encode))
def test_any_bytes_are_a_request_or_an_error_of_the_wire(body: bytes) -> None:
    try:
        request = read(body)
    except WorkerError as error:
        reply = msgspec.json.decode(native.error_body(error, 100))
    else:
        assert request.timeout_s > 0
        return
    assert reply["error"]["message"]


def test_the_defaults_of_a_request() -> None:
    assert read(b'{"prompt": "x"}') == Request(
        request_id=RequestId("drawn"),
        prompt="x",
        messages=(),
        max_tokens=None,
        fit_max_tokens=False,
        sampling=Sampling(seed=42),
        stop=(),
        stream=False,
        priority=0,
        timeout_s=30.0,
        caller=None,
    )
    assert read(b'{"prompt": "x", "stream": true}').priority == 1


EVERYTHING = {
    "request_id": "abc",
    "model": "m",
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": ""},
    ],
    "max_tokens": 7,
    "fit_max_tokens": True,
    "n": 2,
    "temperature": 1,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.3,
    "logit_bias": {"12": -100, "3": 5},
    "seed": 1,
    "stop": ["a", "b"],
    "stream": True,
    "stream_options": {"include_usage": True, "include_obfuscation": False},
    "logprobs": True,
    "top_logprobs": 3,
    "response_format": {"type": "json_object"},
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning_effort": "low",
    "enable_thinking": True,
    "max_reasoning_tokens": 9,
    "chat_template_kwargs": {"style": "terse"},
    "priority": "low",
    "timeout_ms": 5,
    "caller": "front-1",
}


def test_every_field_arrives() -> None:
    assert EVERYTHING.keys() == {*native.FIELD_NAMES} - {"prompt", "grammar"}
    expected = Request(
        request_id=RequestId("abc"),
        prompt=None,
        messages=(
            Message(role="system", content="s"),
            Message(role="user", content="ab"),
            Message(role="assistant", content=""),
        ),
        max_tokens=7,
        fit_max_tokens=True,
        sampling=Sampling(
            temperature=1.0,
            top_p=0.9,
            top_k=5,
            min_p=0.1,
            repetition_penalty=1.1,
            presence_penalty=0.2,
            frequency_penalty=0.3,
            logit_bias=((3, 5.0), (12, -100.0)),
            seed=1,
            logprobs=True,
            top_logprobs=3,
        ),
        stop=("a", "b"),
        stream=True,
        priority=2,
        timeout_s=0.005,
        caller="front-1",
        wanted=Wanted(
            constraint=JsonSchema(schema='{"type":"object"}'),
            tools=(Tool(name="f"),),
            parallel_calls=False,
            max_reasoning_tokens=9,
            template_variables='{"reasoning_effort":"low","enable_thinking":true,"style":"terse"}',
        ),
        choices=2,
        include_usage=True,
    )
    assert read(msgspec.json.encode(EVERYTHING)) == expected
    assert expected.is_chat
    assert expected.text_field == "messages"


@pytest.mark.parametrize(
    ("spelling", "field"),
    [
        ("maxTokens", "max_tokens"),
        ("max_completion_tokens", "max_tokens"),
        ("modelId", "model"),
        ("requestId", "request_id"),
        ("topP", "top_p"),
    ],
)
def test_other_spellings_are_the_same_field(spelling: str, field: str) -> None:
    respelled = {spelling if name == field else name: each for name, each in EVERYTHING.items()}
    plain = read(msgspec.json.encode(EVERYTHING))
    assert read(msgspec.json.encode(respelled)) == plain


@pytest.mark.parametrize(
    ("fields", "caller"),
    [
        ({"user": "alice"}, "alice"),
        ({"safety_identifier": "alice"}, "alice"),
        ({"user": "alice", "caller": "front"}, "front"),
        ({"caller": "front", "safety_identifier": "alice"}, "front"),
        ({"user": "alice", "safety_identifier": "7f3a"}, "7f3a"),
        ({"user": "alice", "safety_identifier": "not a name"}, "alice"),
        ({"user": None, "caller": None, "safety_identifier": None}, None),
        ({"user": "x" * 64}, "x" * 64),
    ],
)
def test_who_asks_may_be_said_as_for_openai_where_that_is_a_name_here(
    fields: dict[str, object], caller: str | None
) -> None:
    assert read_fields(**fields).caller == caller


@pytest.mark.parametrize("name", ["user", "safety_identifier"])
@pytest.mark.parametrize("value", ["", "a b", "a@b.c", "é", "a\n", "x" * 65, 5, True, ["a"], {}])
def test_what_openais_fields_say_of_who_asks_is_ignored_where_that_is_no_name_here(
    name: str, value: object
) -> None:
    assert read_fields(**{name: value}) == read_fields()


@pytest.mark.parametrize("name", sorted(native.WITHOUT_EFFECT))
@pytest.mark.parametrize("value", [None, True, 0, "x", ["x"], {"x": "y"}])
def test_what_would_not_change_the_answer_is_passed_over(name: str, value: object) -> None:
    assert read_fields(**{name: value}) == read_fields()


def test_null_is_absent_also_beside_the_other_of_two() -> None:
    nulls = dict.fromkeys(native.FIELD_NAMES)
    assert read(msgspec.json.encode({**nulls, "prompt": "x"})) == read(b'{"prompt": "x"}')


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("request_id", ["a", "Az09_-", "x" * 128]),
        ("max_tokens", [1, 100]),
        ("temperature", [0, 2]),
        ("top_p", [1e-9, 1]),
        ("top_k", [0, 2**31 - 1]),
        ("min_p", [0, 1]),
        ("repetition_penalty", [1e-9, 10]),
        ("presence_penalty", [-2, 2]),
        ("frequency_penalty", [-2, 2]),
        ("logit_bias", [{}, {"0": -100, "9999999999": 100}, {str(t): 1 for t in range(1024)}]),
        ("seed", [0, 2**53 - 1]),
        ("stop", ["x", "x" * 256, [], ["x"] * 16]),
        ("priority", [0, 2, "high", "medium", "low"]),
        ("timeout_ms", [1, 60_000]),
        ("caller", ["a", "Az09_-", "x" * 64]),
        ("prompt", ["x", "a\x00b", "\U0001f600"]),
    ],
)
def test_the_ends_of_every_range_are_taken(field: str, values: list[Any]) -> None:
    for value in values:
        request = read_fields(**{field: value})
        if field in {"request_id", "caller"}:
            assert getattr(request, field) == value
        if field == "stop":
            assert request.stop == ((value,) if isinstance(value, str) else tuple(value))
    assert read_fields(logprobs=True, top_logprobs=20).sampling.top_logprobs == 20
    assert read_fields(logprobs=True, top_logprobs=0).sampling.logprobs


@pytest.mark.parametrize(
    ("fields", "wanted", "alternatives"),
    [
        ({}, False, 0),
        ({"logprobs": False}, False, 0),
        ({"logprobs": True}, True, 0),
        ({"logprobs": True, "top_logprobs": 2}, True, 2),
        ({"logprobs": 0}, True, 0),
        ({"logprobs": 1}, True, 1),
        ({"logprobs": 5, "top_logprobs": 0}, True, 5),
    ],
)
def test_log_probabilities_of_a_text_are_asked_for_by_a_number_too(
    fields: dict[str, object], *, wanted: bool, alternatives: int
) -> None:
    sampling = read_fields(**fields).sampling
    assert (sampling.logprobs, sampling.top_logprobs) == (wanted, alternatives)


def test_an_id_that_cannot_be_one_is_not_used_in_the_error_about_it() -> None:
    for value in ("", "a b", "a\n", "x" * 129, 5, None, ["a"], "é"):
        assert native.request_id_of({"request_id": value}) is None
    assert native.request_id_of({}) is None
    assert native.request_id_of({"request_id": "ok-1"}) == "ok-1"


def test_a_body_may_have_as_many_bytes_as_the_limit() -> None:
    body = b'{"prompt": "%s"}' % (b"x" * (LIMITS.max_body_bytes - 14))
    assert len(body) == LIMITS.max_body_bytes
    assert read(body).prompt
    with pytest.raises(PayloadTooLarge) as caught:
        read(body + b" ")
    assert caught.value.message == "the request has 10001 bytes; this worker takes 10000"
    assert caught.value.details == {"bytes": 10_001, "limit": 10_000}


def fault_of(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        read(msgspec.json.encode(fields))
    return caught.value


MANY_TOKENS = {str(token): 1 for token in range(1025)}
LONG = "x" * 300
PRIORITIES = "is none of high, medium, low, 0…2"


@pytest.mark.parametrize(
    ("fields", "message", "details"),
    [
        # What each field may be.
        ({"request_id": 5}, "request_id: Expected `str | null`, got `int`", {}),
        ({"request_id": "a b"}, "request_id: Expected `str` matching regex", {}),
        ({"request_id": "a\n"}, "request_id: Expected `str` matching regex", {}),
        ({"request_id": "a" * 129}, "request_id: Expected `str` matching regex", {}),
        ({"model": 5}, "model: Expected `str | null`, got `int`", {}),
        ({"messages": []}, "messages: Expected `array` of length >= 1", {}),
        (
            {"messages": [{}]},
            "messages[0]: Object missing required field `role`",
            {"field": "messages[0]"},
        ),
        (
            {"messages": [{"role": "king", "content": "x"}]},
            "messages[0].role: Invalid value 'king'",
            {"field": "messages[0].role"},
        ),
        (
            {"messages": [{"role": "user", "content": "x", "id": "y"}]},
            "messages[0]: Object contains unknown field `id`",
            {"field": "messages[0]"},
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "text": "x"}]}]},
            "messages[0].content[0].type: Invalid enum value 'image'",
            {"field": "messages[0].content[0].type"},
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "", "id": 1}]}]},
            "messages[0].content[0]: Object contains unknown field `id`",
            {"field": "messages[0].content[0]"},
        ),
        ({"prompt": ""}, "prompt: Expected `str` of length >= 1", {}),
        ({"max_tokens": 0}, "max_tokens: Expected `int` >= 1", {}),
        ({"max_tokens": 1.5}, "max_tokens: Expected `int | null`, got `float`", {}),
        ({"fit_max_tokens": 1}, "fit_max_tokens: Expected `bool`, got `int`", {}),
        ({"max_tokens": 0, "fit_max_tokens": True}, "max_tokens: Expected `int` >= 1", {}),
        ({"temperature": 2.01}, "temperature: Expected `float` <= 2.0", {}),
        ({"temperature": -0.01}, "temperature: Expected `float` >= 0.0", {}),
        ({"top_p": 0}, "top_p: Expected `float` > 0.0", {}),
        ({"top_p": 1.01}, "top_p: Expected `float` <= 1.0", {}),
        ({"top_k": -1}, "top_k: Expected `int` >= 0", {}),
        ({"top_k": 2**31}, "top_k: Expected `int` <= 2147483647", {}),
        ({"min_p": -0.01}, "min_p: Expected `float` >= 0.0", {}),
        ({"min_p": 1.01}, "min_p: Expected `float` <= 1.0", {}),
        ({"repetition_penalty": 0}, "repetition_penalty: Expected `float` > 0.0", {}),
        ({"repetition_penalty": 10.01}, "repetition_penalty: Expected `float` <= 10.0", {}),
        ({"presence_penalty": -2.01}, "presence_penalty: Expected `float` >= -2.0", {}),
        ({"presence_penalty": 2.01}, "presence_penalty: Expected `float` <= 2.0", {}),
        ({"frequency_penalty": -2.01}, "frequency_penalty: Expected `float` >= -2.0", {}),
        ({"frequency_penalty": 2.01}, "frequency_penalty: Expected `float` <= 2.0", {}),
        ({"logit_bias": [1]}, "logit_bias: Expected `object | null`, got `array`", {}),
        ({"logit_bias": {"1": "x"}}, "logit_bias[...]: Expected `float`, got `str`", {}),
        ({"logit_bias": {"1": 100.1}}, "logit_bias[...]: Expected `float` <= 100.0", {}),
        ({"logit_bias": {"1": -100.1}}, "logit_bias[...]: Expected `float` >= -100.0", {}),
        ({"seed": -1}, "seed: Expected `int` >= 0", {}),
        ({"seed": 2**53}, "seed: Expected `int` <= 9007199254740991", {}),
        ({"stop": [""]}, "stop[0]: Expected `str` of length >= 1", {"field": "stop[0]"}),
        (
            {"stop": ["x", "y" * 257]},
            "stop[1]: Expected `str` of length <= 256",
            {"field": "stop[1]"},
        ),
        ({"stop": ["x"] * 17}, "stop: Expected `array` of length <= 16", {}),
        ({"stream": "yes"}, "stream: Expected `bool`, got `str`", {}),
        ({"stream": 1}, "stream: Expected `bool`, got `int`", {}),
        ({"logprobs": "yes"}, "logprobs: Expected `bool | int`, got `str`", {}),
        ({"logprobs": -1}, "logprobs: Expected `int` >= 0", {}),
        ({"logprobs": 6}, "logprobs: Expected `int` <= 5", {}),
        ({"top_logprobs": -1}, "top_logprobs: Expected `int` >= 0", {}),
        ({"top_logprobs": 21}, "top_logprobs: Expected `int` <= 20", {}),
        ({"priority": True}, "priority: Expected `int | str | null`, got `bool`", {}),
        ({"timeout_ms": 0}, "timeout_ms: Expected `int` >= 1", {}),
        ({"caller": 5}, "caller: Expected `str | null`, got `int`", {}),
        ({"caller": ""}, "caller: Expected `str` matching regex", {}),
        ({"caller": "a.b"}, "caller: Expected `str` matching regex", {}),
        ({"caller": "a\n"}, "caller: Expected `str` matching regex", {}),
        ({"caller": "x" * 65}, "caller: Expected `str` matching regex", {}),
        # What this worker allows, and what goes together.
        (
            {"max_tokens": 101},
            "max_tokens: 101 is over this worker's limit of 100",
            {"limit": 100},
        ),
        (
            {"timeout_ms": 60_001},
            "timeout_ms: 60001 is over this worker's limit of 60000",
            {"limit": 60_000},
        ),
        (
            {"logit_bias": MANY_TOKENS},
            "logit_bias: 1025 entries; at most 1024 are taken",
            {"limit": 1024},
        ),
        ({"logit_bias": {"-1": 1}}, "logit_bias: '-1' is not the number of a token", {}),
        ({"logit_bias": {"\u0661": 1}}, "logit_bias: '\u0661' is not the number of a token", {}),
        (
            {"logit_bias": {"1" * 11: 1}},
            "logit_bias: '11111111111' is not the number of a token",
            {},
        ),
        ({"logit_bias": {LONG: 1}}, f"logit_bias: '{LONG[:64]}' is not the number of a token", {}),
        ({"top_logprobs": 1}, "top_logprobs: needs logprobs: true beside it", {}),
        (
            {"top_logprobs": 1, "logprobs": 1},
            "top_logprobs: logprobs has the number already; send one of them",
            {},
        ),
        (
            {"logprobs": 1, "messages": [{"role": "user", "content": "x"}]},
            "logprobs: with messages it is true or false; the number is top_logprobs",
            {},
        ),
        ({"priority": 3}, f"priority: '3' {PRIORITIES}", {"levels": 3}),
        ({"priority": -1}, f"priority: '-1' {PRIORITIES}", {"levels": 3}),
        ({"priority": "urgent"}, f"priority: 'urgent' {PRIORITIES}", {"levels": 3}),
        ({"priority": LONG}, f"priority: '{LONG[:64]}' {PRIORITIES}", {"levels": 3}),
        ({"n": 0}, "n: Expected `int` >= 1", {}),
        ({"n": 9}, "n: Expected `int` <= 8", {}),
        (
            {"stream_options": {"include_usage": True}},
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
            {},
        ),
        (
            {"stream_options": {"include_usage": 1}, "stream": True},
            "stream_options.include_usage: Expected `bool | null`, got `int`",
            {"field": "stream_options.include_usage"},
        ),
        # What is no field.
        ({"max_token": 1}, "max_token is not a field of a request; did you mean max_tokens?", {}),
        ({"modelid": 1}, "modelid is not a field of a request; did you mean modelId?", {}),
        ({"frobnicate": 1}, "frobnicate is not a field of a request", {}),
        ({"usr": "x"}, "usr is not a field of a request; did you mean user?", {}),
        ({"meta_data": 1}, "meta_data is not a field of a request; did you mean metadata?", {}),
        # What OpenAI's models would answer otherwise for.
        ({"verbosity": "low"}, "verbosity is not a field of a request", {}),
    ],
)
def test_what_is_wrong_is_said_and_its_field_is_named(
    fields: dict[str, object], message: str, details: dict[str, object]
) -> None:
    prompt = {} if "messages" in fields else {"prompt": "x"}
    error = fault_of(**{**prompt, **fields})
    if message.endswith("regex"):
        assert error.message.startswith(message)
    else:
        assert error.message == message
    assert error.details == {"field": next(iter(fields)), **details}


def test_the_one_of_two_fields_that_is_missing_or_too_many_is_messages() -> None:
    both = fault_of(prompt="x", messages=[{"role": "user", "content": "x"}])
    assert both.message == "send exactly one of messages and prompt; both are there"
    neither = fault_of()
    assert neither.message == "send exactly one of messages and prompt; neither is there"
    assert both.details == neither.details == {"field": "messages"}


def test_two_spellings_of_a_field_are_named_by_the_one_of_the_documentation() -> None:
    error = fault_of(prompt="x", maxTokens=1, max_completion_tokens=None)
    assert error.message == (
        "maxTokens and max_completion_tokens are spellings of one field; send one of them"
    )
    assert error.details == {"field": "max_tokens"}


def test_a_fault_that_quotes_the_caller_is_named_by_where_it_is_and_kept_short() -> None:
    hostile = " - at `$.seed`" + "x" * 5000
    error = fault_of(messages=[{"role": hostile, "content": "x"}])
    assert error.details == {"field": "messages[0].role"}
    assert error.message.startswith("messages[0].role: Invalid value ' - at `$.seed`xxx")
    assert len(error.message) == len("messages[0].role: ") + 256
    unknown = fault_of(prompt="x", **{"x" * 100: 1})
    assert unknown.message == f"{'x' * 64} is not a field of a request"
    assert unknown.details == {"field": "x" * 64}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "^the request is not JSON: Input data was truncated$"),
        (b"\xff", "^the request is not JSON: "),
        (b'{"prompt": "\xff"}', "^the request is not JSON: "),
        (b'{"prompt": "x"} {}', "^the request is not JSON: JSON is malformed: trailing characters"),
        (b'{"prompt": "x",}', "^the request is not JSON: "),
        (b'{"seed": NaN}', "^the request is not JSON: "),
        (
            b'{"prompt": "\\ud800"}',
            r" \(half of a surrogate pair, \\ud800 to \\udfff by itself, is not text\)$",
        ),
        (b"[" * 9000, "^the request is not usable: its brackets are nested too deep$"),
        (b"[1]", "^the request is an array; expected a JSON object$"),
        (b'"x"', "^the request is a string; expected a JSON object$"),
        (b"true", "^the request is a boolean; expected a JSON object$"),
        (b"null", "^the request is null; expected a JSON object$"),
        (b"1.5", "^the request is a number; expected a JSON object$"),
    ],
)
def test_what_is_no_json_object_is_said_without_a_field(body: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(body)
    assert re.search(message, caught.value.message)
    assert ("half of" in caught.value.message) == (b"ud800" in body)
    assert caught.value.details == {}


@pytest.mark.parametrize(("asked", "taken"), [(None, 100), (99, 99), (100, 100), (10**12, 100)])
def test_what_may_be_fitted_is_cut_down_to_the_limit_which_is_also_what_holds_without(
    asked: int | None, taken: int
) -> None:
    request = read_fields(fit_max_tokens=True, max_tokens=asked)
    assert (request.max_tokens, request.fit_max_tokens) == (taken, True)
    assert read_fields(fit_max_tokens=False).max_tokens is None


def test_a_bias_must_be_of_the_models_vocabulary() -> None:
    request = read_fields(logit_bias={"9": 1, "10": 2})
    request.check_vocabulary(11)
    with pytest.raises(InvalidRequest) as caught:
        request.check_vocabulary(10)
    assert caught.value.message == "logit_bias: 10 is no token of this model, which has 0 to 9"
    assert caught.value.details == {"field": "logit_bias", "vocabulary_size": 10}
    read_fields().check_vocabulary(1)


def test_another_model_is_named_beside_ours() -> None:
    with pytest.raises(ModelNotFound) as caught:
        read_fields(model="gpt" * 100)
    assert caught.value.message == f"this worker serves the model m, not {('gpt' * 100)[:128]}"
    assert caught.value.details == {"model": "m"}


def test_priorities_by_name_and_number() -> None:
    levels = [read_fields(priority=each).priority for each in ("high", "medium", "low", 0, 2)]
    assert levels == [0, 1, 2, 0, 2]
    assert read_fields(priority="low", stream=True).priority == 2
