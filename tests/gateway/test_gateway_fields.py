"""What clients send, and what a worker is asked."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_worker.errors import InvalidRequest, ModelNotFound, PayloadTooLarge, WorkerError
from trio_worker.gateway.errors import reply_to
from trio_worker.gateway.fields import Asked, Rules, read_request
from trio_worker.gateway.keys import ANYBODY, Key
from trio_worker.gateway.models import Limits
from trio_worker.gateway.shapes import (
    HARMLESS,
    Effect,
    Endpoint,
    UnknownFields,
    effects,
    known_fields,
)
from trio_worker.protocol.turn import RequestId
from trio_worker.wire import native

RULES = Rules(body_limit_bytes=100_000, timeout_ms=600_000)
RELAXED = Rules(body_limit_bytes=100_000, timeout_ms=600_000, unknown_fields=UnknownFields.IGNORE)
WORKERS = Limits(max_tokens=4096, timeout_ms=900_000, priority_levels=3)
MESSAGES = [{"role": "user", "content": "Hi"}]


def read(
    body: bytes,
    headers: dict[str, str] | None = None,
    *,
    endpoint: Endpoint = Endpoint.CHAT,
    key: Key = ANYBODY,
    rules: Rules = RULES,
    limits: Limits = WORKERS,
) -> Asked:
    return read_request(
        endpoint, body, headers or {}, key=key, rules=rules, limits_of=lambda _: limits
    )


def chat(headers: dict[str, str] | None = None, /, **fields: Any) -> Asked:
    return read(msgspec.json.encode({"messages": MESSAGES, **fields}), headers)


def complete(**fields: Any) -> Asked:
    body = msgspec.json.encode({"prompt": "Once", **fields})
    return read(body, endpoint=Endpoint.COMPLETIONS)


def refused(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    return caught.value


def by_wire(asked: Asked) -> Any:
    """The request as a worker reads it."""
    limits = native.RequestLimits(
        model_name="m",
        max_tokens_limit=4096,
        default_timeout_ms=30_000,
        timeout_limit_ms=900_000,
        max_body_bytes=100_000,
        priority_levels=3,
        default_buffered=0,
        default_streaming=1,
    )
    fields = native.parse_body(msgspec.json.encode(asked.fields), limits)
    return native.to_request(fields, limits, request_id=RequestId("r"), draw_seed=lambda: 1)


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CACHED = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
DEFAULTS_OF_CLIENTS: dict[str, dict[str, Any]] = {
    "openai, litellm, aisuite, instructor (MD_JSON)": {},
    "openai npm, streaming": {"stream": True},
    "langchain-openai": {"stream": False, "max_completion_tokens": 100},
    "@langchain/openai": {**USAGE, "temperature": 1},
    "llama-index": {"temperature": 0.1},
    "llm": USAGE,
    "pydantic-ai": USAGE,
    "openai-agents, chat": {"tools": [], "store": None, "stream": False},
    "smolagents": {
        **USAGE,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
    },
    "dspy": {"temperature": 0.0, "max_tokens": 1000},
    "AI SDK openai-compatible": {"max_tokens": 50, "temperature": 0, "stream": True},
    "Codex's roles": {"messages": [{"role": "developer", "content": "Be brief"}, *MESSAGES]},
    "opencode without tools": {**USAGE, "max_tokens": 32_000},
    "cline without tools": {
        **USAGE,
        "messages": [
            {"role": "system", "content": "s"},
            {
                "role": "user",
                "content": [
                    CACHED,
                    {"type": "text", "text": "b"},
                ],
            },
        ],
    },
    "Open WebUI": {**USAGE, "max_tokens": 200, "seed": -1, "stop": []},
    "lm-eval, generating": {"max_tokens": 256, "temperature": 0, "stop": ["\n\n"], "seed": 1234},
    "Codex's habits": {"store": False, "prompt_cache_key": "k"},
    "what an SDK gave is sent back": {
        "messages": [
            *MESSAGES,
            {
                "role": "assistant",
                "content": "Hello",
                "refusal": None,
                "name": None,
                "audio": None,
                "function_call": None,
                "tool_calls": None,
                "annotations": [],
            },
            *MESSAGES,
        ],
    },
    "langchain-openai, structured": {
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": False,
    },
    "pydantic-ai, llama-index: types": {"tools": [TOOL], "tool_choice": "required", **USAGE},
    "AI SDK, generateObject": {"response_format": {"type": "json_object"}},
    "openai, parse": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "Answer",
                "strict": True,
                "schema": {
                    "type": "object",
                    "properties": {"a": {"type": "integer"}},
                    "required": ["a"],
                    "additionalProperties": False,
                },
            },
        }
    },
    "an agent's second request": {
        "tools": [TOOL],
        "messages": [
            *MESSAGES,
            {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "reasoning_content": "Hm",
                "tool_calls": [
                    {
                        "index": 0,
                        "id": "1",
                        "type": "function",
                        "function": {"name": "f", "arguments": "{}"},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "1", "name": "f", "content": "a"},
        ],
    },
    "every field null": {name: None for name in known_fields(Endpoint.CHAT) if name != "messages"},
}


@pytest.mark.parametrize("fields", DEFAULTS_OF_CLIENTS.values(), ids=DEFAULTS_OF_CLIENTS)
def test_what_clients_send_by_default_is_taken_by_a_worker(fields: dict[str, Any]) -> None:
    asked = chat(**fields)
    request = by_wire(asked)
    assert request.messages
    assert request.stream is bool(fields.get("stream"))
    assert request.priority == 1
    assert asked.include_usage is ("stream_options" in fields and bool(fields["stream_options"]))


def test_what_is_handed_on_arrives_as_it_was_sent() -> None:
    sent = {
        "model": "m",
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "logit_bias": {"12": -100.0},
        "logprobs": True,
        "top_logprobs": 3,
        "seed": 7,
        "stop": ["a", "b"],
        "stream": True,
        "max_tokens": 9,
        "priority": "low",
        "timeout_ms": 5000,
    }
    asked = chat(**sent)
    assert asked.fields == {**sent, "messages": MESSAGES, "fit_max_tokens": True}
    assert (asked.model, asked.timeout_ms, asked.ignored) == ("m", 5000, ())
    assert by_wire(asked).sampling.top_k == 5


def test_what_is_absent_stays_absent_so_that_the_worker_has_the_only_defaults() -> None:
    assert chat().fields == {
        "messages": MESSAGES,
        "fit_max_tokens": True,
        "priority": "medium",
        "timeout_ms": 600_000,
        "stream": False,
    }


def test_the_longest_answer_is_clamped_where_the_limit_is_known() -> None:
    assert chat(max_tokens=32_000).fields["max_tokens"] == 4096
    assert chat(max_completion_tokens=32_000).fields["max_tokens"] == 4096
    assert chat(max_tokens=5, max_completion_tokens=5).fields["max_tokens"] == 5
    body = msgspec.json.encode({"messages": MESSAGES, "max_tokens": 10**30})
    assert read(body, limits=Limits()).fields["max_tokens"] == 2**31 - 1
    assert refused(max_tokens=5, max_completion_tokens=6).details == {"field": "max_tokens"}
    assert refused(max_tokens=0).details == {"field": "max_tokens"}


@pytest.mark.parametrize(
    ("sent", "wire"),
    [("", None), ([], None), (["", "x"], ["x"]), ("x", ["x"]), (["a", "b"], ["a", "b"])],
)
def test_a_text_that_ends_nothing_is_no_stop(sent: Any, wire: Any) -> None:
    assert chat(stop=sent).fields.get("stop") == wire


def test_a_seed_of_minus_one_is_none_and_other_negatives_are_refused() -> None:
    assert "seed" not in chat(seed=-1).fields
    assert chat(seed=0).fields["seed"] == 0
    assert refused(seed=-2).details == {"field": "seed"}
    assert refused(seed=2**53).details == {"field": "seed"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"functions": [{"name": "f"}], "tool_choice": "none"}, "functions"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": "2"}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "alloy", "format": "mp3"}}, "audio"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options"),
        ({"stream": "yes"}, "stream"),
        ({"temperature": "hot"}, "temperature"),
        ({"logit_bias": {"1": "x"}}, "logit_bias[...]"),
        ({"logprobs": 1}, "logprobs"),
        ({"stop": [1]}, "stop[0]"),
        ({"service_tier": "gold"}, "service_tier"),
        ({"priority": "urgent"}, "priority"),
        ({"priority": 3}, "priority"),
        ({"priority": -1}, "priority"),
        ({"priority": True}, "priority"),
        ({"timeout_ms": 0}, "timeout_ms"),
        ({"model": 1}, "model"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"request_id": "mine"}, "request_id"),
        ({"messages": None}, "messages"),
        ({"messages": "Hi"}, "messages"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_its_name(
    fields: dict[str, Any], param: str
) -> None:
    error = refused(**fields)
    reply = reply_to(error)
    assert (reply.status, reply.error["param"]) == (400, param)
    assert reply.error["message"].startswith(param)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": False},
        {"functions": [{"name": "f"}], "function_call": "none"},
        {"best_of": 1, "echo": False, "suffix": "", "modalities": ["text"]},
        {"stream": True, "stream_options": {"include_obfuscation": False}},
        {"stream": True, "stream_options": {}},
    ],
)
def test_what_asks_for_nothing_is_taken(fields: dict[str, Any]) -> None:
    assert by_wire(chat(**fields))


def test_what_had_no_effect_is_named_in_the_reply() -> None:
    asked = chat(
        metadata={"a": "b"},
        store=False,
        tools=[],
        tool_choice="none",
        parallel_tool_calls=False,
        user="somebody@example.org",
        stream=True,
        stream_options={"continuous_usage_stats": True, "include_usage": False},
        messages=[{"role": "user", "content": [CACHED]}],
    )
    assert asked.ignored_header() == {
        "x-ignored-fields": "messages.content.cache_control, metadata, parallel_tool_calls, "
        "store, stream_options.continuous_usage_stats, tool_choice, user"
    }
    assert not asked.include_usage
    assert chat().ignored_header() == {}


@pytest.mark.parametrize(
    "name",
    [
        *("metadata", "moderation", "store", "verbosity", "function_call"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
        *("safety_identifier", "user"),
    ],
)
@pytest.mark.parametrize("endpoint", Endpoint)
def test_a_habit_of_clients_is_taken_and_named(endpoint: Endpoint, name: str) -> None:
    body = msgspec.json.encode({"messages": MESSAGES, "prompt": "x", name: "a b"})
    asked = read(body, endpoint=endpoint, rules=RELAXED)
    assert name in asked.ignored
    assert name not in asked.fields


@pytest.mark.parametrize("name", ["reasoning_effort", "tool_choice", "parallel_tool_calls"])
def test_what_only_a_chat_has_is_without_effect_on_a_prompt(name: str) -> None:
    asked = complete(**{name: "auto"})
    assert asked.ignored == (name,)
    assert name not in asked.fields


@pytest.mark.parametrize("endpoint", Endpoint)
def test_what_is_documented_of_a_field_becomes_of_it(endpoint: Endpoint) -> None:
    ask = chat if endpoint is Endpoint.CHAT else complete
    by_name = effects(endpoint)
    for name in by_name:
        if by_name[name] is Effect.IGNORED:
            assert ask(**{name: "anything"}).ignored == (name,)
        if by_name[name] is Effect.REFUSED:
            for harmless in HARMLESS[name]:
                assert name not in ask(**{name: harmless}).fields
            with pytest.raises(InvalidRequest) as caught:
                ask(**{name: {"any": "thing"}})
            assert caught.value.details["field"] == name


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        *((name, "leave it out") for name in ("audio", "prediction", "web_search_options")),
        ("echo", "leave it out, or send false"),
        ("best_of", "leave it out, or send 1"),
        ("modalities", 'leave it out, or send ["text"]'),
    ],
)
def test_what_cannot_be_had_is_refused_even_where_unknown_fields_are_ignored(
    name: str, instead: str
) -> None:
    body = msgspec.json.encode({"messages": MESSAGES, name: {"a": 1}})
    with pytest.raises(InvalidRequest) as caught:
        read(body, rules=RELAXED)
    assert caught.value.message == f"{name}: this server cannot do that; {instead}"


def test_the_header_that_names_what_had_no_effect_is_bounded() -> None:
    body = msgspec.json.encode({"messages": MESSAGES, **{f"x{n:03}": 1 for n in range(100)}})
    (names,) = read(body, rules=RELAXED).ignored_header().values()
    assert names.split(", ") == [f"x{n:03}" for n in range(32)]


def test_an_unknown_field_is_refused_with_the_nearest_name_or_ignored_and_named() -> None:
    assert "did you mean temperature?" in refused(temprature=1).message
    assert refused(temprature=1).message.count("?") == 1
    assert refused(prompt="x").message.endswith("it is one of /v1/completions")
    with pytest.raises(InvalidRequest, match=r"it is one of /v1/chat/completions$"):
        complete(messages=MESSAGES)
    assert refused(**{"x" * 1000: 1}).details == {"field": "x" * 64 + "…"}
    body = msgspec.json.encode(
        {
            "messages": [{"role": "user", "content": "Hi", "mood": "good"}],
            "ignore_eos": True,
            "a\r\nset-cookie: b": 1,
        }
    )
    asked = read(body, rules=RELAXED)
    assert asked.ignored_header() == {"x-ignored-fields": "ignore_eos, messages.mood"}
    assert asked.fields["messages"] == MESSAGES


def test_the_caller_is_who_holds_the_key_else_whom_the_fields_name() -> None:
    assert chat(user="ann").fields["caller"] == "ann"
    assert chat(user="ann", safety_identifier="bob").fields["caller"] == "bob"
    assert chat(user="ann", safety_identifier="a b").fields["caller"] == "ann"
    assert "caller" not in chat(user="ann@example.org").fields
    assert "caller" not in chat(user=7).fields
    body = msgspec.json.encode({"messages": MESSAGES, "user": "ann"})
    asked = read(body, key=Key(caller="team"))
    assert (asked.fields["caller"], asked.ignored) == ("team", ("user",))


@pytest.mark.parametrize(
    ("fields", "headers", "most_urgent", "priority"),
    [
        ({}, {}, None, "medium"),
        ({"stream": True}, {}, None, "medium"),
        ({"service_tier": "flex"}, {}, None, "low"),
        ({"service_tier": "fast"}, {}, None, "high"),
        ({"service_tier": "priority"}, {}, None, "high"),
        ({"service_tier": "auto"}, {}, None, "medium"),
        ({"service_tier": "flex"}, {"x-priority": "high"}, None, "high"),
        ({"priority": 2}, {"x-priority": "high"}, None, 2),
        ({}, {"x-priority": "0"}, None, 0),
        ({"priority": "high"}, {}, "medium", "medium"),
        ({"priority": 0}, {}, "low", "low"),
        ({"priority": 2}, {}, "low", 2),
        ({}, {}, "low", "low"),
        ({"priority": "low"}, {}, "high", "low"),
    ],
)
def test_the_priority_is_what_is_asked_within_what_the_key_allows(
    fields: dict[str, Any], headers: dict[str, str], most_urgent: str | None, priority: int | str
) -> None:
    body = msgspec.json.encode({"messages": MESSAGES, **fields})
    asked = read(body, headers, key=Key(caller="c", most_urgent=most_urgent))
    assert asked.fields["priority"] == priority


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({"x-priority": "urgent"}, "X-Priority"),
        ({"x-priority": "9"}, "X-Priority"),
        ({"x-priority": "²"}, "X-Priority"),
        ({"x-timeout-ms": "1.5"}, "X-Timeout-Ms"),
        ({"x-timeout-ms": "0"}, "X-Timeout-Ms"),
        ({"x-timeout-ms": ""}, "X-Timeout-Ms"),
        ({"x-timeout-ms": "9" * 5000}, "X-Timeout-Ms"),
    ],
)
def test_a_header_of_ours_that_makes_no_sense_is_named(headers: dict[str, str], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(headers)
    assert caught.value.details == {"field": param}


@pytest.mark.parametrize(
    ("fields", "headers", "timeout_ms"),
    [
        ({}, {}, 600_000),
        ({"timeout_ms": 5}, {"x-timeout-ms": "6"}, 5),
        ({}, {"x-timeout-ms": "6", "x-stainless-read-timeout": "60"}, 6),
        ({}, {"x-stainless-read-timeout": "60"}, 59_000),
        ({}, {"x-stainless-read-timeout": "60.5"}, 59_500),
        ({}, {"x-stainless-read-timeout": "0.5"}, 250),
        ({}, {"x-stainless-read-timeout": "700"}, 699_000),
        ({"stream": True}, {"x-stainless-read-timeout": "60"}, 600_000),
        ({}, {"x-stainless-read-timeout": "None"}, 600_000),
        ({}, {"x-stainless-read-timeout": "nan"}, 600_000),
        ({}, {"x-stainless-read-timeout": "inf"}, 600_000),
        ({}, {"x-stainless-read-timeout": "-1"}, 600_000),
        ({"timeout_ms": 10**9}, {}, 900_000),
    ],
)
def test_the_deadline_is_the_callers_within_what_workers_allow(
    fields: dict[str, Any], headers: dict[str, str], timeout_ms: int
) -> None:
    asked = chat(headers, **fields)
    assert asked.timeout_ms == asked.fields["timeout_ms"] == timeout_ms


def test_a_worker_that_allows_less_than_the_gateways_own_time_has_the_last_word() -> None:
    body = msgspec.json.encode({"messages": MESSAGES})
    assert read(body, limits=Limits(timeout_ms=1000)).timeout_ms == 1000
    assert read(body, limits=Limits()).timeout_ms == 600_000


def test_a_completion_is_one_text_with_its_own_log_probabilities() -> None:
    assert complete().fields["prompt"] == "Once"
    assert complete(prompt=["Once"]).fields["prompt"] == "Once"
    for logprobs in (0, 3):
        asked = complete(logprobs=logprobs)
        assert asked.fields["logprobs"] == logprobs
        assert by_wire(asked).sampling.logprobs
        assert by_wire(asked).sampling.top_logprobs == logprobs
    for fields, param in (
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": [[1, 2]]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"messages": MESSAGES}, "messages"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            complete(**fields)
        assert caught.value.details == {"field": param}


# --- what agents need -----------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"a": {"default": None}}}
OF_SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": None}}


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": FORMAT},
        {"response_format": {"type": "text"}},
        {"grammar": {"choice": ["a", "b"]}},
        {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"tools": [TOOL], "tool_choice": "none"},
        {"tool_choice": "required"},
        {"n": 3},
        {"reasoning_effort": "low", "max_reasoning_tokens": 5, "enable_thinking": False},
        {"chat_template_kwargs": {"a": {"b": None}}},
    ],
    ids=str,
)
def test_what_the_wire_has_too_is_handed_on_unread(fields: dict[str, Any]) -> None:
    asked = chat(**fields)
    assert {name: asked.fields.get(name) for name in fields} == fields
    assert (asked.ignored, asked.choices) == ((), fields.get("n", 1))


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
def test_a_call_that_is_demanded_of_no_tool_is_left_for_the_worker_to_refuse(choice: Any) -> None:
    asked = chat(tools=[], tool_choice=choice, parallel_tool_calls=True)
    assert asked.fields["tool_choice"] == choice
    assert "tools" not in asked.fields
    assert asked.ignored == ("parallel_tool_calls",)


def test_the_old_form_of_tools_is_refused_with_the_name_of_the_new_one() -> None:
    error = refused(functions=[{"name": "f"}], function_call="auto")
    assert error.message == "functions: the old form of tools; send those"


@pytest.mark.parametrize("endpoint", Endpoint)
@pytest.mark.parametrize(
    ("said", "wire"),
    [
        ({"json": SCHEMA}, {"response_format": OF_SCHEMA}),
        ({"json": msgspec.json.encode(SCHEMA).decode()}, {"response_format": OF_SCHEMA}),
        ({"regex": "a+"}, {"grammar": {"regex": "a+"}}),
        ({"choice": ["a", "b"]}, {"grammar": {"choice": ["a", "b"]}}),
        ({"grammar": 'start: "a"'}, {"grammar": {"lark": 'start: "a"'}}),
    ],
    ids=str,
)
def test_what_vllm_calls_otherwise_is_called_as_on_the_wire(
    endpoint: Endpoint, said: dict[str, Any], wire: dict[str, Any]
) -> None:
    ask = chat if endpoint is Endpoint.CHAT else complete
    plain = ask().fields
    guided = {f"guided_{name}": value for name, value in said.items()}
    for fields in ({"structured_outputs": {**said, "json_object": False}}, guided):
        assert ask(**fields).fields == {**plain, **wire}
    assert chat(structured_outputs={"json_object": True}).fields["response_format"] == {
        "type": "json_object"
    }


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": "json"}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "[" * 5000}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "[" * 500 + "]" * 500}}, "structured_outputs.json"),
        ({"guided_json": "nothing"}, "guided_json"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex"),
        ({"guided_regex": "a", "structured_outputs": {"regex": "a"}}, "guided_regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.regex"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"guided_regex": "a", "grammar": {"regex": "a"}}, "guided_regex"),
    ],
    ids=str,
)
def test_what_the_answer_is_to_be_like_is_said_once_and_readably(
    fields: dict[str, Any], param: str
) -> None:
    error = refused(**fields)
    assert error.details == {"field": param}
    assert error.message.startswith(f"{param}: ")
    assert chat(guided_regex="a", response_format={"type": "text"}).fields["grammar"]


@pytest.mark.parametrize(
    ("fields", "of_the_worker", "of_the_client"),
    [
        (
            {"guided_json": SCHEMA},
            "response_format.json_schema.schema.properties.a",
            "guided_json.properties.a",
        ),
        ({"guided_json": SCHEMA}, "response_format", "guided_json"),
        ({"guided_json": SCHEMA}, "response_formats", "response_formats"),
        ({"guided_json": SCHEMA}, "messages[0].role", "messages[0].role"),
        ({"guided_choice": ["a"]}, "grammar.choice[0]", "guided_choice[0]"),
        ({"structured_outputs": {"regex": "("}}, "grammar.regex", "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "("}}, "grammar", "structured_outputs.regex"),
        ({"grammar": {"regex": "("}}, "grammar.regex", "grammar.regex"),
    ],
)
def test_a_place_that_a_worker_names_is_the_clients_own(
    fields: dict[str, Any], of_the_worker: str, of_the_client: str
) -> None:
    error = InvalidRequest(f"{of_the_worker}: no", details={"field": of_the_worker})
    chat(**fields).spelled.put_right(error)
    assert error.details == {"field": of_the_client}
    assert error.message == f"{of_the_client}: no"
    in_openais_words = InvalidRequest("Invalid schema", details={"field": of_the_worker})
    chat(**fields).spelled.put_right(in_openais_words)
    assert in_openais_words.message == "Invalid schema"


def test_an_error_without_a_place_stays_as_it_is() -> None:
    error = InvalidRequest("no")
    chat(guided_json=SCHEMA).spelled.put_right(error)
    assert (error.message, error.details) == ("no", {})


def test_an_unknown_model_is_told_by_whoever_knows_the_models() -> None:
    def limits_of(model: str | None) -> Limits:
        raise ModelNotFound(f"no worker serves {model}")

    body = msgspec.json.encode({"messages": MESSAGES, "model": "gpt-9"})
    with pytest.raises(ModelNotFound, match="gpt-9"):
        read_request(Endpoint.CHAT, body, {}, key=ANYBODY, rules=RULES, limits_of=limits_of)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b'{"messages": NaN}',
        b'{"temperature": Infinity}',
        b'{"temperature": 1e999}',
        b'{"temperature": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"\\ud800": 1}',
        b'{"messages": [], "messages": []}',
        b'{"messages": [{"role": "user", "role": "system", "content": ""}]}',
        b"[" * 50_000 + b"]" * 49_999,
        b'{"messages": ' + b'{"a":' * 10_000,
        # It can be read here, and could not be written again elsewhere.
        b'{"messages": [], "response_format": ' + b"[" * 300 + b"]" * 300 + b"}",
    ],
    ids=lambda body: repr(body[:40]),
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read(body)


def test_half_of_a_surrogate_pair_is_named_and_nothing_else_is() -> None:
    with pytest.raises(InvalidRequest, match="surrogate pair"):
        read(b'{"messages": [{"role": "user", "content": "\\ud800"}]}')
    with pytest.raises(InvalidRequest) as caught:
        read(b"{")
    assert "surrogate" not in caught.value.message


def test_a_body_over_the_limit_is_refused_unread() -> None:
    with pytest.raises(InvalidRequest):
        read(b"x" * 100_000)
    with pytest.raises(PayloadTooLarge) as caught:
        read(b"x" * 100_001)
    assert caught.value.details == {"bytes": 100_001, "limit": 100_000}


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
_messages = st.lists(
    st.dictionaries(
        st.sampled_from(
            ["role", "content", "name", "tool_calls", "tool_call_id", "reasoning", "other"]
        ),
        _json
        | st.sampled_from(["user", "developer", "tool"])
        | st.lists(
            st.dictionaries(
                st.sampled_from(["type", "text", "image_url"]), _json | st.just("text"), max_size=3
            ),
            max_size=2,
        ),
        max_size=4,
    ),
    max_size=3,
)
_near_requests = st.dictionaries(
    st.sampled_from(sorted(known_fields(Endpoint.CHAT) | known_fields(Endpoint.COMPLETIONS))),
    _json,
    max_size=8,
).flatmap(
    lambda fields: st.fixed_dictionaries({"messages": _json | _messages, "prompt": _json}).map(
        lambda content: {**fields, **content}
    )
)
_headers = st.dictionaries(
    st.sampled_from(["x-priority", "x-timeout-ms", "x-stainless-read-timeout"]), st.text()
)


@given(
    st.binary(max_size=200) | _near_requests.map(msgspec.json.encode),
    _headers,
    st.sampled_from(Endpoint),
    st.sampled_from([RULES, RELAXED]),
)
def test_whatever_is_sent_becomes_a_request_or_an_error(
    body: bytes, headers: dict[str, str], endpoint: Endpoint, rules: Rules
) -> None:
    try:
        asked = read(body, headers, endpoint=endpoint, rules=rules)
    except WorkerError as error:
        reply = reply_to(error)
        assert reply.status in {400, 413}
        assert msgspec.json.decode(reply.body())["error"]["message"]
        return
    assert msgspec.json.decode(msgspec.json.encode(asked.fields)) == asked.fields
    assert 1 <= asked.timeout_ms <= 900_000
    assert all(name.isascii() and name.isprintable() for name in asked.ignored_header().values())


_valid = st.fixed_dictionaries(
    {"messages": st.just(MESSAGES)},
    optional={
        "temperature": st.floats(0, 2) | st.sampled_from([0, 1]),
        "max_tokens": st.integers(1, 10**20),
        "seed": st.integers(-1, 2**53 - 1),
        "stop": st.text(max_size=20) | st.lists(st.text(max_size=20), max_size=4),
        "user": st.text(max_size=70),
        "stream": st.booleans(),
        "timeout_ms": st.integers(1, 10**20),
        "priority": st.sampled_from(["high", "medium", "low", 0, 1, 2]),
        "service_tier": st.sampled_from(["auto", "flex", "priority"]),
    },
)


@given(_valid)
def test_what_is_in_range_is_taken_by_a_worker(fields: dict[str, Any]) -> None:
    request = by_wire(read(msgspec.json.encode(fields)))
    assert math.isfinite(request.timeout_s)
    assert request.max_tokens is None or request.max_tokens <= 4096
