"""The bodies of mlx-serving's wire, against the controller's own schema."""

from __future__ import annotations

import math
import re
import uuid
from typing import Any

import msgspec
import pytest
from support.paths import DOCS
from support.wire_requests import LIMITS

from trio_worker.core.request import Request
from trio_worker.errors import (
    InternalError,
    InvalidRequest,
    ModelNotFound,
    PayloadTooLarge,
    QueueFull,
    RequestTimeout,
    ResourceLimitExceeded,
    WorkerDraining,
    WorkerError,
)
from trio_worker.protocol.turn import FinishReason, RequestId
from trio_worker.wire.mlx_serving import (
    Load,
    Member,
    MlxServing,
    Status,
    member_id,
    request_id_in,
)
from trio_worker.wire.native import Usage, WorkerNote

ID = RequestId("b6b9c1b4-7a0d-4b62-9d3f-0e6ac1f6a001")
DIALECT = MlxServing(ID)


def read(**fields: Any) -> Request:
    body = msgspec.json.encode({"requestId": ID, "prompt": "hi", **fields})
    canonical = DIALECT.parse_body(body, LIMITS)
    named = DIALECT.request_id_of(canonical)
    assert named == ID
    return DIALECT.to_request(canonical, LIMITS, request_id=named, draw_seed=lambda: 7)


def test_a_request_is_read() -> None:
    request = read(modelId=LIMITS.model_name, maxTokens=5, temperature=0, topP=0.5)
    assert (request.request_id, request.prompt) == (ID, "hi")
    assert (request.max_tokens, request.fit_max_tokens) == (5, False)
    assert (request.sampling.temperature, request.sampling.top_p) == (0.0, 0.5)
    assert request.stream
    assert request.priority == LIMITS.default_streaming
    assert request.caller is None
    assert request.timeout_s == LIMITS.default_timeout_ms / 1000


@pytest.mark.parametrize(
    "absent", [{}, {"maxTokens": None, "temperature": None, "topP": None, "modelId": None}]
)
def test_what_is_left_out_is_what_mlx_servings_worker_takes(absent: dict[str, None]) -> None:
    request = read(**absent)
    assert (request.max_tokens, request.fit_max_tokens) == (100, True)
    assert (request.sampling.temperature, request.sampling.top_p) == (0.7, 0.9)


def test_what_has_no_effect_is_passed_over() -> None:
    assert read(stream=False, sessionId=str(uuid.uuid4())).stream


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"maxTokens": 0}, InvalidRequest, "max_tokens"),
        ({"maxTokens": 1.5}, InvalidRequest, "max_tokens"),
        ({"maxTokens": "20"}, InvalidRequest, "max_tokens"),
        ({"temperature": 9}, InvalidRequest, "temperature"),
        ({"topP": 0}, InvalidRequest, "top_p"),
        ({"prompt": ""}, InvalidRequest, "prompt"),
        ({"prompt": None}, InvalidRequest, "messages"),
        ({"n": 2}, InvalidRequest, "n is not a field of a controller's request"),
        ({"messages": []}, InvalidRequest, "messages is not a field"),
        ({"modelId": "another"}, ModelNotFound, "another"),
        ({"prompt": "x" * (LIMITS.max_body_bytes + 1)}, PayloadTooLarge, "bytes"),
    ],
)
def test_what_cannot_be_served_is_refused(
    fields: dict[str, Any], error: type[WorkerError], words: str
) -> None:
    with pytest.raises(error, match=re.escape(words)):
        read(**fields)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b"\xff",
        b'{"requestId": null}',
        b'{"requestId": 1}',
        b'{"requestId": ""}',
        b'{"requestId": "a.b"}',
        b'{"requestId": "*"}',
        b'{"requestId": "a b"}',
        b'{"requestId": "%s"}' % (b"a" * 129),
        b'{"requestId": "a", "prompt": ' + b"[" * 100_000,
    ],
)
def test_without_a_usable_id_there_is_nobody_to_answer(body: bytes) -> None:
    assert request_id_in(body) is None


def test_the_id_is_found_whatever_else_there_is() -> None:
    assert request_id_in(b'{"prompt": [1, {}], "requestId": "%s", "x": null}' % ID.encode()) == ID


def test_an_answer_is_written() -> None:
    writer = DIALECT.AnswerWriter(request_id=ID, model="m", created=1, chat=False)
    assert not writer.opening()
    assert not writer.keep_alive()
    assert not writer.chunk("")
    assert not writer.ending(FinishReason.STOP)
    written = [writer.chunk(text) for text in ('say "', "é\n")]
    assert [msgspec.json.decode(each) for each in written] == [
        {"requestId": ID, "type": "token", "token": 'say "', "index": 0},
        {"requestId": ID, "type": "token", "token": "é\n", "index": 1},
    ]
    assert msgspec.json.decode(writer.closing(FinishReason.STOP, usage(2), NOTE)) == {
        "requestId": ID,
        "type": "done",
        "totalTokens": 2,
        "latencyMs": 60.5,
    }
    silent = msgspec.json.decode(writer.closing(FinishReason.STOP, usage(0), NOTE))
    assert silent["totalTokens"] == 1


def usage(completion: int) -> Usage:
    return Usage.of(prompt=3, completion=completion, cached=0)


NOTE = WorkerNote(
    id="w1",
    request_id=ID,
    seed=1,
    queue_ms=10,
    prefill_ms=20,
    decode_ms=30.5,
    priority="medium",
    resumed=0,
    degraded=(),
)


@pytest.mark.parametrize(
    ("error", "is_elsewhere"),
    [
        (QueueFull("full"), True),
        (WorkerDraining("stopping"), True),
        (ResourceLimitExceeded("memory"), True),
        (ResourceLimitExceeded("memory", retryable=False), False),
        (RequestTimeout("late", details={"stage": "admission"}), True),
        (RequestTimeout("late", details={"stage": "decode"}), False),
        (InvalidRequest("wrong"), False),
        (InternalError("a fault"), False),
    ],
)
def test_an_error_says_whether_another_worker_could(
    error: WorkerError, *, is_elsewhere: bool
) -> None:
    body = msgspec.json.decode(DIALECT.error_body(error, None))
    assert body.keys() == {"requestId", "type", "error", "code"}
    assert (body["requestId"], body["type"], body["code"]) == (ID, "error", error.code)
    assert error.message in body["error"]
    assert ("No workers" in body["error"]) is is_elsewhere


def test_an_error_is_short() -> None:
    assert len(DIALECT.error_body(InvalidRequest("x" * 10_000), None)) < 700


MEMBER = Member(
    id=member_id("w1"),
    hostname="mac",
    ip="192.0.2.7",
    port=9090,
    model_name="org/model",
    model="models/model",
    loaded_at=1_700_000_000.5,
)


def test_a_worker_has_always_the_same_uuid() -> None:
    assert str(uuid.UUID(member_id("w1"))) == member_id("w1")
    assert member_id("w1") == member_id("w1") != member_id("w2")


def test_a_registration_keeps_to_the_schema() -> None:
    assert msgspec.json.decode(MEMBER.registration(Status.DEGRADED, now=1_700_000_001.25)) == {
        "workerId": member_id("w1"),
        "hostname": "mac",
        "ip": "192.0.2.7",
        "port": 9090,
        "skills": {
            "availableModels": ["org/model"],
            "modelPaths": {"org/model": "models/model"},
            "totalModelSize": 0,
            "lastScanned": 1_700_000_000_500,
        },
        "status": "degraded",
        "timestamp": 1_700_000_001_250,
    }


@pytest.mark.parametrize("port", [None, 0, 80])
def test_a_port_is_one_that_the_schema_takes(port: int | None) -> None:
    member = Member(
        id="x", hostname="h", ip="::1", port=port, model_name="m", model="m", loaded_at=1
    )
    told = msgspec.json.decode(member.registration(Status.ONLINE, now=1))
    assert 1024 <= told["port"] <= 65_535


@pytest.mark.parametrize("cpu_percent", [math.nan, math.inf, -1.0, 400.0, 12.5])
def test_a_heartbeat_keeps_to_the_schema(cpu_percent: float) -> None:
    load = Load(
        active=3,
        handled=4,
        mean_latency_ms=math.nan,
        memory_bytes=3 * 2**30,
        cpu_percent=cpu_percent,
    )
    told = msgspec.json.decode(MEMBER.heartbeat(Status.ONLINE, load, now=1_700_000_001.0))
    assert 0 <= told["metrics"].pop("cpuUsagePercent") <= 100
    assert told == {
        "workerId": member_id("w1"),
        "status": "online",
        "metrics": {
            "memoryUsedGB": 3.0,
            "gpuUtilizationPercent": 0.0,
            "activeRequests": 3,
            "totalRequestsHandled": 4,
            "avgLatencyMs": 0.0,
            "modelsLoaded": ["org/model"],
        },
        "timestamp": 1_700_000_001_000,
    }


def test_a_deregistration_keeps_to_the_schema() -> None:
    assert MEMBER.deregistration(now=2.0) == (
        b'{"workerId":"%s","timestamp":2000}' % member_id("w1").encode()
    )


def test_the_page_shows_what_is_written() -> None:
    page = (DOCS / "wire.md").read_text(encoding="utf-8")
    shown = [
        each.encode()
        for each in re.findall(r"(?m)^```json\n(.*)\n```$", page)
        if '"requestId"' in each
    ]
    writer = DIALECT.AnswerWriter(request_id=ID, model="m", created=1, chat=False)
    full = QueueFull("Request queue full (depth: 100)")
    written = [
        writer.chunk("Hello"),
        writer.closing(FinishReason.STOP, usage(1), NOTE),
        DIALECT.error_body(full, None),
    ]
    assert [msgspec.json.decode(each) | {"latencyMs": 0} for each in shown] == [
        msgspec.json.decode(each) | {"latencyMs": 0} for each in written
    ]
