"""One request's own task: from its admission to its terminal message.

The request's cancel scope is entered here and nowhere else. It carries the deadline (queue time
included), a cancel message, the caller's disappearance, and the drain; whatever ends it, the
request leaves the queue, the batch and the door in one synchronous section, and exactly one
terminal message goes out.
"""

from __future__ import annotations

from collections.abc import Callable

import trio
from loguru import logger

from trio_worker.core.memory import MB, ReservationLedger
from trio_worker.core.priority import name_of
from trio_worker.core.rates import ServiceRate
from trio_worker.core.request import Request
from trio_worker.core.sequence import Ending, Event, Sequence, Stage
from trio_worker.errors import (
    SHUTTING_DOWN,
    ContextLengthExceeded,
    EngineFailed,
    InternalError,
    RequestCancelled,
    RequestTimeout,
    ResourceLimitExceeded,
    WorkerDraining,
    WorkerError,
)
from trio_worker.flow.answer import Answer
from trio_worker.flow.reply import Reply
from trio_worker.flow.serving import Serving
from trio_worker.monitoring.counters import RequestCounters

HANDED_ON = "handed_on"
"""The outcome of a request that another worker has taken over: it has no terminal message here."""


async def respond(
    sequence: Sequence,
    scope: trio.CancelScope,
    reply: Reply,
    *,
    serving: Serving,
    counters: RequestCounters,
    worker_id: str,
    wall_clock: Callable[[], float],
) -> None:
    """Serve one admitted request; returns after its terminal message.

    Cancelled from outside (the drain's deadline, or a crash elsewhere): the terminal message is
    `WORKER_DRAINING`. A fault in here is answered `INTERNAL` and logged; it stays with this
    request, whose state is released like any other's.
    """
    writer = reply.dialect.AnswerWriter(
        request_id=sequence.request_id,
        model=serving.limits.model_name,
        created=int(wall_clock()),
        chat=sequence.request.is_chat,
        choices=sequence.request.choices,
    )
    priority = name_of(sequence.level, serving.levels)
    answer = Answer(sequence, reply, writer, worker_id=worker_id, priority=priority)
    # Unless the request comes to an end of its own, it has been cancelled from outside.
    error: WorkerError | None = WorkerDraining(SHUTTING_DOWN)
    with logger.contextualize(request_id=sequence.request_id):
        try:
            error = await _serve(sequence, scope, answer, serving)
        finally:
            stage = sequence.stage
            _release(sequence, serving)
            if isinstance(error, WorkerDraining) and _has_left(sequence):
                logger.debug("Request ended: another worker takes it over")
                counters.metrics.requests.add(labels=(HANDED_ON, priority))
            else:
                if error is not None and not reply.ended:
                    reply.fail(error, retry_after_ms=serving.admission.retry_after_ms())
                _count(sequence, error, counters, serving.rate, stage=stage, priority=priority)
                _log_end(sequence, error, stage)
                answer.trace_text()


async def _serve(
    sequence: Sequence, scope: trio.CancelScope, answer: Answer, serving: Serving
) -> WorkerError | None:
    """Returns what the request has failed with; None: its answer is complete."""
    try:
        with scope:
            await _complete(sequence, answer, serving)
    except WorkerError as error:
        return error
    except Exception as exc:  # noqa: BLE001 - the boundary of one request
        logger.opt(exception=exc).error("Request failed inside the worker")
        return _internal()
    return _ended_early(sequence, answer, serving.ledger) if scope.cancelled_caught else None


def _release(sequence: Sequence, serving: Serving) -> None:
    """It leaves the queue, the batch and the door in one step."""
    for row in sequence.rows:
        row.left_at = trio.current_time()
        row.advance(Event.END)
        serving.queue_in.withdraw(row)
        serving.scheduler.withdraw(row)
    serving.door.leave(sequence)


def _has_left(sequence: Sequence) -> bool:
    """Whether a request that this worker's end finds without a token goes on at another one."""
    return not _produced(sequence) and sequence.elsewhere is not None and sequence.elsewhere()


def _log_end(sequence: Sequence, error: WorkerError | None, stage: Stage) -> None:
    """One line; what callers bring about is no news, what we fail at is."""
    duration_ms = round(1000 * (trio.current_time() - sequence.arrived_at))
    level = "DEBUG"
    if isinstance(error, InternalError | EngineFailed):
        level = "ERROR"
    elif isinstance(error, RequestTimeout):
        level = "INFO"
    outcome = error.code.value if error else "ok"
    logger.bind(outcome=outcome, stage=stage.value, duration_ms=duration_ms).log(
        level,
        "Request ended: {} at stage {} after {} ms with {} tokens{}",
        outcome,
        stage,
        duration_ms,
        _produced(sequence),
        f": {error.message}" if error else "",
    )


async def _complete(sequence: Sequence, answer: Answer, serving: Serving) -> None:
    """From a place in the queue to the last token. Raises the `WorkerError` that prevents it."""
    answer.open()
    answer.trace_prompt()
    if sequence.stage is Stage.WAITING:
        await answer.alive_while(serving.door.wait_place, sequence)
    prompt = await answer.alive_while(serving.engine.tokenise, sequence.request)
    info = serving.engine.info
    assert info is not None, "a model that tokenises is loaded"
    sequence.request.check_vocabulary(info.vocabulary_size)
    max_tokens = _fit(
        len(prompt.tokens), sequence.request, serving.default_max_tokens, info.context_length
    )
    sequence.degraded += prompt.notes
    for row, choice in zip(sequence.rows, answer.choices, strict=True):
        row.prompt, row.form, row.max_tokens = prompt.tokens, prompt.form, max_tokens
        row.outputs = choice
    _check_memory(sequence, serving.ledger)
    for row in sequence.rows:
        row.advance(Event.TOKENISED)
        row.queued_at = trio.current_time()
        serving.queue_in.send_nowait(row)
    logger.debug(
        "Request queued: {} prompt tokens, up to {} more",
        len(sequence.prompt),
        sequence.max_tokens,
    )
    await answer.wait_end()
    answer.close()


def _fit(prompt: int, request: Request, default: int, context_length: int) -> int:
    """How many tokens the answer may have. Raises `ContextLengthExceeded`."""
    wanted = default if request.max_tokens is None else request.max_tokens
    # An answer that may be cut down to what fits needs room for one token.
    least = 1 if request.fit_max_tokens or request.max_tokens is None else wanted
    room = context_length - prompt
    if room < least:
        raise ContextLengthExceeded(
            f"the prompt has {prompt} tokens and max_tokens is {least}; "
            f"the model's context holds {context_length} together",
            details={
                "prompt_tokens": prompt,
                "max_tokens": least,
                "context_length": context_length,
            },
        )
    return min(wanted, room)


def _check_memory(sequence: Sequence, ledger: ReservationLedger) -> None:
    """Raise `ResourceLimitExceeded` if the request would not fit even if it ran alone."""
    if not ledger.fits_ever(_need(sequence, ledger)):
        raise _too_large(sequence, ledger)


def _need(sequence: Sequence, ledger: ReservationLedger) -> int:
    return ledger.need(prompt=len(sequence.prompt), max_tokens=sequence.max_tokens)


def _too_large(sequence: Sequence, ledger: ReservationLedger) -> ResourceLimitExceeded:
    need_mb, room_mb = _need(sequence, ledger) / MB, ledger.room_ever() / MB
    return ResourceLimitExceeded(
        f"the request may need {need_mb:.1f} MB of cache, and {room_mb:.1f} MB is all there "
        "ever is beside the model: ask for fewer tokens",
        details={
            "need_mb": round(need_mb, 1),
            "room_mb": round(room_mb, 1),
            "prompt_tokens": len(sequence.prompt),
            "max_tokens": sequence.max_tokens,
        },
        retryable=False,
    )


def _ended_early(sequence: Sequence, answer: Answer, ledger: ReservationLedger) -> WorkerError:
    """What to tell the caller of a request whose scope was cancelled."""
    error: WorkerError
    match sequence.ending:
        case Ending.CANCELLED:
            error = RequestCancelled("the request was cancelled")
        case Ending.CALLER_GONE:
            error = RequestCancelled("nobody listens on the reply subject any more")
        case Ending.BACKLOG:
            answer.reply.discard_unsent()
            error = RequestCancelled("NATS was unreachable for so long that the answer piled up")
        case Ending.DRAINING:
            error = WorkerDraining(SHUTTING_DOWN)
        case Ending.FAULT:
            error = _internal()
        case Ending.TOO_LARGE:
            error = _too_large(sequence, ledger)
        case None:
            error = _too_late(sequence, answer)
    return error


def _internal() -> InternalError:
    return InternalError("the worker failed on this request; its log says why")


def _too_late(sequence: Sequence, answer: Answer) -> RequestTimeout:
    request = sequence.request
    return RequestTimeout(
        f"the deadline of {request.timeout_s:g} s passed at stage {sequence.stage}",
        details={
            "stage": sequence.stage.value,
            "tokens": _produced(sequence),
            "timeout_ms": round(1000 * request.timeout_s),
            **({} if request.stream else {"text": answer.text}),
        },
    )


def _count(
    sequence: Sequence,
    error: WorkerError | None,
    counters: RequestCounters,
    rate: ServiceRate,
    *,
    stage: Stage,
    priority: str,
) -> None:
    now = trio.current_time()
    outcome = error.code.value if error else "ok"
    counters.answer(sequence.subject, error, after_s=now - sequence.arrived_at)
    metrics = counters.metrics
    metrics.requests.add(labels=(outcome, priority))
    counters.request.observe(now - sequence.arrived_at, outcome)
    if sequence.ending is not None:
        metrics.cancellations.add(labels=(sequence.ending.value, stage.value))
    if sequence.batched_at is not None:
        metrics.prompt_tokens.add(len(sequence.prompt))
        metrics.cached_tokens.add(sequence.cached)
    metrics.generated_tokens.add(_produced(sequence))
    if any(row.resumed for row in sequence.rows):
        metrics.resumed.add()
    if error is None and sequence.batched_at is not None:
        rate.record(now - sequence.batched_at)


def _produced(sequence: Sequence) -> int:
    """Tokens of all choices."""
    return sum(len(row.produced) for row in sequence.rows)
