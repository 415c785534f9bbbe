"""The examples of docs/wire.md, sent to a worker: what it answers is what the page says."""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Any

import pytest
import trio
from support.paths import DOCS
from support.worker_rig import running_worker
from trio.testing import MockClock

from trio_worker.errors import ErrorCode
from trio_worker.ports import Message
from trio_worker.simulated.broker import MemoryServer
from trio_worker.simulated.jetstream import MemoryJetStream
from trio_worker.wire import native

PAGE = (DOCS / "wire.md").read_text(encoding="utf-8")
TIMES = {"created", "queue_ms", "prefill_ms", "decode_ms"}
"""Fields of which only the type is compared."""


@dataclass(frozen=True)
class Example:
    line: int
    is_request: bool
    message: dict[str, Any]


def examples(page: str) -> list[Example]:
    """The blocks marked `json request` and `json reply`, in order."""
    return [
        Example(
            line=page.count("\n", 0, block.start()) + 1,
            is_request=block[1] == "request",
            message=json.loads(block[2]),
        )
        for block in re.finditer(r"(?ms)^```json (request|reply)\n(.*?)^```$", page)
    ]


def differences(shown: Any, came: Any, path: str = "") -> list[str]:
    """Where what came is not what is shown; `…` within a shown text is anything."""
    if shown == "…":
        return []
    if isinstance(shown, str) and isinstance(came, str) and "…" in shown:
        pattern = ".+".join(map(re.escape, shown.split("…")))
        return [] if re.fullmatch(pattern, came, re.DOTALL) else [f"{path}: {came!r}"]
    if type(shown) is not type(came):
        return [f"{path}: {came!r}"]
    if isinstance(shown, dict):
        found = [f"{path}.{key}: only in the page" for key in shown.keys() - came.keys()]
        found += [f"{path}.{key}: only in the message" for key in came.keys() - shown.keys()]
        for key in shown.keys() & came.keys():
            if key in TIMES and type(shown[key]) is type(came[key]):
                continue
            found += differences(shown[key], came[key], f"{path}.{key}")
        return found
    if isinstance(shown, list):
        if len(shown) != len(came):
            return [f"{path}: {len(came)} entries"]
        return [
            difference
            for index, (each, other) in enumerate(zip(shown, came, strict=True))
            for difference in differences(each, other, f"{path}[{index}]")
        ]
    return [] if shown == came else [f"{path}: {came!r}"]


def as_shown(message: Message) -> dict[str, Any]:
    """The message as the page would show it: what it has not is left out."""
    text = message.body.decode()
    return {
        "subject": message.subject,
        **({"reply": message.reply} if message.reply else {}),
        **({"headers": dict(message.headers)} if message.headers else {}),
        "body": json.loads(text) if text.startswith("{") else text,
    }


def as_sent(shown: dict[str, Any]) -> Message:
    body = shown["body"]
    return Message(
        subject=shown["subject"],
        reply=shown.get("reply"),
        body=body.encode() if isinstance(body, str) else json.dumps(body).encode(),
    )


async def test_the_worker_answers_as_the_page_says(autojump_clock: MockClock) -> None:
    received: dict[str, deque[Message]] = defaultdict(deque)
    server = MemoryServer(random=random.Random(0))
    MemoryJetStream(server)
    async with running_worker(
        *("worker.model_name=demo", "worker.monitoring.report_interval_ms=600000"),
        "nats.jetstream.enabled=true",
        server=server,
    ) as rig:

        def take(message: Message) -> None:
            received[message.subject].append(message)

        for subject in ("_INBOX.me.>", "answers.inference.*", "worker.w1.stats"):
            await rig.caller.subscribe(subject, take)
        found = []
        for example in examples(PAGE):
            if example.is_request:
                rig.caller.publish(as_sent(example.message))
                continue
            waiting = received[example.message["subject"]]
            if not waiting:
                # Longer than any of them takes; the report comes after ten minutes.
                await trio.sleep(600 if example.message["subject"] == "worker.w1.stats" else 10)
            came = as_shown(waiting.popleft()) if waiting else {}
            found += [
                f"wire.md:{example.line}{each}" for each in differences(example.message, came)
            ]
    assert found == []
    assert not any(received.values()), "more came than the page shows"


def test_every_kind_of_exchange_is_shown() -> None:
    shown = examples(PAGE)
    subjects = [each.message["subject"] for each in shown if each.is_request]
    for subject in ("inference", "inference.w1", "inference.model.demo", "inference.cancel"):
        assert subject in subjects
    assert "worker.w1.ping" in subjects
    assert "$SRV.INFO.trio-worker" in subjects
    assert "worker.w1.stats" in {each.message["subject"] for each in shown if not each.is_request}


def test_every_field_header_and_code_is_named() -> None:
    names = [
        *native.FIELD_NAMES,
        *native.WITHOUT_EFFECT,
        *native.WorkerNote.__struct_fields__,
        *native.Header,
        *ErrorCode,
    ]
    assert [name for name in names if f"`{name}`" not in PAGE] == []


def test_everything_that_a_worker_says_it_takes_is_explained() -> None:
    (info,) = (
        each.message["body"]
        for each in examples(PAGE)
        if not each.is_request and each.message["subject"] == "_INBOX.me.info"
    )
    table = PAGE.partition("## Who is there")[2].partition("\n## ")[0]
    assert [key for key in info["metadata"] if f"`{key}`" not in table] == []


@pytest.mark.parametrize(
    ("shown", "came"),
    [
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {"a": True}),
        ({"a": 1}, {}),
        ({}, {"a": 1}),
        ({"queue_ms": 1.0}, {"queue_ms": "1.0"}),
        ({"a": [1]}, {"a": [1, 2]}),
        ({"a": "x-…"}, {"a": "y-1"}),
        ({"a": "x-…"}, {"a": "x-"}),
        ({"a": "x-…"}, {"a": 1}),
    ],
)
def test_a_difference_is_found(shown: Any, came: Any) -> None:
    assert differences(shown, came) != []


def test_what_is_anything_is_no_difference() -> None:
    shown = {"a": "x-…", "b": "…", "queue_ms": 1.0, "c": [{"d": None}]}
    assert differences(shown, {"a": "x-1", "b": [], "queue_ms": 2.5, "c": [{"d": None}]}) == []
