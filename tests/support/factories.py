"""Small values for tests of the core."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from trio_worker.core.admission import Admission
from trio_worker.core.memory import PressureGauge
from trio_worker.core.rates import ArrivalRate, ServiceRate
from trio_worker.core.request import Request
from trio_worker.core.request_queue import RequestQueue
from trio_worker.core.sequence import Event, Sequence, Stage, sequences_of
from trio_worker.protocol.turn import (
    EngineMemory,
    FinishReason,
    Output,
    Prefill,
    Report,
    RequestId,
    Sampling,
    SequenceFailure,
)
from trio_worker.wire.beats import Beat

_arrivals = itertools.count()


@dataclass
class Scope:
    """Counts how often it is cancelled."""

    reasons: list[str | None] = field(default_factory=list)

    def cancel(self, reason: str | None = None) -> None:
        self.reasons.append(reason)


def make_request(request_id: str = "r", **changes: Any) -> Request:
    values: dict[str, Any] = {
        "request_id": RequestId(request_id),
        "prompt": "a prompt",
        "messages": (),
        "max_tokens": 10,
        "fit_max_tokens": False,
        "sampling": Sampling(),
        "stop": (),
        "stream": False,
        "priority": 1,
        "timeout_s": 30.0,
        "caller": None,
    }
    return Request(**{**values, **changes})


def make_beat(worker_id: str, **changes: Any) -> Beat:
    """Of a worker with two slots that has nothing to do."""
    values = {"model": "tiny", "slots": 2, "in_flight": 0, "queued": 0, "accepting": True}
    return Beat(id=worker_id, **{**values, **changes})


def make_sequence(
    request_id: str = "r",
    *,
    level: int = 1,
    at: float = 0.0,
    aging_s: float | None = 5.0,
    stage: Stage = Stage.TOKENISING,
    choices: int = 1,
    caller: str | None = None,
) -> Sequence:
    """That of the first choice."""
    sequence = sequences_of(
        make_request(request_id, priority=level, choices=choices, caller=caller),
        subject="",
        reply_subject="_INBOX.x",
        arrivals=_arrivals,
        arrived_at=at,
        aging_s=aging_s,
        scope=Scope(),
    )
    for row in sequence.rows:
        row.prompt = (1, 2, 3)
        row.max_tokens = 100
        if stage is Stage.QUEUED:
            row.advance(Event.TOKENISED)
    return sequence


def make_admission(**changes: Any) -> Admission:
    """Two slots and seven places, nothing else against anybody."""
    values: dict[str, Any] = {
        "queue_enabled": True,
        "max_depth": 7,
        "max_per_caller": None,
        "reject_when_full": True,
        "slots": 2,
        "refuse_unmeetable": True,
        "gauge": PressureGauge(soft_bytes=1000, critical_bytes=2000),
        "queue": RequestQueue(max_size=9),
        "rate": ServiceRate(),
        "arrivals": ArrivalRate(),
    }
    return Admission(**{**values, **changes})


def make_report(
    outputs: list[tuple[str, FinishReason | None]] | None = None,
    *,
    residents: set[str],
    prefills: list[tuple[str, int, int]] | None = None,
    failures: list[str] | None = None,
    seconds: float = 0.1,
    prefilled: int = 0,
) -> Report:
    return Report(
        outputs=tuple(
            Output(request_id=RequestId(request_id), token=7, text="x ", finish=finish)
            for request_id, finish in outputs or []
        ),
        prefills=tuple(
            Prefill(request_id=RequestId(request_id), done=done, total=total)
            for request_id, done, total in prefills or []
        ),
        failures=tuple(
            SequenceFailure(request_id=RequestId(request_id), message="broken")
            for request_id in failures or []
        ),
        residents=frozenset(RequestId(each) for each in residents),
        memory=EngineMemory(active=1, cache=2),
        seconds=seconds,
        prefill_tokens=prefilled,
        prefill_calls=int(prefilled > 0),
        prefill_seconds=seconds if prefilled else 0.0,
    )
