"""Small plans written by hand."""

from __future__ import annotations

import json
from typing import Any

from .plan import VOCABULARY, WORKER_ID, Call, Happening, Plan

QUIET = (
    "worker.monitoring.report_interval_ms=60000",
    "fleet.beat_interval_ms=60000",
    "fleet.forget_after_ms=180000",
    "worker.resource_limits.check_interval_ms=60000",
    f"worker.simulated.vocabulary={VOCABULARY}",
)


def call(at: float, name: str, **fields: Any) -> Call:
    """One request with its own inbox; two tokens unless said otherwise."""
    cancel, after_s = fields.pop("cancel", None), fields.pop("cancel_after_s", 0.0)
    copies, inbox = fields.pop("copies", 1), fields.pop("inbox", f"_INBOX.{name}")
    fields = {"prompt": f"w1 w2 {name}", "max_tokens": 2, "seed": 1, "request_id": name, **fields}
    return Call(
        at=at,
        subject=f"inference.{WORKER_ID}",
        body=json.dumps(fields).encode(),
        fields=fields,
        inbox=inbox,
        copies=copies,
        cancel=cancel,
        cancel_after_s=after_s,
    )


def rubbish(at: float) -> Call:
    return Call(
        at=at, subject=f"inference.{WORKER_ID}", body=b'{"prompt": 1}', inbox="_INBOX.rubbish"
    )


def scene(
    *overrides: str, calls: tuple[Call, ...], happenings: tuple[Happening, ...] = (), **more: Any
) -> Plan:
    return Plan(
        seed=more.pop("seed", 1),
        overrides=(*QUIET, *overrides),
        calls=calls,
        happenings=happenings,
        **more,
    )
