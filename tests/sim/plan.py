"""From a seed to a load, a fault profile and a configuration."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from trio_worker.simulated.engine import Faults

MB = 2**20
WORKER_ID = "w1"
MODEL_NAME = "smollm2-135m-instruct"
VOCABULARY = 999_983
WORDS = tuple(f"w{number}" for number in range(60))

RUBBISH = (
    b"",
    b"{",
    b"[" * 5000,
    b'"text"',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "x", "max_tokens": -1}',
    b'{"prompt": "x", "priority": 99}',
    b'{"prompt": "x", "colour": "red"}',
    b'{"prompt": "x", "model": "another"}',
    b'{"prompt": "x", "max_tokens": 1, "max_completion_tokens": 1}',
    b"\xff\xfe\x00",
    b'{"prompt": "' + b"w " * 9000 + b'", "max_tokens": 1}',
)

CALLERS = (*["ada"] * 4, "bob", "cy")
COMES_BACK = 0.8
"""How probably a broken connection is mended before the worker is stopped."""

FORMS: tuple[dict[str, Any], ...] = (
    {"grammar": {"choice": ["one", "another", "a third"]}},
    {"grammar": {"regex": "[a-f ]{3,40}"}},
    {"response_format": {"type": "json_object"}},
    {
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "pairs",
                "schema": {
                    "type": "object",
                    "properties": {
                        "name": {"type": "string", "maxLength": 12},
                        "pairs": {"type": "array", "items": {"enum": [1, None]}, "maxItems": 4},
                    },
                    "required": ["name", "pairs"],
                    "additionalProperties": False,
                },
            },
        }
    },
)
"""What an answer may have to keep to."""
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in WORDS[:3]
]
"""Called by some prompts, which say their names."""
CHAT_FORMS: tuple[dict[str, Any], ...] = (
    *FORMS,
    {"reasoning_effort": "low"},
    {"reasoning_effort": "low", "max_reasoning_tokens": 2},
    {"tools": TOOLS},
    {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False},
    {"tools": TOOLS, "response_format": {"type": "json_object"}, "reasoning_effort": "high"},
)

SEVERAL = 0.3
"""How probably one of these answers has several choices."""
FORM_FIELDS = frozenset(name for form in CHAT_FORMS for name in form)

WAYS_TO_CANCEL = ("control", "broadcast", "reply", "vanish", "stranger")
"""`stranger`: the 503 of another caller with the same id, which must not count."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One message to the worker, and what its caller does later."""

    at: float
    subject: str
    body: bytes
    fields: dict[str, Any] | None = None
    """None for rubbish."""
    inbox: str | None = None
    copies: int = 1
    cancel: str | None = None
    cancel_after_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Happening:
    """Something that befalls the worker."""

    at: float
    what: str
    value: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    seed: int
    overrides: tuple[str, ...]
    calls: tuple[Call, ...]
    happenings: tuple[Happening, ...] = ()
    faults: Faults = field(default_factory=Faults)
    load_s: float = 0.0
    restart_s: float = 0.5
    max_restarts: int = 1_000_000
    turn_timeout_s: float = 3.0
    prefix_cache_tokens: int = 4096
    context_length: int = 8192
    levels: int = 3
    aging_s: float | None = 5.0
    drain_timeout_s: float = 30.0
    vocabulary: int = VOCABULARY
    critical_mb: int = 10_240
    cache_bytes_per_token: int = 4096
    backlog_bytes: int = 256 * 2**10

    disturbed: bool = False
    """Scopes are cancelled from outside: then errors need no cause in the plan."""

    @property
    def may_fault(self) -> bool:
        """Whether the worker may end with an exception."""
        return (
            self.disturbed
            or self.max_restarts < 1000
            or any(each.what in {"close", "cancel"} for each in self.happenings)
        )


def make_plan(seed: int) -> Plan:
    rng = random.Random(seed)
    levels = rng.choice((1, 2, 3, 3, 4))
    aging_ms = rng.choice((None, 100, 500, 5000))
    max_batch = rng.choice((1, 2, 3, 4, 8))
    drain_ms = rng.choice((100, 1000, 30_000))
    duration_s = rng.uniform(1, 9)
    # Caches of a megabyte a token: then room for them is scarce without any pressure from outside.
    tight = rng.random() < 0.3
    soft_mb, critical_mb = (rng.choice((200, 300)), 400) if tight else (8192, 10_240)
    overrides = (
        f"worker.request_queue.priority_levels={levels}",
        f"worker.request_queue.aging_ms={'null' if aging_ms is None else aging_ms}",
        f"worker.request_queue.max_depth={rng.choice((1, 2, 8, 20, 20))}",
        f"worker.request_queue.reject_when_full={_yes(rng, 0.6)}",
        f"worker.request_queue.enabled={_yes(rng, 0.85)}",
        f"worker.continuous_batching.enabled={_yes(rng, 0.85)}",
        f"worker.continuous_batching.max_batch_size={max_batch}",
        f"worker.continuous_batching.min_batch_size={rng.randint(1, max_batch)}",
        f"worker.continuous_batching.batch_timeout_ms={rng.choice((0, 50, 400))}",
        f"worker.continuous_batching.adaptive_timeout={_yes(rng, 0.5)}",
        f"worker.continuous_batching.preempt={_yes(rng, 0.6)}",
        f"worker.continuous_batching.prefill_chunk_tokens={rng.choice((16, 64, 512))}",
        "worker.resource_limits.check_interval_ms=100",
        f"worker.resource_limits.max_memory_mb={soft_mb}",
        f"worker.resource_limits.critical_memory_mb={critical_mb}",
        f"worker.resource_limits.relief_timeout_ms={rng.choice((1000, 60_000))}",
        f"worker.requests.refuse_unmeetable={_yes(rng, 0.5)}",
        f"worker.resource_limits.degraded_max_tokens={rng.choice((4, 128))}",
        "worker.requests.default_max_tokens=12",
        f"worker.requests.max_prompt_bytes={rng.choice((2_000, 16_000))}",
        f"worker.drain_timeout_ms={drain_ms}",
        f"worker.simulated.turn_ms={rng.choice((5, 20, 60))}",
        f"worker.simulated.vocabulary={VOCABULARY}",
        # From a source of its own: the rest of a seed's plan is what it was.
        f"worker.engine.lead_ms={random.Random(f'lead {seed}').choice((0, 0, 10, 50, 200, 1000))}",
    )
    calls = _in_forms(_calls(rng, duration_s, levels), random.Random(f"forms {seed}"))
    callers = random.Random(f"callers {seed}")
    share = callers.choice((0.0, 0.5, 0.9))
    per_caller = callers.choice(("null", "null", "null", "1", "3", "8")) if share else "null"
    return Plan(
        seed=seed,
        overrides=(*overrides, f"worker.request_queue.max_per_caller={per_caller}"),
        calls=tuple(
            _by_caller(call, callers) if callers.random() < share else call for call in calls
        ),
        happenings=tuple(_happenings(rng, duration_s, soft_mb, critical_mb)),
        faults=_faults(rng),
        load_s=rng.choice((0.0, 0.0, 0.7)),
        restart_s=rng.choice((0.05, 0.5, 2.0)),
        max_restarts=rng.choice((0, 2)) if rng.random() < 0.06 else 1_000_000,
        turn_timeout_s=rng.choice((1.0, 3.0)),
        prefix_cache_tokens=rng.choice((0, 200, 4096)),
        context_length=rng.choice((60, 8192, 8192, 8192)),
        levels=levels,
        aging_s=None if aging_ms is None else aging_ms / 1000,
        drain_timeout_s=drain_ms / 1000,
        critical_mb=critical_mb,
        cache_bytes_per_token=MB if tight else 4096,
        backlog_bytes=rng.choice((256 * 2**10, 256 * 2**10, 2000)),
    )


def without_trouble(plan: Plan) -> Plan:
    """The same load and configuration, and nothing that goes wrong."""
    return replace(
        plan,
        happenings=(),
        faults=Faults(deadly_words=frozenset(), failing_words=frozenset()),
        max_restarts=1_000_000,
    )


def _yes(rng: random.Random, probability: float) -> str:
    return "true" if rng.random() < probability else "false"


def _faults(rng: random.Random) -> Faults:
    quiet = Faults(deadly_words=frozenset({"poison"}), failing_words=frozenset({"broken"}))
    if rng.random() < 0.4:
        return quiet

    def rate(most: float) -> float:
        return rng.uniform(0, most) if rng.random() < 0.35 else 0.0

    return replace(
        quiet,
        slow_turn=rate(0.05),
        slow_turn_s=rng.choice((0.2, 0.9)),
        hang=rate(0.004),
        crash=rate(0.02),
        fail_sequence=rate(0.05),
        out_of_memory=rate(0.04),
        refuse_tokenise=rate(0.05),
        crash_tokenise=rate(0.03),
        hang_tokenise=rate(0.03),
        slow_tokenise=rate(0.5),
        slow_tokenise_s=rng.choice((0.05, 0.4)),
    )


def _calls(rng: random.Random, duration_s: float, levels: int) -> list[Call]:
    calls: list[Call] = []
    count = rng.randint(3, 60)
    shape = rng.choice(("even", "burst", "bursts"))
    starts = [rng.uniform(0, duration_s) for _ in range(3)]
    for number in range(count):
        at = {
            "even": rng.uniform(0, duration_s),
            "burst": starts[0] + rng.uniform(0, 0.05),
            "bursts": rng.choice(starts) + rng.choice((0.0, rng.uniform(0, 0.3))),
        }[shape]
        calls.append(_call(rng, at, number, levels))
    return sorted(calls, key=lambda call: call.at)


def _in_forms(calls: list[Call], rng: random.Random) -> tuple[Call, ...]:
    """The same, of which some want more; `rng` is a source of its own, as above."""
    share = rng.choice((0.0, 0.3, 0.6))
    return tuple(_in_form(call, rng) if rng.random() < share else call for call in calls)


def _in_form(call: Call, rng: random.Random) -> Call:
    if call.fields is None:
        return call
    fields = {**call.fields, **rng.choice(CHAT_FORMS if "messages" in call.fields else FORMS)}
    if rng.random() < SEVERAL:
        fields["n"] = rng.choice((2, 3, 8))
    return replace(call, fields=fields, body=json.dumps(fields).encode())


def _by_caller(call: Call, rng: random.Random) -> Call:
    """The same, with a caller; of three one sends the most."""
    if call.fields is None:
        return call
    caller, way = rng.choice(CALLERS), rng.choice(("caller", "user", "subject"))
    if way == "subject" and call.subject != f"inference.{WORKER_ID}":
        # inference.by.{caller}, and with .model.{model} behind it.
        return replace(call, subject=call.subject.replace("inference", f"inference.by.{caller}"))
    fields = {**call.fields, "caller" if way == "subject" else way: caller}
    return replace(call, fields=fields, body=json.dumps(fields).encode())


def caller_of(call: Call) -> str:
    """Who sends it; nobody, if it does not say."""
    if call.subject.startswith("inference.by."):
        return call.subject.split(".")[2]
    fields = call.fields or {}
    return str(fields.get("caller") or fields.get("user") or "")


def _call(rng: random.Random, at: float, number: int, levels: int) -> Call:
    inbox: str | None = f"_INBOX.c{number}"
    subject = rng.choice(
        (*[f"inference.{WORKER_ID}"] * 4, "inference", f"inference.model.{MODEL_NAME}")
    )
    if rng.random() < 0.03:
        inbox = rng.choice((None, "orders.new", "inference.cancel", "_INBOX.>"))
    if rng.random() < 0.06:
        return Call(at=at, subject=subject, body=rng.choice(RUBBISH), inbox=inbox)
    fields = _fields(rng, number, levels)
    return Call(
        at=at,
        subject=subject,
        body=json.dumps(fields).encode(),
        fields=fields,
        inbox=inbox,
        copies=2 if rng.random() < 0.04 else 1,
        cancel=rng.choice(WAYS_TO_CANCEL) if rng.random() < 0.25 else None,
        cancel_after_s=rng.choice((0.0, rng.uniform(0, 0.2), rng.uniform(0, 3))),
    )


def _fields(rng: random.Random, number: int, levels: int) -> dict[str, Any]:
    text = _prompt(rng)
    options: tuple[tuple[float, str, Callable[[], Any]], ...] = (
        (0.9, "max_tokens", lambda: rng.choice((1, 2, 8, 30, 70))),
        (0.8, "seed", lambda: rng.randrange(1000)),
        (0.5, "stream", lambda: True),
        (0.6, "priority", lambda: rng.randrange(levels)),
        (0.3, "timeout_ms", lambda: rng.choice((1, 50, 400, 2000))),
        (0.1, "stop", lambda: [rng.choice(("ba", "defi", "go ku", "la "))]),
        (0.05, "logprobs", lambda: True),
    )
    prompt = rng.choice(({"prompt": text}, {"messages": [{"role": "user", "content": text}]}))
    return {
        **prompt,
        **{name: draw() for share, name, draw in options if rng.random() < share},
        "request_id": f"same{rng.randrange(2)}" if rng.random() < 0.1 else f"r{number}",
    }


def _prompt(rng: random.Random) -> str:
    words = [rng.choice(WORDS) for _ in range(rng.choice((1, 3, 10, 40, 90)))]
    if rng.random() < 0.3:
        # A beginning in common with others, for the kept caches.
        words = [*WORDS[:30], *words[:10]]
    if rng.random() < 0.04:
        words.append(rng.choice(("poison", "broken")))
    return " ".join(words)


def _happenings(
    rng: random.Random, duration_s: float, soft_mb: int, critical_mb: int
) -> list[Happening]:
    """Each kind of trouble with its own probability; most plans have one or two of them."""

    def when() -> float:
        return rng.uniform(0, duration_s)

    kinds: tuple[tuple[float, Callable[[], list[Happening]]], ...] = (
        (0.3, lambda: _broken_line(rng, when)),
        (0.2, lambda: _slow_line(rng, when())),
        (0.04, lambda: [Happening(at=when(), what="close")]),
        (0.2, lambda: [Happening(at=when(), what="crash") for _ in range(rng.randint(1, 3))]),
        (0.1, lambda: [Happening(at=when(), what="recycle")]),
        (0.3, lambda: _memory_curve(rng, when(), soft_mb, critical_mb)),
        (0.25, lambda: _stops(rng, rng.choice((when(), when(), rng.uniform(0, 0.8))))),
    )
    happenings = [each for share, make in kinds if rng.random() < share for each in make()]
    return sorted(happenings, key=lambda each: each.at)


def _broken_line(rng: random.Random, when: Callable[[], float]) -> list[Happening]:
    happenings = []
    for _ in range(rng.randint(1, 3)):
        at = when()
        happenings.append(Happening(at=at, what="disconnect"))
        if rng.random() < COMES_BACK:
            happenings.append(Happening(at=at + rng.choice((0.01, 0.5, 6.0)), what="reconnect"))
    return happenings


def _slow_line(rng: random.Random, at: float) -> list[Happening]:
    return [
        Happening(at=at, what="slow", value=rng.choice((0.001, 0.05, 0.8))),
        Happening(at=at + rng.uniform(0, 3), what="slow", value=0.0),
    ]


def _memory_curve(rng: random.Random, at: float, soft_mb: int, critical_mb: int) -> list[Happening]:
    """Up over the soft limit, about the hard one, and down again."""
    band = critical_mb - soft_mb
    happenings = []
    for lowest, highest in ((0.05, 0.6), (0.7, 1.2), (-0.1, 0.9)):
        used = int(soft_mb + band * rng.uniform(lowest, highest))
        happenings.append(Happening(at=at, what="memory", value=used))
        at += rng.uniform(0.1, 2)
    return [*happenings, Happening(at=at, what="memory", value=100)]


def _stops(rng: random.Random, at: float) -> list[Happening]:
    """SIGTERM, once or twice."""
    again = [at + rng.choice((0.0, 0.3, 2.0))] if rng.random() < 0.5 else []
    return [Happening(at=each, what="stop") for each in (at, *again)]
